"""How sure the rates of the shapes benchmark are: a bootstrap over captions, paired where two runs share them.

A rate is a quotient of two sums over images (`oracle.RATES`), so its spread is that of the quotient when captions are
drawn again with replacement; all images of a group (the two captions of a swap pair) are drawn together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from imgtok.shapes.oracle import RATES, Score

RESAMPLES = 1000
LEVEL = 0.95


class Interval(NamedTuple):
    """A rate, or a difference of two, with the ends of its interval; NaN where nothing was asserted."""

    value: float
    low: float
    high: float


def intervals(rows: Sequence[Score], groups: Sequence[int] | None = None, *, seed: int = 0) -> dict[str, Interval]:
    """Every rate of `oracle.Report` with the middle 95 % of 1000 resamples. `groups` says which images go together."""
    counts = _draws(len(rows), groups, seed)
    return {name: _interval(*_sums(rows, name, counts)) for name in RATES}


def differences(
    rows: Sequence[Score], others: Sequence[Score], groups: Sequence[int] | None = None, *, seed: int = 0
) -> dict[str, Interval]:
    """Rates of `rows` minus those of `others`, which answer the same captions in the same order, from the same draws of
    captions. Raises ValueError for different numbers of images.
    """
    if len(rows) != len(others):
        raise ValueError(f"paired differences need the same captions, got {len(rows)} and {len(others)} images")
    counts = _draws(len(rows), groups, seed)
    found = {}
    for name in RATES:
        (mine, drawn), (theirs, drawn_too) = (_sums(some, name, counts) for some in (rows, others))
        found[name] = _interval(mine - theirs, drawn - drawn_too)
    return found


def _draws(number: int, groups: Sequence[int] | None, seed: int) -> np.ndarray:
    """How often each image is drawn in each resample, (1000, number)."""
    names, member = np.unique(np.arange(number) if groups is None else np.asarray(groups), return_inverse=True)
    generator = np.random.default_rng(seed)
    share = np.full(len(names), 1.0 / max(1, len(names)))
    drawn = generator.multinomial(len(names), share, size=RESAMPLES) if len(names) else np.zeros((RESAMPLES, 0))
    return np.asarray(drawn)[:, member.reshape(-1)].astype(np.float64)


def _sums(rows: Sequence[Score], name: str, counts: np.ndarray) -> tuple[float, np.ndarray]:
    """A rate, and the same of every resample."""
    part, whole = RATES[name]
    parts = np.array([getattr(row, part) for row in rows], dtype=np.float64)
    wholes = np.array([1 if whole is None else getattr(row, whole) for row in rows], dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.float64(parts.sum()) / np.float64(wholes.sum())
        return float(value), (counts @ parts) / (counts @ wholes)


def _interval(value: float, drawn: np.ndarray) -> Interval:
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
