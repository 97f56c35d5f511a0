"""Positions: FlexTok's fixed 2D sine-cosine table, the flow models' time features, rotary tables.

Each table is a plain function of its sizes: nothing is learned here and nothing is random.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sincos_2d(width: int, rows: int, columns: int) -> Tensor:
    """FlexTok's fixed position table, (rows, columns, width), float32; `width` divides by 4.

    The published table runs over x slowly and y fast and is then *reshaped* as if row-major, so
    on a square grid the first half of the channels holds the row. Only square
    tables are well behaved, and only they are released; a smaller grid is its top-left corner.
    """
    if width % 4:
        raise ValueError(f"width {width} must be a multiple of 4 for a two-dimensional sine-cosine table")
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    x = torch.arange(columns, dtype=torch.float64).repeat_interleave(rows)[:, None] * omega
    y = torch.arange(rows, dtype=torch.float64).repeat(columns)[:, None] * omega
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).float().reshape(rows, columns, width)


def time_features(t_B: Tensor, width: int = 256, *, max_period: float = 256.0, scale: float = 1.0) -> Tensor:
    """[cos(t f), sin(t f)] with f_i = scale * max_period^(-i / (width / 2)); t (B,) -> (B, width)."""
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
    angles = t_B.float()[:, None] * (scale * torch.exp(-math.log(max_period) * exponents))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_1d(head_dim: int, length: int, prefix: int, base: float = 10000.0, *, zero_prefix: bool = True) -> Tensor:
    """Rotary table (prefix + length, head_dim / 2, 2) with [cos, sin] for `length` tokens after `prefix` condition
    slots, all counted in a row; with `zero_prefix` the rows of the slots are zeros, as in `rotary_2d`.
    """
    if head_dim % 2:
        raise ValueError(f"a head width of {head_dim} cannot be rotated: it must be even")
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(prefix + length, dtype=torch.float32)[:, None] * frequencies
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    if zero_prefix:
        table[:prefix] = 0
    return table


def rotary_2d(head_dim: int, side: int, prefix: int, base: float = 10000.0, *, zero_prefix: bool = True) -> Tensor:
    """LlamaGen's rotary table for a raster of side x side tokens after `prefix` condition slots.

    Returns (prefix + side * side, head_dim / 2, 2) with [cos, sin]; the first half of the pairs
    turns with the row, the second with the column. The prefix rows are **zeros**, not the
    identity: published weights were trained with queries and keys of the prefix set to nought. Without
    `zero_prefix` they are the identity: slots that are nowhere on the raster are not turned.
    """
    raster = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    table = rotary_of(raster.float(), head_dim, base)
    slots = table.new_zeros(prefix, head_dim // 2, 2)
    if not zero_prefix:
        slots[..., 0] = 1
    return torch.cat([slots, table])


def rotary_of(places_L2: Tensor, head_dim: int, base: float = 10000.0) -> Tensor:
    """Rotary table (L, head_dim / 2, 2) with [cos, sin] for tokens at (row, column): the first half of the pairs turns
    with the row, the second with the column.
    """
    if head_dim % 4:
        raise ValueError(f"a head width of {head_dim} cannot be rotated in two dimensions: it must be a multiple of 4")
    half = head_dim // 2
    frequencies = base ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)
    angles = (places_L2[:, :, None] * frequencies).flatten(1)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, table_LP2: Tensor) -> Tensor:
    """Turns adjacent channel pairs of x (..., L, E) by the table's angles, in float32.

    Pairs are multiplied as complex numbers, which is one pass over the memory; torch.compile knows no complex numbers,
    but makes one pass of the written-out form itself.
    """
    pairs, table = x.float().unflatten(-1, (-1, 2)), table_LP2.float()
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)


def at(x: Tensor, places: Tensor) -> Tensor:
    """The rows (R, K, W) of x (R, L, W) at places (R, K), each row of R at its own."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
