"""Linear layers of a large model on a CPU, with weights laid out for the few rows that drawing tokens has.

A step of a generator multiplies a handful of rows by every weight of the model, so what it costs is reading these
weights. torch leaves float32 products to MKL, which on an AMD processor reads them at a quarter of the speed that the
memory has, as soon as there are two rows. oneDNN, which torch carries with it, is two to three times as fast once the
weights are in its own layout; see benchmarks/README.md. Laying them out takes about as long as one step and as much
memory as the weights themselves, so it is done for a whole drawing, and undone after it.

Only float32 on a CPU is computed so, without gradients. The results differ from those of `F.linear` by rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_MODEL = 64 * 2**20
"""Bytes of linear weights that a model has at least: those of a smaller one stay in the processor's cache."""
LARGEST_SHARE = 0.25
"""Of the machine's memory that linear weights take at most, since there will be as much again."""
LOCK = threading.Lock()
"""Held while layers are entered and left, so that drawings in several threads count their users right."""


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[bool]:
    """Inside, the linear layers of `model` compute with packed copies of their weights, where that pays and the machine
    has the memory; whether they do is what it gives, and depends on model and machine alone. Weights must not change
    inside. Parameters and their names stay as they are. Drawings that overlap share the copies.
    """
    layers, entered = _layers(model), list[nn.Linear]()
    try:
        with LOCK:
            for layer in layers:
                _Packed.enter(layer)
                entered.append(layer)
        yield bool(layers)
    finally:
        with LOCK:
            for layer in entered:
                _Packed.leave(layer)


class _Packed:
    """What takes the place of a layer's `forward`."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.users = layer, 0
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # the packed product has no gradients
            return F.linear(x, self.layer.weight, self.layer.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.layer.bias, "none", [], "")
        return out

    @classmethod
    def enter(cls, layer: nn.Linear) -> None:
        found = vars(layer).get("forward")
        packed = found if isinstance(found, cls) else cls(layer)
        packed.users += 1
        vars(layer)["forward"] = packed

    @classmethod
    def leave(cls, layer: nn.Linear) -> None:
        packed = vars(layer)["forward"]
        packed.users -= 1
        if not packed.users:
            del vars(layer)["forward"]


def _layers(model: nn.Module) -> list[nn.Linear]:
    """Those to be packed: all, or none."""
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    size = sum(layer.weight.nbytes for layer in layers)
    suits = all(_suits(layer) for layer in layers) and not any(
        module._compiled_call_impl is not None for module in model.modules()
    )
    fits = SMALLEST_MODEL <= size <= LARGEST_SHARE * psutil.virtual_memory().total
    return layers if suits and fits and _has_packed_kernels() else []


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
