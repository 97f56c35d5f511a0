"""Pictures: value ranges, decoding, the ADM centre crop, PNG files and grids.

Models see float images in [-1, 1]. `to_uint8` is the only way from there to bytes in the whole suite, so
that a score never depends on who did the rounding. `decode_image` is the only way from a file's bytes to
RGB.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import logging
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, features
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from imgtok.files import instead_of, replacing
from imgtok.sizes import Size, sides

logger = logging.getLogger(__name__)

_ALWAYS = (
    ".apng .bmp .dib .gif .jfif .jpe .jpeg .jpg .mpo .pbm .pgm .png .pnm .ppm .qoi .tga .tif .tiff"  # Pillow alone
)
_WITH = {"avif": ".avif .avifs", "jpg_2000": ".j2k .jp2 .jpf .jpx", "webp": ".webp"}  # where it was built with these
SUFFIXES = tuple(
    sorted([*_ALWAYS.split(), *(s for name, more in _WITH.items() if features.check(name) for s in more.split())])
)
"""File name endings that count as images, compared in lower case; `imgtok.data.files` has the whole rule."""

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded, Pillow's own mark of suspicion; it takes 358 MB of memory. Beyond it a
file of a few kilobytes could claim all there is."""

_LONG = 16  # a picture this many times as long as wide is not enlarged whole


class UnreadableImage(ValueError):  # noqa: N818 - it is the image, not our code, that erred
    """An image that cannot be decoded; the message begins with the name of its file."""

    def __init__(self, name: str, reason: str) -> None:
        # Both go to ValueError so that the exception survives pickling between processes.
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


# Value ranges


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [-1, 1] of any shape -> uint8 in 0..255: clamp, scale, round to nearest (ties to
    even).
    """
    if not images.is_floating_point():
        raise ValueError(f"to_uint8 takes float images in [-1, 1], not {images.dtype}")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 images in 0..255 of any shape -> float32 in [-1, 1]."""
    if images.dtype != torch.uint8:
        raise ValueError(f"from_uint8 takes uint8 images, not {images.dtype}")
    return images.float() / 127.5 - 1


def to_pil(images: Tensor | Sequence[Tensor]) -> list[Image.Image]:
    """Images (N, 3, H, W) or one (3, H, W), float in [-1, 1] or uint8, on any device -> as many Pillow pictures.

    A list of such tensors gives the pictures of all. Raises ValueError for anything else.
    """
    if isinstance(images, list | tuple):
        return [picture for each in images for picture in to_pil(each)]
    if not isinstance(images, Tensor):
        raise ValueError(f"to_pil takes tensors (N, 3, H, W) or (3, H, W), not {type(images).__name__}")
    if images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(f"to_pil takes images (N, 3, H, W) or (3, H, W), not {tuple(images.shape)}")
    if images.is_floating_point() and images.numel() and images.min() >= 0 and images.max() > 200:
        raise ValueError("to_pil takes float images in [-1, 1]; these are as in 0..255: give images.byte()")
    pixels = images.detach() if images.dtype == torch.uint8 else to_uint8(images.detach())
    pixels = pixels.reshape(-1, *pixels.shape[-3:]).permute(0, 2, 3, 1).cpu().contiguous()
    return [Image.fromarray(picture) for picture in pixels.numpy()]


# Decoding


Picture = Image.Image | np.ndarray | str | Path
"""One picture: Pillow's, a uint8 array (H, W) or (H, W, 1 to 4 channels), or the path of a file."""
_IN_WORDS = "Pillow images, uint8 arrays and paths"


def preprocess(pictures: Picture | Sequence[Picture], size: Size) -> Tensor:
    """One picture or a list of N -> float32 images (1 or N, 3, H, W) in [-1, 1]: what a tokenizer encodes.

    `size` is the side of a square or (height, width), such as `tokenizer.image_size`. A picture is scaled until it
    covers that (a square: until its shorter side is as long) and the centre is kept, as everywhere in the suite
    (`center_crop_adm`). Pictures are turned upright as their EXIF data says, grey becomes RGB, transparent parts white.
    An array (N, H, W, C) is a list of N. Raises ValueError for what is no picture and for an array of another type or
    shape, FileNotFoundError or UnreadableImage for a file.
    """
    if isinstance(pictures, np.ndarray) and pictures.ndim == 4:
        listed: list[Picture] = list(pictures)
    elif isinstance(pictures, Image.Image | np.ndarray | str | Path):
        listed = [pictures]
    elif isinstance(pictures, Iterable) and not isinstance(pictures, bytes | Mapping | Tensor | io.IOBase):
        listed = list(pictures)
    else:
        raise ValueError(f"preprocess takes {_IN_WORDS}, one or a list of them, not a {type(pictures).__name__}")
    if not listed:
        raise ValueError("preprocess: there are no pictures in the list")
    pair = size if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        raise ValueError(
            f"size: given {size!r}, must be a whole number of pixels a side, at least 1, or two, (height, width)"
        )
    crops = [np.array(center_crop_adm(_as_rgb(picture), (pair[0], pair[1]))) for picture in listed]
    return from_uint8(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous())


def _as_rgb(picture: Picture) -> Image.Image:
    if isinstance(picture, str | Path):
        place = Path(picture).expanduser()
        if place.is_dir() or not place.exists():
            what = "is a folder" if place.is_dir() else f"no such file{instead_of(picture)}"
            raise FileNotFoundError(f"preprocess: {picture}: {what}; it takes {_IN_WORDS}, one or a list of them")
        return decode_image(place.read_bytes(), str(picture))
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] > (4,) or not picture.size:
            given = f"{picture.dtype} {picture.shape}"
            scaled = "; of numbers in [0, 1] that is (array * 255).round().astype('uint8')"
            raise ValueError(
                f"preprocess takes arrays (H, W) or (H, W, 1 to 4 channels) of uint8, not {given}"
                f"{scaled if picture.dtype.kind == 'f' else ''}"
            )
        picture = Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture)
    elif not isinstance(picture, Image.Image):
        raise ValueError(f"preprocess takes {_IN_WORDS}, not a {type(picture).__name__}")
    return _to_rgb(_upright(picture.copy()))


def decode_image(data: bytes, name: str, at_least: int | None = None) -> Image.Image:
    """The bytes of an image file -> an upright 8-bit RGB picture; transparent parts become white.

    16-bit grey is scaled to 8 bits. Raises UnreadableImage, which names the file, for anything that is not
    a whole image, and before it is decoded for one of more than MAX_PIXELS.

    With `at_least`, a JPEG file may be decoded at a half, a quarter or an eighth of its size, with shorter sides of at
    least so many pixels, which saves memory and time. libjpeg's reduced pictures are not the box means that the
    published crop begins with: leave it out where images are scored or encoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error below
            picture = Image.open(io.BytesIO(data), formats=_formats())
        if picture.width * picture.height > MAX_PIXELS:
            raise UnreadableImage(name, _too_large(f"{picture.width} x {picture.height}"))
        if at_least is not None:
            scale = at_least / min(picture.size)
            picture.draft(None, (math.ceil(picture.width * scale), math.ceil(picture.height * scale)))
        picture.load()
        return _to_rgb(_upright(picture))
    except MemoryError:
        raise
    except UnreadableImage as error:
        raise UnreadableImage(name, error.reason) from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(name, _too_large("".join(re.findall(r"\d+(?= pixels\) exceeds)", str(error))))) from error
    except Exception as error:  # Pillow's decoders raise whatever the damaged bytes lead them to
        raise UnreadableImage(name, _reason(data, error)) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """All that Pillow reads itself: for EPS it starts Ghostscript, which runs the file as a program."""
    Image.preinit()  # so that the usual formats come first
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _too_large(size: str) -> str:
    return f"has {size} pixels, and at most {MAX_PIXELS:,} are decoded (a longer side of some 10,000); shrink it first"


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image (it begins with {data[:12]!r})"
    return f"damaged or truncated image ({error})"


def _upright(picture: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except Exception:  # broken EXIF says nothing about the pixels
        logger.debug("ignored broken EXIF data", exc_info=True)
    return picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _to_8_bit(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _to_8_bit(picture: Image.Image) -> Image.Image:
    # Pillow's own conversion clips 16-bit values at 255, which turns nearly every such image white.
    values = np.asarray(picture)
    bits = getattr(picture, "tag_v2", {}).get(258, ())  # BitsPerSample of a TIFF: with 32, 255 may be white
    if picture.mode == "F" or 32 in bits or values.min() < 0 or values.max() > 65535:
        raise UnreadableImage("", "pixels of more than 16 bits have no agreed range; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


# Crops


def center_crop_adm(picture: Image.Image, size: Size) -> Image.Image:
    """The centre of `size` after scaling the picture until it just covers that: of a square, the shorter side to size,
    as in the ADM evaluation suite.

    Every published ImageNet FID uses this crop: box-filter halvings down to less than twice the size, then
    bicubic.
    """
    return _scaled_crop(picture, sides(size), sides(size), (0.5, 0.5))


def random_crop(picture: Image.Image, size: Size, draws: Sequence[float], zoom: float = 1.25) -> Image.Image:
    """A crop of `size` at a random scale and place.

    draws: three numbers in [0, 1) for the scale (the picture covers between size and zoom * size), left edge and
    top edge.
    """
    height, width = (side + int(draws[0] * (round(zoom * side) - side + 1)) for side in sides(size))
    return _scaled_crop(picture, (height, width), sides(size), draws[1:3], ends=1)


def corner_crops(picture: Image.Image, size: Size, zoom: float = 1.1) -> list[Image.Image]:
    """Five crops of `size`: the four corners and the middle of the centre of zoom * size.

    With their mirror images, LlamaGen's "ten-crop" (arXiv 2406.06525).
    """
    height, width = sides(size)
    outer = (round(zoom * height), round(zoom * width))
    centre, down, right = center_crop_adm(picture, outer), outer[0] - height, outer[1] - width
    places = [(0, 0), (right, 0), (0, down), (right, down), (right // 2, down // 2)]
    return [centre.crop((left, top, left + width, top + height)) for left, top in places]


def _scaled_crop(
    picture: Image.Image, cover: tuple[int, int], size: tuple[int, int], place: Sequence[float], ends: int = 0
) -> Image.Image:
    """A crop of `size` (height, width) of the picture, which is scaled until it just covers `cover`.

    place: left and top edge, as shares of the pixels that are left over, plus `ends`.
    """
    if min(cover) < 1:
        raise ValueError(f"image size is {min(cover)}; it must be 1 or more")
    least, crop = cover[::-1], size[::-1]  # a picture's size is (width, height)
    while all(length >= 2 * side for length, side in zip(picture.size, least, strict=True)):
        half = (picture.width // 2, picture.height // 2)
        picture = picture.resize(half, Image.Resampling.BOX)
    scale = max(side / length for length, side in zip(picture.size, least, strict=True))
    width, height = (max(side, round(length * scale)) for length, side in zip(picture.size, least, strict=True))
    left, top = (
        int(share * (length - side + ends)) for share, length, side in zip(place, (width, height), crop, strict=True)
    )
    if max(width, height) <= _LONG * max(least):
        scaled = picture.resize((width, height), Image.Resampling.BICUBIC)
        return scaled.crop((left, top, left + crop[0], top + crop[1]))
    return _part_of_scaled(picture, (width, height), (left, top), crop)


def _part_of_scaled(
    picture: Image.Image, scaled: tuple[int, int], corner: tuple[int, int], crop: tuple[int, int]
) -> Image.Image:
    """A part, of the width and height `crop`, of a long picture as if it had been scaled whole, which would take
    gigabytes of 1 x 8000 pixels.

    The pixels lie on the same grid, whose corners Pillow keeps in single precision: a value may come out one higher or
    lower. Pillow scales rows first, and so does this: values are cut off at 0 and 255 in between.
    """
    (left, right), (top, bottom) = (
        (edge * length / whole, (edge + side) * length / whole)
        for edge, side, length, whole in zip(corner, crop, picture.size, scaled, strict=True)
    )
    reach = 3 * max(1.0, picture.height / scaled[1])  # the bicubic kernel looks two pixels far, of the coarser grid
    first, last = max(0, int(top - reach)), min(picture.height, int(bottom + reach) + 1)
    rows = picture.resize((crop[0], last - first), Image.Resampling.BICUBIC, box=(left, first, right, last))
    return rows.resize(crop, Image.Resampling.BICUBIC, box=(0, top - first, crop[0], bottom - first))


# Files and grids


def save_png(image: Tensor, path: Path, comment: str = "") -> None:
    """Write one uint8 image, (3, H, W) or (H, W, 3), to a PNG file; the file appears whole or not at all.

    Equal pixels give equal bytes. A shape that could be read either way is taken as (3, H, W). `comment` is kept in the
    file.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or 3 not in (image.shape[0], image.shape[-1]):
        raise ValueError(f"save_png takes uint8 (3, H, W) or (H, W, 3), not {image.dtype} {tuple(image.shape)}")
    if image.shape[0] == 3:
        image = image.permute(1, 2, 0)
    texts = PngInfo()
    if comment:
        texts.add_text("Comment", comment)
    with replacing(path) as temporary:
        Image.fromarray(image.cpu().contiguous().numpy()).save(temporary, "png", compress_level=6, pnginfo=texts)


def make_grid(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """Images (N, 3, H, W), float in [-1, 1] or uint8 -> one uint8 picture (3, height, width), row by row on
    white.
    """
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] != 3 or columns < 1:
        given = f"{tuple(images.shape)} and {columns} columns"
        raise ValueError(f"a grid takes images (N, 3, H, W), N >= 1, and at least 1 column, not {given}")
    pixels = images.cpu() if images.dtype == torch.uint8 else to_uint8(images.cpu())
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    outer = (rows * (height + padding) - padding, columns * (width + padding) - padding)
    grid = torch.full((3, *outer), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + padding), (i % columns) * (width + padding)
        grid[:, top : top + height, left : left + width] = image
    return grid


SEEN = 96
"""Pixels a side from which a picture in a grid is large enough to see; a smaller one is enlarged."""
FONT_SIZE = 13


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and knows Latin, Greek, Cyrillic and more; Pillow's own knows ASCII."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None, "a dependency"
    assert spec.origin is not None
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", FONT_SIZE)


def can_write(text: str) -> bool:
    """Whether titles can have all letters of a text; they have no Chinese, for example."""
    font = _font()
    missing = bytes(font.getmask("\uffff"))
    return all(letter.isspace() or bytes(font.getmask(letter)) != missing for letter in {*text})


def enlarged(images: Tensor, factor: int | None = None) -> Tensor:
    """Images (N, 3, H, W) with every pixel repeated `factor` times in both directions; by default by the smallest whole
    number that makes their shorter side at least SEEN.
    """
    factor = max(1, -(-SEEN // min(images.shape[-2:]))) if factor is None else factor
    return images.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def grid_with_titles(
    images: Tensor,
    columns: int,
    *,
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    padding: int = 2,
    enlarge: int | None = None,
) -> Tensor:
    """`make_grid` with titles left of the rows and above the columns -> uint8 (3, height, width).

    enlarge: whole number by which every pixel is repeated; None makes small images large enough to see.
    """
    _check_titles("row", row_titles, -(-len(images) // columns))
    _check_titles("column", column_titles, columns)
    pixels = enlarged(images, enlarge)
    grid = make_grid(pixels, columns, padding)
    font = _font()
    lines = [line for title in row_titles for line in title.splitlines()]
    margin = max((int(font.getlength(line)) + 8 for line in lines), default=0)
    top = max((_lines(title) for title in column_titles), default=0) * (FONT_SIZE + 3)
    page = Image.new("RGB", (margin + grid.shape[2], top + grid.shape[1]), "white")
    page.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (margin, top))
    draw = ImageDraw.Draw(page)
    height, width = pixels.shape[2] + padding, pixels.shape[3] + padding
    for i, title in enumerate(row_titles):
        place = (margin - 5, top + i * height + height // 2)
        draw.multiline_text(place, title, fill="black", font=font, anchor="rm", align="right")
    for i, title in enumerate(column_titles):
        place = (margin + i * width + width // 2, 1)
        draw.multiline_text(place, title, fill="black", font=font, anchor="ma", align="center")
    return torch.from_numpy(np.array(page)).permute(2, 0, 1)


def labelled_grid(groups: Sequence[tuple[str, Tensor]], columns: int = 8) -> Tensor:
    """Labels, each with its images (n, 3, H, W), float in [-1, 1] or uint8 -> one uint8 picture (3, height, width).

    A label has a row, or several of `columns` images, and stands beside the first. Where no label has more than one
    image, `columns` of them share a row, each under its label. Small images are enlarged; long labels are shortened.
    """
    if max((len(images) for _, images in groups), default=0) == 1:
        cells = [_under(label, enlarged(images)) for label, images in groups]
        tallest = max(cell.shape[1] for cell in cells)  # titles of one line or of two
        level = [torch.nn.functional.pad(cell, (0, 0, tallest - cell.shape[1], 0), value=255) for cell in cells]
        return make_grid(torch.stack(level), min(columns, len(level)), padding=4)
    longest = min(columns, max((len(images) for _, images in groups), default=0))
    rows, titles = [], []
    for label, images in groups:
        pixels = images.cpu() if images.dtype == torch.uint8 else to_uint8(images.cpu())
        for start in range(0, len(pixels), longest):
            row = pixels[start : start + longest]
            blank = row.new_full((longest - len(row), *row.shape[1:]), 255)
            rows.append(torch.cat([row, blank]))
            titles.append("\n".join(textwrap.wrap(label, 24, max_lines=4, placeholder=" ...")) if not start else "")
    return grid_with_titles(torch.cat(rows or [torch.empty(0, 3, 1, 1)]), max(longest, 1), row_titles=titles)


def _under(label: str, image: Tensor) -> Tensor:
    """One image (1, 3, H, W) under its label, in at most two lines -> uint8 (3, more than H, W)."""
    pixels = image[0].cpu() if image.dtype == torch.uint8 else to_uint8(image[0].cpu())
    font = _font()
    letters = max(4, int(pixels.shape[2] * len(label) / max(font.getlength(label), 1)))  # that fit, on average
    title = "\n".join(textwrap.wrap(label, letters, max_lines=2, placeholder=" ..."))
    strip = Image.new("RGB", (pixels.shape[2], _lines(title) * (FONT_SIZE + 3) + 2), "white")
    place = (pixels.shape[2] // 2, 0)
    ImageDraw.Draw(strip).multiline_text(place, title, fill="black", font=font, anchor="ma", align="center", spacing=1)
    return torch.cat([torch.from_numpy(np.array(strip)).permute(2, 0, 1), pixels], dim=1)


def _lines(title: str) -> int:
    return title.count("\n") + 1


def _check_titles(what: str, titles: Sequence[str], allowed: int) -> None:
    if len(titles) not in (0, allowed):
        raise ValueError(f"{len(titles)} {what} titles for {allowed} {what}s; give one each, or none")
