"""Labels where people keep them: class folders, files beside each image, one file for all, or none.

Every kind of data has a field `labels`. `auto` takes what is certain: EDM's `dataset.json`, else `KEY.cls` beside the
images, else a field `label`, `class` or `cls` of `KEY.json`, else, in a folder, the class folders. What it does not
understand makes data without labels, with the reason, and never class 0: jobs that need labels stop and say so.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from imgtok.data.files import IMAGES, Listing, side_file, stem_of, suffix_of

logger = logging.getLogger(__name__)

WAYS = (
    "in class folders (data.labels=folders, or subfolders), in KEY.cls or a field of KEY.json beside each image "
    "(data.labels=cls, json.FIELD), in one file for all (data.labels=dataset.json, labels.csv, val.txt), or in a "
    "column of a Parquet file (its name)"
)
"""Where labels are read from, for messages."""
FIELDS = ("label", "class", "cls")
"""Fields of a `KEY.json` that `auto` takes."""
_COLUMNS = ("file_name", "filename", "file", "image", "name", "path", "id")
_LABELS = ("label", "class", "cls", "labels", "target", "category")
_TABLES = (".json", ".jsonl", ".csv", ".tsv", ".txt")
_SUSPECTS = re.compile(r"(?i)(label|metadata|annotation|target).*\.(jsonl?|[ct]sv)$")
_NUMBER = re.compile(r"-?[0-9]+(\.0*)?")
_FEW, _TIMES = 1000, 10
"""So many classes, and so many times the images, may there be without being asked for."""
_GLANCE = 2**16  # bytes of a file in which names of images are looked for
_LOOKED_INTO = 16  # files beside images that tell what fields there are


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
    """Names of the classes, where they have any."""
    source: str = ""
    """Where they come from, in words."""
    missing: str = ""
    """Why there are none and what to set; "" where there are labels, and where none were asked for."""
    used: Sequence[frozenset[str]] = ()
    """By listing, the files that were read."""

    @property
    def in_words(self) -> str:
        """`3 classes (class folders: ant, bee, zebra)`, or `no labels`; classes without images are counted, too."""
        if not self.num_classes:
            return "no labels" + (" were asked for" if not self.missing else "")
        shown = ", ".join(self.names[:5]) + (", ..." if len(self.names) > 5 else "")
        classes = f"{self.num_classes} class{'es' if self.num_classes > 1 else ''}"
        empty = self.num_classes - len(np.unique(self.values))
        classes += f", {empty} of them without images" if empty else ""
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
    endings: set[str] = field(default_factory=set)
    """Endings of the files that are no images."""

    def __post_init__(self) -> None:
        self.endings.update(map(suffix_of, self.listing.others))
        if self.endings:
            self.stems.update(stem_of(entry.name) for entry in self.listing.images)

    def side(self, name: str, suffix: str) -> str | None:
        """The name of the file beside an image with this ending, as `side_file` has it; None where there is none."""
        return side_file(self.listing, self.stems, name, suffix) if suffix in self.endings else None

    def caption(self, name: str) -> str | None:
        """The name of the file beside an image that may hold its caption; None where there is none."""
        return self.side(name, ".txt") or self.side(name, ".json")

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
    taken: dict[str, str] = {}
    for place in places:
        found, read = _values(place, chosen, taken)
        used.append(frozenset(read))
        values += found
    name = functools.partial(_name, places)
    source = "KEY.cls" if chosen == "cls" else f"{chosen[5:]} in KEY.json" if chosen.startswith("json.") else chosen
    lacking = [number for number, value in enumerate(values) if value is None]
    if lacking:
        others = ", though others have" if len(lacking) < count else ""
        more = f" ({len(lacking)} such images)" if len(lacking) > 1 else ""
        what = f"no label in {source}{others}{more}; label all images, or none with data.labels=none"
        raise DataError(f"{name(lacking[0])}: {what}{_fields_in_words(places) if how.startswith('json.') else ''}")
    numbers, names = as_numbers(values, name, source)
    if names:
        say_order(names, f"the classes of {source} are in the order of text", "name")
    total = check_labels(numbers, num_classes, len(names) or None, name)
    return Labels(numbers, total, names, source, used=used)


def _choose(places: Sequence[Place], *, folders: bool) -> tuple[str, str]:
    """What `auto` takes, or "" and why it takes nothing."""
    if any("dataset.json" in place.listing.others for place in places):
        if all(_has_labels(place) for place in places):
            return "dataset.json", ""
        return "", f"{places[0].full('dataset.json')} has none"
    if any(place.side(e.name, ".cls") for place in places if ".cls" in place.endings for e in place.listing.images):
        return "cls", ""
    fields = _fields(places)
    if known := next((name for name in FIELDS if name in fields), None):
        return f"json.{known}", ""
    return _choose_folders(places) if folders else ("", _in_tars(places))


def _choose_folders(places: Sequence[Place]) -> tuple[str, str]:
    (place,) = places
    suspect = _table_in(place)
    parents = {entry.name.rpartition("/")[0] for entry in place.listing.images}
    if parents == {""}:
        reads = f"; data.labels={suspect} reads {place.full(suspect)}" if suspect else _fields_in_words(places)
        return "", f"the images in {place.where} lie in no class folders{reads}"
    if suspect is not None:
        return "", (
            f"{place.full(suspect)} lies beside folders of images: data.labels={suspect} reads it, data.labels=folders "
            "takes the folders as classes"
        )
    if _are_storage(place):
        return "", (
            f"the folders in {place.where} ({', '.join(sorted(parents)[:3])}, ...) only divide a numbered set, and the "
            f"file of its labels, such as dataset.json, is not there; data.labels=folders takes them as classes "
            f"all the same{_fields_in_words(places)}"
        )
    tops = {parent.partition("/")[0] for parent in parents}
    if all("/" in parent for parent in parents) and len(parents) > len(tops):
        few = ", ".join(sorted(parents)[:3])
        upper = f"the {len(tops)} upper folders as classes" if len(tops) > 1 else "the upper folder as the one class"
        return "", (
            f"all images in {place.where} lie two or more folders deep ({few}, ...): data.labels=folders takes "
            f"{upper}, data.labels=subfolders the {len(parents)} that hold the images"
        )
    return "folders", ""


def _in_tars(places: Sequence[Place]) -> str:
    tops = {entry.name.partition("/")[0] for place in places for entry in place.listing.images if "/" in entry.name}
    hint = _fields_in_words(places)
    if suspect := _table_in(places[0]):
        hint += f"; data.labels={suspect} reads {places[0].full(suspect)}"
    elif len(tops) > 1 and not any(map(_are_storage, places)):
        hint += f"; data.labels=folders takes the {len(tops)} folders in the tars as classes"
    return f"no image of {places[0].where} has a KEY.cls or a KEY.json with a field {' or '.join(FIELDS)}{hint}"


def _are_storage(place: Place) -> bool:
    """Whether the folders only divide a numbered set: `00012/img00012345.png` (EDM), `12000/12345.png` (FFHQ), or
    `00012/000120345.jpg` (img2dataset).
    """
    for entry in place.listing.images:
        folder, _, file = entry.name.rpartition("/")
        number = re.fullmatch(r"[a-zA-Z_-]*([0-9]+)", stem_of(file))
        if not re.fullmatch(r"[0-9]{4,}", folder) or number is None:
            return False
        thousands = int(number[1]) // 1000
        if int(folder) not in (thousands, thousands * 1000) and not number[1].startswith(folder):
            return False
    return True


def _table_in(place: Place) -> str | None:
    """A file at the top that is called as labels are, or in which our images have labels."""
    tables = [name for name in place.listing.others if "/" not in name and suffix_of(name) in _TABLES]
    known = next((name for name in tables if _SUSPECTS.search(name) and not _has_captions_alone(place, name)), None)
    lone = (name for name in tables if name[: -len(suffix_of(name))] not in place.stems)  # not what one image has
    return known or next((name for name in itertools.islice(lone, _LOOKED_INTO) if _has_our_labels(place, name)), None)


def _has_our_labels(place: Place, name: str) -> bool:
    try:
        text = _read(place, name).decode("utf-8-sig", errors="replace")
        words = {word for word in re.split(r"[\s,;\"'/\\\[\]]+", text[:_GLANCE]) if suffix_of(word) in IMAGES}
        known = any(entry.name.rpartition("/")[2] in words for entry in place.listing.images) if words else False
        return known and bool(_pairs(text, name))
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _has_captions_alone(place: Place, name: str) -> bool:
    """Whether a table has captions and no labels, as `metadata.jsonl` of the library datasets may."""
    try:
        columns = _rows(_read(place, name).decode("utf-8-sig", errors="replace"), suffix_of(name))[0]
    except (ValueError, TypeError, AttributeError, IndexError):
        return False
    known = {str(column).lower() for column in columns}
    return bool(known & {"text", "caption"}) and not known & set(_LABELS)


def _fields(places: Sequence[Place]) -> list[str]:
    """The fields of the files KEY.json beside images, some of which are looked into."""
    sides = [
        (place, side)
        for place in places
        if ".json" in place.endings
        for entry in place.listing.images
        if (side := place.side(entry.name, ".json"))
    ]
    some = sides[:: max(1, len(sides) // _LOOKED_INTO)][:_LOOKED_INTO]
    return list(dict.fromkeys(key for place, side in some for key in _object(place, side)))


def _fields_in_words(places: Sequence[Place]) -> str:
    fields = [name for name in _fields(places) if name not in ("caption", "text")]
    few = ", ".join(fields[:6]) + (", ..." if len(fields) > 6 else "")
    return f"; KEY.json beside the images has the fields {few}: data.labels=json.FIELD takes one" if fields else ""


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
        for each in places:
            lost = [name for name in each.listing.unreadable if "/" not in name and suffix_of(name) not in IMAGES]
            if lost:
                what = "a link to nothing, where a class folder may have been; mend or remove it"
                raise DataError(f"{each.full(lost[0])}: {what}")
    say_order(tuple(names), "class folders are in the order of text, as torchvision has it", "folder")
    number = {key: index for index, key in enumerate(names)}
    values = np.fromiter((number[key] for key in keys), np.int64, len(keys))
    total = check_labels(values, num_classes, len(names), name)
    return Labels(values, total, tuple(names), "class folders" if how == "folders" else "folders of the images")


@functools.cache
def say_order(names: tuple[str, ...], what: str, each: str) -> None:
    """Once: that numbers in the names of classes are not those of the classes; `what` says how they are sorted."""
    if all(name.isascii() and name.isdecimal() for name in names):
        expected = [str(index) if int(name) != index else name for index, name in enumerate(names)]
    else:
        expected = sorted(names, key=_by_number)
    odd = next((index for index, name in enumerate(names) if name != expected[index]), None)
    if odd is not None:
        order = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        logger.info("%s (%s): %s %s is class %d", what, order, each, names[odd], odd)


def _by_number(name: str) -> list[Any]:
    """As people sort: `c2` before `c10`."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", name))]


def _values(place: Place, how: str, taken: dict[str, str]) -> tuple[list[Any], list[str]]:
    """By image of a place, what stands in the files of one of the ways, None where nothing; and the files read.

    `taken` says which image each name in a file of all labels has meant so far. Raises DataError for a name that means
    two images.
    """
    images = [entry.name for entry in place.listing.images]
    if how == "cls":
        sides = [place.side(name, ".cls") for name in images]
        values = [None if side is None else _whole_number(place, side) for side in sides]
        return values, [side for side in sides if side is not None]
    if how.startswith("json."):
        sides = [place.side(name, ".json") for name in images]
        path = how.removeprefix("json.").split(".")
        return [None if s is None else _field(_object(place, s), path) for s in sides], [s for s in sides if s]
    if suffix_of(how) in _TABLES:
        table = _table(place, how)
        return _of_table(table, place, how, {} if how in place.listing.others else taken), [how]
    raise DataError(f"data.labels: given {how!r}; it can be auto, none, or one of these: {WAYS}")


def _whole_number(place: Place, name: str) -> int:
    text = _read(place, name).decode("utf-8-sig", errors="replace").strip()
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
    """Labels by image, of a file in the data or anywhere else. Raises DataError for one that is not understood, or that
    gives an image two labels.
    """
    text = _read(place, name).decode("utf-8-sig", errors="replace")
    try:
        pairs = [(str(key).removeprefix("./").replace("\\", "/"), value) for key, value in _pairs(text, name)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{place.full(name)}: labels that are not understood ({error}); a .json file holds "
            '{"labels": [["00000/img00000000.png", 3], ...]}, a .csv or .jsonl file has columns such as file_name and '
            "label, a line of a .txt file is NAME LABEL; data.labels=none or folders does without it"
        ) from error
    table: dict[str, Any] = {}
    for key, value in pairs:
        if table.setdefault(key, value) != value:
            what = f"{key} has the label {table[key]!r} and further down {value!r}"
            raise DataError(f"{place.full(name)}: {what}; keep one of the two, or data.labels=none goes without labels")
    return table


def _of_table(table: Mapping[str, Any], place: Place, how: str, taken: dict[str, str]) -> list[Any]:
    """By image of a place, its label in a table, None where it has none. Raises DataError for a name in the table that
    means two images, one of them perhaps in an earlier place.
    """
    forms = _forms(table)
    values: list[Any] = []
    for entry in place.listing.images:
        key = _look_up(forms, entry.name)
        values.append(None if key is None else table[key])
        if key is not None and taken.setdefault(key, image := place.full(entry.name)) != image:
            raise DataError(
                f"{place.full(how)}: {key} may be {taken[key]} or {image}; name each by its path and ending, such as "
                f"{entry.name}, or data.labels=none goes without labels"
            )
    return values


def _forms(table: Mapping[str, Any]) -> dict[str, str]:
    """Every way in which an image may be called that a table names -> the name in the table.

    Some write names without the ending, and a Mac writes ä as two characters. What two names with different labels
    could mean is left out.
    """
    forms: dict[str, str] = {}
    unclear: set[str] = set()
    for key in table:
        for form in {stem_of(key), _composed(key), stem_of(_composed(key))} - table.keys():
            if table[forms.setdefault(form, key)] != table[key]:
                unclear.add(form)
    return {form: key for form, key in forms.items() if form not in unclear} | {key: key for key in table}


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _pairs(text: str, name: str) -> list[tuple[Any, Any]]:
    return list(_pairs_of_json(text) if suffix_of(name) == ".json" else _pairs_of_rows(text, suffix_of(name)))


def _pairs_of_json(text: str) -> Iterable[tuple[Any, Any]]:
    data = json.loads(text, object_pairs_hook=_without_contradiction)
    data = data["labels"] if isinstance(data, dict) and "labels" in data else data
    if isinstance(data, dict):
        if not data or not all(isinstance(value, int | str) for value in data.values()):
            raise ValueError(f"its fields are {', '.join(data)[:60]}" if data else "it is empty")
        return list(data.items())
    if not isinstance(data, list) or not data:
        raise ValueError(f"labels is {str(data)[:40]}")
    return [(name, value) for name, value in data]


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file. Raises ValueError for a name that stands there with two values."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if found.setdefault(name, value) != value:
            raise ValueError(f"{name} is {found[name]!r} and further down {value!r}")
    return found


def _pairs_of_rows(text: str, suffix: str) -> Iterable[tuple[Any, Any]]:
    if suffix == ".txt":
        return [_pair_of_line(line) for line in text.splitlines() if line.strip()]
    rows = _rows(text, suffix)
    if not rows:
        raise ValueError("it has no rows")
    known = {str(key).lower().strip(): key for key in rows[0]}
    name, label = (next((known[c] for c in usual if c in known), None) for usual in (_COLUMNS, _LABELS))
    if name is None or label is None:
        raise ValueError(f"its columns are {', '.join(map(str, rows[0]))}")
    return [(row[name], row[label]) for row in rows]


def _rows(text: str, suffix: str) -> list[dict[str, Any]]:
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    lines = list(csv.reader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ",", skipinitialspace=True))
    head, *rest = [line for line in lines if line]
    names = [name.strip() for name in head]
    return [dict(zip(names, map(str.strip, line), strict=False)) for line in rest]


def _pair_of_line(line: str) -> tuple[str, str]:
    name, _, label = line.strip().replace("\t", " ").rpartition(" ")
    if not name.strip() or (" " in name.strip() and not label.isdecimal()):  # a caption, say
        raise ValueError(f"{line.strip()[:60]!r} is no name with a label")
    return name.strip(), label


def _look_up(forms: Mapping[str, str], name: str) -> str | None:
    """The name in a table that means an image; None where there is none."""
    file = name.rpartition("/")[2]
    for form in (name, stem_of(name), file, stem_of(file)):
        if form in forms:
            return forms[form]
    return _look_up(forms, _composed(name)) if _composed(name) != name else None


def _read(place: Place, name: str) -> bytes:
    """A file of the data; for one that is not among them, the file beside the data or at that path."""
    elsewhere = (Path(place.where).parent / name, Path(name).expanduser())
    try:
        outside = None if name in place.listing.others else next((path for path in elsewhere if path.is_file()), None)
        return place.read(name) if outside is None else outside.read_bytes()
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

    Text that is a whole number everywhere counts as numbers (`1.0` too, as tables of numbers with gaps are written);
    other text becomes the place among the sorted texts, without the spaces around it.
    Raises DataError that names an image without a label, or with one of another kind; `what` says where they stand.
    """
    values = [int(v) if isinstance(v, bool) or (isinstance(v, float) and v.is_integer()) else v for v in values]
    values = [value.strip() if isinstance(value, str) else value for value in values]
    texts = [isinstance(value, str) for value in values]
    mixed = any(texts) and not all(texts)
    for number, value in enumerate(values):
        if not isinstance(value, int | str) or value == "" or (mixed and texts[number] != texts[0]):
            kinds = "whole numbers or text, of one kind for all images; data.labels=none goes without"
            raise DataError(f"{name(number)}: {what} is {value!r:.60}; labels must be {kinds}")
    if not any(texts):
        return np.array(values, dtype=np.int64), ()
    if all(_NUMBER.fullmatch(value) for value in values):
        return np.array([int(value.partition(".")[0]) for value in values], dtype=np.int64), ()
    names = sorted(set(values))
    index = {key: number for number, key in enumerate(names)}
    return np.array([index[value] for value in values], dtype=np.int64), tuple(names)


def check_labels(labels: np.ndarray, given: int | None, counted: int | None, name: Callable[[int], str]) -> int:
    """The number of classes (given, or counted, or largest label + 1).

    Raises DataError for the first label outside, and for numbers that are hardly classes: many times more than images.
    """
    num_classes = given or counted or int(labels.max()) + 1
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        allowed = f"allowed are 0 to {num_classes - 1}" if num_classes > 0 else "labels begin at 0"
        allowed += "; data.labels=none goes without" if labels[outside[0]] < 0 else ""
        more = f" ({len(outside)} such images)" if len(outside) > 1 else ""
        first = int(outside[0])
        raise DataError(f"{name(first)}: label {labels[first]} is outside the classes; {allowed}{more}")
    if not given and not counted and num_classes > max(_FEW, _TIMES * len(labels)):
        largest = int(labels.argmax())
        raise DataError(
            f"{name(largest)}: label {labels[largest]} would make {num_classes} classes of {len(labels)} images, and "
            f"labels are the numbers of classes from 0 on: data.num_classes={num_classes} says that these are; "
            "data.labels=none goes without"
        )
    return num_classes
