"""What is measured: how the latents of images are distributed, how far rounding moves them, and what images lose by it.

Shapes: N images, C channels, h x w positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from imgtok import randomness
from imgtok.data.images import ImageSource
from imgtok.data.loaders import UnreadableImages, eval_loader
from imgtok.metrics.accumulate import Rows
from imgtok.metrics.scorers import ScoredBatch
from imgtok.pictures import to_uint8
from imgtok.quantizers.channels import low_frequency_shares
from imgtok.quantizers.normal import NormalConfig, NormalQuantizer, check_finite
from imgtok.runtime import Blocks
from imgtok.sizes import sides
from imgtok.tokenizers.base import Autoencoder

LOOKED_AT = 1 << 20
"""Numbers that the errors at all candidates for the range are measured on, evenly from all of them."""
STEPS = 48
"""Candidates for the range: quarters of the latents' unit, up to 12 of them."""


# ---------------------------------------------------------------- latents


@torch.no_grad()
def encode(
    vae: Autoencoder,
    source: ImageSource,
    places: Sequence[int],
    share: Sequence[int],
    *,
    blocks: Blocks,
    batch_size: int,
    unreadable: UnreadableImages,
    on_images: Callable[[int], None] = lambda count: None,
) -> Rows:
    """The moments of the images at `places` of the source whose numbers there are in `share`, a row (2 C h w) an image.
    Rows of others, and of images that cannot be read, stay empty.
    """
    cells = math.prod(side // vae.config.factor for side in sides(source.size))
    found = Rows(len(places), 2 * vae.config.latent_channels * cells, torch.float32)
    number = {places[index]: index for index in share}
    for batch in eval_loader(source, batch_size, indices=list(number), unreadable=unreadable):
        with blocks.computing():
            for rows in blocks.of(len(batch.images)):
                images = batch.images[blocks.padded(rows)].to(blocks.device)
                moments = vae.moments(images)[: len(rows)].float().flatten(1)
                found.update([number[batch.indices[row]] for row in rows], moments)
        on_images(len(batch.images))
    return found


@dataclass(frozen=True)
class Latents:
    """The latents of N images that could be read, not scaled."""

    places: tuple[int, ...]
    """In their source."""
    mean: Tensor
    """(N, C, h, w): of the distributions."""
    deviation: Tensor
    """(N, C, h, w): theirs; about 0 where an autoencoder gives no distribution."""

    @classmethod
    def of(cls, rows: Rows, places: Sequence[int], channels: int) -> Latents:
        """What `encode` found, of all processes together. Raises ValueError for numbers that are not finite."""
        there = rows.filled > 0
        moments = rows.scored
        check_finite(moments)
        grid = math.isqrt(moments.shape[1] // (2 * channels))
        mean, logvar = moments.unflatten(1, (2 * channels, grid, grid)).chunk(2, dim=1)
        kept = tuple(place for place, filled in zip(places, there.tolist(), strict=True) if filled)
        return cls(kept, mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0)))

    def __len__(self) -> int:
        return len(self.places)

    def sampled(self, seed: int) -> Tensor:
        """A sample of each distribution, (N, C, h, w), as training gets them."""
        noise = randomness.normal(seed, self.places, tuple(self.mean.shape[1:]), "posterior")
        return self.mean + self.deviation * noise


@dataclass(frozen=True)
class Channel:
    """One channel of scaled latents."""

    mean: float
    deviation: float
    least: float
    largest: float
    noise: float
    """Deviation of the distributions in it: how much of the channel is chance."""
    low_frequencies: float
    """Share of its energy in low frequencies (`imgtok.quantizers.channels`)."""


def channels_of(x: Tensor, noise: Tensor) -> list[Channel]:
    """What is known of each channel of scaled latents x (N, C, h, w), given their posteriors' deviations."""
    rows = x.transpose(0, 1).flatten(1).double()
    columns = (
        rows.mean(dim=1),
        rows.std(dim=1, unbiased=False),
        *rows.aminmax(dim=1),
        noise.transpose(0, 1).flatten(1).double().square().mean(dim=1).sqrt(),
        low_frequency_shares(x),
    )
    return [Channel(*numbers) for numbers in zip(*(column.tolist() for column in columns), strict=True)]


def order_of(channels: Sequence[Channel]) -> tuple[int, ...]:
    """The channels, those with the largest share of low frequencies first."""
    shares = np.array([channel.low_frequencies for channel in channels])
    return tuple(np.argsort(-shares, kind="stable").tolist())


# ---------------------------------------------------------------- rounding


def unit_of(deviation: float) -> float:
    """The power of two that is nearest to a deviation: what the range of such latents is counted in."""
    return 2.0 ** round(math.log2(max(deviation, 1e-30)))


@dataclass(frozen=True)
class Curve:
    """The error of rounding at each candidate for the range."""

    ranges: tuple[float, ...]
    errors: tuple[float, ...]
    """Mean squares, as shares of the latents' variance."""

    @property
    def best(self) -> float:
        """The range with the least error."""
        return min(zip(self.errors, self.ranges, strict=True))[1]


def curve_of(x: Tensor, base: NormalConfig) -> Curve:
    """The curve of numbers x, of any shape, rounded as `base` says but for its range and its statistics of channels."""
    numbers = x.flatten()
    numbers = numbers[:: max(1, len(numbers) // LOOKED_AT) | 1].contiguous()  # odd: of all positions of a map
    unit = unit_of(float(numbers.std()))
    quantizer = NormalQuantizer(replace(base, range=(-1.0, 1.0), means=(), deviations=()))
    ranges = [step * unit / 4 for step in range(4, STEPS + 1)]
    variance, errors = numbers.double().var().item(), []
    for reach in ranges:
        rounded = quantizer(numbers / reach)[0] * reach
        errors.append((rounded - numbers).double().square().mean().item() / variance)
    return Curve(tuple(ranges), tuple(errors))


@dataclass(frozen=True)
class Rounding:
    """What a quantizer does to latents."""

    reach: tuple[float, float]
    """What its outermost levels stand for, on the scale of the latents; of several channels the outermost of all."""
    beyond: tuple[float, ...]
    """The share of each channel's numbers beyond its outermost levels."""
    error: float
    """Mean square, as a share of the latents' variance."""
    bits: float
    """The entropy of an id, the mean over channels: what one costs when it is known how often each occurs."""


def rounding_of(x: Tensor, config: NormalConfig) -> Rounding:
    """What rounding does to scaled latents x (N, C, h, w)."""
    quantizer = NormalQuantizer(config)
    channels, variance = x.shape[1], x.double().var().item()
    low, high = quantizer.values[:, 0], quantizer.values[:, -1]
    beyond, squares = torch.zeros(channels), 0.0
    counts = torch.zeros(channels, config.levels, dtype=torch.int64)
    first = torch.arange(channels)[:, None, None] * config.levels
    for part in x.split(512):
        values, ids = quantizer(part)
        squares += (values - part).double().square().sum().item()
        outside = (part < low[:, None, None]) | (part > high[:, None, None])
        beyond += outside.sum(dim=(0, 2, 3))
        counts += torch.bincount((ids + first).flatten(), minlength=counts.numel()).view_as(counts)
    shares = counts.double() / counts.sum(dim=1, keepdim=True)
    bits = -torch.xlogy(shares, shares).sum(dim=1) / math.log(2)
    return Rounding(
        reach=(low.min().item(), high.max().item()),
        beyond=tuple((beyond / (x.numel() / channels)).tolist()),
        error=squares / x.numel() / variance,
        bits=bits.mean().item(),
    )


# ---------------------------------------------------------------- images


@torch.no_grad()
def decode(
    vae: Autoencoder,
    source: ImageSource,
    latents: Tensor,
    places: Sequence[int],
    share: Sequence[int],
    settings: Sequence[NormalConfig | None],
    *,
    seed: int,
    blocks: Blocks,
    batch_size: int,
) -> Iterator[dict[NormalConfig | None, ScoredBatch]]:
    """Batches of the images at `places` whose numbers there are in `share`, and by setting what is decoded of their
    scaled `latents` (N, C, h, w) after rounding: uint8 (B, 3, H, W) on the CPU. The setting None rounds nothing.
    """
    quantizers = {config: None if config is None else NormalQuantizer(config) for config in settings}
    number = {places[index]: index for index in share}
    for batch in eval_loader(source, batch_size, indices=list(number)):
        indices = [number[place] for place in batch.indices]
        parts: dict[NormalConfig | None, list[Tensor]] = {config: [] for config in settings}
        with blocks.computing():
            for rows in blocks.of(len(indices)):
                padded = blocks.padded(rows)
                x = latents[[indices[row] for row in padded]]
                noise_of = [batch.indices[row] for row in padded]
                for config, quantizer in quantizers.items():
                    rounded = x if quantizer is None else quantizer(x)[0]
                    images = vae.decode(rounded.to(blocks.device), seed=seed, indices=noise_of)
                    parts[config].append(to_uint8(images[: len(rows)]).cpu())
        originals = to_uint8(batch.images)
        yield {config: ScoredBatch(indices, torch.cat(part), originals=originals) for config, part in parts.items()}
