"""Images on disk as they are scored: a folder of files, or an .npz as the ADM evaluator writes and reads it.

A folder that `imgtok sample` made holds `samples.json` with the label of each numbered image; an .npz holds `arr_0`
(n, H, W, 3) uint8 and possibly the labels `arr_1` (n,).
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imgtok.data.files import list_folder, numbered_images, stem_of, summary
from imgtok.data.sources import read_bytes
from imgtok.pictures import SUFFIXES, UnreadableImage, decode_image

logger = logging.getLogger(__name__)

RECORD = "samples.json"


class SavedImages:
    """Images with random access, all of one size; `labels` is None where none were saved, or no classes drawn."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError or ValueError for a path that holds no images, or only a part of them."""
        self.path = path
        self._files: list[Path] = []
        self._names: list[str] = []
        self._array: np.ndarray | None = None
        self.labels: Tensor | None = None
        if path.is_dir():
            self._open_folder()
        elif path.suffix == ".npz" and path.is_file():
            self._open_npz()
        else:
            raise FileNotFoundError(f"{path}: expected a folder of images or an .npz file")
        if len(self) == 0:
            raise ValueError(f"{path}: holds no images ({', '.join(SUFFIXES)})")
        self.size: tuple[int, int] = self._first_size()

    def __len__(self) -> int:
        return len(self._files) if self._array is None else len(self._array)

    def name(self, index: int) -> str:
        """What a file is known by in another folder: its path in this one, without the ending; the index in an .npz."""
        if self._array is not None:
            return str(index)
        return stem_of(self._names[index])

    def batch(self, indices: Sequence[int]) -> Tensor:
        """uint8 (B, 3, H, W). Raises ValueError naming a file that cannot be read or has another size."""
        images = []
        for index in indices:
            image = self._raw(index)
            if image.shape[:2] != self.size:
                given, first = (f"{width}x{height}" for height, width in (image.shape[:2], self.size))
                raise ValueError(f"{self._files[index]}: is {given}, but the first image of the folder is {first}")
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
        last = max(1, len(self) // 100)  # as many as may be unreadable
        for index in range(min(len(self), last + 1)):
            try:
                height, width, _ = self._raw(index).shape
            except UnreadableImage:
                if index in (last, len(self) - 1):
                    raise
            else:
                return height, width
        raise AssertionError("there is an image")

    def _raw(self, index: int) -> np.ndarray:
        if self._array is not None:
            return self._array[index]
        path = self._files[index]
        return np.array(decode_image(read_bytes(str(path)), str(path)))

    def _open_folder(self) -> None:
        record = self.path / RECORD
        if not record.exists():
            listing = list_folder(self.path)
            self._names = [entry.name for entry in listing.images]
            self._files = [self.path / name for name in self._names]
            if self._files:
                logger.info("%s: %s", self.path, summary(len(self._files), listing.left_out()))
            return
        # Beside the numbered images older versions of the sampler left their overview grid, which is no sample.
        numbered = numbered_images(self.path)
        recorded = json.loads(record.read_text(encoding="utf-8"))
        labels = recorded["labels"]
        missing = [number for number in range(len(labels)) if number not in numbered]
        if missing:
            raise ValueError(
                f"{self.path}: {len(missing)} of the {len(labels)} images of {RECORD} are missing, the first is "
                f"{missing[0]:06d}.png; run the same `imgtok sample` again to finish them"
            )
        self._files = [numbered[number] for number in range(len(labels))]
        self._names = [path.name for path in self._files]
        from_classes = not recorded.get("request", {}).get("prompts") and min(labels, default=0) >= 0
        self.labels = torch.tensor(labels, dtype=torch.long) if from_classes else None

    def _open_npz(self) -> None:
        with open_npz(self.path) as arrays:
            if "arr_0" not in arrays:
                raise ValueError(f"{self.path}: holds {sorted(arrays)}, no images arr_0")
            array = arrays["arr_0"]
            labels = arrays.get("arr_1")
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
            raise ValueError(f"{self.path}: arr_0 is {array.dtype} {array.shape}, expected uint8 (n, H, W, 3)")
        self._array = array
        if labels is not None:
            if labels.shape != (len(array),) or not np.issubdtype(labels.dtype, np.integer):
                found = f"arr_1 is {labels.dtype} {labels.shape}"
                raise ValueError(f"{self.path}: {found}, expected {len(array)} integer labels")
            self.labels = torch.from_numpy(labels.astype(np.int64)) if labels.min(initial=0) >= 0 else None


def partners(images: SavedImages, originals: SavedImages, chosen: Sequence[int]) -> list[int]:
    """The original of each of the chosen images, by name; an .npz goes with another one by index.

    Raises ValueError for an image without an original, a name that two originals have, an .npz beside a folder, or
    images of another size.
    """
    kinds = [saved.path.suffix == ".npz" and saved.path.is_file() for saved in (images, originals)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{images.path} and {originals.path}: a folder and an .npz have no names in common; use one kind"
        )
    if images.size != originals.size:
        given, wanted = (f"{width}x{height}" for height, width in (images.size, originals.size))
        raise ValueError(
            f"{images.path}: images of {given}, but the originals in {originals.path} are {wanted}; "
            "compare with originals that were cropped to the size of the images"
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


def open_npz(path: Path) -> np.lib.npyio.NpzFile:
    """The file, without unpickling anything. Raises ValueError when it is damaged."""
    try:
        arrays = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise ValueError(f"{path}: holds a single array, not an .npz archive")
    return arrays
