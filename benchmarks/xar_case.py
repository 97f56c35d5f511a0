"""What can be timed of xAR; both processes read it, so it imports nothing but what both have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_case import Recipe

ENTITIES, TOKENS = 4, 64
"""Cells of an image, and tokens of a cell: the only ones the published code has."""
RECIPE = Recipe(betas=(0.9, 0.96), clip=1.0)


@dataclass(frozen=True)
class Case:
    """One thing to time: `sample` latents by stochastic Euler, `steps` calls for each cell, or one step of `train`."""

    what: Literal["sample", "train"]
    batch: int
    steps: int = 6
    guidance: float = 2.7
