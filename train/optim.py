"""Groups of parameters that are trained in one way each, AdamW over them, and the learning rate of each step.

The rate is a plain function of the step. It is not a scheduler object that Accelerate prepares: such a one
advances once per process, so its numbers would change with the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from imgtok.groups import ParameterGroup
from imgtok.layers.mup import noted_width
from imgtok.train.config import TrainingConfig


def check_groups(model: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    """Raise ValueError unless each trainable parameter of `model` is in exactly one group, and nothing else is."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    counts = dict.fromkeys((id(p) for p in model.parameters() if p.requires_grad), 0)
    for group in groups:
        for parameter in group.trainable:
            if id(parameter) not in counts:
                raise ValueError(
                    f"group {group.name}: a parameter of shape {tuple(parameter.shape)} is not the model's"
                )
            counts[id(parameter)] += 1
    wrong = [f"{names[key]} ({count})" for key, count in counts.items() if count != 1]
    if wrong:
        raise ValueError(f"each parameter must be in one group; in how many these are: {', '.join(wrong[:5])}")


def parameter_groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, base_width: int = 0
) -> list[dict[str, Any]]:
    """The parameters that require a gradient, by what AdamW does to them: `weight_decay` and `rate_scale`, the factor
    on their learning rate.

    Tensors of two or more dimensions (matrices, kernels) decay, vectors and scalars (norms, biases) do not.
    With a `base_width`, muP (arXiv 2203.03466): matrices that read the network's width learn at base_width / width of
    the rate. For hidden ones that is the rule itself. For readouts, the rule is an output times base_width / width;
    since they start at zero, a plain Linear at the smaller rate learns the same function, and is what is saved.
    Decay is divided by the scale, so that every matrix shrinks alike (and a readout as it would in the other form).
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            width = noted_width(parameter) if base_width else None
            scale = base_width / width if width else 1.0
            groups.setdefault((parameter.ndim >= 2, scale), []).append(parameter)
    return [
        {"params": groups[decays, scale], "weight_decay": weight_decay / scale if decays else 0.0, "rate_scale": scale}
        for decays, scale in sorted(groups, reverse=True)
    ]


def whole_model(model: nn.Module) -> list[ParameterGroup]:
    """All parameters in one group, trained as the section `training` says."""
    return [ParameterGroup(name="model", parameters=list(model.parameters()))]


def make_optimizer(
    model: nn.Module, config: TrainingConfig, device: torch.device, groups: Sequence[ParameterGroup] | None = None
) -> torch.optim.AdamW:
    """AdamW, fused where torch has it: one kernel instead of several per tensor, on CPU about 8 times faster.

    Not fused under fp16, whose gradient scaler has to skip whole steps from outside. Raises ValueError for a model
    without a trainable parameter, unless no step is asked for, for groups that are not a partition of the parameters,
    and for `mup_base_width` with a model that notes no widths (imgtok.layers.mup).
    """
    groups = whole_model(model) if groups is None else groups
    check_groups(model, groups)
    every = [parameter for group in groups for parameter in group.trainable]
    if not every and config.steps:
        raise ValueError(
            f"training.steps: {config.steps}, but the model has no trainable parameter: 0 saves it as it is"
        )
    if config.mup_base_width and not any(noted_width(parameter) for parameter in every):
        raise ValueError(
            f"training.mup_base_width: {config.mup_base_width}, but this model ({type(model).__name__}) is not made "
            "for muP: set it to 0"
        )
    settings: list[dict[str, Any]] = []
    for group in groups:
        decay = config.weight_decay if group.weight_decay is None else group.weight_decay
        for part in parameter_groups(group.trainable, decay, config.mup_base_width):
            part["rate_scale"] *= group.rate
            settings.append(part | {"betas": group.betas or config.betas})
    if not settings:  # no step will be taken, but torch wants a group
        settings = [{"params": [], "weight_decay": 0.0, "rate_scale": 1.0}]
    fused = device.type in ("cpu", "cuda") and config.precision != "fp16"
    return torch.optim.AdamW(settings, lr=config.learning_rate, betas=config.betas, fused=fused)


def rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0 to config.steps - 1.

    Below `warmup_steps` the rate climbs linearly, there it is the peak, at the last step exactly final_rate x peak
    (cosine and linear).
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    start = max(warmup, round(config.decay_from * config.steps))
    if config.schedule == "constant" or step <= start:
        return config.learning_rate
    progress = min(1.0, (step - start) / (config.steps - 1 - start))
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * remaining)


def restore_settings(optimizer: torch.optim.Optimizer, settings: Sequence[dict[str, Any]]) -> None:
    """Give every parameter group its decay, betas and so on back, after a checkpoint with others was loaded.

    AdamW's step counts go where the fused or the plain form looks for them.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
        for parameter in group["params"]:
            if parameter in optimizer.state:
                state = optimizer.state[parameter]
                state["step"] = state["step"].to(parameter.device if group["fused"] else "cpu")


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group its learning rate: `rate` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]
