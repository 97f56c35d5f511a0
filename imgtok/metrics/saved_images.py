"""Images on disk as they are scored: a folder, tars, Parquet files, or an array in an .npz or .npy file.

What is an image in a folder, tar or Parquet file, in which order, and where labels are, is what training says
(docs/data.md). A folder that `imgtok sample` made holds `samples.json` with the label of each numbered image; an .npz
holds `arr_0` (n, H, W, 3) uint8, as the ADM evaluator writes and reads it, and possibly the labels `arr_1` (n,).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imgtok.data.files import PARQUET, LeftOut, list_folder, numbered_images, stem_of, suffix_of, summary
from imgtok.data.images import max_unreadable
from imgtok.data.parquet import ParquetConfig, ParquetRecords
from imgtok.data.sources import (
    DataError,
    FolderRecords,
    ImageFolderConfig,
    Labels,
    Record,
    Records,
    identity_of,
    places_all_over,
    read_bytes,
)
from imgtok.data.tar import TarConfig, TarRecords
from imgtok.files import is_pattern
from imgtok.metrics.arrays import ArrayImages, Values, open_npy, open_npz, read_array
from imgtok.pictures import UnreadableImage, center_crop_adm, decode_image
from imgtok.sizes import Size, as_given, sides, size_of

logger = logging.getLogger(__name__)

RECORD = "samples.json"
KINDS = "a folder of images, tars (.tar), Parquet files (.parquet), or arrays (.npz, .npy)"
_PROBES = 16  # images whose size is looked at before any is scored


class SavedImages:
    """Images with random access, all of one size; `labels` is None where none were saved, or no classes drawn."""

    def __init__(self, path: Path, *, resize: Size | None = None, values: Values | None = None) -> None:
        """With `resize`, the images come at that size (`pictures.center_crop_adm`). `values`
        says what the floats of an array are. Raises FileNotFoundError or ValueError for a path that holds no images,
        or only a part of them, or images of several sizes.
        """
        self.path, self._resize = path, resize
        self._images = _open(path.expanduser(), values)
        self.labels: Tensor | None = self._images.labels
        self.class_names: tuple[str, ...] = self._images.class_names
        self.labels_missing: str = self._images.labels_missing
        if len(self) == 0:
            raise ValueError(f"{path}: holds no images")
        self.size: tuple[int, int] = sides(resize) if resize else self._first_size()
        if not resize:
            self._check_some_sizes()

    def __len__(self) -> int:
        return len(self._images)

    @property
    def named(self) -> bool:
        """Whether images are told apart by their names, and not by their places."""
        return isinstance(self._images, _Files)

    def name(self, index: int) -> str:
        """What an image is known by elsewhere: its path in the folder or tar without the ending, or its place."""
        return self._images.key(index)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """uint8 (B, 3, H, W). Raises ValueError naming a file that cannot be read or has another size."""
        images = []
        for index in indices:
            image = self._raw(index)
            if image.shape[:2] != self.size:
                raise self._other_size(index, image.shape)
            images.append(torch.from_numpy(image))
        return torch.stack(images).permute(0, 3, 1, 2).contiguous()

    def readable(self, indices: Sequence[int]) -> tuple[list[int], Tensor, list[str]]:
        """Which of the images can be read, as places in `indices`; these, uint8 (B, 3, H, W); and what ails the others.

        Raises ValueError naming a file of another size.
        """
        places: list[int] = []
        images = [torch.empty(0, 3, *self.size, dtype=torch.uint8)]
        problems: list[str] = []
        for place, index in enumerate(indices):
            try:
                images.append(self.batch([index]))
                places.append(place)
            except UnreadableImage as error:
                problems.append(str(error))
        return places, torch.cat(images), problems

    def _first_size(self) -> tuple[int, int]:
        """That of the first image that can be read, where few cannot. Raises UnreadableImage otherwise."""
        last = max_unreadable(len(self))
        for index in range(min(len(self), last + 1)):
            try:
                height, width, _ = self._raw(index).shape
            except UnreadableImage:
                if index in (last, len(self) - 1):
                    raise
            else:
                return height, width
        raise AssertionError("there is an image")

    def _check_some_sizes(self) -> None:
        """Most sets of mixed sizes are found out here, and not after an hour."""
        for index in places_all_over(len(self), min(_PROBES, len(self))).tolist() if self._images.may_vary else ():
            try:
                image = self._raw(index)
            except UnreadableImage:  # counted when it is scored
                continue
            if image.shape[:2] != self.size:
                raise self._other_size(index, image.shape)

    def _other_size(self, index: int, shape: tuple[int, ...]) -> ValueError:
        given, first = (f"{width}x{height}" for height, width in (shape[:2], self.size))
        return ValueError(
            f"{self._images.where(index)}: is {given}, but the first image of {self.path} is {first}; "
            f"{resize_remedy(min(self.size))}"
        )

    def _raw(self, index: int) -> np.ndarray:
        image = self._images[index]
        if self._resize is None or image.shape[:2] == self.size:
            return image
        return np.array(center_crop_adm(Image.fromarray(image), self._resize))


def resize_remedy(size: Size) -> str:
    """What to do about images of several sizes."""
    height, width = sides(size)
    how = "the shorter side is scaled, then the central square taken, as in the ADM suite"
    if height != width:
        how = "each is scaled until it covers that, then its centre taken"
    return (
        f"resize={as_given(size)} brings all of them to {height} x {width} pixels, images, originals and real ones "
        f"alike ({how})"
    )


# ---------------------------------------------------------------- kinds


class _Images(Protocol):
    """What every kind of file gives."""

    labels: Tensor | None
    class_names: tuple[str, ...]
    labels_missing: str
    may_vary: bool
    """Whether images can be of several sizes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises UnreadableImage."""

    def key(self, index: int) -> str:
        """What an image is paired by: its path below the root without the ending, or its place as text."""

    def where(self, index: int) -> str:
        """What an image is called in messages."""


def _open(path: Path, values: Values | None) -> _Images:
    """Whatever the path holds; arrays are (N, H, W, 3), or in .npy files also (N, 3, H, W) and (N, H, W).

    Raises FileNotFoundError, or ValueError for what is not understood.
    """
    suffix = path.suffix.lower()
    pattern = is_pattern(path)
    if not pattern and not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; images to score are {KINDS}")
    if path.is_dir():
        return _open_folder(path)
    if suffix == ".tar":
        return _Files(path, _labelled(TarRecords, TarConfig, str(path)))
    if suffix in PARQUET:
        return _Rows(path, _labelled(ParquetRecords, ParquetConfig, str(path)))
    if suffix == ".npz" and not pattern:
        return _open_npz(path, values)
    if suffix == ".npy" and not pattern:
        return _Array(path, ArrayImages(open_npy(path), str(path), values))
    raise FileNotFoundError(f"{path}: expected {KINDS}")


def _open_folder(path: Path) -> _Images:
    if (path / RECORD).exists():
        return _Files(path, _Numbered(path))
    listing = list_folder(path)
    endings = {suffix_of(name) for name in listing.others}
    if not listing.images and ".tar" in endings:
        return _Files(path, _labelled(TarRecords, TarConfig, str(path)))
    if not listing.images and endings & {*PARQUET}:
        return _Rows(path, _labelled(ParquetRecords, ParquetConfig, str(path)))
    return _Files(path, _labelled(FolderRecords, ImageFolderConfig, path))


def _labelled(records: type, config: type, path: Path | str) -> Records:
    """The records, with their labels where these are understood: scores that need none take images without."""
    try:
        found: Records = records(config(path=path))
    except DataError as error:
        found = records(config(path=path, labels="none"))  # which raises what is not about labels
        logger.info("%s: labels are left out: %s", path, error)
        found.labels = Labels(found.labels.values, missing=str(error))
    return found


class _Rows:
    """Images of records that are known by their places, as in Parquet files."""

    may_vary = True

    def __init__(self, path: Path, records: Records) -> None:
        self._records = records
        known = records.labels
        self.labels = torch.from_numpy(known.values.astype(np.int64)) if known.num_classes else None
        self.class_names, self.labels_missing = known.names, known.missing
        logger.info("%s: %s", path, summary(len(records), records.left_out))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> np.ndarray:
        record = self._records[index]
        return np.array(decode_image(record.data, record.name))

    def key(self, index: int) -> str:
        return str(index)

    def where(self, index: int) -> str:
        return self._records.name(index)


class _Files(_Rows):
    """Images of records that have names of their own, as in folders and tars."""

    def key(self, index: int) -> str:
        member: str = self._records.member(index)  # type: ignore[attr-defined]
        return stem_of(member)


class _Array:
    """Images of an array."""

    may_vary = False
    class_names: tuple[str, ...] = ()
    labels_missing = ""

    def __init__(self, path: Path, images: ArrayImages, labels: Tensor | None = None) -> None:
        self._path, self._images, self.labels = path, images, labels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._images[index]

    def key(self, index: int) -> str:
        return str(index)

    def where(self, index: int) -> str:
        return f"{self._path}[{index}]"


class _Numbered:
    """The images of a folder that `imgtok sample` made, as records; older versions left their overview among them."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a folder of which images are missing."""
        numbered = numbered_images(folder)
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        labels = recorded["labels"]
        missing = [number for number in range(len(labels)) if number not in numbered]
        if missing:
            raise ValueError(
                f"{folder}: {len(missing)} of the {len(labels)} images of {RECORD} are missing, the first is "
                f"{missing[0]:06d}.png; run the same `imgtok sample` again to finish them"
            )
        self._files = [numbered[number] for number in range(len(labels))]
        from_classes = not recorded.get("request", {}).get("prompts") and min(labels, default=-1) >= 0
        values = np.array(labels if from_classes else [0] * len(labels), dtype=np.int64)
        self.labels = Labels(values, int(values.max(initial=0)) + 1 if from_classes else 0)
        self.left_out = _beside_samples(folder, {path.name for path in self._files})

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        path = self._files[index]
        return Record(read_bytes(str(path)), int(self.labels.values[index]), str(path), "")

    def name(self, index: int) -> str:
        return str(self._files[index])

    def member(self, index: int) -> str:
        return self._files[index].name

    def identity(self) -> dict[str, Any]:
        return identity_of("samples", [path.name for path in self._files], self.labels, [])


def _beside_samples(folder: Path, samples: set[str]) -> LeftOut:
    """The images of the folder that are none of the samples: an overview, or those of an earlier, larger job."""
    listing = list_folder(folder)
    left_out = listing.left_out([RECORD])
    more = sum(entry.name not in samples for entry in listing.images)
    left_out.counts.update({f"not in {RECORD}": more} if more else {})
    return left_out


def _open_npz(path: Path, values: Values | None) -> _Array:
    with open_npz(path) as arrays:
        name = _images_in(arrays, path)
        array = read_array(arrays, name, path)
        labels = read_array(arrays, "arr_1", path) if name == "arr_0" and "arr_1" in arrays else None
    images = ArrayImages(array, f"{path}: {name}", values)
    if labels is not None:
        if labels.shape != (len(array),) or not np.issubdtype(labels.dtype, np.integer):
            found = f"arr_1 is {labels.dtype} {labels.shape}"
            raise ValueError(f"{path}: {found}, expected {len(array)} integer labels")
        if labels.min(initial=0) >= 0:
            return _Array(path, images, torch.from_numpy(labels.astype(np.int64)))
    return _Array(path, images)


def holds_images(path: Path) -> bool:
    """Whether an .npz holds images beside statistics, as ADM's reference batches do."""
    with open_npz(path) as arrays:
        return "arr_0" in arrays


def _images_in(arrays: np.lib.npyio.NpzFile, path: Path) -> str:
    """The array of images: arr_0, or the only one."""
    if "arr_0" in arrays:
        return "arr_0"
    names = sorted(arrays)
    if len(names) == 1 and names[0] != "mu":
        return names[0]
    if "mu" in names:
        raise ValueError(
            f"{path}: holds only statistics ({', '.join(names)}) and no images arr_0; reference= takes them"
        )
    raise ValueError(f"{path}: holds {names}, no images arr_0")


# ---------------------------------------------------------------- pairs


def partners(images: SavedImages, originals: SavedImages, chosen: Sequence[int]) -> list[int]:
    """The original of each of the chosen images, by name; arrays and Parquet files go with each other by place.

    Raises ValueError for an image without an original, a name that two originals have, names beside places, or images
    of another size.
    """
    if images.named != originals.named:
        raise ValueError(
            f"{images.path} and {originals.path}: images of folders and tars are paired by name, those of .npz, .npy "
            "and Parquet files by place; use the same kind for both"
        )
    if images.size != originals.size:
        given, wanted = (f"{width}x{height}" for height, width in (images.size, originals.size))
        raise ValueError(
            f"{images.path}: images of {given}, but the originals in {originals.path} are {wanted}; "
            f"{resize_remedy(size_of(*images.size))}"
        )
    places: dict[str, int] = {}
    for index in range(len(originals)):
        name = originals.name(index)
        if name in places:
            raise ValueError(f"{originals.path}: two originals are called {name}; keep one of them")
        places[name] = index
    lonely = [images.name(index) for index in chosen if images.name(index) not in places]
    if lonely:
        raise ValueError(
            f"{images.path}: {len(lonely)} of {len(chosen)} images have no original of their name in {originals.path}; "
            f"the first is {lonely[0]}, and originals are called {originals.name(0)} and so on"
        )
    if len(places) > len(chosen):
        logger.warning(
            "%d of the %d originals in %s are left out", len(places) - len(chosen), len(places), originals.path
        )
    return [places[images.name(index)] for index in chosen]
