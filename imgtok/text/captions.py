"""Text features of different lengths in one batch: what a text encoder makes of captions, and a generator reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Captions:
    """`features` (B, T, W), of which the first `lengths[b]` of row b are meant; the rest is padding of zeros."""

    features: Tensor
    lengths: Tensor

    @classmethod
    def pad(cls, rows: Sequence[Tensor]) -> Captions:
        """From the features (T_b, W) of each caption, padded to the longest. ValueError for one without features."""
        lengths = [len(row) for row in rows]
        if 0 in lengths:
            raise ValueError(f"caption {lengths.index(0)} has no features; an empty text has those of its end mark")
        features = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        return cls(features, torch.tensor(lengths, device=features.device))

    def __len__(self) -> int:
        return len(self.features)

    @property
    def mask(self) -> Tensor:
        """(B, T) boolean: where there are features."""
        return torch.arange(self.features.shape[1], device=self.lengths.device) < self.lengths[:, None]

    def to(self, device: torch.device | str) -> Captions:
        """The same captions on another device."""
        return Captions(self.features.to(device, non_blocking=True), self.lengths.to(device, non_blocking=True))

    def pin_memory(self) -> Captions:
        """The same captions in page-locked memory."""
        return Captions(self.features.pin_memory(), self.lengths.pin_memory())

    def widen(self, columns: int) -> Captions:
        """The same captions, padded to at least `columns`."""
        missing = max(0, columns - self.features.shape[1])
        return Captions(F.pad(self.features, (0, 0, 0, missing)), self.lengths) if missing else self

    def repeat(self, count: int) -> Captions:
        """One caption, `count` times."""
        assert len(self) == 1
        return Captions(self.features.expand(count, -1, -1), self.lengths.expand(count))

    def followed_by(self, others: Captions) -> Captions:
        """These rows, then those of `others`."""
        columns = max(self.features.shape[1], others.features.shape[1])
        parts = (self.widen(columns), others.widen(columns))
        return Captions(torch.cat([part.features for part in parts]), torch.cat([part.lengths for part in parts]))

    def replaced(self, rows: Tensor, others: Captions) -> Captions:
        """These captions, but those of `others` where `rows` (B,) is true."""
        columns = max(self.features.shape[1], others.features.shape[1])
        mine, theirs = self.widen(columns), others.widen(columns)
        features = torch.where(rows[:, None, None], theirs.features, mine.features)
        return Captions(features, torch.where(rows, theirs.lengths, mine.lengths))
