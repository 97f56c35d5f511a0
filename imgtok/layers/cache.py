"""Key/value cache of an autoregressive model: an explicit argument, never state of a module.

Memory for the whole sequence is taken once, so that a step writes in place and copies nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """What cross-attention looks at, which does not grow: keys and values (B, H, T, E) of each layer, and which of
    the T columns a row may see, boolean (B, 1, 1, T).
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    mask: Tensor

    def rows(self, rows: slice) -> Memory:
        """What some rows of the batch look at."""
        return Memory([(keys[rows], values[rows]) for keys, values in self.layers], self.mask[rows])


class LayerCache:
    """Keys and values of one attention layer, (B, H, capacity, E) each, filled from the left."""

    def __init__(self, keys: Tensor, values: Tensor, length: int = 0) -> None:
        self.keys = keys
        self.values = values
        self.length = length

    def append(self, k: Tensor, v: Tensor, keep: int | None = None) -> tuple[Tensor, Tensor]:
        """Writes (B, H, L, E) keys and values behind the stored ones and returns all of them.

        With `keep`, only the first so many stay: the next call writes over the others.
        """
        end = self.length + k.shape[2]
        assert end <= self.keys.shape[2], "the cache was made for a shorter sequence"
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end if keep is None else self.length + keep
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """One `LayerCache` a layer, and the `memory` of cross-attention once a prefill has computed it.

    `length` is the number of positions already computed.
    """

    def __init__(self, num_layers: int, batch: int, num_heads: int, capacity: int, head_dim: int, like: Tensor) -> None:
        shape = (batch, num_heads, capacity, head_dim)
        device, dtype = like.device, like.dtype
        if torch.is_autocast_enabled(device.type):  # what keys and values will come in
            dtype = torch.get_autocast_dtype(device.type)
        self.memory: Memory | None = None
        self.layers = [
            LayerCache(
                torch.empty(shape, dtype=dtype, device=device),
                torch.empty(shape, dtype=dtype, device=device),
            )
            for _ in range(num_layers)
        ]

    @property
    def length(self) -> int:
        return self.layers[0].length

    def rows(self, rows: slice, length: int) -> KVCache:
        """Some rows of the batch as a cache on the same memory, the first `length` positions of which are filled."""
        part = copy.copy(self)
        part.layers = [LayerCache(layer.keys[rows], layer.values[rows], length) for layer in self.layers]
        return part
