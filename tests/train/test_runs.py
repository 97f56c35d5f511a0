"""A run, finished or not, and each of its checkpoints do wherever a model is taken."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import imgtok
from imgtok import checkpoints, hub, runs
from imgtok.cli import main
from imgtok.config import ConfigError
from imgtok.generators.gpt import GPT
from imgtok.tokenizers.flextok import FlexTok

TINY = Path(__file__).parents[2] / "configs/tiny"
QUIET = ["num_preview=0", "training.trackers=[]", "training.preview_every=0"]
SHAPES = "data={kind: shapes, num_images: 40}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Runs of 4 steps with checkpoints at 2 and 4: `tok`, trained beside REPA's head, `vae`, beside a discriminator,
    and `gen`, a generator for `tok`.
    """
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "teacher.safetensors")
    repa = f"repa={{encoder: test_vit, weights: {folder}/teacher.safetensors, image_size: 32, tap: 0}}"
    for command in (
        ["train", "tokenizer", str(TINY / "flextok.yaml"), f"out={folder}/tok", repa],
        ["train", "autoencoder", str(TINY / "vae-gan.yaml"), f"out={folder}/vae"],
    ):
        assert main([*command, *QUIET]) == 0
    assert main(["cache", f"{folder}/tok", f"out={folder}/tokens", SHAPES]) == 0
    named = [f"tokens={folder}/tokens", f"tokenizer={folder}/tok", f"out={folder}/gen"]
    assert main(["train", "generator", str(TINY / "gpt-flextok.yaml"), *named, *QUIET]) == 0
    return folder


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """Runs that a test may change."""
    for name in ("tok", "gen"):
        shutil.copytree(trained / name, tmp_path / name)
    return tmp_path


def step(run: Path, number: int) -> Path:
    return run / f"checkpoints/step_{number:07d}"


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("name", ["tok", "vae", "gen"])
def test_the_last_checkpoint_is_the_finished_model(trained, name, caplog):
    caplog.set_level(logging.INFO, "imgtok")
    run = trained / name
    finished, last = imgtok.load(run / "final"), imgtok.load(step(run, 4))
    assert same(finished, last)
    assert not last.training
    left = {"tok": "projection", "vae": "judge"}.get(name)
    beside = f", without what was trained beside it ({left})" if left else ""
    assert f"step_0000004: the averaged weights of step 4{beside}" in caplog.text
    if name == "vae":  # which is measured on images when training ends
        assert finished.config.scaling_factor != last.config.scaling_factor == 1.0
        assert "scaling_factor is 1.0, as the run began: it is measured when training ends" in caplog.text
    else:
        assert finished.config == last.config
    assert not same(last, imgtok.load(step(run, 2)))


def test_trained_weights_are_there_as_well(trained):
    stored = load_file(step(trained / "tok", 4) / "model.safetensors")
    raw = imgtok.load(step(trained / "tok", 4), raw=True)
    assert all(torch.equal(value, stored[f"tokenizer.{name}"]) for name, value in raw.state_dict().items())
    assert not same(raw, imgtok.load(step(trained / "tok", 4)))
    with pytest.raises(ValueError, match=r"final holds one set of weights; trained ones .* RUN/checkpoints/step_"):
        imgtok.load(trained / "tok", raw=True)


def test_a_run_is_its_finished_model_or_else_its_newest_checkpoint(copy):
    run = copy / "tok"
    found = hub.resolve(run)
    assert (found.path, found.name, found.layout, found.step) == (run / "final", f"{run}/final", "imgtok", 4)
    assert hub.resolve(run / "checkpoints").path == step(run, 4)
    shutil.rmtree(run / "final")
    for name in (run, run / "checkpoints", step(run, 4)):
        found = hub.resolve(name)
        assert (found.path, found.name, found.layout, found.step) == (step(run, 4), str(step(run, 4)), "run", 4)
    shutil.rmtree(step(run, 4))
    assert hub.resolve(run).step == 2
    shutil.rmtree(step(run, 2))
    with pytest.raises(FileNotFoundError, match="tok is a training run that has no checkpoint yet"):
        hub.resolve(run)


def test_fingerprints_tell_steps_apart(trained):
    tok = trained / "tok"
    prints = {path: hub.resolve(path).fingerprint() for path in (tok / "final", step(tok, 2), step(tok, 4))}
    assert len(set(prints.values())) == 3
    assert all(len(each) == 16 for each in prints.values())
    assert len(hub.resolve(step(tok, 2)).weights_sha256()) == 64


def test_a_finished_run_that_went_on(copy, caplog):
    caplog.set_level(logging.INFO, "imgtok")
    shutil.copytree(step(copy / "tok", 4), step(copy / "tok", 6))
    assert hub.resolve(copy / "tok").path == copy / "tok/final"
    assert "tok: took the finished model; it has a newer checkpoint, step 6" in caplog.text


def test_a_damaged_checkpoint_is_passed_over_or_named(copy, caplog):
    run = copy / "tok"
    shutil.rmtree(run / "final")
    (step(run, 4) / "ema.safetensors").write_bytes(b"short")
    assert hub.resolve(run).step == 2
    assert "damaged checkpoint passed over, taking step 2" in caplog.text
    with pytest.raises(ValueError, match=r"step_0000004: a damaged checkpoint: ema.safetensors should have \d+ bytes"):
        hub.load(step(run, 4))
    (step(run, 2) / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match=r"(?s)no checkpoint of this run can be read:.*step_0000004: .*step_0000002: "):
        hub.load(run / "checkpoints")


def test_no_class_is_found_by_a_name_outside_the_tables(copy):
    path = step(copy / "tok", 4) / "config.yaml"
    state = json.loads((path.parent / "state.json").read_text())
    for kind, message in (
        ("os:system", "kind: given 'os:system', must be one of vae, maskgit_vqgan, dcae, flextok"),
        (None, "no section"),
    ):
        text = path.read_text() if kind is None else path.read_text().replace("kind: flextok", f"kind: {kind}")
        path.write_text(text.replace("\nmodel:", "\nmodels:") if kind is None else text)
        state["files"]["config.yaml"] = path.stat().st_size
        (path.parent / "state.json").write_text(json.dumps(state))
        with pytest.raises(ConfigError, match=message):
            hub.load(path.parent)


# ---------------------------------------------------------------- where it stands among what was trained


def places(model: nn.Module, stored: nn.Module | dict[str, Any]) -> dict[str, str]:
    names = stored if isinstance(stored, dict) else stored.state_dict()
    return checkpoints.find_model(model, names, Path("x"))


class Around(nn.Module):
    def __init__(self, model: nn.Module, **others: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"it": model, **others})
        self.other = nn.Linear(2, 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_the_model_is_found_by_the_names_of_its_tensors():
    model = Tied()
    own = {name: name for name in model.state_dict()}
    assert places(model, model) == own
    assert places(model, Around(model)) == {name: f"inner.it.{name}" for name in own}
    stored = {f"model.{name}": 0 for name in own if name != "first.weight"}  # of tied tensors a file keeps one
    assert places(model, stored) == {name: f"model.{name}" for name in own} | {"first.weight": "model.second.weight"}


def test_what_does_not_fit_is_left_for_a_message():
    model = nn.Linear(3, 3)
    more = {"model.weight": 0, "model.bias": 0, "model.scale": 0, "judge.weight": 0}
    assert places(model, more) == {"weight": "model.weight", "bias": "model.bias", "scale": "model.scale"}
    assert places(model, {"model.weight": 0, "judge.scale": 0}) == {"weight": "model.weight"}
    with pytest.raises(ValueError, match=r"several times \(inner\.copy\., inner\.it\., other\.\)"):
        places(model, Around(model, copy=nn.Linear(3, 3)))


def test_tensors_of_another_model_are_listed(copy):
    path = step(copy / "tok", 4)
    stored = load_file(path / "model.safetensors")
    stored["tokenizer.extra"] = stored.pop("tokenizer.encoder.readout.weight")
    save_file(stored, path / "model.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["files"]["model.safetensors"] = (path / "model.safetensors").stat().st_size
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"(?s)the FlexTok that its config.yaml.*missing: encoder.readout.*: extra"):
        hub.load(path)


# ---------------------------------------------------------------- in all programs


def test_a_checkpoint_goes_through_the_programs_for_tokenizers(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = str(step(trained / "tok", 2))
    assert main(["info", name]) == 0
    assert f"kind: flextok (FlexTok)\nplace: {name}, after 2 steps of training" in capsys.readouterr().out
    assert main(["reconstruct", name, "num=2", "out=again", SHAPES]) == 0
    scored = ["metrics=psnr", "held_out=0.5", "num=4", "out=scores.json"]
    assert main(["evaluate", f"tokenizer={name}", SHAPES, *scored]) == 0
    assert main(["cache", name, "out=tokens", SHAPES]) == 0
    tiny = [str(TINY / "gpt-flextok.yaml"), *QUIET, "training.steps=1", "tokens=tokens"]
    assert main(["train", "generator", *tiny, f"tokenizer={name}", "out=gen"]) == 0
    assert same(imgtok.load("gen/final/tokenizer"), imgtok.load(name))
    assert main(["train", "generator", *tiny, f"tokenizer={trained}/tok", "out=other"]) == 2
    assert "other" not in [path.name for path in tmp_path.iterdir()]
    again = ["model=null", f"init={name}", "training.steps=0", "out=more"]
    assert main(["train", "tokenizer", str(TINY / "flextok.yaml"), *QUIET, *again]) == 0
    assert same(imgtok.load("more/final"), imgtok.load(name))
    assert main(["export", name, "layout=imgtok", "out=whole", "raw=true"]) == 0
    assert same(imgtok.load("whole"), imgtok.load(name, raw=True))


def test_a_checkpoint_goes_through_the_programs_for_generators(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trained / "gen"
    assert main(["sample", str(step(run, 2)), "num=2", "grid=0", "out=drawn"]) == 0
    pipe = imgtok.pipeline(step(run, 2))
    assert isinstance(pipe.generator, GPT)
    assert isinstance(pipe.decoder, FlexTok)
    assert pipe.found[1].path == trained / "tok/final"
    assert imgtok.pipeline(run).found[0].path == run / "final"
    assert main(["sample", str(step(run, 4)), "num=2", "grid=0", "out=drawn"]) == 2, "other images than step 2's"
    assert main(["info", str(step(run, 2))]) == 0


def test_an_autoencoder_s_checkpoint(trained, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name in (str(trained / "vae"), str(step(trained / "vae", 4))):
        assert main(["cache", "latents", f"vae={name}", "image_size=16", "out=l" + str(len(name)), SHAPES]) == 0
    assert main(["reconstruct", str(trained / "vae/checkpoints"), "image_size=16", "num=2", "out=a", SHAPES]) == 0


# ---------------------------------------------------------------- the decoder of a generator


def test_a_generator_is_only_used_with_the_decoder_it_was_trained_with(copy, capsys):
    gen = copy / "gen"
    shutil.rmtree(gen / "final")
    path = step(gen, 4) / "config.yaml"
    before = path.read_text()
    assert "/tok/final\n" in before, "the folder that the run was taken for"
    state = json.loads((step(gen, 4) / "state.json").read_text())

    def name_another(tokenizer: Path) -> None:
        given = next(line for line in before.splitlines() if line.startswith("tokenizer:"))
        path.write_text(before.replace(given, f"tokenizer: {tokenizer}"))
        state["files"]["config.yaml"] = path.stat().st_size
        (step(gen, 4) / "state.json").write_text(json.dumps(state))

    name_another(copy / "tok")
    assert imgtok.pipeline(gen).found[1].path == copy / "tok/final"
    name_another(step(copy / "tok", 2))
    with pytest.raises(ValueError, match=r"where another model is now .*; say where that one is with tokenizer=FOLDER"):
        imgtok.pipeline(gen)
    name_another(copy / "gone")
    with pytest.raises(FileNotFoundError, match=r"trained with tokenizer=.*gone, .*; say where it is with tokenizer="):
        imgtok.pipeline(gen)
    assert main(["info", str(gen)]) == 0
    assert "The settings of its decoder are not listed: " in capsys.readouterr().out
    assert imgtok.pipeline(gen, tokenizer=copy / "tok").found[1].path == copy / "tok/final"
    state["parts"] = {}  # as runs of earlier releases have it
    name_another(copy / "tok")
    assert imgtok.pipeline(gen).found[0].step == 4


def test_progress_of_runs_before_parts_were_kept(copy):
    path = step(copy / "gen", 4) / "state.json"
    state = json.loads(path.read_text())
    assert state.pop("parts")["tokenizer"] == hub.resolve(copy / "tok").fingerprint()
    path.write_text(json.dumps(state))
    assert runs.read_progress(path.parent).parts == {}
