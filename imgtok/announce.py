"""The line with which a job begins, what it works on and where it writes, what a process has to do of it, and the line
with which it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

logger = logging.getLogger(__name__)


def begins(job: str, **what: object) -> None:
    """Log `job: data: ...; model: ...; out: ...`; what is None is left out, and names have spaces for underscores."""
    parts = [f"{name.replace('_', ' ')}: {value}" for name, value in what.items() if value is not None]
    logger.info("%s: %s", job, "; ".join(parts))


def ends(*places: Path | str, note: str | None = None) -> None:
    """Log where the job has put its results, and a `note` about them."""
    logger.info("written to %s%s", ", ".join(map(str, places)), f"; {note}" if note else "")


def share(count: int, what: str, to_do: str, processes: int) -> None:
    """Log what this process has to do, such as `3 shards to write in this process, one of 2`, or `1 shard to write`
    where there is one process.
    """
    among = f" in this process, one of {processes}" if processes > 1 else ""
    logger.info("%d %s%s to %s%s", count, what, "s"[: count != 1], to_do, among)


def counts_in_words(counts: Sequence[int]) -> str:
    """`12.3 tokens an image, from 3 to 30`, of images that do not all have the same number."""
    return f"{sum(counts) / len(counts):.1f} tokens an image, from {min(counts)} to {max(counts)}"
