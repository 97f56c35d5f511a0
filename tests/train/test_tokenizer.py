"""Training a tokenizer beyond the plain run of test_jobs.py: REPA, muP, recomputed activations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import imgtok
from imgtok.cli import main
from imgtok.config import ConfigError, load
from imgtok.tokenizers.flextok import FlexTok
from imgtok.train.loop import Trainer
from imgtok.train.state import complete_steps
from imgtok.train.tokenizer import Config
from imgtok.vision import lite0

TINY = Path(__file__).parents[2] / "configs/tiny/flextok.yaml"
QUIET = ["training.preview_every=0", "training.trackers=[]", "training.log_every=4", "model.decoder.depth=2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> list[str]:
    """Overrides that switch REPA on, with timm's smallest transformer at random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return [f"repa.weights={path}", "repa.encoder=test_vit", "repa.image_size=32", "repa.tap=0"]


def run(out: Path, *overrides: str) -> int:
    return main(["train", "tokenizer", str(TINY), f"out={out}", *QUIET, *overrides])


def weights(out: Path, name: str = "final/model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(out / name)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert run(out, *teacher, "training.mup_base_width=8") == 0
    return out


def test_the_head_is_trained_and_averaged_and_only_the_tokenizer_saved(whole, teacher):
    model = imgtok.load(whole / "final")
    assert isinstance(model, FlexTok)
    first, last = (weights(whole, f"checkpoints/step_000000{step}/model.safetensors") for step in (2, 4))
    head = {name for name in last if name.startswith("projection.")}
    assert len(head) == 6
    assert not any(torch.equal(first[name], last[name]) for name in head)
    assert last.keys() - head == {f"tokenizer.{name}" for name in weights(whole)}, "a teacher in the checkpoint?"
    averages = weights(whole, "checkpoints/step_0000004/ema.safetensors")
    assert head < averages.keys()
    assert all(torch.equal(value, averages[f"tokenizer.{name}"]) for name, value in weights(whole).items())
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert all(line["loss/repa"] < 1 for line in log)
    assert all(0 < line["codebook_use"] <= 1 <= line["codebook_perplexity"] for line in log), "also through REPA's head"


def test_a_killed_run_ends_with_the_same_weights_and_may_recompute_its_activations(
    whole, teacher, tmp_path, monkeypatch
):
    step = Trainer.step

    def interrupted(self, number, batches):
        step(self, number, batches)
        if number == 2:
            raise KeyboardInterrupt

    options = [*teacher, "training.mup_base_width=8"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert run(tmp_path, *options) == 130
    assert complete_steps(tmp_path / "checkpoints") == [2]
    assert run(tmp_path, *options, "checkpoint_activations=true") == 0
    assert same(weights(tmp_path), weights(whole))
    for name in ("model", "ema"):
        file = f"checkpoints/step_0000004/{name}.safetensors"
        assert same(weights(tmp_path, file), weights(whole, file))


def test_repa_mup_and_the_precision_have_a_part_in_it(whole, teacher, tmp_path):
    for name, options in {
        "plain": ["training.mup_base_width=8"],
        "one rate": teacher,
        "bf16": [*teacher, "training.mup_base_width=8", "training.precision=bf16"],
    }.items():
        assert run(tmp_path / name, *options) == 0
        assert not same(weights(tmp_path / name), weights(whole)), name


def test_the_head_starts_alike_whatever_happened_before(teacher, tmp_path):
    starts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert run(tmp_path / str(seed), *teacher, "training.steps=1") == 0
        starts.append(weights(tmp_path / str(seed), "checkpoints/step_0000001/model.safetensors"))
    assert same(*starts)


@pytest.mark.usefixtures("lite0_weights")
def test_the_teacher_that_comes_by_pip(tmp_path, capsys, monkeypatch):
    options = ["repa.encoder=lite0", "repa.image_size=32", "repa.tap=0", "training.steps=2"]
    assert run(tmp_path / "run", *options) == 0
    saved = weights(tmp_path / "run", "checkpoints/step_0000002/model.safetensors")
    head = {name for name in saved if name.startswith("projection.")}
    assert saved.keys() - head == {f"tokenizer.{name}" for name in weights(tmp_path / "run")}, "a teacher is kept?"
    monkeypatch.setattr(lite0, "_packaged", lambda: None)
    elsewhere = f"data={{kind: folder, path: {tmp_path / 'no-images'}}}"
    assert run(tmp_path / "absent", "repa.encoder=lite0", elsewhere) == 2
    assert "repa.encoder=lite0: the weights of efficientnet-lite0" in capsys.readouterr().err


def test_what_does_not_go_together(tmp_path, teacher, capsys):
    with pytest.raises(ConfigError, match="vae_scaling_factor: there is no autoencoder"):
        load(Config, TINY, ["vae_scaling_factor=2"])
    for override, message in (
        ("repa.tap=2", "repa.tap: 2, but the blocks to choose from are 0 to 1"),
        ("loss={}", "loss: a FlexTok has losses of its own alone; leave loss out"),
    ):
        assert run(tmp_path, *teacher, override) == 2
        assert message in capsys.readouterr().err
