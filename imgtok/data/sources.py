"""Tables of image files, what every source of images is; and the plainest of them, a folder tree.

A table gives random access to records (the bytes of an image file, label, text, name) and decodes nothing,
so that a damaged image can be named. tar.py and the readers of Parquet and of the Hub hold the other sources; images.py
turns records into tensors.
"""

from __future__ import annotations

import codecs
import functools
import glob
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from imgtok.config import PositiveInt, check
from imgtok.data.files import HELD_OUT, TRAIN, LeftOut, Listing, is_hidden, list_folder, suffix_of
from imgtok.data.labels import DataError, Labels, Place, as_numbers, check_labels, find_labels
from imgtok.files import not_local
from imgtok.pictures import SUFFIXES, UnreadableImage
from imgtok.randomness import uniform

__all__ = [
    "NOT_TOLD",
    "DataError",
    "FolderRecords",
    "ImageFolderConfig",
    "Labels",
    "Record",
    "Records",
    "as_numbers",
    "caption_of",
    "check_folder",
    "check_labels",
    "differing",
    "expand",
    "identity_of",
    "other_kind",
    "places_all_over",
    "read_bytes",
]


class Record(NamedTuple):
    """One image file as stored."""

    data: bytes
    label: int
    name: str
    text: str


class Records(Protocol):
    """A table of image files."""

    labels: Labels
    """The labels of all images, and where they come from."""
    left_out: LeftOut
    """What was found beside the images."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a record is called in messages."""

    def __getitem__(self, index: int) -> Record:
        """Raises UnreadableImage when the bytes cannot be had."""

    def identity(self) -> dict[str, Any]:
        """What tells this data set from others, wherever it lies; see `identity_of`."""


# Folders


@dataclass(frozen=True, kw_only=True)
class ImageFolderConfig:
    """A folder of images."""

    kind: Literal["folder"] = "folder"
    path: Path
    """Folder with one sub-folder a class (classes in the order of sorted names), with images only, or with `train/` and
    `val/` in which there are these."""
    val_path: Path | None = None
    """Folder of the held-out images; null takes `val/` beside `train/` where there is one, else a share of `path`."""
    labels: str = "auto"
    """auto, none, folders, subfolders, cls, json.FIELD, or a file of all labels such as dataset.json or labels.csv."""
    num: PositiveInt | None = None
    """Use so many images, from all over the set; null uses all."""
    num_classes: PositiveInt | None = None
    """Number of classes of the whole data set, if more than there are here; null counts them."""

    def __post_init__(self) -> None:
        check(self)


class FolderRecords:
    """The image files below a folder, class by class in sorted order. Captions are in `KEY.txt` beside them, or in a
    field `caption` or `text` of `KEY.json`.
    """

    def __init__(self, config: ImageFolderConfig) -> None:
        """Raises FileNotFoundError without such a folder, DataError for one without images, or for its labels."""
        root = config.path.expanduser()
        check_folder(root)
        listing = list_folder(root)
        if config.labels == "auto":
            _refuse_splits(root, listing.folders)
        if not listing.images:
            raise _no_images(root, listing)
        self._root = str(root)
        self._names = [entry.name for entry in listing.images]
        self.sizes = np.array([entry.size for entry in listing.images])
        place = Place(str(root), listing, lambda name: (root / name).read_bytes())
        self.labels = find_labels([place], config.labels, config.num_classes, folders=True)
        texts = {name: place.caption(name) for name in self._names} if listing.others else {}
        self._texts = {name: side for name, side in texts.items() if side is not None}
        self.left_out = listing.left_out([*itertools.chain(*self.labels.used), *self._texts.values()])

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The path."""
        return os.path.join(self._root, self._names[index])  # noqa: PTH118 - a million Paths are slow

    def member(self, index: int) -> str:
        """The path below the folder, with slashes."""
        return self._names[index]

    def __getitem__(self, index: int) -> Record:
        name, path = self._names[index], self.name(index)
        side = self._texts.get(name)
        text = "" if side is None else caption_of(read_bytes(os.path.join(self._root, side)), side)  # noqa: PTH118
        return Record(read_bytes(path), int(self.labels.values[index]), path, text)

    def identity(self) -> dict[str, Any]:
        return identity_of("folder", self._names, self.labels, self.sizes, lambda index: self[index].data)


def check_folder(path: Path) -> None:
    """Raise FileNotFoundError for what is no folder, with what to do."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such folder of images{not_local(str(path))}")
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: a file, not a folder of images{other_kind(path.name)}")


_TAR, _PARQUET = "; data.kind=webdataset reads tars", "; data.kind=parquet reads Parquet files"
_KINDS = {
    ".tar": _TAR,
    ".tgz": _TAR,
    ".parquet": _PARQUET,
    ".arrow": "; data.kind=huggingface with data.name=FOLDER reads what save_to_disk wrote",
    ".zip": "; unpack it first",
    ".gz": "; unpack it first",
}
"""Endings of files that another kind of data reads, and what to do."""


def other_kind(name: str) -> str:
    """What reads a file that is no image, for a message; "" where nothing does."""
    return _KINDS.get(suffix_of(name), "")


def _refuse_splits(root: Path, folders: Sequence[str]) -> None:
    if folders and {folder.lower() for folder in folders} <= {*TRAIN, *HELD_OUT}:
        raise DataError(f"{root}: its folders {', '.join(folders)} are splits, not classes; give {root / folders[0]}")


# Shared by the sources


def _no_images(where: Path, listing: Listing) -> DataError:
    """The error for a folder without images: what there is instead."""
    others = [*listing.others, *listing.unreadable]
    suffixes = Counter(suffix_of(name) or "no suffix" for name in others)
    listed = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(8))
    found = [f"{len(others)} other file{'s'[: len(others) != 1]} ({listed})"] if others else []
    found += [f"{listing.hidden} hidden"] if listing.hidden else []
    what = f"found {' and '.join(found)}" if found else "the folder is empty"
    kind = next((hint for suffix, _ in suffixes.most_common() if (hint := other_kind(f"_{suffix}"))), "")
    return DataError(f"{where}: no images; {what}{kind}. Images are files that end in {', '.join(SUFFIXES)}")


def caption_of(data: bytes, name: str) -> str:
    """The caption in the content of a file: its text, or a field of `KEY.json`; "" where there is none."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if utf16 else "utf-8-sig", errors="replace").strip()
    if suffix_of(name) != ".json":
        return text
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    return str(values.get("caption") or values.get("text") or "") if isinstance(values, dict) else ""


PROBES = 64
"""Images whose bytes enter the identity of a data set; of all others, the sizes."""


def identity_of(
    kind: str,
    names: Iterable[str],
    labels: Labels,
    sizes: Sequence[int] | np.ndarray,
    read: Callable[[int], bytes] | None = None,
) -> dict[str, Any]:
    """What tells a data set from others, wherever it lies: the number of images, and digests of their names (relative
    to the root), labels and sizes and of the bytes of a few, which `read` gives.

    A changed file is noticed by its size, or if it is one of the `PROBES` (all, of a small set).
    """
    count = len(labels.values)
    content = hashlib.sha256(np.asarray(sizes, dtype=np.int64).tobytes())
    if read is not None:
        for index in places_all_over(count, min(count, PROBES)).tolist():
            try:
                content.update(hashlib.sha256(read(index)).digest())
            except UnreadableImage:
                content.update(b"unreadable")
    told = labels.values.astype(np.int64).tobytes() + "\n".join([str(labels.num_classes), *labels.names]).encode(
        "utf-8", "surrogateescape"
    )
    return {
        "kind": kind,
        "images": count,
        "names": _short(hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape"))),
        "labels": _short(hashlib.sha256(told)),
        "content": _short(content),
    }


NOT_TOLD: Mapping[str, Any] = {"num": None}
"""What the identity of images leaves out where all of them are used."""


def differing(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """The names by which two identities of data differ, with both values.

    What only one of them tells, since the other is of an earlier version, is at its default there (fields of the
    data's configuration have `defaults`), or the same.
    """
    for name in [*before, *(name for name in now if name not in before)]:
        old = before.get(name, defaults.get(name, now.get(name)))
        new = now.get(name, defaults.get(name, old))
        if old != new:
            yield name, old, new


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:16])


@functools.lru_cache(maxsize=8)
def _stretches(length: int, num: int) -> np.ndarray:
    starts = np.arange(num, dtype=np.int64) * length // num
    widths = np.diff(np.append(starts, length))
    return starts + np.floor(uniform(0, [num], (num,), "all over")[0].numpy() * widths).astype(np.int64)


def places_all_over(length: int, num: int, labels: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """(num,) places among `length` images, ascending, all over the set: the first ones may all be of one class.

    With labels, at equal steps over the images class by class, so that each class has its share. Without, one of each
    of `num` equal stretches, at a place that is drawn: equal steps would meet few classes where these come in turn.
    The draw has one seed: the same numbers always give the same places. Raises ValueError for more than there are.
    """
    if not 0 <= num <= length:
        raise ValueError(f"num: {num} of {length} images; choose at most all of them")
    if labels is None:
        return _stretches(length, num).copy()
    order = np.argsort(np.asarray(labels), kind="stable")
    return np.sort(order[np.arange(num, dtype=np.int64) * length // max(1, num)])


def expand(pattern: str, suffix: str = "") -> list[str]:
    """Files of a pattern with `*`, `?`, `[...]`, `{a,b}` or `{000..127}`, sorted, or those below a folder that end in
    `suffix`; `~` is the home. Raises FileNotFoundError if one is missing.
    """
    files = []
    whole = os.path.expanduser(pattern)  # noqa: PTH111 - a pattern is no path
    for part in [whole] if Path(whole).exists() else _expand_braces(whole):  # a folder may be called {a,b}
        found = [part] if Path(part).exists() else sorted(glob.glob(part, recursive=True))  # noqa: PTH207
        if not found:
            origin = f" (from {pattern})" if part != whole else ""
            raise FileNotFoundError(f"{part}: no such file{origin}{not_local(part)}")
        for place in found:
            files += _files_in(Path(place), suffix) if suffix and Path(place).is_dir() else [place]
    return files


def _files_in(folder: Path, suffix: str) -> list[str]:
    found = sorted(str(folder / name) for name in list_folder(folder).others if suffix_of(name) == suffix)
    if not found:
        there = sorted(entry.name for entry in folder.iterdir() if not is_hidden(entry.name))
        listed = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "") if there else "nothing"
        raise FileNotFoundError(f"{folder}: no files in this folder end in {suffix}; it holds {listed}")
    return found


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
