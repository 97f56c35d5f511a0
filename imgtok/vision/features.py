"""Networks that turn images into features, as scores see them: what they are called with and what they give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Features:
    """What a network says of B images: `pool` (B, D); `spatial` (B, S) and `logits` (B, C) where it has them."""

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class FeatureExtractor(Protocol):
    """`name` stands in the names of scores, `width` is the number D of pooled features. Called with uint8 images
    (B, 3, H, W).
    """

    name: str
    width: int

    def __call__(self, images: Tensor) -> Features: ...


class KeepsLast(Generic[T]):
    """A function of a tensor that remembers its last result, for as long as it is given the same tensor object."""

    def __init__(self, function: Callable[[Tensor], T]) -> None:
        self._function = function
        self._last: tuple[Tensor, T] | None = None

    def __call__(self, tensor: Tensor) -> T:
        if self._last is None or self._last[0] is not tensor:
            self._last = tensor, self._function(tensor)
        return self._last[1]


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32: scores differ in the second decimal otherwise."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul.allow_tf32
        try:
            torch.backends.cuda.matmul.allow_tf32 = False
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = matmul
