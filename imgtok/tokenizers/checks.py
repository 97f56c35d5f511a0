"""What tokenizers check of what they are given, with messages for users."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from imgtok.sizes import Size
from imgtok.tokenizers.tokens import Tokens


def check_widths(block_channels: Sequence[int], norm_groups: int) -> None:
    """Raises ValueError for widths of levels that group normalisation cannot divide."""
    for width in block_channels:
        if width < 1 or width % norm_groups:
            raise ValueError(f"block_channels: {width} is not a positive multiple of norm_groups = {norm_groups}")


def token_counts(num_tokens: int | Sequence[int] | None, batch: int, most: int) -> list[int]:
    """One number of tokens for each image, all of them for None. Raises ValueError outside 1..`most`."""
    if num_tokens is None or isinstance(num_tokens, int):
        counts = [most if num_tokens is None else num_tokens] * batch
    else:
        counts = list(num_tokens)
    if not batch:
        raise ValueError("there are no images to encode: the batch is empty")
    if len(counts) != batch:
        raise ValueError(f"num_tokens: {len(counts)} numbers for {batch} images")
    for count in counts:
        if not 1 <= count <= most:
            raise ValueError(f"num_tokens: this tokenizer has 1 to {most} tokens an image, asked for {count}")
    return counts


def check_tokens(
    tokens: object,
    indices: Sequence[int] | None,
    most: int,
    *,
    num_slots: int | None = None,
    vocab_size: int | None = None,
) -> tuple[int, int]:
    """The fewest and the most tokens of an image, read from the device once.

    Raises ValueError for what are no `Tokens`, an empty batch, lengths outside 1..`most`, and another number of indices
    than rows; where `num_slots` is given for slots outside [0, num_slots) or that do not increase along a row, and
    where `vocab_size` is for ids outside [0, vocab_size).
    """
    if not isinstance(tokens, Tokens):
        raise ValueError(
            f"decode takes Tokens, not a {type(tokens).__name__}; Tokens.full(ids) makes them of ids (B, K)"
        )
    columns = tokens.ids.shape[1]
    if not len(tokens):
        raise ValueError("there are no tokens to decode: the batch is empty")
    if indices is not None and len(indices) != len(tokens):
        raise ValueError(f"indices: {len(indices)} numbers for {len(tokens)} sequences of tokens")
    ids_of, slots = vocab_size is not None, tokens.slots if num_slots is not None else None
    read = [*tokens.lengths.to(tokens.device).aminmax()]
    if columns and (ids_of or slots is not None):
        padding = ~tokens.mask
        read += tokens.ids.masked_fill(padding, 0).aminmax() if ids_of else ()
        if slots is not None:
            increases = (slots.diff(dim=1) > 0) | padding[:, 1:]
            read += [*slots.masked_fill(padding, 0).aminmax(), increases.all().long()]
    fewest, longest, *found = torch.stack(read).tolist()
    if columns > most or fewest < 1 or longest > columns:
        raise ValueError(
            f"decode takes 1 to {most} tokens an image, got lengths {fewest} to {longest} in {columns} columns"
        )
    if vocab_size is not None:
        low, high, *found = found
        if low < 0 or high >= vocab_size:
            raise ValueError(f"token ids must lie in [0, {vocab_size}); got {low} to {high}")
    if num_slots is not None and found:
        low, high, increase = found
        if low < 0 or high >= num_slots:
            raise ValueError(f"slots: this tokenizer has the slots 0 to {num_slots - 1}, given {low} to {high}")
        if not increase:
            raise ValueError("slots: those of an image's tokens increase along its row, each of them once")
    return fewest, longest


def check_whole(tokens: Tokens, indices: Sequence[int] | None, count: int, vocab_size: int) -> None:
    """Raises ValueError unless every image has all its `count` tokens, and as `check_tokens` does."""
    fewest, _ = check_tokens(tokens, indices, count, vocab_size=vocab_size)
    if tokens.ids.shape[1] < count or not bool((tokens.lengths == count).all()):
        raise ValueError(f"decode: an image of this tokenizer has {count} tokens, and one has {fewest}")


def check_side(images: Tensor, side: int) -> None:
    """Raises ValueError unless images (B, 3, H, W) are `side` pixels a side."""
    rows, columns = images.shape[-2:]
    if (rows, columns) != (side, side):
        raise ValueError(
            f"this tokenizer takes images of {side} x {side} pixels, given {rows} x {columns}; "
            f"imgtok.preprocess(pictures, {side}) makes them so"
        )


OVERSHOOT = 1.5
"""Pixels up to here, and down to its negative, are taken: resizing and decoders overshoot the ends of [-1, 1]."""


def check_images(images: object, size: Size | str = "SIZE", rows: Sequence[int] | None = None) -> None:
    """Raises ValueError, with the remedy, unless `images` are float images (B, 3, H, W) in [-1, 1].

    `size` is the one that the model wants, for the message; `rows` are their numbers, by default 0, 1, ...
    A batch without any dark pixel may be one in [0, 1]: with a pixel of nearly 0, which no picture of 8 bits has in
    [-1, 1], that is certain and refused, else a warning says so.
    """
    wanted = "encode takes float images (B, 3, H, W) in [-1, 1]"
    ready = f"imgtok.preprocess(pictures, {size})"
    if not isinstance(images, Tensor):
        first = next(iter(images), None) if isinstance(images, Sequence) else None
        given = f"a {type(images).__name__}" + (f" of {type(first).__name__}" if first is not None else "")
        raise ValueError(f"{wanted}, not {given}; {ready} makes them of Pillow images, uint8 arrays and paths")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{wanted}, not {tuple(images.shape)}{_remedy_of_shape(images)}")
    if not images.is_floating_point():
        raise ValueError(
            f"{wanted}, not {images.dtype}; of pixels in 0..255 that is images / 127.5 - 1, or use {ready}"
        )
    if not images.numel():
        raise ValueError(f"{wanted}, and at least one")
    low, high = torch.stack(images.detach().float().aminmax()).tolist()
    if not low > -float("inf") or not high < float("inf"):
        check_finite(images, rows or range(len(images)))
    if low >= 0 and high > 200:
        raise ValueError(f"{wanted}; these lie in [{low:g}, {high:g}], as in 0..255: give images / 127.5 - 1")
    if max(-low, high) > OVERSHOOT:
        raise ValueError(f"{wanted}; these lie in [{low:.3g}, {high:.3g}]: scale them, or use {ready}")
    if low >= 0 and high > 0:
        told = f"these lie in [{low:.3g}, {high:.3g}]"
        # one dark pixel may be chance: a bright picture that a decoder made, for instance
        if high <= 1 and int((images < 0.5 / 255).sum()) > 1:
            raise ValueError(f"{wanted}; {told}, as in [0, 1]: give images * 2 - 1, or use {ready}")
        warnings.warn(f"{wanted}; {told}: if they are meant in [0, 1], give images * 2 - 1", stacklevel=3)


def _remedy_of_shape(images: Tensor) -> str:
    """What makes images of a tensor of another shape."""
    if images.ndim == 3 and images.shape[0] == 3:
        return "; one image is a batch of one, images[None]"
    if images.ndim == 4 and images.shape[1] == 1:
        return "; grey images are images.expand(-1, 3, -1, -1)"
    if images.ndim == 4 and images.shape[-1] == 3:
        return "; channels come first, images.permute(0, 3, 1, 2)"
    if images.ndim == 4 and images.shape[1] == 4:
        return "; there is no transparency, images[:, :3]"
    return ""


def check_finite(images: Tensor, rows: Sequence[int]) -> None:
    """Raises ValueError that names the first of the images `rows` with a pixel that is NaN or infinite."""
    bad = ~images.isfinite().flatten(1).all(dim=1)
    if bool(bad.any()):
        row = rows[int(bad.nonzero()[0])]
        raise ValueError(f"image {row} has pixels that are not finite (NaN or infinite); images lie in [-1, 1]")
