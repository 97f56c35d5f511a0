"""Which columns of a table hold images, labels and captions: for Parquet files and data sets of the Hub.

Columns are told by their types, and by what the library `datasets` notes in an Arrow schema: which columns hold images,
and the names of classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from imgtok.data.labels import DataError, Labels, check_labels, say_order
from imgtok.data.sources import read_bytes
from imgtok.pictures import SUFFIXES, UnreadableImage

if TYPE_CHECKING:
    import pyarrow as pa

_LABELS = "labels must be whole numbers or names"


class Choice(Protocol):
    """What a configuration says about columns; None leaves it to `find_columns`."""

    @property
    def labels(self) -> str: ...
    @property
    def image_column(self) -> str | None: ...
    @property
    def label_column(self) -> str | None: ...
    @property
    def text_column(self) -> str | None: ...
    @property
    def num_classes(self) -> int | None: ...


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read. A leaf is a column of plain values, such as `image.bytes`."""

    image: str
    data: str | None
    """Leaf with the bytes of image files."""
    path: str | None
    """Leaf with their paths."""
    text: str | None
    label: str | None
    others: tuple[str, ...]
    """Further columns, which may hold labels."""
    named: bool
    """Whether labels are names rather than numbers."""
    class_names: tuple[str, ...]
    """Names of numbered classes, where the table notes them."""


class Values(NamedTuple):
    """Labels of rows: numbers, or places in `names`."""

    values: np.ndarray
    names: list[str]


def find_columns(schema: pa.Schema, choice: Choice, table: str, first: Callable[[str], Any]) -> Columns:
    """The columns to read of a table with that schema.

    table: its name in messages. first: gives the first value of a column. Raises DataError for columns that are not
    there or hold something else, and where there are several to choose from.
    """
    known = ", ".join(schema.names)
    given = choice.label_column if choice.labels in ("auto", "none") else choice.labels
    for column in (choice.image_column, given, choice.text_column):
        if column is not None and column not in schema.names:
            raise DataError(f"{table}: no column {column!r}; it has {known}")
    image = choice.image_column or _image_column(schema, table, first)
    data, path = _image_leaves(schema.field(image))
    if not data and not path:
        kind = f"column {image!r} is {schema.field(image).type}"
        raise DataError(f"{table}: {kind}; images are bytes, a struct with `bytes`, or paths of files; it has {known}")
    label = None if choice.labels == "none" else given or _label_column(schema, table)
    text = choice.text_column or next((name for name in ("text", "caption") if _is_text(schema, name)), None)
    if text and not _is_text(schema, text):
        raise DataError(f"{table}: column {text!r} is {schema.field(text).type}; captions are text")
    named = label is not None and _is_named(schema.field(label), table)
    others = tuple(name for name in schema.names if name not in (image, text, label))
    return Columns(image, data, path, text, label, others, named, _class_names(schema, label) if label else ())


def _image_column(schema: pa.Schema, table: str, first: Callable[[str], Any]) -> str:
    found = [name for name, feature in _features(schema).items() if feature.get("_type") == "Image"]
    found = found or [field.name for field in schema if _holds_images(field)]
    if not found:  # then a column of paths, which its first value tells
        texts = [name for name in schema.names if _is_text(schema, name)]
        found = [name for name in texts if str(first(name)).lower().endswith(SUFFIXES)]
    if len(found) > 1 and "image" in found:
        return "image"
    if len(found) != 1:
        what = f"several columns of images ({', '.join(found)})" if found else "no column of images"
        raise DataError(f"{table}: {what}; set image_column to one of {', '.join(schema.names)}")
    return found[0]


def _holds_images(field: pa.Field) -> bool:
    import pyarrow as pa

    data, path = _image_leaves(field)
    return data is not None or (path is not None and pa.types.is_struct(field.type))  # `bytes` may be null throughout


def _image_leaves(field: pa.Field) -> tuple[str | None, str | None]:
    """The leaves of a column with bytes and with paths."""
    import pyarrow as pa

    if pa.types.is_struct(field.type):
        inner = {child.name: child for child in field.type}
        data, path = inner.get("bytes"), inner.get("path")
        return (
            f"{field.name}.bytes" if data is not None and _is_binary(data.type) else None,
            f"{field.name}.path" if path is not None and _is_string(path.type) else None,
        )
    return (field.name if _is_binary(field.type) else None, field.name if _is_string(field.type) else None)


def _label_column(schema: pa.Schema, table: str) -> str | None:
    usual = next((name for name in ("label", "labels") if name in schema.names), None)
    named = [name for name in schema.names if _class_names(schema, name)]
    if usual is None and len(named) > 1:
        raise DataError(f"{table}: several columns of labels; set label_column to one of {', '.join(named)}")
    return usual or (named[0] if named else None)


def _is_named(field: pa.Field, table: str) -> bool:
    import pyarrow as pa

    kind = _plain(field.type)
    if _is_string(kind):
        return True
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{table}: column {field.name!r} is {field.type}; {_LABELS}")
    return False


def _is_text(schema: pa.Schema, column: str) -> bool:
    return column in schema.names and _is_string(schema.field(column).type)


def _is_string(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = _plain(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = _plain(kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a column with a dictionary (pandas' categories)."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _class_names(schema: pa.Schema, column: str) -> tuple[str, ...]:
    """The names that `datasets` notes for the classes of a column."""
    feature = _features(schema).get(column, {})
    return tuple(map(str, feature.get("names") or ())) if feature.get("_type") == "ClassLabel" else ()


def _features(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` notes about the columns of a file, by name."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


# Values


def read_labels(column: pa.ChunkedArray, columns: Columns, name: Callable[[int], str]) -> Values:
    """The labels of a table; DataError, with the name of the row, for one that is neither a whole number nor a name."""
    import pyarrow as pa

    column = column.cast(_plain(column.type))
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{name(row)}: {columns.label} is None; {_LABELS}")
    if columns.named:
        # An array of the one type whatever the chunks are, and also if there is none.
        names = pa.array([], pa.string()) if not len(column) else column.cast(pa.string()).combine_chunks()
        coded = names.dictionary_encode()
        return Values(coded.indices.to_numpy(), coded.dictionary.to_pylist())
    values = column.to_numpy()
    odd = np.flatnonzero(values != np.trunc(values))  # of a column of floats
    if len(odd):
        raise DataError(f"{name(int(odd[0]))}: {columns.label} is {values[odd[0]]}; {_LABELS}")
    return Values(values.astype(np.int64), [])


def join_labels(
    parts: Iterable[Values], columns: Columns, choice: Choice, count: int, name: Callable[[int], str]
) -> Labels:
    """The labels of all `count` rows; names are numbered in sorted order.

    Raises DataError for a label outside the classes.
    """
    parts = list(parts)
    if columns.label is None:
        asked = choice.labels != "none"
        others = f"; data.labels=COLUMN takes one of {', '.join(columns.others)}" if columns.others else ""
        missing = (
            f"{name(0).rpartition('[')[0]} has no column `label`, nor one of named classes{others}" if asked else ""
        )
        return Labels(np.zeros(count, np.int64), missing=missing)
    names = tuple(sorted({word for part in parts for word in part.names})) if columns.named else columns.class_names
    if columns.named:
        say_order(names, f"the classes of column {columns.label} are in the order of text", "name")
    places = {word: place for place, word in enumerate(names)}
    numbers = [
        np.array([places[word] for word in part.names], np.int64)[part.values] if columns.named else part.values
        for part in parts
    ]
    labels = np.concatenate(numbers)
    if len(labels) and (labels == -1).all():  # as the Hub has it in parts for tests
        return Labels(np.zeros(count, np.int64), missing=f"column {columns.label} is -1 in all rows, which is no class")
    total = check_labels(labels, choice.num_classes or len(names) or None, None, name)
    return Labels(labels, total, names, f"column {columns.label}")


def read_beside(folder: Path, path: str, name: str) -> bytes:
    """The bytes of a file that row `name` of a table in `folder` names; a relative path counts from there.

    Raises UnreadableImage for a file that cannot be read.
    """
    if "://" in path:
        raise UnreadableImage(name, f"{path} is no local file; download it and name it by its path")
    try:
        return read_bytes(str(folder / os.path.expanduser(path)))  # noqa: PTH111 - leaves an unknown ~user alone
    except UnreadableImage as error:
        raise UnreadableImage(name, str(error)) from error
