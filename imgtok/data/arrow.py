"""Images in Parquet files and in data sets of the Hugging Face Hub, through the library `datasets`.

Both become Arrow tables on disk, memory-mapped, with random access; images stay undecoded bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from imgtok.config import PositiveInt, check
from imgtok.data.sources import DataError, Record, check_labels, expand, read_bytes
from imgtok.pictures import UnreadableImage


@dataclass(frozen=True, kw_only=True)
class ParquetConfig:
    """Parquet files in the Hugging Face layout: a column of images, a column of labels."""

    kind: Literal["parquet"] = "parquet"
    path: str
    """A file, or a pattern such as `data/train-*.parquet`."""
    image_column: str | None = None
    """Column of image bytes; null finds it."""
    label_column: str | None = None
    """Column of whole numbers; null takes `label` if there is one, else the only column of named classes."""
    text_column: str | None = None
    """Column of captions; null takes `text` or `caption` if there is one."""
    num_classes: PositiveInt | None = None
    """Number of classes; null takes the names in the file, or else the largest label + 1."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """A data set of the Hugging Face Hub, downloaded once into its cache."""

    kind: Literal["huggingface"] = "huggingface"
    name: str
    """Name on the Hub such as `uoft-cs/cifar10`, or a local folder."""
    subset: str | None = None
    """Configuration of a data set that has several."""
    split: str = "train"
    """Split of the data set; imgtok's own held-out part is taken out of it."""
    revision: str | None = None
    """Branch, tag or commit; null takes the newest."""
    image_column: str | None = None
    """Column of image bytes; null finds it."""
    label_column: str | None = None
    """Column of whole numbers; null takes `label` if there is one, else the only column of named classes."""
    text_column: str | None = None
    """Column of captions; null takes `text` or `caption` if there is one."""
    num_classes: PositiveInt | None = None
    """Number of classes; null takes the names in the data set, or else the largest label + 1."""

    def __post_init__(self) -> None:
        check(self)


class ArrowRecords:
    """Rows of a Hugging Face data set, memory-mapped, its images left undecoded."""

    def __init__(self, config: ParquetConfig | HubConfig) -> None:
        dataset = _load_parquet(config) if isinstance(config, ParquetConfig) else _load_hub(config)
        self._name = config.path if isinstance(config, ParquetConfig) else config.name
        self._image = _image_column(dataset.features, config.image_column, self._name)
        label = _label_column(dataset.features, config.label_column, self._name)
        self._text = _named_column(dataset.features, config.text_column, ("text", "caption"), self._name)
        if not len(dataset):
            raise DataError(f"{self._name}: no rows")
        names = getattr(dataset.features[label], "names", None) if label else None
        self.class_names = tuple(names or ())
        self.labels, self.num_classes = np.zeros(len(dataset), np.int64), 0
        if label:
            self.labels = _integers(dataset.with_format("arrow")[label], label, self.name)
            classes = config.num_classes or len(self.class_names) or None
            self.num_classes = check_labels(self.labels, classes, None, self.name)
        kept = [column for column in (self._image, self._text) if column]
        self._rows = dataset.select_columns(kept).with_format("arrow")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """`FILE[row]`."""
        return f"{self._name}[{index}]"

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        image, name = row[self._image][0].as_py(), self.name(index)
        text = (row[self._text][0].as_py() or "") if self._text else ""
        data = image if isinstance(image, bytes) else (image or {}).get("bytes")
        if data is None:
            path = (image or {}).get("path")
            if not path:
                raise UnreadableImage(name, f"column {self._image!r} is empty")
            data = read_bytes(path)
        return Record(data, int(self.labels[index]), name, text)


def _load_parquet(config: ParquetConfig) -> Any:
    import datasets

    files = expand(config.path)
    try:
        return datasets.load_dataset("parquet", data_files=files, split="train")
    except Exception as error:
        raise DataError(f"{config.path}: not a readable Parquet file ({_innermost(error)})") from error


def _load_hub(config: HubConfig) -> Any:
    import datasets

    try:
        dataset = datasets.load_dataset(config.name, config.subset, split=config.split, revision=config.revision)
    except Exception as error:
        hint = "check the name, split and subset, the network, and HF_TOKEN for a gated data set"
        raise DataError(f"data set {config.name!r}: {_innermost(error)}; {hint}") from error
    return dataset


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def _image_column(features: Any, given: str | None, name: str) -> str:
    if given is not None:
        return _known_column(features, given, name)
    found = [column for column, feature in features.items() if _holds_images(feature)]
    if len(found) > 1 and "image" in found:
        return "image"
    if len(found) != 1:
        what = f"several columns of images ({', '.join(found)})" if found else "no column of images"
        raise DataError(f"{name}: {what}; set image_column to one of {', '.join(features)}")
    return str(found[0])


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _label_column(features: Any, given: str | None, name: str) -> str | None:
    found = _named_column(features, given, ("label", "labels"), name)
    named = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    if found is None and len(named) > 1:
        raise DataError(f"{name}: several columns of labels; set label_column to one of {', '.join(named)}")
    return found or (named[0] if named else None)


def _named_column(features: Any, given: str | None, usual: Sequence[str], name: str) -> str | None:
    if given is not None:
        return _known_column(features, given, name)
    return next((column for column in usual if column in features), None)


def _known_column(features: Any, column: str, name: str) -> str:
    if column not in features:
        raise DataError(f"{name}: no column {column!r}; it has {', '.join(features)}")
    return column


def _integers(column: Any, label: str, name: Callable[[int], str]) -> np.ndarray:
    values = column.to_pylist()
    for row, value in enumerate(values):
        if not isinstance(value, int):
            raise DataError(f"{name(row)}: {label} is {value!r}; labels must be whole numbers")
    return np.array(values, dtype=np.int64)
