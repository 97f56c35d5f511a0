"""The direction of imports (imgtok <- generators <- train, sample), and that the package is complete."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {  # by folder; the last three are imgtok.generators, imgtok.train and imgtok.sample to Python
    "imgtok": {"imgtok"},
    "generators": {"imgtok", "generators"},
    "train": {"imgtok", "generators", "train"},
    "sample": {"imgtok", "generators", "sample"},
}
FORMER_LAYOUT = ROOT / "benchmarks/workers/one_image.py"  # times the suite of before, which had four packages
LAZY_TABLES = {"imgtok/__init__.py", "imgtok/cli.py", "imgtok/hub.py"}  # these name upper packages, as strings
MODULE_NAMES = {"pillow": "PIL", "PyYAML": "yaml", "torch-fidelity": "torch_fidelity"}
OPTIONAL = {  # used when installed
    "gradio", "onnxruntime", "peft", "spacy", "textblob", "tokenizers", "trackio", "transformers", "wandb",
}  # fmt: skip
NOT_IMPORTED = {"tensorboard"}  # Accelerate imports it for its tracker
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(package: str) -> list[Path]:
    """The modules in a folder, without what its links lead to."""
    return sorted(path for path in (ROOT / package).rglob("*.py") if path.resolve() == path)


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Every absolute import, wherever it stands, and constant arguments of import functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__"):
            yield from (str(arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def name_of(function: ast.expr) -> str:
    """`f` of `f` and of `a.b.f`."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def package_of(module: str) -> str:
    """The top package of a module; of ours the folder that it stands in."""
    top, *rest = module.split(".")
    return rest[0] if top == "imgtok" and rest and rest[0] in MAY_IMPORT else top


@functools.cache
def imported_packages(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(), str(path))
    if path == ROOT / "imgtok/__init__.py":  # tells type checkers of names that it imports when they are asked for
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node))
        ]
    return frozenset(package_of(name) for name in imported_modules(tree))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_downwards(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        wrong = (imported_packages(path) & MAY_IMPORT.keys()) - MAY_IMPORT[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_only_the_tables_name_upper_modules_as_strings() -> None:
    upper = re.compile(r"imgtok\.(generators|train|sample)(\.\w+)+(:\w+)?")
    naming = set()
    for path in sources("imgtok"):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and upper.fullmatch(node.value):
                naming.add(str(path.relative_to(ROOT)))
    assert naming == LAZY_TABLES


def test_no_module_is_imported_under_a_second_name() -> None:
    """`import generators` works at the root of a checkout, and makes a second copy of every class in it."""
    files = [path for folder in (*MAY_IMPORT, "tests", "benchmarks") for path in sources(folder)]
    assert FORMER_LAYOUT in files
    named = re.compile(r"""((import|from|\\)\s+|,\s*|["'])(generators|train|sample)\b""")  # to parse all takes seconds
    for path in set(files) - {FORMER_LAYOUT}:
        if not named.search(path.read_text()):
            continue
        tops = {name.split(".")[0] for name in imported_modules(ast.parse(path.read_text(), str(path)))}
        wrong = tops & (MAY_IMPORT.keys() - {"imgtok"})
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}: write imgtok.{min(wrong)}"
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]:
        wrong = re.findall(r"^\s*(?:from|import) (?:generators|train|sample)\b.*", page.read_text(), re.M)
        assert not wrong, f"{page.relative_to(ROOT)}: {wrong}"


def test_one_module_reads_files_of_weights() -> None:
    reading = re.compile(r"\b(torch\.load|pickle\.loads?|load_file)\(|import .*\bload_file\b")
    found = {
        str(path.relative_to(ROOT)) for name in MAY_IMPORT for path in sources(name) if reading.search(path.read_text())
    }
    assert found == {"imgtok/weights.py"}


def test_the_check_sees_every_way_to_import() -> None:
    code = "import a.b\nfrom c.d import e\nfrom . import f\ndef g():\n    import h\n    import_module('i.j')\n"
    assert sorted(imported_modules(ast.parse(code))) == ["a.b", "c.d.e", "h", "i.j"]


def test_every_folder_with_code_is_a_listed_package() -> None:
    include = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for p in MAY_IMPORT for path in sources(p)}
    modules = {name if name.split(".")[0] == "imgtok" else f"imgtok.{name}" for name in folders}
    assert set(find_packages(str(ROOT), include=include)) == modules


def test_dependencies_are_exactly_what_is_imported() -> None:
    declared = {re.split(r"[<>=\[ ]", line)[0] for line in PROJECT["project"]["dependencies"]}
    modules = {MODULE_NAMES.get(name, name) for name in declared}
    imported = set().union(*(imported_packages(path) for package in MAY_IMPORT for path in sources(package)))
    third_party = imported - set(sys.stdlib_module_names) - MAY_IMPORT.keys() - OPTIONAL
    assert third_party - modules == set(), "imported but not declared"
    assert modules - third_party - NOT_IMPORTED == set(), "declared but not imported"


def test_dependencies_have_no_upper_bounds() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    for line in [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in extra)]:
        assert "<" not in line
        assert "==" not in line
        assert "~=" not in line
