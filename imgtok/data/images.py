"""From a configuration to tensors: opens any source of images, crops, flips, divides off the held-out part.

An `ImageSource` has random access and no state that its results depend on: image i is the same picture on
every call, and its augmentation in epoch e of seed s depends on (s, e, i) alone. Hence resume, workers and
several processes change nothing. Unreadable images never raise here; a batch lists them, and loaders.py
decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imgtok.data.arrow import ArrowRecords, HubConfig
from imgtok.data.blocks import Blocks
from imgtok.data.parquet import ParquetConfig, ParquetRecords
from imgtok.data.sources import DataError, FolderRecords, ImageFolderConfig, Record, Records
from imgtok.data.tar import TarConfig, TarRecords
from imgtok.pictures import UnreadableImage, center_crop_adm, corner_crops, decode_image, from_uint8, random_crop
from imgtok.randomness import permutation, uniform
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import ShapesConfig

__all__ = [
    "Batch",
    "DataConfig",
    "DataError",
    "HubConfig",
    "ImageFolderConfig",
    "ImageSource",
    "ParquetConfig",
    "Position",
    "Sample",
    "ShapesConfig",
    "TarConfig",
    "Views",
    "open_images",
]

DataConfig = ImageFolderConfig | ParquetConfig | TarConfig | HubConfig | ShapesConfig
"""Every source of images; `kind` chooses one in a configuration."""


@dataclass(frozen=True)
class Sample:
    """One image."""

    image: Tensor
    """(3, H, W) float32 in [-1, 1]."""
    label: int
    """Class from 0 on; 0 for data without labels."""
    name: str
    """File or row that it came from."""
    text: str
    """Caption, or ""."""


@dataclass(frozen=True)
class Batch:
    """Images that go through a model together."""

    images: Tensor
    """(B, 3, H, W) float32 in [-1, 1]."""
    labels: Tensor
    """(B,) int64."""
    names: tuple[str, ...]
    """Files or rows that the images came from."""
    texts: tuple[str, ...]
    """Captions, or ""."""
    indices: tuple[int, ...] = ()
    """Places of the images in their source."""
    unreadable: tuple[str, ...] = ()
    """What was left out of this batch: "NAME: why"."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on another device."""
        images = self.images.to(device, non_blocking=True)
        labels = self.labels.to(device, non_blocking=True)
        return replace(self, images=images, labels=labels)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies while the processor goes on."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


@dataclass(frozen=True)
class Position:
    """A place in the order of training: image `index` as epoch `epoch` shows it."""

    epoch: int
    index: int


@dataclass(frozen=True)
class Views:
    """Which squares of an image stand for it where it is read once and kept, as in a token cache.

    View v of an image depends on these fields, the image's index and v alone.
    """

    crops: Literal["center", "five", "random"] = "center"
    """One centre crop; the four corners and the centre; or `num_crops` at random places and scales."""
    num_crops: int = 1
    """Random crops of an image; the others have 1 and 5."""
    zoom: float = 1.1
    """The shorter side before cropping, over the size: at most (random), exactly (five)."""
    mirrored: bool = False
    """Whether each crop is there a second time, mirrored."""
    seed: int = 0
    """Seed of the random crops."""

    @property
    def count(self) -> int:
        """Views of one image."""
        crops = {"center": 1, "five": 5, "random": self.num_crops}[self.crops]
        return 2 * crops if self.mirrored else crops

    def of(self, picture: Image.Image, size: int, index: int) -> Tensor:
        """(count, 3, size, size) uint8: the crops, then their mirror images."""
        if self.crops == "center":
            squares = [center_crop_adm(picture, size)]
        elif self.crops == "five":
            squares = corner_crops(picture, size, self.zoom)
        else:
            draws = uniform(self.seed, [index], (self.num_crops, 3), "crops")[0].tolist()
            squares = [random_crop(picture, size, row, self.zoom) for row in draws]
        crops = torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares])
        return torch.cat([crops, crops.flip(-1)]) if self.mirrored else crops


class ImageSource(Protocol):
    """Images with random access. `num_classes` is 0 for data without labels."""

    size: int
    num_classes: int
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64, the classes of all images, none of which is read."""

    def name(self, index: int) -> str:
        """The file or row of an image, which is not read."""

    def __getitem__(self, index: int) -> Sample:
        """One image, not augmented; raises UnreadableImage."""

    def batch(self, indices: Sequence[int]) -> Batch:
        """Images as they are, in order; unreadable ones are left out."""

    def views(self, indices: Sequence[int], views: Views) -> Batch:
        """All views of each image, image by image: a row each, with the image's label, name and index."""

    def blocks(self) -> Blocks | None:
        """Which images are best read together in training; None where the order is free."""

    def texts(self, indices: Sequence[int]) -> list[str | None]:
        """Captions alone, "" where there is none, None where the image cannot be read."""

    def training_batch(self, positions: Sequence[Position], seed: int) -> Batch:
        """Augmented images; each unreadable one is replaced by the next readable one."""


@dataclass(frozen=True)
class Augmentation:
    """What training does to an image at random."""

    flip: bool
    crop: Literal["center", "random"]

    def draws(self, seed: int, positions: Sequence[Position]) -> Tensor:
        """(B, 4) numbers in [0, 1), mirror, scale, left, top; a row depends on the seed and its position."""
        draws = torch.ones(len(positions), 4, dtype=torch.float64)
        if self.flip or self.crop == "random":
            for epoch in {position.epoch for position in positions}:
                rows = [row for row, position in enumerate(positions) if position.epoch == epoch]
                draws[rows] = uniform(seed, [positions[row].index for row in rows], (4,), f"augment {epoch}")
        return draws

    def mirror(self, images: Tensor, draws: Tensor) -> None:
        """Mirror about half of the images, in place."""
        if self.flip:
            from torchvision.transforms.v2.functional import horizontal_flip

            chosen = draws[:, 0] < 0.5
            images[chosen] = horizontal_flip(images[chosen])


def open_images(
    config: DataConfig,
    size: int,
    *,
    flip: bool = False,
    crop: Literal["center", "random"] = "center",
    split: Literal["train", "held_out"] = "train",
    held_out_fraction: float = 0.1,
) -> ImageSource:
    """Open a data set at size x size pixels.

    flip and crop: augmentation of `training_batch`; "random" zooms by up to 1.25 and shifts.
    split: every image belongs to one of "train" and "held_out", by an order that nothing but the data set's
    length decides. Shapes are drawn instead: "held_out" is their split `val`, which shares no scene with
    `train`.
    Raises DataError or FileNotFoundError for data that cannot be used, ValueError for augmented shapes.
    """
    if size < 1:
        raise ValueError(f"size is {size}; images need at least 1 pixel a side")
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out_fraction is {held_out_fraction}; it must be at least 0 and below 1")
    if isinstance(config, ShapesConfig):
        if flip or crop != "center":
            wanted = "flip=true" if flip else f"crop={crop}"
            raise ValueError(
                f"{wanted} is not possible with data.kind=shapes: a mirrored crescent or a moved object is not what "
                "its caption and the oracle say; leave it out, and raise data.num_images for more variety"
            )
        return ShapesImages(_shapes_split(config, split, held_out_fraction), size)
    records = _open_records(config)
    indices = split_indices(len(records), split, held_out_fraction)
    return FileImages(records, indices, size, Augmentation(flip, crop))


def _open_records(config: ImageFolderConfig | ParquetConfig | TarConfig | HubConfig) -> Records:
    if isinstance(config, ImageFolderConfig):
        return FolderRecords(config)
    if isinstance(config, TarConfig):
        return TarRecords(config)
    if isinstance(config, ParquetConfig):
        return ParquetRecords(config)
    return ArrowRecords(config)


def split_indices(length: int, split: Literal["train", "held_out"], held_out_fraction: float) -> np.ndarray:
    """Rows of one part of a data set, ascending; the parts are disjoint and cover it."""
    held_out = round(length * held_out_fraction)
    order = permutation(0, 0, length)
    indices = np.sort(order[:held_out] if split == "held_out" else order[held_out:])
    if not len(indices):
        part = f"the {split} part of {length} images is empty at held_out_fraction {held_out_fraction}"
        raise DataError(f"{part}; change the fraction or add images")
    return indices


class FileImages:
    """Images decoded from records."""

    def __init__(self, records: Records, indices: np.ndarray, size: int, augmentation: Augmentation) -> None:
        self.size = size
        self.num_classes = records.num_classes
        self.class_names = records.class_names
        self._records = records
        self._indices = indices
        self._augmentation = augmentation

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def labels(self) -> np.ndarray:
        return self._records.labels[self._indices]

    def name(self, index: int) -> str:
        return self._records.name(int(self._indices[index]))

    def __getitem__(self, index: int) -> Sample:
        pixels, record = self._load(index)
        return Sample(from_uint8(pixels), record.label, record.name, record.text)

    def batch(self, indices: Sequence[int]) -> Batch:
        loaded: list[tuple[int, Tensor, Record]] = []
        unreadable: list[str] = []
        for index in indices:
            try:
                loaded.append((index, *self._load(index)))
            except UnreadableImage as error:
                unreadable.append(str(error))
        return _collate(loaded, unreadable, self.size)

    def views(self, indices: Sequence[int], views: Views) -> Batch:
        loaded: list[tuple[int, Tensor, Record]] = []
        unreadable: list[str] = []
        for index in indices:
            try:
                record = self._records[int(self._indices[index])]
                squares = views.of(decode_image(record.data, record.name), self.size, index)
            except UnreadableImage as error:
                unreadable.append(str(error))
            else:
                loaded += [(index, square, record) for square in squares]
        return _collate(loaded, unreadable, self.size)

    def blocks(self) -> Blocks | None:
        found = self._records.blocks() if isinstance(self._records, ParquetRecords) else None
        return None if found is None else found.of(self._indices)

    def texts(self, indices: Sequence[int]) -> list[str | None]:
        return [self._text(index) for index in indices]

    def _text(self, index: int) -> str | None:
        try:
            return self._records[int(self._indices[index])].text
        except UnreadableImage:
            return None

    def training_batch(self, positions: Sequence[Position], seed: int) -> Batch:
        draws = self._augmentation.draws(seed, positions)
        unreadable: list[str] = []
        loaded = [
            self._next_readable(position.index, row, unreadable)
            for position, row in zip(positions, draws.tolist(), strict=True)
        ]
        batch = _collate(loaded, unreadable, self.size)
        self._augmentation.mirror(batch.images, draws)
        return batch

    def _next_readable(self, start: int, draws: list[float], unreadable: list[str]) -> tuple[int, Tensor, Record]:
        for index in range(start, start + max_unreadable(len(self)) + 1):
            try:
                return (index % len(self), *self._load(index % len(self), draws))
            except UnreadableImage as error:
                unreadable.append(str(error))
        raise too_many_unreadable(unreadable, len(self))

    def _load(self, index: int, draws: Sequence[float] | None = None) -> tuple[Tensor, Record]:
        """The image as uint8 (3, size, size), cropped at random if there are draws and it is wanted."""
        record = self._records[int(self._indices[index])]
        picture = decode_image(record.data, record.name)
        if draws is not None and self._augmentation.crop == "random":
            picture = random_crop(picture, self.size, draws[1:])
        elif picture.size != (self.size, self.size):
            picture = center_crop_adm(picture, self.size)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1), record


def _collate(loaded: Sequence[tuple[int, Tensor, Record]], unreadable: Sequence[str], size: int) -> Batch:
    indices, pixels, records = zip(*loaded, strict=True) if loaded else ((), (), ())
    images = torch.stack(pixels) if pixels else torch.empty(0, 3, size, size, dtype=torch.uint8)
    return Batch(
        from_uint8(images),
        torch.tensor([record.label for record in records], dtype=torch.int64),
        tuple(record.name for record in records),
        tuple(record.text for record in records),
        tuple(indices),
        tuple(unreadable),
    )


def max_unreadable(length: int) -> int:
    """How many different images of a data set may be unreadable: 1 %, and always one."""
    return max(1, length // 100)


def too_many_unreadable(messages: Sequence[str], length: int) -> DataError:
    """The error that ends a run, with the list."""
    shown = "\n  ".join(messages[:50])
    more = f"\n  and {len(messages) - 50} more" if len(messages) > 50 else ""
    allowed = f"{max_unreadable(length)} are allowed (1 %, at least 1)"
    count = f"{len(messages)} of {length} images are unreadable, {allowed}"
    return DataError(f"{count}; repair or remove them:\n  {shown}{more}")


# Shapes


class ShapesImages:
    """The built-in shapes; drawn a batch at a time, which is much faster than one by one."""

    def __init__(self, config: ShapesConfig, size: int) -> None:
        self.size = size
        self._shapes = ShapesDataset(config, size)
        self.num_classes = self._shapes.num_classes
        self.class_names = self._shapes.class_names

    def __len__(self) -> int:
        return len(self._shapes)

    @property
    def labels(self) -> np.ndarray:
        return self._shapes.labels(range(len(self)))

    def name(self, index: int) -> str:
        return self._shapes.name(index)

    def __getitem__(self, index: int) -> Sample:
        sample = self._shapes[index]
        return Sample(sample.image, sample.label, sample.name, sample.text)

    def batch(self, indices: Sequence[int]) -> Batch:
        images, labels = self._shapes.batch(indices)
        config = self._shapes.config
        texts = [self._shapes.caption(i).text if config.mode == "text" else "" for i in indices]
        names = [self.name(i) for i in indices]
        return Batch(images, labels, tuple(names), tuple(texts), tuple(indices))

    def views(self, indices: Sequence[int], views: Views) -> Batch:
        """The scenes as they are: a moved or mirrored one is not what its caption and the oracle say."""
        if views.count != 1 or views.crops != "center":
            raise ValueError("crops and mirror images are not possible with data.kind=shapes")
        return self.batch(indices)

    def blocks(self) -> Blocks | None:
        return None

    def texts(self, indices: Sequence[int]) -> list[str | None]:
        if self._shapes.config.mode != "text":
            return [""] * len(indices)
        return [self._shapes.caption(index).text for index in indices]

    def training_batch(self, positions: Sequence[Position], seed: int) -> Batch:
        return self.batch([position.index for position in positions])


def _shapes_split(config: ShapesConfig, split: str, held_out_fraction: float) -> ShapesConfig:
    if split == "train":
        return config
    if config.split != "train":
        raise DataError(f"shapes: split is {config.split!r}; only split 'train' has a held-out part, which is 'val'")
    return replace(config, split="val", num_images=max(1, round(config.num_images * held_out_fraction)))
