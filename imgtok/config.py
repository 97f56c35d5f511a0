"""Configuration: YAML files and `key=value` overrides, loaded strictly into frozen dataclasses.

A configuration is a keyword-only dataclass with a doc string literal under each field; ranges are
`Annotated` types (`PositiveInt`, `Fraction`, ...). A field that may hold one of several dataclasses is
written as their union, and the field `kind: Literal["..."]` of each selects it: the union is the registry.
Where the members are entries of a table, and only the chosen one shall be imported, it is a `Section` with a `ByKind`.
Every mistake raises `ConfigError`, which names the file, the field, what was given and what is allowed.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml

from imgtok.files import replacing

T = TypeVar("T")


class ConfigError(ValueError):
    """A mistake in a configuration. The message names the source, the dotted field, and what is allowed."""


@dataclass(frozen=True)
class Range:
    """The numbers that an `Annotated` field accepts; `None` leaves that side open."""

    low: float | None = None
    high: float | None = None
    exclusive_low: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low is None or (number > self.low if self.exclusive_low else number >= self.low)
        return above and (self.high is None or number <= self.high)

    def __str__(self) -> str:
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


def load(kind: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Read `path` (or, for None, start from nothing), lay the `a.b=value` overrides on top, build a `kind`.

    Values of overrides are YAML (`null`, `true`, `[1, 2]`, `1e-4`); for text and paths they are taken as
    they stand, and a tuple also accepts `1,2,4`. Raises ConfigError, or FileNotFoundError for the file.
    """
    data = {} if path is None else read_yaml(path)
    source = "command line" if path is None else str(path)
    for override in overrides:
        _lay_over(data, override)
    return from_dict(kind, data, source)


def from_dict(kind: type[T], data: Mapping[str, Any], source: str = "config") -> T:
    """Build a `kind` from plain data, strictly. `source` opens the message of every ConfigError."""
    return typing.cast(T, _build(kind, data, _Place(source), None))


def to_dict(config: Any) -> dict[str, Any]:
    """The plain dictionary (text, numbers, lists, dictionaries) from which `from_dict` rebuilds `config`."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


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
    place = _Place(type(config).__name__)
    for name, annotation in _hints(config.__class__).items():
        value = getattr(config, name)
        if _convert(annotation, value, place.child(name), None) != value:
            raise place.child(name).refuse(value, _expected(annotation, python=True))


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
        raise ConfigError(f"{path}: must hold `field: value` lines, found {_show(data)}")
    return data


@dataclass(frozen=True)
class FieldHelp:
    """One line of help: dotted name, what it accepts, default ("required" without one), doc string."""

    name: str
    type: str
    default: str
    doc: str
    when: str = ""
    """For a field of one member of a union: the choice under which it exists, such as "model.kind=vae"."""


def describe(
    kind: Any, default: Any = None, prefix: str = "", when: str = "", *, quoted: bool | None = None
) -> list[FieldHelp]:
    """All fields of `kind`, nested ones with dotted names, in order.

    `default` is an instance to quote; `quoted` says that it is part of one that was asked for, and not of defaults.
    """
    lines: list[FieldHelp] = []
    quoted = default is not None if quoted is None else quoted
    docs = _field_docs(kind)
    for field in dataclasses.fields(kind):
        annotation = _hints(kind)[field.name]
        value = getattr(default, field.name) if default is not None else _default(field)
        name = prefix + field.name
        sections = _sections(annotation, every=True)
        shown = "required" if value is dataclasses.MISSING else _show(_plain(value))
        shown = "as the data decide" if not quoted and field.name in _decided_by_data(kind) else shown
        if not sections:
            lines.append(FieldHelp(name, _expected(annotation), shown, docs.get(field.name, ""), when))
        elif len(sections) > 1 or value is None:
            shown = shown if value in (None, dataclasses.MISSING) else f"{name}.kind={_kind_name(type(value))}"
            lines.append(FieldHelp(name, _expected(annotation), shown, docs.get(field.name, ""), when))
        for section in sections:
            nested_when = f"{name}.kind={_kind_name(section)}" if len(sections) > 1 else when
            instance = value if isinstance(value, section) else None
            lines += describe(section, instance, name + ".", nested_when, quoted=quoted)
    return lines


class Settings(Mapping[str, Any]):
    """Settings of a model that is not known yet: kept as they are given, and checked by `over` once it is.

    A job has a field `sampling: Settings = Settings()`, which YAML and `sampling.guidance=2` fill like any section, and
    calls `config.sampling.over(model.config.sampling)` as soon as the model's configuration is read.
    """

    def __init__(self, **values: Any) -> None:
        self._values = values
        self._place = _Place("")

    @classmethod
    def at(cls, place: _Place, values: Mapping[str, Any]) -> Settings:
        """What stands at a place of a configuration, which the messages of `over` name."""
        settings = cls(**values)
        settings._place = place
        return settings

    def over(self, defaults: T, name: str = "") -> T:
        """`defaults`, an instance of the model's own dataclass, with these fields replaced.

        One number will do for a list. Raises ConfigError for a field that the dataclass does not have or a value that
        it does not take; `name` is what the message calls settings that were made in Python.
        """
        kind: Any = type(defaults)
        values = {key: _as_list(_hints(kind).get(key), value) for key, value in self._values.items()}
        place = self._place if self._place.path else _Place("", name)
        return typing.cast(T, _build(kind, values, place, defaults))

    def __getitem__(self, name: str) -> Any:
        return _parsed(self._values[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and dict(self) == dict(other)

    def __hash__(self) -> int:
        return hash(frozenset(self._values))

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self.items())})"


# ------------------------------------------------------------------------- sections chosen from a table

FROM_DATA = object()
"""Marks, in `Annotated[..., FROM_DATA]`, a field of a model's configuration that training fills in from its data. Help
says so, and `complete` leaves it out."""


class ByKind:
    """A union of configurations that is read from a table, in `Annotated[Section, ByKind(table)]`.

    The table leads from a `kind` to "module:Class" of a model, whose `config_class` is the dataclass. Only the chosen
    module is imported; help imports all.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self.table = table

    def config_class(self, kind: str) -> Any:
        """The dataclass of a kind that is in the table."""
        module, _, name = self.table[kind].partition(":")
        return getattr(importlib.import_module(module), name).config_class


class Section:
    """The fields of a configuration that were given, of a dataclass that its `kind` chose from a table.

    It is kept as it was given because the rest may come from elsewhere: from another model's configuration, and from
    data. `over` puts all together. Field by field, what was given has been checked.
    """

    def __init__(self, config_class: Any, given: Mapping[str, Any], place: _Place) -> None:
        """`config_class` is None where no kind was given."""
        self.config_class, self.given, self._place = config_class, dict(given), place

    @classmethod
    def of(cls, config: Any) -> Section:
        """A section as it is; of a dataclass instance, made in Python, the fields that differ from their defaults: the
        others count as not given.
        """
        return config if isinstance(config, Section) else cls(type(config), _differing(config), _Place("", "model"))

    def over(self, base: Any = None, facts: Mapping[str, Any] | None = None, holder: str = "the data") -> Any:
        """An instance of the dataclass: the given fields, then `facts`, then the fields of the instance `base`, then
        defaults.

        `facts` are values that are not open to choice, by dotted names such as "condition.num_classes"; those which the
        dataclass has no field for are passed over. Raises ConfigError for a given value that contradicts a fact, which
        the message says is that of `holder`, for another kind than `base`'s, and as `from_dict` does.
        """
        kind = self.config_class or type(base)
        if kind is type(None):
            raise self._place.child("kind").error("is required")
        if base is not None and not isinstance(base, kind):
            mine, other = _kind_name(kind), _kind_name(type(base))
            raise self._place.child("kind").error(f"given {mine!r}, but the model to start from is of kind {other!r}")
        data = _with_facts(kind, self.given, base, facts or {}, self._place, holder)
        return _build(kind, data, self._place, base)

    def complete(self) -> Section:
        """What was given and the defaults of all other fields, apart from those that data decide."""
        if self.config_class is None:
            return self
        return Section(self.config_class, _complete(self.config_class, self.given, None, self._place), self._place)

    @property
    def place(self) -> _Place:
        """Where it stands, for messages."""
        return self._place

    @property
    def kind(self) -> str | None:
        """The name that chose the dataclass; None where none was given."""
        return None if self.config_class is None else _kind_name(self.config_class)

    def plain(self) -> dict[str, Any]:
        """What was given, as `to_dict` has it."""
        chosen = {} if self.kind is None else {"kind": self.kind}
        return chosen | {name: _plain(_parsed(value)) for name, value in self.given.items()}

    def __eq__(self, other: object) -> bool:
        if dataclasses.is_dataclass(other):
            return type(other) is self.config_class and Section.of(other).plain() == self.plain()
        return isinstance(other, Section) and self.plain() == other.plain()

    def __hash__(self) -> int:
        return hash((self.kind, frozenset(self.given)))

    def __repr__(self) -> str:
        return f"Section({self.plain()!r})"


def _differing(config: Any) -> dict[str, Any]:
    """The fields of an instance that are not at their defaults."""
    values = {field.name: (getattr(config, field.name), _default(field)) for field in dataclasses.fields(config)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _with_facts(
    kind: Any, given: Mapping[str, Any], base: Any, facts: Mapping[str, Any], place: _Place, holder: str
) -> dict[str, Any]:
    """The given fields of the dataclass `kind` with the facts among them; ConfigError where the two differ."""
    data, hints, nested = dict(given), _hints(kind), dict[str, dict[str, Any]]()
    for name, fact in facts.items():
        head, dot, rest = name.partition(".")
        if head not in hints:
            continue
        if dot:
            nested.setdefault(head, {})[rest] = fact
            continue
        if head in data:
            known = fact if dataclasses.is_dataclass(fact) else None  # of a section, what is left out agrees
            mine = _convert(hints[head], data[head], place.child(head), known)
            if mine != fact:
                text = f"given {_show(_plain(mine))}, but {holder} decides it: {_show(_plain(fact))}; leave it out"
                raise place.child(head).error(text, data[head])
        data[head] = fact
    defaults = {field.name: _default(field) for field in dataclasses.fields(kind)} if base is None else vars(base)
    for head, inner in nested.items():
        section, default = data.get(head, {}), defaults[head]
        section = section.parsed() if isinstance(section, _Raw) else section
        if dataclasses.is_dataclass(section):
            chosen, section = type(section), {"kind": _kind_name(type(section)), **_differing(section)}
        else:
            chosen = _choose(_sections(hints[head]), section, place.child(head), default)
        default = default if isinstance(default, chosen) else None
        data[head] = _with_facts(chosen, section, default, inner, place.child(head), holder)
    return data


def _complete(kind: Any, given: Mapping[str, Any], base: Any, place: _Place) -> dict[str, Any]:
    """The given fields of a dataclass and, where data do not decide them, those of an instance, or the defaults."""
    data = {}
    for field in dataclasses.fields(kind):
        name, annotation = field.name, _hints(kind)[field.name]
        default = _default(field) if base is None else getattr(base, name)
        if name not in given and (name in _decided_by_data(kind) or default is dataclasses.MISSING):
            continue
        value = given.get(name, default)
        value = value.parsed() if isinstance(value, _Raw) else value
        if dataclasses.is_dataclass(value):
            section: Any = type(value)
            chosen = {"kind": _kind_name(section)} if "kind" in _hints(section) else {}
            data[name] = chosen | _complete(section, {}, value, place)
        elif isinstance(value, Mapping) and _sections(annotation):
            section = _choose(_sections(annotation), value, place.child(name), default)
            data[name] = _complete(section, value, default if isinstance(default, section) else None, place.child(name))
        else:
            data[name] = value
    return data


def completed(config: Any) -> Any:
    """A job's configuration as `imgtok config` prints it: sections of models with their defaults, unless the model to
    start from has those fields.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if values.get("init") is not None:
        return config
    sections = {name: value.complete() for name, value in values.items() if isinstance(value, Section)}
    return dataclasses.replace(config, **sections) if sections else config


def _choose_from(table: ByKind, value: Any, place: _Place, default: Any) -> Any:
    """The `Section` that a mapping is, or an instance or a section as it is, of a kind in the table."""
    if dataclasses.is_dataclass(value) or isinstance(value, Section):
        kind = value.kind if isinstance(value, Section) else _kind_name(type(value))
        if kind is None or (kind in table.table and Section.of(value).config_class is table.config_class(kind)):
            return value
        raise place.refuse(kind, "a section with kind " + _any_of(table.table))
    data = value.parsed() if isinstance(value, _Raw) else value
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        raise place.refuse(value, "a section with kind " + _any_of(table.table))
    kind = str(_parsed(data["kind"])) if "kind" in data else getattr(default, "kind", None)
    if kind is None:
        return Section(None, data, place)
    if kind not in table.table:
        raise place.child("kind").refuse(data["kind"], _any_of(table.table) + _did_you_mean(kind, table.table))
    config_class, given = table.config_class(kind), {name: item for name, item in data.items() if name != "kind"}
    hints = _hints(config_class)
    for name, item in given.items():
        if name not in hints:
            raise _Place(place.source).error(_unknown_field(config_class, name, place.path), item)
        fallback = next(_default(field) for field in dataclasses.fields(config_class) if field.name == name)
        _convert(hints[name], item, place.child(name), fallback)
    return Section(config_class, given, place)


def _table(annotation: Any) -> ByKind | None:
    """The table of a section that is chosen from one."""
    return next((item for item in _metadata(annotation) if isinstance(item, ByKind)), None)


# ------------------------------------------------------------------------------------------- internals


def _as_list(annotation: Any, value: Any) -> Any:
    """`value` as `_convert` takes it: text may hold a list (`1,2`), and one number may stand where a list is meant."""
    if typing.get_origin(annotation) is tuple and not isinstance(value, list | tuple | _Raw):
        return _Raw(value) if isinstance(value, str) else [value]
    return value


def _parsed(value: Any) -> Any:
    """`value` with all overrides in it read as YAML."""
    if isinstance(value, Mapping):
        return {key: _parsed(item) for key, item in value.items()}
    return value.parsed() if isinstance(value, _Raw) else value


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys in silence; a configuration must not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Raw(str):
    """The text of an override, not yet read as YAML because text and path fields take it as it stands."""

    def parsed(self) -> Any:
        try:
            return yaml.safe_load(self)
        except yaml.YAMLError:
            return str(self)

    def text(self) -> str:
        return str(self.parsed()) if self[:1] in ("'", '"') else str(self)


@dataclass(frozen=True)
class _Place:
    """Where in which source we are, for messages."""

    source: str
    path: str = ""

    def child(self, name: str) -> _Place:
        return _Place(self.source, f"{self.path}.{name}" if self.path else name)

    def error(self, text: str, value: Any = None) -> ConfigError:
        """The error for `value`, which names the command line where that is what gave it."""
        source = "command line" if _is_override(value) else self.source
        return ConfigError(": ".join(part for part in (source, self.path, text) if part))

    def refuse(self, value: Any, expected: str) -> ConfigError:
        return self.error(f"given {_show(value)}, must be {expected}", value)


def _is_override(value: Any) -> bool:
    """Whether `value` comes from the command line: an override, or a section that only overrides made."""
    if isinstance(value, Mapping):
        return bool(value) and all(_is_override(item) for item in value.values())
    return isinstance(value, _Raw)


def _lay_over(data: dict[str, Any], override: str) -> None:
    """Write `a.b=value` into the nested dictionary `data`, making the sections that it lacks."""
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"command line: {override!r} is not of the form key=value or section.key=value")
    for key in keys[:-1]:
        section = data.get(key)
        section = section.parsed() if isinstance(section, _Raw) else section
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"command line: {override!r}: {key!r} is {_show(section)}, not a section")
        data[key] = section or {}
        data = data[key]
    data[keys[-1]] = _Raw(text)


def _build(kind: type, data: Any, place: _Place, default: Any) -> Any:
    """Build the dataclass `kind`; fields that `data` lacks keep the value of the instance `default`."""
    if not isinstance(data, Mapping):
        raise place.refuse(data, "a section with the fields " + ", ".join(_hints(kind)))
    hints = _hints(kind)
    for name in data:
        if name not in hints:
            raise _Place(place.source).error(_unknown_field(kind, name, place.path), data[name])
    values = {}
    for field in dataclasses.fields(kind):
        fallback = getattr(default, field.name) if default is not None else _default(field)
        if field.name in data:
            values[field.name] = _convert(hints[field.name], data[field.name], place.child(field.name), fallback)
        elif fallback is dataclasses.MISSING:
            raise place.child(field.name).error(f"is required, must be {_expected(hints[field.name])}")
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


def _convert(annotation: Any, value: Any, place: _Place, default: Any) -> Any:
    """`value` as the type that `annotation` names, or a ConfigError."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _convert_union(annotation, value, place, default)
    if (table := _table(annotation)) is not None:
        return _choose_from(table, value, place, default)
    if origin is Annotated:
        number = _scalar(annotation.__origin__, value)
        limits = [limit for limit in annotation.__metadata__ if isinstance(limit, Range)]
        if number is _REFUSED or any(number not in limit for limit in limits):
            raise place.refuse(value, _expected(annotation))
        return number
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        if isinstance(value, annotation):
            return value
        value = value.parsed() if isinstance(value, _Raw) else value
        return _build(annotation, value, place, default if isinstance(default, annotation) else None)
    if origin is tuple:
        return _convert_tuple(annotation, value, place)
    if annotation is Settings:
        given = value.parsed() if isinstance(value, _Raw) else value
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise place.refuse(value, _expected(annotation))
        return given if isinstance(given, Settings) else Settings.at(place, given)
    converted = _scalar(annotation, value)
    if converted is _REFUSED:
        raise place.refuse(value, _expected(annotation))
    return converted


def _convert_union(annotation: Any, value: Any, place: _Place, default: Any) -> Any:
    parsed = value.parsed() if isinstance(value, _Raw) else value
    options, sections = _options(annotation), _sections(annotation)
    if parsed is None and types.NoneType in typing.get_args(annotation):
        return None
    if sections and isinstance(parsed, Mapping):
        return _convert(_choose(sections, parsed, place, default), parsed, place, default)
    if len(options) == 1 and not sections:
        return _convert(options[0], value, place, default)
    for option in options:
        try:
            return _convert(option, value, place, default)
        except ConfigError:
            continue
    raise place.refuse(value, _expected(annotation))


def _choose(sections: Sequence[Any], data: Mapping[str, Any], place: _Place, default: Any) -> Any:
    """The dataclass that the field `kind` of `data` selects; without it, that of the default value."""
    if len(sections) == 1:
        return sections[0]
    known = {_kind_name(section): section for section in sections}
    if "kind" not in data:
        if type(default) in sections:
            return type(default)
        raise place.child("kind").error(f"is required, must be {_any_of(known)}")
    if str(data["kind"]) not in known:
        raise place.child("kind").refuse(data["kind"], _any_of(known) + _did_you_mean(data["kind"], known))
    return known[str(data["kind"])]


def _convert_tuple(annotation: Any, value: Any, place: _Place) -> tuple[Any, ...]:
    items = value
    if isinstance(value, _Raw):
        parsed = value.parsed()
        comma_list = [_Raw(part.strip()) for part in value.split(",") if part.strip()]
        items = parsed if isinstance(parsed, list) else comma_list
    kinds = typing.get_args(annotation)
    open_ended = kinds[-1] is Ellipsis
    if not isinstance(items, list | tuple) or not (open_ended or len(items) == len(kinds)):
        raise place.refuse(value, _expected(annotation))
    kinds = kinds[:1] * len(items) if open_ended else kinds
    return tuple(
        _convert(kind, item, _Place(place.source, f"{place.path}[{i}]"), None)
        for i, (kind, item) in enumerate(zip(kinds, items, strict=True))
    )


_REFUSED = object()


def _scalar(annotation: Any, value: Any) -> Any:
    """`value` as text, path, number, boolean or one of a Literal; `_REFUSED` where it is none."""
    if annotation in (str, Path):
        text = value.text() if isinstance(value, _Raw) else value
        if annotation is Path:
            return Path(text).expanduser() if isinstance(text, str | Path) and str(text) else _REFUSED
        return text if isinstance(text, str) else _REFUSED
    if typing.get_origin(annotation) is Literal:
        given = [value.text(), value.parsed()] if isinstance(value, _Raw) else [value]
        matches = [arg for arg in typing.get_args(annotation) for g in given if arg == g and type(arg) is type(g)]
        return matches[0] if matches else _REFUSED
    value = value.parsed() if isinstance(value, _Raw) else value
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


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.plain()
    if isinstance(value, Settings):
        return {name: _plain(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The annotation of every field, with `Annotated` kept (also under postponed evaluation)."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: _unmarked(hints[field.name]) for field in dataclasses.fields(kind)}


@functools.cache
def _decided_by_data(kind: Any) -> frozenset[str]:
    """The fields that are marked as `FROM_DATA`."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return frozenset(field.name for field in dataclasses.fields(kind) if FROM_DATA in _metadata(hints[field.name]))


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


def _sections(annotation: Any, every: bool = False) -> list[Any]:
    """The dataclasses among the members of a union, or the annotation alone if it is one; `every` imports a table's."""
    sections: list[Any] = []
    for option in _options(annotation):
        table = _table(option)
        if table is not None and every:
            sections += map(table.config_class, table.table)
        elif dataclasses.is_dataclass(option):
            sections.append(option)
    return sections


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _kind_name(kind: Any) -> str:
    literal = _hints(kind).get("kind")
    return str(typing.get_args(literal)[0]) if literal is not None else kind.__name__


def _expected(annotation: Any, python: bool = False) -> str:
    """What a field accepts, in words that follow "must be"."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if (table := _table(annotation)) is not None:
        return "a section with kind " + _any_of(table.table)
    if origin is Annotated:
        return " ".join([_expected(args[0], python), *(str(a) for a in args[1:] if isinstance(a, Range))])
    if origin is Literal:
        return _any_of(args)
    if origin in (Union, types.UnionType):
        options = _options(annotation)
        if len(options) > 1 and all(dataclasses.is_dataclass(option) for option in options):
            words = ["a section with kind " + _any_of(_kind_name(option) for option in options)]
        else:
            words = [_expected(option, python) for option in options]
        return " or ".join([*words, *(["null"] if len(options) < len(args) else [])])
    if origin is tuple:
        sequence = "tuple" if python else "list"
        if args[-1] is Ellipsis:
            return f"a {sequence}, each item {_expected(args[0], python)}"
        return f"a {sequence} of {len(args)}: " + ", ".join(_expected(arg, python) for arg in args)
    if _sections(annotation):
        return "a section with the fields " + ", ".join(_hints(annotation))
    path = "a pathlib.Path" if python else "a path"
    words_by_type = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: path}
    words_by_type[Settings] = "a Settings" if python else "a section with the model's own fields"
    return words_by_type.get(annotation, "any value")


def _any_of(values: Iterable[Any]) -> str:
    shown = [_show(value) for value in values]
    return shown[0] if len(shown) == 1 else "one of " + ", ".join(shown)


def _show(value: Any) -> str:
    """A value as the user wrote it, for messages."""
    if isinstance(value, _Raw):
        value = value.parsed()
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    text = text or repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _did_you_mean(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _unknown_field(kind: type, name: Any, path: str) -> str:
    deeper = [line.name for line in describe(kind) if line.name.endswith(f".{name}")]
    hint = f"; did you mean {deeper[0]!r}?" if deeper else _did_you_mean(name, _hints(kind)) or "."
    return f"{path or 'the configuration'} has no field {name!r}{hint} It has: {', '.join(_hints(kind))}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@functools.cache
def _field_docs(kind: Any) -> dict[str, str]:
    """Field name -> the string literal under it, read from the source; base classes first."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):  # no source, as for `object`: help without doc strings
            continue
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, doc in itertools.pairwise(statements):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                docs[ast.unparse(field.target)] = " ".join(str(doc.value.value).split())
    return docs
