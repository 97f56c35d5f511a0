"""SIGTERM at random moments over all trainers, caches and `sample`: what is started again ends to the bit as if nothing
had been. In one process, where starting a program would cost more than these jobs; and once in two processes with
workers, as torchrun starts them.

SEED=1 chooses other moments. What is printed (pytest -s) says where the signals came.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from tiny_t5 import tiny_t5

from imgtok.cli import main

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/tiny"
STEPS = ["training.steps=12", "training.save_every=5", "training.preview_every=4", "training.log_every=3"]
GENERATOR = [*STEPS, "training.trackers=[]"]
IMAGES = [*GENERATOR, "data.num_images=64"]
KILLS = 20
PLACES = {
    "Checkpoints.save": "saving",
    "Trainer.finish": "saving",
    "Pieces.add": "saving",
    "Pieces.read": "saving",
    "write_shard": "saving",
    "save_png": "saving",
    "Trainer.preview": "drawing",
    "Trainer.step": "in a step",
    "encode_rows": "in a step",
    "Pipeline.images_at": "in a step",
    "Trainer.__init__": "resuming",
    "Trainer.run": "between steps",
    "write_missing": "between steps",
    "draw_images": "between steps",
}
"""Function at work when the signal comes -> what that is; the outermost that is in the table decides, but saving."""

met: Counter[str] = Counter()


def place(frame: FrameType | None) -> str:
    """Where the program is."""
    names = []
    while frame is not None:
        names.append(frame.f_code.co_qualname)
        frame = frame.f_back
    found = [PLACES[name] for name in names if name in PLACES]
    return next((name for name in found if name == "saving"), found[0] if found else "starting or ending")


@pytest.fixture
def signals_that_count() -> Iterator[None]:
    """A signal that comes after the job is over must not end the tests."""

    def ring(number: int, frame: FrameType | None) -> None:
        met[place(frame)] += 1
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGALRM, ring)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGTERM, before)


def jobs(root: Path) -> dict[str, list[str]]:
    """Name -> command; each stands on what those before it have made in `whole/`."""
    made = {name: f"{root}/whole/{name}" for name in ("flextok", "vae", "tokens", "latents", "gpt")}
    flextok, vae = f"tokenizer={made['flextok']}/final", f"tokenizer={made['vae']}/final"
    tokens, latents = f"tokens={made['tokens']}", f"latents={made['latents']}"
    text = [str(tiny_t5(root / "t5")), "max_length=12", "batch_size=4", "shard_size=40", "data.num_images=90"]
    return {
        "flextok": ["train", "tokenizer", f"{TINY}/flextok.yaml", *IMAGES],
        "vae": ["train", "autoencoder", f"{TINY}/vae.yaml", *IMAGES],
        "vae-gan": ["train", "autoencoder", f"{TINY}/vae-gan.yaml", *IMAGES, "training.num_workers=1"],
        "tokens": ["cache", f"{TINY}/cache.yaml", flextok, "data.num_images=400", "shard_size=150", "batch_size=8"],
        "latents": ["cache", "latents", f"{TINY}/cache-latents.yaml", f"vae={made['vae']}/final", "batch_size=4",
                    "num_workers=1"],
        "text": ["cache", "text", *text, "data.kind=shapes", "data.mode=text"],
        "gpt": ["train", "generator", f"{TINY}/gpt.yaml", flextok, tokens, *GENERATOR, "training.accumulate=2"],
        "gpt-flextok": ["train", "generator", f"{TINY}/gpt-flextok.yaml", flextok, tokens, *GENERATOR],
        "xar": ["train", "generator", f"{TINY}/xar.yaml", vae, latents, *GENERATOR],
        "samples": ["sample", f"{made['gpt']}/final", "num=60", "batch_size=4", "exact=true"],
    }  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """What a job leaves: of a run its model, its pictures and where the log has lines."""
    if not (folder / "final").is_dir():
        return {path.name: path.read_bytes() for path in folder.iterdir()}
    found = {f"final/{name}": (folder / "final" / name).read_bytes() for name in ("model.safetensors", "config.json")}
    return found | {f"samples/{path.name}": path.read_bytes() for path in (folder / "samples").iterdir()}


def check_log(folder: Path) -> None:
    path = folder / "log.jsonl"
    if path.is_file():
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == sorted(set(steps))
        assert {0, 3, 6, 9, 12} <= set(steps)


@pytest.mark.slow
@pytest.mark.usefixtures("signals_that_count")
def test_killed_at_random_moments(tmp_path, capfd):
    seed = os.environ.get("SEED", "0")
    draws, kills = random.Random(seed), Counter[str]()
    commands = jobs(tmp_path)
    assert main([*commands["flextok"], "training.steps=0", f"out={tmp_path}/first"]) == 0  # imports take their time
    lengths = {}
    for name, command in commands.items():
        started = time.perf_counter()
        assert main([*command, f"out={tmp_path}/whole/{name}"]) == 0, capfd.readouterr().err
        lengths[name] = time.perf_counter() - started
    rounds = 0
    while due := [name for name in commands if kills.total() < KILLS or not kills[name]]:  # each job at least once
        rounds += 1
        for name in due:
            command = commands[name]
            out = tmp_path / f"killed-{rounds}" / name
            status = 143
            while status == 143:
                signal.setitimer(signal.ITIMER_REAL, draws.uniform(0.01, 1.2 * lengths[name]))
                status = main([*command, f"out={out}"])
                signal.setitimer(signal.ITIMER_REAL, 0)
                kills[name] += status == 143
                assert not list(out.rglob("*.tmp*")), "half a file"
            assert status == 0, f"{name}: {status}\n{capfd.readouterr().err[-3000:]}"
            assert contents(out) == contents(tmp_path / "whole" / name), name
            check_log(out)
    capfd.readouterr()
    print(f"\nseed {seed}: {kills.total()} kills in {rounds} round(s): {dict(kills)}; they came {dict(met)}")


@pytest.mark.slow
def test_two_processes_with_workers_are_killed(tmp_path):
    """torchrun passes the signal on to both. It says 1 of what ends by a signal, whatever that is."""
    launch = [sys.executable, *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = ["-m", "imgtok.train.autoencoder", f"{TINY}/vae.yaml", *IMAGES, "training.num_workers=1"]
    draws = random.Random(os.environ.get("SEED", "0"))

    def start(out: Path, begun: Path | None = None) -> int:
        """Runs, and is killed some time after the file `begun` is there."""
        with (tmp_path / "log").open("a") as log:
            program = subprocess.Popen([*launch, *command, f"out={out}"], cwd=ROOT, env=environment, stderr=log)
            if begun is not None:
                while not begun.exists():
                    assert program.poll() is None, (tmp_path / "log").read_text()[-3000:]
                    time.sleep(0.01)
                time.sleep(draws.uniform(0, 0.5))
                program.terminate()
            return program.wait(timeout=300)

    out = tmp_path / "killed"
    assert start(tmp_path / "whole") == 0, (tmp_path / "log").read_text()[-3000:]
    status = start(out, out / "samples/step_0000004.png")
    there = sorted(path.name for path in out.glob("checkpoints/*"))
    assert start(out) == 0, (tmp_path / "log").read_text()[-3000:]
    assert contents(out) == contents(tmp_path / "whole")
    check_log(out)
    print(f"\nkilled: exit status {status}, checkpoints {there}")
