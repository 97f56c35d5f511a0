"""Linear layers of a large model on a CPU, with weights laid out for the few rows that drawing tokens has.

A step of a generator multiplies a handful of rows by every weight of the model, so what it costs is reading these
weights. torch leaves float32 products to MKL, which on an AMD processor reads them at a quarter of the speed that the
memory has, as soon as there are two rows. oneDNN, which torch carries with it, is two to three times as fast once the
weights are in its own layout; see benchmarks/README.md. Laying them out takes about as long as one step and as much
memory as the weights themselves, so it is done for a whole drawing, and undone after it.

Only float32 on a CPU is computed so, without gradients. The results differ from those of `F.linear` by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_MODEL = 64 * 2**20
"""Bytes of linear weights that a model has at least: those of a smaller one stay in the processor's cache."""


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[bool]:
    """Inside, the linear layers of `model` compute with packed copies of their weights, where that pays and the memory
    is there; whether they do is what it gives. Weights must not change inside. Parameters and their names stay as they
    are.
    """
    layers = _layers(model)
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        layer.forward = partial(_linear, layer, packed=packed)  # type: ignore[method-assign]
    try:
        yield bool(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)  # gone already where two drawings of one model overlapped


def _linear(layer: nn.Linear, x: Tensor, *, packed: Tensor) -> Tensor:
    """What `layer` makes of x, from its packed weight unless somebody wants gradients."""
    if torch.is_grad_enabled():
        return F.linear(x, layer.weight, layer.bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, "none", [], "")
    return out


def _layers(model: nn.Module) -> list[nn.Linear]:
    """Those to be packed: all, or none."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    size = sum(layer.weight.nbytes for layer in layers)
    suits = all(_suits(layer) for layer in layers) and not any(
        module._compiled_call_impl is not None for module in model.modules()
    )
    if not suits or size < SMALLEST_MODEL or not _has_packed_kernels():
        return []
    return layers if size < psutil.virtual_memory().available / 2 else []


def _suits(layer: nn.Linear) -> bool:
    """Whether its weight is float32 on a CPU, and no stand-in that follows shapes alone."""
    weight = layer.weight.data
    return type(weight) is Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32


def _has_packed_kernels() -> bool:
    """Whether this build of torch has them: both are internal to torch, where its compiler uses them."""
    return (
        torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
