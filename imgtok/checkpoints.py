"""A checkpoint of a training run as a model: the reader of the layout "run".

A checkpoint holds all that is trained, which may be the model with a discriminator or a head around it, and the running
average of these tensors. Which class the model is of, and how it is configured, the run's own `config.yaml` says; where
its tensors stand among the others follows from their names alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imgtok import hub, runs
from imgtok.config import ConfigError, from_dict, read_yaml
from imgtok.weights import Weights, check_tensors, fill, open_weights, skeleton, tied_names

logger = logging.getLogger(__name__)


def describe(name: str, folder: Path) -> hub.Found:
    """What a checkpoint holds. Raises ConfigError for a run that trained no model, ValueError for lost bytes."""
    data = read_yaml(folder / runs.CONFIG)
    model = data.get("model")
    if not isinstance(model, dict) or "kind" not in model:
        raise ConfigError(f"{folder / runs.CONFIG}: it has no section `model` with a `kind`: not of a run of imgtok")
    progress(folder)
    return hub.Found(name, folder, hub.RUN, str(model["kind"]), model)


def progress(folder: Path) -> runs.Progress:
    """How far the run was. Raises ValueError, which names the checkpoint, if files there have lost bytes."""
    try:
        return runs.read_progress(folder)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder}: a damaged checkpoint: {error}; take another one of the run, or {folder.parent}, which means "
            "the newest that is whole"
        ) from error


def configuration(found: hub.Found) -> Any:
    """The configuration of the model. Raises ConfigError."""
    return from_dict(found.model_class.config_class, found.config, f"{found.path / runs.CONFIG}: model")


def files(found: hub.Found) -> list[Path]:
    """The files of its weights: of all that is trained, and the averages where the run keeps any."""
    averaged = found.path / runs.AVERAGED
    return [found.path / runs.WEIGHTS, *([averaged] if averaged.is_file() else [])]


def load(
    found: hub.Found, *, raw: bool = False, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Any:
    """The model with averaged weights, as `final/` has it, or with `raw` as it was trained; in evaluation mode.

    Raises ConfigError for its configuration, ValueError for tensors that are missing, too many or misshapen.
    """
    config = configuration(found)
    model = skeleton(lambda: found.model_class(config))
    trained, *average = (open_weights(path, as_stored=True) for path in files(found))
    kept = "trained weights, of which the run keeps no average (training.ema=0)"
    if raw:
        kept = "trained weights"
    elif average:
        trained, kept = trained.replaced(average[0]), "averaged weights"
    lora = read_yaml(found.path / runs.CONFIG).get("training", {}).get("lora")
    if lora:
        trained = with_adapters(trained, lora)
    names = find_model(model, trained, found.path)
    tensors = trained.select(names)
    described = f"{type(model).__name__} that its {runs.CONFIG}"
    check_tensors(tensors.blank, model.state_dict(), found.path / runs.WEIGHTS, described)
    beside = sorted({name.split(".")[0] for name in set(trained) - set(names.values())})
    left = f", without what was trained beside it ({', '.join(beside)})" if beside else ""
    logger.info("%s: the %s of step %d%s", found.path, kept, progress(found.path).step, left)
    unmeasured = [name for name in getattr(found.model_class, "measured_at_end", ()) if name in found.config]
    if unmeasured:
        values = ", ".join(f"{name} is {found.config[name]}" for name in unmeasured)
        logger.warning("%s: %s, as the run began: it is measured when training ends, for final/", found.path, values)
    return fill(model, tensors.items(), map_location=map_location, dtype=dtype)


def with_adapters(stored: Weights, lora: Mapping[str, Any]) -> Weights:
    """Weights of an ordinary model, of those that were trained with adapters (`imgtok.train.lora`): W + scale B A."""
    scale = lora["alpha"] / lora["rank"]
    wrapped = {name: name.replace(".base_layer.", ".") for name in stored if ".lora_" not in name}

    def read(name: str) -> Tensor:
        layer = name.removesuffix(".base_layer.weight")
        if layer == name:
            return stored[name]
        thin = [stored[f"{layer}.lora_{which}.default.weight"] for which in "BA"]
        return stored[name] + scale * (thin[0] @ thin[1])

    blank = {new: stored.blank[old] for old, new in wrapped.items()}
    return Weights(stored.path, blank, {new: partial(read, old) for old, new in wrapped.items()}, stored.metadata)


def find_model(model: nn.Module, stored: Iterable[str], folder: Path) -> dict[str, str]:
    """Names of the model's tensors -> their names among all that was trained, which share a prefix that nothing else
    has.

    Of tied tensors a checkpoint holds one. Where none fits, what is there under the likeliest prefix, for a message;
    raises ValueError if several fit.
    """
    names = set(stored)
    tied = {name: group for group in tied_names(model) for name in group}
    wanted = {name: (name, *tied.get(name, ())) for name in model.state_dict()}

    def at(prefix: str) -> dict[str, str]:
        places = {own: [prefix + each for each in some if prefix + each in names] for own, some in wanted.items()}
        found = {own: there[0] for own, there in places.items() if there}
        taken = {place for there in places.values() for place in there}
        others = (name for name in names if name.startswith(prefix) and name not in taken)
        return found | {name.removeprefix(prefix): name for name in others}

    parents = {name[: -len(own)] for own in wanted for name in names if name.endswith(f".{own}")}
    options = {prefix: at(prefix) for prefix in sorted({"", *parents})}
    fitting = [prefix for prefix, found in options.items() if found.keys() == wanted.keys()]
    if len(fitting) > 1:
        raise ValueError(f"{folder}: it holds such a model several times ({', '.join(fitting)}): which one is unknown")
    if fitting:
        return options[fitting[0]]
    return min(options.values(), key=lambda found: (len(wanted.keys() - found.keys()), len(found)))


def part(found: hub.Found, name: str) -> hub.Found:
    """The model that the run's configuration names in a field, such as the `tokenizer` of a generator.

    Raises FileNotFoundError where it is not, ValueError if it is another one now than when the checkpoint was written.
    """
    data = read_yaml(found.path / runs.CONFIG)
    given = data.get(name)
    if not isinstance(given, str):
        raise FileNotFoundError(f"{found.path}: its {runs.CONFIG} names no {name}: say which one with {name}=FOLDER")
    try:
        there = hub.resolve(given).scaled(data.get("vae_scaling_factor"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{found.path}: its run was trained with {name}={given}, and {error}; say where it is with {name}=FOLDER"
        ) from error
    known = progress(found.path).parts.get(name)
    if known is not None and known != there.fingerprint():
        raise ValueError(
            f"{found.path}: its run was trained with {name}={given}, where another model is now (fingerprint "
            f"{there.fingerprint()}, then {known}); say where that one is with {name}=FOLDER"
        )
    return there
