"""What may differ from the run that is continued: the table in code and docs, and what follows from each line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_job import ToyJob, final, same, toy_config, train

from imgtok.config import field_types, load, to_dict
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.flextok_config import FlexTokConfig
from imgtok.train import autoencoder, generator, resume, tokenizer
from imgtok.train.config import TrainingConfig
from imgtok.train.initialise import configure
from imgtok.train.loop import NonFiniteLoss, fit
from imgtok.train.optim import rate_at

ROOT = Path(__file__).parents[2]


def changes(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]


def broken(out: Path, **given: Any) -> str:
    """The message of a run whose fourth step meets a NaN."""
    with pytest.raises(NonFiniteLoss) as caught:
        train(out, bad=(3, 0), **given)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- the table


def test_every_field_of_the_jobs_is_in_the_table():
    listed = [name for names in resume.POLICIES.values() for name in names]
    assert len(listed) == len(set(listed))
    fields = {field for job in (tokenizer, autoencoder, generator) for field in field_types(job.Config)}
    fields |= {f"training.{field.name}" for field in dataclasses.fields(TrainingConfig)}
    assert fields - {"training"} <= set(listed)
    assert {name for name in listed if name.startswith("training.") or "." not in name} <= fields


def test_the_documentation_has_the_same_table():
    text = (ROOT / "docs/training.md").read_text()
    rows = re.findall(r"^\| \*(free|recorded|same content|refused)\* \|(.*)\|.*\|$", text, re.MULTILINE)
    documented = {policy: tuple(sorted(re.findall("`(.+?)`", fields))) for policy, fields in rows}
    assert documented == {policy: tuple(sorted(names)) for policy, names in resume.POLICIES.items()}


def test_a_section_covers_its_fields_and_a_longer_name_wins():
    assert resume.policy_of("model.width") == "refused"
    assert resume.policy_of("model.sampling.guidance") == "free"
    assert resume.policy_of("data.path") == "same content"
    assert resume.policy_of("training.unheard_of") == "refused"


# -------------------------------------------------------------------------------------------- advice followed


@pytest.mark.parametrize("advice", [{"learning_rate": 1e-3}, {"clip": 0.1}, {"precision": "fp32"}])
def test_the_advice_after_a_nan_works(tmp_path, caplog, advice):
    (name,) = advice
    before = {"precision": "bf16"} if name == "precision" else {}
    assert f"training.{name}" in broken(tmp_path, **before)
    with caplog.at_level(logging.WARNING):
        assert len(train(tmp_path, **before | advice).seen) == 4
    old = getattr(toy_config(**before).training, name)
    assert f"training.{name}: {advice[name]} from step 2 on, so far {old}" in caplog.text
    (line,) = changes(tmp_path)
    assert line["step"] == 2
    assert line["changes"] == {f"training.{name}": [old, advice[name]]}
    if name == "learning_rate":
        assert "the learning rate was 0.00667 in the last step and is 0.001 in the next" in caplog.text
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"][name] == advice[name]


def test_free_changes_change_nothing_and_leave_no_record(tmp_path):
    train(tmp_path / "whole")
    broken(tmp_path / "run")
    train(tmp_path / "run", log_every=1, preview_every=0, save_every=1, keep=1, threads=1, save_minutes=5.0)
    assert same(final(tmp_path / "run"), final(tmp_path / "whole"))
    assert not (tmp_path / "run/changes.jsonl").exists()


def test_what_makes_another_model_is_refused_and_both_ways_out_work(tmp_path):
    broken(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"width = 8, and width = 4 .*choose another `out` .* or continue with the old"
    ):
        train(tmp_path / "run", width=4, learning_rate=1e-3)
    assert not (tmp_path / "run/changes.jsonl").exists()
    train(tmp_path / "run", width=8)
    train(tmp_path / "other", width=4)


def test_a_complete_run_is_not_given_back_for_another_one(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"complete \(6 steps\) with training.learning_rate = 0.01; .* = 0.02 would"):
        train(tmp_path, learning_rate=0.02)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]["learning_rate"] == 0.01
    assert len(train(tmp_path, learning_rate=0.02, steps=8).seen) == 2


def test_more_steps_name_both_rates(tmp_path, caplog):
    """Point 30: cosine ends at 0, and the longer run's cosine is elsewhere at that step."""
    train(tmp_path)
    with caplog.at_level(logging.WARNING):
        train(tmp_path, steps=12)
    rate = rate_at(6, toy_config(steps=12).training)
    assert rate > 0.003
    assert f"the learning rate was 0 in the last step and is {rate:.3g} in the next" in caplog.text
    assert "training.schedule=constant training.learning_rate=RATE" in caplog.text
    assert changes(tmp_path)[0]["learning_rate"] == [0.0, rate]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train(tmp_path, steps=14, schedule="constant", learning_rate=1e-3)
    assert "the learning rate was 0 in the last step and is 0.001 in the next" in caplog.text
    assert "schedule of" not in caplog.text


def test_a_finished_run_without_checkpoints_is_not_begun_again(tmp_path):
    train(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"trained for 6 steps, and there is no checkpoint .*init=.*final starts from"):
        train(tmp_path, steps=8)
    assert train(tmp_path).seen == []


# ------------------------------------------------------------------------------- what is changed takes effect


def test_settings_of_the_optimizer_are_not_those_of_the_checkpoint(tmp_path, monkeypatch):
    broken(tmp_path)
    seen = []
    step = torch.optim.AdamW.step

    def watched(self, *arguments, **options):
        seen.append([(group["betas"], group["weight_decay"]) for group in self.param_groups])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train(tmp_path, betas=(0.5, 0.6), weight_decay=0.2)
    assert seen[0] == [((0.5, 0.6), 0.2), ((0.5, 0.6), 0.0)]


@pytest.mark.parametrize("accumulate", [(1, 3), (3, 2)])
def test_accumulation_may_change(tmp_path, accumulate):
    before, now = accumulate
    broken(tmp_path, accumulate=before)
    assert len(train(tmp_path, accumulate=now, batch_size=2).seen) == 4 * now
    assert set(changes(tmp_path)[0]["changes"]) == {"training.accumulate", "training.batch_size"}


@pytest.mark.parametrize("ema", [(0.0, 0.9), (0.9, 0.0)])
def test_an_average_may_begin_or_end(tmp_path, ema):
    broken(tmp_path, ema=ema[0])
    train(tmp_path, ema=ema[1])
    assert (tmp_path / "checkpoints/step_0000006/ema.safetensors").exists() == bool(ema[1])


# ------------------------------------------------------------------------------------- the same data and models


def of(out: Path, identity: dict[str, Any], **given: Any) -> ToyJob:
    config = toy_config(**given)
    job = ToyJob(config)
    job.identity = identity
    fit(job, config.training, out, config)
    return job


IMAGES = {"images": 12, "names": "ab", "content": "cd"}


def test_the_same_data_may_lie_elsewhere(tmp_path, caplog):
    of(tmp_path, {"data": IMAGES}, steps=4, data=Path("here"))
    with caplog.at_level(logging.INFO):
        assert len(of(tmp_path, {"data": dict(IMAGES)}, data=Path("there")).seen) == 2
    assert "data: there, so far here: the same content" in caplog.text


def test_other_data_under_the_same_path_are_noticed(tmp_path):
    of(tmp_path, {"data": IMAGES}, steps=4, data=Path("here"))
    with pytest.raises(
        ValueError, match=r"^data = here: not what .* started with: images: 12 then, 13 now; other sizes"
    ):
        of(tmp_path, {"data": IMAGES | {"images": 13, "content": "ef"}}, data=Path("here"))
    with pytest.raises(ValueError, match="other sizes or bytes of the files. Choose"):  # of a complete run, too
        of(tmp_path, {"data": IMAGES | {"content": "ef"}}, steps=4, data=Path("here"))
    of(tmp_path / "new", {"data": IMAGES | {"images": 13}}, data=Path("here"))  # the advice
    of(tmp_path, {"data": IMAGES}, data=Path("there"))


# ------------------------------------------------------------------------------------------- earlier versions

RUN_OF_55E4D35 = """
job: train-tokenizer
out: outputs/tiny/flextok
data: {kind: shapes, split: train, num_images: 64, mode: class, textures: [solid, striped, dotted, checkered],
  sizes: [small, medium, large], scale: 1.0, max_objects: 4, held_out_pairs: split}
flip: false
crop: center
held_out: 0.1
model: {kind: flextok, image_size: 16, vae: null, patch_size: 4, num_registers: 4, levels: [4, 4],
  encoder: {width: 16, depth: 1, head_dim: 8}, decoder: {width: 16, depth: 1, head_dim: 8}, max_timestep: 1000.0,
  nested_dropout: pow2, keep_all: 0.0, null_dropout: 0.1, times: mode, mode_scale: 0.25, posterior: mean,
  noise_fraction: 0.0, prediction: velocity, spread_weight: 0.0, positions: sincos, initialisation: published,
  decode_steps: 2, decode_guidance: 1.0, decode_solver: euler, projected_guidance: true}
vae: null
vae_scaling_factor: null
repa: {encoder: vit_large_patch14_dinov2.lvd142m, weights: null, image_size: 518, tap: 1, hidden_multiple: 4, layers: 3,
  weight: 1.0}
checkpoint_activations: false
num_preview: 4
half: false
training: {steps: 4, batch_size: 4, learning_rate: 0.001, accumulate: 1, betas: [0.9, 0.95], weight_decay: 0.05,
  mup_base_width: 0, clip: 1.0, warmup: 0, schedule: cosine, final_rate: 0.0, decay_from: 0.0, precision: fp32,
  ema: 0.5, compile: false, seed: 0, threads: null, num_workers: 0, log_every: 1, preview_every: 1000, save_every: 2,
  keep: 2, resume: true, trackers: [tensorboard]}
"""
"""What that commit wrote, but for the line breaks."""


def compared(out: Path, stored: str, job: Any, file: str, *given: str, identity: Any = None) -> list[resume.Change]:
    """The recorded changes of a command over what a run folder says."""
    (out / "config.yaml").write_text(stored)
    config = load(job.Config, ROOT / f"configs/tiny/{file}.yaml", [f"out={out}", *given])
    config = resume.spelled_out(dataclasses.replace(config, model=configure(config.model, None)))
    previous = resume.Previous.read(out, config)
    assert previous is not None
    return resume.check(out, previous, config, identity or {})


def test_a_run_of_55e4d35_goes_on(tmp_path):
    """Fields of the model lay elsewhere, and others were not there; the teacher's size stood where null stands now."""
    command = RUN_OF_55E4D35, tokenizer, "flextok", "repa={}"
    assert compared(tmp_path, *command) == []
    (change,) = compared(tmp_path, *command, "training.steps=8")
    assert change == ("training.steps", 4, 8)
    for field, value in (("short_runs.keep_all", 0.5), ("decoding.steps", 3)):
        refused = pytest.raises(ValueError, match=rf"with model.{field} = .*, and model.{field} = {value} is asked")
        with refused if field.startswith("short") else contextlib.nullcontext():
            compared(tmp_path, *command, f"model.{field}={value}")
    with pytest.raises(ValueError, match=r"with repa.image_size = 518, and repa.image_size = 224 is asked"):
        compared(tmp_path, *command, "repa.image_size=224")
    with pytest.raises(ValueError, match=r"with repa = \{encoder: vit_\w+.lvd142m, weights: null, .* and repa = null"):
        compared(tmp_path, *command, "repa=null")


def test_every_former_field_has_a_place():
    known = dict(resume.flatten(to_dict(FlexTokConfig())))
    assert set(FlexTokConfig.FORMER.values()) <= set(known)


@pytest.mark.parametrize(
    ("stored", "given"),
    [
        ("loss: {lpips: 0.5}", ["loss.perceptual=lpips", "loss.perceptual_weight=0.5"]),
        ("loss: {perceptual: lpips, perceptual_weight: 0.5}", ["loss.lpips=0.5"]),
    ],
)
def test_the_same_in_other_words_is_no_change(tmp_path, stored, given):
    text = (ROOT / "configs/tiny/vae.yaml").read_text() + stored
    assert compared(tmp_path, text, autoencoder, "vae", *given) == []
    (change,) = compared(tmp_path, text, autoencoder, "vae", "loss.lpips=2")
    assert change == ("loss.perceptual_weight", 0.5, 2.0)
    with pytest.raises(ValueError, match="loss.perceptual = lpips, and loss.perceptual = null"):
        compared(tmp_path, text, autoencoder, "vae")


def test_what_this_version_does_not_know_is_said(tmp_path):
    text = (ROOT / "configs/tiny/vae.yaml").read_text()
    with pytest.raises(
        ValueError, match=r"job = train-vae is none of this version's. Another version .*: go on with that one"
    ):
        compared(tmp_path, text.replace("train-autoencoder", "train-vae"), autoencoder, "vae")
    with pytest.raises(
        ValueError, match=r"^.*config.yaml: model has no field 'unheard'.* Another version of imgtok started"
    ):
        compared(tmp_path, text.replace("{kind: vae,", "{kind: vae, unheard: 3,"), autoencoder, "vae")
    with pytest.raises(ValueError, match="job = train-tokenizer, .* or go on by `imgtok train tokenizer`"):
        compared(tmp_path, text.replace("train-autoencoder", "train-tokenizer"), autoencoder, "vae")


def test_an_identity_of_an_earlier_version_lacks_parts(tmp_path):
    """What is told of the data later is at its default there; what is told no longer is not compared."""
    text = (ROOT / "configs/tiny/vae.yaml").read_text()
    now = to_dict(ShapesConfig(num_images=64))
    then = {name: value for name, value in now.items() if name != "scale"} | {"unheard": 1}
    (tmp_path / "identity.json").write_text(json.dumps({"data": then}))
    assert compared(tmp_path, text, autoencoder, "vae", identity={"data": now}) == []
    with pytest.raises(ValueError, match=r"^data: not what .*: scale: 1.0 then, 0.5 now. Choose"):
        compared(tmp_path, text, autoencoder, "vae", "data.scale=0.5", identity={"data": now | {"scale": 0.5}})
    with pytest.raises(ValueError, match="num_images: 64 then, 65 now"):
        compared(tmp_path, text, autoencoder, "vae", identity={"data": now | {"num_images": 65}})


def test_fingerprints_of_earlier_checkpoints_are_an_identity(tmp_path):
    """Before identity.json only state.json had the tokenizer's."""
    of(tmp_path, {"tokenizer": "ab"}, steps=2)
    (tmp_path / "identity.json").unlink()
    with pytest.raises(ValueError, match="^tokenizer: not what .*: ab then, cd now"):
        of(tmp_path, {"tokenizer": "cd"}, steps=2)


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """It has no identity.json, and lacks fields that stand at their defaults now."""
    of(tmp_path, {}, steps=4, data=Path("here"))
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del stored["training"]["save_minutes"], stored["width"], stored["training"]["seed"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    with pytest.raises(ValueError, match="data = here, and data = there"):
        of(tmp_path, {"data": IMAGES}, data=Path("there"))
    assert len(of(tmp_path, {"data": IMAGES}, data=Path("here")).seen) == 2
    assert json.loads((tmp_path / "identity.json").read_text()) == {"data": IMAGES}
