"""What every tokenizer is to the programs: losses to train by, `encode` to tokens, `decode` to images.

A new tokenizer derives from `Tokenizer`; training, caching, sampling and evaluation then take it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from imgtok.flow import OnStep
from imgtok.hub import Pretrained
from imgtok.tokenizers.tokens import Tokens


class Losses(NamedTuple):
    """`total` is what training minimises; `parts` are named scalars for the log."""

    total: Tensor
    parts: dict[str, Tensor]


class Tokenizer(nn.Module, Pretrained):
    """Images are (B, 3, H, W) in [-1, 1]. Calling the module with images and `generator` gives its `Losses`."""

    @property
    def image_size(self) -> int:
        """Pixels a side of the images that it was made for."""
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        """The most tokens an image can have."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Token ids lie in [0, vocab_size)."""
        raise NotImplementedError

    @property
    def levels(self) -> tuple[int, ...]:
        """Radices of the digits that make a token id, least significant first; empty if ids have no digits."""
        return ()

    def encode(self, images: Tensor, *, num_tokens: int | None = None) -> Tokens:
        """The first `num_tokens` tokens of each image, all by default."""
        raise NotImplementedError

    def decode(
        self,
        tokens: Tokens,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images of tokens; what is random in row b depends on (seed, indices[b]) alone."""
        raise NotImplementedError


def powers_of_two(count: int) -> list[int]:
    """1, 2, 4, ... up to `count`, which is always the last: the token counts that a tokenizer is judged at."""
    return [2**i for i in range((count - 1).bit_length())] + [count]
