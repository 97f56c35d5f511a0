"""Sections of a configuration that are kept as given and resolved later, when the model that they are of is known.

`Settings` are fields of a dataclass that another model's configuration chooses. A `Section` with a `ByKind` is a union
whose members are entries of a table, of which only the chosen one is imported; what a field lacks may come from the
model to start from and from data.
"""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from imgtok.config import (
    Choice,
    Place,
    Raw,
    Unresolved,
    any_of,
    build,
    choose,
    convert,
    decided_by_data,
    default_of,
    did_you_mean,
    expected,
    field_types,
    kind_name,
    parsed,
    plain,
    sections_in,
    show,
    unknown_field,
)

T = TypeVar("T")


class Settings(Unresolved, Mapping[str, Any]):
    """Settings of a model that is not known yet: kept as they are given, and checked by `over` once it is.

    A job has a field `sampling: Settings = Settings()`, which YAML and `sampling.guidance=2` fill like any section, and
    calls `config.sampling.over(model.config.sampling)` as soon as the model's configuration is read.
    """

    def __init__(self, **values: Any) -> None:
        self._values = values
        self._place = Place("")

    @classmethod
    def at(cls, place: Place, values: Mapping[str, Any]) -> Settings:
        """What stands at a place of a configuration, which the messages of `over` name."""
        settings = cls(**values)
        settings._place = place
        return settings

    @classmethod
    def read(cls, value: Any, place: Place) -> Settings:
        given = value.parsed() if isinstance(value, Raw) else value
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise place.refuse(value, expected(cls))
        return given if isinstance(given, Settings) else cls.at(place, given)

    def plain(self) -> dict[str, Any]:
        return {name: plain(item) for name, item in self.items()}

    def over(self, defaults: T, name: str = "") -> T:
        """`defaults`, an instance of the model's own dataclass, with these fields replaced.

        One number will do for a list. Raises ConfigError for a field that the dataclass does not have or a value that
        it does not take; `name` is what the message calls settings that were made in Python.
        """
        kind: Any = type(defaults)
        values = {key: _as_list(field_types(kind).get(key), value) for key, value in self._values.items()}
        place = self._place if self._place.path else Place("", name)
        return typing.cast(T, build(kind, values, place, defaults))

    def __getitem__(self, name: str) -> Any:
        return parsed(self._values[name])

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


class ByKind(Choice):
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

    def read(self, value: Any, place: Place, default: Any) -> Any:
        return _choose_from(self, value, place, default)


class Section(Unresolved):
    """The fields of a configuration that were given, of a dataclass that its `kind` chose from a table.

    It is kept as it was given because the rest may come from elsewhere: from another model's configuration, and from
    data. `over` puts all together. Field by field, what was given has been checked.
    """

    def __init__(self, config_class: Any, given: Mapping[str, Any], place: Place) -> None:
        """`config_class` is None where no kind was given."""
        self.config_class, self.given, self._place = config_class, dict(given), place

    @classmethod
    def of(cls, config: Any) -> Section:
        """A section as it is; of a dataclass instance, made in Python, the fields that differ from their defaults: the
        others count as not given.
        """
        return config if isinstance(config, Section) else cls(type(config), _differing(config), Place("", "model"))

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
            mine, other = kind_name(kind), kind_name(type(base))
            raise self._place.child("kind").error(
                f"given {mine!r}, but the model to start from is of kind {other!r}; name another with init"
            )
        data = _with_facts(kind, self.given, base, facts or {}, self._place, holder)
        return build(kind, data, self._place, base)

    def complete(self) -> Section:
        """What was given and the defaults of all other fields, apart from those that data decide."""
        if self.config_class is None:
            return self
        return Section(self.config_class, _complete(self.config_class, self.given, None, self._place), self._place)

    @property
    def place(self) -> Place:
        """Where it stands, for messages."""
        return self._place

    @property
    def kind(self) -> str | None:
        """The name that chose the dataclass; None where none was given."""
        return None if self.config_class is None else kind_name(self.config_class)

    def plain(self) -> dict[str, Any]:
        """What was given, as `to_dict` has it."""
        chosen = {} if self.kind is None else {"kind": self.kind}
        return chosen | {name: plain(parsed(value)) for name, value in self.given.items()}

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
    values = {field.name: (getattr(config, field.name), default_of(field)) for field in dataclasses.fields(config)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _with_facts(
    kind: Any, given: Mapping[str, Any], base: Any, facts: Mapping[str, Any], place: Place, holder: str
) -> dict[str, Any]:
    """The given fields of the dataclass `kind` with the facts among them; ConfigError where the two differ."""
    data, hints, nested = dict(given), field_types(kind), dict[str, dict[str, Any]]()
    for name, fact in facts.items():
        head, dot, rest = name.partition(".")
        if head not in hints:
            continue
        if dot:
            nested.setdefault(head, {})[rest] = fact
            continue
        if head in data:
            known = fact if dataclasses.is_dataclass(fact) else None  # of a section, what is left out agrees
            mine = convert(hints[head], data[head], place.child(head), known)
            if mine != fact:
                text = f"given {show(plain(mine))}, but {holder} decides it: {show(plain(fact))}; leave it out"
                raise place.child(head).error(text, data[head])
        data[head] = fact
    defaults = {field.name: default_of(field) for field in dataclasses.fields(kind)} if base is None else vars(base)
    for head, inner in nested.items():
        section, default = data.get(head, {}), defaults[head]
        section = section.parsed() if isinstance(section, Raw) else section
        if dataclasses.is_dataclass(section):
            chosen, section = type(section), {"kind": kind_name(type(section)), **_differing(section)}
        else:
            chosen = choose(sections_in(hints[head]), section, place.child(head), default)
        default = default if isinstance(default, chosen) else None
        data[head] = _with_facts(chosen, section, default, inner, place.child(head), holder)
    return data


def _complete(kind: Any, given: Mapping[str, Any], base: Any, place: Place) -> dict[str, Any]:
    """The given fields of a dataclass and, where data do not decide them, those of an instance, or the defaults."""
    data = {}
    for field in dataclasses.fields(kind):
        name, annotation = field.name, field_types(kind)[field.name]
        default = default_of(field) if base is None else getattr(base, name)
        if name not in given and (name in decided_by_data(kind) or default is dataclasses.MISSING):
            continue
        value = given.get(name, default)
        value = value.parsed() if isinstance(value, Raw) else value
        if dataclasses.is_dataclass(value):
            section: Any = type(value)
            chosen = {"kind": kind_name(section)} if "kind" in field_types(section) else {}
            data[name] = chosen | _complete(section, {}, value, place)
        elif isinstance(value, Mapping) and sections_in(annotation):
            section = choose(sections_in(annotation), value, place.child(name), default)
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


def _choose_from(table: ByKind, value: Any, place: Place, default: Any) -> Any:
    """The `Section` that a mapping is, or an instance or a section as it is, of a kind in the table."""
    if dataclasses.is_dataclass(value) or isinstance(value, Section):
        kind = value.kind if isinstance(value, Section) else kind_name(type(value))
        if kind is None or (kind in table.table and Section.of(value).config_class is table.config_class(kind)):
            return value
        raise place.refuse(kind, "a section with kind " + any_of(table.table))
    data = value.parsed() if isinstance(value, Raw) else value
    if not isinstance(data, Mapping) or not all(isinstance(name, str) for name in data):
        raise place.refuse(value, "a section with kind " + any_of(table.table))
    kind = str(parsed(data["kind"])) if "kind" in data else getattr(default, "kind", None)
    if kind is None:
        return Section(None, data, place)
    if kind not in table.table:
        raise place.child("kind").refuse(data["kind"], any_of(table.table) + did_you_mean(kind, table.table))
    config_class, given = table.config_class(kind), {name: item for name, item in data.items() if name != "kind"}
    hints = field_types(config_class)
    for name, item in given.items():
        if name not in hints:
            raise Place(place.source).error(unknown_field(config_class, name, place.path), item)
        fallback = next(default_of(field) for field in dataclasses.fields(config_class) if field.name == name)
        convert(hints[name], item, place.child(name), fallback)
    return Section(config_class, given, place)


def _as_list(annotation: Any, value: Any) -> Any:
    """`value` as `convert` takes it: text may hold a list (`1,2`), and one number may stand where a list is meant."""
    if typing.get_origin(annotation) is tuple and not isinstance(value, list | tuple | Raw):
        return Raw(value) if isinstance(value, str) else [value]
    return value
