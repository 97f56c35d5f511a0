"""AdamW's parameter groups and the learning rate of each step.

The rate is a plain function of the step. It is not a scheduler object that Accelerate prepares: such a one
advances once per process, so its numbers would change with the number of processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from train.config import TrainingConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, decayed and not.

    Tensors of two or more dimensions (matrices, kernels) decay, vectors and scalars (norms, biases) do not.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW, fused where torch has it: one kernel instead of several per tensor, on CPU about 8 times faster.

    Not fused under fp16, whose gradient scaler has to skip whole steps from outside.
    """
    groups = parameter_groups(model, config.weight_decay)
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
    """Give every parameter group the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
