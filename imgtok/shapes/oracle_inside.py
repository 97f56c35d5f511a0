"""The oracle for scenes whose objects hold others ("a red circle holding a small yellow star"): it looks into objects.

Each component is read twice: as it is, and with what differs from its main colour painted over in that colour. Where
the second is solid, the oracle runs inside its outline, with its main colour as the background, and what is found there
is what it holds. The reading whose picture is nearer to the image counts: a dotted circle is no circle that holds dots.

What is held is taken for solid, its texture being too small to be seen. An object may hold anything anywhere inside it,
also what the world's own scenes never show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok.shapes import oracle, oracle_fast
from imgtok.shapes.oracle import Detection
from imgtok.shapes.render import BACKGROUND, PALETTE, coverage, signed_distance, texture_shade
from imgtok.shapes.world import COLOURS, SHAPES, TEXTURES

_EDGE = 2  # pixels from the edge of a component, where its colours are mixed with the background's
_DEEP = 4  # from here on inside they are not
_STAIN = (0.02, 0.6)  # least and most that is painted over, as a share of the component
_LEAST_INSIDE = 0.008  # of the window; smaller things inside are dropped
_MARGIN, _DEEP_INSIDE = 0.13, 0.3  # radii inside the outline, likewise
_BETTER = 0.1  # share of the squared error, where it was painted over, by which the second reading has to be better

Explained = Callable[[oracle._Parts, float, bool], list[Detection]]


@torch.no_grad()
def read(images: Tensor, *, scale: float = 1.0, plain: bool = False) -> list[list[Detection]]:
    """As `oracle_fast.read`, with what objects hold in `Detection.holding`; by the plain search alone on request.

    Images are (B, 3, S, S) in [0, 1]; below 64 pixels what is held is hardly seen.
    """
    oracle._check_images(images)
    explained = oracle._explained if plain else oracle_fast._explained
    found: list[list[Detection]] = [[] for _ in range(len(images))]
    for start in range(0, len(images), 128):
        seen = oracle._look(images[start : start + 128].detach().cpu().float().clamp(0.0, 1.0))
        parts, own = oracle._cut(seen, oracle._LEAST_AREA)
        for image, detection in zip(parts.image.tolist(), _read(seen, parts, own, scale, explained), strict=True):
            found[start + image].append(detection)
    return [sorted(detections, key=lambda d: -d.area) for detections in found]


def _read(seen: oracle._Seen, parts: oracle._Parts, own: Tensor, scale: float, explained: Explained) -> list[Detection]:
    """What each of n components is, and what it holds."""
    found = explained(parts, scale, False)
    if not found:
        return found
    stain, colour = _stains(seen, parts, own)
    rows = stain.any((1, 2)).nonzero()[:, 0]
    if not len(rows):
        return found
    some, own, stain, colour = oracle_fast._rows(parts, rows), own[rows], stain[rows], colour[rows]
    painted = _painted(some, own, stain, colour)
    holders = explained(painted, scale, False)
    contents = _contents(seen, some, own, colour, holders, scale, explained)
    where = _around(stain, _EDGE) & own
    for k, row in enumerate(rows.tolist()):
        if not (contents[k] and holders[k].known and holders[k].texture == "solid"):
            continue
        other = replace(holders[k], holding=tuple(sorted(contents[k], key=lambda one: -one.area)))
        image = some.difference[k] + some.background[k, :, None, None]
        if _error(other, image, where[k]) < (1.0 - _BETTER) * _error(found[row], image, where[k]):
            found[row] = other
    return found


def _error(detection: Detection, image: Tensor, where: Tensor) -> float:
    """Squared error of the pixels `where` (S, S) of an image (3, S, S), if it shows what was found and is blurred so
    that it fits best.
    """
    size = where.shape[-1]
    axis = torch.arange(size) + 0.5
    shown = torch.tensor(BACKGROUND)[:, None, None].expand(3, size, size)
    for one in (detection, *detection.holding):
        pixels = torch.tensor(one.radius * size)
        u, v = (axis[None, :] - one.x * size) / pixels, (axis[:, None] - one.y * size) / pixels
        alpha = coverage(SHAPES.index(one.shape), u, v, pixels)
        shade = texture_shade(TEXTURES.index(one.texture), u, v, pixels)
        colour = torch.tensor(PALETTE[COLOURS.index(one.colour)])[:, None, None]
        shown = shown + alpha * (shade * colour - shown)
    kernels = oracle._kernels(size)[:, None]
    blurred = kernels @ shown @ kernels.mT  # (blurs, 3, S, S)
    return float((blurred[:, :, where] - image[:, where]).square().sum((1, 2)).min())


def _stains(seen: oracle._Seen, parts: oracle._Parts, own: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (n, S, S) in the components' middles that differ from the main colour, and this colour (n, 3) as a
    difference from the background; none where they are too few or too many for a thing that is held.
    """
    there = seen.mask[parts.image] & own
    middle, deep = (~_around(~there, reach) for reach in (_EDGE, _DEEP))
    shown = seen.difference[parts.image]
    colour = _main_colour(shown + parts.background[:, :, None, None], there) - parts.background
    stain = _differs(shown - colour[:, :, None, None], colour, seen.least[parts.image], middle, deep)
    share = stain.sum((1, 2)) / there.sum((1, 2)).clamp(min=1)
    return stain & ((share > _STAIN[0]) & (share < _STAIN[1]))[:, None, None], colour


def _differs(difference: Tensor, colour: Tensor, least: Tensor, middle: Tensor, deep: Tensor) -> Tensor:
    """Pixels (n, S, S) that differ from the main colour by `difference`: in the middle, by what is no mixture of it and
    the background, which lies at minus `colour` from it; deep inside, by anything.
    """
    towards = -colour[:, :, None, None]
    mixed = ((difference * towards).sum(1) / towards.square().sum(1).clamp(min=1e-6)).clamp(0.0, 1.0)
    other = oracle._distance(difference - mixed[:, None] * towards)
    least = least[:, None, None]
    return (middle & (other > least)) | (deep & (oracle._distance(difference) > least))


def _main_colour(images: Tensor, there: Tensor) -> Tensor:
    """The median colour (n, 3) of some pixels: of those whose nearest colour is that of most but for the edge, the 15 %
    nearest to it, which are the least mixed with others.
    """
    palette = torch.tensor(PALETTE)
    apart = torch.cdist(images.flatten(2).mT, palette)  # (n, S * S, colours)
    nearest = apart.argmin(2).view_as(there)
    middle = ~_around(~there, 1)
    votes = torch.stack([((nearest == name) & middle).sum((1, 2)) for name in range(len(palette))], 1)
    name = votes.argmax(1)
    most = there & (nearest == name[:, None, None])
    far = apart[torch.arange(len(name)), :, name].masked_fill(~most.flatten(1), torch.nan)
    chosen = far <= torch.nanquantile(far, 0.15, dim=1, keepdim=True)
    return images.flatten(2).masked_fill(~chosen[:, None], torch.nan).nanmedian(2).values


def _around(pixels: Tensor, reach: int) -> Tensor:
    """(n, S, S) pixels and those as far as `reach` from them in either direction."""
    return F.max_pool2d(pixels[:, None].float(), 2 * reach + 1, 1, reach)[:, 0] > 0


def _painted(parts: oracle._Parts, own: Tensor, stain: Tensor, colour: Tensor) -> oracle._Parts:
    """The components with their stains painted over."""
    over = _around(stain, _EDGE) & own
    difference = torch.where(over[:, None], colour[:, :, None, None], parts.difference)
    energy = difference.square().sum((1, 2, 3)) / own.shape[-1] ** 2
    noise = parts.noise * (1.0 - over.sum((1, 2)) / own.sum((1, 2)).clamp(min=1))
    return parts._replace(difference=difference, energy=energy, noise=noise)


def _contents(
    seen: oracle._Seen,
    parts: oracle._Parts,
    own: Tensor,
    colour: Tensor,
    holders: list[Detection],
    scale: float,
    explained: Explained,
) -> list[list[Detection]]:
    """What lies inside the outlines of n holders."""
    size = own.shape[-1]
    side = size // 2
    corners = torch.tensor([(one.x, one.y) for one in holders]).mul(size).sub(side / 2).round().long()
    place = corners[:, :, None] + torch.arange(side)  # (n, 2, side): x and y of the windows' pixels
    there = (place >= 0) & (place < size)
    x, y = place.clamp(0, size - 1).unbind(1)
    number = torch.arange(len(holders))[:, None, None]
    inside = own[number, y[:, :, None], x[:, None, :]] & there[:, 1, :, None] & there[:, 0, None, :]
    depth = torch.stack([_depth(one, at, size) for one, at in zip(holders, place, strict=True)])
    inside &= depth > _MARGIN
    raw, smooth = (
        (of[number, :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2) - colour[:, :, None, None]) * inside[:, None]
        for of in (parts.difference, seen.difference[parts.image])
    )
    background = parts.background + colour
    apart = oracle._distance(smooth).masked_fill(~inside, torch.nan).flatten(1)
    spread = torch.nanquantile(apart, 0.25, dim=1).nan_to_num(0.0)  # what is held may fill the rest
    least = torch.maximum(seen.least[parts.image], 4.0 * spread)
    mask = _differs(smooth, colour, least, inside, inside & (depth > _DEEP_INSIDE))
    windows = oracle._Seen(raw + background[:, :, None, None], seen.noise[parts.image], background, smooth, least, mask)
    things, _ = oracle._cut(windows, _LEAST_INSIDE)
    found: list[list[Detection]] = [[] for _ in holders]
    for k, one in zip(things.image.tolist(), explained(things, scale, True), strict=True):
        radius = one.radius * side / size
        moved = replace(
            one,
            x=(one.x * side + float(corners[k, 0])) / size,
            y=(one.y * side + float(corners[k, 1])) / size,
            radius=radius,
            size=oracle._size_name(radius, scale),
            area=one.area * (side / size) ** 2,
        )
        found[k].append(moved)
    return found


def _depth(holder: Detection, place: Tensor, size: int) -> Tensor:
    """How deep (side, side) the pixels of a window lie inside an object, in its radii; their x and y are (2, side)."""
    u = (place[0] + 0.5 - holder.x * size) / (holder.radius * size)
    v = (place[1] + 0.5 - holder.y * size) / (holder.radius * size)
    return -signed_distance(SHAPES.index(holder.shape), u[None, :], v[:, None])
