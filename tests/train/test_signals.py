"""SIGTERM, SIGUSR1 and Ctrl-C while a run trains: a checkpoint, one line, a status of its own, and the same end."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_job
from toy_job import final, same, toy_config, train

from imgtok import signals
from imgtok.cli import _report_errors
from imgtok.data.images import ShapesConfig, open_images
from imgtok.data.loaders import eval_loader
from imgtok.train.ema import EMA
from imgtok.train.state import Checkpoints, complete_steps

ROOT = Path(__file__).parents[2]


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """Those of a program in a terminal; pytest itself may have been started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    begun = tmp_path_factory.mktemp("begun")
    for steps in (1, 2):  # resuming once loads all modules; here, unlike elsewhere, a process lives on after a signal
        train(begun, steps=steps, save_every=1)
    out = tmp_path_factory.mktemp("whole")
    train(out)
    return final(out)


def stopped(out: Path, act: Callable[[toy_job.ToyJob], None], **changes) -> toy_job.ToyJob:
    """A run of which `act` is called within each micro-batch, until something stops it."""
    config = toy_config(**changes)

    class Job(toy_job.ToyJob):
        def loss(self, *arguments):
            losses = super().loss(*arguments)
            act(self)
            return losses

    job = Job(config)
    toy_job.fit(job, config.training, out, config)
    return job


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)])
def test_a_signal_saves_says_so_and_leaves_with_its_own_status(tmp_path, uninterrupted, capfd, number, status):
    handler = signal.getsignal(number)

    def act(job: toy_job.ToyJob) -> None:
        if len(job.seen) == 3:
            send(number)

    assert _report_errors(lambda: stopped(tmp_path, act)) == status
    assert signal.getsignal(number) == handler
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "stopped after" in line]
    checkpoint = tmp_path / "checkpoints/step_0000003"
    name = signal.Signals(number).name
    assert line == (
        f"imgtok: {name}: stopped after step 3 of 6; the checkpoint is {checkpoint}; "
        "start the same command again to go on"
    )
    assert complete_steps(tmp_path / "checkpoints") == [3, 2]
    assert len(train(tmp_path).seen) == 3
    assert same(final(tmp_path), uninterrupted)
    # no step is missing in the log: the line at 3 has the mean of step 3 alone, that at 4 of step 4
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 3, 4, 6]


def test_a_second_interrupt_leaves_at_once(tmp_path, uninterrupted, capfd):
    def act(job: toy_job.ToyJob) -> None:
        if len(job.seen) == 4:
            send(signal.SIGINT)
            send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        stopped(tmp_path, act)
    assert not isinstance(caught.value, signals.Stopped)
    said = capfd.readouterr().err
    assert said.index("Ctrl-C again leaves at once") < said.index("leaving at once; what was saved before is whole")
    assert complete_steps(tmp_path / "checkpoints") == [2]
    train(tmp_path)
    assert same(final(tmp_path), uninterrupted)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130), (None, 2)]
)
@pytest.mark.parametrize("lost", [False, True], ids=["turned", "lost"])
def test_what_libraries_make_of_a_signal_is_not_believed(number, status, lost, capfd):
    """safetensors turns what a handler raises into a ValueError of its own; others lose it."""

    def work() -> None:
        with signals.raised():
            try:
                if number is not None:
                    send(number)
            except KeyboardInterrupt:
                if lost:
                    return
            raise ValueError("could not determine the shape")

    assert _report_errors(work) == status
    assert ("could not" in capfd.readouterr().err) == (number is None)
    with signals.deferred() as requests:
        assert not requests.number


def test_a_signal_that_was_lost_is_known_to_the_run(tmp_path):
    def work() -> None:
        with signals.raised():
            with contextlib.suppress(signals.Stopped):
                send(signal.SIGTERM)
            train(tmp_path)

    with pytest.raises(signals.Stopped, match="stopped after step 0 of 6; nothing is lost"):
        work()


def test_a_signal_while_a_checkpoint_is_read_does_not_make_it_a_damaged_one(tmp_path, uninterrupted, monkeypatch):
    """A library in another language makes an error of what a handler raises."""

    def read(self, path):
        try:
            send(signal.SIGTERM)
        except signals.Stopped as stop:
            raise ValueError("could not determine the shape") from stop
        return before(self, path)

    before = Checkpoints._read
    train(tmp_path, steps=4, schedule="constant", final_rate=0.0)
    with monkeypatch.context() as patch, signals.raised():
        patch.setattr(Checkpoints, "_read", read)
        with pytest.raises(signals.Stopped, match=r"stopped after step 4 of 6; the checkpoint is .*step_0000004;"):
            train(tmp_path)
    assert complete_steps(tmp_path / "checkpoints") == [4, 2]
    assert not list(tmp_path.rglob("*.damaged"))


def test_a_second_interrupt_while_a_checkpoint_is_written_leaves_no_half_of_it(tmp_path, uninterrupted, monkeypatch):
    def write(self, path):
        before(self, path)
        send(signal.SIGINT)
        send(signal.SIGINT)

    before = EMA.save
    with monkeypatch.context() as patch:
        patch.setattr(EMA, "save", write)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert complete_steps(tmp_path / "checkpoints") == []
    assert not list(tmp_path.rglob(".tmp-*"))
    train(tmp_path)
    assert same(final(tmp_path), uninterrupted)


SLURM = """
srun() { touch started; return $STATUS; }
scontrol() { echo "$@"; }
SLURM_JOB_ID=7
"""


@pytest.mark.parametrize(("status", "said", "ends"), [(138, "requeue 7\n", 0), (0, "", 0), (2, "", 2), (143, "", 143)])
def test_the_documentations_slurm_script(tmp_path, status, said, ends):
    """What imgtok leaves with is in the tests above; here is what the script makes of it."""
    (script,) = re.findall(r"```sh\n(#!/bin/bash.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    assert "#SBATCH --signal=USR1@" in script
    command = ["bash", "-c", SLURM.replace("$STATUS", str(status)) + script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == (said, ends)
    assert (tmp_path / "started").exists()


def test_in_a_launch_one_interrupt_may_come_twice(monkeypatch):
    """From the terminal and from torchrun. Later it is another one."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with signals.deferred() as requests:
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert requests.number == signal.SIGINT
        monkeypatch.setattr(time, "monotonic", lambda: 1e9)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize(("step", "saved"), [(0, []), (3, [3, 2]), (6, [6, 4])])
def test_a_signal_ends_a_picture_which_is_drawn_when_the_run_goes_on(tmp_path, uninterrupted, monkeypatch, step, saved):
    def slow(self, model, path):
        if path.name == f"step_{step:07d}.png":
            send(signal.SIGTERM)
            path.write_bytes(b"never reached")
        preview(self, model, path)

    preview = toy_job.ToyJob.preview
    with monkeypatch.context() as patch:
        patch.setattr(toy_job.ToyJob, "preview", slow)
        with pytest.raises(signals.Stopped, match=f"SIGTERM: stopped after step {step} of 6"):
            train(tmp_path)
    assert complete_steps(tmp_path / "checkpoints") == saved
    assert not (tmp_path / f"samples/step_{step:07d}.png").exists()
    train(tmp_path)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        f"step_{done:07d}.png" for done in (0, 3, 6)
    ]
    assert same(final(tmp_path), uninterrupted)


def test_save_minutes(tmp_path):
    train(tmp_path / "always", save_every=100, save_minutes=1e-9, keep=9)
    assert complete_steps(tmp_path / "always/checkpoints") == [6, 5, 4, 3, 2, 1]
    train(tmp_path / "never", save_every=100, save_minutes=60.0)
    assert complete_steps(tmp_path / "never/checkpoints") == [6]


def test_what_is_ignored_stays_ignored():
    """As under nohup, or for SIGINT in a shell's background jobs."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with signals.raised(), signals.deferred() as requests:
            send(signal.SIGUSR1)
        assert not requests.number
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_thread_trains_without_handlers(tmp_path):
    thread = threading.Thread(target=train, args=(tmp_path,))
    thread.start()
    thread.join()
    assert len(final(tmp_path)) > 1


# ---------------------------------------------------------------------------------------------- data workers


def sent_by_another(process: int) -> None:
    """Signals from another process than the parent, as a shell or a scheduler sends them."""
    for number in signals.SIGNALS:
        if os.fork() == 0:
            os.kill(process, number)
            os._exit(0)
        os.wait()


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_helpers_of_every_start_method_obey_who_started_them(method):
    """The parent of a helper that a server has forked is the server. Without torch, of which nothing here depends."""
    with signals.held_back():
        pool = ProcessPoolExecutor(1, multiprocessing.get_context(method), signals.leave_to_parent)
        helper = pool.submit(os.getpid).result()
    sent_by_another(helper)
    time.sleep(0.05)
    assert pool.submit(os.getpid).result() == helper
    (process,) = pool._processes.values()
    process.terminate()
    process.join(5)
    assert process.exitcode is not None
    pool.shutdown()


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_survive_what_their_group_is_sent_and_obey_their_parent(method, monkeypatch):
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
    multiprocessing.set_start_method(method)
    source = open_images(ShapesConfig(num_images=12), 8)
    batches = eval_loader(source, 2, num_workers=1)
    seen = [next(batches).indices]
    (worker,) = multiprocessing.active_children()
    sent_by_another(worker.pid)
    seen += [batch.indices for batch in batches]
    assert seen == [(index, index + 1) for index in range(0, 12, 2)]
    batches = eval_loader(source, 2, num_workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode is not None
    with contextlib.suppress(RuntimeError):
        batches.close()


# --------------------------------------------------------------------------------------------- random moments


@contextlib.contextmanager
def killed_after(seconds: float) -> Iterator[None]:
    """SIGTERM after so many seconds, unless the block is over by then."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGALRM, lambda *_: send(signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)


def test_killed_at_random_moments_again_and_again(tmp_path, uninterrupted):
    """One run that is killed until it is through; each start gets a little longer, so that it comes to an end."""
    draws, starts = random.Random(0), 0
    done = False
    while not done:
        starts += 1
        with killed_after(draws.uniform(0, 0.03 * starts)), contextlib.suppress(signals.Stopped), signals.raised():
            train(tmp_path, save_every=100)
            done = True
    assert starts > 2
    assert same(final(tmp_path), uninterrupted)
    assert len(list((tmp_path / "samples").iterdir())) == 3
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 6
    assert np.all(
        np.diff([json.loads(line)["seconds"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]) > 0
    )
