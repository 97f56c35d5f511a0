"""Bootstrap intervals of the benchmark's rates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from imgtok.shapes.intervals import differences, intervals
from imgtok.shapes.oracle import Score, report

BLANK = Score(
    objects=2, matched=0, bound=0, leaked=0, textures=0, textures_right=0, sizes=0, sizes_right=0, cells=0,
    cells_right=0, relations=0, relations_right=0, extra=0, prompt=False, probability=0.0,
)  # fmt: skip


def rows(right: int, wrong: int) -> list[Score]:
    """Images of which all, or none, of the two objects are bound; both are always there."""
    return [replace(BLANK, matched=2, bound=2, prompt=True)] * right + [replace(BLANK, matched=2)] * wrong


def test_an_interval_is_that_of_a_binomial():
    some = rows(120, 80)
    found = intervals(some)
    assert found["binding"].value == pytest.approx(report(some).binding) == pytest.approx(0.6)
    error = math.sqrt(0.6 * 0.4 / 200)
    assert found["binding"].low == pytest.approx(0.6 - 1.96 * error, abs=0.01)
    assert found["binding"].high == pytest.approx(0.6 + 1.96 * error, abs=0.01)
    assert found["presence"] == (1.0, 1.0, 1.0)
    assert math.isnan(found["relation"].value)
    assert math.isnan(found["relation"].low)
    assert math.isnan(intervals([])["prompt"].value)


def test_images_of_a_group_are_drawn_together():
    some = rows(50, 50)
    alone, pairs = intervals(some), intervals(some, np.arange(100) // 10)
    assert pairs["prompt"].high - pairs["prompt"].low > 2 * (alone["prompt"].high - alone["prompt"].low)


def test_paired_differences_know_that_the_captions_are_the_same():
    before, after = rows(100, 100), rows(110, 90)
    found = differences(after, before)["binding"]
    assert found.value == pytest.approx(0.05)
    assert 0 < found.low < 0.05 < found.high < 0.09  # two separate samples would differ by .10
    assert differences(before, before)["binding"] == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="the same captions"):
        differences(before, before[1:])
