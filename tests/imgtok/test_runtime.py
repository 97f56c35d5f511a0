from __future__ import annotations

import resource
import subprocess
import sys
import types

import pytest

from imgtok.runtime import peak_rss_mib


def test_the_peak_stays_when_the_memory_is_given_back():
    code = "from imgtok.runtime import peak_rss_mib; b'1' * (200 << 20); print(peak_rss_mib())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert 200 < float(done.stdout) < 2**16


@pytest.mark.parametrize(("platform", "units"), [("linux", 5 * 1024), ("darwin", 5 * 2**20)])
def test_the_unit_is_the_platforms(monkeypatch, platform, units):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: types.SimpleNamespace(ru_maxrss=units))
    assert peak_rss_mib() == 5.0
