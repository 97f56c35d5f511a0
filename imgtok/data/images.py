"""From a configuration to tensors: opens any source of images, crops, flips, divides off the held-out part.

An `ImageSource` has random access and no state that its results depend on: image i is the same picture on
every call, and its augmentation in epoch e of seed s depends on (s, e, i) alone. Hence resume, workers and
several processes change nothing. Unreadable images never raise here; a batch lists them, and loaders.py
decides.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imgtok.data.arrow import ArrowRecords, HubConfig
from imgtok.data.blocks import Blocks
from imgtok.data.files import summary
from imgtok.data.labels import WAYS, Labels
from imgtok.data.parquet import ParquetConfig, ParquetRecords
from imgtok.data.parts import FileConfig, check_there, parts_of
from imgtok.data.sources import DataError, FolderRecords, ImageFolderConfig, Record, Records, places_all_over
from imgtok.data.tar import TarConfig, TarRecords
from imgtok.pictures import UnreadableImage, center_crop_adm, corner_crops, decode_image, from_uint8, random_crop
from imgtok.randomness import permutation, uniform
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import ShapesConfig
from imgtok.sizes import Size, in_pixels, sides, square

__all__ = [
    "HOW_TO_NAME",
    "Batch",
    "DataConfig",
    "DataError",
    "HubConfig",
    "ImageFolderConfig",
    "ImageSource",
    "Opened",
    "ParquetConfig",
    "Position",
    "Sample",
    "ShapesConfig",
    "TarConfig",
    "Views",
    "all_over",
    "in_words",
    "open_images",
    "open_split",
    "require_labels",
]

logger = logging.getLogger(__name__)

DataConfig = ImageFolderConfig | ParquetConfig | TarConfig | HubConfig | ShapesConfig
"""Every source of images; `kind` chooses one in a configuration."""
HOW_TO_NAME = (
    "data.kind=folder data.path=FOLDER names a folder of images (other kinds: parquet and webdataset with data.path, "
    "huggingface with data.name), data.kind=shapes the built-in shapes"
)
"""What to say to somebody who named no images."""


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
    """Which crops of an image stand for it where it is read once and kept, as in a token cache.

    View v of an image depends on these fields, the image's index and v alone.
    """

    crops: Literal["center", "five", "random"] = "center"
    """One centre crop; the four corners and the centre; or `num_crops` at random places and scales."""
    num_crops: int = 1
    """Random crops of an image; the others have 1 and 5."""
    zoom: float = 1.1
    """What the image covers before cropping, over the size: at most (random), exactly (five)."""
    mirrored: bool = False
    """Whether each crop is there a second time, mirrored."""
    seed: int = 0
    """Seed of the random crops."""

    @property
    def count(self) -> int:
        """Views of one image."""
        crops = {"center": 1, "five": 5, "random": self.num_crops}[self.crops]
        return 2 * crops if self.mirrored else crops

    def of(self, picture: Image.Image, size: Size, index: int) -> Tensor:
        """(count, 3, H, W) uint8: the crops, then their mirror images."""
        if self.crops == "center":
            parts = [center_crop_adm(picture, size)]
        elif self.crops == "five":
            parts = corner_crops(picture, size, self.zoom)
        else:
            draws = uniform(self.seed, [index], (self.num_crops, 3), "crops")[0].tolist()
            parts = [random_crop(picture, size, row, self.zoom) for row in draws]
        crops = torch.stack([torch.from_numpy(np.array(part)).permute(2, 0, 1) for part in parts])
        return torch.cat([crops, crops.flip(-1)]) if self.mirrored else crops


class ImageSource(Protocol):
    """Images with random access. `num_classes` is 0 for data without labels."""

    size: Size
    num_classes: int
    class_names: tuple[str, ...]
    labels_missing: str
    """Why there are no labels, where some were asked for; "" otherwise."""

    @property
    def identity(self) -> str:
        """The data set, told from others by its content and not by its place: JSON text for a cache or a run's record.

        It is that of the whole, and so equal for the images that are trained on and those that are held out of them.
        """

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


Split = Literal["train", "held_out"]
Crop = Literal["center", "random"]


def open_images(
    config: DataConfig,
    size: Size,
    *,
    flip: bool = False,
    crop: Crop = "center",
    split: Split = "train",
    held_out_fraction: float = 0.1,
) -> ImageSource:
    """Open a data set at a size in pixels, a side of squares or (height, width).

    flip and crop: augmentation of `training_batch`; "random" zooms by up to 1.25 and shifts.
    split: every image belongs to one of "train" and "held_out". A data set may have a part of its own for the latter
    (`imgtok.data.parts`); otherwise an order decides that knows nothing but the data set's length. Shapes are drawn
    instead: "held_out" is their split `val`, which shares no scene with `train`.
    Raises DataError or FileNotFoundError for data that cannot be used, ValueError for augmented shapes.
    """
    if min(sides(size)) < 1:
        raise ValueError(f"size is {in_pixels(size)}; images need at least 1 pixel a side")
    if not 0 <= held_out_fraction < 1:
        raise ValueError(f"held_out is {held_out_fraction}; it must be at least 0 and below 1")
    return Opened(config).images(size, split, held_out_fraction, flip=flip, crop=crop)


class Divided(NamedTuple):
    """The images of a training."""

    source: ImageSource
    """To train on."""
    shown: ImageSource
    """To show: those that are held out, or those that are trained on."""
    words: str
    """Which they are, and how many."""


def open_split(config: DataConfig, size: Size, *, flip: bool, crop: Crop, held_out: float) -> Divided:
    """Images to train on, and those that are held out, to show: a share of them, or a part of the data set's own.

    Without a share (0) and a part of its own, training images are shown. Raises as `open_images`.
    """
    opened = Opened(config)
    source = opened.images(size, "train", held_out, flip=flip, crop=crop)
    apart = bool(held_out) or opened.has_held_out
    if apart and not opened.has_held_out and opened.count < 2:
        raise DataError(
            f"held_out: none of 1 image of {in_words(config)} can be held out: held_out=0 trains on it and shows it; "
            "or add images"
        )
    shown = opened.images(size, "held_out" if apart else "train", held_out)
    rest = f"{len(shown)} held out" if apart else "none held out"
    return Divided(source, shown, f"{in_words(config)}: {size_in_words(source, '{} to train on, ' + rest)}")


class Opened:
    """A data set whose files were looked through once, and is divided from there."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.has_held_out = False
        if isinstance(config, ShapesConfig):
            return
        parts = parts_of(config)
        self._parts = parts
        self._train = _open_records(parts.train)
        self._held_out: Records | None = None
        self.has_held_out = parts.held_out is not None
        _say_what_it_is(parts.train, self._train)
        if parts.held_out is not None:
            check_there(parts.held_out)
            logger.info("held-out images: those of %s", in_words(parts.held_out))

    @property
    def count(self) -> int:
        """Images that are used, those of a part of its own for held-out images not among them."""
        if isinstance(self.config, ShapesConfig):
            return self.config.num_images
        return min(len(self._train), self.config.num or len(self._train))

    @property
    def identity(self) -> str:
        """As that of an `ImageSource`."""
        if isinstance(self.config, ShapesConfig):
            return json.dumps(self.config.identity, sort_keys=True)
        return _identity(self._train, self._told)

    @property
    def _told(self) -> dict[str, Any]:
        """What the identity tells beside the records: how they are divided, as far as the data set itself says it."""
        number = {} if self.config.num is None else {"num": self.config.num}  # type: ignore[union-attr]
        return number | {"own_held_out": self.has_held_out}

    def images(
        self, size: Size, split: Split, held_out_fraction: float, *, flip: bool = False, crop: Crop = "center"
    ) -> ImageSource:
        """One part, at a size."""
        config = self.config
        if isinstance(config, ShapesConfig):
            _refuse_augmentation(flip, crop)
            side = square(size, "data: data.kind=shapes draws squares: name others, such as data.kind=folder")
            return ShapesImages(_shapes_split(config, split, held_out_fraction), side, config)
        records, labels = self._train, self._train.labels
        own = self._parts.held_out
        if own is not None and split == "held_out":
            if self._held_out is None:
                self._held_out = _open_records(own)
                _say_what_it_is(own, self._held_out)
            records = self._held_out
            labels = _as_in_training(records.labels, labels, in_words(own))
        chosen = _choose(labels, config.num)
        if own is None:
            chosen = chosen[split_indices(len(chosen), split, held_out_fraction)]
        return FileImages(records, chosen, size, Augmentation(flip, crop), labels=labels, told=self._told)


def _open_records(config: FileConfig) -> Records:
    if isinstance(config, ImageFolderConfig):
        return FolderRecords(config)
    if isinstance(config, TarConfig):
        return TarRecords(config)
    if isinstance(config, ParquetConfig):
        return ParquetRecords(config)
    return ArrowRecords(config)


def in_words(config: DataConfig) -> str:
    """The place of a data set, for messages."""
    if isinstance(config, ShapesConfig):
        return "the built-in shapes"
    return f"{config.name}, split {config.split}" if isinstance(config, HubConfig) else str(config.path)


def size_in_words(source: ImageSource, which: str) -> str:
    """`36 images to train on, 3 classes, 64 px`, where `which` is "{} to train on"."""
    count, number = len(source), source.num_classes
    classes = f"{number} class{'es'[: 2 * (number != 1)]}" if number else "unlabelled"
    return f"{which.format(f'{count} image' + 's'[: count != 1])}, {classes}, {in_pixels(source.size)} px"


def all_over(source: ImageSource, num: int) -> list[int]:
    """Places of `num` images that stand for all, ascending and always the same: of each class its share.

    Raises ValueError for more than there are.
    """
    places: list[int] = places_all_over(len(source), num, source.labels if source.num_classes else None).tolist()
    return places


def _say_what_it_is(config: FileConfig, records: Records) -> None:
    labels = records.labels.in_words
    logger.info("%s: %s; %s", in_words(config), summary(len(records), records.left_out), labels)


def _identity(records: Records, told: Mapping[str, Any]) -> str:
    return json.dumps({**records.identity(), **told}, sort_keys=True)


def _choose(labels: Labels, num: int | None) -> np.ndarray:
    """The images that are used, ascending: all, or `num` from all over the set."""
    count = len(labels.values)
    if num is None or num >= count:
        if num is not None and num > count:
            logger.warning("data.num: %d images are asked for, and there are %d: all are used", num, count)
        return np.arange(count)
    how = "from each class its share" if labels.num_classes else f"one of each {num} equal stretches of its files"
    logger.info("data.num: %d of %d images, %s", num, count, how)
    return places_all_over(count, num, labels.values if labels.num_classes else None)


def _as_in_training(labels: Labels, training: Labels, where: str) -> Labels:
    """The labels of held-out images with the numbers that the same classes have in training."""
    if not labels.num_classes:
        return labels
    if not labels.names or not training.names or labels.names == training.names:
        total = max(labels.num_classes, training.num_classes)
        return replace(labels, num_classes=total, names=labels.names or training.names)
    number = {name: index for index, name in enumerate(training.names)}
    unknown = [name for name in labels.names if name not in number]
    if unknown:
        raise DataError(
            f"{where}: class {unknown[0]!r} is none of the {len(number)} classes of the training images, such as "
            f"{training.names[0]!r}; name the classes alike, or data.labels=none"
        )
    numbers = np.array([number[name] for name in labels.names])
    values = numbers[labels.values] if len(labels.values) else labels.values
    return replace(labels, values=values, num_classes=training.num_classes, names=training.names)


def require_labels(source: ImageSource, what: str) -> None:
    """Raises DataError for images without labels, unless none were asked for; `what` is in words what they are for."""
    if source.labels_missing:
        raise DataError(
            f"{what} keeps labels, and there are none: {source.labels_missing}. data.labels=none goes without; else "
            f"say where they are: {WAYS}"
        )


def split_indices(length: int, split: Split, held_out_fraction: float) -> np.ndarray:
    """Rows of one part of a data set, ascending; the parts are disjoint and cover it. A share above 0 is at least one
    image, and leaves at least one to train on.
    """
    held_out = round(length * held_out_fraction)
    if held_out_fraction > 0:
        held_out = min(max(1, held_out), length - 1)
    order = permutation(0, 0, length)
    indices = np.sort(order[:held_out] if split == "held_out" else order[held_out:])
    if not len(indices):
        what = f"none of {length} image{'s'[: length != 1]} is held out at held_out={held_out_fraction:g}"
        more = "add images" if held_out_fraction else "choose a share such as held_out=0.1"
        raise DataError(f"held_out: {what}; {more}, or take the other part, split=train")
    return indices


class FileImages:
    """Images decoded from records."""

    def __init__(
        self,
        records: Records,
        indices: np.ndarray,
        size: Size,
        augmentation: Augmentation,
        *,
        labels: Labels | None = None,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """`indices` are the records that are used. `labels` stand in for those of the records, `told` is what their
        identity says beside them: how they were chosen and divided.
        """
        labels = records.labels if labels is None else labels
        self.size = size
        self.num_classes = labels.num_classes
        self.class_names = labels.names
        self.labels_missing = labels.missing
        self._labels = labels.values
        self._records = records
        self._indices = indices
        self._augmentation = augmentation
        self._told = told or {}

    @functools.cached_property
    def identity(self) -> str:
        """That of the records, with the number of images if it was limited, and whether others are held out."""
        return _identity(self._records, self._told)

    @property
    def records(self) -> Records:
        """The table that the images are in."""
        return self._records

    @property
    def places(self) -> np.ndarray:
        """(N,) where the images are in `records`, ascending."""
        return self._indices

    def _record(self, index: int) -> Record:
        place = int(self._indices[index])
        return self._records[place]._replace(label=int(self._labels[place]))

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def labels(self) -> np.ndarray:
        return self._labels[self._indices]

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
                record = self._record(index)
                crops = views.of(decode_image(record.data, record.name), self.size, index)
            except UnreadableImage as error:
                unreadable.append(str(error))
            else:
                loaded += [(index, crop, record) for crop in crops]
        return _collate(loaded, unreadable, self.size)

    def blocks(self) -> Blocks | None:
        found = self._records.blocks() if isinstance(self._records, ParquetRecords) else None
        return None if found is None else found.of(self._indices)

    def texts(self, indices: Sequence[int]) -> list[str | None]:
        return [self._text(index) for index in indices]

    def _text(self, index: int) -> str | None:
        try:
            return self._record(index).text
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
        """The image as uint8 (3, H, W), cropped at random if there are draws and it is wanted."""
        record = self._record(index)
        height, width = sides(self.size)
        at_random = draws is not None and self._augmentation.crop == "random"
        # published crops are of the whole picture; one at random, of up to 1.25 times the size, may be of a reduced one
        picture = decode_image(record.data, record.name, at_least=3 * max(height, width) if at_random else None)
        if draws is not None and at_random:
            picture = random_crop(picture, self.size, draws[1:])
        elif picture.size != (width, height):
            picture = center_crop_adm(picture, self.size)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1), record


def _collate(loaded: Sequence[tuple[int, Tensor, Record]], unreadable: Sequence[str], size: Size) -> Batch:
    indices, pixels, records = zip(*loaded, strict=True) if loaded else ((), (), ())
    images = torch.stack(pixels) if pixels else torch.empty(0, 3, *sides(size), dtype=torch.uint8)
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

    labels_missing = ""

    def __init__(self, config: ShapesConfig, size: int, whole: ShapesConfig | None = None) -> None:
        """`whole` is the configuration that this split was made from."""
        self.size: Size = size
        self.config = config
        self._identity = json.dumps((whole or config).identity, sort_keys=True)
        self._shapes = ShapesDataset(config, size)
        self.num_classes = self._shapes.num_classes
        self.class_names = self._shapes.class_names

    @property
    def identity(self) -> str:
        return self._identity

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


def _refuse_augmentation(flip: bool, crop: str) -> None:
    if flip or crop != "center":
        wanted = "flip=true" if flip else f"crop={crop}"
        raise ValueError(
            f"{wanted} is not possible with data.kind=shapes: a mirrored crescent or a moved object is not what "
            "its caption and the oracle say; leave it out, and raise data.num_images for more variety"
        )


def _shapes_split(config: ShapesConfig, split: str, held_out_fraction: float) -> ShapesConfig:
    if split == "train":
        return config
    if config.split != "train":
        raise DataError(
            f"shapes: split is {config.split!r}; only split 'train' has a held-out part, which is 'val'. held_out=0 "
            "trains on all of it, held_out=1 shows or scores all of it"
        )
    return replace(config, split="val", num_images=max(1, round(config.num_images * held_out_fraction)))
