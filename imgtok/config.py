"""Configuration: YAML files and `key=value` overrides, loaded strictly into frozen dataclasses.

A configuration is a keyword-only dataclass with a doc string literal under each field; ranges are
`Annotated` types (`PositiveInt`, `Fraction`, ...). A field that may hold one of several dataclasses is
written as their union, and the field `kind: Literal["..."]` of each selects it: the union is the registry.
Sections of a model that is known later, and unions whose members are entries of a table: `imgtok.sections`.
Every mistake raises `ConfigError`, which names the file, the field, what was given and what is allowed.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import logging
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml

from imgtok.files import replacing

T = TypeVar("T")
logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A mistake in a configuration. The message names the source, the dotted field, and what is allowed."""


@dataclass(frozen=True)
class Range:
    """The numbers that an `Annotated` field accepts; `None` leaves that side open."""

    low: float | None = None
    high: float | None = None
    exclusive_low: bool = False
    note: str = ""
    """What is said after the numbers."""

    def __contains__(self, number: float) -> bool:
        above = self.low is None or (number > self.low if self.exclusive_low else number >= self.low)
        return above and (self.high is None or number <= self.high)

    def __str__(self) -> str:
        return self._limits() + self.note

    def _limits(self) -> str:
        low = "" if self.low is None else f"above {self.low}" if self.exclusive_low else f"of at least {self.low}"
        high = "" if self.high is None else f"of at most {self.high}"
        if low and high and not self.exclusive_low:
            return f"between {self.low} and {self.high}"
        return " and ".join(part for part in (low, high) if part)


PositiveInt = Annotated[int, Range(low=1)]
NonNegativeInt = Annotated[int, Range(low=0)]
PositiveFloat = Annotated[float, Range(low=0, exclusive_low=True)]
NonNegativeFloat = Annotated[float, Range(low=0)]
Fraction = Annotated[float, Range(low=0, high=1)]


# ---------------------------------------------------------------------------------------------- public


def load(kind: type[T], path: Path | Sequence[Path] | None, overrides: Sequence[str] = ()) -> T:
    """Read `path` (or, for None, start from nothing), lay the `a.b=value` overrides on top, build a `kind`.

    Of several files a later one is laid over those before it, section by section.

    Values of overrides are YAML (`null`, `true`, `[1, 2]`, `1e-4`); for text and paths they are taken as
    they stand, and a tuple also accepts `1,2,4`. `a.kind=other` leaves out what the file has in section `a` for its own
    kind, and the log says what that was. Raises ConfigError, or FileNotFoundError for the file.
    """
    paths = [path] if isinstance(path, Path) else [*(path or ())]
    data: dict[str, Any] = {}
    for each in paths:
        _lay_section_over(data, read_yaml(each), each)
    source = " with ".join(map(str, paths)) or "command line"
    for override in overrides:
        _lay_over(data, override)
    return from_dict(kind, data, source)


def from_dict(kind: type[T], data: Mapping[str, Any], source: str = "config") -> T:
    """Build a `kind` from plain data, strictly. `source` opens the message of every ConfigError."""
    return typing.cast(T, build(kind, data, Place(source), None))


def to_dict(config: Any) -> dict[str, Any]:
    """The plain dictionary (text, numbers, lists, dictionaries) from which `from_dict` rebuilds `config`."""
    return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def defaults(kind: Any) -> dict[str, Any]:
    """The defaults of a dataclass as plain data, of the fields that have one."""
    found = {field.name: default_of(field) for field in dataclasses.fields(kind)}
    return {name: plain(value) for name, value in found.items() if value is not dataclasses.MISSING}


def to_yaml(config: Any) -> str:
    """`config` as YAML text, in the order of its fields."""
    return str(yaml.safe_dump(to_dict(config), sort_keys=False, width=100, allow_unicode=True))


def save(config: Any, path: Path) -> None:
    """Write `config` as YAML; an existing file is replaced in one step."""
    with replacing(path) as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")


def check(config: Any) -> None:
    """Check types and ranges of a dataclass built in Python; call it first in `__post_init__`.

    Nothing is converted: a list where a tuple is declared, or the text "1e-4" where a number is, is refused.
    """
    place = Place(type(config).__name__)
    for name, annotation in field_types(config.__class__).items():
        value = getattr(config, name)
        if convert(annotation, value, place.child(name), None) != value:
            raise place.child(name).refuse(value, expected(annotation, python=True))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError for bad YAML, a repeated key, or another top level."""
    if not path.is_file():
        what = "is a folder, not a YAML file" if path.is_dir() else "no such configuration file"
        raise FileNotFoundError(f"{path}: {what}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold `field: value` lines, found {show(data)}")
    return data


@dataclass(frozen=True)
class FieldHelp:
    """One line of help: dotted name, what it accepts, default ("required" without one), doc string."""

    name: str
    type: str
    default: str
    doc: str
    when: str = ""
    """For a field of one member of a union: the choice under which it exists, such as "model.kind=vae"; of a union in a
    member of another, both choices, the outer one first, with a comma between."""


def describe(
    kind: Any, default: Any = None, prefix: str = "", when: str = "", *, quoted: bool | None = None
) -> list[FieldHelp]:
    """All fields of `kind`, nested ones with dotted names, in order.

    `default` is an instance to quote; `quoted` says that it is part of one that was asked for, and not of defaults.
    """
    lines: list[FieldHelp] = []
    quoted = default is not None if quoted is None else quoted
    docs = field_docs(kind)
    for field in dataclasses.fields(kind):
        annotation = field_types(kind)[field.name]
        value = getattr(default, field.name) if default is not None else default_of(field)
        name = prefix + field.name
        sections = sections_in(annotation, every=True)
        shown = "required" if value is dataclasses.MISSING else show(plain(value))
        shown = "as the data decide" if not quoted and field.name in decided_by_data(kind) else shown
        if not sections:
            lines.append(FieldHelp(name, expected(annotation), shown, docs.get(field.name, ""), when))
        elif len(sections) > 1 or value is None:
            shown = shown if value in (None, dataclasses.MISSING) else f"{name}.kind={kind_name(type(value))}"
            lines.append(FieldHelp(name, expected(annotation), shown, docs.get(field.name, ""), when))
        for section in sections:
            chosen = [f"{name}.kind={kind_name(section)}"] if len(sections) > 1 else []
            nested_when = ", ".join([*([when] if when else []), *chosen])
            instance = value if isinstance(value, section) else None
            lines += describe(section, instance, name + ".", nested_when, quoted=quoted)
    return lines


OF_THE_MODEL = "a section with the model's own fields"
"""What `FieldHelp.type` says of a section whose fields are known once its model is."""
FROM_DATA = object()
"""Marks, in `Annotated[..., FROM_DATA]`, a field of a model's configuration that training fills in from its data. Help
says so, and `complete` leaves it out."""


REMEDY = "remedy"
"""In the `metadata` of a field without a default: how it is given, for the message of a configuration without it."""


class Unresolved:
    """Part of a configuration that is kept as it is given until it is known what it is of; see `imgtok.sections`."""

    @classmethod
    def read(cls, value: Any, place: Place) -> Any:
        """What `value` is at this place, or a ConfigError."""
        raise NotImplementedError

    def plain(self) -> dict[str, Any]:
        """What was given, as `to_dict` has it."""
        raise NotImplementedError


class Choice:
    """Metadata of an `Annotated` field whose dataclass is chosen by `kind` from a table; see `imgtok.sections`."""

    table: Mapping[str, str]

    def config_class(self, kind: str) -> Any:
        """The dataclass of a kind that is in the table."""
        raise NotImplementedError

    def read(self, value: Any, place: Place, default: Any) -> Any:
        """What `value` is at this place, or a ConfigError."""
        raise NotImplementedError


def _table(annotation: Any) -> Choice | None:
    """The table of a section that is chosen from one."""
    return next((item for item in _metadata(annotation) if isinstance(item, Choice)), None)


# -------------------------------------------------------------------------- shared with imgtok.sections, and internals


def parsed(value: Any) -> Any:
    """`value` with all overrides in it read as YAML."""
    if isinstance(value, Mapping):
        return {key: parsed(item) for key, item in value.items()}
    return value.parsed() if isinstance(value, Raw) else value


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; a configuration must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


class Raw(str):
    """The text of an override, not yet read as YAML because text and path fields take it as it stands."""

    def parsed(self) -> Any:
        try:
            return yaml.safe_load(self)
        except yaml.YAMLError:
            return str(self)

    def text(self) -> str:
        return str(self.parsed()) if self[:1] in ("'", '"') else str(self)


@dataclass(frozen=True)
class Place:
    """Where in which source we are, for messages."""

    source: str
    path: str = ""

    def child(self, name: str) -> Place:
        return Place(self.source, f"{self.path}.{name}" if self.path else name)

    def error(self, text: str, value: Any = None) -> ConfigError:
        """The error for `value`, which names the command line where that is what gave it."""
        source = "command line" if _is_override(value) else self.source
        return ConfigError(": ".join(part for part in (source, self.path, text) if part))

    def refuse(self, value: Any, expected: str) -> ConfigError:
        return self.error(f"given {show(value)}, must be {expected}", value)


def _is_override(value: Any) -> bool:
    """Whether `value` comes from the command line: an override, or a section that only overrides made."""
    if isinstance(value, Mapping):
        return bool(value) and all(_is_override(item) for item in value.values())
    return isinstance(value, Raw)


def _lay_over(data: dict[str, Any], override: str) -> None:
    """Write `a.b=value` into the nested dictionary `data`, making the sections that it lacks."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"command line: {override!r} is not of the form key=value or section.key=value")
    for key in keys[:-1]:
        section = data.get(key)
        section = section.parsed() if isinstance(section, Raw) else section
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"command line: {override!r}: {key!r} is {show(section)}, not a section")
        data[key] = section or {}
        data = data[key]
    if keys[1:] and keys[-1] == "kind" and data.get("kind") is not None:
        _leave_out_other_kind(data, ".".join(keys[:-1]), Raw(text))
    data[keys[-1]] = Raw(text)


def _lay_section_over(data: dict[str, Any], over: Mapping[str, Any], path: Path, name: str = "") -> None:
    """Put what a file says over what those before it said. A section of another kind takes the place of theirs."""
    for key, value in over.items():
        before, inner = data.get(key), f"{name}{key}"
        if not isinstance(before, dict) or not isinstance(value, dict):
            data[key] = value
        elif None not in (kinds := (before.get("kind"), value.get("kind"))) and kinds[0] != kinds[1]:
            logger.info("%s: %s of kind %s in place of one of kind %s", path, inner, kinds[1], kinds[0])
            data[key] = value
        else:
            _lay_section_over(before, value, path, f"{inner}.")


def _leave_out_other_kind(section: dict[str, Any], name: str, kind: Raw) -> None:
    """Take out of a section what its file says of another kind than the one that an override chooses, and say so:
    fields that both kinds have need not mean the same. What other overrides have set stays.
    """
    before = section["kind"]
    if isinstance(before, Raw) or str(before) == kind.text():
        return
    given = {key: kept for key, value in section.items() if (kept := _overrides_in(value)) is not None}
    gone = [f"{key}={show(plain(value))}" for key, value in section.items() if key != "kind" and key not in given]
    section.clear()
    section.update(given)
    if gone:
        told = f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'}"
        logger.info("%s.kind=%s in place of the file's %s: its %s left out", *(name, kind, before, told))


def _overrides_in(value: Any) -> Any:
    """What overrides have set in a value; None where they have set nothing."""
    if isinstance(value, dict):
        return {key: kept for key, item in value.items() if (kept := _overrides_in(item)) is not None} or None
    return value if isinstance(value, Raw) else None


def build(kind: type, data: Any, place: Place, default: Any) -> Any:
    """Build the dataclass `kind`; fields that `data` lacks keep the value of the instance `default`."""
    if not isinstance(data, Mapping):
        raise place.refuse(data, "a section with the fields " + ", ".join(field_types(kind)))
    hints = field_types(kind)
    for name in data:
        if name not in hints:
            text = unknown_field(kind, name, place.path)
            if _is_override(data.get("kind")) and not _is_override(data[name]):  # which the file has for another kind
                section = f"{place.path}='{{kind: {parsed(data['kind'])}, ...}}'"
                text += f". {section} takes the place of the file's whole section"
            raise Place(place.source).error(text, data[name])
    values = {}
    for field in dataclasses.fields(kind):
        fallback = getattr(default, field.name) if default is not None else default_of(field)
        if field.name in data:
            values[field.name] = convert(hints[field.name], data[field.name], place.child(field.name), fallback)
        elif fallback is dataclasses.MISSING:
            inner = _required(hints[field.name], place.child(field.name).path)
            if inner and REMEDY not in field.metadata:
                names = " and ".join(part for part in (", ".join(inner[:-1]), inner[-1]) if part)
                raise Place(place.source).error(f"{names} {'are' if inner[1:] else 'is'} required")
            remedy = field.metadata.get(REMEDY) or f"must be {expected(hints[field.name])}"
            raise place.child(field.name).error(f"is required, {remedy}")
        else:
            values[field.name] = fallback
    try:
        return kind(**values)
    except ConfigError as error:
        if str(error).startswith((f"{place.source}: ", "command line: ")):  # a section put together by a check
            raise
        raise place.error(str(error)) from error
    except ValueError as error:
        raise place.error(str(error)) from error


def _required(annotation: Any, path: str) -> list[str]:
    """Dotted names of the fields without a default in a section that may be of one kind alone, and in those in it."""
    sections = sections_in(annotation)
    if len(_options(annotation)) != 1 or len(sections) != 1:
        return []
    found: list[str] = []
    for field in dataclasses.fields(sections[0]):
        if default_of(field) is dataclasses.MISSING:
            name = f"{path}.{field.name}"
            found += _required(field_types(sections[0])[field.name], name) or [name]
    return found


def convert(annotation: Any, value: Any, place: Place, default: Any) -> Any:
    """`value` as the type that `annotation` names, or a ConfigError."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(annotation, value, place, default)
    if (table := _table(annotation)) is not None:
        return table.read(value, place, default)
    if origin is Annotated:
        number = _scalar(annotation.__origin__, value)
        limits = [limit for limit in annotation.__metadata__ if isinstance(limit, Range)]
        if number is _REFUSED or any(number not in limit for limit in limits):
            raise place.refuse(value, expected(annotation))
        return number
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if isinstance(value, annotation):
            return value
        value = value.parsed() if isinstance(value, Raw) else value
        return build(annotation, value, place, default if isinstance(default, annotation) else None)
    if origin is tuple:
        return _convert_tuple(annotation, value, place)
    if _is_unresolved(annotation):
        return annotation.read(value, place)
    converted = _scalar(annotation, value)
    if converted is _REFUSED:
        raise place.refuse(value, expected(annotation))
    return converted


def _convert_union(annotation: Any, value: Any, place: Place, default: Any) -> Any:
    parsed = value.parsed() if isinstance(value, Raw) else value
    options, sections = _options(annotation), sections_in(annotation)
    if parsed is None and types.NoneType in typing.get_args(annotation):
        return None
    if sections and isinstance(parsed, Mapping):
        return convert(choose(sections, parsed, place, default), parsed, place, default)
    if len(options) == 1 and not sections:
        return convert(options[0], value, place, default)
    for option in options:
        try:
            return convert(option, value, place, default)
        except ConfigError:
            continue
    raise place.refuse(value, expected(annotation))


def choose(sections: Sequence[Any], data: Mapping[str, Any], place: Place, default: Any) -> Any:
    """The dataclass that the field `kind` of `data` selects; without it, that of the default value."""
    if len(sections) == 1:
        return sections[0]
    known = {kind_name(section): section for section in sections}
    if "kind" not in data:
        if type(default) in sections:
            return type(default)
        raise place.child("kind").error(f"is required, must be {any_of(known)}")
    if str(data["kind"]) not in known:
        raise place.child("kind").refuse(data["kind"], any_of(known) + did_you_mean(data["kind"], known))
    return known[str(data["kind"])]


def _convert_tuple(annotation: Any, value: Any, place: Place) -> tuple[Any, ...]:
    items = value
    if isinstance(value, Raw):
        parsed = value.parsed()
        comma_list = [Raw(part.strip()) for part in value.split(",") if part.strip()]
        items = parsed if isinstance(parsed, list) else comma_list
    kinds = typing.get_args(annotation)
    open_ended = kinds[-1] is Ellipsis
    if not isinstance(items, list | tuple) or not (open_ended or len(items) == len(kinds)):
        raise place.refuse(value, expected(annotation))
    kinds = kinds[:1] * len(items) if open_ended else kinds
    return tuple(
        convert(kind, item, Place(place.source, f"{place.path}[{i}]"), None)
        for i, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )


_REFUSED = object()


def _scalar(annotation: Any, value: Any) -> Any:
    """`value` as text, path, number, boolean or one of a Literal; `_REFUSED` where it is none."""
    if annotation in (str, Path):
        text = value.text() if isinstance(value, Raw) else value
        if annotation is Path:
            if isinstance(text, Path):  # made in Python: as it is, and who opens it expands a `~`
                return text
            return Path(text).expanduser() if isinstance(text, str) and text else _REFUSED
        return text if isinstance(text, str) else _REFUSED
    if typing.get_origin(annotation) is Literal:
        given = [value.text(), value.parsed()] if isinstance(value, Raw) else [value]
        matches = [arg for arg in typing.get_args(annotation) for g in given if arg == g and type(arg) is type(g)]
        return matches[0] if matches else _REFUSED
    value = value.parsed() if isinstance(value, Raw) else value
    if annotation is Any:
        return value
    if annotation is float:
        return _finite(value)
    if annotation in (int, bool):
        return value if type(value) is annotation else _REFUSED  # `type`, since True is an int to isinstance
    raise TypeError(f"imgtok.config cannot load fields of type {annotation}")


def _finite(value: Any) -> Any:
    """A float from a number or from text: PyYAML (YAML 1.1) reads `1e-4` as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _REFUSED
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _REFUSED
    return number if math.isfinite(number) else _REFUSED


def plain(value: Any) -> Any:
    if isinstance(value, Unresolved):
        return value.plain()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@functools.cache
def field_types(kind: Any) -> dict[str, Any]:
    """The annotation of every field, with `Annotated` kept (also under postponed evaluation)."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: _unmarked(hints[field.name]) for field in dataclasses.fields(kind)}


@functools.cache
def decided_by_data(kind: Any) -> frozenset[str]:
    """The fields that are marked as `FROM_DATA`."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return frozenset(field.name for field in dataclasses.fields(kind) if FROM_DATA in _metadata(hints[field.name]))


def _is_unresolved(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Unresolved)


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return annotation.__metadata__ if typing.get_origin(annotation) is Annotated else ()


def _unmarked(annotation: Any) -> Any:
    """The annotation without `FROM_DATA`."""
    if FROM_DATA not in _metadata(annotation):
        return annotation
    rest = tuple(item for item in annotation.__metadata__ if item is not FROM_DATA)
    return Annotated[(annotation.__origin__, *rest)] if rest else annotation.__origin__


def _options(annotation: Any) -> list[Any]:
    """The members of a union other than None, or the annotation alone."""
    if typing.get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    return [option for option in typing.get_args(annotation) if option is not types.NoneType]


def sections_in(annotation: Any, every: bool = False) -> list[Any]:
    """The dataclasses among the members of a union, or the annotation alone if it is one; `every` imports a table's."""
    sections: list[Any] = []
    for option in _options(annotation):
        table = _table(option)
        if table is not None and every:
            sections += map(table.config_class, table.table)
        elif dataclasses.is_dataclass(option):
            sections.append(option)
    return sections


def default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def kind_name(kind: Any) -> str:
    literal = field_types(kind).get("kind")
    return str(typing.get_args(literal)[0]) if literal is not None else kind.__name__


def expected(annotation: Any, python: bool = False) -> str:
    """What a field accepts, in words that follow "must be"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if (table := _table(annotation)) is not None:
        return "a section with kind " + any_of(table.table)
    if origin is Annotated:
        return " ".join([expected(args[0], python), *(str(a) for a in args[1:] if isinstance(a, Range))])
    if origin is Literal:
        return any_of(args)
    if origin in (Union, types.UnionType):
        options = _options(annotation)
        if len(options) > 1 and all(dataclasses.is_dataclass(option) for option in options):
            words = ["a section with kind " + any_of(kind_name(option) for option in options)]
        else:
            words = [expected(option, python) for option in options]
        return " or ".join([*words, *(["null"] if len(options) < len(args) else [])])
    if origin is tuple:
        sequence = "tuple" if python else "list"
        if args[-1] is Ellipsis:
            return f"a {sequence}, each item {expected(args[0], python)}"
        return f"a {sequence} of {len(args)}: " + ", ".join(expected(arg, python) for arg in args)
    if _is_unresolved(annotation):
        return f"a {annotation.__name__}" if python else OF_THE_MODEL
    if sections_in(annotation):
        return "a section with the fields " + ", ".join(field_types(annotation))
    path = "a pathlib.Path" if python else "a path"
    words_by_type = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: path}
    return words_by_type.get(annotation, "any value")


def any_of(values: Iterable[Any]) -> str:
    shown = [show(value) for value in values]
    return shown[0] if len(shown) == 1 else "one of " + ", ".join(shown)


def show(value: Any) -> str:
    """A value as the user wrote it, for messages."""
    if isinstance(value, Raw):
        value = value.parsed()
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    text = text or repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    known = list(known)
    begun = [one for one in known if one.startswith(f"{name}_")]
    close = difflib.get_close_matches(str(name), known, n=1) or begun
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown_field(kind: type, name: Any, path: str) -> str:
    deeper = [line.name for line in describe(kind) if line.name.endswith(f".{name}")]
    hint = f"; did you mean {deeper[0]!r}?" if deeper else did_you_mean(name, field_types(kind)) or "."
    return f"{path or 'the configuration'} has no field {name!r}{hint} It has: {', '.join(field_types(kind))}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@functools.cache
def field_docs(kind: Any) -> dict[str, str]:
    """Field name -> the string literal under it, read from the source; base classes first. Nothing without a source."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        source = _source(base)
        for field, doc in itertools.pairwise([] if source is None else source.body):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                docs[ast.unparse(field.target)] = " ".join(str(doc.value.value).split())
    return docs


def about(kind: Any) -> str:
    """The doc string of a dataclass in one line, also under `python -OO`, which keeps none in memory; "" for none."""
    source = _source(kind)
    doc = kind.__doc__ if source is None else ast.get_docstring(source)
    signature = f"{kind.__name__}("  # which `dataclass` takes for the doc string of a class without one
    return "" if doc is None or doc.startswith(signature) else " ".join(doc.split())


def _source(kind: Any) -> ast.ClassDef | None:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    except (OSError, TypeError, SyntaxError):  # no source, as for `object`: help without doc strings
        return None
    return body if isinstance(body, ast.ClassDef) else None
