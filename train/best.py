"""Which validation was the best so far: what is kept in best/, and when a run ends because nothing gets better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from imgtok.runs import MORE_IS_BETTER


@dataclass(frozen=True)
class Record:
    """The best validation so far, and how many there have been since."""

    step: int
    value: float
    since: int
    """Validations after it, in none of which the figure was better."""


def best_of(validations: Mapping[int, Mapping[str, float]], name: str) -> Record | None:
    """The best of the validations (step -> figures) by one figure; None where it was never a finite number.

    Raises ValueError if the newest one has no such figure, with those that there are.
    """
    newest = [*validations.values()][-1] if validations else {}
    if validations and name not in newest:
        known = ", ".join(figure for figure in newest if figure not in ("images", "seconds"))
        raise ValueError(
            f"training.best: {name!r} is no figure of this run's validations, which have: {known}; scores besides the "
            "loss are asked for by training.validation_scores"
        )
    sign = 1.0 if name.startswith(MORE_IS_BETTER) else -1.0
    found: Record | None = None
    for step, figures in validations.items():
        value = figures.get(name, math.nan)
        if math.isfinite(value) and (found is None or sign * value > sign * found.value):
            found = Record(step, value, 0)
        elif found is not None:
            found = Record(found.step, found.value, found.since + 1)
    return found
