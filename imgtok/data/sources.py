"""Tables of image files, what every source of images is; and the plainest of them, a folder tree.

A table gives random access to records (the bytes of an image file, label, text, name) and decodes nothing,
so that a damaged image can be named. arrow.py and tar.py hold the other sources; images.py turns records
into tensors.
"""

from __future__ import annotations

import glob
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from imgtok.config import PositiveInt, check
from imgtok.pictures import SUFFIXES, UnreadableImage


class DataError(ValueError):
    """Data that cannot be used; the message names the file or row and says what was expected."""


class Record(NamedTuple):
    """One image file as stored."""

    data: bytes
    label: int
    name: str
    text: str


class Records(Protocol):
    """A table of image files. `num_classes` is 0 when the data has no labels; every label is then 0."""

    num_classes: int
    class_names: tuple[str, ...]
    labels: np.ndarray
    """(N,) int64."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a record is called in messages."""

    def __getitem__(self, index: int) -> Record:
        """Raises UnreadableImage when the bytes cannot be had."""


# Folders


@dataclass(frozen=True, kw_only=True)
class ImageFolderConfig:
    """A folder of images."""

    kind: Literal["folder"] = "folder"
    path: Path
    """Folder with one sub-folder a class (classes in the order of sorted names), or with images only (one
    class)."""
    num_classes: PositiveInt | None = None
    """Number of classes of the whole data set, if more than the folders present; null counts the folders."""

    def __post_init__(self) -> None:
        check(self)


class FolderRecords:
    """The image files below a folder, class by class in sorted order."""

    def __init__(self, config: ImageFolderConfig) -> None:
        root = config.path
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder of images")
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        _refuse_splits(root, folders)
        files = [sorted(_files(root / folder)) for folder in folders]
        loose = [entry.path for entry in os.scandir(root) if entry.is_file()]
        groups = [[path for path in group if _is_image(path)] for group in files]
        if not any(groups):
            groups, folders = [sorted(filter(_is_image, loose))], [root.resolve().name]
        elif any(map(_is_image, loose)):
            raise DataError(f"{root}: images both in class folders and beside them ({next(filter(_is_image, loose))})")
        _refuse_no_images(root, groups, [*itertools.chain.from_iterable(files), *loose])
        for folder, group in zip(folders, groups, strict=True):
            if not group:
                raise DataError(f"{root / folder}: a class folder without images; remove it or fill it")
        self._paths = list(itertools.chain.from_iterable(groups))
        self.labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        self.class_names = tuple(folders)
        self.num_classes = check_labels(self.labels, config.num_classes, len(folders), self.name)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The path."""
        return self._paths[index]

    def __getitem__(self, index: int) -> Record:
        path = self._paths[index]
        return Record(read_bytes(path), int(self.labels[index]), path, "")


def _files(folder: Path) -> Iterable[str]:
    for parent, _, names in os.walk(folder, followlinks=True):
        yield from (os.path.join(parent, name) for name in names)  # noqa: PTH118 - a million Paths are slow


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES) and not os.path.basename(path).startswith(".")  # noqa: PTH119


def _refuse_splits(root: Path, folders: Sequence[str]) -> None:
    if folders and set(folders) <= {"train", "training", "val", "validation", "test"}:
        raise DataError(f"{root}: its folders {', '.join(folders)} are splits, not classes; give {root / folders[0]}")


def _refuse_no_images(root: Path, groups: Iterable[Sequence[str]], found: Sequence[str]) -> None:
    if any(groups):
        return
    suffixes = Counter(Path(path).suffix.lower() or "no suffix" for path in found)
    listed = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(8))
    what = f"found {len(found)} other file{'s'[: len(found) != 1]} ({listed})" if found else "the folder is empty"
    raise DataError(f"{root}: no images; {what}. Images are files that end in {', '.join(SUFFIXES)}")


# Shared by the sources


def check_labels(labels: np.ndarray, given: int | None, counted: int | None, name: Callable[[int], str]) -> int:
    """The number of classes (given, or counted, or largest label + 1); DataError for the first label
    outside.
    """
    num_classes = given or counted or int(labels.max()) + 1
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        allowed = f"allowed are 0 to {num_classes - 1}" if num_classes > 0 else "labels begin at 0"
        more = f" ({len(outside)} such images)" if len(outside) > 1 else ""
        first = int(outside[0])
        raise DataError(f"{name(first)}: label {labels[first]} is outside the classes; {allowed}{more}")
    return num_classes


def expand(pattern: str) -> list[str]:
    """Files of a pattern with `*`, `?`, `[...]`, `{a,b}` or `{000..127}`, sorted; FileNotFoundError if one
    is missing.
    """
    files = []
    for part in _expand_braces(pattern):
        found = [part] if Path(part).is_file() else sorted(glob.glob(part, recursive=True))  # noqa: PTH207
        if not found:
            raise FileNotFoundError(f"{part}: no such file" + (f" (from {pattern})" if part != pattern else ""))
        files += found
    return files


def _expand_braces(pattern: str) -> list[str]:
    start = pattern.find("{")
    end = pattern.find("}", start)
    if start < 0 or end < 0:
        return [pattern]
    inner, head = pattern[start + 1 : end], pattern[:start]
    low, dots, high = inner.partition("..")
    if dots and low.isdigit() and high.isdigit():
        choices = [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)]
    else:
        choices = inner.split(",")
    return [head + choice + tail for choice in choices for tail in _expand_braces(pattern[end + 1 :])]


def read_bytes(path: str) -> bytes:
    """A file's bytes; UnreadableImage when it cannot be opened."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(path, f"cannot be opened ({error.strerror})") from error
