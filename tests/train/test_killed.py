"""SIGTERM at random moments over all trainers, caches and `sample`: what is started again ends to the bit as if nothing
had been. In one process: starting a program costs more than these jobs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgtok.cli import main

TINY = Path(__file__).parents[2] / "configs/tiny"
LONGER = ["training.steps=12", "training.save_every=100", "training.preview_every=5", "training.log_every=3"]
TRAINING = [*LONGER, "training.trackers=[]", "data.num_images=64"]
KILLS = 20


@pytest.fixture(autouse=True)
def harmless_outside() -> Iterator[None]:
    """A signal that comes after the job is over must not end the tests."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGTERM, before)


def jobs(root: Path) -> dict[str, list[str]]:
    """Name -> command; each stands on what those before it have made in `whole/`."""
    made = {name: f"{root}/whole/{name}" for name in ("flextok", "vae", "tokens", "latents", "gpt")}
    flextok, vae = f"tokenizer={made['flextok']}/final", f"tokenizer={made['vae']}/final"
    tokens, latents = f"tokens={made['tokens']}", f"latents={made['latents']}"
    generator = [*LONGER, "training.trackers=[]"]
    return {
        "flextok": ["train", "tokenizer", f"{TINY}/flextok.yaml", *TRAINING],
        "vae": ["train", "autoencoder", f"{TINY}/vae.yaml", *TRAINING],
        "vae-gan": ["train", "autoencoder", f"{TINY}/vae-gan.yaml", *TRAINING, "training.num_workers=1"],
        "tokens": ["cache", f"{TINY}/cache.yaml", flextok, "data.num_images=400", "shard_size=150", "batch_size=8"],
        "latents": ["cache", "latents", f"{TINY}/cache-latents.yaml", f"vae={made['vae']}/final", "batch_size=4"],
        "gpt": ["train", "generator", f"{TINY}/gpt.yaml", flextok, tokens, *generator, "training.accumulate=2"],
        "gpt-flextok": ["train", "generator", f"{TINY}/gpt-flextok.yaml", flextok, tokens, *generator],
        "xar": ["train", "generator", f"{TINY}/xar.yaml", vae, latents, *generator],
        "samples": ["sample", f"{made['gpt']}/final", "num=60", "batch_size=4", "exact=true"],
    }


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
def test_killed_at_random_moments(tmp_path, capfd):
    draws, kills = random.Random(os.environ.get("SEED", "0")), 0
    commands = jobs(tmp_path)
    lengths = {}
    for name, command in commands.items():
        started = time.perf_counter()
        assert main([*command, f"out={tmp_path}/whole/{name}"]) == 0, capfd.readouterr().err
        lengths[name] = time.perf_counter() - started
    rounds = 0
    while kills < KILLS:
        rounds += 1
        for name, command in commands.items():
            out = tmp_path / f"killed-{rounds}" / name
            status = 143
            while status == 143:
                signal.setitimer(signal.ITIMER_REAL, draws.uniform(0.01, 1.2 * lengths[name]))
                status = main([*command, f"out={out}"])
                signal.setitimer(signal.ITIMER_REAL, 0)
                kills += status == 143
                assert not list(out.rglob("*.tmp*")), "half a file"
            assert status == 0, capfd.readouterr().err
            whole = tmp_path / "whole" / name
            assert contents(out) == contents(whole), name
            check_log(out)
    capfd.readouterr()
    print(f"{kills} kills in {rounds} round(s)")
