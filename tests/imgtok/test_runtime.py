from __future__ import annotations

import multiprocessing
import resource
import sys
import types
from concurrent.futures import ProcessPoolExecutor

import pytest

from imgtok.runtime import peak_rss_mib


def peaks() -> tuple[float, float]:
    before, held = peak_rss_mib(), b"1" * (200 << 20)
    del held
    return before, peak_rss_mib()


def test_the_peak_stays_when_the_memory_is_given_back():
    """In a fork of this process, whose peak begins at what this one holds now, not at what it has held at most."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        before, after = pool.submit(peaks).result(timeout=60)
    assert 10 < before < after - 190 < before + 20
    assert after < 2**16


@pytest.mark.parametrize(("platform", "units"), [("linux", 5 * 1024), ("darwin", 5 * 2**20)])
def test_the_unit_is_the_platforms(monkeypatch, platform, units):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: types.SimpleNamespace(ru_maxrss=units))
    assert peak_rss_mib() == 5.0
