"""A run that is killed and started again ends with the weights of one that is not, bit for bit."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
from pathlib import Path

import processes
import pytest
import torch
import toy_job
from toy_job import final, same, toy_config, train

from imgtok.train.ema import EMA
from imgtok.train.optim import rate_at
from imgtok.train.state import complete_steps

PROGRAM = Path(toy_job.__file__)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("whole")
    train(out)
    return final(out)


def interrupt(out: Path, after: int, **changes) -> None:
    """Leave a run as Ctrl-C leaves it, `after` micro-batches after its start."""
    config = toy_config(**changes)

    class Interrupted(toy_job.ToyJob):
        def loss(self, *arguments):
            if len(self.seen) == after:
                raise KeyboardInterrupt
            return super().loss(*arguments)

    with pytest.raises(KeyboardInterrupt):
        toy_job.fit(Interrupted(config), config.training, out, config)


def test_kill_in_the_middle_of_a_step(tmp_path, uninterrupted):
    assert processes.python(PROGRAM, tmp_path, "die_in_step=5").returncode == -signal.SIGKILL
    assert complete_steps(tmp_path / "checkpoints") == [4, 2]
    assert len(train(tmp_path).seen) == 2  # steps 4 and 5
    assert same(final(tmp_path), uninterrupted)


def test_kill_in_the_middle_of_a_checkpoint(tmp_path, uninterrupted):
    assert processes.python(PROGRAM, tmp_path, "die_in_save=4").returncode == -signal.SIGKILL
    assert complete_steps(tmp_path / "checkpoints") == [2]
    assert (tmp_path / "checkpoints/.tmp-step_0000004").is_dir()
    assert len(train(tmp_path).seen) == 4
    assert not list(tmp_path.rglob(".tmp-*"))
    assert same(final(tmp_path), uninterrupted)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 4, 6]


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    checkpoint, flushed = tmp_path / "checkpoints/step_0000002", set()

    def flush(descriptor: int) -> None:
        flushed.add((os.fstat(descriptor).st_ino, checkpoint.exists()))

    monkeypatch.setattr(os, "fsync", flush)
    train(tmp_path, steps=2)
    assert (checkpoint / "state.json").is_file()
    assert {(path.stat().st_ino, False) for path in (checkpoint, *checkpoint.rglob("*"))} <= flushed
    assert (checkpoint.parent.stat().st_ino, True) in flushed, "the name itself"


def test_kill_before_the_first_checkpoint(tmp_path, uninterrupted):
    interrupt(tmp_path, after=1)
    train(tmp_path)
    assert same(final(tmp_path), uninterrupted)


@pytest.mark.parametrize(
    "changes", [{"accumulate": 3}, {"precision": "bf16"}, {"ema": 0.0}], ids=["accumulate", "bf16", "no-ema"]
)
def test_resume_is_exact_with(tmp_path, changes):
    accumulate = changes.get("accumulate", 1)  # interrupted within the fourth step
    train(tmp_path / "whole", **changes)
    interrupt(tmp_path / "resumed", after=3 * accumulate + accumulate // 2, **changes)
    assert len(train(tmp_path / "resumed", **changes).seen) == 4 * accumulate
    assert same(final(tmp_path / "resumed"), final(tmp_path / "whole"))


def test_two_processes_resume_exactly_and_stop_together(tmp_path):
    for done in processes.two(PROGRAM, tmp_path, "two_processes"):
        assert done.returncode == 0, done.stderr[-3000:]
    facts = [json.loads((tmp_path / f"facts_{rank}.json").read_text()) for rank in range(2)]
    assert same(final(tmp_path / "resumed"), final(tmp_path / "whole"))
    assert same(final(tmp_path / "stopped"), final(tmp_path / "whole"))
    assert same(final(tmp_path / "validated"), final(tmp_path / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "validated/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation/loss" in line] == [0, 3, 6]
    assert complete_steps(tmp_path / "minutes/checkpoints") == [6, 5, 4, 3, 2, 1]
    train(
        tmp_path / "alone", steps=1, validate_every=4
    )  # of three batches two processes compute two each, one for nothing
    alone = json.loads((tmp_path / "alone/log.jsonl").read_text().splitlines()[0])
    assert [(line["step"], line["validation/images"]) for line in facts[0]["validations"]] == [
        (0, 10),
        (4, 10),
        (6, 10),
    ]
    assert facts[0]["validations"][0]["validation/loss"] == pytest.approx(alone["validation/loss"], rel=1e-6)
    config = toy_config().training
    for rank in range(2):
        assert facts[rank]["rates"] == [rate_at(step, config) for step in range(6)]
        assert facts[rank]["seen_after_resume"] == 2
        assert facts[rank]["stopped"].startswith("SIGTERM: stopped after step 4 of 6; the checkpoint is")
        assert facts[rank]["seen_after_stop"] == 2
        message, seen = facts[rank]["stopped_in_validation"]
        assert message.startswith("SIGTERM: stopped after step 3 of 6; the checkpoint is")
        assert seen == 2 + 3 + 1  # and not the second batch
        assert "step 3: the loss or its gradient is not finite" in facts[rank]["error"]
    assert "image_1_3_0.png" in facts[1]["error"]
    assert (tmp_path / "broken/failure/step_0000003_process_1/batch_0.safetensors").is_file()
    assert complete_steps(tmp_path / "broken/checkpoints") == [2]
    # the names in a checkpoint are the bare model's: one process can go on with it
    train(tmp_path / "whole", steps=8)


# ------------------------------------------------------------------------------------- damaged checkpoints


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "ema.safetensors", "state.json"])
def test_a_truncated_checkpoint_is_passed_over(tmp_path, uninterrupted, caplog, name):
    interrupt(tmp_path, after=5)
    path = tmp_path / "checkpoints/step_0000004" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        assert len(train(tmp_path).seen) == 4
    assert "step_0000004" in caplog.text
    assert "continuing from step 2" in caplog.text
    assert (tmp_path / "checkpoints/step_0000004.damaged").is_dir()
    assert same(final(tmp_path), uninterrupted)


def test_damage_that_keeps_the_size_is_noticed(tmp_path, uninterrupted):
    interrupt(tmp_path, after=5)
    path = tmp_path / "checkpoints/step_0000004/optimizer.bin"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert len(train(tmp_path).seen) == 4
    assert same(final(tmp_path), uninterrupted)


def test_nothing_is_started_afresh_over_unreadable_checkpoints(tmp_path):
    interrupt(tmp_path, after=5)
    for path in tmp_path.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint of this run can be read; choose another `out`"):
        train(tmp_path, learning_rate=0.02)
    assert not (tmp_path / "changes.jsonl").exists()
    train(tmp_path / "other")
    assert complete_steps(tmp_path / "checkpoints") == [4, 2]


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, uninterrupted, name):
    interrupt(tmp_path, after=5)
    folder = tmp_path / "checkpoints/step_0000004"
    torch.save(Bomb(tmp_path / "executed"), folder / name)
    state = json.loads((folder / "state.json").read_text())
    state["files"][name] = (folder / name).stat().st_size
    (folder / "state.json").write_text(json.dumps(state))
    assert len(train(tmp_path).seen) == 4
    assert not (tmp_path / "executed").exists()
    assert same(final(tmp_path), uninterrupted)
    torch.load(folder.with_name("step_0000004.damaged") / name, weights_only=False)
    assert (tmp_path / "executed").exists()  # the bomb was live


# ------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_full_disk_leaves_the_previous_checkpoint(tmp_path, uninterrupted, monkeypatch, error):
    def fail(self, path):
        if "step_0000004" in str(path):
            path.write_bytes(b"half")
            raise error
        return save(self, path)

    save = EMA.save
    with monkeypatch.context() as patch:
        patch.setattr(EMA, "save", fail)
        with pytest.raises(OSError, match=r"disk is full.*/step_0000004.*Free some space") as caught:
            train(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert complete_steps(tmp_path / "checkpoints") == [2]
    assert not list(tmp_path.rglob(".tmp-*"))
    assert len(train(tmp_path).seen) == 4
    assert same(final(tmp_path), uninterrupted)


def test_other_errors_while_saving_are_not_called_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(EMA, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path)
    assert not list(tmp_path.rglob(".tmp-*"))


# ---------------------------------------------------------------------------------- may this run go on?


def test_a_finished_run_is_not_trained_again(tmp_path, caplog):
    train(tmp_path)
    with caplog.at_level(logging.INFO):
        assert train(tmp_path, log_every=1, save_every=1).seen == []
    assert "is complete (6 steps)" in caplog.text


def test_a_finished_run_can_be_extended_and_not_shortened(tmp_path):
    train(tmp_path)
    before = final(tmp_path)
    assert len(train(tmp_path, steps=8).seen) == 2
    assert not same(final(tmp_path), before)
    kept = {name: (tmp_path / name).read_bytes() for name in ("config.yaml", "changes.jsonl")}
    with pytest.raises(ValueError, match=r"already has 8 steps, training.steps asks for 7: ask for at least as many"):
        train(tmp_path, steps=7)
    assert kept == {name: (tmp_path / name).read_bytes() for name in kept}, "what is refused leaves no trace"
    assert train(tmp_path, steps=8).seen == []
    train(tmp_path / "other", steps=7)


def test_a_finished_run_without_checkpoints_is_only_given_back_for_its_own_configuration(tmp_path, caplog):
    train(tmp_path, steps=0)
    assert complete_steps(tmp_path / "checkpoints") == []
    with pytest.raises(ValueError, match=r"width = 8, and width = 4"):
        train(tmp_path, steps=0, width=4)
    with pytest.raises(ValueError, match=r"holds the finished model .* training.resume is false: choose another"):
        train(tmp_path, steps=0, resume=False)
    with caplog.at_level(logging.INFO):
        train(tmp_path, steps=0)
    assert "is complete (0 steps)" in caplog.text


@pytest.mark.parametrize("last", [4, 6])
def test_a_failing_picture_loses_nothing(tmp_path, uninterrupted, monkeypatch, last):
    def fail(self, model, path):
        assert path.name != f"step_{last:07d}.png", "no picture"

    with monkeypatch.context() as patch:
        patch.setattr(toy_job.ToyJob, "preview", fail)
        with pytest.raises(AssertionError, match="no picture"):
            train(tmp_path, preview_every=2)
    assert complete_steps(tmp_path / "checkpoints") == [last, last - 2]
    assert len(train(tmp_path).seen) == 6 - last
    assert same(final(tmp_path), uninterrupted)


def test_resume_false_never_overwrites(tmp_path):
    interrupt(tmp_path, after=3)
    with pytest.raises(ValueError, match=r"training.resume is false: choose another `out`"):
        train(tmp_path, resume=False)
    assert complete_steps(tmp_path / "checkpoints") == [2]


def test_final_is_written_if_only_it_is_missing(tmp_path, uninterrupted):
    train(tmp_path)
    (tmp_path / "final/model.safetensors").unlink()
    assert train(tmp_path).seen == []
    assert same(final(tmp_path), uninterrupted)


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept(tmp_path, keep):
    train(tmp_path, steps=5, save_every=1, keep=keep)
    assert complete_steps(tmp_path / "checkpoints") == [5, 4][:keep]
