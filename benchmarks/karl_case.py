"""What can be timed of KARL; both processes read it, so it imports nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BUDGET, TOLERANCE = 256, 0.05
"""The published call's."""
SIZES = {"tiny": (512, 8, 8), "small": (1024, 8, 8), "base": (768, 12, 12), "semilarge": (1024, 16, 16)}
"""Width, depth and heads of encoder and decoder alike."""
SLOTS, WEIGHT = 128, 0.2
"""For the training step: slots of its first run, and the weight of the adversarial term, as in epochs 21 to 100."""
RATE, BETAS, DECAY, CLIP, EMA_DECAY = 5.625e-5, (0.9, 0.95), 0.05, 3.0, 0.9999
"""The published recipe of stage 2."""
JUDGES = "gan_losses."
"""Where the published model has its discriminators, and a copy of LPIPS for each."""
JUDGE = f"{JUDGES}{SLOTS // 32 - 1}."
"""The one of them that judges steps with so many slots."""
VARIANTS = ("vqgan", "vqgan-continuous", "vae", "vae-quantized")


@dataclass(frozen=True)
class Case:
    """One thing to time: `tokens` alone, tokens and the image that is decoded from them, `both`, or a training step of
    stage 2.

    The published call always does both, for one image at a time; a batch is as many calls of it.
    """

    what: Literal["tokens", "both", "train"]
    batch: int
    kept: int | None = None
    """Tokens that each image keeps of its budget, by another threshold; None for what the model says."""


def training(size: str) -> bool:
    """Whether a size such as tiny/vqgan/train is that of a model in stage 2, with its judges."""
    return size.endswith("/train")


def levels(size: str) -> tuple[int, ...]:
    """Widths of the VQGAN in units of 128. A step of stage 2 takes half a minute with the published ones, so that it is
    timed with one level fewer, and images half as large: the grid, and all that is done to tokens, are the same.
    """
    return (1, 1, 2, 4) if training(size) else (1, 1, 2, 2, 4)


def patch_size(size: str) -> int:
    """Pixels a side of a cell; there are always 16 x 16."""
    return 2 ** (len(levels(size)) - 1)


def image_size(size: str) -> int:
    """Pixels a side of an image."""
    return 16 * patch_size(size)


def parse_size(size: str) -> tuple[str, Literal["vqgan", "vae"], bool]:
    """Name of the size, autoencoder and whether tokens are quantized, of one such as small/vqgan
    or tiny/vqgan/train.

    Raises ValueError for anything else.
    """
    name, _, variant = size.removesuffix("/train").partition("/")
    if name not in SIZES or variant not in VARIANTS:
        raise ValueError(size)
    return name, "vqgan" if variant.startswith("vqgan") else "vae", variant in ("vqgan", "vae-quantized")
