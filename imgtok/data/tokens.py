"""Token caches: what a frozen tokenizer makes of a data set, kept for generator training.

A folder of `tokens-00000-of-00008.safetensors`, each with ids (n, L) in 16 or 32 bits, labels (n,), indices
(n,), and a JSON description. Shard s holds images s * shard_size to (s + 1) * shard_size; a shard is there
whole or not at all, so an interrupted run continues with the missing ones, and several processes write
different ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from imgtok.data.sources import DataError
from imgtok.files import replacing

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TokenCacheInfo:
    """What a cache was made from; equal in all its shards."""

    fingerprint: str
    """`fingerprint` of the tokenizer's folder."""
    dataset: str
    """The data set in words or as configuration text."""
    split: str
    """Part of the data set."""
    image_size: int
    """Pixels a side."""
    vocab_size: int
    """Token ids lie in [0, vocab_size)."""
    num_tokens: int
    """Tokens of one image."""
    num_classes: int
    """Labels lie in [0, num_classes); 0 for data without labels."""
    num_images: int
    """Images of the data set."""
    shard_size: int
    """Images of one shard."""
    mirrored: bool = False
    """Whether each image is there a second time, mirrored."""
    format: int = FORMAT
    """Version of this layout."""

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with the tokenizer, the data set or any other field."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def shard_path(self, folder: Path, shard: int) -> Path:
        return folder / f"tokens-{shard:05d}-of-{self.num_shards:05d}.safetensors"

    def shard_indices(self, shard: int) -> range:
        """The images of one shard, as indices of the source."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_images))


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
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}; it must lie in 0 to {world - 1}")
        self.folder, self.info = folder, info
        self._rank, self._world = rank, world
        for path in sorted(folder.glob("tokens-*.safetensors")):
            _refuse_other(path, read_info(path), info)

    def pending(self) -> Iterator[int]:
        """The shards that this process has still to write."""
        for shard in range(self._rank, self.info.num_shards, self._world):
            if not self.info.shard_path(self.folder, shard).exists():
                yield shard

    def write(self, shard: int, ids: Tensor, labels: Tensor, indices: Sequence[int]) -> Path:
        """Write one shard: ids (n, L), labels (n,), and the n indices in the source."""
        info = self.info
        if ids.shape != (len(indices), info.num_tokens) or labels.shape != (len(indices),):
            shapes = f"ids {tuple(ids.shape)} and labels {tuple(labels.shape)}"
            raise ValueError(f"shard {shard}: {shapes} for {len(indices)} images of {info.num_tokens} tokens")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < info.vocab_size:
            found = f"ids {int(ids.min())} to {int(ids.max())}"
            raise ValueError(f"shard {shard}: {found} for a vocabulary of {info.vocab_size}")
        arrays = {
            "ids": ids.cpu().numpy().astype(np.uint16 if info.vocab_size <= 1 << 16 else np.int32),
            "labels": labels.cpu().numpy().astype(np.int32),
            "indices": np.asarray(indices, dtype=np.int64),
        }
        path = info.shard_path(self.folder, shard)
        with replacing(path) as temporary:
            temporary.write_bytes(save(arrays, {"imgtok": json.dumps(asdict(info), sort_keys=True)}))
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

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        ids, labels = (tensor.to(device, non_blocking=True) for tensor in (self.ids, self.labels))
        return TokenBatch(ids, labels, self.names)


class TokenDataset:
    """A whole cache in memory: ids (N, L) int32, labels (N,) int64, indices (N,) int64 of the images in
    their source.

    Raises FileNotFoundError when there is no cache or shards are missing, DataError when a shard is damaged
    or the cache is of another tokenizer than `expect_fingerprint` names.
    """

    def __init__(self, folder: Path, expect_fingerprint: str | None = None) -> None:
        paths = sorted(folder.glob("tokens-*.safetensors"))
        if not paths:
            raise FileNotFoundError(f"{folder}: no token cache (tokens-*.safetensors); `imgtok cache` writes one")
        self.info = read_info(paths[0])
        if expect_fingerprint not in (None, self.info.fingerprint):
            made, wanted = f"tokenizer {self.info.fingerprint}", f"tokenizer {expect_fingerprint}"
            raise DataError(f"{folder}: tokens of {made}, but {wanted} is asked for; run `imgtok cache` with that one")
        for path in paths[1:]:
            _refuse_other(path, read_info(path), self.info)
        self._refuse_missing(folder)
        shards = [_read_shard(path) for path in paths]
        ids, labels, indices = (np.concatenate([shard[name] for shard in shards]) for name in _ARRAYS)
        self.ids = torch.from_numpy(ids.astype(np.int32))
        self.labels = torch.from_numpy(labels.astype(np.int64))
        self.indices = torch.from_numpy(indices)

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

    def _refuse_missing(self, folder: Path) -> None:
        expected = [self.info.shard_path(folder, shard) for shard in range(self.info.num_shards)]
        missing = [path.name for path in expected if not path.exists()]
        if missing:
            listed = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            remedy = "run the same `imgtok cache` command again, it writes only these"
            raise FileNotFoundError(f"{folder}: {len(missing)} of {len(expected)} shards missing ({listed}); {remedy}")


_ARRAYS = ("ids", "labels", "indices")


def read_info(path: Path) -> TokenCacheInfo:
    """The description in a shard; DataError when the file is damaged or of another format."""
    try:
        with safe_open(path, framework="np") as file:
            data = json.loads((file.metadata() or {})["imgtok"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, error) from error
    known = {field.name for field in fields(TokenCacheInfo)}
    if data.get("format") != FORMAT or set(data) != known:
        raise DataError(f"{path}: token cache of format {data.get('format')}, this version reads format {FORMAT}")
    return TokenCacheInfo(**data)


def _read_shard(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in _ARRAYS}
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a whole token shard ({error}); delete it and run `imgtok cache` again")


def _refuse_other(path: Path, found: TokenCacheInfo, expected: TokenCacheInfo) -> None:
    differences = [
        f"{name} {value!r} instead of {getattr(expected, name)!r}"
        for name, value in asdict(found).items()
        if value != getattr(expected, name)
    ]
    if differences:
        remedy = "choose another folder, or delete the old shards"
        raise DataError(f"{path}: of another token cache ({'; '.join(differences)}); {remedy}")
