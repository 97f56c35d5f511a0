"""What users install: the wheel holds every module and data file, and works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("imgtok", "generators", "train", "sample")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command; its output, or an assertion that shows it."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy, since setuptools leaves its litter beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", ".", *options, cwd=copy)
    (built,) = folder.glob("imgtok-*.whl")
    return built


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    code = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if path.resolve() == path]
    assets = [path for path in (ROOT / "imgtok" / "assets").rglob("*") if path.is_file()]
    places = [path.relative_to(ROOT) for path in [*code, *assets, ROOT / "imgtok" / "py.typed"]]
    wanted = {(path if path.parts[0] == "imgtok" else "imgtok" / path).as_posix() for path in places}
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == {name for name in wanted if "__pycache__" not in name}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"imgtok = imgtok.cli:main" in zipfile.ZipFile(wheel).read(entry_points)


@pytest.mark.slow
def test_the_installed_wheel_trains_samples_and_evaluates(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ("--no-deps", "--disable-pip-version-check", "--target", site)
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=tmp_path)

    def imgtok(*words: str | Path) -> str:
        return run(sys.executable, "-m", "imgtok", *words, cwd=tmp_path, PYTHONPATH=str(site), OMP_NUM_THREADS="1")

    where = run(sys.executable, "-c", "import imgtok; print(imgtok.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert where.startswith(str(site)), "the checkout was imported, not the wheel"
    assert "train tokenizer" in imgtok("--help")
    tiny = ROOT / "configs" / "tiny"
    few = ("training.steps=2", "training.batch_size=4", "data.num_images=64")
    imgtok("train", "tokenizer", tiny / "flextok.yaml", "out=tokenizer", *few)
    imgtok("cache", "tokenizer/final", "out=tokens", "data.kind=shapes", "data.num_images=64")
    run_generator = ("tokens=tokens", "tokenizer=tokenizer/final", "out=generator", "training.steps=2")
    imgtok("train", "generator", tiny / "gpt.yaml", *run_generator)
    assert "flextok" in imgtok("info", "tokenizer/final")
    imgtok("sample", "generator/final", "num=4", "out=samples")
    assert len(list((tmp_path / "samples").rglob("*.png"))) >= 4
    imgtok("evaluate", "images=samples", "data.kind=shapes", "metrics=[oracle]", "out=scores.json")
    assert (tmp_path / "scores.json").is_file()
