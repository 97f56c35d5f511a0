"""Where a model that is trained begins: its configuration put together, and weights of its own or of another model."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imgtok.config import from_dict, kind_name, read_yaml
from imgtok.hub import Found, configuration, load, model_class, resolve
from imgtok.runs import complete_steps
from imgtok.sections import Section

logger = logging.getLogger(__name__)


class Init(NamedTuple):
    """The model that a run starts from."""

    config: Any
    """Its configuration; that of the run's own model once the run has checkpoints."""
    weights: Found | None
    """Where its weights are; None once the run has checkpoints, which hold the weights."""


def find_init(config: Any, expect: type[Any]) -> Init | None:
    """What the field `init` of a job leads to, a model that derives from `expect`; None without one.

    A run that has checkpoints does not look for it again, and goes on where it has gone. Raises as `hub.resolve`.
    """
    if config.init is None:
        return None
    path = config.out / "config.yaml"
    if complete_steps(config.out / "checkpoints") and path.is_file():
        stored = read_yaml(path)["model"]
        return Init(from_dict(model_class(stored["kind"]).config_class, stored, f"{path}: model"), None)
    found = resolve(config.init, expect=expect)
    return Init(configuration(found), found)


def check_kind(model: Section | Any | None, init: str | None) -> None:
    """Raise ValueError if nothing says of which kind the model to train is."""
    if init is None and (model is None or model.kind is None):
        raise ValueError("model.kind: is required, unless init=MODEL says what to start from")


def configure(
    model: Section | Any | None, init: Init | None, facts: Mapping[str, Any] | None = None, holder: str = "the data"
) -> Any:
    """The configuration of the model to train: what was given, the facts, then what `init` has, then defaults.

    Raises ConfigError where these contradict each other; `check_kind` has seen to one of the first and third.
    """
    base = None if init is None else init.config
    section = Section(type(base), {}, Section.of(base).place) if model is None else Section.of(model)
    return section.over(base, facts, holder)


def model_in_words(config: Any) -> str:
    """The model that a job trains, for the line it begins with: its kind, and what it and its decoder start from."""
    parts = [config.model.kind]
    parts += [f"{name} {value}" for name in ("vae", "init") if (value := getattr(config, name, None)) is not None]
    return ", ".join(parts)


@torch.no_grad()
def start_from(model: nn.Module, init: Init | None, new: Sequence[str] = (), drop: Sequence[str] = ()) -> list[str]:
    """Fill `model`, freshly initialised, with the weights of `init`, strictly; without any, nothing happens. Gives the
    names of the tensors that are not those of `init`: they keep their first values, or were fitted.

    What the model can fit to itself by `adapt`, such as a table of other classes, is fitted, and the log says how.
    `new` are patterns (`fnmatch`) of parameters that keep their first values where `init` does not have them, or has
    them in another shape; `drop` patterns of those of `init` that are left out. Raises ValueError that lists every
    tensor which is too many, too few or of another shape, and every pattern that fits no name.
    """
    if init is None:
        if new or drop:
            raise ValueError("init_new, init_drop: say how to start from a model; name it with init=MODEL")
        return []
    if init.weights is None:
        return []
    with torch.random.fork_rng(devices=[]):
        stored: dict[str, Tensor] = load(init.weights).state_dict()
    wanted = model.state_dict()
    for field, patterns, names in (("init_new", new, wanted), ("init_drop", drop, stored)):
        idle = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
        if idle:
            whose = "the model to train" if names is wanted else str(init.weights.path)
            raise ValueError(
                f"{field}: {idle[0]!r} fits no tensor of {whose}; it has {', '.join(list(names)[:5])}, ..."
            )
    kept = {name: tensor for name, tensor in stored.items() if not _fits(name, drop)}
    adapted = _adapted(model, kept, init.config, new)
    problems = _problems(kept, wanted, new)
    if problems:
        title = f"init: the weights in {init.weights.path} do not fit the model to train:"
        title += _of_another_autoencoder(model, init.config, problems)
        raise ValueError("\n  ".join([title, *problems]))
    for sentence in dict.fromkeys(adapted.values()):
        logger.info("init: %s", sentence)
    taken = {name: tensor for name, tensor in kept.items() if tensor.shape == wanted[name].shape}
    for name, tensor in taken.items():
        wanted[name].copy_(tensor)
    return [name for name in wanted if name not in taken or name in adapted]


def _adapted(model: nn.Module, kept: dict[str, Tensor], start: Any, new: Sequence[str]) -> dict[str, str]:
    """Fit those of the stored tensors that the model can fit (`Pretrained.adapt`); gives what is to be said by the name
    of each. What `new` lets start afresh is not fitted.
    """
    adapt: Any = getattr(model, "adapt", None)
    if adapt is None or type(start) is not type(getattr(model, "config", None)):
        return {}
    wanted = model.state_dict()
    left = {name: kept.pop(name) for name in list(kept) if _fits(name, new) and _other_shape(name, kept, wanted)}
    said: dict[str, str] = adapt(kept, start)
    kept.update({name: tensor for name, tensor in left.items() if name not in kept})
    return said


def _other_shape(name: str, kept: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return name in wanted and kept[name].shape != wanted[name].shape


def _of_another_autoencoder(model: nn.Module, start: Any, problems: Sequence[str]) -> str:
    """What explains most of the problems where the start stands on an autoencoder of another shape; else nothing."""
    field: str | None = getattr(model, "stands_on", None)
    if field is None or not any(f": {field}." in line for line in problems):
        return ""
    there, here = (getattr(config, field, None) for config in (start, model.config))
    if there is None or here is None or there == here:
        return ""
    kinds = [kind_name(type(each)) for each in (there, here)]
    words = f"of kind {kinds[0]!r}, and here one of kind {kinds[1]!r}" if kinds[0] != kinds[1] else "of another shape"
    return f" its autoencoder is {words}; leave vae out to keep that of init, or leave init out. Tensor by tensor:"


def _problems(kept: Mapping[str, Tensor], wanted: Mapping[str, Tensor], new: Sequence[str]) -> list[str]:
    lines = []
    for name, tensor in wanted.items():
        shape = tuple(tensor.shape)
        if name not in kept and not _fits(name, new):
            lines.append(f"missing: {name} {shape}; init_new={name} starts it afresh")
        elif name in kept and kept[name].shape != tensor.shape and not _fits(name, new):
            lines.append(
                f"another shape: {name} is {tuple(kept[name].shape)} there and {shape} here; change the model's "
                f"configuration, or init_new={name} starts it afresh"
            )
    for name, tensor in kept.items():
        if name not in wanted:
            lines.append(f"too many: {name} {tuple(tensor.shape)}; init_drop={name} leaves it out")
    return lines


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
