"""Activation checkpointing: activations are computed again in the backward pass instead of kept, those of a whole
block, or what is cheap of it.
"""

from __future__ import annotations

from collections.abc import Callable
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


def keep_source(
    cheap: Callable[[Tensor], Tensor], x: Tensor, read: Callable[[Tensor], Tensor], *, wanted: bool = True
) -> Tensor:
    """`read(cheap(x))`. For the backward pass `read` keeps `x` in place of `cheap(x)`, and calls `cheap`, a norm or an
    activation, again, if that is `wanted`. Values and gradients are the same, bit for bit on a CPU. Not for use inside
    `call_block` with `recompute`, which would not see what `read` keeps.
    """
    made = cheap(x)
    if not wanted or not torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor:
        return read(made)
    source = x.detach()
    place = made.data_ptr(), made.numel()  # the graph holds `pack`, and would hold `made` with it

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if (kept.data_ptr(), kept.numel()) == place else kept

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else cheap(source).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return read(made)
