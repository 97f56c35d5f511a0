"""Key/value cache of an autoregressive model: an explicit argument, never state of a module.

Memory for the whole sequence is taken once, so that a step writes in place and copies nothing. A key stands in the
column of its position. A call of the network opens a `Window` for its new positions, and every layer writes through it;
what a row holds beyond its length is forgotten, and the next window writes over it. Where all rows hold equally much,
Python knows how much, nothing is asked of the device, and attention runs over the filled part alone. Rows that differ
(after speculation, say) take the general path: keys scattered to their positions, attention over the whole capacity
under a mask, so that shapes stay the same from call to call.

Near the end of a cache a window of L positions does not fit any more. Where lengths are known to the host (equal rows,
or rows on the CPU) `open` says so. On an accelerator it would have to wait for them: there the caller keeps count and
shifts the window back, so that it ends at the capacity. Its first positions are then ones that the row already holds,
and are written again with the same ids.

Shapes: R rows, L new positions, S columns looked at, H heads, E head width, P columns of a prefix.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok.layers.record import AttentionRecord, LayerRecord


@dataclass(frozen=True)
class MemoryLayer:
    """What one layer of cross-attention looks at."""

    keys: Tensor
    """(R, H, T, E)."""
    values: Tensor
    """(R, H, T, E)."""
    mask: Tensor | None = None
    """Boolean (True = may look) or additive; broadcasts to (R, H, L, T). Every row has to see something."""
    record: LayerRecord | None = None
    """What keeps the layer's map, if it is asked for."""


@dataclass(frozen=True)
class Memory:
    """What cross-attention looks at, which does not grow: keys and values (R, H, T, E) of each layer, and how the rows
    see the T columns: (R, 1, 1, T), boolean (True = may look) or additive.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    mask: Tensor
    record: AttentionRecord | None = None

    def layer(self, number: int) -> MemoryLayer:
        """What layer `number` looks at."""
        record = None if self.record is None else self.record.of_layer(number)
        return MemoryLayer(*self.layers[number], self.mask, record)

    def rows(self, rows: slice) -> Memory:
        """What some rows of the batch look at."""
        return Memory([(keys[rows], values[rows]) for keys, values in self.layers], self.mask[rows], self.record)

    def recorded(self, record: AttentionRecord | None) -> Memory:
        """The same, with a record that keeps the maps of all calls that look at it from now on; None keeps none."""
        return replace(self, record=record)


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
    """(R or 1, 1, L, S), boolean (True = may look) or additive; None where nothing has to be hidden, or `causal` says
    it all."""
    causal: bool
    """Whether the new positions are all there are, and see no later ones."""

    @classmethod
    def first(cls, num_new: int, prefix_mask: Tensor | None = None) -> Window:
        """That of a call without a cache; `prefix_mask` as in `KVCache`."""
        mask, new = None, slice(0, num_new)
        if prefix_mask is not None:
            mask = causal_mask(torch.arange(num_new, device=prefix_mask.device)[None], num_new, prefix_mask)
        return cls(new, new, None, mask, causal=mask is None)

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
    Gradients flow through one call of a network, whatever the cache held before; a further call writes over what the
    backward pass of the first one needs.
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
        self.prefix_record: AttentionRecord | None = None
        """What keeps the maps of a prefix, if they are asked for."""
        self.prefix_mask: Tensor | None = None
        """How the columns of a prefix are seen, (R, P), boolean or additive, as in `causal_mask`; None is all."""

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
        """Positions that each row holds, (R,); where rows differ the cache's own tensor, which further calls change."""
        if self.length is not None:
            return torch.full((len(self),), self.length, device=self.device)
        assert self._lengths is not None
        return self._lengths

    def open(self, num_new: int, positions: Tensor | None = None, *, causal: bool = True) -> Window:
        """The window of a call with `num_new` positions a row, which the cache holds from now on.

        They follow what each row holds, or are `positions` (R, L): consecutive, and the first of them none beyond a
        row's length, which is not checked. A position sees the keys of its row at its own position and before. With
        `causal=False` the caller says what is seen.

        Raises ValueError for positions past the capacity; of rows that differ, only where they lie on the CPU and
        nothing is being compiled (see the head of this file).
        """
        if positions is None and self.length is not None:
            start, stop = self.length, self.length + num_new
            if stop > self.capacity:
                raise ValueError(f"the cache was made for a shorter sequence: {self.capacity} positions, not {stop}")
            self.length = stop
            mask = None
            if causal and (self.prefix_mask is not None or (num_new > 1 and start > 0)):
                mask = causal_mask(torch.arange(start, stop, device=self.device)[None], stop, self.prefix_mask)
            plain = causal and mask is None and num_new > 1
            return Window(slice(0, stop), slice(start, stop), None, mask, causal=plain)
        lengths = self.lengths
        if positions is None:
            positions = lengths[:, None] + torch.arange(num_new, device=lengths.device)
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            stop = int(positions.max()) + 1 if positions.numel() else 0
            if stop > self.capacity:
                raise ValueError(
                    f"the cache was made for a shorter sequence: {self.capacity} positions, not {stop}; a window near "
                    "the end of a row has to start earlier, at positions that are given"
                )
        self._hold(torch.maximum(lengths, positions[:, -1] + 1))
        mask = causal_mask(positions, self.capacity, self.prefix_mask) if causal else None
        return Window(slice(None), slice(0), positions, mask, causal=False)

    def layers(self, window: Window) -> list[LayerCache]:
        """Each layer's part, to be written through the window."""
        return [LayerCache(keys, values, window) for keys, values in zip(self.keys, self.values, strict=True)]

    def truncate(self, lengths: int | Tensor) -> None:
        """Forgets what rows hold beyond `lengths`, one number for all or (R,).

        Rows that differed may hold equally much after it; that is looked at on the CPU alone.
        """
        if isinstance(lengths, int) and lengths == 0:  # all rows hold equally much again
            self.length, self._lengths = 0, None
        elif isinstance(lengths, int) and self.length is not None:
            self.length = min(self.length, lengths)
        else:
            held = self.lengths
            if isinstance(lengths, int) and held.device.type == "cpu" and int(held.min()) >= lengths:
                self.length, self._lengths = lengths, None
                return
            self._hold(held.clamp(max=lengths) if isinstance(lengths, int) else torch.minimum(held, lengths))

    def _hold(self, lengths: Tensor) -> None:
        """Rows hold `lengths` (R,) from now on, a tensor that nobody else has.

        Where they differed before, these are written over: a CUDA graph of calls reads and writes one place.
        """
        if self.length is None:
            assert self._lengths is not None
            self._lengths.copy_(lengths)
        else:
            self.length, self._lengths = None, lengths

    def rows(self, rows: slice, length: int) -> KVCache:
        """Some rows of the batch as a cache on the same memory, the first `length` positions of which are filled."""
        part = copy.copy(self)
        part.keys, part.values = [keys[rows] for keys in self.keys], [values[rows] for values in self.values]
        part.prefix_mask = None if self.prefix_mask is None else self.prefix_mask[rows]
        part.length, part._lengths = length, None
        return part


def causal_mask(positions: Tensor, columns: int, prefix_mask: Tensor | None = None) -> Tensor:
    """What `positions` (R or 1, L) see of the first columns, (R or 1, 1, L, columns): themselves and what comes before.

    `prefix_mask` (R, P) says how the first P columns are seen: boolean, or additive, and then so is the result. A
    position sees itself all the same, since a softmax needs something to look at.
    """
    column = torch.arange(columns, device=positions.device)
    own = positions[..., None]
    seen = column <= own  # (R or 1, L, columns)
    if prefix_mask is not None:
        rest = columns - prefix_mask.shape[1]
        if prefix_mask.dtype == torch.bool:
            seen = (seen & F.pad(prefix_mask, (0, rest), value=True)[:, None]) | (column == own)
        else:
            weights = F.pad(prefix_mask, (0, rest))[:, None].masked_fill(column == own, 0)
            seen = weights.masked_fill(~seen, -torch.inf)
    return seen[:, None]
