"""The X of next-X prediction (xAR, arXiv 2502.20388, section 3.2): how a latent grid is cut into entities.

A generator makes an image's latent piece by piece; a piece is an *entity*: a cell (a square of neighbours), a
subsample (positions spread evenly over the grid), a scale (the whole grid, resized), a single patch, or the
whole image. To the network they are all the same: a sequence of tokens, cut into runs. So an entity type is a
function from the size of the grid to an `Entities`: an order of the positions and the lengths of the runs.

Shapes: B batch, C channels, G grid side, L positions of the sequence, N entities.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from imgtok.config import PositiveInt, check


@dataclass(frozen=True)
class Entities:
    """A latent grid as a sequence of entities, each of which is complete before the next begins."""

    grid: int
    """Positions a side of the latent."""
    order: Tensor
    """(L,) int64: the position, row * grid + column, that each token of the sequence is taken from."""
    sizes: tuple[int, ...]
    """Tokens of each entity."""
    places: Tensor
    """(L, 2) float32: row and column on the grid of each token's centre, for rotary positions."""

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each entity starts, and where the last one ends: N + 1 numbers."""
        return tuple(accumulate(self.sizes, initial=0))

    def cut(self, latents: Tensor) -> Tensor:
        """(B, C, G, G) -> tokens in the order of the sequence (B, L, C)."""
        if latents.shape[-2:] != (self.grid, self.grid):
            rows, columns = latents.shape[-2:]
            raise ValueError(
                f"a latent of {rows} x {columns}, but the generator was made for {self.grid} x {self.grid}; "
                "use images of its size, or train one with another model.grid"
            )
        return latents.flatten(2)[:, :, self.order.to(latents.device)].transpose(1, 2)

    def join(self, tokens: Tensor) -> Tensor:
        """The inverse, (B, L, C) -> (B, C, G, G); of scales only the last, whole one is used."""
        area = self.grid**2
        back = torch.argsort(self.order[-area:]).to(tokens.device)
        return tokens[:, -area:][:, back].transpose(1, 2).unflatten(2, (self.grid, self.grid))

    def which(self) -> Tensor:
        """(L,) int64: the entity that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), torch.tensor(self.sizes), output_size=self.length)

    def may_look(self) -> Tensor:
        """(L, L) boolean: a token sees its own entity and all earlier ones (xAR, section 3.3)."""
        which = self.which()
        return which[:, None] >= which[None, :]


def partition(grid: int, groups: Tensor) -> Entities:
    """Entities that divide the grid among them: `groups` (N, tokens) names their positions in order."""
    order = groups.flatten()
    return Entities(grid, order, (groups.shape[1],) * len(groups), positions_on_grid(order, grid))


def positions_on_grid(order: Tensor, grid: int) -> Tensor:
    """(L,) positions -> (L, 2) rows and columns."""
    return torch.stack([order // grid, order % grid], dim=-1).float()


def cells(grid: int, height: int, width: int) -> Entities:
    """Rectangles of `height` x `width` neighbours in raster order; raster inside each.

    Raises ValueError where they do not tile the grid.
    """
    for name, side in (("height", height), ("width", width)):
        if grid % side:
            divisors = ", ".join(str(d) for d in range(1, grid + 1) if grid % d == 0)
            raise ValueError(f"entities.{name}: cells of {side} do not tile a grid of {grid}; use one of {divisors}")
    index = torch.arange(grid**2).view(grid // height, height, grid // width, width)
    return partition(grid, index.transpose(1, 2).reshape(-1, height * width))


def subsamples(grid: int, side: int) -> Entities:
    """Entity (i, j) holds every (grid / side)-th row from i and column from j: `side` x `side` tokens, far apart.

    Raises ValueError where `side` does not divide the grid.
    """
    if grid % side:
        divisors = ", ".join(str(d) for d in range(1, grid + 1) if grid % d == 0)
        raise ValueError(f"entities.side: {side} does not divide a grid of {grid}; use one of {divisors}")
    step = grid // side
    index = torch.arange(grid**2).view(side, step, side, step)
    return partition(grid, index.permute(1, 3, 0, 2).reshape(-1, side * side))


def scales(grid: int, sides: tuple[int, ...]) -> Entities:
    """The latent at growing sizes, resized by taking the nearest position; the last is the latent itself.

    Neither paper nor code says where the tokens of a small scale lie for the rotary embedding; here each lies at the
    centre of the square that it stands for. Raises ValueError unless `sides` grow and end at the grid.
    """
    if not sides or list(sides) != sorted(set(sides)) or sides[0] < 1 or sides[-1] != grid:
        raise ValueError(f"entities.sides: {list(sides)} must grow and end at the grid's {grid}")
    orders, places = [], []
    for side in sides:
        nearest = torch.arange(side) * grid // side
        orders.append((nearest[:, None] * grid + nearest).flatten())
        centres = (torch.arange(side) + 0.5) * grid / side - 0.5
        places.append(torch.cartesian_prod(centres, centres).view(-1, 2))
    return Entities(grid, torch.cat(orders), tuple(side**2 for side in sides), torch.cat(places))


# ---------------------------------------------------------------- the same, as configuration


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Rectangles of neighbours: what xAR was released with, 8 x 8 of 16 x 16."""

    kind: Literal["cell"] = "cell"
    height: PositiveInt = 8
    """Rows of one cell; divides the grid."""
    width: PositiveInt = 8
    """Columns of one cell; divides the grid."""

    def __post_init__(self) -> None:
        check(self)

    def lay_out(self, grid: int) -> Entities:
        return cells(grid, self.height, self.width)


@dataclass(frozen=True, kw_only=True)
class Subsamples:
    """Positions spread evenly over the grid."""

    kind: Literal["subsample"] = "subsample"
    side: PositiveInt = 8
    """Rows and columns of one entity; divides the grid."""

    def __post_init__(self) -> None:
        check(self)

    def lay_out(self, grid: int) -> Entities:
        return subsamples(grid, self.side)


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The whole latent at growing sizes."""

    kind: Literal["scale"] = "scale"
    sides: tuple[int, ...] = (2, 4, 8, 16)
    """Rows and columns of each scale, growing; the last is the grid's."""

    def __post_init__(self) -> None:
        check(self)

    def lay_out(self, grid: int) -> Entities:
        return scales(grid, self.sides)


@dataclass(frozen=True, kw_only=True)
class Patches:
    """One position after the other."""

    kind: Literal["patch"] = "patch"

    def lay_out(self, grid: int) -> Entities:
        return cells(grid, 1, 1)


@dataclass(frozen=True, kw_only=True)
class WholeImage:
    """All positions at once, which makes xAR a plain flow model."""

    kind: Literal["image"] = "image"

    def lay_out(self, grid: int) -> Entities:
        return cells(grid, grid, grid)


EntityConfig = Cells | Subsamples | Scales | Patches | WholeImage
