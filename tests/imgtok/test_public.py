"""What `import imgtok` gives: the public names, and no torch before one of them is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import imgtok


def test_every_public_name_is_there_and_listed():
    assert set(imgtok.PUBLIC) | {"__version__"} == set(imgtok.__all__)
    assert set(imgtok.__all__) <= set(dir(imgtok))
    assert not {"Any", "Path", "TYPE_CHECKING", "annotations", "importlib"} & set(dir(imgtok))
    for name in imgtok.__all__:
        assert getattr(imgtok, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = imgtok.nothing


def test_type_checkers_are_told_the_same_names():
    tree = ast.parse(Path(imgtok.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == imgtok.PUBLIC


def test_importing_imports_no_torch():
    code = "import imgtok, sys; dir(imgtok); print('torch' in sys.modules, 'PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
