"""What counts as an image: one rule for folders and tars, for training, caching, scoring and resuming a `sample`.

- Hidden names are left out: any part below the root that begins with a dot, and what operating systems leave behind.
- A name with a known ending is an image, and a file that lies beside images by design (`.txt`, `.json`, ...) is none.
- Any other file, also one without an ending, is an image if its first bytes are those of one.
- Empty files and links to nothing are left out as unreadable. Damaged images are found when they are decoded.

Links are followed, to files and to folders; a link to a folder above itself is not. The order of a folder is that of
its sub-folders' names, then of the paths as text; that of a tar is its own.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from imgtok.pictures import SUFFIXES

_MAC_AND_WINDOWS = ("__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db", "$recycle.bin", "system volume information")
HIDDEN = frozenset([*_MAC_AND_WINDOWS, "@eadir", "#recycle", "paxheader", "paxheaders"])
"""Names, in lower case, that are hidden without a dot."""
IMAGES = frozenset(SUFFIXES)
_DATA = ".txt .json .jsonl .cls .csv .tsv .xml .yaml .yml .npy .npz .mat .pt .pth .safetensors .parquet .tar .gz .zip"
_MORE = ".md .html .log .py .sh .cfg .mp4 .mov .avi .pdf .svg .heic .heif .dng .nef .cr2 .arw .orf .rw2"
OTHERS = frozenset([*_DATA.split(), *_MORE.split()])
"""Endings of files that are never images here, so that they need not be opened. Cameras' own formats begin as TIFF."""
PARQUET = (".parquet", ".parq", ".pq")
"""Endings of Parquet files."""
TRAIN = ("train", "training")
HELD_OUT = ("val", "validation", "valid", "dev", "test")
"""Names of the parts of a data set, in lower case; of those for held-out images the first that is there counts."""
OVERVIEW = "grid.png"
"""What older versions of `imgtok sample` called the picture of many images that they left among them."""
FIRST_BYTES = 32
"""How much of a file tells whether it is an image."""


class Entry(NamedTuple):
    """A file below a folder or in a tar."""

    name: str
    """Path relative to the root, with slashes."""
    size: int
    """Bytes; 0 also for what is no file, -1 for a link to nothing."""


@dataclass
class LeftOut:
    """What is not among the images, counted by reason, with the names of the unreadable."""

    counts: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def add(self, other: LeftOut) -> None:
        """Count what another one has, too."""
        self.counts.update(other.counts)
        self.unreadable += other.unreadable

    def __str__(self) -> str:
        """`4 hidden, 2 .txt, 1 unreadable (cat/7.png)`; "" for nothing."""
        parts = [f"{count} {reason}" for reason, count in sorted(self.counts.items(), key=lambda c: (-c[1], c[0]))]
        if self.unreadable:
            more = ", ..." if len(self.unreadable) > 3 else ""
            parts.append(f"{len(self.unreadable)} unreadable ({', '.join(self.unreadable[:3])}{more})")
        return ", ".join(parts)


@dataclass
class Listing:
    """The files below one root, sorted out; `others` are those that are neither hidden nor images."""

    images: list[Entry] = field(default_factory=list)
    others: dict[str, Entry] = field(default_factory=dict)
    hidden: int = 0
    unreadable: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    """Folders at the top that are not hidden."""

    def left_out(self, used: Iterable[str] = ()) -> LeftOut:
        """What is left out when a reader uses some of the `others`, such as labels beside their images."""
        unused = self.others.keys() - set(used)
        counts = Counter(_kind(name) for name in unused)
        return LeftOut(Counter({"hidden": self.hidden} if self.hidden else {}) + counts, list(self.unreadable))


def _kind(name: str) -> str:
    """What a file that is left out is, in words."""
    file, suffix = name.rpartition("/")[2], suffix_of(name)
    if suffix in IMAGES:  # which any other picture is
        return f"overview ({file})"
    if file in ("metadata.jsonl", "metadata.csv"):
        return f"{file} (captions in it are not read: KEY.txt beside each image is)"
    return suffix or "without an ending"


def summary(kept: int, left_out: LeftOut) -> str:
    """`kept 12 images; left out: 4 hidden, 2 .txt`."""
    rest = str(left_out)
    return f"kept {kept} image{'s'[: kept != 1]}" + (f"; left out: {rest}" if rest else "")


# ---------------------------------------------------------------- the rule


def is_hidden(name: str) -> bool:
    """Whether any part of a relative path is hidden."""
    parts = name.lower().split("/")
    return any(part.startswith((".", "paxheaders.")) or part in HIDDEN for part in parts)


def suffix_of(name: str) -> str:
    """The ending of a name in lower case, such as ".png"; "" where there is none."""
    return os.path.splitext(name.rpartition("/")[2])[1].lower()  # noqa: PTH122 - a million Paths are slow


def stem_of(name: str) -> str:
    """A relative path without an image's ending: what its labels and captions, or its originals, are called.

    An ending that is none of an image's belongs to the name: `photo_v1.0` is not `photo_v1`.
    """
    suffix = suffix_of(name)
    return name[: -len(suffix)] if suffix in IMAGES else name


def begins_like_an_image(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a format that is read here."""
    if start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"qoif")):
        return True
    if start.startswith((b"II*\0", b"MM\0*", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n")):  # TIFF, JPEG 2000
        return True
    if start[:4] == b"RIFF":
        return start[8:12] == b"WEBP"
    if start[4:8] == b"ftyp":
        return b"avif" in start[8:] or b"avis" in start[8:]
    if start[:2] == b"BM":  # two letters are little: the reserved bytes and the header's size must fit, too
        return start[6:10] == bytes(4) and start[14:18] in {size.to_bytes(4, "little") for size in (12, 40, 108, 124)}
    return start[:1] == b"P" and start[1:2] in b"123456" and start[2:3].isspace() and start[3:4] in b"#0123456789"


def sort_out(
    entries: Iterable[Entry], first_bytes: Callable[[Entry], bytes], into: Listing | None = None, *, keep_order: bool
) -> Listing:
    """The files by the rule above. `first_bytes` reads the start of a file and may raise OSError."""
    found = Listing() if into is None else into
    for entry in entries:
        if is_hidden(entry.name):
            found.hidden += 1
            continue
        suffix = suffix_of(entry.name)
        image = suffix in IMAGES
        if entry.size > 0 and not image and suffix not in OTHERS:
            try:
                image = begins_like_an_image(first_bytes(entry))
            except OSError:
                image = False
        if image and entry.size > 0:
            found.images.append(entry)
        elif image or (entry.size < 0 and suffix not in OTHERS):  # a link may have led to a folder of images
            found.unreadable.append(entry.name)
        else:
            found.others[entry.name] = entry
    _set_overviews_apart(found)
    if not keep_order:
        found.images.sort(key=in_order)
        found.unreadable.sort(key=lambda name: in_order(Entry(name, 0)))
    return found


def _set_overviews_apart(listing: Listing) -> None:
    """`X-grid.png` beside a folder `X` of `imgtok sample` shows many images, and so does the `X/grid.png` of older
    versions. Such a folder holds `samples.json`.
    """
    folders = [name.removesuffix("samples.json") for name in listing.others if name.endswith("samples.json")]
    folders = [folder for folder in folders if folder[-1:] in ("", "/")]
    overviews = {folder + OVERVIEW for folder in folders} | {overview_of(folder[:-1]) for folder in folders if folder}
    found = [entry for entry in listing.images if entry.name in overviews] if overviews else []
    if found:
        listing.images = [entry for entry in listing.images if entry.name not in overviews]
        listing.others |= {entry.name: entry for entry in found}


def overview_of(folder: str) -> str:
    """Where `imgtok sample` puts the picture of many images of a folder: beside it, under its name."""
    return f"{folder}-grid.png"


def in_order(entry: Entry) -> tuple[str, str]:
    """By folder at the top, then by path: classes lie together whatever characters their names have."""
    top, slash, _ = entry.name.partition("/")
    return (top if slash else "", entry.name)


# ---------------------------------------------------------------- folders


def list_folder(root: Path) -> Listing:
    """The files below a folder. Raises FileNotFoundError or OSError for a folder that cannot be listed."""
    listing = Listing()
    return sort_out(_walk(str(root), listing), lambda entry: _start(root / entry.name), listing, keep_order=False)


def numbered_images(folder: Path) -> dict[int, Path]:
    """By number, the images of `imgtok sample` in a folder, `000000.png` and so on, without empty ones."""
    paths: dict[int, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix == ".png" and path.stem.isascii() and path.stem.isdecimal():
            paths.setdefault(int(path.stem), path)  # 000007.png before 7.png
    return {number: path for number, path in sorted(paths.items()) if _size(path) > 0}


def _walk(root: str, listing: Listing) -> Iterator[Entry]:
    """All files below `root`, those in hidden folders included; notes the folders at the top."""
    above = {_identity(root)}
    with os.scandir(root) as entries:
        for entry in entries:
            if not _is_folder(entry):
                yield Entry(entry.name, _size(entry))
            elif _identity(entry.path) not in above:
                if not is_hidden(entry.name):
                    listing.folders.append(entry.name)
                yield from _below(entry.path, entry.name, above)
    listing.folders.sort()


def _below(path: str, name: str, above: set[tuple[int, int]]) -> Iterator[Entry]:
    here = _identity(path)
    if here in above:  # a link to a folder that this one is in
        return
    with os.scandir(path) as entries:
        for entry in entries:
            below = f"{name}/{entry.name}"
            if _is_folder(entry):
                yield from _below(entry.path, below, above | {here})
            else:
                yield Entry(below, _size(entry))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to each other
        return False


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)  # noqa: PTH116 - a million Paths are slow
    return status.st_dev, status.st_ino


def _size(entry: os.DirEntry[str] | Path) -> int:
    """Bytes of a file, or of what a link leads to; -1 for a link to nothing, 0 for what is no file."""
    try:
        status = entry.stat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(FIRST_BYTES)


# ---------------------------------------------------------------- what lies beside an image


def side_file(listing: Listing, stems: set[str], name: str, suffix: str) -> str | None:
    """The name, below the root, of the file with the ending `suffix` that says something of the image `name`; None
    where there is none: `KEY.png.cls`, `KEY.cls`, or that of a shorter stem up to a dot.

    So `a.left.jpg` and `a.right.jpg` share `a.cls`, unless there is an `a.jpg`, whose it is. `stems` are those of all
    images of the listing.
    """
    stem = stem_of(name)
    first = 0 if stem == name else len(name)
    for end in (*((first,) if first else ()), *_ends(stem)):
        if end < len(stem) and stem[:end] in stems:
            return None
        for written in (suffix, suffix.upper()):
            if name[:end] + written in listing.others:
                return name[:end] + written
    return None


def _ends(stem: str) -> Iterator[int]:
    """Where a stem ends, and where it may be cut at a dot of the file's name, the longest first."""
    yield len(stem)
    begin = stem.rfind("/") + 1
    end = stem.rfind(".", begin + 1)
    while end > begin:
        yield end
        end = stem.rfind(".", begin + 1, end)
