"""Token caches: what a frozen tokenizer makes of a data set, kept for generator training.

A folder of `tokens-00000-of-00008.safetensors` (see `imgtok.data.shards`). In each are the ids of n rows one after the
other, in 16 or 32 bits, and where the tokenizer has slots those of the ids; lengths (n,) of the rows, labels (n,),
indices (n,) of the images, and views (n,): which crop of its image a row is. Every view is a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from imgtok.data.shards import CacheInfo, PendingShards, open_cache
from imgtok.data.sources import DataError
from imgtok.files import replacing
from imgtok.sizes import Size
from imgtok.text.captions import Captions
from imgtok.tokenizers.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class TokenCacheInfo(CacheInfo):
    """What a token cache was made from; `fingerprint` is that of the tokenizer's folder."""

    PREFIX: ClassVar[str] = "token"
    COMMAND: ClassVar[str] = "imgtok cache"
    FORMAT: ClassVar[int] = 3

    image_size: Size
    """Pixels a side, or (height, width)."""
    vocab_size: int
    """Token ids lie in [0, vocab_size)."""
    num_tokens: int
    """The most tokens of one image."""
    fixed_length: bool = True
    """Whether every image has that many."""
    num_slots: int | None = None
    """Slots that ids can come from; null where ids carry none."""
    rate: str | None = None
    """The rate that was encoded at; null for the tokenizer's default."""
    num_classes: int
    """Labels lie in [0, num_classes); 0 for data without labels."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in order, where they have any."""
    crops: str = "center"
    """Which crops of an image are there; this and the next three are the fields of `imgtok.data.images.Views`."""
    num_crops: int = 1
    """Random crops of an image."""
    zoom: float = 1.0
    """What the image covers before cropping, over the size."""
    mirrored: bool = False
    """Whether each crop is there a second time, mirrored."""
    crop_seed: int = 0
    """Seed of random crops."""
    format: int = 3
    """Version of this layout."""


class TokenShardWriter:
    """Writes the shards of a cache that belong to one process: rank, rank + world, and so on.

    for shard in writer.pending(): encode the images `info.shard_indices(shard)`, then `writer.write(shard,
    ...)`.
    """

    def __init__(self, folder: Path, info: TokenCacheInfo, *, rank: int = 0, world: int = 1) -> None:
        self.folder, self.info = folder, info
        self._pending = PendingShards(folder, info, rank=rank, world=world)

    def pending(self) -> Iterator[int]:
        """The shards that this process has still to write."""
        return iter(self._pending)

    def write(
        self, shard: int, tokens: Tokens, labels: Tensor, indices: Sequence[int], views: Sequence[int] | None = None
    ) -> Path:
        """Write one shard: tokens of n rows, labels (n,), the n indices in the source, and which view each is (the
        first).

        Raises ValueError for numbers of rows that differ, and for tokens that the cache's description excludes.
        """
        info = self.info
        views = [0] * len(indices) if views is None else views
        if {len(tokens), len(labels), len(views)} != {len(indices)}:
            found = f"{len(tokens)} rows of tokens, {len(labels)} labels, {len(views)} views"
            raise ValueError(f"shard {shard}: {found} for {len(indices)} images")
        tokens = tokens.to("cpu")
        for problem in _problems(tokens, info):
            raise ValueError(f"shard {shard}: {problem}")
        arrays = tokens.packed() | {
            "lengths": tokens.lengths.numpy().astype(np.int32),
            "labels": labels.cpu().numpy().astype(np.int32),
            "indices": np.asarray(indices, dtype=np.int64),
            "views": np.asarray(views, dtype=np.int32),
        }
        path = info.shard_path(self.folder, shard)
        with replacing(path) as temporary:
            temporary.write_bytes(save(arrays, info.header))
        return path


def _problems(tokens: Tokens, info: TokenCacheInfo) -> Iterator[str]:
    """In words, what speaks against these tokens in such a cache."""
    if not len(tokens):
        return
    shortest, longest = int(tokens.lengths.min()), int(tokens.lengths.max())
    if shortest < 1 or longest > min(info.num_tokens, tokens.ids.shape[1]):
        columns = f"{shortest} to {longest} tokens in {tokens.ids.shape[1]} columns"
        yield f"rows of {columns}, where an image has 1 to {info.num_tokens}"
        return
    if info.fixed_length and shortest < info.num_tokens:
        yield f"rows of {shortest} to {longest} tokens, where every image has {info.num_tokens}"
    meant = tokens.ids[tokens.mask]
    if not 0 <= int(meant.min()) <= int(meant.max()) < info.vocab_size:
        yield f"ids {int(meant.min())} to {int(meant.max())} for a vocabulary of {info.vocab_size}"
    if (tokens.slots is None) != (info.num_slots is None):
        yield f"tokens {'without' if tokens.slots is None else 'with'} slots, of {info.num_slots} slots"
    elif tokens.slots is not None and info.num_slots is not None:
        slots = tokens.slots[tokens.mask]
        falls = (tokens.slots[:, 1:] <= tokens.slots[:, :-1]) & tokens.mask[:, 1:]
        if not 0 <= int(slots.min()) <= int(slots.max()) < info.num_slots or bool(falls.any()):
            found = f"slots {int(slots.min())} to {int(slots.max())}"
            yield f"{found}, which must increase within 0 to {info.num_slots - 1}"


@dataclass(frozen=True)
class TokenBatch:
    """Token sequences that go through a generator together."""

    content: Tokens
    """What the generator learns to draw: B rows, in about as many columns as the longest of them has."""
    labels: Tensor
    """(B,) int64."""
    names: tuple[str, ...]
    """Which images they are, for messages."""
    captions: Captions | None = None
    """Features of their captions, for a generator that reads text."""

    @property
    def condition(self) -> Tensor | Captions:
        """What the generator draws them for: captions where there are any, else labels."""
        return self.labels if self.captions is None else self.captions

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        captions = None if self.captions is None else self.captions.to(device)
        return TokenBatch(self.content.to(device), self.labels.to(device, non_blocking=True), self.names, captions)


COLUMNS = 16
"""Columns of a batch are a multiple of this, so that few shapes occur: `training.compile` is for each of them."""


class TokenDataset:
    """A whole cache in memory, ids and slots one after the other in 16 bits where they fit, else 32.

    Beside them labels (N,) int64, indices (N,) int64 of the images in their source, and views (N,) int32. Raises
    FileNotFoundError when there is no cache or shards are missing, DataError when a shard is damaged or the cache is of
    another tokenizer than `expect_fingerprint` names, and of none in `same_tokens`, whose tokens are the same.
    """

    def __init__(self, folder: Path, expect_fingerprint: str | None = None, *, same_tokens: Sequence[str] = ()) -> None:
        self.info, paths = open_cache(folder, TokenCacheInfo)
        if expect_fingerprint not in (None, self.info.fingerprint) and self.info.fingerprint not in same_tokens:
            made, wanted = f"tokenizer {self.info.fingerprint}", f"tokenizer {expect_fingerprint}"
            raise DataError(f"{folder}: tokens of {made}, but {wanted} is asked for; run `imgtok cache` with that one")
        shards = [_read_shard(path, self.info) for path in paths]
        arrays = {name: np.concatenate([shard.pop(name) for shard in shards]) for name in _names(self.info)}
        self._ids, self._slots = arrays["ids"], arrays.get("slots")
        self._lengths = arrays["lengths"]
        self._starts = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        self.labels = torch.from_numpy(arrays["labels"].astype(np.int64))
        self.indices = torch.from_numpy(arrays["indices"])
        self.views = torch.from_numpy(arrays["views"])

    @property
    def num_classes(self) -> int:
        return self.info.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.info.class_names

    def __len__(self) -> int:
        return len(self._lengths)

    def tokens(self, rows: Sequence[int] | Tensor, *, columns: int | None = None) -> Tokens:
        """The given rows of the cache, zeros for padding, in `columns`, by default `info.num_tokens`."""
        chosen = np.asarray(rows, dtype=np.int64)
        spans = [slice(self._starts[row], self._starts[row + 1]) for row in chosen]
        ids, slots = (
            None if packed is None else np.concatenate([packed[span] for span in spans] or [packed[:0]])
            for packed in (self._ids, self._slots)
        )
        assert ids is not None, "a cache has ids"
        return Tokens.unpacked(ids, self._lengths[chosen], slots, columns=columns or self.info.num_tokens)

    def name(self, row: int) -> str:
        """Which image a row is, for messages."""
        return f"{self.info.split}[{int(self.indices[row])}]"

    def known_by(self, rows: Sequence[int]) -> Iterator[bytes]:
        """What each of the rows is known by: two are equal if their tokens are."""
        for row in rows:
            span = slice(self._starts[row], self._starts[row + 1])
            content = self._ids[span].tobytes() + (b"" if self._slots is None else self._slots[span].tobytes())
            yield hashlib.blake2b(content, digest_size=16).digest()

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """The given rows of the cache with their labels, in a multiple of `COLUMNS` columns that has room for the
        longest: of images with few tokens a generator does not compute what is padding in all of them.
        """
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        longest = int(self._lengths[chosen.numpy()].max(initial=1))
        columns = min(self.info.num_tokens, -(-longest // COLUMNS) * COLUMNS)
        names = tuple(self.name(row) for row in chosen.tolist())
        return TokenBatch(self.tokens(rows, columns=columns), self.labels[chosen], names)


def lengths_of(folder: Path) -> list[int]:
    """How many tokens each row of a cache has. Raises as `TokenDataset` for a cache that is not whole."""
    _, paths = open_cache(folder, TokenCacheInfo)
    found: list[int] = []
    for path in paths:
        with safe_open(path, framework="np") as file:
            found += file.get_tensor("lengths").tolist()
    return found


def _names(info: TokenCacheInfo) -> tuple[str, ...]:
    """The arrays of a shard."""
    return ("ids", "lengths", "labels", "indices", "views", *(() if info.num_slots is None else ("slots",)))


def _read_shard(path: Path, info: TokenCacheInfo) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in _names(info)}
    except SafetensorError as error:
        raise TokenCacheInfo.damaged(path, error) from error
    sizes = {"ids": len(arrays["ids"]), "slots": len(arrays.get("slots", arrays["ids"]))}
    if set(sizes.values()) != {int(arrays["lengths"].sum())}:
        raise TokenCacheInfo.damaged(path, ValueError(f"{sizes} for lengths of {int(arrays['lengths'].sum())}"))
    return arrays
