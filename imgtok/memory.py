"""How much memory a run has needed."""

from __future__ import annotations

import resource
import sys


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(usage.ru_maxrss * bytes_per_unit / 2**20, 1)
