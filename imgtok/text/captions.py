"""Captions in one batch: the features that a text encoder made of them, and which of them are seen how strongly.

Shapes: B captions, T columns, W channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Captions:
    """Features of captions of any length. A column is padding, or a hole, where the mask is false: it is not seen."""

    features: Tensor
    """(B, T, W)."""
    mask: Tensor
    """(B, T) boolean: the columns that are seen. Each caption has one at least; they need not be the first ones."""
    log_weights: Tensor | None = None
    """(B, T), or None for zeros: what is added to a column's attention logits. log 2 counts a column twice."""
    spans: Tensor | None = None
    """(B, T, 2) int64, or None: the characters [start, stop) of its text that a column stands for; [0, 0) for none."""

    @classmethod
    def pad(cls, rows: Sequence[Tensor], spans: Sequence[Tensor] | None = None) -> Captions:
        """From the features (T_b, W), and spans (T_b, 2) if known, of each caption, padded to the longest with zeros.

        Raises ValueError for a caption without features.
        """
        lengths = [len(row) for row in rows]
        if 0 in lengths:
            raise ValueError(f"caption {lengths.index(0)} has no features; an empty text has those of its marks")
        pad, longest = torch.nn.utils.rnn.pad_sequence, max(lengths, default=0)
        mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
        features = pad(list(rows), batch_first=True)
        return cls(
            features,
            mask.to(features.device),
            spans=None if spans is None else pad(list(spans), batch_first=True),
        )

    @classmethod
    def cat(cls, parts: Sequence[Captions]) -> Captions:
        """The captions of one batch after those of another. Spans are kept if all have them."""
        columns = max(part.features.shape[1] for part in parts)
        wide = [part.widen(columns) for part in parts]
        weights = None
        if any(part.log_weights is not None for part in parts):
            weights = torch.cat([part._filled_weights() for part in wide])
        spans = [part.spans for part in wide if part.spans is not None]
        return cls(
            torch.cat([part.features for part in wide]),
            torch.cat([part.mask for part in wide]),
            weights,
            torch.cat(spans) if len(spans) == len(parts) else None,
        )

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Captions:
        """Some of the captions, with all columns."""
        chosen = torch.as_tensor(rows) if not isinstance(rows, slice | Tensor) else rows
        return Captions(**{name: value[chosen] for name, value in self._tensors().items()})

    @property
    def lengths(self) -> Tensor:
        """(B,): how many columns of each are seen."""
        return self.mask.sum(dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, 1, 1, T), for attention: boolean, or additive where columns have weights."""
        if self.log_weights is None:
            return self.mask[:, None, None]
        return self.log_weights.masked_fill(~self.mask, -torch.inf)[:, None, None]

    def columns(self, row: int, start: int, stop: int) -> list[int]:
        """The columns that stand for any of the characters [start, stop) of a caption's text.

        Raises ValueError for captions whose encoder gave no spans.
        """
        if self.spans is None:
            raise ValueError("these captions have no spans: their encoder did not say which characters are whose")
        first, last = self.spans[row].unbind(-1)
        found = self.mask[row] & (first < stop) & (last > start)
        columns: list[int] = found.nonzero().flatten().tolist()
        return columns

    def to(self, device: torch.device | str) -> Captions:
        """The same captions on another device."""
        return Captions(**{name: value.to(device, non_blocking=True) for name, value in self._tensors().items()})

    def pin_memory(self) -> Captions:
        """The same captions in page-locked memory."""
        return Captions(**{name: value.pin_memory() for name, value in self._tensors().items()})

    def widen(self, columns: int) -> Captions:
        """The same captions, padded to at least `columns`."""
        missing = columns - self.features.shape[1]
        if missing <= 0:
            return self
        return Captions(
            F.pad(self.features, (0, 0, 0, missing)),
            F.pad(self.mask, (0, missing)),
            None if self.log_weights is None else F.pad(self.log_weights, (0, missing)),
            None if self.spans is None else F.pad(self.spans, (0, 0, 0, missing)),
        )

    def aligned_right(self, columns: int) -> Captions:
        """The same captions in `columns`, each moved so that the last column that is seen is the last; zeros fill up.

        Holes stay where they are in a caption. What does not fit falls off its beginning.
        """
        length = self.features.shape[1]
        unseen_after = self.mask.flip(1).int().argmax(dim=1)  # (B,) columns after the last that is seen
        source = torch.arange(columns, device=self.mask.device) - columns + length - unseen_after[:, None]
        there, source = source >= 0, source.clamp(min=0)

        def moved(values: Tensor) -> Tensor:
            shape = (*source.shape, *[1] * (values.ndim - 2))
            taken = values.gather(1, source.view(shape).expand(*source.shape, *values.shape[2:]))
            return taken.masked_fill(~there.view(shape), 0)

        return Captions(**{name: moved(value) for name, value in self._tensors().items()})

    def repeat(self, count: int) -> Captions:
        """One caption, `count` times."""
        assert len(self) == 1
        return Captions(**{name: value.expand(count, *value.shape[1:]) for name, value in self._tensors().items()})

    def replaced(self, rows: Tensor, others: Captions) -> Captions:
        """These captions, but those of `others` where `rows` (B,) is true. Spans are kept if both have them."""
        columns = max(self.features.shape[1], others.features.shape[1])
        mine, theirs = self.widen(columns), others.widen(columns)
        weights = spans = None
        if mine.log_weights is not None or theirs.log_weights is not None:
            weights = torch.where(rows[:, None], theirs._filled_weights(), mine._filled_weights())
        if mine.spans is not None and theirs.spans is not None:
            spans = torch.where(rows[:, None, None], theirs.spans, mine.spans)
        return Captions(
            torch.where(rows[:, None, None], theirs.features, mine.features),
            torch.where(rows[:, None], theirs.mask, mine.mask),
            weights,
            spans,
        )

    def _filled_weights(self) -> Tensor:
        if self.log_weights is not None:
            return self.log_weights
        return torch.zeros(self.mask.shape, device=self.mask.device)

    def _tensors(self) -> dict[str, Tensor]:
        """The fields that are there."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}
