"""What documents and messages tell people to type: nothing that a shell reads otherwise; lists are taken as `a,b`."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from imgtok import hub
from imgtok.cli import JOBS
from imgtok.config import Place, Raw, convert, field_types, sections_in

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "configs").rglob("*.yaml"))]
SOURCES = [path for folder in ("imgtok", "generators", "train", "sample") for path in (ROOT / folder).rglob("*.py")]


def commands(text: str) -> Iterator[str]:
    """The `imgtok ...` lines of a document or of the comments of a configuration, with their continuations."""
    lines = re.sub(r"\\\n#?", " ", text).splitlines()
    for line in lines:
        stripped = line.removeprefix("#").strip()
        if stripped.startswith("imgtok "):
            yield re.sub(r"\s#\s.*", "", stripped)
    yield from re.findall(r"`(imgtok [^`]+)`", text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_mean_the_same_in_every_shell(path: Path) -> None:
    for command in commands(path.read_text(encoding="utf-8")):
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
        assert not re.search(r"[\[\]*?]|\{[^}]|[^ ]~", bare), f"{command}: zsh takes brackets and stars for patterns"
        assert not re.search(r"[\w.]=\[", command), f"{command}: a list is written a,b"


def texts(path: Path) -> Iterator[str]:
    """The string literals of a module; of one with values in it, the parts between them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_and_doc_strings_write_lists_without_brackets() -> None:
    found = []
    for path in SOURCES:
        for text in texts(path):
            shell = re.sub(r"(pipe|model|model\.\w+)\([^)]*\)", "", text)  # calls in Python
            found += [(path.name, match) for match in re.findall(r"[a-z_.]+=\[[^\]]*\]?", shell)]
    assert [(name, text) for name, text in found if name != "pipeline.py"] == []


def lists(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and annotations of the fields of a dataclass and of its sections that hold lists."""
    for name, annotation in field_types(kind).items():
        for option in typing.get_args(annotation) if type(None) in typing.get_args(annotation) else (annotation,):
            if typing.get_origin(option) is tuple:
                yield prefix + name, annotation
        for section in sections_in(annotation, every=True):
            yield from lists(section, f"{prefix}{name}.")


def examples(item: Any) -> list[str]:
    """Two items as people type them."""
    options = typing.get_args(item) if typing.get_origin(item) is Literal else ()
    if options:
        return [str(option) for option in (*options, *options)[:2]]
    return {int: ["1", "2"], float: ["0.25", "1e-1"]}.get(getattr(item, "__origin__", item), ["a", "b.*"])


def every_list() -> list[tuple[str, Any]]:
    found = []
    for command, (module, _) in JOBS.items():
        found += [(f"{command}: {name}", kind) for name, kind in lists(importlib.import_module(module).Config)]
    for table in (hub.TOKENIZERS, hub.AUTOENCODERS, hub.GENERATORS):
        for kind in table:
            model = hub.model_class(kind)
            found += [(f"{kind}: {name}", annotation) for name, annotation in lists(model.config_class)]
    return found


def test_every_list_is_taken_with_commas_alone() -> None:
    checked = 0
    for name, annotation in every_list():
        option = next(o for o in (annotation, *typing.get_args(annotation)) if typing.get_origin(o) is tuple)
        items = typing.get_args(option)
        if dataclasses.is_dataclass(items[0]):
            continue
        words = examples(items[0])
        place = Place("command line", name)
        plain = convert(annotation, Raw(",".join(words)), place, None)
        assert plain == convert(annotation, Raw(f"[{', '.join(map(repr_of, words))}]"), place, None), name
        assert len(plain) == 2
        if items[-1] is Ellipsis:
            assert len(convert(annotation, Raw(words[0]), place, None)) == 1, name
            assert convert(annotation, Raw(""), place, None) == (), name
        checked += 1
    assert checked > 30


def repr_of(word: str) -> str:
    return word if re.fullmatch(r"[\d.e-]+", word) else f"'{word}'"
