"""The size of images in pixels: one number, the side of a square, or (height, width).

A square stays a number everywhere, in configurations, caches and records. What needs both sides asks `sides`; what is
for squares alone asks `square`, which refuses others.
"""

from __future__ import annotations

from typing import Annotated

from imgtok.config import PositiveInt, Range

Size = int | tuple[int, int]
"""Pixels a side of a square, or (height, width)."""
ImageSize = PositiveInt | tuple[PositiveInt, PositiveInt]
"""A `Size` as a field of a configuration, where a list stands for the tuple."""
SquareSize = Annotated[int, Range(low=1, note=", the side of a square (only a FlexTok is trained on [height, width])")]
"""The size as a field of what is for squares alone."""


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def size_of(height: int, width: int) -> Size:
    """The other way round: one number for a square."""
    return height if height == width else (height, width)


def square(size: Size, what: str) -> int:
    """The side of a square. Raises ValueError for another size; `what` is the field, and what takes squares alone."""
    height, width = sides(size)
    if height != width:
        raise ValueError(f"{what}; these are images of {in_pixels(size)} pixels (height x width)")
    return height


def in_pixels(size: Size) -> str:
    """`64`, or `96 x 128`, the height first."""
    height, width = sides(size)
    return str(height) if height == width else f"{height} x {width}"


def as_given(size: Size) -> str:
    """As it is written on a command line: `64`, or `96,128`."""
    return str(size) if isinstance(size, int) else "{},{}".format(*size)


def check_multiple(size: Size, cell: int, of: str) -> None:
    """Raises ValueError, which names the nearest that fit, unless both sides are multiples of `cell`; `of` says in
    words what that is.
    """
    for name, side in zip(("a height of", "a width of"), sides(size), strict=True):
        if side % cell:
            given = str(side) if isinstance(size, int) else f"{name} {side}"
            below = side // cell * cell
            nearest = f"the nearest that fit are {below} and {below + cell}" if below else f"the smallest is {cell}"
            raise ValueError(f"image_size: {given} is not a multiple of {cell}, {of}; {nearest}")
