"""The audit of benchmarks/lossless.py, in small: what others released is noticed, and what repairs it, passes."""

from __future__ import annotations

import pytest
import released_decoders
import toy_law
from released_decoders import Mistakes

SAMPLING = toy_law.LAWS["plain"]
REPAIRED = {"path": False, "siblings": False, "failing": False, "bonus": False}


def z(method, *given, images: int = 10_003, shape: toy_law.Shape = toy_law.SMALL, **how) -> float:
    ids = method(SAMPLING, images, *given, shape=shape, **how)
    return toy_law.goodness(ids, toy_law.probabilities(SAMPLING, shape), shape)[0]


@pytest.mark.parametrize(
    ("how", "stale", "repaired"),
    [
        ({"batch": 7}, 5, {"stale": False}),
        ({"keep": True, "window": 5}, 0, {"stale": False}),
        ({"table": 2}, 30, {"table": 5}),
    ],
)
def test_jacobi_decoding_with_laws_or_noise_of_before(how, stale, repaired):
    """What kept drafts of SCD are worth in z takes more draws than a quick test has; see the slow one."""
    released = {"stale": "table" not in how} | how
    assert z(released_decoders.jacobi, **released) > stale - 3
    assert z(released_decoders.jacobi, **released | repaired) < 4


@pytest.mark.parametrize(
    ("mistake", "images"),
    [
        ("bonus", 3_000),
        pytest.param("path", 40_000, marks=pytest.mark.slow),
        pytest.param("siblings", 40_000, marks=pytest.mark.slow),
    ],
)
def test_a_tree_with_one_mistake(mistake, images):
    assert z(released_decoders.sjd_pac, Mistakes(**REPAIRED | {mistake: True}), images=images) > 5


def test_a_tree_without():
    assert z(released_decoders.sjd_pac, Mistakes(**REPAIRED), images=3_000) < 4
    assert z(released_decoders.sjd_pac, Mistakes(**REPAIRED), branches=1, levels=2, images=3_000) < 4


@pytest.mark.slow
def test_kept_drafts_with_their_old_law():
    how = {"keep": True, "images": 300_000, "window": 5}
    assert z(released_decoders.jacobi, stale=True, **how) > 6
    assert z(released_decoders.jacobi, stale=False, **how) < 4
