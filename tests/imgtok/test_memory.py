from __future__ import annotations

import resource
import subprocess
import sys
import types

import pytest

from imgtok.memory import peak_rss_mib


def test_this_process_and_its_children():
    assert 20 < peak_rss_mib() < 2**16
    code = "x = b'1' * (200 << 20)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert 200 < peak_rss_mib(children=True) < 2**16


@pytest.mark.parametrize(("platform", "units"), [("linux", 5 * 1024), ("darwin", 5 * 2**20)])
def test_the_unit_is_the_platforms(monkeypatch, platform, units):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: types.SimpleNamespace(ru_maxrss=units))
    assert peak_rss_mib() == 5.0
