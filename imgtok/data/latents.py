"""Latent caches: the posteriors that a frozen autoencoder gives a data set, kept for training in latent space.

A folder of `latents-00000-of-00008.safetensors` (see `imgtok.data.shards`), each with moments (n, 2 C, h, w): means,
then log-variances, not scaled; moments_flip, the same of the mirrored images, unless there are none; labels (n,);
indices (n,) of the images. A batch takes either of the two with probability one half and draws a fresh sample of
the posterior, so that a cache loses nothing against encoding in training. ImageNet's is 84 GB: moments are read
row by row as they are asked for. MAR's folders, with one .npz per image, are read as well.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imgtok import randomness
from imgtok.data.images import Position
from imgtok.data.shards import CacheInfo, PendingShards, open_cache
from imgtok.data.sources import DataError
from imgtok.files import replacing
from imgtok.text.captions import Captions
from imgtok.tokenizers.base import Autoencoder, latents_of_moments
from imgtok.weights import write_tensors

READ_AT_ONCE = 256
"""Rows of which the moments are in memory together, where all are read."""

DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LatentCacheInfo(CacheInfo):
    """What a latent cache was made from; `fingerprint` is `Autoencoder.fingerprint`."""

    PREFIX: ClassVar[str] = "latent"
    COMMAND: ClassVar[str] = "imgtok cache latents"
    FORMAT: ClassVar[int] = 1

    image_size: int
    """Pixels a side."""
    crop: str
    """Which square of an image: "center", as ADM crops it."""
    latent_channels: int
    """Channels C of a latent; moments have twice as many."""
    grid: int
    """Cells h = w of a latent's side."""
    scaling_factor: float
    """The factor of the autoencoder; the stored moments are not multiplied by it."""
    num_classes: int
    """Labels lie in [0, num_classes); 0 for data without labels."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in order, where they have any."""
    mirrored: bool
    """Whether the moments of the mirrored images are there too."""
    dtype: str
    """How moments are stored."""
    format: int = 1
    """Version of this layout."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image's moments."""
        return 2 * self.latent_channels, self.grid, self.grid

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays of moments in a shard."""
        return ("moments", "moments_flip") if self.mirrored else ("moments",)


class LatentShardWriter:
    """Writes the shards of a cache that belong to one process: rank, rank + world, and so on."""

    def __init__(self, folder: Path, info: LatentCacheInfo, *, rank: int = 0, world: int = 1) -> None:
        self.folder, self.info = folder, info
        self._pending = PendingShards(folder, info, rank=rank, world=world)

    def pending(self) -> Iterator[int]:
        """The shards that this process has still to write."""
        return iter(self._pending)

    def write(
        self, shard: int, moments: Tensor, moments_flip: Tensor | None, labels: Tensor, indices: Sequence[int]
    ) -> Path:
        """Write one shard: moments (n, 2 C, h, w), those of the mirrored images where the cache has them, labels (n,)
        and the n indices in the source.

        Raises ValueError for arrays that do not fit the cache, DataError for values that its dtype cannot hold.
        """
        info, shape = self.info, (len(indices), *self.info.shape)
        stored = {"moments": moments} | ({} if moments_flip is None else {"moments_flip": moments_flip})
        if tuple(stored) != info.arrays or labels.shape != shape[:1] or any(m.shape != shape for m in stored.values()):
            shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in (stored | {"labels": labels}).items())
            raise ValueError(f"shard {shard}: {shapes} for {' and '.join(info.arrays)} of {shape}")
        tensors = {name: value.to("cpu", DTYPES[info.dtype]).contiguous() for name, value in stored.items()}
        path = info.shard_path(self.folder, shard)
        if not all(value.isfinite().all() for value in tensors.values()):
            remedy = "set dtype=float32, in a new folder" if info.dtype == "float16" else "is the autoencoder whole?"
            raise DataError(f"{path}: moments that are not finite numbers in {info.dtype}; {remedy}")
        tensors |= {
            "labels": labels.to("cpu", torch.int32),
            "indices": torch.tensor(list(indices), dtype=torch.int64),
        }
        with replacing(path) as temporary:
            write_tensors(tensors, temporary, info.header)
        return path


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class LatentBatch:
    """Latents that go through a generator together."""

    content: Tensor
    """What the generator learns to draw: latents (B, C, h, w) float32, scaled."""
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

    def to(self, device: torch.device | str) -> LatentBatch:
        """The same batch on another device."""
        latents, labels = (tensor.to(device, non_blocking=True) for tensor in (self.content, self.labels))
        return LatentBatch(latents, labels, self.names, self.captions.to(device) if self.captions is not None else None)

    def pin_memory(self) -> LatentBatch:
        """The same batch in page-locked memory, from which a GPU copies while the processor goes on."""
        captions = self.captions.pin_memory() if self.captions is not None else None
        return LatentBatch(self.content.pin_memory(), self.labels.pin_memory(), self.names, captions)


class Latents(ABC):
    """Cached posteriors with random access, in whichever files; labels and indices are in memory."""

    folder: Path
    latent_channels: int
    grid: int
    num_classes: int
    class_names: tuple[str, ...]
    """Names of the classes in order, where they have any."""
    scaling_factor: float
    mirrored: bool
    labels: Tensor
    """(N,) int64."""
    digest: str
    """16 hexadecimal digits that change with what the latents were made from."""
    indices: Tensor
    """(N,) int64: which image of the source each row is; its randomness goes by this number."""

    @abstractmethod
    def moments(self, rows: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        """Stored moments (B, 2 C, h, w) float32 of the given rows, or of their mirror images."""

    @abstractmethod
    def name(self, row: int) -> str:
        """Which image a row is, for messages."""

    def __len__(self) -> int:
        return len(self.labels)

    def known_by(self, rows: Sequence[int]) -> Iterator[bytes]:
        """What each of the rows is known by: two are equal if their stored moments are."""
        for start in range(0, len(rows), READ_AT_ONCE):
            part = rows[start : start + READ_AT_ONCE]
            for moments in self.moments(part, [False] * len(part)):
                yield hashlib.sha256(moments.numpy().tobytes()).digest()

    def batch(self, rows: Sequence[int]) -> LatentBatch:
        """Posterior means of the given rows, not mirrored: the same on every call."""
        moments = self.moments(rows, [False] * len(rows))
        return self._batch(rows, latents_of_moments(moments, None, self.scaling_factor))

    def training_batch(self, positions: Sequence[Position], seed: int) -> LatentBatch:
        """Posterior samples, half of them mirrored where the cache has that; row by row both depend on (seed, epoch,
        image) alone, whatever the batch and the process.
        """
        rows = [position.index for position in positions]
        flipped, noise = [False] * len(rows), torch.empty(len(rows), self.latent_channels, self.grid, self.grid)
        for epoch in {position.epoch for position in positions}:
            places = [place for place, position in enumerate(positions) if position.epoch == epoch]
            images = self.indices[[rows[place] for place in places]].tolist()
            noise[places] = randomness.normal(seed, images, tuple(noise.shape[1:]), f"posterior {epoch}")
            for place, draw in zip(places, randomness.uniform(seed, images, (), f"mirror {epoch}"), strict=True):
                flipped[place] = self.mirrored and draw.item() < 0.5
        return self._batch(rows, latents_of_moments(self.moments(rows, flipped), noise, self.scaling_factor))

    def _batch(self, rows: Sequence[int], latents: Tensor) -> LatentBatch:
        broken = [row for row, whole in zip(rows, latents.isfinite().flatten(1).all(dim=1), strict=True) if not whole]
        if broken:
            raise DataError(
                f"{self.folder}: the latent of {self.name(broken[0])} has numbers that are not finite: its autoencoder "
                "or its image was broken, or the file is; make the cache again, or leave the image out"
            )
        return LatentBatch(latents, self.labels[list(rows)], tuple(self.name(row) for row in rows))


class LatentDataset(Latents):
    """A cache that `imgtok cache latents` wrote.

    Raises FileNotFoundError when there is no cache or shards are missing, DataError when a shard is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info, self._paths = open_cache(folder, LatentCacheInfo)
        info: LatentCacheInfo = self.info
        self.latent_channels, self.grid, self.mirrored = info.latent_channels, info.grid, info.mirrored
        self.num_classes, self.scaling_factor, self.digest = info.num_classes, info.scaling_factor, info.digest
        self.class_names = info.class_names
        columns = [_read_columns(path, info) for path in self._paths]
        labels, indices = (torch.cat([column[part] for column in columns]) for part in (0, 1))
        self.labels, self.indices = labels.long(), indices
        self._ends = np.cumsum([len(column[0]) for column in columns])
        self._slices: dict[tuple[int, str], Any] = {}

    def moments(self, rows: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        out = torch.empty(len(rows), *self.info.shape)
        for place, (row, flip) in enumerate(zip(rows, flipped, strict=True)):
            shard = int(np.searchsorted(self._ends, row, side="right"))
            start = int(self._ends[shard - 1]) if shard else 0
            out[place] = self._slice(shard, "moments_flip" if flip else "moments")[row - start]
        return out

    def name(self, row: int) -> str:
        return f"{self.info.split}[{int(self.indices[row])}]"

    def _slice(self, shard: int, name: str) -> Any:
        if (shard, name) not in self._slices:  # kept open: mapped into memory, not read
            self._slices[shard, name] = safe_open(self._paths[shard], framework="pt").__enter__().get_slice(name)
        return self._slices[shard, name]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_slices": {}}  # a worker process opens the files itself


REMEDY = "run `imgtok cache latents` with that one, in a new folder"


def _read_columns(path: Path, info: LatentCacheInfo) -> tuple[Tensor, Tensor]:
    """Labels and indices of a shard whose moments are as the cache's description says."""
    try:
        with safe_open(path, framework="pt") as file:
            labels, indices = file.get_tensor("labels"), file.get_tensor("indices")
            wanted = [len(labels), *info.shape]
            shapes = {name: file.get_slice(name).get_shape() for name in info.arrays}
    except SafetensorError as error:
        raise LatentCacheInfo.damaged(path, error) from error
    if len(indices) != len(labels) or any(shape != wanted for shape in shapes.values()):
        raise LatentCacheInfo.damaged(path, ValueError(f"{shapes}, must be {wanted}"))
    return labels, indices


# ---------------------------------------------------------------- MAR's folders


class MARLatents(Latents):
    """MAR's cache: CLASS/NAME.npz per image with `moments` and `moments_flip`, both (2 C, h, w), unscaled.

    Classes are the sub-folders in sorted order. Which autoencoder made them is not written down anywhere, so
    `scaling_factor` has to be given. Raises FileNotFoundError without such files, DataError for an unusable one.
    """

    mirrored = True

    def __init__(self, folder: Path, scaling_factor: float) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of latents")
        self.folder, self.scaling_factor = folder, scaling_factor
        classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        files = [sorted(e.path for e in os.scandir(folder / name) if e.name.endswith(".npz")) for name in classes]
        self._paths = [path for group in files for path in group]
        if not self._paths:
            raise FileNotFoundError(f"{folder}: no CLASS/NAME.npz files (it has {len(classes)} sub-folders)")
        empty = [name for name, group in zip(classes, files, strict=True) if not group]
        if empty:
            raise DataError(f"{folder / empty[0]}: a class folder without .npz files; remove it or fill it")
        self.num_classes, self.class_names = len(classes), tuple(classes)
        self.labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(g) for g in files]))
        self.indices = torch.arange(len(self._paths))
        self._shape: tuple[int, ...] = ()
        self._shape = self._read(0, "moments").shape
        self.latent_channels, self.grid = self._shape[0] // 2, self._shape[1]
        told = [*(os.path.relpath(path, folder) for path in self._paths), str(self._shape), str(scaling_factor)]
        digest = hashlib.sha256("\n".join(told).encode())
        for path in (self._paths[0], self._paths[-1]):  # all of them would be 84 GB
            digest.update(Path(path).read_bytes())
        self.digest = digest.hexdigest()[:16]

    def moments(self, rows: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        names = ["moments_flip" if flip else "moments" for flip in flipped]
        return torch.from_numpy(np.stack([self._read(row, name) for row, name in zip(rows, names, strict=True)]))

    def name(self, row: int) -> str:
        return self._paths[row]

    def _read(self, row: int, name: str) -> np.ndarray:
        path = self._paths[row]
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found: np.ndarray = arrays[name]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path}: no array {name!r} can be read from it ({error}); make or copy it again"
            ) from error
        square = found.ndim == 3 and found.shape[0] % 2 == 0 and found.shape[1] == found.shape[2]
        if not square or found.dtype.kind != "f" or found.shape != (self._shape or found.shape):
            wanted = self._shape or "(2 C, h, h)"
            raise DataError(f"{path}: {name} is {found.dtype} {found.shape}, must be floating-point {wanted}")
        return found.astype(np.float32)


# ---------------------------------------------------------------- either


def open_latents(
    folder: Path, vae: Autoencoder, image_size: int | None = None, *, same_latents: Sequence[str] = ()
) -> Latents:
    """The cache in a folder, `imgtok cache latents`' or MAR's, for a generator on the latents of `vae`.

    Raises FileNotFoundError when there is none, DataError when it was made by another autoencoder, with another scale
    or at another size than `image_size` pixels; `same_latents` are the fingerprints of others whose latents are those
    of `vae`. Of MAR's only channels and size can be compared: their scale is taken
    to be `vae`'s.
    """
    ours = any(folder.glob(f"{LatentCacheInfo.PREFIX}s-*.safetensors")) or not any(folder.glob("*/*.npz"))
    latents: Latents = LatentDataset(folder) if ours else MARLatents(folder, vae.config.scaling_factor)
    found = {
        "latent_channels": (latents.latent_channels, vae.config.latent_channels),
        "scaling_factor": (latents.scaling_factor, vae.config.scaling_factor),
        "image_size": (latents.grid * vae.config.factor, image_size or latents.grid * vae.config.factor),
    }
    if isinstance(latents, LatentDataset):
        found["image_size"] = (latents.info.image_size, image_size or latents.grid * vae.config.factor)
        made_by = latents.info.fingerprint
        found["fingerprint"] = (made_by, made_by if made_by in same_latents else vae.fingerprint())
    different = [f"{name} {mine!r}, not {wanted!r}" for name, (mine, wanted) in found.items() if mine != wanted]
    if different:
        raise DataError(f"{folder}: latents of another autoencoder, scale or size ({'; '.join(different)}); {REMEDY}")
    return latents
