"""What `KARL.encode` gives."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok.tokenizers.tokens import Tokens


@dataclass(frozen=True)
class KARLTokens(Tokens):
    """The kept tokens of each image, in the order of their slots, and what the encoder said of all T slots.

    `lengths` are the counts, the complexity of the images; the first `lengths[b]` columns of `ids` (or `vectors`) and
    `slots` are meant. On another device (`to`) they are the same; rows that are taken out of them, cut, padded, saved
    or joined are plain `Tokens`.
    """

    probabilities: Tensor | None = None
    """(B, T) float32: the probability of each slot's not being needed."""
    kept: Tensor | None = None
    """(B, T) bool: which slots are kept; one at least, that which is needed most."""
    bins: Tensor | None = None
    """(B,) int64: which of the tolerances each image was encoded for."""
    errors: Tensor | None = None
    """(B,) float32: the error of the decoded image, where it was measured (`verify`)."""

    def to(self, device: torch.device | str) -> KARLTokens:
        """The same on another device, with all that the encoder said."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: value.to(device, non_blocking=True) for name, value in values.items() if value is not None}
        )

    def updated(self, rows: Tensor, others: KARLTokens, chosen: Tensor) -> KARLTokens:
        """The same with other tokens in some rows: the `chosen` ones of `others`, which were encoded alike."""
        pairs = {field.name: (getattr(self, field.name), getattr(others, field.name)) for field in fields(self)}
        changed = {
            name: mine.index_copy(0, rows, theirs[chosen]) for name, (mine, theirs) in pairs.items() if mine is not None
        }
        return replace(self, **changed)

    @property
    def soft_counts(self) -> Tensor:
        """(B,) the sum of the probabilities of being needed: a count that does not jump as the input changes."""
        assert self.probabilities is not None
        return (1 - self.probabilities).sum(dim=1)


def keep(probabilities: Tensor, threshold: float) -> Tensor:
    """Which slots are kept (B, T): those whose probability of not being needed (B, T) is at most the threshold, and of
    an image where that is none the one that is needed most, since an image has at least one token.
    """
    kept = probabilities <= threshold
    most_needed = F.one_hot(probabilities.argmin(dim=1), probabilities.shape[1]).bool()
    return kept | (most_needed & ~kept.any(dim=1, keepdim=True))
