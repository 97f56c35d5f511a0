"""Help on the command line: what the commands are, and the fields of a job in three lengths.

Short: a line for each field that is required or often used, in groups, and a line a section. `--help FIELD` shows a
field, or a section with all that is in it, in full, and `--help all` everything. All three are made from the same
dataclasses that load the configuration, and their doc strings.
"""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_origin

from imgtok.config import (
    OF_THE_MODEL,
    ConfigError,
    FieldHelp,
    about,
    describe,
    did_you_mean,
    field_docs,
    field_types,
    kind_name,
    sections_in,
)

HELP = ("--help", "-h")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "what to work on": (
        "model", "tokenizer", "vae", "encoder", "images", "originals", "data", "reference", "tokens", "latents",
        "text", "init", "classes", "prompts", "metrics",
    ),
    "where to write": ("out", "format", "layout"),
    "how much": (
        "training.steps", "training.batch_size", "num", "per_class", "num_tokens", "rates", "eps", "budget",
        "image_size", "held_out", "batch_size", "seed",
    ),
}  # fmt: skip
"""What people ask for first, in every job that has it; what is required comes before, everything else after."""
LEFT = 32
"""Columns of names and defaults in the short lists."""


@dataclass(frozen=True)
class ModelSettings:
    """Settings that a model brings along, for the sections `sampling` and `decoding` of a job."""

    title: str
    lines: Sequence[FieldHelp]


@dataclass(frozen=True)
class Page:
    """The help of one job."""

    config_class: Any
    command: str
    """Such as "imgtok train tokenizer"."""
    positional: str | None = None
    """The field that a lone word fills."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the arguments say: of a union whose kind is among them, only that member is shown."""
    settings: Sequence[ModelSettings] = ()
    notes: Sequence[str] = ()
    """What else there is to say at the end."""

    def text(self, asked: str | None = None) -> str:
        """The short page; all of it for "all"; or a field or section. Raises ConfigError for one that there is not."""
        lines = [line for line in describe(self.config_class) if line.name != "job" and self._is_chosen(line)]
        if asked is None:
            return "\n".join([*self._head(), *self._short(lines), *self._foot()])
        if asked == "all":
            title = _heading("Fields: what each must be [default]")
            settings = settings_in_full(self.settings)
            return "\n".join([*self._head(), "", title, *_in_full(lines), *settings, *self._notes()])
        return "\n".join(self._about(asked.replace("-", "_"), lines))

    def _is_chosen(self, line: FieldHelp) -> bool:
        """Whether its `when` agrees with what is given."""
        choices = (choice.partition("=") for choice in line.when.split(", ") if choice)
        return all(str(self.given.get(name, kind)) == kind for name, _, kind in choices)

    def _head(self) -> list[str]:
        first = lone = ""
        if self.positional is not None:
            name, several = self.positional.upper(), self._takes_several(self.positional)
            first = f"[{name} ...] " if several else f"[{name}] "
            lone = f" {name}, a lone word, is {self.positional}=WORD."
            lone = f" {name}, lone words, are {self.positional}=A,B." if several else lone
        usage = f"usage: {self.command} {first}[CONFIG] [key=value ...] [--key value ...]"
        told = textwrap.fill(about(self.config_class), _width())
        words = (
            f"In any order.{lone} CONFIG is a .yaml file or a name from `imgtok config --list`. Lists are written a,b."
        )
        return [usage, *([""] if told else []), *told.splitlines(), "", *textwrap.wrap(words, _width())]

    def _takes_several(self, name: str) -> bool:
        """Whether a field is a list."""
        return get_origin(field_types(self.config_class)[name]) is tuple

    def _short(self, lines: Sequence[FieldHelp]) -> list[str]:
        entries = self._entries(lines)
        required = [line.name for line in lines if line.default == "required" and not line.when]
        text: list[str] = []
        rest = [name for name in entries if name not in required and "." not in name]
        for title, names in {"required": tuple(required), **GROUPS}.items():
            chosen = [name for name in names if name in entries and (title == "required" or name not in required)]
            rest = [name for name in rest if name not in chosen]
            text += _group(title, [entries[name] for name in chosen])
        text += _group("more", [entries[name] for name in rest if not entries[name][0].endswith(".*")])
        text += _group("sections", [entries[name] for name in rest if entries[name][0].endswith(".*")])
        for part in self.settings:
            entries_of_model = [(line.name, line.default, line.doc) for line in part.lines]
            text += _group(part.title, entries_of_model) or ["", part.title]
        return text

    def _entries(self, lines: Sequence[FieldHelp]) -> dict[str, tuple[str, str, str]]:
        """Name -> (name, default, doc string) of every field of the job itself, and of fields inside of sections."""
        known = {line.name: line for line in lines if not line.when}
        docs, entries = field_docs(self.config_class), {}
        for name, annotation in field_types(self.config_class).items():
            sections = sections_in(annotation, every=True)
            if name == "job":
                continue
            if not sections and not known[name].type.startswith(OF_THE_MODEL):
                entries[name] = (name, known[name].default, known[name].doc)
                continue
            inside = sum(line.name.startswith(f"{name}.") for line in lines)
            size = f" ({inside} fields)" if inside else ""
            if len(sections) > 1 and f"{name}.kind" not in self.given:
                size = f" (kind {', '.join(kind_name(section) for section in sections)})"
            default = known[name].default.removeprefix(f"{name}.") if name in known else ""
            entries[name] = (
                f"{name}.*",
                "" if default == "{}" else default,
                _first_sentence(docs.get(name, "")) + size,
            )
        return {name: (name, line.default, line.doc) for name, line in known.items() if "." in name} | entries

    def _about(self, asked: str, lines: Sequence[FieldHelp]) -> list[str]:
        """The field that is asked for, or the section with all that is in it, or fields of that name in sections."""
        settings = [line for part in self.settings for line in part.lines]
        every = [*lines, *settings]
        found = [line for line in every if line.name == asked or line.name.startswith(f"{asked}.")]
        found = found or [line for line in every if line.name.endswith(f".{asked}")]
        top, types = asked.split(".")[0], field_types(self.config_class)
        if not any(line.name.startswith(f"{top}.") for line in found) and top in types:
            found = found or [line for line in lines if line.name == top and line.type.startswith(OF_THE_MODEL)]
            if any(line.type.startswith(OF_THE_MODEL) for line in found) and not settings:
                model = self.positional.upper() if self.positional else "model=MODEL"
                hint = f"Name the model to see its settings: {self.command} {model} --help {top}"
                hint = "The model that is named has none." if self.given.get(self.positional or "model") else hint
                return [*_in_full(found), *textwrap.wrap(hint, _width(), break_long_words=False)]
        if not found:
            sections = {".".join(parts[:n]) for line in every for parts in [line.name.split(".")] for n in (1, 2)}
            known = [*sections, *(line.name for line in every), "all"]
            leaf = next((line.name for line in every if _alike(asked, line.name.split(".")[-1])), None)
            hint = did_you_mean(asked, known) or (f"; did you mean {leaf!r}?" if leaf else "")
            raise ConfigError(f"command line: {self.command} has no field or section {asked!r}{hint}")
        doc = field_docs(self.config_class).get(asked, "")
        own = doc and not any(line.name == asked for line in found)
        return [*([_bold(asked), *_wrapped(doc)] if own else []), *_in_full(found)]

    def _foot(self) -> list[str]:
        rows = [
            (f"{self.command} --help FIELD", "one field or section in full"),
            (f"{self.command} --help all", "everything"),
        ]
        width = max(len(left) for left, _ in rows) + 2
        return ["", *(f"{left:{width}}{right}" for left, right in rows), *self._notes()]

    def _notes(self) -> list[str]:
        return ["", *self.notes] if self.notes else []


def overview(usage: str, jobs: Mapping[str, tuple[str, str]], tools: Mapping[str, str]) -> str:
    """All commands: `imgtok help`. `jobs` is command -> (module, what it does)."""
    width = max(map(len, [*jobs, *tools]))
    return "\n".join(
        [
            "imgtok: image tokenizers, and generators on their tokens",
            "",
            f"usage: imgtok JOB {usage}",
            "       imgtok sample MODEL ...      a model may come as a lone word, before or after the rest",
            "       imgtok help JOB              the fields of a job, also imgtok JOB --help;",
            "                                    --help FIELD shows one, --help all all of them",
            "       imgtok --version",
            "",
            _heading("jobs:"),
            *(f"  {_bold(f'{command:{width}}')}  {told}" for command, (_, told) in jobs.items()),
            "",
            _heading("tools:"),
            *(f"  {_bold(f'{tool:{width}}')}  {told}" for tool, told in tools.items()),
        ]
    )


def settings_in_full(settings: Sequence[ModelSettings]) -> list[str]:
    """Lines: every setting under the title of its model."""
    return [text for part in settings for text in ["", _heading(part.title), *_in_full(part.lines)]]


def group_help(first: str, jobs: Mapping[str, tuple[str, str]]) -> str:
    """The commands that begin with a word: `imgtok train --help`."""
    mine = {command: told for command, (_, told) in jobs.items() if command.startswith(f"{first} ")}
    width = max(map(len, mine))
    lines = [f"  {_bold(f'{command:{width}}')}  {told}" for command, told in mine.items()]
    return "\n".join(
        [
            f"usage: imgtok {first} {'|'.join(command.split()[1] for command in mine)} ...",
            "",
            *lines,
            "",
            f"imgtok {next(iter(mine))} --help lists the fields of one",
        ]
    )


# ------------------------------------------------------------------------------------------- internals


def _in_full(lines: Sequence[FieldHelp]) -> list[str]:
    """Fields with what each must be, its default and its doc string, those of a union under headings."""
    text, section = list[str](), ""
    for line in lines:
        if line.when != section:
            section = line.when
            text += ["", _heading(f"  with {section}:")] if section else [""]
        text += [f"  {_bold(line.name)}: {line.type} [{line.default}]", *_wrapped(line.doc)]
    return text


def _wrapped(doc: str) -> list[str]:
    return textwrap.wrap(doc, _width(), initial_indent="      ", subsequent_indent="      ")


def _group(title: str, entries: Sequence[tuple[str, str, str]]) -> list[str]:
    """A heading and a line for each (name, default, doc string); nothing for none."""
    return ["", _heading(title), *(_line(*entry) for entry in entries)] if entries else []


def _line(name: str, default: str, doc: str) -> str:
    room, default = max(LEFT - len(name) - 7, 6), default.strip("'")
    shown = default if len(default) <= room else default[: room - 3] + "..."
    left = f" [{shown}]" if default not in ("", "[]", "required") else ""
    width = max(_width() - max(LEFT, len(name + left) + 4), 24)
    lines = textwrap.wrap(_first_sentence(doc), width, max_lines=2 if name.endswith(".*") else 1, placeholder=" ...")
    first = f"  {_bold(name)}{left:{max(0, LEFT - len(name) - 4)}}  {''.join(lines[:1])}".rstrip()
    return "\n".join([first, *(" " * LEFT + line for line in lines[1:])])


def _first_sentence(doc: str) -> str:
    return re.split(r"(?<=[.;])\s", doc, maxsplit=1)[0].rstrip(".;")


def _alike(one: str, other: str) -> bool:
    return bool(difflib.get_close_matches(one, [other], n=1, cutoff=0.8))


def _width() -> int:
    return max(40, min(110, shutil.get_terminal_size().columns))


def _heading(text: str) -> str:
    return _styled(text, "4")


def _bold(text: str) -> str:
    return _styled(text, "1")


def _styled(text: str, code: str) -> str:
    """`text` underlined or bold where a terminal shows it."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") in (None, "dumb")
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def suggest(word: str, known: Iterable[str]) -> str:
    """What to add to a message about an unknown command."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."
