"""Caption caches: what a frozen text encoder makes of a data set's captions, kept for generator training.

A folder of `captions-00000-of-00008.safetensors` (see `imgtok.data.shards`), each with the features of its captions one
after the other without padding (M, W), the spans (M, 2) of the texts that they stand for, lengths (n,), indices (n,) of
the images, and the features of the empty caption (E, W), which stands for "no caption". Features are read row by row: a
large cache need not fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from imgtok.data.latents import LatentDataset
from imgtok.data.shards import CacheInfo, PendingShards, open_cache, same_images
from imgtok.data.sources import DataError
from imgtok.data.tokens import TokenDataset
from imgtok.files import replacing
from imgtok.text.captions import Captions

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class CaptionCacheInfo(CacheInfo):
    """What a caption cache was made from; `fingerprint` is that of the text encoder's folder."""

    PREFIX: ClassVar[str] = "caption"
    COMMAND: ClassVar[str] = "imgtok cache text"
    FORMAT: ClassVar[int] = 2

    encoder: str
    """Folder or Hub name of the text encoder."""
    width: int
    """Channels of a feature."""
    max_length: int
    """Most features of a caption; longer texts were cut off."""
    dtype: str
    """How features are stored."""
    controls: tuple[str, ...] = ()
    """Controls of prompts that acted on the features, by kind."""
    format: int = 2
    """Version of this layout."""


class CaptionShardWriter:
    """Writes the shards of a cache that belong to one process: rank, rank + world, and so on."""

    def __init__(self, folder: Path, info: CaptionCacheInfo, empty: Tensor, *, rank: int = 0, world: int = 1) -> None:
        """`empty` (E, W) are the features of the empty caption."""
        self.folder, self.info, self._empty = folder, info, empty
        self._pending = PendingShards(folder, info, rank=rank, world=world)

    def pending(self) -> Iterator[int]:
        """The shards that this process has still to write."""
        return iter(self._pending)

    def write(self, shard: int, captions: Sequence[Captions], indices: Sequence[int]) -> Path:
        """Write one shard: captions of one row each, (1, T_i, W), as an encoder makes them, and the images' indices in
        the source.

        Raises ValueError for captions that do not fit the cache, DataError for values that its dtype cannot hold.
        """
        info, dtype = self.info, DTYPES[self.info.dtype]
        lengths = [caption.features.shape[1] for caption in captions]
        if len(captions) != len(indices) or any(caption.features.shape[2] != info.width for caption in captions):
            raise ValueError(f"shard {shard}: {len(captions)} captions for {len(indices)} images of width {info.width}")
        if lengths and not 1 <= min(lengths) <= max(lengths) <= info.max_length:
            raise ValueError(f"shard {shard}: captions of {min(lengths)} to {max(lengths)} features")
        if any(len(caption) != 1 or caption.spans is None for caption in captions):
            raise ValueError(f"shard {shard}: captions are written one by one, with their spans")
        features = [caption.features[0].to(dtype) for caption in captions]
        spans = [caption.spans[0].int() for caption in captions if caption.spans is not None]
        tensors = {
            "features": torch.cat([*features, torch.empty(0, info.width, dtype=dtype)]),
            "spans": torch.cat([*spans, torch.empty(0, 2, dtype=torch.int32)]),
            "lengths": torch.tensor(lengths, dtype=torch.int32),
            "indices": torch.tensor(list(indices), dtype=torch.int64),
            "empty": self._empty.to(dtype),
        }
        path = info.shard_path(self.folder, shard)
        if not (tensors["features"].isfinite().all() and tensors["empty"].isfinite().all()):
            raise DataError(f"{path}: features that {info.dtype} cannot hold; set dtype=bfloat16, in a new folder")
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors, info.header))
        return path


class CaptionDataset:
    """A cache of text features; only lengths and indices are in memory.

    Raises FileNotFoundError when there is no cache or shards are missing, DataError when a shard is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info, self._paths = open_cache(folder, CaptionCacheInfo)
        self.empty = torch.empty(0)
        self._places: dict[int, tuple[int, int, int]] = {}  # image -> shard, first row, number of rows
        self._files: dict[int, Any] = {}
        for shard, path in enumerate(self._paths):
            self._read_places(shard, path)

    def _read_places(self, shard: int, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                lengths, indices = file.get_tensor("lengths").long(), file.get_tensor("indices")
                self.empty = file.get_tensor("empty").float()
        except SafetensorError as error:
            raise CaptionCacheInfo.damaged(path, error) from error
        starts = (lengths.cumsum(0) - lengths).tolist()
        places = zip(indices.tolist(), starts, lengths.tolist(), strict=True)
        self._places |= {index: (shard, start, length) for index, start, length in places}

    def __len__(self) -> int:
        return len(self._places)

    def features(self, index: int) -> Tensor:
        """The features (T, W) of image `index`'s caption, as stored."""
        return self._rows(index, "features")

    def spans(self, index: int) -> Tensor:
        """The characters [start, stop) (T, 2) of image `index`'s caption that its features stand for."""
        return self._rows(index, "spans").long()

    def _rows(self, index: int, name: str) -> Tensor:
        shard, start, length = self._places[index]
        if shard not in self._files:  # kept open: mapped into memory, not read
            file = safe_open(self._paths[shard], framework="pt").__enter__()
            self._files[shard] = {name: file.get_slice(name) for name in ("features", "spans")}
        rows: Tensor = self._files[shard][name][start : start + length]
        return rows

    def batch(self, indices: Sequence[int]) -> Captions:
        """The captions of the given images, padded to the longest."""
        return Captions.pad([self.features(index) for index in indices], [self.spans(index) for index in indices])

    def check_matches(self, images: TokenDataset | LatentDataset) -> None:
        """Raises DataError unless these are the captions of the very images that those tokens or latents are of."""
        info, what = images.info, f"the {images.info.PREFIX}s"
        different = [
            f"{name} {getattr(self.info, name)!r}, not {getattr(info, name)!r}"
            for name in ("dataset", "split", "num_images")
            if getattr(self.info, name) != getattr(info, name)
            and not (name == "dataset" and same_images(self.info.dataset, info.dataset))
        ]
        if different:
            remedy = f"run `imgtok cache text` with the data, split and held_out of `{info.COMMAND}`"
            raise DataError(f"{self.folder}: captions of other images than {what} ({'; '.join(different)}); {remedy}")
        missing = set(images.indices.tolist()) - self._places.keys()
        if missing:
            raise DataError(f"{self.folder}: no caption of {len(missing)} images of {what}, such as {min(missing)}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}  # a worker process opens the files itself
