"""Images in WebDataset tar files: `KEY.jpg` beside `KEY.cls` (a whole number) and, if there are captions,
`KEY.txt`.

The headers of each tar are read once, when it is opened; after that every image is one read at a known
offset, so training has the same random access, order and resume as from any other source.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

from imgtok.config import PositiveInt, check
from imgtok.data.sources import DataError, Record, check_labels, expand
from imgtok.pictures import UnreadableImage

_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
_MAX_OPEN = 64


@dataclass(frozen=True, kw_only=True)
class TarConfig:
    """WebDataset tar files with images and, if labelled, classes."""

    kind: Literal["webdataset"] = "webdataset"
    path: str
    """A tar file or a pattern such as `data/train-{0000..0127}.tar` or `data/*.tar`; not compressed."""
    num_classes: PositiveInt | None = None
    """Number of classes; null takes the largest label + 1, or no classes when there are no `.cls` members."""

    def __post_init__(self) -> None:
        check(self)


class _Member(NamedTuple):
    offset: int
    size: int


class _Sample(NamedTuple):
    shard: int
    key: str
    suffix: str
    image: _Member
    label: int | None
    text: _Member | None
    text_suffix: str


class TarRecords:
    """The images of tar files, in the order of the files and of the members."""

    def __init__(self, config: TarConfig) -> None:
        self._shards = expand(config.path)
        self._samples = [sample for number, path in enumerate(self._shards) for sample in _index_shard(number, path)]
        if not self._samples:
            raise DataError(f"{config.path}: no members that end in .{', .'.join(_IMAGES)}")
        self.class_names: tuple[str, ...] = ()
        self.labels, self.num_classes = np.zeros(len(self._samples), np.int64), 0
        if any(sample.label is not None for sample in self._samples):
            self.labels = np.array([self._label(i) for i in range(len(self))], dtype=np.int64)
            self.num_classes = check_labels(self.labels, config.num_classes, None, self.name)
        self._open: dict[str, BinaryIO] = {}
        self._owner = os.getpid()

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        """`shard.tar:KEY.jpg`."""
        sample = self._samples[index]
        return f"{self._shards[sample.shard]}:{sample.key}.{sample.suffix}"

    def __getitem__(self, index: int) -> Record:
        sample, name = self._samples[index], self.name(index)
        try:
            data = self._read(sample.shard, sample.image)
            text = _caption(self._read(sample.shard, sample.text), sample.text_suffix) if sample.text else ""
        except OSError as error:
            raise UnreadableImage(name, f"cannot be opened ({error.strerror})") from error
        return Record(data, int(self.labels[index]), name, text)

    def _label(self, index: int) -> int:
        sample = self._samples[index]
        if sample.label is None:
            where = f"{self._shards[sample.shard]}: sample {sample.key!r}"
            raise DataError(f"{where} has no .cls member, though others have; label all samples or none")
        return sample.label

    def _read(self, shard: int, member: _Member) -> bytes:
        file = self._file(self._shards[shard])
        file.seek(member.offset)
        return file.read(member.size)

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


def _index_shard(number: int, path: str) -> Iterator[_Sample]:
    """The samples of one tar in the order of their first members."""
    groups: dict[str, dict[str, _Member]] = {}
    for name, member in _members(path):
        folder, slash, file = name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        if not stem or not dot:
            continue  # hidden files, folders and files without an ending belong to no sample
        group = groups.setdefault(folder + slash + stem, {})
        if suffix.lower() in group:
            raise DataError(f"{path}: {name!r} appears twice")
        group[suffix.lower()] = member
    with Path(path).open("rb") as binary:
        for key, group in groups.items():
            images = [suffix for suffix in group if suffix in _IMAGES]
            if len(images) > 1:
                raise DataError(f"{path}: sample {key!r} has several images (.{', .'.join(images)})")
            if images:
                text = next((suffix for suffix in _TEXTS if suffix in group), "")
                label = _read_label(binary, group["cls"], f"{path}:{key}.cls") if "cls" in group else None
                image = group[images[0]]
                yield _Sample(number, key, images[0], image, label, group.get(text), text)


def _members(path: str) -> Iterator[tuple[str, _Member]]:
    total = Path(path).stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            while (header := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile keeps every header
                if header.isfile():
                    if header.offset_data + header.size > total:
                        raise DataError(f"{path}: cut off within {header.name!r}; copy or download it again")
                    yield header.name.removeprefix("./"), _Member(header.offset_data, header.size)
    except tarfile.TarError as error:
        raise DataError(f"{path}: {_why_no_tar(path, error)}") from error


def _why_no_tar(path: str, error: Exception) -> str:
    with Path(path).open("rb") as file:
        start = file.read(6)
    for magic, tool in (
        (b"\x1f\x8b", "gunzip"),
        (b"BZh", "bunzip2"),
        (b"\xfd7zXZ", "unxz"),
        (b"\x28\xb5\x2f\xfd", "unzstd"),
    ):
        if start.startswith(magic):
            return f"a compressed tar has no random access; unpack it first: {tool} {Path(path).name}"
    return f"not a readable tar file ({error})"


def _read_label(file: BinaryIO, member: _Member, name: str) -> int:
    file.seek(member.offset)
    text = file.read(member.size).decode(errors="replace").strip()
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{name}: label is {text[:40]!r}; it must be a whole number") from None


def _caption(data: bytes, suffix: str) -> str:
    text = data.decode(errors="replace").strip()
    if suffix != "json":
        return text
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        return ""
    return str(values.get("caption") or values.get("text") or "") if isinstance(values, dict) else ""
