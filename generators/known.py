"""What is known of an image before it is drawn: a part of its latents, in or around which the rest is painted.

A generator of latents says by `keeps_known` that it can do so. What part of an image is kept is said by a word, by a
picture that is white there, or by a mask of pixels or of latent positions (`kept`); a position counts as known where
all of its pixels are kept.

Shapes: B images, C channels, G latent positions a side, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imgtok.pictures import preprocess


@dataclass(frozen=True)
class Known:
    """Latents of which a part is kept, to the bit.

    Raises ValueError for rows that know different numbers of positions.
    """

    latents: Tensor
    """(B, C, G, G), as an autoencoder encodes; only what is known counts, and comes back as it is here."""
    mask: Tensor
    """(G, G) or (B, G, G), boolean: True where the latent is known, at as many positions in every row."""

    def __post_init__(self) -> None:
        if self.mask.ndim != 3 or not len(self.mask):
            return
        counts = self.mask.flatten(1).sum(dim=1)
        low, high = int(counts.min()), int(counts.max())
        if low != high:
            raise ValueError(
                f"known.mask: {low} to {high} known positions; the images of one call must have as many: draw those "
                "with the same number by one call, the others by another"
            )

    def __len__(self) -> int:
        """B."""
        return len(self.latents)

    def __getitem__(self, rows: Sequence[int]) -> Known:
        """Some of the rows, in the given order."""
        chosen = list(rows)
        return Known(self.latents[chosen], self.mask if self.mask.ndim == 2 else self.mask[chosen])

    def spread(self, count: int, times: int = 1) -> Known:
        """A row for each of `count` images, `times` of which follow one another for each class or prompt.

        Raises ValueError unless there is one for all, one for each class or prompt, or one for each image.
        """
        repeats = {1: count, count: 1, count // times: times}
        if len(self) not in repeats:
            each = f", {count // times} (one for each class or prompt)" if times > 1 else ""
            raise ValueError(f"known: {len(self)} pictures for {count} images; give 1 for all of them{each} or {count}")
        return self[[row // repeats[len(self)] for row in range(count)]]


PARTS = ("left", "right", "top", "bottom", "center", "border")
"""What can be kept by name: a half, the middle half of rows and columns, or all around that."""
WAYS = f"{', '.join(PARTS)}, or an image file that is white where the picture is kept"


def kept(keep: Any, grid: int, size: int) -> Tensor:
    """Where a latent is known, (G, G) or (B, G, G), boolean.

    `keep` is one of `PARTS`; or one or a list of pictures that are white where an image is kept, as `imgtok.preprocess`
    takes and crops them; or a boolean mask of positions (G, G) or pixels (S, S), or one for each image. Raises
    ValueError for anything else, and where no position is known.
    """
    if isinstance(keep, str) and keep in PARTS:
        mask = part(keep, grid)
    elif isinstance(keep, str) and not Path(keep).expanduser().exists():
        raise ValueError(f"keep: given {keep!r}, must be {WAYS}; there is no file of that name")
    else:
        mask = positions(_as_mask(keep, size), grid, size)
    if not mask.flatten(-2).any(dim=-1).all():
        cell = size // grid
        raise ValueError(
            f"keep: no latent position is kept whole, and each is {cell} x {cell} pixels; keep a larger part"
        )
    return mask


def part(name: str, grid: int) -> Tensor:
    """One of `PARTS`, (G, G)."""
    place = torch.arange(grid)
    inner = (place >= grid // 4) & (place < grid - grid // 4)
    halves = {
        "left": (place < grid // 2).expand(grid, -1),
        "right": (place >= grid - grid // 2).expand(grid, -1),
        "center": inner[:, None] & inner,
    }
    halves |= {"top": halves["left"].T, "bottom": halves["right"].T, "border": ~halves["center"]}
    return halves[name].clone()


def _as_mask(keep: Any, size: int) -> Tensor:
    """A mask that was given as one, or what is white in pictures, (S, S) or (B, S, S)."""
    if isinstance(keep, np.ndarray) and keep.dtype == np.bool_:
        keep = torch.from_numpy(keep)
    if isinstance(keep, Tensor):
        if keep.dtype != torch.bool:
            raise ValueError(f"keep: a mask must be boolean, True where the picture is kept, not {keep.dtype}")
        return keep.cpu()
    white = preprocess(keep, size).mean(dim=1) > 0
    return white[0] if len(white) == 1 else white


def positions(mask: Tensor, grid: int, size: int) -> Tensor:
    """The latent positions (.., G, G) all of whose pixels are in a mask (.., S, S); of a mask of positions, itself."""
    side = tuple(mask.shape[-2:])
    if mask.ndim not in (2, 3) or side not in ((grid, grid), (size, size)):
        raise ValueError(
            f"keep: a mask {tuple(mask.shape)} must be ({grid}, {grid}) of latent positions or ({size}, {size}) of "
            "pixels, or one of these for each image"
        )
    if side == (grid, grid):
        return mask
    cell = size // grid
    return mask.unflatten(-2, (grid, cell)).unflatten(-1, (grid, cell)).all(dim=-1).all(dim=-2)


def shown(images: Tensor, mask: Tensor) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1], grey where they are not known."""
    cell = images.shape[-1] // mask.shape[-1]
    pixels = mask.repeat_interleave(cell, dim=-1).repeat_interleave(cell, dim=-2)
    return images.where(pixels if mask.ndim == 2 else pixels[:, None], 0)
