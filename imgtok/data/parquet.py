"""Images in Parquet files, read in place: footers and labels when they are opened, then image by image.

Nothing is copied and nothing is written. `columns.py` finds the
columns, `parquet_pages.py` reads the values.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from imgtok.config import PositiveInt, check
from imgtok.data.blocks import Blocks
from imgtok.data.columns import Columns, Values, find_columns, join_labels, read_beside, read_labels
from imgtok.data.files import HELD_OUT, PARQUET, TRAIN, LeftOut, list_folder
from imgtok.data.labels import DataError
from imgtok.data.parquet_pages import CACHE_BYTES, Chunk, PageReader
from imgtok.data.sources import Record, expand, identity_of, other_kind
from imgtok.pictures import UnreadableImage

if TYPE_CHECKING:
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

_CHEAP = 2 * 2**20  # bytes that are decoded in a fraction of an image's own decoding
_PARTS = "|".join([*TRAIN, *HELD_OUT, "testing", "eval", "evaluation"])
_SPLITS = re.compile(rf"(?:^|[^a-z])({_PARTS})(?:[^a-z]|$)")


@dataclass(frozen=True, kw_only=True)
class ParquetConfig:
    """Parquet files with a column of images and, if labelled, a column of labels."""

    kind: Literal["parquet"] = "parquet"
    path: str
    """A file, a folder of Parquet files, or a pattern such as `data/train-*.parquet`."""
    val_path: str | None = None
    """Files of the held-out images; null takes `validation-*.parquet` or such beside `train-*.parquet`, where the
    folder `path` has both, else a share of `path`."""
    labels: str = "auto"
    """auto, none, or the name of a column, as label_column."""
    num: PositiveInt | None = None
    """Use so many images, from all over the set; null uses all."""
    image_column: str | None = None
    """Column of image bytes, or of paths of image files, which count from the Parquet file's folder; null finds it."""
    label_column: str | None = None
    """Column of whole numbers or names; null takes `label` if there is one, else the only column of named classes."""
    text_column: str | None = None
    """Column of captions; null takes `text` or `caption` if there is one."""
    num_classes: PositiveInt | None = None
    """Number of classes; null takes the names in the file, or else the largest label + 1."""

    def __post_init__(self) -> None:
        check(self)


class _Group(NamedTuple):
    """A row group, with the chunks of its columns."""

    file: str
    first: int  # its first row in the file
    rows: int
    data: Chunk | None
    path: Chunk | None
    text: Chunk | None


class _Shard(NamedTuple):
    """What the footer of a file says, and its labels."""

    path: str
    columns: Columns
    groups: list[_Group]
    labels: Values | None


class ParquetRecords:
    """The rows of Parquet files, in the order of the files and of their rows."""

    def __init__(self, config: ParquetConfig) -> None:
        """Reads footers and labels. Raises FileNotFoundError for a missing file, DataError for what cannot be used."""
        shards = [_read_shard(path, config) for path in parquet_files(config.path)]
        for shard in shards[1:]:
            _check_alike(shards[0], shard)
        self._image = shards[0].columns.image
        self._groups = [group for shard in shards for group in shard.groups]
        self._ends = np.cumsum([group.rows for group in self._groups], dtype=np.int64)
        if not len(self):
            raise DataError(f"{config.path}: no rows")
        self._reader = PageReader()
        labels = [shard.labels for shard in shards if shard.labels]
        self.labels = join_labels(labels, shards[0].columns, config, len(self), self.name)
        self.left_out = LeftOut()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, index: int) -> str:
        """`FILE[row]`, with the row's place in that file."""
        group, row = self._place(index)
        return f"{group.file}[{group.first + row}]"

    def __getitem__(self, index: int) -> Record:
        group, row = self._place(index)
        name = f"{group.file}[{group.first + row}]"
        data = self._value(group.data, row, name)
        if data is None:
            path = self._value(group.path, row, name)
            if not path:
                raise UnreadableImage(name, f"column {self._image!r} is empty")
            data = read_beside(Path(group.file).parent, path.decode(errors="replace"), name)
        text = self._value(group.text, row, name) or b""
        return Record(data, int(self.labels.values[index]), name, text.decode(errors="replace"))

    def identity(self) -> dict[str, Any]:
        """Rows have no names: the sizes of the row groups tell most."""
        sizes = [(group.rows, *(chunk.size if chunk else -1 for chunk in group[3:])) for group in self._groups]
        return identity_of("parquet", (), self.labels, np.array(sizes), lambda index: self[index].data)

    def _place(self, index: int) -> tuple[_Group, int]:
        """The row group of a row, and its place there."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        group = self._groups[number]
        return group, index - int(self._ends[number]) + group.rows

    def _value(self, chunk: Chunk | None, row: int, name: str) -> bytes | None:
        """The bytes of a row, None for null and without a column. Raises UnreadableImage with `name`."""
        try:
            return None if chunk is None else self._reader.value(chunk, row)
        except (OSError, ValueError) as error:  # pyarrow's errors are either
            raise UnreadableImage(name, f"the Parquet file cannot be read there ({first_line(error)})") from error

    def blocks(self) -> Blocks | None:
        """Where many images must be decoded for one, and all do not fit into memory: which images these are."""
        chunks = [group.data for group in self._groups]
        if None in chunks or sum(chunk.size_decoded for chunk in chunks if chunk) <= CACHE_BYTES:
            return None
        try:
            return self._blocks([chunk for chunk in chunks if chunk])
        except (OSError, ValueError):  # said where an image is read
            return None

    def _blocks(self, chunks: Sequence[Chunk]) -> Blocks | None:
        """As `blocks`, which says when there are some. Raises as `PageReader`."""
        pages, largest = self._reader.blocks(chunks[0])
        if largest < _CHEAP:
            return None
        numbers, count = [], 0
        for chunk in chunks:
            small = chunk.size_decoded <= CACHE_BYTES // 4
            pages, size = (np.zeros(chunk.rows, np.int64), chunk.size_decoded) if small else self._reader.blocks(chunk)
            numbers.append(pages + count)
            count, largest = count + int(pages.max(initial=-1)) + 1, max(largest, size)
        together = max(1, CACHE_BYTES // largest - 1)
        logger.info(
            "%s: images lie in %d compressed blocks of up to %.0f MB, more than fit into memory; training reads the "
            "blocks in random order and mixes the images of %d (of files whose column of images is not compressed, as "
            "`datasets` writes them today, any image is read alone)",
            *(chunks[0].path, count, largest / 1e6, together + 1),
        )
        return Blocks(np.concatenate(numbers), together)


def parquet_files(path: str) -> list[str]:
    """The Parquet files of a path: itself, those that a pattern matches, or all in a folder and below it, sorted.

    Raises FileNotFoundError where there are none, DataError for a folder with several splits of a data set.
    """
    path = os.path.expanduser(path)  # noqa: PTH111 - a pattern is no path
    places = [path] if Path(path).is_dir() else expand(path)
    return [file for place in places for file in (_files_in(Path(place)) if Path(place).is_dir() else [place])]


def _files_in(folder: Path) -> list[str]:
    listing = list_folder(folder)  # follows links, leaves out what is hidden
    names = [*listing.others, *listing.unreadable, *(entry.name for entry in listing.images)]
    found = sorted(map(Path, names))
    files = [path for path in found if path.suffix.lower() in PARQUET]
    unfinished = [path for path in files if any(part.startswith("_") for part in path.parts)]
    if unfinished:
        logger.info("%s: left out, as Spark does: %d Parquet files, such as %s", folder, len(unfinished), unfinished[0])
        files = [path for path in files if path not in set(unfinished)]
    if not files:
        others = ", ".join(str(path) for path in found[:3]) or "nothing"
        kind = next((hint for path in found if (hint := other_kind(path.name))), "")
        raise FileNotFoundError(f"{folder}: no Parquet files (*.parquet); the folder holds {others}{kind}")
    splits: dict[str, Path] = {}
    for path in files:
        match = _SPLITS.search(str(path.with_suffix("")).lower())
        part = match[1] if match else ""
        splits.setdefault("train" if part in TRAIN else part, path)
    if len(splits) > 1:
        listed = ", ".join(map(str, splits.values()))
        first = splits.get("train", next(iter(splits.values())))
        pattern = folder / first.parent / re.sub(r"\d+(-of-\d+)?", "*", first.name)
        raise DataError(f"{folder}: holds several splits ({listed}); choose one by a pattern, as path='{pattern}'")
    return [str(folder / path) for path in files]


# Reading footers and labels


def _read_shard(path: str, config: ParquetConfig) -> _Shard:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            columns = find_columns(file.schema_arrow, config, path, lambda column: _first_value(file, column))
            labels = None
            if columns.label:
                values = file.read(columns=[columns.label], use_threads=False).column(0)
                labels = read_labels(values, columns, lambda row: f"{path}[{row}]")
            return _Shard(path, columns, list(_row_groups(file, path, columns)), labels)
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror})") from error
    except (OSError, ValueError) as error:  # pyarrow's errors are either
        raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from error


def _first_value(file: pq.ParquetFile, column: str) -> Any:
    """The first value that there is among the first rows."""
    batch = next(file.iter_batches(64, columns=[column], use_threads=False), None)
    values = None if batch is None else batch.column(0).drop_null()
    return values[0].as_py() if values is not None and len(values) else None


def first_line(error: BaseException) -> str:
    """What an error of a library says, without what follows its first line."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _row_groups(file: pq.ParquetFile, path: str, columns: Columns) -> Iterator[_Group]:
    metadata, first = file.metadata, 0
    leaves = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [
            None if leaf is None else _chunk(metadata, path, number, leaf, leaves[leaf])
            for leaf in (columns.data, columns.path, columns.text)
        ]
        yield _Group(path, first, group.num_rows, *chunks)
        first += group.num_rows


def _chunk(metadata: pq.FileMetaData, path: str, group: int, leaf: str, place: int) -> Chunk:
    chunk = metadata.row_group(group).column(place)
    begins = [chunk.data_page_offset]
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:  # some writers put 0 there
        begins.append(chunk.dictionary_page_offset)
    return Chunk(
        path=path,
        group=group,
        column=leaf,
        offset=min(begins),
        size=chunk.total_compressed_size,
        size_decoded=chunk.total_uncompressed_size,
        rows=metadata.row_group(group).num_rows,
        codec=chunk.compression,
        max_definition=metadata.schema.column(place).max_definition_level,
    )


def _check_alike(first: _Shard, other: _Shard) -> None:
    """The files of a data set agree on what a label is."""
    ours, theirs = (
        ("names" if shard.columns.named else "numbers") if shard.labels else "none" for shard in (first, other)
    )
    if ours != theirs:
        raise DataError(f"{other.path}: its labels are {theirs}, but {ours} in {first.path}")
    names = [", ".join(shard.columns.class_names[:5]) or "without names" for shard in (first, other)]
    if first.columns.class_names != other.columns.class_names:
        raise DataError(f"{other.path}: its classes are {names[1]}, ... but {names[0]}, ... in {first.path}")
