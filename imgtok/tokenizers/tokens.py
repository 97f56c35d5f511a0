"""Token sequences of different lengths in one batch: what every tokenizer returns and accepts.

A file of them holds only what is meant: the rows one after the other, 16 bits a token where the ids allow it, the
lengths, and the slots and vectors where there are any (`Tokens.save`, `Tokens.load`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from imgtok.files import replacing
from imgtok.tokenizers.calls import Calls


@dataclass(frozen=True, repr=False)
class Tokens:
    """`ids` (B, K) int64, of which the first `lengths[b]` of row b are meant; the rest is padding.

    `slots` (B, K) int64 says which of the tokenizer's slots each id came from, increasing along a row; None means that
    column k is slot k. Tokens that are no entries of a table are `vectors` (B, K, n), and their ids are all 0. Tokens
    that were drawn may say what that took, in `calls`; no file keeps it.
    """

    ids: Tensor
    lengths: Tensor
    slots: Tensor | None = None
    vectors: Tensor | None = None
    calls: Calls | None = None

    @classmethod
    def full(cls, ids: Tensor) -> Tokens:
        """Rows that use every column."""
        return cls(ids, torch.full((ids.shape[0],), ids.shape[1], dtype=torch.long, device=ids.device))

    @classmethod
    def cat(cls, parts: Sequence[Tokens]) -> Tokens:
        """The rows of several batches, padded to the longest; either all of them have slots (vectors) or none does."""
        columns = max(part.ids.shape[1] for part in parts)
        ids, lengths = [_widen(part.ids, columns) for part in parts], [part.lengths for part in parts]
        counted = [part.calls for part in parts if part.calls is not None]
        further: dict[str, Any] = {"calls": Calls.cat(counted) if len(counted) == len(parts) else None}
        for name in ("slots", "vectors"):
            found = [_widen(value, columns) for part in parts if (value := getattr(part, name)) is not None]
            if found and len(found) < len(parts):
                raise ValueError(f"cat: {len(found)} of {len(parts)} batches of tokens have {name}")
            further[name] = torch.cat(found) if found else None
        return Tokens(torch.cat(ids), torch.cat(lengths), **further)

    @property
    def mask(self) -> Tensor:
        """True where an id is meant, False for padding; (B, K)."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return columns < self.lengths.to(self.ids.device)[:, None]

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __repr__(self) -> str:
        """`Tokens(3 images, 1 to 6 tokens each, slots, cpu)`: numbers stand in `ids` and `lengths`."""
        few, most = (int(self.lengths.min()), int(self.lengths.max())) if len(self) else (0, 0)
        each = f"{few} to {most}" if few < most else f"{most}"
        beside = [name for name in ("slots", "vectors", "calls") if getattr(self, name) is not None]
        images, tokens = f"{len(self)} image{'s'[: len(self) != 1]}", f"{each} token{'s'[: most != 1]} each"
        return f"Tokens({', '.join([images, tokens, *beside, str(self.device)])})"

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray | Tensor) -> Tokens:
        """Some of the rows, in the given order; a number gives that row, as a batch of one. Truth values choose rows.

        Raises IndexError for a row that is not there, TypeError for what is neither of these.
        """
        if isinstance(rows, SupportsIndex) and not getattr(rows, "ndim", 0):
            row = range(len(self))[rows]  # which raises IndexError, where a loop over the rows ends
            return self[row : row + 1]
        chosen: Any = rows
        if isinstance(chosen, slice) and (chosen.step or 1) < 0:
            chosen = range(len(self))[chosen]
        if isinstance(chosen, str) or not isinstance(chosen, slice | Sequence | np.ndarray | Tensor):
            raise TypeError(f"rows of tokens are chosen by numbers, slices or truth values, not {type(rows).__name__}")
        if not isinstance(chosen, slice | Tensor):
            chosen = torch.from_numpy(_as_rows(chosen))
        return Tokens(
            self.ids[chosen],
            self.lengths[chosen],
            *self._each(lambda values: values[chosen]),
            calls=None if self.calls is None else self.calls.each(lambda counts: counts[chosen]),
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Slots and vectors, where there are any, after a change."""
        slots, vectors = (None if values is None else change(values) for values in (self.slots, self.vectors))
        return slots, vectors

    @property
    def device(self) -> torch.device:
        """Where the ids are."""
        return self.ids.device

    def to(self, device: torch.device | str) -> Tokens:
        """The same on another device."""
        ids, lengths = (tensor.to(device, non_blocking=True) for tensor in (self.ids, self.lengths))
        calls = None if self.calls is None else self.calls.each(lambda counts: counts.to(device, non_blocking=True))
        return Tokens(ids, lengths, *self._each(lambda values: values.to(device, non_blocking=True)), calls=calls)

    def truncate(self, num_tokens: int | Sequence[int]) -> Tokens:
        """Keeps at most the first `num_tokens` of each row (at least 1), a number each or one for all."""
        counts = [num_tokens] * len(self) if isinstance(num_tokens, int) else list(num_tokens)
        if len(counts) != len(self):
            raise ValueError(f"truncate: {len(counts)} numbers of tokens for {len(self)} sequences")
        if counts and not min(counts) >= 1:
            raise ValueError(f"a sequence keeps at least 1 token, not {min(counts)}")
        if isinstance(num_tokens, int):  # without a transfer to the device
            lengths = self.lengths.clamp(max=num_tokens)
        else:
            lengths = torch.minimum(self.lengths, torch.tensor(counts, device=self.lengths.device))
        most = max(counts, default=0)
        return Tokens(self.ids[:, :most], lengths, *self._each(lambda values: values[:, :most]), calls=self.calls)

    def padded(self) -> Tokens:
        """The same with zeros for padding."""
        padding = ~self.mask
        slots = None if self.slots is None else self.slots.masked_fill(padding, 0)
        vectors = None if self.vectors is None else self.vectors.masked_fill(padding[..., None], 0)
        return Tokens(self.ids.masked_fill(padding, 0), self.lengths, slots, vectors, self.calls)

    def save(self, path: Path | str) -> None:
        """Writes a safetensors file: ids (sum of lengths,), lengths (B,), and if there are any slots (sum of lengths,)
        and vectors (sum of lengths, n).

        Ids and slots take 16, 32 or 64 bits, whatever they fit; vectors are float32.
        """
        arrays = {"lengths": self.lengths.cpu().numpy().astype(np.int32)} | self.packed()
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(save(arrays, {"imgtok": "tokens"}))

    def packed(self) -> dict[str, np.ndarray]:
        """`ids`, and `slots` and `vectors` if there are any, without padding: the rows one after the other; ids and
        slots in 16, 32 or 64 bits.

        Raises ValueError for negative ones.
        """
        meant = self.mask.cpu()
        numbers = {"ids": self.ids} | ({} if self.slots is None else {"slots": self.slots})
        arrays = {name: _narrow(name, tensor.cpu()[meant].numpy()) for name, tensor in numbers.items()}
        if self.vectors is not None:
            arrays["vectors"] = self.vectors.detach().cpu()[meant].float().numpy()
        return arrays

    @classmethod
    def load(cls, path: Path | str) -> Tokens:
        """What `save` wrote; ValueError for any other file."""
        try:
            with safe_open(path, framework="np") as file:
                if (file.metadata() or {}).get("imgtok") != "tokens":
                    raise ValueError(f"{path}: not a file of tokens (Tokens.save writes one)")
                ids, lengths = (file.get_tensor(name) for name in ("ids", "lengths"))
                further = {name: file.get_tensor(name) for name in ("slots", "vectors") if name in set(file.keys())}
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole file of tokens ({error}); copy it again") from error
        packed = [ids, *further.values()]
        if any(lengths.sum() != len(array) for array in packed) or (lengths.size and lengths.min() < 1):
            raise ValueError(f"{path}: {ids.size} tokens in {lengths.size} rows of other lengths; copy it again")
        return cls.unpacked(ids, lengths, **further)

    @classmethod
    def unpacked(
        cls,
        ids: np.ndarray,
        lengths: np.ndarray,
        slots: np.ndarray | None = None,
        columns: int | None = None,
        vectors: np.ndarray | None = None,
    ) -> Tokens:
        """Rows of `columns`, by default as many as the longest has, from what `packed` gave and the lengths (B,)."""
        most = int(lengths.max(initial=0)) if columns is None else columns
        own, values = (None if a is None else _spread(a, lengths, most) for a in (slots, vectors))
        return cls(_spread(ids, lengths, most), torch.from_numpy(lengths.astype(np.int64)), own, values)


def _spread(packed: np.ndarray, lengths: np.ndarray, columns: int) -> Tensor:
    """(B, columns) int64, or (B, columns, n) float32 of vectors (N, n); zeros for padding."""
    kind = np.float32 if packed.ndim == 2 else np.int64
    rows = np.zeros((lengths.size, columns, *packed.shape[1:]), dtype=kind)
    rows[np.arange(columns) < lengths[:, None]] = packed
    return torch.from_numpy(rows)


def _as_rows(rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Numbers or truth values as torch takes them."""
    array = np.asarray(rows)
    return array if array.dtype == np.bool_ else array.astype(np.int64, casting="same_kind" if array.size else "unsafe")


def _widen(rows: Tensor, columns: int) -> Tensor:
    """(B, K, ...) -> (B, columns, ...)."""
    return torch.nn.functional.pad(rows, (0, 0) * (rows.ndim - 2) + (0, columns - rows.shape[1]))


def _narrow(name: str, array: np.ndarray) -> np.ndarray:
    """In 16 bits if they fit, in 32, or as they are."""
    if array.size and array.min() < 0:
        raise ValueError(f"token {name} are not negative, got {array.min()}")
    largest = array.max(initial=0)
    return array.astype(np.uint16 if largest < 1 << 16 else np.uint32 if largest < 1 << 32 else np.int64)
