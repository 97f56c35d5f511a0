"""Which files of a data set are to train on, and which it keeps apart itself.

A field names the latter (`val_path`, or `val_split` on the Hub), or the layout does: folders `train/` and `val/`, or
files `train-*` and `validation-*` in one folder. Without either, a share of the images is held out.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from imgtok.data.arrow import HubConfig
from imgtok.data.files import HELD_OUT, PARQUET, TRAIN, is_hidden, list_folder, suffix_of
from imgtok.data.parquet import ParquetConfig, parquet_files
from imgtok.data.sources import ImageFolderConfig, check_folder, expand
from imgtok.data.tar import TarConfig

logger = logging.getLogger(__name__)

FileConfig = ImageFolderConfig | ParquetConfig | TarConfig | HubConfig
SUFFIXES = {"parquet": PARQUET, "webdataset": (".tar",)}


class Parts(NamedTuple):
    """A data set's parts, each a configuration of its own."""

    train: FileConfig
    held_out: FileConfig | None
    """None where a share of the images is held out."""


def parts_of(config: FileConfig) -> Parts:
    """The parts of a data set, by what its configuration says and the folders and files that there are."""
    if isinstance(config, HubConfig):
        held_out = None if config.val_split is None else replace(config, split=config.val_split)
        return Parts(config, held_out)
    if config.val_path is not None:
        own: Any = config  # each kind has a type of its own for paths
        return Parts(config, replace(own, path=config.val_path))
    root = Path(config.path).expanduser()
    if not root.is_dir():
        return Parts(config, None)
    inside = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
    folders = _by_part(inside, _of_folder)
    if "train" in folders and not (len(folders) == 1 and _others_hold_data(config, root, inside)):
        found = {part: type(config.path)(root / names[0]) for part, names in folders.items()}
        return _chosen(config, found, root, [f"{name}/" for name in inside])
    if isinstance(config, ImageFolderConfig):
        return Parts(config, None)
    known = SUFFIXES[config.kind]
    every = [name for name in sorted(list_folder(root).others) if suffix_of(name) in known]
    files = _by_part(every, _of_file)
    if "train" not in files or len(files) == 1:
        return Parts(config, None)
    below = os.path.join(glob.escape(str(root)), "**")  # noqa: PTH118 - a pattern is no path
    patterns = {part: f"{below}/{_word(names[0])}*{suffix_of(names[0])}" for part, names in files.items()}
    others = [name for name in every if _of_file(name) is None]
    return _chosen(config, patterns, root, [*(f"{part}*" for part in patterns), *others])


def check_there(part: FileConfig) -> None:
    """Raise FileNotFoundError for a part without any files, such as one that is mistyped; a Hub's is not looked for."""
    if isinstance(part, ImageFolderConfig):
        check_folder(part.path.expanduser())
    elif isinstance(part, ParquetConfig):
        parquet_files(part.path)
    elif isinstance(part, TarConfig):
        expand(part.path, ".tar")


def _others_hold_data(config: FileConfig, root: Path, inside: Sequence[str]) -> bool:
    """Whether `train` is one of several folders with data, such as the class of trains."""
    known = () if isinstance(config, ImageFolderConfig) else SUFFIXES[config.kind]
    for name in inside:
        if _of_folder(name) is None:
            listing = list_folder(root / name)
            if listing.images if not known else any(suffix_of(other) in known for other in listing.others):
                return True
    return False


def _chosen(config: Any, found: dict[str, Any], root: Path, there: Sequence[str]) -> Parts:
    """The parts at the places `found`, with a line in the log for what is left out of all that is `there`."""
    held_out = next((part for part in HELD_OUT if part in found), None)
    train = replace(config, path=found["train"])
    taken = {f"{part}{end}" for part in (*TRAIN, held_out) for end in "/*"}
    if left := [name for name in there if name.lower() not in taken]:
        few = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        logger.info("%s: the data set is its part `train`; left out: %s", root, few)
    return Parts(train, None if held_out is None else replace(config, path=found[held_out]))


def _by_part(names: Iterable[str], part_of: Any) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        part = None if is_hidden(name) else part_of(name)
        if part is not None:
            found.setdefault("train" if part in TRAIN else part, []).append(name)
    return found


def _of_folder(name: str) -> str | None:
    return name.lower() if name.lower() in (*TRAIN, *HELD_OUT) else None


def _of_file(name: str) -> str | None:
    return _word(name) if _word(name) in (*TRAIN, *HELD_OUT) else None


def _word(name: str) -> str:
    """`train` of `data/train-00000-of-00002.parquet`."""
    match = re.match(r"[a-z]+(?=[-_.0-9])", name.rpartition("/")[2])
    return match[0] if match is not None else ""
