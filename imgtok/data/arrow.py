"""Images in data sets of the Hugging Face Hub and in folders of `save_to_disk`, through the library `datasets`.

Both are Arrow tables on disk, memory-mapped, with random access; images stay undecoded bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from imgtok.config import PositiveInt, check
from imgtok.data.columns import find_columns, join_labels, read_beside, read_labels
from imgtok.data.files import LeftOut
from imgtok.data.labels import DataError
from imgtok.data.sources import Record, identity_of, other_kind
from imgtok.pictures import UnreadableImage


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """A data set of the Hugging Face Hub, downloaded once into its cache, or a folder that `save_to_disk` wrote."""

    kind: Literal["huggingface"] = "huggingface"
    name: str
    """Name on the Hub such as `uoft-cs/cifar10`, or a local folder."""
    subset: str | None = None
    """Configuration of a data set that has several."""
    split: str = "train"
    """Split of the data set."""
    val_split: str | None = None
    """Split of the held-out images, such as validation; null takes a share of `split`."""
    labels: str = "auto"
    """auto, none, or the name of a column, as label_column."""
    num: PositiveInt | None = None
    """Use so many images, from all over the set; null uses all."""
    revision: str | None = None
    """Branch, tag or commit; null takes the newest."""
    image_column: str | None = None
    """Column of image bytes, or of paths of image files, which count from the local folder; null finds it."""
    label_column: str | None = None
    """Column of whole numbers or names; null takes `label` if there is one, else the only column of named classes."""
    text_column: str | None = None
    """Column of captions; null takes `text` or `caption` if there is one."""
    num_classes: PositiveInt | None = None
    """Number of classes; null takes the names in the data set, or else the largest label + 1."""

    def __post_init__(self) -> None:
        check(self)


class ArrowRecords:
    """Rows of a Hugging Face data set, memory-mapped, its images left undecoded."""

    def __init__(self, config: HubConfig) -> None:
        """Downloads the data set if it is not in the cache. Raises DataError for what cannot be used."""
        folder = Path(os.path.expanduser(config.name))  # noqa: PTH111 - the name may be one on the Hub
        dataset = _load_saved(folder, config) if _is_saved(folder) else _load_hub(folder, config)
        self._name, self._folder = config.name, folder
        if not len(dataset):
            raise DataError(f"{self._name}: no rows")
        self._rows = dataset.with_format("arrow")
        schema = dataset.features.arrow_schema
        self._columns = find_columns(schema, config, self._name, self._first_value)
        values = []
        if self._columns.label:
            column = self._rows.select_columns([self._columns.label])[:].column(0)
            values.append(read_labels(column, self._columns, self.name))
        self.labels = join_labels(values, self._columns, config, len(dataset), self.name)
        self.left_out = LeftOut()
        kept = [column for column in (self._columns.image, self._columns.text) if column]
        self._rows = self._rows.select_columns(kept)

    def _first_value(self, column: str) -> Any:
        """The first value that there is among the first rows."""
        values = self._rows.select_columns([column])[:64].column(0).drop_null()
        return values[0].as_py() if len(values) else None

    def __len__(self) -> int:
        return len(self.labels.values)

    def name(self, index: int) -> str:
        """`NAME[row]`."""
        return f"{self._name}[{index}]"

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        image, name = row[self._columns.image][0].as_py(), self.name(index)
        text = (row[self._columns.text][0].as_py() or "") if self._columns.text else ""
        data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, image)
        if not isinstance(data, bytes):
            if not path:
                raise UnreadableImage(name, f"column {self._columns.image!r} is empty")
            data = read_beside(self._folder, path, name)
        return Record(data, int(self.labels.values[index]), name, text)

    def identity(self) -> dict[str, Any]:
        """Rows have no names and sizes: the labels and the bytes of a few identify them."""
        return identity_of("rows", (), self.labels, (), lambda index: self[index].data)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _load_saved(folder: Path, config: HubConfig) -> Any:
    """A split of what `DatasetDict.save_to_disk` or `Dataset.save_to_disk` wrote, read where it lies."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder}: not a readable folder of save_to_disk ({_innermost(error)})") from error
    if isinstance(saved, datasets.DatasetDict):
        if config.split not in saved:
            raise DataError(f"{folder}: no split {config.split!r}; set split to one of {', '.join(saved)}")
        return saved[config.split]
    split = str(saved.split or "train")  # `train` is what a configuration says that names none
    if config.split != split:
        raise DataError(f"{folder}: holds one data set, which is the split {split!r}; set split={split}")
    return saved


def _load_hub(folder: Path, config: HubConfig) -> Any:
    import datasets

    if config.name.startswith(("/", ".", "~")) and not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if folder.is_file():
        raise FileNotFoundError(f"{folder}: a file, not a folder of save_to_disk{other_kind(folder.name)}")
    name = str(folder) if folder.is_dir() else config.name
    try:
        return datasets.load_dataset(name, config.subset, split=config.split, revision=config.revision)
    except Exception as error:
        local = "check what is in the folder, split and subset; Parquet files are read with kind=parquet"
        hub = "check the name, split and subset, the network, and HF_TOKEN for a gated data set"
        hint = local if folder.is_dir() else hub
        raise DataError(f"data set {config.name!r}: {_innermost(error)}; {hint}") from error


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
