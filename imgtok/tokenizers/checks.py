"""What tokenizers check of what they are given, with messages for users."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from imgtok.tokenizers.tokens import Tokens


def token_counts(num_tokens: int | Sequence[int] | None, batch: int, most: int) -> list[int]:
    """One number of tokens for each image, all of them for None. Raises ValueError outside 1..`most`."""
    if num_tokens is None or isinstance(num_tokens, int):
        counts = [most if num_tokens is None else num_tokens] * batch
    else:
        counts = list(num_tokens)
    if len(counts) != batch or not counts:
        raise ValueError(f"num_tokens: {len(counts)} numbers for {batch} images")
    for count in counts:
        if not 1 <= count <= most:
            raise ValueError(f"num_tokens: this tokenizer has 1 to {most} tokens an image, asked for {count}")
    return counts


def check_tokens(tokens: Tokens, indices: Sequence[int] | None, most: int) -> None:
    """Raises ValueError for an empty batch, lengths outside 1..`most`, and another number of indices than rows."""
    columns = tokens.ids.shape[1]
    if not len(tokens):
        raise ValueError("there are no tokens to decode: the batch is empty")
    if indices is not None and len(indices) != len(tokens):
        raise ValueError(f"indices: {len(indices)} numbers for {len(tokens)} sequences of tokens")
    fewest, longest = torch.stack(tokens.lengths.aminmax()).tolist()
    if columns > most or fewest < 1 or longest > columns:
        raise ValueError(
            f"decode takes 1 to {most} tokens an image, got lengths {fewest} to {longest} in {columns} columns"
        )


def check_finite(images: Tensor, rows: Sequence[int]) -> None:
    """Raises ValueError that names the first of the images `rows` with a pixel that is NaN or infinite."""
    bad = ~images.isfinite().flatten(1).all(dim=1)
    if bool(bad.any()):
        row = rows[int(bad.nonzero()[0])]
        raise ValueError(f"image {row} has pixels that are not finite (NaN or infinite); images lie in [-1, 1]")
