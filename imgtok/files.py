"""Writing files so that a crash or a full disk never leaves half a file under its final name; telling files apart; and
where imgtok keeps what it makes once.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it over `path` if the block succeeds, delete it if not.

    The file gets the permissions of an ordinary new one, whatever the program that writes it gave to the temporary one.
    The data is flushed to the disk before the move, so after a power cut `path` holds the old or the new
    content, never a part of one. The folder is created when it is missing. Raises OSError (a full disk,
    for example) with the previous content of `path` untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    ordinary = stat.S_IMODE(temporary.stat().st_mode)  # what the umask leaves
    try:
        yield temporary
        temporary.chmod(ordinary)  # safetensors writes files that only their owner can read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_there(path: str | Path, field: str) -> None:
    """Raise FileNotFoundError for a path that leads nowhere, with the name there that is most like it; `field` gave it.
    A pattern is not looked at.
    """
    if not (Path(path).expanduser().exists() or is_pattern(path)):
        raise FileNotFoundError(f"{field}: {path}: no such file or folder{instead_of(path)}")


def instead_of(path: str | Path) -> str:
    """What to say of a path that leads nowhere: the name there that is most like it, or that it is no local one."""
    place = Path(path).expanduser()
    names = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, names, n=1)
    return f"; did you mean {place.parent / near[0]}?" if near else not_local(str(path))


def not_local(path: str) -> str:
    """What to do about a path that is one of no file system here, for a message; "" for any other."""
    if re.match(r"file:/", path):
        return " (write the path without file://)"
    return " (only local files are read: download it)" if re.match(r"\w+:/|pipe:", path) else ""


def is_pattern(path: str | Path) -> bool:
    """Whether a path may stand for several: it has `*`, `?`, `[...]` or `{...}`."""
    return any(character in str(path) for character in "*?[{")


def file_sha256(path: Path) -> str:
    """64 hexadecimal digits of the content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """$IMGTOK_CACHE, or imgtok in the user's cache folder: for what is made once and can be made again."""
    if "IMGTOK_CACHE" in os.environ:
        return Path(os.environ["IMGTOK_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "imgtok"


def package_folders(name: str) -> list[Path]:
    """The folders of an installed package, none where it is not installed; looked up without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations if spec is not None else None) or []]


def name_after(place: str, step: int | None = None) -> str:
    """A name for a file or folder with what was made of `place`, a path or a name on the Hub: its last parts, and the
    step of a training run at which a model was, where that is known: the same place holds another model later.
    """
    parts = [part for part in Path(place).parts if part not in ("/", "outputs", "..", "~")]
    name = "-".join(re.sub(r"[^\w.-]+", "-", part).strip("-") for part in parts[-3:]) or "unnamed"
    return name if step is None or name.endswith(f"step_{step:07d}") else f"{name}-step_{step:07d}"
