"""The line with which a job begins, what it works on and where it writes, and the one with which it ends."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def begins(job: str, **what: object) -> None:
    """Log `job: data: ...; model: ...; out: ...`; what is None is left out, and names have spaces for underscores."""
    parts = [f"{name.replace('_', ' ')}: {value}" for name, value in what.items() if value is not None]
    logger.info("%s: %s", job, "; ".join(parts))


def ends(*places: Path | str) -> None:
    """Log where the job has put its results."""
    logger.info("written to %s", ", ".join(map(str, places)))
