"""What comes of the measurements: the settings that fit, those that they are compared with, and how images fare.

Shapes: N images, C channels, h x w positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imgtok.quantizers.normal import NormalConfig
from imgtok.sample.calibrate.measuring import (
    Channel,
    Curve,
    Latents,
    Rounding,
    channels_of,
    curve_of,
    order_of,
    rounding_of,
)

RANGES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
"""What is compared where nothing is named, in shares of the range that is chosen."""
DRAWN = 1 << 18
"""Numbers that a diagram is drawn from."""


@dataclass(frozen=True)
class Wishes:
    """What the configuration asks for; see there."""

    levels: tuple[int, ...]
    range: float | None
    ranges: tuple[float, ...]
    cut: float
    per_channel: bool


@dataclass(frozen=True)
class Found:
    """What the latents are like, and the settings that follow from it."""

    images: int
    shape: tuple[int, int, int]
    """Channels, rows and columns of a latent."""
    factor: float
    """The scale of everything here."""
    deviation: float
    """Deviation of all scaled latents."""
    least: float
    largest: float
    channels: list[Channel]
    order: tuple[int, ...]
    curves: Mapping[int, Curve]
    """By number of levels."""
    chosen: NormalConfig
    by_levels: list[NormalConfig]
    by_range: list[NormalConfig]
    uniform: NormalConfig
    roundings: Mapping[NormalConfig, Rounding]
    sample: Tensor
    """Some of the scaled numbers, for a diagram."""

    @property
    def settings(self) -> list[NormalConfig | None]:
        """What is decoded; None stands for latents that are not rounded."""
        return [None, *self.roundings]

    @property
    def numbers(self) -> int:
        """Numbers of a latent."""
        channels, rows, columns = self.shape
        return channels * rows * columns


def measure(latents: Latents, factor: float, seed: int, wishes: Wishes) -> Found:
    """Everything that needs no decoder."""
    x = latents.sampled(seed) * factor
    channels = channels_of(x, latents.deviation * factor)
    statistics: dict[str, Any] = {}
    normal = x
    if wishes.per_channel:
        means, deviations = ([getattr(c, name) for c in channels] for name in ("mean", "deviation"))
        statistics = {"means": tuple(means), "deviations": tuple(max(d, 1e-6) for d in deviations)}
        mean, deviation = (torch.tensor(statistics[name])[:, None, None] for name in ("means", "deviations"))
        normal = (x - mean) / deviation
    levels = sorted({*wishes.levels})
    curves = {count: curve_of(normal, NormalConfig(levels=count, cut=wishes.cut)) for count in levels}
    reach = wishes.range or curves[levels[-1]].best
    chosen = NormalConfig(levels=levels[-1], range=(-reach, reach), cut=wishes.cut, **statistics)
    by_levels = [replace(chosen, levels=count) for count in levels]
    ranges = sorted({*wishes.ranges, reach} if wishes.ranges else {round(reach * part, 6) for part in RANGES})
    by_range = [replace(chosen, range=(-at, at)) for at in ranges]
    uniform = replace(chosen, spacing="uniform")
    settings = dict.fromkeys([*by_levels, *by_range, uniform])
    return Found(
        images=len(latents),
        shape=(x.shape[1], x.shape[2], x.shape[3]),
        factor=factor,
        deviation=float(x.std()),
        least=float(x.min()),
        largest=float(x.max()),
        channels=channels,
        order=order_of(channels),
        curves=curves,
        chosen=chosen,
        by_levels=by_levels,
        by_range=by_range,
        uniform=uniform,
        roundings={setting: rounding_of(x, setting) for setting in settings},
        sample=normal.flatten()[:: max(1, normal.numel() // DRAWN) | 1],
    )


@dataclass(frozen=True)
class Decoded:
    """What images lose."""

    scores: Mapping[NormalConfig | None, Mapping[str, float]]
    """By key, at each setting; None stands for latents that are not rounded."""
    pictures: Mapping[NormalConfig | None, Tensor]
    """uint8 images (P, 3, H, W) of the first few."""
    originals: Tensor
    """The same before anything."""
    names: tuple[str, ...]
    """What the scores are called with their protocol."""
