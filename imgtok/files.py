"""Writing files so that a crash or a full disk never leaves half a file under its final name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it over `path` if the block succeeds, delete it if not.

    The data is flushed to the disk before the move, so after a power cut `path` holds the old or the new
    content, never a part of one. The folder is created when it is missing. Raises OSError (a full disk,
    for example) with the previous content of `path` untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
