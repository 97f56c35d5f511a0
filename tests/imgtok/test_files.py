from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from imgtok.files import replacing


def test_the_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_a_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    path = tmp_path / "file.txt"
    before = os.umask(umask)
    try:
        with replacing(path) as temporary:
            temporary.unlink(missing_ok=True)
            temporary.touch(mode=0o600 if mode != 0o600 else 0o644)
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_the_content_is_on_the_disk_before_the_file_has_its_name(tmp_path: Path, monkeypatch) -> None:
    path, flushed = tmp_path / "file.txt", []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append((os.fstat(descriptor).st_ino, path.exists())))
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert flushed == [(path.stat().st_ino, False)]


def write_half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("ne")
        raise OSError("the disk is full")


def test_a_failure_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="full"):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
