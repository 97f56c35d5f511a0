"""Low-rank adapters of a generator (LoRA, arXiv 2106.09685), by `peft`.

While a model is trained, its linear layers that `training.lora.targets` names are wrapped: the weight W is frozen,
and (alpha / rank) B A is added to what it does, with thin matrices A and B that are trained. Everything else is
frozen, but for what starts afresh because `init` does not have it. Checkpoints hold the wrapped model; previews, the
finished model, and a checkpoint that is read as a model (`imgtok.checkpoints`) have W + (alpha / rank) B A, and are
ordinary.
"""

from __future__ import annotations

import copy
import fnmatch
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from torch import nn

from imgtok.config import did_you_mean
from imgtok.runs import IDENTITY, TRAINED_WHOLE, identity_in
from imgtok.train.config import LoRAConfig, TrainingConfig
from imgtok.train.frozen import say_what_trains
from imgtok.train.initialise import Init

M = TypeVar("M", bound=nn.Module)


def refuse_lora(training: TrainingConfig) -> None:
    """Raise ValueError for adapters in a job that trains something else than a generator."""
    if training.lora is not None:
        raise ValueError(
            "training.lora: adapters are for generators; of tokenizers and autoencoders decoder_only=true trains the "
            "decoder alone, and training.freeze holds parts still"
        )


def check_lora(training: TrainingConfig, init: str | None) -> None:
    """Raise ValueError for adapters of a model that starts from nothing."""
    if training.lora is not None and init is None:
        raise ValueError("training.lora: adapters are added to a model that is there; name it with init=MODEL")


def trained_whole(init: Init | None, fresh: Sequence[str], out: Path) -> list[str]:
    """The names of the parameters that are trained beside adapters, since they start afresh; a run that goes on has
    them in its identity.
    """
    if init is not None and init.weights is None:
        return list(identity_in(out / IDENTITY).get(TRAINED_WHOLE, []))
    return list(fresh)


def add_adapters(model: nn.Module, config: LoRAConfig, fresh: Iterable[str]) -> None:
    """Wrap the chosen linear layers of `model`, and freeze all else but the parameters named in `fresh`.

    Adapters change nothing at first. Raises ValueError for a pattern that fits no linear layer, and without peft.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = list[str]()
    for pattern in config.targets:
        found = fnmatch.filter(linears, pattern)
        if not found:
            raise ValueError(
                f"training.lora.targets: {pattern!r} fits no linear layer of the model{did_you_mean(pattern, linears)} "
                f"(it has {', '.join(linears[:3])}, ...)"
            )
        chosen += found
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            "training.lora: needs the package peft, which is not installed: pip install 'imgtok[finetune]', or leave "
            "training.lora out to train all weights"
        )
    from peft import LoraConfig, inject_adapter_in_model

    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not (chosen := [name for name in chosen if f"{name}.weight" in trainable]):
        raise ValueError(
            "training.lora: training.freeze holds all layers that training.lora.targets names; leave one of the two out"
        )
    names = "|".join(re.escape(name) for name in dict.fromkeys(chosen))  # as a text, it is matched with whole names
    inject_adapter_in_model(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=names), model)
    for name, parameter in model.named_parameters():
        if name in trainable.intersection(fresh):
            parameter.requires_grad_(True)
    say_what_trains(model, f"training.lora: adapters of rank {config.rank} on {len(set(chosen))} layers")


def merged(model: M) -> M:
    """A copy of a model without adapters, which does what it does with them; without any, the model itself."""
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    copied = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(copied.get_submodule(parent), last, module.get_base_layer())
    return copied
