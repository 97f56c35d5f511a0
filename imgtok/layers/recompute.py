"""Activation checkpointing: a block's activations are computed again in the backward pass instead of kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def call_block(block: nn.Module, *inputs: Any, recompute: bool) -> Tensor:
    """`block(*inputs)`; with `recompute` only the inputs and the output are kept for the backward pass.

    Values and gradients are the same, bit for bit on a CPU, and no parameter changes its name.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
