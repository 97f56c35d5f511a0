"""Reads images of `imgtok.shapes.world` back by analysis by synthesis: the renderer's own formulas are the only model.

Each connected patch of foreground is compared with every shape, texture, blur and colour over a search of centre and
radius; the least squared error decides, and its softmax gives the confidences. A patch that nothing explains is an
"unknown" object. No part is trained. Objects that touch are read as one, which is then usually unknown.

Blur hides texture first: at 32 pixels the dots and stripes of small objects are under two pixels apart. Set one
thread for speed: the tensors are small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok.shapes.captions import Facts, ObjectFacts, cell_of
from imgtok.shapes.render import PALETTE, coverage, texture_shade
from imgtok.shapes.world import COLOURS, RADII, SHAPES, SIZES, TEXTURES

_READ_SIZE = 64  # larger images are reduced to this
_NOISE_FLOOR = 0.035  # images with less noise are not smoothed
_FOREGROUND = 0.2  # least colour distance from the background
_LEAST_AREA = 0.0028  # of the canvas; smaller components are dropped
_UNKNOWN = 0.35  # share of a component's energy that the best hypothesis may leave unexplained
_INVERSE_TEMPERATURE = 1500.0
_MOST = 12  # components of an image that are read, largest first
_CHUNK = 32  # components fitted together

_GRID = 24  # samples across a patch
_REACH = 1.35  # half side of a patch in radii
_BLURS = (0.04, 0.08, 0.13, 0.19, 0.26, 0.35, 0.46)  # standard deviations in radii
_LADDER = tuple(0.62 * (1.32 / 0.62) ** (k / 15) for k in range(16))  # radius / half the component's extent
_REFINED = 3  # shapes per component that get the local search
_SMALLEST, _LARGEST = (
    0.088,
    0.30,
)  # radii that a fit may have, fractions of the canvas, the first times the scale
_ROUNDS = ((0.12, 0.03), (0.08, 0.02), (0.04, 0.01), (0.02, 0.005))  # steps of centre (radii) and radius (relative)
_PATCHES_SUFFICE = 48  # images of fewer pixels are compared with renders on their own pixels at the end
_POLISHING = ((0.04, 0.02), (0.02, 0.01))
_PIXEL_BLURS = (0.0, 0.45, 0.75, 1.05, 1.4, 1.8)  # standard deviations in pixels


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One object found in an image; lengths are fractions of the canvas side."""

    known: bool
    """False when no hypothesis explains the component: the names below are then the best of a bad lot."""
    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    area: float
    """Foreground area, fraction of the canvas."""
    unexplained: float
    """Squared error of the fit over the component's energy."""
    shapes: tuple[float, ...]
    """Probability of each of SHAPES."""
    colours: tuple[float, ...]
    """Probability of each of COLOURS."""
    textures: tuple[float, ...]
    """Probability of each of TEXTURES."""
    label: int
    """Class 8 * shape + colour."""
    label_probability: float
    """Probability of that class."""
    holding: tuple[Detection, ...] = ()
    """What is inside it, largest first, as `oracle_inside.read` finds it; `read` looks into no object."""


# ------------------------------------------------------------------------------------------------ reading


@torch.no_grad()
def read(images: Tensor, *, scale: float = 1.0) -> list[list[Detection]]:
    """Objects in each image, largest component first, at most 12. Works on the CPU.

    `images` is (B, 3, S, S) in [0, 1], as `render` gives it (for model output x pass (x + 1) / 2); S at least 16.
    `scale` is the profile's factor on the radii; it only decides the names of the sizes.
    """
    _check_images(images)
    found: list[list[Detection]] = [[] for _ in range(len(images))]
    for start in range(0, len(images), 128):
        parts = _find(images[start : start + 128].detach().cpu().float().clamp(0.0, 1.0))
        for image, detection in zip(parts.image.tolist(), _explained(parts, scale), strict=True):
            found[start + image].append(detection)
    return [sorted(detections, key=lambda d: -d.area) for detections in found]


def _explained(parts: _Parts, scale: float, solid: bool = False) -> list[Detection]:
    """What each component is, some of them at once; with `solid` only that texture is thought of."""
    chunks = [parts.rows(slice(first, first + _CHUNK)) for first in range(0, len(parts.image), _CHUNK)]
    return [detection for chunk in chunks for detection in _explain(chunk, scale, solid)]


class ClassReadings(NamedTuple):
    """What `class_readings` says of each of B images."""

    labels: Tensor
    """(B,) int64: class 8 * shape + colour of the largest object, -1 for none or unknown."""
    confidences: Tensor
    """(B,) float32: probability of that class, 0 where the label is -1."""
    counts: Tensor
    """(B,) int64: number of objects, unknown ones included."""


def class_readings(images: Tensor) -> ClassReadings:
    """The largest component of an image decides its class; `counts` says how many there were. Images as for `read`."""
    rows = [_class_of(detections) for detections in read(images)]
    labels, confidences, counts = zip(*rows, strict=True) if rows else ((), (), ())
    return ClassReadings(
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(confidences, dtype=torch.float32),
        torch.tensor(counts, dtype=torch.int64),
    )


def _class_of(detections: Sequence[Detection]) -> tuple[int, float, int]:
    if not detections or not detections[0].known:
        return -1, 0.0, len(detections)
    return detections[0].label, detections[0].label_probability, len(detections)


def read_classes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (B,) int64 and confidences (B,) of images that should show exactly one object; images as for `read`.

    The label is -1, with confidence 0, when the image shows no object, an unknown one, or more than one, however small
    the others are. `class_readings` is the lenient version: the largest object decides.
    """
    labels, confidences, counts = class_readings(images)
    single = counts == 1
    return torch.where(single, labels, -1), torch.where(single, confidences, 0.0)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.shape[2] < 16:
        raise ValueError(f"images have shape {tuple(images.shape)}; give (B, 3, S, S) with S at least 16")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; give floats in [0, 1]")
    if not images.numel():
        return
    low, high = images.aminmax()  # both are NaN where one value is
    if not (low.isfinite() and high.isfinite()):
        raise ValueError("images contain values that are not finite")
    if low < -0.5:
        raise ValueError(f"images reach down to {low:.2f}; give [0, 1], that is (x + 1) / 2 for x in [-1, 1]")


class _Parts(NamedTuple):
    """Components of foreground, n of them, as `_find` cuts them out."""

    image: Tensor
    """(n,) position of the image in its batch."""
    difference: Tensor
    """(n, 3, S, S) colour minus background around the component, 0 elsewhere."""
    background: Tensor
    """(n, 3)"""
    centre: Tensor
    """(n, 2) centroid x, y in pixels, (0, 0) being the top left corner of the top left pixel."""
    extent: Tensor
    """(n,) half the longer side of the bounding box, pixels."""
    area: Tensor
    """(n,) fraction of the canvas."""
    energy: Tensor
    """(n,) squared difference summed over the component, in units of the canvas area."""
    noise: Tensor
    """(n,) the part of that energy that is noise, which no hypothesis is asked to explain."""

    def rows(self, part: slice) -> _Parts:
        return _Parts(*(field[part] for field in self))


class _Seen(NamedTuple):
    """B images on their backgrounds, of S pixels a side."""

    images: Tensor
    """(B, 3, S, S)"""
    noise: Tensor
    """(B,) its standard deviation."""
    background: Tensor
    """(B, 3)"""
    difference: Tensor
    """(B, 3, S, S) smoothed images minus their backgrounds."""
    least: Tensor
    """(B,) the colour distance from which a pixel is foreground."""
    mask: Tensor
    """(B, S, S) foreground."""


def _find(images: Tensor) -> _Parts:
    """Separates foreground components from the background."""
    parts, _ = _cut(_look(images), _LEAST_AREA)
    return parts


def _look(images: Tensor) -> _Seen:
    images = _reduce(images)
    noise = _noise(images)
    smooth = _smooth(images, noise)
    background, spread = _background(smooth)
    difference = smooth - background[:, :, None, None]
    least = (3.0 * spread).clamp(min=_FOREGROUND)
    return _Seen(images, noise, background, difference, least, _distance(difference) > least[:, None, None])


def _distance(difference: Tensor) -> Tensor:
    """(n, 3, H, W) -> (n, H, W)"""
    return difference.square().sum(1).sqrt()


def _cut(seen: _Seen, least_area: float) -> tuple[_Parts, Tensor]:
    """The components of at least some share of the canvas, and the pixels (n, S, S) that belong to each."""
    images, noise, background, mask = seen.images, seen.noise, seen.background, seen.mask
    size = images.shape[-1]
    labels = _components(mask)[mask]
    names = labels[labels == mask.flatten().nonzero()[:, 0]]  # in rising order
    component = torch.searchsorted(names, labels)
    _, y, x = mask.nonzero(as_tuple=True)
    area = torch.bincount(component, minlength=len(names))
    keep = _largest(names // size**2, area, least_area * size**2)
    kept = torch.arange(len(keep), dtype=torch.int32)
    number = torch.full((len(names),), -1, dtype=torch.int32).index_put((keep,), kept)
    owner = torch.full(mask.shape, -1, dtype=torch.int32)
    owner[mask] = number[component]
    owner = _grow(owner, mask)
    centre, extent = _box(x, y, component, area)
    of = names[keep] // size**2
    own = owner[of] == kept.view(-1, 1, 1)
    # Smoothing is for finding components; squared error weighs white noise best as it is.
    shown = (images - background[:, :, None, None])[of].mul_(own.unsqueeze(1))
    energy = shown.square().sum((1, 2, 3)) / size**2
    noise_energy = 3.0 * noise[of] ** 2 * own.sum((1, 2)) / size**2
    parts = _Parts(of, shown, background[of], centre[keep], extent[keep], area[keep] / size**2, energy, noise_energy)
    return parts, own


def _reduce(images: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(images, _READ_SIZE) if images.shape[-1] > _READ_SIZE else images


def _smooth(images: Tensor, noise: Tensor) -> Tensor:
    """Gaussian smoothing of the noisy images, by as much as their noise asks for."""
    noisy = noise > _NOISE_FLOOR
    if not noisy.any():
        return images
    sigma = (0.6 + 6.0 * (noise[noisy] - _NOISE_FLOOR)).clamp(max=1.6).repeat_interleave(3)
    offsets = torch.arange(-4.0, 5.0)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)
    flat = F.pad(images[noisy].flatten(0, 1).unsqueeze(0), (4, 4, 4, 4), mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    return images.index_put((noisy,), flat.view_as(images[noisy]))


def _noise(images: Tensor) -> Tensor:
    """Robust standard deviation (B,) of the noise: the median leaves the objects' edges out."""
    middle = images[:, :, 1:-1, 1:-1]
    around = images[:, :, :-2, 1:-1] + images[:, :, 2:, 1:-1] + images[:, :, 1:-1, :-2] + images[:, :, 1:-1, 2:]
    residual = (middle - 0.25 * around).abs().flatten(1)
    rising = torch.from_numpy(np.sort(residual.numpy()))  # takes less than half as long as torch's median
    return rising[:, (rising.shape[1] - 1) // 2] / (0.6745 * math.sqrt(1.25))


def _background(images: Tensor) -> tuple[Tensor, Tensor]:
    """Median colour (B, 3) of the border, and the median distance (B,) of the border's pixels from it."""
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, 1:-1, 0], images[:, :, 1:-1, -1]], dim=2)
    colour = border.median(2).values
    return colour, (border - colour.unsqueeze(2)).square().sum(1).sqrt().median(1).values


def _components(mask: Tensor) -> Tensor:
    """Labels the 8-connected components of (B, H, W): each pixel gets its component's largest position in the batch.

    Pixels point to a larger one of their component, at first to themselves. Where the ends of two neighbours' paths
    differ, the smaller end is made to point to the larger one, until every path ends at its component's largest pixel.
    """
    there = mask.numpy()
    places = np.flatnonzero(there)
    numbers = np.zeros(there.size, np.int64)
    numbers[places] = np.arange(len(places))
    number = numbers.reshape(there.shape)
    right = there[:, :, :-1] & there[:, :, 1:]
    below = there[:, :-1] & there[:, 1:]
    # Neighbours across a corner that a pixel beside both joins need no pair of their own.
    falling = there[:, :-1, :-1] & there[:, 1:, 1:] & ~there[:, :-1, 1:] & ~there[:, 1:, :-1]
    rising = there[:, :-1, 1:] & there[:, 1:, :-1] & ~there[:, :-1, :-1] & ~there[:, 1:, 1:]
    first = [number[:, :, :-1][right], number[:, :-1][below], number[:, :-1, :-1][falling], number[:, :-1, 1:][rising]]
    second = [number[:, :, 1:][right], number[:, 1:][below], number[:, 1:, 1:][falling], number[:, 1:, :-1][rising]]
    small, large = np.concatenate(first), np.concatenate(second)
    points_to = np.arange(len(places))
    while len(small):
        np.maximum.at(points_to, small, large)
        while not np.array_equal(points_to, further := points_to[points_to]):
            points_to = further
        one, other = points_to[small], points_to[large]
        apart = one != other
        small, large = np.minimum(one, other)[apart], np.maximum(one, other)[apart]
    labels = np.zeros(there.size, np.int64)
    labels[places] = places[points_to]
    return torch.from_numpy(labels).view_as(mask)


def _largest(image: Tensor, area: Tensor, least: float) -> Tensor:
    """The components to read, grouped by image, largest first."""
    order = torch.argsort(area, descending=True, stable=True)
    order = order[torch.argsort(image[order], stable=True)]
    order = order[area[order] >= least]
    first = torch.searchsorted(image[order].contiguous(), image[order].contiguous())
    return order[torch.arange(len(order)) - first < _MOST]


def _grow(owner: Tensor, mask: Tensor) -> Tensor:
    """Gives the pixels around a component to it, as far as three pixels, never those of another component."""
    for _ in range(3):
        owner = torch.where(mask | (owner >= 0), owner, _largest_around(owner))
    return owner


def _largest_around(values: Tensor) -> Tensor:
    """The largest of each 3 x 3 neighbourhood of (B, H, W), rows and then columns."""
    across = values.clone()
    torch.maximum(across[:, :, 1:], values[:, :, :-1], out=across[:, :, 1:])
    torch.maximum(across[:, :, :-1], values[:, :, 1:], out=across[:, :, :-1])
    down = across.clone()
    torch.maximum(down[:, 1:], across[:, :-1], out=down[:, 1:])
    torch.maximum(down[:, :-1], across[:, 1:], out=down[:, :-1])
    return down


def _box(x: Tensor, y: Tensor, component: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid (n, 2) and half of the longer side (n,) of each component, from its pixels."""
    centre, side = [], []
    for place in (x, y):
        zero = torch.zeros(len(area), dtype=place.dtype)
        total = zero.index_add(0, component, place)
        high = zero.scatter_reduce(0, component, place, "amax", include_self=False)
        low = zero.scatter_reduce(0, component, place, "amin", include_self=False)
        centre.append(total / area + 0.5)
        side.append((high - low + 1) / 2.0)
    return torch.stack(centre, 1), torch.maximum(*side)


# ------------------------------------------------------------------------------------------------ fitting


class _Templates(NamedTuple):
    """One shape on the patch grid, at every blur, and the inner products of its pictures."""

    pictures: Tensor
    """((1 + textures) * blurs, 576): the outline, then the shaded outlines."""
    outline_outline: Tensor
    outline_shaded: Tensor
    shaded_shaded: Tensor


_SUPER = 8  # the templates are drawn this many times finer than the patch grid


@cache
def _templates(shape: int) -> _Templates:
    samples = 2 * _GRID * _SUPER  # twice the patch, so that blur sees beyond its edge
    step = 2.0 * _REACH / (_GRID * _SUPER)
    axis = (torch.arange(samples, dtype=torch.float64) - (samples - 1) / 2.0) * step
    u, v, pixels = axis.view(1, 1, -1), axis.view(1, -1, 1), torch.tensor(1.0 / step, dtype=torch.float64)
    alpha = coverage(shape, u, v, pixels)
    shades = [alpha * texture_shade(k, u, v, pixels) for k in range(len(TEXTURES))]
    pictures = torch.cat([alpha, *shades])
    points = (torch.arange(_GRID, dtype=torch.float64) - (_GRID - 1) / 2.0) * step * _SUPER
    blurred = []
    for sigma in _BLURS:
        weights = torch.exp(-0.5 * ((points[:, None] - axis[None, :]) / sigma) ** 2)
        weights = weights / weights.sum(1, keepdim=True)
        blurred.append(weights @ pictures @ weights.T)
    stack = torch.stack(blurred, 1).flatten(2)  # (1 + textures, blurs, points)
    outline, shaded = stack[0], stack[1:]
    return _Templates(
        stack.flatten(0, 1).float(),
        outline.square().sum(-1).float(),
        (outline * shaded).sum(-1).float(),
        shaded.square().sum(-1).float(),
    )


@cache
def _crescent_shift() -> float:
    """Where the crescent's centroid lies right of its centre, in radii: other shapes have theirs at the centre."""
    axis = torch.linspace(-1.2, 1.2, 481, dtype=torch.float64)
    alpha = coverage(SHAPES.index("crescent"), axis.view(1, 1, -1), axis.view(1, -1, 1), 200.0)
    return float((alpha * axis).sum() / alpha.sum())


def _sample(difference: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Patches (n, P, 3, 576) of (n, 3, S, S) at P poses each: centre (n, P, 2) and radius (n, P) in pixels."""
    n, poses = radius.shape
    axis = (torch.arange(_GRID) - (_GRID - 1) / 2.0) * (2.0 * _REACH / _GRID)
    x = centre[:, :, 0, None] + radius[:, :, None] * axis
    y = centre[:, :, 1, None] + radius[:, :, None] * axis
    shape = (n, poses, _GRID, _GRID)
    grid = torch.stack([x[:, :, None, :].expand(shape), y[:, :, :, None].expand(shape)], -1)
    grid = (grid * (2.0 / difference.shape[-1]) - 1.0).view(n, poses * _GRID, _GRID, 2)
    mode = "bicubic" if difference.shape[-1] < _PATCHES_SUFFICE else "bilinear"
    patches = F.grid_sample(difference, grid, mode=mode, padding_mode="zeros", align_corners=False)
    return patches.view(n, 3, poses, _GRID**2).transpose(1, 2)


def _errors(shape: int, patches: Tensor, parts: _Scalars, radius: Tensor) -> Tensor:
    """Squared error (n, P, textures, colours) of one shape, least over blur, in units of the canvas area.

    Outside its patch a hypothesis shows background, so it also pays for the foreground that it leaves out.
    """
    t = _templates(shape)
    blurs, textures = len(_BLURS), len(TEXTURES)
    palette = torch.tensor(PALETTE)
    products = patches @ t.pictures.T  # (n, P, 3, blurs + textures * blurs)
    background = parts.background
    with_outline = torch.einsum("npcb,nc->npb", products[..., :blurs], background)
    with_shaded = torch.einsum("npct,kc->npkt", products[..., blurs:], palette).unflatten(-1, (textures, blurs))
    fixed = background.square().sum(1)[:, None] * t.outline_outline
    cross = (background @ palette.T)[:, :, None, None] * t.outline_shaded
    own = palette.square().sum(1)[:, None, None] * t.shaded_shaded
    model = fixed[:, None, None, :] - 2.0 * cross + own  # (n, colours, textures, blurs)
    change = 2.0 * with_outline[:, :, None, None, :] - 2.0 * with_shaded + model[:, None]
    least = change.amin(-1).transpose(2, 3)
    cell = (2.0 * _REACH / _GRID * radius / parts.size) ** 2
    return parts.energy[:, None, None, None] + cell[:, :, None, None] * least


class _Scalars(NamedTuple):
    """What the errors of n rows need besides pixels."""

    background: Tensor
    """(n, 3)"""
    energy: Tensor
    """(n,)"""
    size: int
    """Side of the image in pixels."""
    low: float
    """Least radius in pixels."""
    high: float
    """Largest radius in pixels."""

    def rows(self, rows: Tensor) -> _Scalars:
        return self._replace(background=self.background[rows], energy=self.energy[rows])


def _explain(parts: _Parts, scale: float, solid: bool = False) -> list[Detection]:
    """Fits every component."""
    size = parts.difference.shape[-1]
    scalars = _Scalars(parts.background, parts.energy, size, _SMALLEST * scale * size, _LARGEST * size)
    table, centre, radius = _coarse(parts, scalars)
    if solid:
        table[:, :, 1:] = math.inf
    _refine(parts, scalars, table, centre, radius)
    if size < _PATCHES_SUFFICE and not solid:  # only textures need it
        _polish(parts, scalars, table, centre, radius)
    if solid:
        table[:, :, 1:] = math.inf
    n = len(table)
    best = table.flatten(1).argmin(1)
    shape, texture, colour = torch.unravel_index(best, table.shape[1:])
    least = table.flatten(1).amin(1)
    chance = torch.softmax(-_INVERSE_TEMPERATURE * table.flatten(1), 1).view_as(table)
    rows = torch.arange(n)
    columns = [shape, texture, colour, centre[rows, shape, 0] / size, centre[rows, shape, 1] / size]
    signal = (parts.energy - parts.noise).clamp(min=1e-6)
    unexplained = ((least - parts.noise) / signal).clamp(min=0.0)
    columns += [radius[rows, shape] / size, parts.area, unexplained, chance.sum(2)[rows, shape, colour]]
    marginals = [chance.sum((2, 3)).tolist(), chance.sum((1, 2)).tolist(), chance.sum((1, 3)).tolist()]
    return [
        _detection(row, [m[k] for m in marginals], scale)
        for k, row in enumerate(zip(*(c.tolist() for c in columns), strict=True))
    ]


def _detection(row: tuple, marginals: list[list[float]], scale: float) -> Detection:
    shape, texture, colour, x, y, radius, area, unexplained, probability = row
    return Detection(
        known=unexplained <= _UNKNOWN,
        shape=SHAPES[shape],
        colour=COLOURS[colour],
        texture=TEXTURES[texture],
        size=_size_name(radius, scale),
        x=x,
        y=y,
        radius=radius,
        area=area,
        unexplained=unexplained,
        shapes=tuple(marginals[0]),
        colours=tuple(marginals[1]),
        textures=tuple(marginals[2]),
        label=len(COLOURS) * shape + colour,
        label_probability=probability,
    )


def _size_name(radius: float, scale: float) -> str:
    return SIZES[min(range(len(SIZES)), key=lambda k: abs(math.log(radius / (RADII[k] * scale))))]


def _coarse(parts: _Parts, scalars: _Scalars) -> tuple[Tensor, Tensor, Tensor]:
    """Error (n, shapes, textures, colours) over a ladder of radii, and the best pose (n, shapes[, 2]) of each shape."""
    radius = (parts.extent[:, None] * torch.tensor(_LADDER)).clamp(scalars.low, scalars.high)
    middle = parts.centre[:, None].expand(-1, len(_LADDER), -1)
    shifted = middle - torch.stack([_crescent_shift() * radius, torch.zeros_like(radius)], -1)
    plain = _sample(parts.difference, middle, radius)
    moved = _sample(parts.difference, shifted, radius)
    tables, centres, radii = [], [], []
    rows = torch.arange(len(radius))
    for shape, name in enumerate(SHAPES):
        at_centroid = name != "crescent"
        errors = _errors(shape, plain if at_centroid else moved, scalars, radius)
        best = errors.flatten(2).amin(2).argmin(1)
        tables.append(errors.amin(1))
        centres.append((middle if at_centroid else shifted)[rows, best])
        radii.append(radius[rows, best])
    return torch.stack(tables, 1), torch.stack(centres, 1), torch.stack(radii, 1)


def _refine(parts: _Parts, scalars: _Scalars, table: Tensor, centre: Tensor, radius: Tensor) -> None:
    """Local search over the pose of each component's likeliest shapes; lowers `table`, moves the poses in place."""
    n = len(table)
    rows = torch.arange(n)[:, None]
    likely = table.flatten(2).amin(2).argsort(dim=1, stable=True)[:, :_REFINED]
    for step, factor in _ROUNDS:
        moves = torch.tensor(_moves(step, factor))
        r = radius[rows, likely][:, :, None]
        centres = centre[rows, likely][:, :, None] + r[..., None] * moves[:, :2]
        radii = (r * (1.0 + moves[:, 2])).clamp(scalars.low, scalars.high)
        patches = _sample(parts.difference, centres.flatten(1, 2), radii.flatten(1))
        patches = patches.unflatten(1, (_REFINED, len(moves)))
        for shape in range(len(SHAPES)):
            row, slot = (likely == shape).nonzero(as_tuple=True)
            if len(row):
                some = scalars.rows(row)
                errors = _errors(shape, patches[row, slot], some, radii[row, slot])
                best = errors.flatten(2).amin(2).argmin(1)
                centre[row, shape] = centres[row, slot, best]
                radius[row, shape] = radii[row, slot, best]
                table[row, shape] = torch.minimum(table[row, shape], errors.amin(1))


def _moves(step: float, factor: float) -> list[tuple[float, float, float]]:
    """Steps of a local search, staying put first: x and y in radii, radius relative."""
    places = ((0.0, 0.0), (step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step))
    return [*((x, y, 0.0) for x, y in places), (0.0, 0.0, factor), (0.0, 0.0, -factor)]


def _polish(parts: _Parts, scalars: _Scalars, table: Tensor, centre: Tensor, radius: Tensor) -> None:
    """Replaces the errors of the most likely shapes by those of renders on the image's own pixels, in place.

    A small image has too few pixels for its texture to survive resampling; a render shows the same aliasing.
    """
    rows = torch.arange(len(table))[:, None]
    likely = table.flatten(2).amin(2).argsort(dim=1, stable=True)[:, :_REFINED]
    table[rows, likely] = math.inf
    for shape in range(len(SHAPES)):
        row = (likely == shape).any(1).nonzero()[:, 0]
        if len(row):
            table[row, shape], centre[row, shape], radius[row, shape] = _polish_shape(
                shape, parts, scalars, row, centre[row, shape], radius[row, shape]
            )


def _polish_shape(
    shape: int, parts: _Parts, scalars: _Scalars, row: Tensor, centre: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Errors (n, textures, colours) and poses of one shape for the components `row`: finds the blur, then the pose."""
    blurs = len(_PIXEL_BLURS)
    each = torch.arange(blurs).repeat(len(row))
    again = torch.arange(len(row)).repeat_interleave(blurs)
    errors = _pixel_errors(shape, parts, scalars, row[again], centre[again, None], radius[again, None], each)
    errors = errors.view(len(row), blurs, len(TEXTURES), len(COLOURS))
    blur, least = errors.flatten(2).amin(2).argmin(1), errors.amin(1)
    number = torch.arange(len(row))
    for step, factor in _POLISHING:
        moves = torch.tensor(_moves(step, factor))
        centres = centre[:, None] + radius[:, None, None] * moves[:, :2]
        radii = (radius[:, None] * (1.0 + moves[:, 2])).clamp(scalars.low, scalars.high)
        errors = _pixel_errors(shape, parts, scalars, row, centres, radii, blur)
        best = errors.flatten(2).amin(2).argmin(1)
        centre, radius, least = centres[number, best], radii[number, best], torch.minimum(least, errors.amin(1))
    return least, centre, radius


def _pixel_errors(
    shape: int, parts: _Parts, scalars: _Scalars, row: Tensor, centre: Tensor, radius: Tensor, blur: Tensor
) -> Tensor:
    """`_errors` (n, P, textures, colours) for the components `row`, each at its own blur, on the image's pixels."""
    n, poses = radius.shape
    side = min(scalars.size, 2 * math.ceil(1.15 * float(radius.max()) + 3.0) + 1)
    corner = (centre[:, 0] - side / 2.0).round().clamp(0, scalars.size - side).long()
    place = corner[:, :, None] + torch.arange(side)  # (n, 2, side): x and y of the window's pixels
    # Windows have x before y here, as the blurred pictures below.
    seen = parts.difference[row[:, None, None], :, place[:, 1, None, :], place[:, 0, :, None]].flatten(1, 2)
    offset = place[:, None] + 0.5 - centre[..., None]
    u, v = (offset / radius[:, :, None, None]).flatten(0, 1).unbind(1)
    pictures = _pictures(shape, u[:, None, :], v[:, :, None], radius.view(-1, 1, 1))
    blurred = pictures.view(n, -1, side) @ _kernels(side)[blur]
    blurred = blurred.view(n, -1, side, side).transpose(2, 3).reshape(n, -1, side) @ _kernels(side)[blur]
    blurred = blurred.view(n, poses, 1 + len(TEXTURES), side * side)
    outline, shaded = blurred[:, :, :1], blurred[:, :, 1:]
    palette, background = torch.tensor(PALETTE), scalars.background[row]
    products = (blurred.flatten(1, 2) @ seen).view(n, poses, -1, 3)
    fixed = background.square().sum(1)[:, None] * outline.square().sum(-1)[..., 0]
    fixed = fixed + 2.0 * (products[:, :, 0] @ background[..., None])[..., 0]
    cross = (background @ palette.T)[:, None, None, :] * (outline * shaded).sum(-1, keepdim=True)
    own = palette.square().sum(1) * shaded.square().sum(-1, keepdim=True)
    change = fixed[:, :, None, None] - 2.0 * cross + own - 2.0 * products[:, :, 1:] @ palette.T
    return scalars.energy[row][:, None, None, None] + change / scalars.size**2


def _pictures(shape: int, u: Tensor, v: Tensor, pixels: Tensor) -> Tensor:
    """Outline and the four shaded outlines (n, 1 + textures, H, W) of one shape."""
    alpha = coverage(shape, u, v, pixels)
    return torch.stack([alpha, *(alpha * texture_shade(k, u, v, pixels) for k in range(len(TEXTURES)))], 1)


@cache
def _kernels(side: int) -> Tensor:
    """Gaussian blurs (blurs, side, side) of `side` pixels in a row; weights add to 1 except at the ends."""
    offset = torch.arange(side)[:, None] - torch.arange(side)[None, :]
    kernels = [torch.exp(-0.5 * (offset / max(sigma, 0.01)) ** 2) for sigma in _PIXEL_BLURS]
    return torch.stack([kernel / kernel[side // 2].sum() for kernel in kernels])


# ------------------------------------------------------------------------------------------------ scoring


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one image answers what was asserted of it, as counts; `report` turns many into rates."""

    objects: int
    """Objects asserted."""
    matched: int
    """Those of them that were found: a detection of the same shape."""
    bound: int
    """Matched ones with all asserted attributes right."""
    leaked: int
    """Matched ones in a wrong colour that is the colour of another asserted object."""
    textures: int
    """Textures asserted of matched objects."""
    textures_right: int
    sizes: int
    """Sizes asserted of matched objects."""
    sizes_right: int
    cells: int
    """Cells asserted of matched objects."""
    cells_right: int
    relations: int
    """Relations asserted."""
    relations_right: int
    """Those of them that hold between two matched objects."""
    extra: int
    """Detections not matched, unknown ones included."""
    prompt: bool
    """Everything asserted holds and nothing is extra."""
    probability: float
    """Product over the asserted objects of the probabilities of their asserted shape, colour and texture; 0 if one is
    absent, or not held by the one that should hold it."""
    held: int = 0
    """Objects asserted to be held by others."""
    held_matched: int = 0
    """Those of them that were found, in whatever object or beside all: a detection of the same shape."""
    held_bound: int = 0
    """Of these, in the object that should hold them, with all asserted attributes right."""
    holders: int = 0
    """Objects asserted to hold something that were matched."""
    held_leaked: int = 0
    """Those of them that hold what another one should, or a mixture of its own and that."""


_MOST_MATCHED = 7
_WEIGHTS = {"colour": 10, "texture": 3, "size": 1}


def score(facts: Facts, detections: Sequence[Detection]) -> Score:
    """Compares what a caption asserts with what the oracle read; see `Score`.

    Objects are assigned to detections of their own shape so that the most attributes are right, shape before colour
    before texture before size. A relation holds when the named axis differs in the named sense and more than the other.
    What is held is assigned likewise, its own holder before colour.
    """
    pairs = _match(facts, detections)
    inside = _match_held(facts, detections, pairs)
    holders = {one.holder: one.object for one in facts.held if one.holder in pairs}
    found = [(facts.objects[k], detections[d]) for k, d in pairs.items()]
    asserted = {name: [(getattr(o, name), getattr(d, name)) for o, d in found] for name in _WEIGHTS}
    said = {name: [said == seen for said, seen in both if said is not None] for name, both in asserted.items()}
    cells = [o.cell == cell_of(d.x, d.y) for o, d in found if o.cell is not None]
    bound = sum(all(getattr(o, n) in (None, getattr(d, n)) for n in _WEIGHTS) for o, d in found)
    colours = [o.colour for o in facts.objects]
    held_colours = [one.object.colour for one in facts.held]
    leaked = sum(
        detections[d].colour != colours[k] and detections[d].colour in colours[:k] + colours[k + 1 :] + held_colours
        for k, d in pairs.items()
    )
    relations = sum(
        r.subject in pairs
        and r.reference in pairs
        and _holds(r.relation, detections[pairs[r.subject]], detections[pairs[r.reference]])
        for r in facts.relations
    )
    there = len(detections) + sum(len(one.holding) for one in detections)
    extra = there - len(pairs) - len(inside.found)
    complete = len(pairs) == len(facts.objects) == bound and all(cells) and relations == len(facts.relations)
    complete &= inside.bound == len(facts.held)
    all_found = len(found) == len(facts.objects) and len(inside.at_home) == len(facts.held)
    return Score(
        objects=len(facts.objects),
        matched=len(pairs),
        bound=bound,
        leaked=leaked,
        textures=len(said["texture"]),
        textures_right=sum(said["texture"]),
        sizes=len(said["size"]),
        sizes_right=sum(said["size"]),
        cells=len(cells),
        cells_right=sum(cells),
        relations=len(facts.relations),
        relations_right=relations,
        extra=extra,
        prompt=complete and extra == 0,
        probability=math.prod((_probability(o, d) for o, d in found + inside.at_home), start=float(all_found)),
        held=len(facts.held),
        held_matched=len(inside.found),
        held_bound=inside.bound,
        holders=len(holders),
        held_leaked=sum(_leaks(facts, k, own, detections[pairs[k]].holding) for k, own in holders.items()),
    )


class _Inside(NamedTuple):
    """What of that which should be held was found."""

    found: list[tuple[ObjectFacts, Detection]]
    """Anywhere."""
    at_home: list[tuple[ObjectFacts, Detection]]
    """In the object that should hold it."""

    @property
    def bound(self) -> int:
        """Those at home with all asserted attributes right."""
        return sum(all(getattr(o, n) in (None, getattr(d, n)) for n in _WEIGHTS) for o, d in self.at_home)


def _match_held(facts: Facts, detections: Sequence[Detection], pairs: Mapping[int, int]) -> _Inside:
    """Assigns what should be held to what is inside of objects, and to objects that are nothing else."""
    owners = {d: k for k, d in pairs.items()}
    places = [(one, owners.get(d, -1)) for d, holder in enumerate(detections) for one in holder.holding]
    places += [(one, -1) for d, one in enumerate(detections) if d not in owners]
    seen = [one for one, _ in places]
    asserted = [one.object for one in facts.held]
    home = {(h, d) for h, held in enumerate(facts.held) for d, (_, owner) in enumerate(places) if owner == held.holder}
    chosen = _assign(asserted, seen, lambda h, d: _worth(asserted[h], seen[d]) + 50 * ((h, d) in home))
    return _Inside(
        [(asserted[h], seen[d]) for h, d in chosen.items()],
        [(asserted[h], seen[d]) for h, d in chosen.items() if (h, d) in home],
    )


def _leaks(facts: Facts, holder: int, own: ObjectFacts, inside: Sequence[Detection]) -> bool:
    """Whether an object holds what another one should, or its own thing in the colour of the other's, say."""
    others = [one.object for one in facts.held if one.holder != holder]
    shapes, colours = ({getattr(one, name) for one in (own, *others)} for name in ("shape", "colour"))
    wrong = [one for one in inside if one.known and (one.shape, one.colour) != (own.shape, own.colour)]
    return bool(others) and any(one.shape in shapes and one.colour in colours for one in wrong)


def _match(facts: Facts, detections: Sequence[Detection]) -> dict[int, int]:
    """The best assignment of asserted objects to detections, {object: detection}; a match needs the shape."""
    return _assign(facts.objects, detections, lambda k, d: _worth(facts.objects[k], detections[d]))


def _assign(
    asserted: Sequence[ObjectFacts], detections: Sequence[Detection], worth_of: Callable[[int, int], int]
) -> dict[int, int]:
    known = [k for k, detection in enumerate(detections) if detection.known][:_MOST_MATCHED]
    best: dict[int, int] = {}
    most = 0
    for choice in itertools.product([-1, *known], repeat=len(asserted)):
        taken = {k: d for k, d in enumerate(choice) if d >= 0}
        same = all(asserted[k].shape == detections[d].shape for k, d in taken.items())
        if not same or len(set(taken.values())) < len(taken):
            continue
        worth = sum(worth_of(k, d) for k, d in taken.items())
        if worth > most:
            best, most = taken, worth
    return best


def _worth(said: ObjectFacts, seen: Detection) -> int:
    return 100 + sum(weight for name, weight in _WEIGHTS.items() if getattr(said, name) == getattr(seen, name))


def _holds(relation: str, a: Detection, b: Detection) -> bool:
    dx, dy = a.x - b.x, a.y - b.y
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    return abs(along) > abs(across) and (along < 0) == (relation in ("left", "above"))


def _probability(said: ObjectFacts, seen: Detection) -> float:
    chance = seen.shapes[SHAPES.index(said.shape)] * seen.colours[COLOURS.index(said.colour)]
    return chance if said.texture is None else chance * seen.textures[TEXTURES.index(said.texture)]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Rates over images; NaN where nothing was asserted."""

    images: int
    presence: float
    """Matched objects over asserted objects."""
    binding: float
    """Matched objects with all asserted attributes right, over matched objects."""
    object_exact: float
    """Presence times binding: objects that are there with all their attributes."""
    leakage: float
    """Matched objects that carry another asserted object's colour instead of their own, over matched objects."""
    texture: float
    size: float
    cell: float
    relation: float
    """Relations that hold over relations asserted; absent objects count against it."""
    extra: float
    """Detections per image that match nothing asserted."""
    prompt: float
    """Images where everything asserted holds and nothing is extra."""
    probability: float
    """Mean of `Score.probability`: the graded version of `prompt`, for learning curves."""
    held_presence: float
    """Objects to be held that are anywhere in the image, over those asserted."""
    held_binding: float
    """Of these, in the object that should hold them with all asserted attributes right."""
    held_leakage: float
    """Matched holders that hold what another one should, in whole or in part, over matched holders."""


RATES: Mapping[str, tuple[str, str | None]] = {
    "presence": ("matched", "objects"),
    "binding": ("bound", "matched"),
    "object_exact": ("bound", "objects"),
    "leakage": ("leaked", "matched"),
    "texture": ("textures_right", "textures"),
    "size": ("sizes_right", "sizes"),
    "cell": ("cells_right", "cells"),
    "relation": ("relations_right", "relations"),
    "extra": ("extra", None),
    "prompt": ("prompt", None),
    "probability": ("probability", None),
    "held_presence": ("held_matched", "held"),
    "held_binding": ("held_bound", "held_matched"),
    "held_leakage": ("held_leaked", "holders"),
}
"""Field of `Report` -> the fields of `Score` whose sums are divided; None stands for the number of images."""


def report(rows: Sequence[Score]) -> Report:
    """Sums scores over images into rates."""

    def rate(part: str, whole: str | None) -> float:
        total = len(rows) if whole is None else sum(getattr(row, whole) for row in rows)
        return sum(getattr(row, part) for row in rows) / total if total else math.nan

    return Report(images=len(rows), **{name: rate(part, whole) for name, (part, whole) in RATES.items()})
