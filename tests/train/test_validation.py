"""Validation while training: fixed noise, averaged weights, no effect on the run, and what it refuses."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from toy_job import ToyBatch, ToyConfig, ToyJob, ToyModel, final, same, toy_config, train

from imgtok.cli import main
from imgtok.config import ConfigError
from imgtok.data.images import DataError, ShapesImages
from imgtok.data.overlap import refuse_shared
from imgtok.randomness import step_generator
from imgtok.runs import BEST, complete_steps, step_of
from imgtok.shapes.world import ShapesConfig
from imgtok.signals import Stopped
from imgtok.train.best import Record, best_of
from imgtok.train.loop import Job, Trainer, fit


def validations(out: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "validation/loss" in line}


def losses(out: Path) -> dict[int, float]:
    return {step: line["validation/loss"] for step, line in validations(out).items()}


def test_a_run_with_validation_ends_with_the_same_weights(tmp_path):
    train(tmp_path / "without", accumulate=2)
    train(tmp_path / "with", accumulate=2, validate_every=1)
    assert same(final(tmp_path / "with"), final(tmp_path / "without"))
    state = "checkpoints/step_0000006/random_states_0.pkl"
    states = [torch.load(tmp_path / run / state, weights_only=False) for run in ("with", "without")]
    assert torch.equal(*(each["torch_manual_seed"] for each in states))
    assert list(losses(tmp_path / "with")) == list(range(7))


def test_the_loss_is_that_of_the_averaged_weights_with_noise_of_the_recorded_seed(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        job = train(tmp_path, validate_every=4, validation_seed=7)
    assert list(losses(tmp_path)) == [0, 4, 6]
    model = ToyModel(8).eval()
    model.load_state_dict(final(tmp_path))
    total, absolute, seen = 0.0, 0.0, 0
    for number, places in enumerate([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]):
        batch = job.held_out().batch(places, 7)
        found = model(batch.x, generator=step_generator(7, number, purpose="validation"))
        total, seen = total + len(places) * found.total.item(), seen + len(places)
        absolute += len(places) * found.parts["absolute"].item()
    line = validations(tmp_path)[6]
    assert line["validation/loss"] == pytest.approx(total / seen)
    assert line["validation/loss/absolute"] == pytest.approx(absolute / seen)
    assert line["validation/images"] == 10
    assert "validation on all 10 held-out images of the toy every 4 steps" in caplog.text
    assert re.search(r"step 6/6  held out: loss [\d.]+, [\d.]+ before \(10 images, [\d.e-]+ s\)", caplog.text)


def test_a_run_that_was_interrupted_validates_on_the_same_noise(tmp_path):
    class Interrupted(ToyJob):
        def loss(self, model, batch, generator):
            if model.training and sum(names[0].startswith("image") for names in self.seen) == 5:
                raise KeyboardInterrupt
            return super().loss(model, batch, generator)

    train(tmp_path / "whole", validate_every=2)
    config = toy_config(validate_every=2)
    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted(config), config.training, tmp_path / "resumed", config)
    train(tmp_path / "resumed", validate_every=2)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    train(tmp_path / "other", validate_every=2, validation_seed=1)
    assert losses(tmp_path / "other") != losses(tmp_path / "whole")


def test_some_of_many_and_what_cannot_be_read(tmp_path):
    class Unreadable(ToyJob):
        def held_out(self):
            whole = super().held_out()

            def batch(places, seed):
                read = whole.batch(places, seed)
                return ToyBatch(read.x[1:], read.labels[1:], read.names[1:])

            return type(whole)(whole.count, batch, whole.words)

    config = toy_config(validate_every=6, num_validation=5, steps=1)
    fit(Unreadable(config), config.training, tmp_path, config)
    assert validations(tmp_path)[1]["validation/images"] == 3  # of 4 + 1: the second batch has none left


def test_a_loss_may_look_at_gradients(tmp_path):
    class Adaptive(ToyJob):
        def loss(self, model, batch, generator):
            found = super().loss(model, batch, generator)
            (gradient,) = torch.autograd.grad(found.total, model.out.weight, retain_graph=True)
            found.parts["adaptive"] = gradient.norm().detach()
            return found

    config = toy_config(validate_every=6, steps=1)
    fit(Adaptive(config), config.training, tmp_path, config)
    assert validations(tmp_path)[1]["validation/loss/adaptive"] > 0


def test_a_loss_that_is_not_finite_is_said_and_ends_nothing(tmp_path, caplog):
    class Broken(ToyJob):
        def held_out(self):
            whole = super().held_out()
            broken = ToyBatch(torch.full((4, 3), torch.nan), torch.zeros(4), ("a",) * 4)
            return type(whole)(4, lambda places, seed: broken, whole.words)

    config = toy_config(validate_every=6, steps=1)
    fit(Broken(config), config.training, tmp_path, config)
    assert math.isnan(losses(tmp_path)[1])
    assert "the held-out loss after step 1 is nan" in caplog.text


# ------------------------------------------------------------------------------------- scores, best/, patience


class Scripted(ToyJob):
    """Its images are read right as often as the list says, one validation after the other."""

    def __init__(self, config: ToyConfig, values: Sequence[float]) -> None:
        super().__init__(config)
        self.values = list(values)

    def scores(self, wanted, held_out, num):
        assert (wanted, held_out.count, num) == (("oracle",), 10, 3)

        def measure(model: nn.Module) -> dict[str, float]:
            assert not model.training
            torch.rand(1)
            return {"oracle": self.values.pop(0)}

        return measure


def test_the_progress_line_says_each_score_once(tmp_path, caplog):
    measured = [
        {"psnr": 8.696, "psnr@4": 7.5, "psnr@16": 8.696},
        {"psnr": 9.25, "psnr@4": 9.25, "psnr@16": 9.25},  # rates that are worth the same
    ]

    class Reconstructing(ToyJob):
        def scores(self, wanted, held_out, num):
            return lambda model: measured.pop(0)

    config = toy_config(steps=1, validate_every=1, validation_scores=("psnr",))
    with caplog.at_level(logging.INFO):
        fit(Reconstructing(config), config.training, tmp_path, config)
    said = [re.findall(r"  (psnr\S* \S+)", line) for line in caplog.messages if "held out: loss" in line]
    assert said == [["psnr 8.696", "psnr@4 7.5"], ["psnr 9.25", "psnr@4 9.25"]]
    assert validations(tmp_path)[0]["validation/psnr@16"] == 8.696  # the log has them all


SCORED: dict[str, Any] = {"validate_every": 1, "validation_scores": ("oracle",), "num_scored": 3, "best": "oracle"}


def test_the_best_model_is_kept_and_a_run_that_gets_no_better_ends(tmp_path, caplog):
    config = toy_config(**SCORED, patience=2)
    job = Scripted(config, [0.1, 0.5, 0.3, 0.4])
    with caplog.at_level(logging.INFO):
        fit(job, config.training, tmp_path, config)
    assert [line["validation/oracle"] for line in validations(tmp_path).values()] == [0.1, 0.5, 0.3, 0.4]
    assert (
        "training.patience: ended after step 3 of 6: oracle was no better in 2 validations than 0.5 after"
        in caplog.text
    )
    assert re.search(r"step 1/6  held out: loss \S+, \S+ before  oracle 0.5 \(", caplog.text)
    assert [step_of(tmp_path / name) for name in ("best", "final")] == [1, 3]
    before = final(tmp_path)
    again = Scripted(config, [])
    fit(again, config.training, tmp_path, config)
    assert again.seen == []
    assert same(final(tmp_path), before)
    longer = toy_config(**SCORED, patience=4)
    fit(Scripted(longer, [0.6, 0.2, 0.2]), longer.training, tmp_path, longer)
    assert [step_of(tmp_path / name) for name in ("best", "final")] == [4, 6]


def test_patience_begins_with_a_score_that_is_asked_for_later(tmp_path):
    train(tmp_path, steps=2, validate_every=1)
    config = toy_config(**SCORED, patience=2)
    fit(Scripted(config, [0.5, 0.4, 0.4]), config.training, tmp_path, config)
    assert [step_of(tmp_path / name) for name in ("best", "final")] == [3, 5]


def test_scores_leave_the_run_as_it_is(tmp_path):
    train(tmp_path / "plain")
    config = toy_config(**SCORED)
    fit(Scripted(config, [0.5] * 7), config.training, tmp_path / "scored", config)
    assert same(final(tmp_path / "scored"), final(tmp_path / "plain"))
    assert step_of(tmp_path / "scored/best") == 0


def test_the_best_of_losses_is_the_smallest_and_of_scores_the_largest():
    seen = {0: {"loss": 3.0, "psnr@4": 9.0}, 5: {"loss": 1.0, "psnr@4": 8.0}, 9: {"loss": math.nan, "psnr@4": 8.5}}
    assert best_of(seen, "loss") == Record(5, 1.0, 1)
    assert best_of(seen, "psnr@4") == Record(0, 9.0, 2)
    assert best_of({}, "loss") is None
    with pytest.raises(ValueError, match=r"training.best: 'psnr' is no figure .* have: loss, psnr@4; scores"):
        best_of(seen, "psnr")


# ---------------------------------------------------------------------------------------------------- cut short


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Those of a program in a terminal; pytest itself may have been started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def cut_short(out: Path, act: Callable[[], object], *, batch: int, **changes: Any) -> ToyJob:
    """A run in which `act` is called within one of the batches that are validated on, counted from 1."""
    config = toy_config(**changes)

    class CutShort(ToyJob):
        validated = 0

        def loss(self, model, batch_, generator):
            if not model.training:
                self.validated += 1
                if self.validated == batch:
                    act()
            return super().loss(model, batch_, generator)

    job = CutShort(config)
    with pytest.raises((Stopped, OSError)) as caught:
        fit(job, config.training, out, config)
    job.message = str(caught.value)
    return job


def lost() -> None:
    raise OSError("the machine is gone")


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def logged(out: Path) -> list[tuple[int, bool]]:
    """The steps of all lines of the log, and which are validations."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], "validation/loss" in line) for line in lines]


def test_a_crash_in_a_validation_costs_no_step(tmp_path):
    train(tmp_path / "whole", validate_every=2)
    cut_short(tmp_path / "cut", lost, batch=8, validate_every=2)  # the second of three, after step 4
    assert complete_steps(tmp_path / "cut/checkpoints") == [4, 2]
    assert list(losses(tmp_path / "cut")) == [0, 2]
    resumed = train(tmp_path / "cut", validate_every=2)
    assert sum(names[0].startswith("image") for names in resumed.seen) == 2
    assert same(final(tmp_path / "cut"), final(tmp_path / "whole"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_signal_ends_a_validation_and_the_run_that_goes_on_makes_up_for_it(tmp_path, step):
    given = {"validate_every": 1, "save_every": 2}
    train(tmp_path / "whole", **given)
    job = cut_short(tmp_path / "cut", terminated, batch=3 * step + 1, **given)  # the first of three
    assert f"SIGTERM: stopped after step {step} of 6; the checkpoint is" in job.message
    assert job.validated == 3 * step + 1
    assert complete_steps(tmp_path / "cut/checkpoints")[0] == step
    assert list(losses(tmp_path / "cut")) == list(range(step))
    resumed = train(tmp_path / "cut", **given)
    assert sum(names[0].startswith("image") for names in resumed.seen) == 6 - step
    assert same(final(tmp_path / "cut"), final(tmp_path / "whole"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert [step for step, is_one in logged(tmp_path / "cut") if is_one] == list(range(7))


def test_a_signal_ends_the_first_validation(tmp_path):
    job = cut_short(tmp_path, terminated, batch=1, validate_every=2)
    assert "SIGTERM: stopped after step 0 of 6; nothing is lost" in job.message
    assert job.seen == [tuple(f"held_out_{place}.png" for place in range(4))]


def test_a_signal_ends_the_measuring_of_scores(tmp_path):
    class Slow(Scripted):
        def scores(self, wanted, held_out, num):
            measure = super().scores(wanted, held_out, num)

            def slowly(model: nn.Module) -> dict[str, float]:
                found = measure(model)
                if found["oracle"] == 0.4:
                    terminated()
                    raise AssertionError("the signal was waited for")
                return found

            return slowly

    config = toy_config(**SCORED)
    with pytest.raises(Stopped, match="stopped after step 3 of 6"):
        fit(Slow(config, [0.1, 0.2, 0.3, 0.4]), config.training, tmp_path / "cut", config)
    assert step_of(tmp_path / "cut/best") == 2
    fit(Scripted(config, [0.4, 0.2, 0.2, 0.2]), config.training, tmp_path / "cut", config)
    assert [line["validation/oracle"] for line in validations(tmp_path / "cut").values()] == [
        *(0.1, 0.2, 0.3, 0.4, 0.2, 0.2, 0.2)
    ]
    assert step_of(tmp_path / "cut/best") == 3
    train(tmp_path / "plain")
    assert same(final(tmp_path / "cut"), final(tmp_path / "plain"))


def best_in_log(out: Path) -> int | None:
    return max(validations(out).values(), key=lambda line: line["validation/oracle"])["step"]


def test_a_run_goes_on_from_the_model_in_best_or_later(tmp_path):
    """The second time it is measured a little worse, as on GPUs, so that the record of an earlier step would stand."""
    given = SCORED | {"save_every": 100, "patience": 3}

    class Interrupted(Scripted):
        def loss(self, model, batch, generator):
            if model.training and not self.values:
                raise OSError("the machine is gone")
            return super().loss(model, batch, generator)

    config = toy_config(**given)
    with pytest.raises(OSError, match="gone"):
        fit(Interrupted(config, [0.1, 0.3, 0.2, 0.5, 0.3]), config.training, tmp_path, config)
    assert step_of(tmp_path / BEST) == 3
    fit(Scripted(config, [0.29, 0.28, 0.27]), config.training, tmp_path, config)
    assert [line["validation/oracle"] for line in validations(tmp_path).values()] == [
        *(0.1, 0.3, 0.2, 0.5, 0.29, 0.28, 0.27)
    ]
    assert best_in_log(tmp_path) == step_of(tmp_path / BEST) == 3
    assert step_of(tmp_path / "final") == 6


@pytest.mark.parametrize("after", [False, True], ids=["before it is there", "after it is there"])
def test_a_run_that_ends_while_best_is_written_has_it_when_it_goes_on(tmp_path, monkeypatch, caplog, after):
    config = toy_config(**SCORED, patience=3)
    values = [0.1, 0.2, 0.3, 0.5, 0.4, 0.4, 0.4]
    fit(Scripted(config, values), config.training, tmp_path / "whole", config)
    write = Trainer.write_model

    def dying(self: Trainer, model: nn.Module, name: str, done: int) -> Path:
        if done < 3 or after:
            write(self, model, name, done)
        if done == 3:
            raise OSError("the machine is gone")
        return self.out / name

    monkeypatch.setattr(Trainer, "write_model", dying)
    with pytest.raises(OSError, match="gone"):
        fit(Scripted(config, values), config.training, tmp_path / "cut", config)
    assert (step_of(tmp_path / "cut" / BEST), best_in_log(tmp_path / "cut")) == (3 if after else 2, 3)
    monkeypatch.undo()
    fit(Scripted(config, values[4:]), config.training, tmp_path / "cut", config)
    weights = [load_file(tmp_path / run / BEST / "model.safetensors") for run in ("whole", "cut")]
    assert same(*weights)
    assert logged(tmp_path / "cut")[-1] == logged(tmp_path / "whole")[-1]
    assert [step_of(tmp_path / "cut" / name) for name in (BEST, "final")] == [3, 6]
    assert "was not kept" not in caplog.text


def test_patience_counts_as_if_the_run_had_not_ended(tmp_path):
    given = SCORED | {"save_every": 4, "patience": 3, "steps": 9}
    values = [0.1, 0.5, 0.2, 0.2]
    config = toy_config(**given)
    fit(Scripted(config, [*values, 0.2]), config.training, tmp_path / "whole", config)
    with pytest.raises(IndexError):  # within the validation that would be the last
        fit(Scripted(config, values), config.training, tmp_path / "cut", config)
    fit(Scripted(config, [0.2, 0.2]), config.training, tmp_path / "cut", config)
    assert [step_of(tmp_path / run / "final") for run in ("whole", "cut")] == [4, 4]
    assert list(validations(tmp_path / "cut")) == list(validations(tmp_path / "whole")) == [0, 1, 2, 3, 4]


def test_a_best_model_that_was_not_kept_is_named(tmp_path, caplog):
    early = toy_config(**{**SCORED, "best": None}, steps=3)
    fit(Scripted(early, [0.1, 0.5, 0.2, 0.3]), early.training, tmp_path, early)
    config = toy_config(**SCORED)
    fit(Scripted(config, [0.4, 0.6, 0.2]), config.training, tmp_path, config)
    assert (
        "training.best: oracle was best after step 1 (0.5), and the model of that step was not kept; until it is "
        "better, best/ is missing"
    ) in caplog.text
    assert step_of(tmp_path / BEST) == 5


def test_a_best_model_of_steps_that_are_lost_is_named(tmp_path, caplog):
    config = toy_config(**SCORED, keep=9)
    fit(Scripted(config, [0.1, 0.3, 0.2, 0.2, 0.5, 0.2, 0.2]), config.training, tmp_path, config)
    shutil.rmtree(tmp_path / "final")
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"checkpoints/step_{step:07d}")
    fit(Scripted(config, [0.2, 0.2, 0.4, 0.2]), config.training, tmp_path, config)
    assert (
        "best after step 1 (0.3), and the model of that step was not kept; until it is better, best/ is that of step 4"
        in (caplog.text)
    )
    assert step_of(tmp_path / BEST) == best_in_log(tmp_path) == 5


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("given", [{"best": "loss"}, {"patience": 2}, {"validation_scores": ("psnr",)}])
def test_what_needs_validation_says_so(given):
    with pytest.raises(ValueError, match=rf"{next(iter(given))}: nothing is measured without validation"):
        toy_config(**given)


def test_a_score_that_a_job_does_not_have_is_named(tmp_path, folders, capsys):
    with pytest.raises(ValueError, match="this job measures nothing but the loss; leave psnr out"):
        train(tmp_path / "toy", validate_every=1, validation_scores=("psnr",))
    words = ("training.validate_every=1", "training.validation_scores=oracle")
    assert autoencoder(tmp_path, folders, *words) == 2
    assert "oracle cannot be measured of reconstructions; what can: psnr" in capsys.readouterr().err


def test_a_rhythm_below_one_and_a_job_without_held_out_images_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"validate_every.* 0"):
        toy_config(validate_every=0)

    class Without(ToyJob):
        def held_out(self):
            return Job.held_out(self)

    config = toy_config(validate_every=2)
    with pytest.raises(ValueError, match=r"^training.validate_every: this job keeps no images from training"):
        fit(Without(config), config.training, tmp_path, config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Folders of images: `a` and `b` have eight and four of their own, `c` has one of `a` under another name."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, count in (("a", 8), ("b", 4), ("c", 1)):
        (root / name).mkdir()
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / name / f"{number}.png")
    (root / "c/copy.png").write_bytes((root / "a/5.png").read_bytes())
    (root / "empty").mkdir()
    return root


TRAINED = "training={steps: 1, batch_size: 4, learning_rate: 1e-3, trackers: [], preview_every: 0}"
SMALL = "model={kind: vae, latent_channels: 2, block_channels: [4], layers_per_block: 1, norm_groups: 2}"


def autoencoder(out: Path, folders: Path, *words: str) -> int:
    own = ("train", "autoencoder", f"out={out}", f"data={{kind: folder, path: {folders / 'a'}}}", "image_size=8")
    return main([*own, TRAINED, SMALL, "num_preview=0", "loss.l1=1", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["validation={kind: folder, path: b}"], r"validation: nothing looks at this data: .*validate_every=500"),
        (
            ["held_out=0", "training.validate_every=1"],
            r"no images are held out \(held_out=0\): .*validation.path=FOLDER",
        ),
        (["validation={kind: folder, path: empty}", "training.validate_every=1"], r"validation: .*empty: no images"),
        (
            ["validation={kind: folder, path: a}", "training.validate_every=1"],
            r"validation: 7 of 8 held-out images are trained on, too: .*a/\d.png, .* and 4 more",
        ),
        (
            ["validation={kind: folder, path: c}", "held_out=0", "training.validate_every=1"],
            r"validation: 1 of 2 held-out images are trained on, too: \S*c/copy.png \(it is \S*a/5.png\); name images",
        ),
    ],
)
def test_data_that_cannot_be_validated_on_are_named(tmp_path, folders, capsys, words, message):
    words = [re.sub(r"path: (\w+)", lambda found: f"path: {folders / found[1]}", word) for word in words]
    assert autoencoder(tmp_path, folders, *words) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_copies_within_one_data_set_are_named(tmp_path, folders, capsys):
    """Of eight images and a copy of each two are held out, and their copies are trained on."""
    where = tmp_path / "images"
    where.mkdir()
    for number in range(16):
        (where / f"{number:02d}.png").write_bytes((folders / f"a/{number % 8}.png").read_bytes())
    data = f"data={{kind: folder, path: {where}}}"
    assert autoencoder(tmp_path / "out", folders, data, "held_out=0.1", "training.validate_every=1") == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert re.search(
        r"held_out: 2 of 2 held-out images are trained on, too: \S*/(\d\d).png \(it is \S*/(\d\d).png\), .*; name", said
    )
    assert autoencoder(tmp_path / "out", folders, data, "held_out=0.1") == 0  # nothing is validated on


def test_an_autoencoder_validates_on_other_images(tmp_path, folders):
    words = (f"validation={{kind: folder, path: {folders / 'b'}}}", "held_out=0", "training.validate_every=1")
    assert autoencoder(tmp_path, folders, *words, "training.validation_scores=psnr", "training.best=psnr") == 0
    assert step_of(tmp_path / "best") == max(validations(tmp_path).values(), key=lambda v: v["validation/psnr"])["step"]
    line = validations(tmp_path)[1]
    assert line["validation/images"] == 4
    assert {"validation/loss", "validation/loss/l1", "validation/loss/mse"} <= set(line)


def test_shapes_that_are_trained_on_are_named():
    def shapes(**given: Any) -> ShapesImages:
        return ShapesImages(ShapesConfig(**given), 8)

    trained = shapes(num_images=6)
    refuse_shared(trained, shapes(num_images=6, split="val"), range(6), "validation")
    with pytest.raises(DataError, match=r"validation: 2 of 3 .*too: shapes/train/4, shapes/train/5; name"):
        refuse_shared(trained, shapes(num_images=9), [4, 5, 6], "validation")
