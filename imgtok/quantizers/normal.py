"""Scalar quantization by the normal distribution (TokenBridge, arXiv 2503.16430): each number of a latent on its own is
rounded to one of B levels of a fixed table. Nothing is trained.

The levels are what a standard normal has for means in B cells of equal probability, the outer ones cut at `cut`
deviations; a number goes to the nearest level and not to the cell that it lies in (`encode_plainly`). In float32 that
rule is monotone in the number, so there is for every level the least float32 that goes to it or above. These *edges*
are found once, by bisection on the rule itself; counting the edges that are not above a number is then the same rule,
to the last bit, without a distance to every level. On a CPU they are counted by a look at a table of small cells, no
one of which has two edges in it (`Lookup`), elsewhere by `torch.bucketize`.

Shapes: B levels, C channels, K cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from imgtok.config import PositiveFloat, Range, check

MOST_LEVELS = 4096


@dataclass(frozen=True, kw_only=True)
class NormalConfig:
    """How numbers are rounded; the defaults are those of the published TokenBridge."""

    levels: Annotated[int, Range(2, MOST_LEVELS)] = 64
    """Values that a number may take: the words of the vocabulary."""
    range: tuple[float, float] = (-5.0, 5.0)
    """Scaled latents between these are brought to +-`cut`; what lies beyond is clamped."""
    cut: PositiveFloat = 3.0
    """Deviations of the normal at which the outermost cells end."""
    spacing: Literal["normal", "uniform"] = "normal"
    """`normal`: means of cells of equal probability, as published. `uniform`: equal steps from end to end of `range`,
    to compare with."""
    means: tuple[float, ...] = ()
    """What is subtracted from each channel before; empty for nothing, as published."""
    deviations: tuple[PositiveFloat, ...] = ()
    """What each channel is divided by before; empty for 1, as published."""

    def __post_init__(self) -> None:
        check(self)
        low, high = self.range
        if low >= high:
            raise ValueError(f"range: {list(self.range)} must be [lower, upper]")
        if len(self.means) != len(self.deviations):
            raise ValueError(
                f"means: {len(self.means)} numbers for {len(self.deviations)} in deviations; give one of each for "
                "every channel, or leave both out"
            )
        if self.spacing == "normal" and 1 / self.levels <= outside(self.cut):
            most = int(1 / outside(self.cut) - 1e-9)
            raise ValueError(
                f"levels: {self.levels} cells of equal probability do not fit into +-cut = {self.cut} deviations: the "
                f"outermost would lie beyond it and be empty; at most {most} levels, a larger cut, or spacing: uniform"
            )

    @property
    def channels(self) -> int | None:
        """Channels that have numbers of their own; None where all are treated alike."""
        return len(self.means) or None


def check_channels(order: Sequence[int], quantizer: NormalConfig, channels: int) -> None:
    """Raise ValueError unless an order of channels (empty for their own) and what the quantizer has for each are of so
    many channels.
    """
    if order and sorted(order) != list(range(channels)):
        raise ValueError(
            f"channel_order: {list(order)} must have each of the channels 0 to {channels - 1} once; leave it out for "
            "their own order"
        )
    if quantizer.channels not in (None, channels):
        raise ValueError(f"quantizer.means: {quantizer.channels} numbers for {channels} channels of the latents")


def outside(cut: float) -> float:
    """The share of a standard normal below -cut."""
    return 0.5 * math.erfc(cut / math.sqrt(2))


def normal_boundaries(levels: int, cut: float) -> Tensor:
    """The ends of the cells (B + 1,), float64: quantiles of the standard normal, cut at both sides."""
    shares = torch.arange(levels + 1, dtype=torch.float64) / levels
    return torch.special.ndtri(shares).clamp(-cut, cut)


def normal_levels(levels: int, cut: float) -> Tensor:
    """The mean (B,), float64, of a standard normal that lies in each cell."""
    ends = normal_boundaries(levels, cut)
    density = torch.exp(-ends.square() / 2) / math.sqrt(2 * math.pi)
    return (density[:-1] - density[1:]) / torch.special.ndtr(ends).diff()


class NormalQuantizer(nn.Module):
    """Numbers (..., C at `channel_dim`, ...) <-> int64 ids of levels, of the same shape, <-> float32 values.

    Without statistics of channels in the configuration, any shape will do.
    """

    def __init__(self, config: NormalConfig) -> None:
        super().__init__()
        self.config = config
        self.num_levels = config.levels
        with torch.device("cpu"):  # tables are computed, on whatever device a model is built
            tables = Tables.of(config)
        self.lookup = tables.lookup
        for name in ("levels", "edges", "values", "mean", "deviation"):  # as bits, so that to(bfloat16) spares them
            self.register_buffer(f"{name}_bits", getattr(tables, name).view(torch.int32), persistent=False)

    @property
    def levels(self) -> Tensor:
        """(B,): on the scale of the normal."""
        return self._table("levels")

    @property
    def edges(self) -> Tensor:
        """(C or 1, B - 1): the least numbers that go to levels 1 to B - 1."""
        return self._table("edges")

    @property
    def values(self) -> Tensor:
        """(C or 1, B): what the levels stand for."""
        return self._table("values")

    @property
    def mean(self) -> Tensor:
        """(C or 1,): what is subtracted."""
        return self._table("mean")

    @property
    def deviation(self) -> Tensor:
        """(C or 1,): what is divided by after that."""
        return self._table("deviation")

    def _table(self, name: str) -> Tensor:
        bits: Tensor = getattr(self, f"{name}_bits")
        return bits.view(torch.float32)

    def encode_plainly(self, x: Tensor, channel_dim: int = 1) -> Tensor:
        """The definition: the nearest level by its distance; of two as near, the lower."""
        return _nearest(self.config, self.levels, self._centred(x.detach().float(), channel_dim))

    def encode(self, x: Tensor, channel_dim: int = 1) -> Tensor:
        """The same ids without distances. Raises ValueError for numbers that are not finite."""
        check_finite(x)
        return self.ids(x, channel_dim)

    def ids(self, x: Tensor, channel_dim: int = 1) -> Tensor:
        """`encode` of numbers that are known to be finite; nothing is read from the device."""
        x = self._checked(x, channel_dim)
        if self._may_look_up(x):
            assert self.lookup is not None
            return self.lookup.read(x, [self.lookup.levels], self._own(channel_dim))[0]
        return self._bucketize(x, channel_dim)

    def decode(self, ids: Tensor, channel_dim: int = 1) -> Tensor:
        """What ids stand for, float32. Raises ValueError for ids outside [0, levels), which an accelerator is not asked
        for.
        """
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = ids.aminmax()
            if low < 0 or high >= self.num_levels:
                raise ValueError(f"ids must lie in 0 to {self.num_levels - 1}, got {int(low)} to {int(high)}")
        table = self.values
        if self.config.channels:
            table = table.flatten()
            ids = ids + _along(torch.arange(len(self.values), device=ids.device) * self.num_levels, ids, channel_dim)
        return torch.index_select(table.flatten(), 0, ids.flatten()).view(ids.shape)

    def forward(self, x: Tensor, channel_dim: int = 1) -> tuple[Tensor, Tensor]:
        """(values, ids) of numbers that are known to be finite."""
        x = self._checked(x, channel_dim)
        if self._may_look_up(x):
            assert self.lookup is not None
            values, ids = self.lookup.read(x, [self.lookup.values, self.lookup.levels], self._own(channel_dim))
            return values, ids
        ids = self._bucketize(x, channel_dim)
        return self.decode(ids, channel_dim), ids

    def beyond(self, x: Tensor, channel_dim: int = 1) -> Tensor:
        """Which numbers lie beyond the outermost level, that is come back smaller than they are: a boolean tensor."""
        lowest, highest = (
            _along(end, x, channel_dim) if self.config.channels else end for end in self.values[:, [0, -1]].unbind(1)
        )
        return (x < lowest) | (x > highest)

    def _may_look_up(self, x: Tensor) -> bool:
        return x.device.type == "cpu" and self.lookup is not None and not torch.compiler.is_compiling()

    def _own(self, channel_dim: int) -> int | None:
        """The dimension of channels that have tables of their own, if they have."""
        return channel_dim if self.config.channels else None

    def _checked(self, x: Tensor, channel_dim: int) -> Tensor:
        channels = self.config.channels
        if channels and (x.ndim == 0 or x.shape[channel_dim] != channels):
            raise ValueError(
                f"latents {tuple(x.shape)} must have {channels} channels in dimension {channel_dim}: as many as the "
                "quantizer has means"
            )
        return x.detach().float()  # nothing of this has a gradient

    def _centred(self, x: Tensor, channel_dim: int) -> Tensor:
        if not self.config.channels:
            return x
        x = self._checked(x, channel_dim)
        return (x - _along(self.mean, x, channel_dim)) / _along(self.deviation, x, channel_dim)

    def _bucketize(self, x: Tensor, channel_dim: int) -> Tensor:
        if not self.config.channels:
            return torch.bucketize(x, self.edges[0], right=True)
        by_channel = x.movedim(channel_dim, 0)
        ids = torch.searchsorted(self.edges, by_channel.flatten(1).contiguous(), right=True)
        return ids.view(by_channel.shape).movedim(0, channel_dim)


def check_finite(x: Tensor, name: str = "latents") -> None:
    """Raises ValueError for numbers that are not finite, which no level stands for; `name` is where they were given."""
    if x.numel() == 0:
        return
    low, high = x.detach().aminmax()  # both are NaN where any number is
    if not math.isfinite(low) or not math.isfinite(high):
        finite = x.isfinite()
        raise ValueError(
            f"{name} {tuple(x.shape)}: {int((~finite).sum())} numbers are not finite ({int(x.isnan().sum())} NaN), "
            f"such as number {int((~finite).flatten().int().argmax())}; the autoencoder or its input is broken"
        )


# ---------------------------------------------------------------- the rule, and its tables


def _nearest(config: NormalConfig, levels: Tensor, x: Tensor) -> Tensor:
    """Ids of centred numbers (N, ...), float32, in the order of operations of the published code."""
    low, high = config.range
    y = ((x - low) / (high - low) * (2 * config.cut) - config.cut).clamp(-config.cut, config.cut)
    return (y[..., None] - levels).abs().argmin(dim=-1)


@dataclass(frozen=True)
class Tables:
    """What a configuration comes to."""

    levels: Tensor
    edges: Tensor
    values: Tensor
    mean: Tensor
    deviation: Tensor
    lookup: Lookup | None

    @classmethod
    def of(cls, config: NormalConfig) -> Tables:
        cut, (low, high) = config.cut, config.range
        if config.spacing == "normal":
            exact = normal_levels(config.levels, cut)
        else:
            exact = torch.linspace(-cut, cut, config.levels, dtype=torch.float64)
        mean, deviation = (
            torch.tensor(given or (other,), dtype=torch.float64)
            for given, other in ((config.means, 0.0), (config.deviations, 1.0))
        )
        scaled = (exact + cut) / (2 * cut) * (high - low) + low
        values = scaled * deviation[:, None] + mean[:, None]
        levels, mean, deviation = exact.float(), mean.float(), deviation.float()

        def ids(x: Tensor) -> Tensor:
            """Ids of numbers (C or 1, N)."""
            centred = (x - mean[:, None]) / deviation[:, None] if config.channels else x
            return torch.cat([_nearest(config, levels, part) for part in centred.split(256, dim=1)], dim=1)

        edges = least_numbers(ids, values)
        return cls(levels, edges, values.float(), mean, deviation, Lookup.of(edges, values.float()))


def least_numbers(ids: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """The least float32 (C, B - 1) that `ids`, monotone in each row, puts at level i + 1 or above, by bisection between
    the `values` (C, B) of neighbouring levels.

    Raises ValueError where a level is no float32's.
    """
    wanted = torch.arange(1, values.shape[1]).expand(len(values), -1)
    below, above = _to_order(values[:, :-1].float()), _to_order(values[:, 1:].float())
    if bool((ids(_from_order(below)) >= wanted).any()) or bool((ids(_from_order(above)) < wanted).any()):
        raise ValueError("levels: two of them lie too close for float32; take fewer levels or a narrower range")
    while bool((above - below > 1).any()):
        middle = below + (above - below) // 2
        reached = ids(_from_order(middle)) >= wanted
        above, below = torch.where(reached, middle, above), torch.where(reached, below, middle)
    return _from_order(above)


def _to_order(x: Tensor) -> Tensor:
    """Whole numbers, int64, that are in the order of the float32 numbers and leave none of them out."""
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _from_order(order: Tensor) -> Tensor:
    bits = torch.where(order < 0, -order - (1 << 31), order)
    return bits.to(torch.int32).view(torch.float32)


def _along(values: Tensor, x: Tensor, dim: int) -> Tensor:
    """(C,) in the shape that broadcasts along a dimension of x."""
    shape = [1] * x.ndim
    shape[dim] = -1
    return values.view(shape)


# ---------------------------------------------------------------- counting edges on a CPU

CHUNK = 1 << 16
"""Numbers that are quantized at once, so that all steps of them find their operands in the cache of a core."""
MOST_CELLS = 1 << 20
APART = 336
"""Numbers between the beginnings of two scratch tensors, beyond whole pages: a processor takes a read for one of what
it has just written where both are at the same place of a page, and waits."""


@dataclass(frozen=True)
class Lookup:
    """Cells, in each of which there is one edge or none; those of all channels in a row.

    A number's cell is what its float32 begins with: its sign, its exponent and some bits of its mantissa. So cells are
    narrow where numbers are small, no rounding blurs them, and taking the cell costs a shift. Cell and comparison with
    the edge in it together tell the level.
    """

    bits: int
    """Those of a number that tell its cell; K = 2^bits cells."""
    shift: Tensor
    """(): the others, int32; as a tensor, by which shifting is faster."""
    edges: Tensor
    """(C K,): the edge in each cell; infinity where there is none."""
    levels: Tensor
    """(2 C K,) int64: for each cell the level of the numbers below its edge, and of those from it on."""
    values: Tensor
    """(2 C K,) float32: what that level stands for."""

    @classmethod
    def of(cls, edges: Tensor, values: Tensor) -> Lookup | None:
        """The cells for edges (C, B - 1) and values (C, B); None where there would be too many."""
        edges = edges + 0.0  # there is a zero below zero, in another cell; no edge may lie between the two
        for bits in range(9, 32):
            if len(edges) << bits > MOST_CELLS:
                return None
            cells = edges.view(torch.int32) >> (32 - bits)
            if bool((cells[:, 1:] != cells[:, :-1]).all()):
                break
        first = (torch.arange(1 << bits) << (32 - bits)).to(torch.int32)
        ends = torch.stack([first, first + ((1 << (32 - bits)) - 1)]).view(torch.float32)
        ends = ends.nan_to_num(0.0).sort(dim=0).values[:, None].expand(-1, len(edges), -1)
        below, above = (torch.searchsorted(edges, end.contiguous(), right=True) for end in ends)
        own = torch.cat([edges, torch.full_like(edges[:, :1], torch.inf)], dim=1).gather(1, below)
        levels = torch.stack([below, above], dim=-1)
        found = values.gather(1, levels.flatten(1))
        shift = torch.tensor(32 - bits, dtype=torch.int32)
        return cls(bits, shift, torch.where(above > below, own, torch.inf).flatten(), levels.flatten(), found.flatten())

    def read(self, x: Tensor, tables: Sequence[Tensor], channel_dim: int | None) -> list[Tensor]:
        """What tables (2 C K,), such as `levels`, have in the rows of finite numbers: tensors of the shape of x.

        `channel_dim` is given for numbers whose channels have edges of their own.
        """
        if channel_dim is None:
            found = self._read(x.reshape(1, -1), tables)
            return [part.view(x.shape) for part in found]
        by_channel = x.movedim(channel_dim, 0)
        found = self._read(by_channel.reshape(len(by_channel), -1), tables)
        return [part.view(by_channel.shape).movedim(0, channel_dim) for part in found]

    def _read(self, x: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
        """`read` for x (C, N). Scratch memory is taken once: the system charges more for new memory than this costs."""
        out = [torch.empty(x.shape, dtype=table.dtype) for table in tables]
        size = min(CHUNK, x.shape[1])
        scratch = torch.empty(3 * (size + APART))
        edge, cell, row = (scratch[start : start + size] for start in range(0, len(scratch), size + APART))
        cell, row = cell.view(torch.int32), row.view(torch.int32)
        for channel in range(len(x)):
            for part, *targets in zip(*(whole[channel].split(CHUNK) for whole in (x, *out)), strict=True):
                count = len(part)
                here = (edge, cell, row) if count == size else (edge[:count], cell[:count], row[:count])
                self._rows(part, channel, *here)
                for table, target in zip(tables, targets, strict=True):
                    torch.index_select(table, 0, here[-1], out=target)
        return out

    def _rows(self, x: Tensor, channel: int, edge: Tensor, cell: Tensor, row: Tensor) -> None:
        """The rows of x (N,), into `row`; all of (N,), the others are scratch."""
        torch.bitwise_right_shift(x.view(torch.int32), self.shift, out=cell)
        cell.bitwise_and_((1 << self.bits) - 1)  # of negative numbers the sign came along
        if channel:
            cell.add_(channel << self.bits)
        torch.index_select(self.edges, 0, cell, out=edge)
        torch.ge(x, edge, out=row).add_(cell, alpha=2)
