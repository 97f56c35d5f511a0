"""Labels where people keep them: class folders, files beside each image, one file for all, or none.

Every kind of data has a field `labels`. `auto` takes what is certain: EDM's `dataset.json`, else `KEY.cls` beside the
images, else a field `label`, `class` or `cls` of `KEY.json`, else, in a folder, the class folders. What it does not
understand makes data without labels, with the reason, and never class 0: jobs that need labels stop and say so.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from imgtok.data.files import Listing, side_file, stem_of, suffix_of

logger = logging.getLogger(__name__)

WAYS = (
    "in class folders (data.labels=folders, or subfolders), in KEY.cls or a field of KEY.json beside each image "
    "(data.labels=cls, json.FIELD), in one file for all (data.labels=dataset.json, labels.csv), or in a column of a "
    "Parquet file (its name)"
)
"""Where labels are read from, for messages."""
FIELDS = ("label", "class", "cls")
"""Fields of a `KEY.json` that `auto` takes."""
_COLUMNS = ("file_name", "filename", "file", "image", "name", "path", "id")
_LABELS = ("label", "class", "cls", "labels", "target", "category")
_SUSPECTS = re.compile(r"(?i)label|metadata|annotation|target")


class DataError(ValueError):
    """Data that cannot be used; the message names the file or row and says what was expected."""


@dataclass(frozen=True)
class Labels:
    """The labels of a data set's images."""

    values: np.ndarray
    """(N,) int64; zeros where there are none."""
    num_classes: int = 0
    """0 for no labels."""
    names: tuple[str, ...] = ()
    """Of the classes, where they have names."""
    source: str = ""
    """Where they come from, in words."""
    missing: str = ""
    """Why there are none and what to set; "" where there are labels, and where none were asked for."""
    used: Sequence[frozenset[str]] = ()
    """By listing, the files that were read."""

    @property
    def in_words(self) -> str:
        """`3 classes (class folders: ant, bee, zebra)`, or `no labels`."""
        if not self.num_classes:
            return "no labels" + (" were asked for" if not self.missing else "")
        shown = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
        classes = f"{self.num_classes} class{'es' if self.num_classes > 1 else ''}"
        return f"{classes} ({self.source}{': ' if shown else ''}{shown})"


@dataclass(frozen=True)
class Place:
    """One listing of a data set, a folder or a tar, and how its files are read."""

    where: str
    """Path, for messages."""
    listing: Listing
    read: Callable[[str], bytes]
    """The content of one of its files; raises OSError."""
    stems: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.listing.others:
            self.stems.update(stem_of(entry.name) for entry in self.listing.images)

    def side(self, name: str, suffix: str) -> str | None:
        """The file beside an image with this ending."""
        return side_file(self.listing, self.stems, name, suffix) if self.listing.others else None

    def full(self, name: str) -> str:
        """A file's name in messages."""
        return f"{self.where}:{name}" if Path(self.where).is_file() else f"{self.where}/{name}"


def find_labels(places: Sequence[Place], how: str, num_classes: int | None, *, folders: bool) -> Labels:
    """The labels of all images of the places, in order. `folders` says that class folders may be taken unasked.

    `how` is a value of the field `labels`, `num_classes` one of that field. Raises DataError for labels that are not
    understood, that lie outside the classes, or that some images lack.
    """
    count = sum(len(place.listing.images) for place in places)
    if how == "none":
        return Labels(np.zeros(count, np.int64))
    chosen, why = (how, "") if how != "auto" else _choose(places, folders=folders)
    if not chosen:
        return Labels(np.zeros(count, np.int64), missing=why)
    if chosen in ("folders", "subfolders"):
        return _by_folder(places, chosen, num_classes)
    used: list[frozenset[str]] = []
    values: list[Any] = []
    for place in places:
        found, read = _values(place, chosen)
        used.append(frozenset(read))
        values += found
    name = functools.partial(_name, places)
    source = "KEY.cls" if chosen == "cls" else f"{chosen[5:]} in KEY.json" if chosen.startswith("json.") else chosen
    lacking = [number for number, value in enumerate(values) if value is None]
    if lacking:
        others = ", though others have" if len(lacking) < count else ""
        more = f" ({len(lacking)} such images)" if len(lacking) > 1 else ""
        what = f"no label in {source}{others}{more}; label all images, or none with data.labels=none"
        raise DataError(f"{name(lacking[0])}: {what}")
    numbers, names = as_numbers(values, name, source)
    total = check_labels(numbers, num_classes, len(names) or None, name)
    return Labels(numbers, total, names, source, used=used)


def _choose(places: Sequence[Place], *, folders: bool) -> tuple[str, str]:
    """What `auto` takes, or "" and why it takes nothing."""
    if any("dataset.json" in place.listing.others for place in places):
        if all(_has_labels(place) for place in places):
            return "dataset.json", ""
        return "", f"{places[0].full('dataset.json')} has none"
    first: dict[str, str] = {}
    for place in places:
        for entry in place.listing.images if place.listing.others else ():
            if place.side(entry.name, ".cls"):
                return "cls", ""
            if not first and (side := place.side(entry.name, ".json")):
                first = {key: "" for key in _object(place, side) if key in FIELDS} or {"": ""}
    if known := next((name for name in FIELDS if name in first), None):
        return f"json.{known}", ""
    return _choose_folders(places) if folders else ("", _in_tars(places))


def _choose_folders(places: Sequence[Place]) -> tuple[str, str]:
    (place,) = places
    parents = {entry.name.rpartition("/")[0] for entry in place.listing.images}
    if parents == {""}:
        return "", f"the images in {place.where} lie in no class folders"
    suspect = next((n for n in place.listing.others if "/" not in n and _looks_like_labels(n)), None)
    if suspect is not None:
        return "", (
            f"{place.full(suspect)} lies beside folders of images: data.labels={suspect} reads it, data.labels=folders "
            "takes the folders as classes"
        )
    tops = {parent.partition("/")[0] for parent in parents}
    if all("/" in parent for parent in parents) and len(parents) > len(tops):
        few = ", ".join(sorted(parents)[:3])
        return "", (
            f"all images in {place.where} lie two or more folders deep ({few}, ...): data.labels=folders takes the "
            f"{len(tops)} upper folders as classes, data.labels=subfolders the {len(parents)} that hold the images"
        )
    return "folders", ""


def _in_tars(places: Sequence[Place]) -> str:
    tops = {entry.name.partition("/")[0] for place in places for entry in place.listing.images if "/" in entry.name}
    hint = f"; data.labels=folders takes the {len(tops)} folders in the tars as classes" if len(tops) > 1 else ""
    return f"no image of {places[0].where} has a KEY.cls or a KEY.json with a field {' or '.join(FIELDS)}{hint}"


def _looks_like_labels(name: str) -> bool:
    return suffix_of(name) in (".csv", ".tsv", ".json", ".jsonl") and bool(_SUSPECTS.search(name))


# ---------------------------------------------------------------- the ways


def _by_folder(places: Sequence[Place], how: str, num_classes: int | None) -> Labels:
    """The folder at the top of an image's path, or the whole path of its folder."""
    images = [entry.name for place in places for entry in place.listing.images]
    keys = [name.partition("/")[0] if how == "folders" else name.rpartition("/")[0] for name in images]
    loose = next((number for number, name in enumerate(images) if "/" not in name), None)
    name = functools.partial(_name, places)
    if loose is not None:
        what = "images both in class folders and beside them" if any("/" in image for image in images) else "no folders"
        raise DataError(f"{places[0].where}: {what} ({name(loose)}); data.labels=none takes all of them without labels")
    names = sorted(set(keys))
    if how == "folders":
        empty = sorted({folder for place in places for folder in place.listing.folders} - set(names))
        if empty:
            place = places[0].full(empty[0])
            raise DataError(f"{place}: a class folder without images; remove it or fill it")
    _say_order(tuple(names))
    number = {key: index for index, key in enumerate(names)}
    values = np.fromiter((number[key] for key in keys), np.int64, len(keys))
    total = check_labels(values, num_classes, len(names), name)
    return Labels(values, total, tuple(names), "class folders" if how == "folders" else "folders of the images")


@functools.cache
def _say_order(names: tuple[str, ...]) -> None:
    """Once: that numbers as names of classes are not the numbers of the classes."""
    if not all(name.isascii() and name.isdecimal() for name in names):
        return
    for index, name in enumerate(names):
        if int(name) != index:
            order = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            logger.info(
                "class folders are in the order of text, as torchvision has it (%s): folder %s is class %d",
                order,
                name,
                index,
            )
            return


def _values(place: Place, how: str) -> tuple[list[Any], list[str]]:
    """By image of a place, what stands in the files of one of the ways, None where nothing; and the files read."""
    images = [entry.name for entry in place.listing.images]
    if how == "cls":
        sides = [place.side(name, ".cls") for name in images]
        values = [None if side is None else _whole_number(place, side) for side in sides]
        return values, [side for side in sides if side is not None]
    if how.startswith("json."):
        sides = [place.side(name, ".json") for name in images]
        path = how.removeprefix("json.").split(".")
        return [None if s is None else _field(_object(place, s), path) for s in sides], [s for s in sides if s]
    if suffix_of(how) in (".json", ".jsonl", ".csv", ".tsv"):
        table = _table(place, how)
        return [_look_up(table, name) for name in images], [how]
    raise DataError(f"data.labels: given {how!r}; it can be auto, none, or one of these: {WAYS}")


def _whole_number(place: Place, name: str) -> int:
    text = _read(place, name).decode(errors="replace").strip()
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{place.full(name)}: label is {text[:40]!r}; it must be a whole number") from None


def _object(place: Place, name: str) -> Mapping[str, Any]:
    try:
        data = json.loads(_read(place, name))
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _field(data: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = data
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _has_labels(place: Place) -> bool:
    return bool(_object(place, "dataset.json").get("labels", True))


def _table(place: Place, name: str) -> dict[str, Any]:
    """Labels by image, of a file in the data or anywhere else. Raises DataError for one that is not understood."""
    text = _read(place, name).decode("utf-8-sig", errors="replace")
    try:
        pairs = _pairs_of_json(text) if suffix_of(name) == ".json" else _pairs_of_rows(text, suffix_of(name))
        table = {str(key).removeprefix("./").replace("\\", "/"): value for key, value in pairs}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{place.full(name)}: labels that are not understood ({error}); a .json file holds "
            '{"labels": [["00000/img00000000.png", 3], ...]}, a .csv or .jsonl file has columns such as file_name and '
            "label; data.labels=none or folders does without it"
        ) from error
    stems: dict[str, Any] = {}
    for key, value in table.items():  # some write names without the ending
        stems.setdefault(stem_of(key), value)
    return stems | table


def _pairs_of_json(text: str) -> Iterable[tuple[Any, Any]]:
    data = json.loads(text)
    data = data["labels"] if isinstance(data, dict) and "labels" in data else data
    if isinstance(data, dict):
        if not data or not all(isinstance(value, int | str) for value in data.values()):
            raise ValueError(f"its fields are {', '.join(data)[:60]}")
        return list(data.items())
    if not isinstance(data, list) or not data:
        raise ValueError(f"labels is {str(data)[:40]}")
    return [(name, value) for name, value in data]


def _pairs_of_rows(text: str, suffix: str) -> Iterable[tuple[Any, Any]]:
    if suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        lines = list(csv.reader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ","))
        head, *rest = [line for line in lines if line]
        rows = [dict(zip(head, line, strict=False)) for line in rest]
    if not rows:
        raise ValueError("it has no rows")
    known = {str(key).lower().strip(): key for key in rows[0]}
    name, label = (next((known[c] for c in usual if c in known), None) for usual in (_COLUMNS, _LABELS))
    if name is None or label is None:
        raise ValueError(f"its columns are {', '.join(map(str, rows[0]))}")
    return [(row[name], row[label]) for row in rows]


def _look_up(table: Mapping[str, Any], name: str) -> Any:
    file = name.rpartition("/")[2]
    for key in (name, stem_of(name), file, stem_of(file)):
        if key in table:
            return table[key]
    return None


def _read(place: Place, name: str) -> bytes:
    outside = Path(name).expanduser()
    try:
        if name not in place.listing.others and outside.is_file():
            return outside.read_bytes()
        return place.read(name)
    except (OSError, KeyError) as error:
        raise DataError(f"{place.full(name)}: no such file of labels, or it cannot be read; {WAYS}") from error


def _name(places: Sequence[Place], number: int) -> str:
    """The name of the image `number` of all, for messages."""
    for place in places:
        if number < len(place.listing.images):
            return place.full(place.listing.images[number].name)
        number -= len(place.listing.images)
    raise IndexError(number)


# ---------------------------------------------------------------- shared with Parquet


def as_numbers(values: Sequence[Any], name: Callable[[int], str], what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as whole numbers (N,) int64, and the names of the classes where the values are text.

    Text that is a whole number everywhere counts as numbers; other text becomes the place among the sorted texts.
    Raises DataError that names an image without a label, or with one of another kind; `what` says where they stand.
    """
    values = [int(v) if isinstance(v, bool) or (isinstance(v, float) and v.is_integer()) else v for v in values]
    texts = [isinstance(value, str) for value in values]
    mixed = any(texts) and not all(texts)
    for number, value in enumerate(values):
        if not isinstance(value, int | str) or value == "" or (mixed and texts[number] != texts[0]):
            kinds = "whole numbers or text, of one kind for all images; data.labels=none goes without"
            raise DataError(f"{name(number)}: {what} is {value!r:.60}; labels must be {kinds}")
    if not any(texts):
        return np.array(values, dtype=np.int64), ()
    if all(re.fullmatch(r"\s*[0-9]+\s*", value) for value in values):
        return np.array([int(value) for value in values], dtype=np.int64), ()
    names = sorted(set(values))
    index = {key: number for number, key in enumerate(names)}
    return np.array([index[value] for value in values], dtype=np.int64), tuple(names)


def check_labels(labels: np.ndarray, given: int | None, counted: int | None, name: Callable[[int], str]) -> int:
    """The number of classes (given, or counted, or largest label + 1); DataError for the first label outside."""
    num_classes = given or counted or int(labels.max()) + 1
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        allowed = f"allowed are 0 to {num_classes - 1}" if num_classes > 0 else "labels begin at 0"
        more = f" ({len(outside)} such images)" if len(outside) > 1 else ""
        first = int(outside[0])
        raise DataError(f"{name(first)}: label {labels[first]} is outside the classes; {allowed}{more}")
    return num_classes
