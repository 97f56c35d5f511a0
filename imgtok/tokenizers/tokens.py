"""Token sequences of different lengths in one batch: what every tokenizer returns and accepts.

A file of them holds only what is meant: the rows one after the other, 16 bits a token where the ids allow it, and the
lengths (`Tokens.save`, `Tokens.load`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from imgtok.files import replacing


@dataclass(frozen=True)
class Tokens:
    """`ids` (B, K) int64, of which the first `lengths[b]` of row b are meant; the rest is padding."""

    ids: Tensor
    lengths: Tensor

    @classmethod
    def full(cls, ids: Tensor) -> Tokens:
        """Rows that use every column."""
        return cls(ids, torch.full((ids.shape[0],), ids.shape[1], dtype=torch.long, device=ids.device))

    def truncate(self, num_tokens: int | Sequence[int]) -> Tokens:
        """Keeps at most the first `num_tokens` of each row (at least 1), a number each or one for all."""
        counts = [num_tokens] * len(self) if isinstance(num_tokens, int) else list(num_tokens)
        if len(counts) != len(self):
            raise ValueError(f"truncate: {len(counts)} numbers of tokens for {len(self)} sequences")
        if counts and not min(counts) >= 1:
            raise ValueError(f"a sequence keeps at least 1 token, not {min(counts)}")
        lengths = torch.minimum(self.lengths, torch.tensor(counts, device=self.lengths.device))
        return Tokens(self.ids[:, : max(counts, default=0)], lengths)

    def padded(self) -> Tokens:
        """The same with zeros for padding."""
        behind = torch.arange(self.ids.shape[1], device=self.ids.device) >= self.lengths.to(self.ids.device)[:, None]
        return Tokens(self.ids.masked_fill(behind, 0), self.lengths)

    def save(self, path: Path | str) -> None:
        """Writes a safetensors file: ids (sum of lengths,) in 16 bits if they fit, else 32, and lengths (B,)."""
        meant = torch.arange(self.ids.shape[1]) < self.lengths.cpu()[:, None]
        ids = self.ids.cpu()[meant].numpy()
        if ids.size and ids.min() < 0:
            raise ValueError(f"token ids are not negative, got {ids.min()}")
        narrow = ids.astype(np.uint16 if ids.size == 0 or ids.max() < 1 << 16 else np.uint32)
        arrays = {"ids": narrow, "lengths": self.lengths.cpu().numpy().astype(np.int32)}
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(save(arrays, {"imgtok": "tokens"}))

    @classmethod
    def load(cls, path: Path | str) -> Tokens:
        """What `save` wrote; ValueError for any other file."""
        try:
            with safe_open(path, framework="np") as file:
                if (file.metadata() or {}).get("imgtok") != "tokens":
                    raise ValueError(f"{path}: not a file of tokens (Tokens.save writes one)")
                ids, lengths = (file.get_tensor(name) for name in ("ids", "lengths"))
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole file of tokens ({error}); copy it again") from error
        if lengths.sum() != ids.size or (lengths.size and lengths.min() < 1):
            raise ValueError(f"{path}: {ids.size} tokens in {lengths.size} rows of other lengths; copy it again")
        columns = int(lengths.max()) if lengths.size else 0
        rows = np.zeros((lengths.size, columns), dtype=np.int64)
        rows[np.arange(columns) < lengths[:, None]] = ids
        return cls(torch.from_numpy(rows), torch.from_numpy(lengths.astype(np.int64)))

    def __len__(self) -> int:
        return self.ids.shape[0]
