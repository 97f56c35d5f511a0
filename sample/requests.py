"""What jobs that measure the images of a data set share: which of them are measured, and that the report of another
request stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imgtok.data.images import ImageSource, all_over


def places_of(source: ImageSource, num: int | None) -> list[int]:
    """Places of the images that are measured. Raises ValueError for more than there are."""
    if num is not None and num > len(source):
        raise ValueError(f"num: {num} is more than the {len(source)} images that there are; leave it out for all")
    return all_over(source, num or len(source))


def protect(out: Path, files: Sequence[Path], record: str, made_of: Mapping[str, Any]) -> None:
    """Raises ValueError where one of the `files` in the folder `out` is there, and the JSON file `record` among them
    does not say that it was made of the same: the report of another request, model or data, or one of unknown origin.
    """
    there = [path for path in files if path.exists()]
    if not there:
        return
    asked = {**json.loads(json.dumps(made_of)), "model": made_of["model"]["fingerprint"]}
    try:
        before: Any = json.loads((out / record).read_text(encoding="utf-8"))
        before |= {"model": before["model"]["fingerprint"]}  # not where it lies
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    if changed := [name for name, value in asked.items() if before.get(name) != value]:
        raise ValueError(
            f"out: {out} holds the report of another request (different: {', '.join(changed)}); choose another folder "
            f"with out=FOLDER, or delete {' and '.join(map(str, there))}"
        )
