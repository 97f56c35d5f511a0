"""The nested configuration of a published FlexTok, matched rather than run.

It has six entries, trees of settings whose `_target_` names a Python class: whoever instantiates one runs
what the file says. `assets/flextok.yaml` is the same tree with holes in it. Reading compares a file with it, setting by
setting, and keeps what stands in the holes, which must agree wherever one number is stated twice; writing fills the
holes in. Nothing that a file names is imported, and a module, setting or value that our model does not have is an
error that says where. Modules are known by their names: neither their order, which the Hub's own writer loses by
sorting, nor the keys by which they pass data to each other are followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from imgtok.config import ConfigError

# ---------------------------------------------------------------- the template

REQUIRED = object()


@dataclass(frozen=True)
class Number:
    """A hole: a number of ours. Null, where the default is null, states nothing."""

    name: str
    default: Any = REQUIRED

    @property
    def kind(self) -> type:
        return KINDS.get(self.name, int)


@dataclass(frozen=True)
class Fixed:
    """A setting that our model has at one value only; `needed` if the published code's own default is another."""

    value: Any
    needed: bool


@dataclass(frozen=True)
class Function:
    """A function or class as a setting, by any of its `names`. It is written with `path`, or left out without one, and
    may be given these `settings`, at these values only.
    """

    names: tuple[str, ...]
    path: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Module:
    """A module of the description; see the head of the template."""

    target: str
    settings: Mapping[str, Any]
    free: tuple[str, ...]

    @property
    def class_name(self) -> str:
        return self.target.rpartition(".")[2]


KINDS: Mapping[str, type] = {
    **dict.fromkeys(("scaling_factor", "max_timestep", "null_dropout", "mode_scale"), float),
    **dict.fromkeys(("sample_posterior", "learnable_logvar", "logit_normal", "stratified"), bool),
    **dict.fromkeys(("autoencoder", "nested_dropout"), str),
    "levels": tuple,
}
"""Kinds of the numbers that are not integers."""
MOVES = ("channels_first_to_last", "channels_last_to_first")
FUNCTIONS: Mapping[str, Function] = {
    "norm": Function(("Fp32LayerNorm",), settings={"bias": False, "elementwise_affine": False, "eps": 1e-5}),
    "silu": Function(("SiLU",)),
    **{name: Function(MOVES, f"flextok.model.utils.dict_ops.{name}") for name in MOVES},
}
HYDRA = ("_partial_", "_convert_", "_recursive_")
"""Settings of the published code's loader, which say how to instantiate."""
LOOKUPS = ("hydra.utils.get_method", "hydra.utils.get_class", "hydra.utils.get_object")
PACKAGES = ("flextok", "torch")
"""Where classes and functions that we can stand for come from."""
WRAPPER = "flextok.model.utils.wrappers.SequentialModuleDictWrapper"
ROOTS = ("flextok.flextok_wrapper.FlexTok", "flextok.flextok_wrapper.FlexTokFromHub")


def _setting(text: Any) -> Any:
    """What stands for a setting in the template."""
    if isinstance(text, list):
        return [_setting(item) for item in text]
    if not isinstance(text, str):
        return text
    if text.startswith("$"):
        name, _, default = text[1:].partition("=")
        return Number(name, yaml.safe_load(default) if default else REQUIRED)
    if text.startswith("="):
        return Fixed(yaml.safe_load(text.lstrip("=")), needed=text.startswith("=="))
    return FUNCTIONS[text.removeprefix("call ")] if text.startswith("call ") else text


def _template(entry: Mapping[str, Any]) -> Any:
    """A module of the template, or a mapping of them."""
    if "_target_" not in entry:
        return {name: _template(module) for name, module in entry.items()}
    settings = {name: _setting(text) for name, text in entry["settings"].items()}
    return Module(entry["_target_"], settings, tuple(entry.get("free", ())))


DESCRIPTION: Mapping[str, Module | Mapping[str, Module]] = _template(
    yaml.safe_load((resources.files("imgtok") / "assets/flextok.yaml").read_text(encoding="utf-8"))
)
"""The six entries of a published configuration; a mapping of modules is a sequence of them."""
ANY_NAME = {
    module.class_name: module
    for name, module in DESCRIPTION["encoder"].items()  # type: ignore[union-attr]
    if name in ("enc_channels_to_last", "enc_unpacker")
}
"""Modules without parameters, which only move data about: under whatever name, and as many as there are."""


# ---------------------------------------------------------------- reading a description


def read_numbers(data: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """What stands in the holes of a description; None where it is nowhere stated and may be so.

    `source` is the file that holds it. Raises ConfigError that names the field: for a module, setting or
    value that our model does not have, for a missing one, and for two fields that state one number and differ.
    """
    matcher = _Matcher(source)
    matcher.entries(data)
    return matcher.numbers


class _Matcher:
    """Compares a file's description with `DESCRIPTION`, and gathers its numbers."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.numbers: dict[str, Any] = {}
        self.stated_by: dict[str, str] = {}

    def error(self, path: str, text: str) -> ConfigError:
        return ConfigError(f"{self.source}: {path}: {text}")

    def entries(self, data: Mapping[str, Any]) -> None:
        known = ", ".join(DESCRIPTION)
        for name in data:
            if name not in (*DESCRIPTION, "_target_", *HYDRA):
                raise self.error(str(name), f"unknown entry; a published configuration has {known}")
        self.target("", data, ROOTS)
        for name, template in DESCRIPTION.items():
            if name not in data:
                raise self.error(name, f"is missing; a published configuration has {known}")
            match = self.module if isinstance(template, Module) else self.sequence
            match(name, data[name], template)  # type: ignore[arg-type]

    def sequence(self, path: str, data: Any, modules: Mapping[str, Module]) -> None:
        """An encoder or decoder: modules by name, some of which may have any name."""
        self.target(path, data, (WRAPPER,))
        for name in data:
            if name not in ("_target_", "module_dict", *HYDRA):
                raise self.error(f"{path}.{name}", "unknown setting; known are _target_ and module_dict")
        path, found = f"{path}.module_dict", data.get("module_dict")
        if not isinstance(found, Mapping):
            raise self.error(path, f"given {_show(found)}, must be a section of modules")
        for name, settings in found.items():
            target = settings.get("_target_") if isinstance(settings, Mapping) else None
            module = modules.get(name) or ANY_NAME.get(str(target).rpartition(".")[2])
            if module is None:
                known = f"{', '.join(modules)}, and under any name a {' or a '.join(ANY_NAME)}"
                raise self.error(f"{path}.{name}", f"unknown module ({_show(target)}); known are {known}")
            self.module(f"{path}.{name}", settings, module)
        for name, module in modules.items():
            if name not in found and module.class_name not in ANY_NAME:
                raise self.error(f"{path}.{name}", "is missing")

    def module(self, path: str, data: Any, module: Module) -> None:
        self.target(path, data, (module.target,))
        known = dict.fromkeys((*module.settings, *module.free))
        for name, value in data.items():
            if name in known:
                self.setting(f"{path}.{name}", value, module.settings.get(name))
            elif name not in ("_target_", *HYDRA):
                raise self.error(f"{path}.{name}", f"unknown setting; known are {', '.join(known)}")
        for name, expected in module.settings.items():
            if name not in data:
                self.absent(f"{path}.{name}", expected)

    def target(self, path: str, data: Any, targets: tuple[str, ...]) -> None:
        """Checks that a section is one, and that the class it names, if any, is one that ours stands for."""
        if not isinstance(data, Mapping):
            raise self.error(path, f"given {_show(data)}, must be a section with a _target_ and settings")
        if "_target_" in data and not _names(data["_target_"], tuple(name.rpartition(".")[2] for name in targets)):
            given = f"given {_show(data['_target_'])}, must be {targets[0]!r}"
            text = f"{given}. (It was only compared: imgtok imports and runs nothing that a file names)"
            raise self.error(f"{path}._target_".lstrip("."), text)

    def setting(self, path: str, value: Any, expected: Any) -> None:
        if isinstance(expected, Number):
            self.number(path, value, expected)
        elif isinstance(expected, Fixed):
            if value != expected.value or isinstance(value, bool) != isinstance(expected.value, bool):
                raise self.error(path, f"given {_show(value)}, must be {_show(expected.value)} for imgtok's FlexTok")
        elif isinstance(expected, Function):
            self.function(path, value, expected)
        elif _is_numbers(expected):
            if not _is_list(value) or len(value) != len(expected):
                raise self.error(path, f"given {_show(value)}, must be a list of {len(expected)}")
            for index, (item, number) in enumerate(zip(value, expected, strict=True)):
                self.number(f"{path}[{index}]", item, number)
        elif not all(isinstance(item, str | int | float | None) for item in (value if _is_list(value) else [value])):
            raise self.error(path, f"given {_show(value)}, must be text, a number, true, false, null or a list of them")

    def absent(self, path: str, expected: Any) -> None:
        """A setting that is not there has the published code's default, which must be there and be ours."""
        if isinstance(expected, Number) and expected.default is not REQUIRED:
            self.number(path, expected.default, expected)
        elif isinstance(expected, Fixed):
            if expected.needed:
                raise self.error(path, f"is missing, must be {_show(expected.value)}")
        elif isinstance(expected, Function):
            if expected.path:
                raise self.error(path, "is missing")
        elif isinstance(expected, Number) or _is_numbers(expected):
            raise self.error(path, "is missing")

    def number(self, path: str, value: Any, number: Number) -> None:
        before = self.numbers.setdefault(number.name, None)
        if value is None and number.default is None:
            return
        typed = _typed(value, number.kind)
        if typed is None:
            raise self.error(path, f"given {_show(value)}, must be {WORDS[number.kind]}")
        if before is None:
            self.numbers[number.name], self.stated_by[number.name] = typed, path
        elif before != typed:
            first = self.stated_by[number.name]
            raise self.error(path, f"is {_show(value)}, but {first} is {_show(before)}; for imgtok they are one number")

    def function(self, path: str, value: Any, expected: Function) -> None:
        settings: dict[str, Any] = {}
        if isinstance(value, Mapping):
            settings = {name: item for name, item in value.items() if name not in ("_target_", *HYDRA)}
            value = settings.pop("path", None) if value.get("_target_") in LOOKUPS else value.get("_target_")
        if not _names(value, expected.names):
            words = f"{' or '.join(expected.names)} of {' or '.join(PACKAGES)}"
            raise self.error(path, f"given {_show(value)}, must name {words}")
        for name, item in settings.items():
            if name not in expected.settings or item != expected.settings[name]:
                raise self.error(f"{path}.{name}", f"given {_show(item)}, which imgtok's FlexTok does not have")


WORDS: Mapping[type, str] = {
    int: "an integer of at least 1",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a list of integers of at least 1",
}


def _typed(value: Any, kind: type) -> Any:
    """`value` as the kind of number it must be, or None."""
    if kind is int:
        return value if type(value) is int and value >= 1 else None
    if kind is float:
        return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None  # nor is NaN
    if kind is tuple:
        items = [_typed(item, int) for item in value] if _is_list(value) else []
        return tuple(items) if items and None not in items else None
    return value if type(value) is kind else None


def _names(path: Any, names: tuple[str, ...]) -> bool:
    """Whether a dotted path leads to one of `names` in a package whose classes we know."""
    package, _, rest = path.partition(".") if isinstance(path, str) else ("", "", "")
    return package in PACKAGES and rest.rpartition(".")[2] in names


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_numbers(expected: Any) -> bool:
    return isinstance(expected, list) and isinstance(expected[0], Number)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


# ---------------------------------------------------------------- writing a description


def fill_in(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The description with these numbers in its holes."""
    entries: dict[str, Any] = {}
    for name, known in DESCRIPTION.items():
        if isinstance(known, Module):
            entries[name] = _written(known, numbers)
        else:
            modules = {inner: _written(module, numbers) for inner, module in known.items()}
            entries[name] = {"_target_": WRAPPER, "module_dict": modules}
    entries["pipeline"]["_partial_"] = True
    return entries


def _written(module: Module, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A module's section with its holes filled in; functions that the published code takes anyway are left out."""
    settings = {name: _filled(known, numbers) for name, known in module.settings.items()}
    return {"_target_": module.target} | {name: value for name, value in settings.items() if value is not LEFT_OUT}


LEFT_OUT = object()


def _filled(known: Any, numbers: Mapping[str, Any]) -> Any:
    if isinstance(known, list):
        return [_filled(item, numbers) for item in known]
    if isinstance(known, Number):
        return numbers[known.name]
    if isinstance(known, Function):
        return {"_target_": LOOKUPS[0], "path": known.path} if known.path else LEFT_OUT
    return known.value if isinstance(known, Fixed) else known
