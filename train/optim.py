"""AdamW's parameter groups, with muP's scales, and the learning rate of each step.

The rate is a plain function of the step. It is not a scheduler object that Accelerate prepares: such a one
advances once per process, so its numbers would change with the number of processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from imgtok.layers.mup import noted_width
from imgtok.train.config import TrainingConfig


def parameter_groups(model: nn.Module, weight_decay: float, base_width: int = 0) -> list[dict[str, Any]]:
    """Trainable parameters in groups that share decay and `rate_scale`, the factor on their learning rate.

    Tensors of two or more dimensions (matrices, kernels) decay, vectors and scalars (norms, biases) do not.
    With a `base_width`, muP (arXiv 2203.03466): matrices that read the network's width learn at base_width / width of
    the rate. For hidden ones that is the rule itself. For readouts, the rule is an output times base_width / width;
    since they start at zero, a plain Linear at the smaller rate learns the same function, and is what is saved.
    Decay is divided by the scale, so that every matrix shrinks alike (and a readout as it would in the other form).
    Raises ValueError for a `base_width` with a model that notes no widths (imgtok.layers.mup).
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            width = noted_width(parameter) if base_width else None
            scale = base_width / width if width else 1.0
            groups.setdefault((parameter.ndim >= 2, scale), []).append(parameter)
    if base_width and groups and not any(noted_width(p) for ps in groups.values() for p in ps):
        raise ValueError(
            f"training.mup_base_width: {base_width}, but this model ({type(model).__name__}) is not made for muP: "
            "set it to 0 (a FlexTok is)"
        )
    return [
        {"params": groups[decays, scale], "weight_decay": weight_decay / scale if decays else 0.0, "rate_scale": scale}
        for decays, scale in sorted(groups, reverse=True)
    ]


def make_optimizer(model: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW, fused where torch has it: one kernel instead of several per tensor, on CPU about 8 times faster.

    Not fused under fp16, whose gradient scaler has to skip whole steps from outside.
    """
    groups = parameter_groups(model, config.weight_decay, config.mup_base_width)
    if not groups:
        raise ValueError("the model has no trainable parameter: every parameter has requires_grad = False")
    fused = device.type in ("cpu", "cuda") and config.precision != "fp16"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=fused)


def rate_at(step: int, config: TrainingConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0 to config.steps - 1.

    Below `warmup` the rate climbs linearly, at `warmup` it is the peak, at the last step exactly
    final_rate x peak (cosine and linear).
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / (config.warmup + 1)
    start = max(config.warmup, round(config.decay_from * config.steps))
    if config.schedule == "constant" or step <= start:
        return config.learning_rate
    progress = min(1.0, (step - start) / (config.steps - 1 - start))
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * remaining)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group its learning rate: `rate` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_scale"]
