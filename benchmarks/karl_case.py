"""What can be timed of KARL; both processes read it, so it imports nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGE_SIZE, BUDGET, TOLERANCE = 256, 256, 0.05
"""The published call's."""
SIZES = {"tiny": (512, 8, 8), "small": (1024, 8, 8), "base": (768, 12, 12), "semilarge": (1024, 16, 16)}
"""Width, depth and heads of encoder and decoder alike."""
VARIANTS = ("vqgan", "vqgan-continuous", "vae", "vae-quantized")


@dataclass(frozen=True)
class Case:
    """One thing to time: `tokens` alone, or tokens and the image that is decoded from them, `both`.

    The published call always does both, for one image at a time; a batch is as many calls of it.
    """

    what: Literal["tokens", "both"]
    batch: int
    kept: int | None = None
    """Tokens that each image keeps of its budget, by another threshold; None for what the model says."""


def parse_size(size: str) -> tuple[str, Literal["vqgan", "vae"], bool]:
    """Name of the size, autoencoder and whether tokens are quantized, of one such as small/vqgan.

    Raises ValueError for anything else.
    """
    name, _, variant = size.partition("/")
    if name not in SIZES or variant not in VARIANTS:
        raise ValueError(size)
    return name, "vqgan" if variant.startswith("vqgan") else "vae", variant in ("vqgan", "vae-quantized")
