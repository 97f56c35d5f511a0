"""Token caches: what a frozen tokenizer makes of a data set, kept for generator training.

A folder of `tokens-00000-of-00008.safetensors` (see `imgtok.data.shards`), each with ids (n, L) in 16 or 32 bits,
labels (n,), indices (n,) of the images, and views (n,): which crop of its image a row is. Every view is a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from imgtok.data.shards import CacheInfo, PendingShards, open_cache
from imgtok.data.sources import DataError
from imgtok.files import replacing
from imgtok.text.captions import Captions


@dataclass(frozen=True, kw_only=True)
class TokenCacheInfo(CacheInfo):
    """What a token cache was made from; `fingerprint` is that of the tokenizer's folder."""

    PREFIX: ClassVar[str] = "token"
    COMMAND: ClassVar[str] = "imgtok cache"
    FORMAT: ClassVar[int] = 2

    image_size: int
    """Pixels a side."""
    vocab_size: int
    """Token ids lie in [0, vocab_size)."""
    num_tokens: int
    """Tokens of one image."""
    num_classes: int
    """Labels lie in [0, num_classes); 0 for data without labels."""
    crops: str = "center"
    """Which squares of an image are there; this and the next three are the fields of `imgtok.data.images.Views`."""
    num_crops: int = 1
    """Random crops of an image."""
    zoom: float = 1.0
    """The shorter side before cropping, over the size."""
    mirrored: bool = False
    """Whether each crop is there a second time, mirrored."""
    crop_seed: int = 0
    """Seed of random crops."""
    format: int = 2
    """Version of this layout."""

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Format 1 knew the centre crop and its mirror image only."""
        if data.get("format") != 1:
            return data
        return data | {"crops": "center", "num_crops": 1, "zoom": 1.0, "crop_seed": 0, "format": cls.FORMAT}


def fingerprint(model_folder: Path) -> str:
    """16 hexadecimal digits that change with a model's weights or configuration."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "config.json"):
        path = model_folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; {model_folder} is not a model folder")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


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
        self, shard: int, ids: Tensor, labels: Tensor, indices: Sequence[int], views: Sequence[int] | None = None
    ) -> Path:
        """Write one shard: ids (n, L), labels (n,), the n indices in the source, and which view each is (the first)."""
        info = self.info
        views = [0] * len(indices) if views is None else views
        if (
            ids.shape != (len(indices), info.num_tokens)
            or labels.shape != (len(indices),)
            or len(views) != len(indices)
        ):
            shapes = f"ids {tuple(ids.shape)}, labels {tuple(labels.shape)}, {len(views)} views"
            raise ValueError(f"shard {shard}: {shapes} for {len(indices)} images of {info.num_tokens} tokens")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < info.vocab_size:
            found = f"ids {int(ids.min())} to {int(ids.max())}"
            raise ValueError(f"shard {shard}: {found} for a vocabulary of {info.vocab_size}")
        arrays = {
            "ids": ids.cpu().numpy().astype(np.uint16 if info.vocab_size <= 1 << 16 else np.int32),
            "labels": labels.cpu().numpy().astype(np.int32),
            "indices": np.asarray(indices, dtype=np.int64),
            "views": np.asarray(views, dtype=np.int32),
        }
        path = info.shard_path(self.folder, shard)
        with replacing(path) as temporary:
            temporary.write_bytes(save(arrays, info.header))
        return path


@dataclass(frozen=True)
class TokenBatch:
    """Token sequences that go through a generator together."""

    ids: Tensor
    """(B, L) int64."""
    labels: Tensor
    """(B,) int64."""
    names: tuple[str, ...]
    """Which images they are, for messages."""
    captions: Captions | None = None
    """Features of their captions, for a generator that reads text."""

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        ids, labels = (tensor.to(device, non_blocking=True) for tensor in (self.ids, self.labels))
        return TokenBatch(ids, labels, self.names, self.captions.to(device) if self.captions is not None else None)


class TokenDataset:
    """A whole cache in memory: ids (N, L) int32, labels (N,) int64, indices (N,) int64 of the images in
    their source, views (N,) int32. Shards that an older imgtok wrote without views have 0 there.

    Raises FileNotFoundError when there is no cache or shards are missing, DataError when a shard is damaged
    or the cache is of another tokenizer than `expect_fingerprint` names.
    """

    def __init__(self, folder: Path, expect_fingerprint: str | None = None) -> None:
        self.info, paths = open_cache(folder, TokenCacheInfo)
        if expect_fingerprint not in (None, self.info.fingerprint):
            made, wanted = f"tokenizer {self.info.fingerprint}", f"tokenizer {expect_fingerprint}"
            raise DataError(f"{folder}: tokens of {made}, but {wanted} is asked for; run `imgtok cache` with that one")
        shards = [_read_shard(path) for path in paths]
        ids, labels, indices, views = (np.concatenate([shard[name] for shard in shards]) for name in _ARRAYS)
        self.ids = torch.from_numpy(ids.astype(np.int32))
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.indices = torch.from_numpy(indices)
        self.views = torch.from_numpy(views)

    @property
    def num_classes(self) -> int:
        return self.info.num_classes

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Sequence[int]) -> TokenBatch:
        """The given rows of the cache."""
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        names = tuple(f"{self.info.split}[{index}]" for index in self.indices[chosen].tolist())
        return TokenBatch(self.ids[chosen].long(), self.labels[chosen], names)


_ARRAYS = ("ids", "labels", "indices", "views")


def read_info(path: Path) -> TokenCacheInfo:
    """The description in a shard; DataError when the file is damaged or of another format."""
    return TokenCacheInfo.read(path)


def _read_shard(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            found = set(file.keys())
            arrays = {name: file.get_tensor(name) for name in _ARRAYS if name in found or name != "views"}
    except SafetensorError as error:
        raise TokenCacheInfo.damaged(path, error) from error
    return {"views": np.zeros(len(arrays["ids"]), np.int32)} | arrays
