"""Images to sequences of patches and back, in (row, column, channel) order within a patch."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor


def patchify(x_BCHW: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, patch * patch * C), patches in row-major order.

    Raises ValueError if the height or width does not divide by `patch`.
    """
    height, width = x_BCHW.shape[-2:]
    if height % patch or width % patch:
        raise ValueError(f"a grid of {height} x {width} does not divide into patches of {patch} x {patch}")
    return rearrange(x_BCHW, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(x_BND: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """The inverse: (B, rows * columns, patch * patch * C) -> (B, C, H, W)."""
    return rearrange(x_BND, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=patch, q=patch)
