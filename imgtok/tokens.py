"""Token sequences of different lengths in one batch: what every tokenizer returns and accepts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """`ids` (B, K) int64, of which the first `lengths[b]` of row b are meant; the rest is padding."""

    ids: Tensor
    lengths: Tensor

    @classmethod
    def full(cls, ids: Tensor) -> Tokens:
        """Rows that use every column."""
        return cls(ids, torch.full((ids.shape[0],), ids.shape[1], dtype=torch.long, device=ids.device))

    def truncate(self, num_tokens: int) -> Tokens:
        """Keeps at most the first `num_tokens` of each row (at least 1)."""
        if not num_tokens >= 1:
            raise ValueError(f"a sequence keeps at least 1 token, not {num_tokens}")
        return Tokens(self.ids[:, :num_tokens], self.lengths.clamp(max=num_tokens))

    def __len__(self) -> int:
        return self.ids.shape[0]
