"""Draws scenes of `imgtok.shapes.world` from signed distances: anti-aliased, at any resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from imgtok.shapes.world import BOUNDS, HELD, SHAPES, SIZES, TEXTURES, Scene, SceneTable

BACKGROUND = (0.92, 0.92, 0.92)
PALETTE = (
    (0.86, 0.13, 0.13),
    (0.10, 0.60, 0.20),
    (0.12, 0.30, 0.85),
    (0.95, 0.85, 0.10),
    (0.96, 0.52, 0.08),
    (0.52, 0.16, 0.66),
    (0.10, 0.75, 0.80),
    (0.96, 0.45, 0.70),
)
DARK = 0.35  # a texture's second colour is this times the first


def render(scenes: Sequence[Scene] | SceneTable, size: int, *, device: torch.device | str | None = None) -> Tensor:
    """Draws scenes: (B, 3, size, size) float32 in [0, 1]. An image does not depend on the others of its batch.

    Outlines and texture edges are anti-aliased by their signed distances: coverage = clamp(1/2 - distance in pixels).
    """
    if size < 1:
        raise ValueError(f"size is {size}; give at least 1 pixel")
    table = scenes if isinstance(scenes, SceneTable) else SceneTable.stack(scenes)
    canvas = torch.empty(len(table), 3, size, size, device=device)
    canvas.copy_(torch.tensor(BACKGROUND, device=device).view(1, 3, 1, 1))
    present = np.arange(table.shape.shape[1]) < table.count[:, None]
    _draw(canvas, table, present, None)
    holds = present & (table.held > 0)
    if holds.any():
        _draw(canvas, _held(table), holds, np.array(PALETTE)[table.colour])
    return canvas


def _held(table: SceneTable) -> SceneTable:
    """What the objects of a table hold, in their places."""
    label = np.maximum(table.held - 1, 0)
    nothing = np.zeros_like(table.held)
    return replace(
        table,
        shape=label // len(PALETTE),
        colour=label % len(PALETTE),
        texture=nothing,
        size=nothing,
        radius=HELD * table.radius,
        held=nothing,
    )


def _draw(canvas: Tensor, table: SceneTable, present: np.ndarray, under: np.ndarray | None) -> None:
    """Adds the objects that are `present` (N, M) to the canvas, which shows `under` (N, M, 3) there, or background."""
    rows, columns = np.nonzero(present)
    # One kind at a time, so that each object is computed with its own formulas and, when there are many, in a window of
    # its own size. Pixel values do not depend on the window.
    kinds = table.shape * len(SIZES) + (table.size if len(rows) > _MANY else 0)
    textures = table.texture[rows, columns]
    chosen = kinds[rows, columns]
    order = np.lexsort((textures, chosen))
    starts = np.flatnonzero(np.diff(chosen[order], prepend=-1))
    for group in np.split(order, starts[1:]) if len(order) else []:
        _draw_group(canvas, table, rows[group], columns[group], under)


_MANY = 512  # objects in a batch from which splitting them by size pays
_CHUNK = 1 << 16  # pixels drawn at once: the intermediate tensors stay in the processor's cache


def _draw_group(
    canvas: Tensor, table: SceneTable, rows: np.ndarray, columns: np.ndarray, under: np.ndarray | None
) -> None:
    """Adds the objects (rows, columns), all of one shape and sorted by texture, to the canvas."""
    size = canvas.shape[-1]
    shape, textures = int(table.shape[rows[0], columns[0]]), table.texture[rows, columns]
    radius = table.radius[rows, columns] * size
    side = min(size, 2 * math.ceil(float(radius.max()) * BOUNDS[shape] + 1.0) + 1)
    centre = np.stack([table.x[rows, columns], table.y[rows, columns]]) * size
    origin = np.clip(np.floor(centre - (side - 1) / 2.0), 0, size - side).astype(np.int64)
    colours = np.array(PALETTE)[table.colour[rows, columns]]
    grounds = None if under is None else torch.as_tensor(under[rows, columns], dtype=torch.float32)
    step = max(1, _CHUNK // side**2)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        grid = _Grid.at(canvas, rows[part], origin[:, part], centre[:, part], radius[part], side)
        _draw_chunk(canvas, shape, textures[part], grid, colours[part], None if grounds is None else grounds[part])


class _Grid(NamedTuple):
    """Pixels of n square windows, W on a side."""

    u: Tensor
    """(n, 1, W) to the right of the object's centre, in radii."""
    v: Tensor
    """(n, W, 1) below it."""
    pixels: Tensor
    """(n, 1, 1) radius in pixels."""
    where: Tensor
    """(n * W * W,) each pixel's place in the flat canvas, red channel."""

    @classmethod
    def at(
        cls,
        canvas: Tensor,
        rows: np.ndarray,
        origin: np.ndarray,
        centre: np.ndarray,
        radius: np.ndarray,
        side: int,
    ) -> _Grid:
        device, size = canvas.device, canvas.shape[-1]
        pixels = torch.as_tensor(radius, dtype=torch.float32, device=device).view(-1, 1, 1)
        middle = torch.as_tensor(centre, dtype=torch.float32, device=device).unsqueeze(-1)
        corner = torch.as_tensor(origin, device=device).unsqueeze(-1)
        x, y = corner + torch.arange(side, device=device)
        # A pixel's centre is exact in float32, so the result is the same whatever the window's corner.
        u, v = x + 0.5 - middle[0], y + 0.5 - middle[1]
        row = torch.as_tensor(rows * 3 * size, device=device).view(-1, 1)
        where = ((row + y) * size).unsqueeze(2) + x.unsqueeze(1)
        return cls(u.unsqueeze(1) / pixels, v.unsqueeze(2) / pixels, pixels, where.view(-1))


def _draw_chunk(
    canvas: Tensor, shape: int, textures: np.ndarray, grid: _Grid, colours: np.ndarray, grounds: Tensor | None
) -> None:
    alpha = coverage(shape, grid.u, grid.v, grid.pixels)
    shade = alpha.clone()
    for texture in range(1, len(TEXTURES)):
        start, stop = np.searchsorted(textures, [texture, texture + 1])
        if start < stop:
            part = slice(int(start), int(stop))
            shade[part] *= texture_shade(texture, grid.u[part], grid.v[part], grid.pixels[part])
    colour = torch.as_tensor(colours, dtype=torch.float32, device=canvas.device)
    flat, channel_step = canvas.view(-1), canvas.shape[-1] ** 2
    for channel, background in enumerate(BACKGROUND):
        ground = background if grounds is None else grounds[:, channel].view(-1, 1, 1).to(canvas.device)
        # Objects do not overlap, so at most one of these differs from 0 at any pixel and the order cannot matter.
        change = shade * colour[:, channel].view(-1, 1, 1) - alpha * ground
        flat.index_add_(0, grid.where + channel * channel_step, change.view(-1))


def coverage(shape: int, u: Tensor, v: Tensor, pixels: Tensor | float) -> Tensor:
    """Share of each pixel inside the outline; (u, v) in units of the radius, `pixels` the radius in pixels."""
    return (0.5 - signed_distance(shape, u, v) * pixels).clamp_(0.0, 1.0)


def signed_distance(shape: int, u: Tensor, v: Tensor) -> Tensor:
    """Distance to the outline, negative inside, in units of the radius; u to the right, v down; shapes broadcast."""
    name = SHAPES[shape]
    if name == "square":
        return _box(u, v, 0.80, 0.80)
    if name == "cross":
        return torch.minimum(_box(u, v, 0.95, 0.33), _box(u, v, 0.33, 0.95))
    if name in _POLYGONS:
        return _polygon(u, v, _POLYGONS[name])
    distance = (u * u + v * v).sqrt()
    if name == "circle":
        return distance - 0.92
    if name == "ring":
        return (distance - 0.725).abs() - 0.225
    bite = (u - 0.42).square() + v * v
    return torch.maximum(distance - 0.95, 0.72 - bite.sqrt())


def _box(u: Tensor, v: Tensor, width: float, height: float) -> Tensor:
    across, down = u.abs() - width, v.abs() - height
    outside = (across.clamp(min=0.0).square() + down.clamp(min=0.0).square()).sqrt()
    return outside + torch.maximum(across, down).clamp(max=0.0)


def _corners(radii: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Corners at equal angles, the first at the top."""
    angles = [2.0 * math.pi * k / len(radii) for k in range(len(radii))]
    return tuple((r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(radii, angles, strict=True))


_POLYGONS = {
    "triangle": _corners([1.1] * 3),
    "diamond": ((0.0, -1.05), (0.72, 0.0), (0.0, 1.05), (-0.72, 0.0)),
    "star": _corners([1.1, 0.46] * 5),
}


def _polygon(u: Tensor, v: Tensor, corners: tuple[tuple[float, float], ...]) -> Tensor:
    """Signed distance to a polygon: nearest edge, sign by crossing number. Mirror images share the right half."""
    u = u.abs()
    nearest: Tensor | None = None
    inside: Tensor | None = None
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        if max(ax, bx) < 1e-9:
            continue  # the left half is the mirror image
        ex, ey = bx - ax, by - ay
        du, dv = u - ax, v - ay
        along = ((du * ex + dv * ey) / (ex * ex + ey * ey)).clamp_(0.0, 1.0)
        square = (du - along * ex).square_() + (dv - along * ey).square_()
        nearest = square if nearest is None else torch.minimum(nearest, square)
        if ey != 0.0:
            crosses = ((v >= ay) != (v >= by)) & (dv * (ex / ey) > du)
            inside = crosses if inside is None else inside ^ crosses
    assert nearest is not None
    assert inside is not None
    distance = nearest.sqrt_()
    return torch.where(inside, -distance, distance)


_STRIPE, _DOT, _CELL = 0.62, 0.19, 0.44


def texture_shade(texture: int, u: Tensor, v: Tensor, pixels: Tensor | float) -> Tensor | float:
    """Factor on the object's colour at each pixel, between DARK and 1; arguments as for `coverage`."""
    name = TEXTURES[texture]
    if name == "solid":
        return 1.0
    if name == "striped":
        dark = (0.5 - (_STRIPE / 4 - _to_multiple(v, _STRIPE)) * pixels).clamp_(0.0, 1.0)
    elif name == "dotted":
        distance = (_to_multiple(u, _STRIPE).square() + _to_multiple(v, _STRIPE).square()).sqrt()
        dark = (0.5 - (distance - _DOT) * pixels).clamp_(0.0, 1.0)
    else:
        across, down = (
            (0.5 - (_CELL / 2 - _to_multiple(w - _CELL / 2, 2 * _CELL)) * pixels).clamp_(0.0, 1.0) for w in (u, v)
        )
        dark = across + down - 2.0 * across * down
    return 1.0 - (1.0 - DARK) * dark


def _to_multiple(value: Tensor, period: float) -> Tensor:
    """Distance to the nearest multiple of the period."""
    return (value - period * (value / period).round()).abs()
