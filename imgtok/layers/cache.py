"""Key/value cache of an autoregressive model: an explicit argument, never state of a module.

Memory for the whole sequence is taken once, so that a step writes in place and copies nothing. A key stands in the
column of its position. A call of the network opens a `Window` for its new positions, and every layer writes through it;
what a row holds beyond its length is forgotten, and the next window writes over it. Where all rows hold equally much,
Python knows how much, nothing is asked of the device, and attention runs over the filled part alone. Rows that differ
(after speculation, say) take the general path: keys scattered to their positions, attention over the whole capacity
under a mask, so that shapes stay the same from call to call.

Shapes: R rows, L new positions, S columns looked at, H heads, E head width, P columns of a prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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


@dataclass(frozen=True)
class Window:
    """The L new positions of one call of the network: where they go, and what they look at; the same for all layers."""

    span: slice
    """Columns that attention looks at: all that are filled, or the whole capacity."""
    new: slice
    """Columns of the new positions, if they are the same in all rows."""
    positions: Tensor | None
    """(R, L) columns of the new positions, if rows differ."""
    mask: Tensor | None
    """Boolean (R or 1, 1, L, S), True = may look; None where nothing has to be hidden, or `causal` says it all."""
    causal: bool
    """Whether the new positions are all there are, and see no later ones."""

    @classmethod
    def first(cls, num_new: int) -> Window:
        """That of a call without a cache."""
        return cls(slice(0, num_new), slice(0, num_new), None, None, causal=True)

    def of(self, table: Tensor) -> Tensor:
        """The rows of a table of positions (positions, ...) at the new positions: (L, ...), or (R, L, ...)."""
        return table[self.new] if self.positions is None else table[self.positions]


class LayerCache:
    """One layer's keys and values, (R, H, capacity, E) each, in one call of the network."""

    def __init__(self, keys: Tensor, values: Tensor, window: Window) -> None:
        self.keys = keys
        self.values = values
        self.window = window

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the window's keys and values (R, H, L, E), and returns all that it looks at, (R, H, S, E)."""
        window = self.window
        if window.positions is None:
            self.keys[:, :, window.new] = k
            self.values[:, :, window.new] = v
        else:
            rows = torch.arange(len(k), device=k.device)[:, None]
            self.keys[rows, :, window.positions] = k.transpose(1, 2).to(self.keys.dtype)
            self.values[rows, :, window.positions] = v.transpose(1, 2).to(self.values.dtype)
        return self.keys[:, :, window.span], self.values[:, :, window.span]


class KVCache:
    """Keys and values (R, H, capacity, E) of each layer with a length per row, and the `memory` of cross-attention once
    a prefill has computed it.

    `length` is the positions that every row holds, or None where rows may differ; `lengths` (R,) is always there.
    """

    def __init__(self, num_layers: int, rows: int, num_heads: int, capacity: int, head_dim: int, like: Tensor) -> None:
        shape = (rows, num_heads, capacity, head_dim)
        device, dtype = like.device, like.dtype
        if torch.is_autocast_enabled(device.type):  # what keys and values will come in
            dtype = torch.get_autocast_dtype(device.type)
        # Zeros, because what a mask hides still counts if it is not a number
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.length: int | None = 0
        self._lengths: Tensor | None = None
        self.memory: Memory | None = None
        self.padding: Tensor | None = None
        """(R, P) boolean: columns of a prefix in which nothing stands, and that no other position sees."""

    def __len__(self) -> int:
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def lengths(self) -> Tensor:
        """Positions that each row holds, (R,)."""
        if self.length is not None:
            return torch.full((len(self),), self.length, device=self.device)
        assert self._lengths is not None
        return self._lengths

    def open(self, num_new: int, positions: Tensor | None = None, *, causal: bool = True) -> Window:
        """The window of a call with `num_new` positions a row, which the cache holds from now on.

        They follow what each row holds, or are `positions` (R, L): consecutive, and none beyond a row's length, which
        is not checked. A position sees the keys of its row at its own position and before. With `causal=False` the
        caller says what is seen.
        """
        if positions is None and self.length is not None:
            start, stop = self.length, self.length + num_new
            assert stop <= self.capacity, "the cache was made for a shorter sequence"
            self.length = stop
            mask = None
            if causal and (self.padding is not None or (num_new > 1 and start > 0)):
                mask = self._mask(torch.arange(start, stop, device=self.device)[None], stop)
            plain = causal and mask is None and num_new > 1
            return Window(slice(0, stop), slice(start, stop), None, mask, causal=plain)
        lengths = self.lengths
        if positions is None:
            positions = lengths[:, None] + torch.arange(num_new, device=lengths.device)
        self.length, self._lengths = None, torch.maximum(lengths, positions[:, -1] + 1)
        mask = self._mask(positions, self.capacity) if causal else None
        return Window(slice(None), slice(0), positions, mask, causal=False)

    def layers(self, window: Window) -> list[LayerCache]:
        """Each layer's part, to be written through the window."""
        return [LayerCache(keys, values, window) for keys, values in zip(self.keys, self.values, strict=True)]

    def truncate(self, lengths: int | Tensor) -> None:
        """Forgets what rows hold beyond `lengths`, one number for all or (R,)."""
        if isinstance(lengths, int) and self.length is not None:
            self.length = min(self.length, lengths)
        else:
            held = self.lengths
            self._lengths = held.clamp(max=lengths) if isinstance(lengths, int) else torch.minimum(held, lengths)
            self.length = None

    def rows(self, rows: slice, length: int) -> KVCache:
        """Some rows of the batch as a cache on the same memory, the first `length` positions of which are filled."""
        part = copy.copy(self)
        part.keys, part.values = [keys[rows] for keys in self.keys], [values[rows] for values in self.values]
        part.padding = None if self.padding is None else self.padding[rows]
        part.length, part._lengths = length, None
        return part

    def _mask(self, positions: Tensor, columns: int) -> Tensor:
        """What `positions` (R or 1, L) see of the first columns, boolean (R or 1, 1, L, columns)."""
        column = torch.arange(columns, device=positions.device)
        own = positions[..., None]
        seen = column <= own
        if self.padding is not None:
            empty = F.pad(self.padding, (0, columns - self.padding.shape[1]))
            seen = (seen & ~empty[:, None]) | (column == own)  # a row of the softmax needs something to look at
        return seen[:, None]
