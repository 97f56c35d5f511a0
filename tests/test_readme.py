"""The commands of README.md are commands: they parse, and the configurations that they name exist. None is run."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from imgtok.cli import JOBS, TOOLS, parse

ROOT = Path(__file__).parents[1]


def commands() -> list[str]:
    """The `imgtok ...` lines of the shell blocks, comments and continuations resolved."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("imgtok ")]


def test_the_commands_are_found():
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)  # where its relative paths start
    words = shlex.split(command, comments=True)[1:]
    if words[0] in TOOLS:
        assert len(words) >= 2
        return
    length = next(length for length in (2, 1) if " ".join(words[:length]) in JOBS)
    module = importlib.import_module(JOBS[" ".join(words[:length])][0])
    parse(module.Config, words[length:], getattr(module, "POSITIONAL", None))


def test_the_configurations_that_it_names_exist():
    named = re.findall(r"\bconfigs/[\w./-]+\.yaml", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
