"""What the programs expect of every tokenizer: a loss to train, `encode` to tokens, `decode` to images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from imgtok.tokens import Tokens


class Losses(NamedTuple):
    """`total` is what training minimises; `parts` are named scalars for the log."""

    total: Tensor
    parts: dict[str, Tensor]


class Tokenizer(Protocol):
    """Images are (B, 3, H, W) in [-1, 1]. Calling the module gives its training losses."""

    @property
    def image_size(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...

    def __call__(self, images: Tensor, *, generator: torch.Generator) -> Losses: ...

    def encode(self, images: Tensor, *, num_tokens: int | None = None) -> Tokens: ...

    def decode(
        self,
        tokens: Tokens,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Tensor: ...
