"""What can be timed of FlexTok; both processes read it, so it imports nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Case:
    """One thing to time: `encode` to `tokens` ids, or `decode` them in `steps` guided Euler steps."""

    what: Literal["encode", "decode"]
    batch: int
    tokens: int
    steps: int = 1
    guidance: float = 7.5
