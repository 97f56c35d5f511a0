"""The files of code in an exported folder: a Space of the Hub, and a pipeline of diffusers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import kinds
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from imgtok.cli import main
from imgtok.generators.pipeline import Pipeline
from imgtok.sample.folder_files import APP, NEEDED

ROOT = Path(__file__).resolve().parents[2]
PAGE = """
class open_app:
    def __init__(self, folder):
        self.folder = folder
    def launch(self):
        print("at", self.folder)
"""


def drawing(width: int = 32) -> Pipeline:
    tokenizer = kinds.build(kinds.LINES["flextok"])
    config = kinds.GPT | {"vocab_size": tokenizer.vocab_size, "num_tokens": 8, "width": width}
    gpt = kinds.build(kinds.Line(config=kinds.GPTConfig(**config), step=kinds.gpt_step))
    return Pipeline(gpt, tokenizer, device="cpu")


@pytest.fixture
def pipe(tmp_path, monkeypatch) -> Pipeline:
    """One that is exported into the folder `space`; what diffusers copies of it is kept out of the home folder."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.chdir(tmp_path)
    # the variable of the same name was read when diffusers was imported
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    pipe = drawing()
    pipe.save_pretrained("model")
    assert main(["export", "model", "layout=imgtok", "out=space"]) == 0
    return pipe


def pixels(images) -> list[bytes]:
    return [image.tobytes() for image in images]


# ---------------------------------------------------------------- a Space


def test_a_space_installs_what_imgtok_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(NEEDED.split()) == {*project["dependencies"], *extras["demo"], *extras["text"]}


def test_a_space_runs_imgtok_from_the_wheel_beside_its_app(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    alone = [sys.executable, "-I", "-S", "app.py"]  # without site-packages, in which imgtok is here
    refused = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "app.py needs imgtok: install it, or put its wheel into the folder of app.py" in refused.stderr
    with zipfile.ZipFile(tmp_path / "imgtok-0.1.0-py3-none-any.whl", "w") as wheel:
        for name in ("imgtok/__init__.py", "imgtok/sample/__init__.py"):
            wheel.writestr(name, "")
        launch = (
            "import types\ndef open_app(folder):\n    return types.SimpleNamespace(launch=lambda: print('at', folder))"
        )
        wheel.writestr("imgtok/sample/demo.py", launch)
    done = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"at {tmp_path}\n"


# ---------------------------------------------------------------- diffusers


def test_an_exported_generator_is_a_pipeline_of_diffusers(pipe):
    from diffusers import DiffusionPipeline

    theirs = DiffusionPipeline.from_pretrained("space", trust_remote_code=True).to("cpu")
    images = theirs(classes=[2, 4], generator=torch.Generator().manual_seed(1)).images
    assert pixels(images) == pixels(pipe(classes=[2, 4], seed=1))
    assert (theirs.device, theirs.dtype) == (torch.device("cpu"), torch.float32)
    theirs.save_pretrained("again")
    assert sorted(path.name for path in Path("again").iterdir() if path.suffix == ".py") == ["app.py", "pipeline.py"]
    again = DiffusionPipeline.from_pretrained("again", trust_remote_code=True, dtype=torch.bfloat16).to("cpu")
    assert again.dtype == torch.bfloat16
    assert pixels(again(classes=[2, 4], seed=1).images) == pixels(pipe.to(torch.bfloat16)(classes=[2, 4], seed=1))
    assert again.to(torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="use_flashpack: a pipeline of imgtok does not take this; leave it out"):
        type(again.tokenizer).from_pretrained("again/tokenizer", use_flashpack=True)


def test_diffusers_draws_with_the_revision_that_it_was_asked_for(pipe, tmp_path, monkeypatch):
    """A repository with two commits, from which diffusers downloads what it thinks that it needs."""
    from diffusers import DiffusionPipeline
    from diffusers.pipelines import pipeline_utils
    from diffusers.utils import dynamic_modules_utils

    commits = {"main": "a" * 40, "wide": "b" * 40}
    other = drawing(width=64)
    other.save_pretrained("other")
    assert main(["export", "other", "layout=imgtok", "out=wide"]) == 0
    hub = {commits["main"]: tmp_path / "space", commits["wide"]: tmp_path / "wide"}
    files = [path.relative_to("wide").as_posix() for path in Path("wide").rglob("*") if path.is_file()]

    siblings = [SimpleNamespace(rfilename=name) for name in files]

    def commit(revision: str | None) -> str:
        return commits.get(revision or "main", revision or "")

    def resolved(repo, *, revision=None, **_):
        return commit(revision)

    def info(repo, *, revision=None, **_):
        return SimpleNamespace(sha=commit(revision), siblings=siblings)

    def one(repo, filename, *, revision=None, **_):
        return str(hub[commit(revision)] / filename)

    def several(repo, *, revision=None, cache_dir=None, allow_patterns=None, ignore_patterns=None, **_):
        place = Path(cache_dir) / commit(revision)
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(hub[commit(revision)] / name, place / name)
        return str(place)

    monkeypatch.setattr(pipeline_utils, "_resolve_revision", resolved, raising=False)  # older versions have none
    for module in (pipeline_utils, dynamic_modules_utils):
        monkeypatch.setattr(module, "model_info", info)
        monkeypatch.setattr(module, "hf_hub_download", one)
    monkeypatch.setattr(pipeline_utils, "snapshot_download", several)
    for revision, expected in (("wide", other), (None, pipe)):
        theirs = DiffusionPipeline.from_pretrained(
            "you/generator", revision=revision, cache_dir=tmp_path / "cache", trust_remote_code=True
        ).to("cpu")
        assert theirs.tokenizer.generator.config.width == expected.generator.config.width
        assert pixels(theirs(classes=[2], seed=1).images) == pixels(expected(classes=[2], seed=1))
