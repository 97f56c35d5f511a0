"""What can be timed of xAR; both processes read it, so it imports nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHANNELS, GRID, CLASSES = 16, 16, 1000
ENTITIES, TOKENS = 4, 64
"""Cells of an image, and tokens of a cell: the only ones the published code has."""
RATE, BETAS, DECAY, CLIP, EMA_DECAY = 4e-4, (0.9, 0.96), 0.02, 1.0, 0.9999
"""The published training recipe."""


@dataclass(frozen=True)
class Case:
    """One thing to time: `sample` latents by stochastic Euler, `steps` calls for each cell, or one step of `train`."""

    what: Literal["sample", "train"]
    batch: int
    steps: int = 6
    guidance: float = 2.7


def own_size(size: str) -> tuple[int, int] | None:
    """(width, blocks of a stack) of a size such as 128x2; None for B, L and H. Raises ValueError for anything else."""
    if size in ("B", "L", "H"):
        return None
    width, depth = size.split("x")
    return int(width), int(depth)
