"""What the benchmarks of generators of latents share; all processes read it, so it imports nothing else."""

from __future__ import annotations

from dataclasses import dataclass

CHANNELS, GRID, CLASSES = 16, 16, 1000
"""KL-16's latent of 256 pixels, and ImageNet's classes."""


@dataclass(frozen=True)
class Recipe:
    """A published training recipe."""

    betas: tuple[float, float]
    clip: float
    rate: float = 4e-4
    decay: float = 0.02
    ema: float = 0.9999


def own_size(size: str) -> tuple[int, int] | None:
    """(width, blocks of a stack) of a size such as 128x2; None for B, L and H. Raises ValueError for anything else."""
    if size in ("B", "L", "H"):
        return None
    width, depth = size.split("x")
    return int(width), int(depth)
