"""What is measured of each image: how many tokens it needs for each error that is allowed, and which errors are left.

The tokenizer encodes each image once for all of it (`Tokenizer.encode_at`); it decodes only where an error is wanted.
Errors are mean absolute differences of pixels in [0, 1], before these are rounded to 256 levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imgtok.data.images import ImageSource
from imgtok.data.loaders import UnreadableImages, eval_loader
from imgtok.metrics.accumulate import Rows
from imgtok.runtime import Blocks
from imgtok.tokenizers.base import Rate, Tokenizer, powers_of_two

Array = np.ndarray


@dataclass(frozen=True)
class Request:
    """What a tokenizer is asked for with each image."""

    eps: tuple[float, ...]
    """The errors that are allowed, ascending; at least one."""
    budget: int
    """The most tokens that an image may have then."""
    counts: tuple[int, ...]
    """Fixed numbers of tokens whose errors are measured too, ascending."""
    errors: bool
    """Whether errors are measured at all."""

    @property
    def rates(self) -> list[Rate]:
        """What is encoded: at each eps, then with each fixed number of tokens."""
        return [*(Rate(self.budget, eps) for eps in self.eps), *(Rate(count) for count in self.counts)]

    @property
    def columns(self) -> int:
        """Numbers of an image: its tokens at each eps, then the error at each rate."""
        return len(self.eps) + (len(self.rates) if self.errors else 0)


def request_for(
    model: Tokenizer, eps: Sequence[float], budget: int | None, counts: Sequence[int], errors: bool
) -> Request:
    """What is asked for, with what the model lists (`rates`) where nothing is given: its errors that are allowed, its
    largest budget; and an eighth, a quarter, a half and all of the budget as fixed numbers, if it takes those.

    Raises ValueError for a model whose images all have the same number of tokens, and for what the model does not take.
    """
    if model.fixed_length:
        raise ValueError(
            f"model: every image has as many tokens as it is told to with {type(model).__name__}, so that none chooses "
            "its number, which is what is measured here: name a tokenizer that chooses by an error; `imgtok evaluate "
            "tokenizer=MODEL` scores any at each number of tokens"
        )
    listed = [rate for rate in model.rates() if rate.tolerance is not None]
    eps = sorted({*eps} or {rate.tolerance for rate in listed if rate.tolerance is not None})
    if not eps:
        raise ValueError("eps: this tokenizer lists no errors that may be allowed: name some, such as eps=0.05,0.1")
    budget = max((rate.num_tokens for rate in listed), default=model.num_tokens) if budget is None else budget
    for name, count in [("budget", budget), *(("counts", count) for count in counts)]:
        if count > model.num_tokens:
            raise ValueError(f"{name}: this tokenizer has 1 to {model.num_tokens} tokens an image, given {count}")
    chosen = sorted({*counts})
    if errors and not chosen and all(_takes(model, Rate(count)) for count in _parts(budget)):
        chosen = _parts(budget)
    request = Request(tuple(eps), budget, tuple(chosen) if errors else (), errors)
    for rate in request.rates:
        model.check_rate(rate)
    return request


def _parts(budget: int) -> list[int]:
    """About an eighth of a budget and what lies between, up to all of it."""
    return sorted({count for count in powers_of_two(budget) if count * 8 >= budget})


def _takes(model: Tokenizer, rate: Rate) -> bool:
    try:
        model.check_rate(rate)
    except ValueError:
        return False
    return True


@torch.no_grad()
def measure(
    model: Tokenizer,
    source: ImageSource,
    places: Sequence[int],
    share: Sequence[int],
    request: Request,
    *,
    seed: int,
    decoding: Any,
    blocks: Blocks,
    batch_size: int,
    unreadable: UnreadableImages,
    on_images: Callable[[int], None] = lambda count: None,
) -> Rows:
    """The numbers of the images at `places` of the source whose numbers there are in `share`, in rows of
    `request.columns`. Rows of others, and of images that cannot be read, stay empty.
    """
    found = Rows(len(places), request.columns)
    number = {places[index]: index for index in share}
    for batch in eval_loader(source, batch_size, indices=list(number), unreadable=unreadable):
        with blocks.computing():
            for rows in blocks.of(len(batch.images)):
                padded = blocks.padded(rows)
                images, noise_of = batch.images[padded].to(blocks.device), [batch.indices[row] for row in padded]
                numbers = _measure(model, images, noise_of, request, seed, decoding)[: len(rows)]
                found.update([number[batch.indices[row]] for row in rows], numbers)
        on_images(len(batch.images))
    return found


def _measure(
    model: Tokenizer, images: Tensor, noise_of: Sequence[int], request: Request, seed: int, decoding: Any
) -> Tensor:
    """(B, columns) float32."""
    encoded = model.encode_at(images, request.rates)
    numbers = [tokens.lengths.float() for tokens in encoded[: len(request.eps)]]
    for tokens in encoded if request.errors else ():
        decoded = model.decode(tokens, seed=seed, indices=noise_of, decoding=decoding).float().clamp(-1, 1)
        numbers.append((decoded - images).abs().mean(dim=(1, 2, 3)) / 2)
    return torch.stack([column.to(images.device) for column in numbers], dim=1)


@dataclass(frozen=True)
class Measured:
    """The numbers of N images that could be read, in the order of their places."""

    request: Request
    places: Array
    """(N,) int64, in their source."""
    names: tuple[str, ...]
    """Their files or rows."""
    labels: tuple[str, ...] | None
    """Their classes by name, or by number where these have no names; None without labels."""
    tokens: Mapping[float, Array]
    """At each eps (N,) int64: KC(eps)."""
    errors: Mapping[float, Array]
    """At each eps (N,); empty where no errors are measured."""
    fixed: Mapping[int, Array]
    """With each fixed number of tokens the errors (N,)."""

    @classmethod
    def of(cls, rows: Rows, source: ImageSource, places: Sequence[int], request: Request) -> Measured:
        """What `measure` found, of all processes together."""
        there = (rows.filled > 0).nonzero().squeeze(1).tolist()
        chosen = np.array([places[row] for row in there], dtype=np.int64)
        columns = iter(rows.values[there].T.numpy())
        tokens = {eps: next(columns).astype(np.int64) for eps in request.eps}
        errors = {eps: next(columns) for eps in request.eps if request.errors}
        fixed = {count: next(columns) for count in request.counts}
        labels = None
        if source.num_classes:
            numbers = source.labels[chosen].tolist()
            labels = tuple(source.class_names[n] if n < len(source.class_names) else str(n) for n in numbers)
        names = tuple(source.name(place) for place in chosen.tolist())
        return cls(request, chosen, names, labels, tokens, errors, fixed)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def gain(self) -> Array | None:
        """(N,) what more tokens are good for: the error with the fewest of the fixed numbers of tokens less that with
        the most (delta of section 5 of arXiv 2507.07995); None without two such numbers.
        """
        if len(self.fixed) < 2:
            return None
        return self.fixed[min(self.fixed)] - self.fixed[max(self.fixed)]

    @property
    def most_telling(self) -> float:
        """The eps at which the numbers of tokens differ most between images (by their standard deviation)."""
        return max(self.request.eps, key=lambda eps: float(self.tokens[eps].std()))

    def order(self, eps: float) -> Array:
        """(N,) all images, the simplest first: by KC(eps); among equals by KC at the other eps, the loosest first,
        then by the error that is left with the most tokens, then by place.
        """
        others = [other for other in reversed(self.request.eps) if other != eps]
        keys = [self.tokens[eps], *(self.tokens[other] for other in others)]
        if self.request.errors:
            left = self.fixed[max(self.fixed)] if self.fixed else self.errors[min(self.errors)]
            keys.append(left.round(6))  # the last bits depend on what else was computed with an image
        return np.lexsort([self.places, *reversed(keys)])
