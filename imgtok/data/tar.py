"""Images in WebDataset tar files: `KEY.jpg` beside `KEY.cls` (a whole number) or other labels, and, if there are
captions, `KEY.txt`.

The headers of each tar are read once, when it is opened; after that every image is one read at a known
offset, so training has the same random access, order and resume as from any other source. What is an image, and which
files belong to it, is as in a folder (`imgtok.data.files`): a key may have dots.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import posixpath
import shlex
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from imgtok.config import PositiveInt, check
from imgtok.data.files import FIRST_BYTES, Entry, LeftOut, Listing, is_hidden, sort_out
from imgtok.data.labels import DataError, Place, find_labels
from imgtok.data.sources import Record, caption_of, expand, identity_of
from imgtok.pictures import SUFFIXES, UnreadableImage

logger = logging.getLogger(__name__)

_MAX_OPEN = 64
_AFTER_END = 2**20  # bytes after the last member that are looked at


@dataclass(frozen=True, kw_only=True)
class TarConfig:
    """WebDataset tar files with images and, if labelled, classes."""

    kind: Literal["webdataset"] = "webdataset"
    path: str
    """A tar file, a folder of tars, or a pattern such as `data/train-{0000..0127}.tar` or `data/*.tar`; not
    compressed."""
    val_path: str | None = None
    """Tars of the held-out images; null takes `val-*.tar` beside `train-*.tar`, where the folder `path` has both, else
    a share of `path`."""
    labels: str = "auto"
    """auto, none, cls, json.FIELD, folders, subfolders, or a file of all labels in each tar such as dataset.json."""
    num: PositiveInt | None = None
    """Use so many images, from all over the set; null uses all."""
    num_classes: PositiveInt | None = None
    """Number of classes; null takes the largest label + 1, or counts the names."""

    def __post_init__(self) -> None:
        check(self)


class _Member(NamedTuple):
    offset: int
    size: int


class _Sample(NamedTuple):
    """An image and its caption, by their members' names."""

    shard: int
    name: str
    text: str | None


class TarRecords:
    """The images of tar files, in the order of the files and of the members."""

    def __init__(self, config: TarConfig) -> None:
        """Raises FileNotFoundError without such files, DataError for tars without images, or for their labels."""
        self._shards = expand(config.path, ".tar")
        self._members: list[dict[str, _Member]] = []
        self._open: dict[str, BinaryIO] = {}
        self._owner = os.getpid()
        listings = [self._list(number) for number in range(len(self._shards))]
        if not any(listing.images for listing in listings):
            hidden = sum(listing.hidden for listing in listings)
            others = sorted(name for listing in listings for name in (*listing.others, *listing.unreadable))
            found = ", ".join(others[:5]) or (f"{hidden} hidden" if hidden else "nothing")
            raise DataError(f"{config.path}: no images; found {found}. Images end in {', '.join(SUFFIXES)}")
        places = [
            Place(path, listing, functools.partial(self.read, number))
            for number, (path, listing) in enumerate(zip(self._shards, listings, strict=True))
        ]
        self._samples = [
            _Sample(number, entry.name, place.caption(entry.name))
            for number, place in enumerate(places)
            for entry in place.listing.images
        ]
        self.labels = find_labels(places, config.labels, config.num_classes, folders=False)
        self.left_out = self._count_left_out(listings)
        self._forget(listings)

    def _list(self, number: int) -> Listing:
        """The members of a tar, sorted out."""
        path = self._shards[number]
        members: dict[str, _Member] = {}
        self._members.append(members)
        members.update(_members(path))
        entries = (Entry(name, member.size) for name, member in members.items())
        listing = sort_out(entries, lambda entry: self.read(number, entry.name, FIRST_BYTES), keep_order=True)
        listing.folders = sorted({e.name.partition("/")[0] for e in listing.images if "/" in e.name})
        return listing

    def _count_left_out(self, listings: Sequence[Listing]) -> LeftOut:
        used: list[set[str]] = [set() for _ in listings]
        for sample in self._samples:
            used[sample.shard].update([sample.text] if sample.text else [])
        for names, labels in zip(used, self.labels.used, strict=False):
            names.update(labels)
        total = LeftOut()
        for listing, names in zip(listings, used, strict=True):
            total.add(listing.left_out(names))
        return total

    def _forget(self, listings: Sequence[Listing]) -> None:
        """Keep the places of what is read again."""
        kept = [{entry.name for entry in listing.images} for listing in listings]
        for sample in self._samples:
            if sample.text is not None:
                kept[sample.shard].add(sample.text)
        for number, names in enumerate(kept):
            self._members[number] = {name: self._members[number][name] for name in names}

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        """`shard.tar:KEY.jpg`."""
        sample = self._samples[index]
        return f"{self._shards[sample.shard]}:{sample.name}"

    def member(self, index: int) -> str:
        """The path in its tar."""
        return self._samples[index].name

    def __getitem__(self, index: int) -> Record:
        sample, name = self._samples[index], self.name(index)
        try:
            data = self.read(sample.shard, sample.name)
            text = caption_of(self.read(sample.shard, sample.text), sample.text) if sample.text else ""
        except OSError as error:
            raise UnreadableImage(name, f"cannot be opened ({error.strerror})") from error
        return Record(data, int(self.labels.values[index]), name, text)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """(N,) bytes of each image."""
        return np.array([self._members[sample.shard][sample.name].size for sample in self._samples])

    def identity(self) -> dict[str, Any]:
        names = (sample.name for sample in self._samples)
        return identity_of("webdataset", names, self.labels, self.sizes, lambda index: self[index].data)

    def read(self, shard: int, name: str, most: int = -1) -> bytes:
        """The content of a member, or its first bytes. Raises OSError, or KeyError for a member that is not there."""
        member = self._members[shard][name]
        if member.size < 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        file = self._file(self._shards[shard])
        file.seek(member.offset)
        return file.read(member.size if most < 0 else min(most, member.size))

    def _file(self, path: str) -> BinaryIO:
        if self._owner != os.getpid():  # a forked worker shares the position of its parent's files
            self._open, self._owner = {}, os.getpid()
        if path not in self._open:
            if len(self._open) >= _MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[path] = Path(path).open("rb")  # noqa: SIM115 - kept open for the next reads
        return self._open[path]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}


def _members(path: str) -> Iterator[tuple[str, _Member]]:
    """Files of a tar in order, where each begins and its size. A link is what it leads to in this tar: a file, or all
    files of a folder; of one that leads to nothing the size is -1. Raises DataError for a tar that is damaged or cut
    off, or has two files of one name.
    """
    total = Path(path).stat().st_size
    files: dict[str, _Member] = {}
    order: list[tuple[str, str | None]] = []  # names, and what links lead to
    try:
        with tarfile.open(path, "r:") as tar:
            while (header := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every header
                name = _relative(header.name)
                if header.isfile():
                    if header.offset_data + header.size > total:
                        raise DataError(f"{path}: cut off within {header.name!r}; copy or download it again")
                    if name in files and not is_hidden(name):
                        raise DataError(
                            f"{path}: {name!r} appears twice; unpack it and pack it again, which keeps the last one, "
                            "or rename one"
                        )
                    files[name] = _Member(header.offset_data, header.size)
                    order.append((name, None))
                elif header.islnk():
                    order.append((name, _relative(header.linkname)))
                elif header.issym():
                    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), header.linkname))
                    order.append((name, target.lstrip("/")))
            _check_end(path, tar.offset, total)
    except tarfile.TarError as error:
        raise DataError(f"{path}: {_why_no_tar(path, error)}") from error
    links = {name: target for name, target in order if target is not None}
    ends = {name: _end(target, links) for name, target in links.items()}
    files |= {name: files[end] for name, end in ends.items() if end in files}
    for name, _ in order:
        yield from [(name, files[name])] if name in files else _below(name, ends[name], files)


def _check_end(path: str, end: int, total: int) -> None:
    """Raises DataError unless what follows the last member, which begins at `end`, is what ends a tar: tarfile takes
    any header that it does not understand for the end.
    """
    with Path(path).open("rb") as file:
        file.seek(end)
        rest = file.read(_AFTER_END)
    if not rest.strip(b"\0"):
        if not rest:
            logger.warning("%s: has no end, so its last images may be missing: was it written or copied whole?", path)
        return
    if not rest[: tarfile.BLOCKSIZE].strip(b"\0"):
        what = (
            "more files follow after its end, as when tars are put together by cat; unpack it with tar --ignore-zeros"
        )
        raise DataError(f"{path}: {what}, or give the tars one by one")
    what = (
        f"damaged or cut off at byte {end:,} of {total:,}, and what follows cannot be read; copy or download it again"
    )
    raise DataError(f"{path}: {what}")


def _relative(name: str) -> str:
    """A member's name below the root of the tar, also where it is written from `/` or `..` on."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def _end(target: str, links: dict[str, str]) -> str:
    """What a link to a link leads to; one in a circle leads to a link."""
    for _ in range(len(links)):
        if target not in links:
            break
        target = links[target]
    return target


def _below(name: str, folder: str, files: dict[str, _Member]) -> Iterator[tuple[str, _Member]]:
    """The files of a folder, under the name of the link that leads there."""
    if folder in ("", ".", "..") or name.startswith(f"{folder}/"):  # a folder that the link is in
        return
    inside = sorted(file for file in files if file.startswith(f"{folder}/"))
    yield from ((name + file[len(folder) :], files[file]) for file in inside)
    if not inside:
        yield name, _Member(0, -1)


_PACKED = ((b"\x1f\x8b", "gunzip"), (b"BZh", "bunzip2"), (b"\xfd7zXZ", "unxz"), (b"\x28\xb5\x2f\xfd", "unzstd"))
_ENDINGS = {"gunzip": (".gz", ".tgz"), "bunzip2": (".bz2",), "unxz": (".xz",), "unzstd": (".zst",)}


def _why_no_tar(path: str, error: Exception) -> str:
    with Path(path).open("rb") as file:
        start = file.read(6)
    for magic, tool in _PACKED:
        if start.startswith(magic):
            name = shlex.quote(Path(path).name)
            command = f"{tool} {name}" if path.endswith(_ENDINGS[tool]) else f"{tool} < {name} > unpacked-{name}"
            return f"a compressed tar has no random access; unpack it first: {command} (in {Path(path).parent})"
    if start.startswith(b"PK"):
        return "a zip archive; unpack it, and read the folder with data.kind=folder"
    return f"not a readable tar file ({error})"
