"""What users install: the wheel holds every module and data file, and every program works wherever it is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from imgtok.cli import JOBS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("imgtok", "generators", "train", "sample")
LINKS = ("generators", "train", "sample")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command; its output, or an assertion that shows it."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**inherited, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_checkout(target: Path) -> Path:
    """The sources with their links, in a folder of their own, since setuptools leaves its litter beside them."""
    for folder in (*FOLDERS, "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, target / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy = copy_checkout(folder / "checkout")
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", ".", *options, cwd=copy)
    (built,) = folder.glob("imgtok-*.whl")
    return built


# ------------------------------------------------------------------------------------------------ the wheel


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    code = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if path.resolve() == path]
    assets = [path for path in (ROOT / "imgtok" / "assets").rglob("*") if path.is_file()]
    configurations = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    places = [path.relative_to(ROOT) for path in [*code, *assets, *configurations, ROOT / "imgtok" / "py.typed"]]
    wanted = {(path if path.parts[0] == "imgtok" else "imgtok" / path).as_posix() for path in places}
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == {name for name in wanted if "__pycache__" not in name}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    entry_points = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"imgtok = imgtok.cli:main" in zipfile.ZipFile(wheel).read(entry_points)


def test_the_wheel_adds_one_name_to_site_packages(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"imgtok"}


# ------------------------------------------------------------------------------------------------ places

IMPORT_ALL = f"""
import importlib, pathlib, sys
import imgtok
home = pathlib.Path(sys.argv[1])
for name in {sorted({module for module, _ in JOBS.values()} | {"imgtok.generators.gpt", "imgtok.generators.xar"})}:
    module = importlib.import_module(name)
    assert home in pathlib.Path(module.__file__).parents, f"{{name}} came from {{module.__file__}}, not from {{home}}"
taken = {set(LINKS)} & set(sys.modules)
assert not taken, f"imported under a second name: {{taken}}"
print("all imported from", home)
"""


class Place:
    """A virtual environment with imgtok in it; the dependencies are those of this interpreter."""

    def __init__(self, folder: Path, source: Path, *options: str) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.bin = folder / "bin"
        (site,) = folder.glob("lib/python*/site-packages")
        # A path file of path files is not read, so an editable install of this checkout stays out.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        flags = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--ignore-installed")
        pip = (sys.executable, "-m", "pip", "--python", self.bin / "python")
        run(*pip, "install", *flags, *options, source, cwd=folder.parent)
        self.home = source / "imgtok" if options else site / "imgtok"

    def python(self, *words: str | Path, cwd: Path) -> str:
        return run(self.bin / "python", *words, cwd=cwd)

    def imgtok(self, *words: str | Path, cwd: Path) -> str:
        """The console script."""
        return run(self.bin / "imgtok", *words, cwd=cwd)

    def torchrun(self, *words: str | Path, cwd: Path) -> str:
        return self.python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", *words, cwd=cwd)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def place(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    if request.param == "wheel":
        return Place(folder / "venv", wheel)
    return Place(folder / "venv", copy_checkout(folder / "checkout"), "--editable")


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A folder as users have them: their own train.py and sample.py, data under train/, a clone of ours in imgtok/."""
    files = ("train.py", "sample.py", "generators.py", "train/__init__.py", "train/tokenizer.py")
    files += ("generators/__init__.py", "sample/__init__.py", "imgtok/train/__init__.py", "imgtok/generators/gpt.py")
    files += ("imgtok/imgtok/__init__.py", "imgtok/pyproject.toml")
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise SystemExit({name!r} ' of the user was imported')\n")
    return tmp_path


@pytest.mark.slow
def test_every_program_is_found_beside_files_of_the_same_names(place: Place, crowded: Path) -> None:
    assert "train tokenizer" in place.imgtok("--help", cwd=crowded)
    assert "quickstart/tokenizer " in place.imgtok("config", "--list", cwd=crowded)
    assert "train tokenizer" in place.python("-m", "imgtok", "--help", cwd=crowded)
    assert "all imported" in place.python("-c", IMPORT_ALL, place.home.resolve().parent, cwd=crowded)


@pytest.mark.slow
def test_installed_programs_train_sample_and_evaluate_beside_them(place: Place, crowded: Path) -> None:
    few = ("training.steps=2", "training.batch_size=4", "data.num_images=64")
    place.torchrun("-m", "imgtok.train.tokenizer", "tiny/flextok", "out=tokenizer", *few, cwd=crowded)
    assert "flextok" in place.imgtok("info", "tokenizer/final", cwd=crowded)
    place.imgtok("cache", "tokenizer/final", "out=tokens", "data.kind=shapes", "data.num_images=64", cwd=crowded)
    run_generator = ("tokens=tokens", "tokenizer=tokenizer/final", "out=generator", "training.steps=2")
    (crowded / "my.yaml").write_text(place.imgtok("config", "tiny/gpt", cwd=crowded))
    place.python("-m", "imgtok.train.generator", "my.yaml", *run_generator, cwd=crowded)
    place.imgtok("sample", "generator/final", "num=4", "out=samples", cwd=crowded)
    assert len(list((crowded / "samples").rglob("*.png"))) >= 4
    scores = ("images=samples", "data.kind=shapes", "metrics=oracle", "out=scores.json")
    place.python("-m", "imgtok.sample.evaluate", *scores, cwd=crowded)
    assert (crowded / "scores.json").is_file()


# ------------------------------------------------------------------------------------------------ without the links

PICKLED_AND_SENT = """
import multiprocessing, pickle, sys
from imgtok.generators.gpt import GPTConfig
from imgtok.train.config import TrainingConfig
import imgtok.generators.gpt

def width(config):
    return type(config).__module__, config.width

if __name__ == "__main__":
    config = GPTConfig(width=64, num_heads=2, depth=1)
    assert pickle.loads(pickle.dumps(config)) == config
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(width, [config]) == [("imgtok.generators.gpt", 64)]
    print("sent")
"""


@pytest.mark.slow
@pytest.mark.parametrize("left", ["nothing", "text files"])
def test_a_checkout_that_lost_its_links_still_runs(left: str, tmp_path: Path) -> None:
    """Archives may drop links; git without core.symlinks writes a text file with the target's name."""
    copy = copy_checkout(tmp_path / "checkout")
    for name in (*LINKS, "configs"):
        link = copy / "imgtok" / name
        assert link.is_symlink()
        target = str(link.readlink())
        link.unlink()
        if left == "text files":
            link.write_text(target)
    environment = {"PYTHONPATH": str(copy)}
    assert "all imported" in run(sys.executable, "-c", IMPORT_ALL, copy, cwd=tmp_path, **environment)
    program = tmp_path / "program.py"
    program.write_text(PICKLED_AND_SENT)
    assert "sent" in run(sys.executable, program, cwd=tmp_path, **environment)
    assert "train generator" in run(sys.executable, "-m", "imgtok", "--help", cwd=copy, **environment)
    assert "tiny/flextok " in run(sys.executable, "-m", "imgtok", "config", "--list", cwd=tmp_path, **environment)
