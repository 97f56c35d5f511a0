"""The line with which a job begins, what it works on and where it writes, and the one with which it ends."""

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


def counts_in_words(counts: Sequence[int]) -> str:
    """`12.3 tokens an image, from 3 to 30`, of images that do not all have the same number."""
    return f"{sum(counts) / len(counts):.1f} tokens an image, from {min(counts)} to {max(counts)}"
