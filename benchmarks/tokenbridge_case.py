"""What can be timed of TokenBridge; both processes read it, so it imports nothing but what both have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_case import GRID, Recipe

POSITIONS = GRID**2
LEVELS, TEMPERATURE = 64, 0.96
"""Those of the published TokenBridge-L; guidance rises linearly, as published."""
RECIPE = Recipe(betas=(0.9, 0.95), clip=3.0)
LEAST_HIDDEN = 0.7
DROP = 0.1
"""The published share of labels that are dropped in training."""


@dataclass(frozen=True)
class Case:
    """One thing to time: `sample` latents in so many `iterations`, or one step of `train`."""

    what: Literal["sample", "train"]
    batch: int
    iterations: int = 8
    guidance: float = 3.1
    head_share: float = 1.0
    """In `train`, the share of the hidden positions that our head learns from. The published code has all."""
