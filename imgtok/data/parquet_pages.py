"""Single values of the columns of Parquet files, read where they lie.

pyarrow reads whole row groups, and a row group holds about 100 MB of images: a thousand decoded for one. But a column
of a row group, its *chunk*, is a run of pages, each with a header that says how long it is. Here the headers are read,
then only the page that holds the wanted value; and of a page that is not compressed, as the Hub's image columns are,
only the value itself. Compressed pages stay in a cache of bounded size. The layout is that of
https://parquet.apache.org/docs/file-format/; a chunk that is laid out otherwise (delta encodings, say) is decoded by
pyarrow, a row group at a time, into the same cache.

Files are read at given places (`os.pread`) rather than mapped, so that an epoch does not fill the process's memory
with the pages of the file; a value is copied once either way.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from io import FileIO
from typing import Any, NamedTuple

import numpy as np

CACHE_BYTES = 256 * 2**20
"""Decoded pages that a process keeps; a data set that is smaller stays in memory whole."""

_MAX_OPEN = 64
_SMALL = 16 * 2**10  # values of fewer bytes on average are found by reading their whole page at once
_DATA, _INDEX, _DICTIONARY, _DATA_V2 = 0, 1, 2, 3  # kinds of pages
_PLAIN, _PLAIN_DICTIONARY, _RLE, _RLE_DICTIONARY = 0, 2, 3, 8  # encodings
_CODECS = ("SNAPPY", "GZIP", "BROTLI", "ZSTD")


class Chunk(NamedTuple):
    """One leaf column of bytes or strings in one row group of a file, without lists."""

    path: str
    group: int
    column: str
    """Name such as `image.bytes`."""
    offset: int
    """Where its first page begins in the file."""
    size: int
    """Bytes from there to its end."""
    size_decoded: int
    """Bytes of its pages once they are decompressed."""
    rows: int
    codec: str
    """Name of the compression in pyarrow's words."""
    max_definition: int
    """Level of a value that is there; lower ones stand for null."""


class _Page(NamedTuple):
    offset: int  # of its body in the file
    stored: int  # bytes there
    size: int  # bytes once decompressed
    rows: int
    encoding: int
    levels: int  # bytes of levels before the compressed part (version 2), or -1 when they begin the page (version 1)
    compressed: int  # 0 or 1


class _Pages(NamedTuple):
    dictionary: _Page | None
    pages: np.ndarray  # (P, 7), a row a page: a set of a million images has 100,000 pages
    ends: np.ndarray  # (P,) rows of the chunk up to and with each page


@dataclass(frozen=True)
class _Values:
    """Where the values of a page lie: in `data`, or in the file where that is None."""

    starts: np.ndarray
    sizes: np.ndarray  # -1 for null
    data: bytes | None

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return 512 + self.starts.nbytes + self.sizes.nbytes + len(self.data or b"")  # 512: the objects themselves


class _OtherLayout(Exception):  # noqa: N818 - not an error: pyarrow takes over
    """A chunk that this module does not read."""


class PageReader:
    """Values of chunks by row. Holds open files and a cache, and loses both when it is pickled.

    Its methods raise OSError for a file that cannot be read, and ValueError (pyarrow's ArrowInvalid is one) for a
    damaged one.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._cache_bytes = cache_bytes
        self._files: OrderedDict[str, FileIO] = OrderedDict()
        self._cached: OrderedDict[Hashable, Any] = OrderedDict()
        self._held = 0
        self._tables: dict[Hashable, _Pages | None] = {}

    def __getstate__(self) -> int:
        return self._cache_bytes

    def __setstate__(self, cache_bytes: int) -> None:
        PageReader.__init__(self, cache_bytes)

    def value(self, chunk: Chunk, row: int) -> bytes | None:
        """The bytes of a row of the chunk, None for null."""
        key = (chunk.path, chunk.group, chunk.column)
        pages = self._table(chunk, key)
        if pages is not None:
            try:
                return self._in_place(chunk, key, pages, row)
            except (_OtherLayout, ValueError, IndexError):
                self._tables[key] = None
        column = self._keep(key, lambda: _decode(chunk))
        value = column[row].as_py()
        return value.encode() if isinstance(value, str) else value

    def blocks(self, chunk: Chunk) -> tuple[np.ndarray, int]:
        """The block of each row, (rows,) from 0 on, and the bytes of the largest: what is decoded to read a row."""
        pages = self._table(chunk, (chunk.path, chunk.group, chunk.column))
        if pages is None:
            return np.zeros(chunk.rows, np.int64), chunk.size_decoded
        rows = np.diff(pages.ends, prepend=0)
        sizes = [page.size if page.compressed else 0 for page in (_Page(*row) for row in pages.pages.tolist())]
        dictionary = pages.dictionary
        if dictionary is not None and dictionary.compressed:
            sizes.append(dictionary.size)
        return np.repeat(np.arange(len(rows)), rows), max(sizes, default=0)

    # In place

    def _table(self, chunk: Chunk, key: Hashable) -> _Pages | None:
        """The pages of a chunk, None for one that is left to pyarrow."""
        if key not in self._tables:
            try:
                self._tables[key] = self._index(chunk)
            except (_OtherLayout, ValueError, IndexError):
                self._tables[key] = None
        return self._tables[key]

    def _index(self, chunk: Chunk) -> _Pages:
        """The pages of a chunk."""
        at, end, rows = chunk.offset, chunk.offset + chunk.size, 0
        dictionary, pages, ends = None, [], []
        if chunk.codec not in ("UNCOMPRESSED", *_CODECS):
            raise _OtherLayout
        while rows < chunk.rows:
            kind, page = self._header(chunk, at, end)
            at = page.offset + page.stored
            if kind == _DICTIONARY:
                dictionary = page
            elif kind in (_DATA, _DATA_V2):
                rows += page.rows
                pages.append(page)
                ends.append(rows)
        if rows > chunk.rows:
            raise ValueError("pages with more rows than their row group")
        return _Pages(dictionary, np.array(pages, np.int64).reshape(-1, 7), np.array(ends))

    def _header(self, chunk: Chunk, at: int, end: int) -> tuple[int, _Page]:
        for length in (512, 2**16, 2**22):  # statistics in a header can be long
            data = self._read(chunk.path, at, min(length, end - at))
            try:
                fields, length_read = _thrift_struct(data, 0)
                break
            except IndexError:
                continue
        else:
            raise ValueError("a page without a whole header")
        kind, size, stored = fields[1], fields[2], fields[3]
        start = at + length_read
        if not (0 <= stored <= end - start and 0 <= size <= chunk.size_decoded):
            raise ValueError("a page that reaches beyond its row group")
        count, encoding, levels, compressed = 0, _PLAIN, 0, int(chunk.codec != "UNCOMPRESSED")
        if kind == _DATA:
            count, encoding, levels = fields[5][1], fields[5][2], -1
            if chunk.max_definition and fields[5][3] != _RLE:
                raise _OtherLayout
        elif kind == _DICTIONARY:
            count, encoding = fields[7][1], fields[7][2]
        elif kind == _DATA_V2:
            count, encoding, levels = fields[8][1], fields[8][4], fields[8][5]
            compressed *= fields[8].get(7, True)
        allowed = (_PLAIN, _PLAIN_DICTIONARY) if kind == _DICTIONARY else (_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY)
        if encoding not in allowed or count < 0:
            raise _OtherLayout
        return kind, _Page(start, stored, size, count, encoding, levels, compressed)

    def _in_place(self, chunk: Chunk, key: Hashable, pages: _Pages, row: int) -> bytes | None:
        number = int(np.searchsorted(pages.ends, row, side="right"))
        page = _Page(*pages.pages[number].tolist())
        row -= int(pages.ends[number]) - page.rows
        if page.encoding == _PLAIN:
            values = self._keep((key, number), lambda: self._plain(chunk, page))
        else:
            row = int(self._keep((key, number), lambda: self._indices(chunk, page))[row])
            if row < 0:
                return None
            dictionary = pages.dictionary
            if dictionary is None:
                raise _OtherLayout
            values = self._keep((key, -1), lambda: self._plain(chunk, dictionary, leveled=False))
        start, size = int(values.starts[row]), int(values.sizes[row])
        if size < 0:
            return None
        if values.data is not None:
            return values.data[start : start + size]
        return self._read(chunk.path, start, size)

    def _plain(self, chunk: Chunk, page: _Page, *, leveled: bool = True) -> _Values:
        """Where the values of a page lie that are stored one after the other, each behind its length."""
        read, data = self._body(chunk, page)
        present, at = self._levels(chunk, page, read) if leveled else (np.ones(page.rows, bool), 0)
        starts, sizes = np.zeros(page.rows, np.int64), np.full(page.rows, -1, np.int64)
        found = []
        for _ in range(int(present.sum())):
            size = int.from_bytes(read(at, 4), "little")
            at += 4 + size
            if at > page.size:
                raise ValueError("a value that reaches beyond its page")
            found.append((at - size, size))
        if found:
            starts[present], sizes[present] = np.array(found).T
        return _Values(starts, sizes, data) if page.compressed else _Values(starts + page.offset, sizes, None)

    def _indices(self, chunk: Chunk, page: _Page) -> np.ndarray:
        """Places in the dictionary, -1 for null."""
        read, _ = self._body(chunk, page)
        present, at = self._levels(chunk, page, read)
        body = read(at, page.size - at)
        indices = np.full(page.rows, -1, np.int64)
        if present.any():
            indices[present] = _hybrid(body[1:], body[0], int(present.sum()))
        return indices

    def _levels(self, chunk: Chunk, page: _Page, read: Callable[[int, int], bytes]) -> tuple[np.ndarray, int]:
        """Which values of a page are there, and where they begin in it."""
        if not chunk.max_definition:
            return np.ones(page.rows, bool), max(0, page.levels)
        start, length = (4, int.from_bytes(read(0, 4), "little")) if page.levels < 0 else (0, page.levels)
        levels = _hybrid(read(start, length), chunk.max_definition.bit_length(), page.rows)
        return levels == chunk.max_definition, start + length

    def _body(self, chunk: Chunk, page: _Page) -> tuple[Callable[[int, int], bytes], bytes | None]:
        """How to read at a place of the decompressed page, and the page if it had to be read."""
        if not page.compressed and page.stored > _SMALL * page.rows:
            return lambda at, size: self._read(chunk.path, page.offset + at, size), None
        data = self._read(chunk.path, page.offset, page.stored)
        if page.compressed:
            import pyarrow

            levels = max(0, page.levels)
            rest = pyarrow.decompress(data[levels:], page.size - levels, chunk.codec.lower(), asbytes=True)
            data = data[:levels] + rest
        return lambda at, size: _part(data, at, size), data

    # Cache and files

    def _keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key in self._cached:
            self._cached.move_to_end(key)
            return self._cached[key]
        value = make()
        self._cached[key] = value
        self._held += value.nbytes
        while self._held > self._cache_bytes and len(self._cached) > 1:
            self._held -= self._cached.popitem(last=False)[1].nbytes
        return value

    def _read(self, path: str, at: int, size: int) -> bytes:
        if path in self._files:
            self._files.move_to_end(path)
        else:
            if len(self._files) >= _MAX_OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[path] = FileIO(path)
        data = os.pread(self._files[path].fileno(), size, at)
        if len(data) != size:
            raise ValueError("the file ends too early")
        return data


def _part(data: bytes, at: int, size: int) -> bytes:
    if at + size > len(data):
        raise ValueError("a page that ends too early")
    return data[at : at + size]


def _decode(chunk: Chunk) -> Any:
    """The chunk as pyarrow decodes it, without what is around it."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(chunk.path, memory_map=True) as file:
        column = file.read_row_group(chunk.group, columns=[chunk.column], use_threads=False)
    while pyarrow.types.is_struct(column.schema.field(0).type):
        column = column.flatten()
    return column.column(0)


# The formats in which headers and levels are written


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _thrift_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol -> its fields by number, and the place behind it."""
    fields: dict[int, Any] = {}
    number = 0
    while data[at]:
        step, kind = data[at] >> 4, data[at] & 0x0F
        at += 1
        if not step:
            zigzag, at = _varint(data, at)
            number = zigzag >> 1 ^ -(zigzag & 1)
        number += step
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (4, 5, 6):
            zigzag, at = _varint(data, at)
            fields[number] = zigzag >> 1 ^ -(zigzag & 1)
        elif kind == 8:
            length, at = _varint(data, at)
            at += length
            data[at]  # IndexError: the header goes on behind what was read
        elif kind == 12:
            fields[number], at = _thrift_struct(data, at)
        else:
            raise _OtherLayout
    return fields, at + 1


def _hybrid(data: bytes, width: int, count: int) -> np.ndarray:
    """`count` numbers of `width` bits in runs, which repeat a number or pack eight at a time."""
    numbers = np.zeros(count, np.int64)
    at = done = 0
    while width and done < count:
        header, at = _varint(data, at)
        if header & 1:
            length = (header >> 1) * width
            bits = np.unpackbits(np.frombuffer(data, np.uint8, length, at), bitorder="little")
            run: Any = bits.reshape(-1, width).astype(np.int64) @ (1 << np.arange(width))
            size = len(run)
        else:
            length, size = (width + 7) // 8, header >> 1
            run = int.from_bytes(_part(data, at, length), "little")
        if not size:
            raise ValueError("an empty run of numbers")
        size = min(size, count - done)
        numbers[done : done + size] = run[:size] if header & 1 else run
        done, at = done + size, at + length
    return numbers
