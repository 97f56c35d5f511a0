"""`python ...` in processes of their own, without the seconds that each would take to import torch.

They are forked from one process that has imported it, which is started for the first of them and ends with ours. What
holds only in a Python that was just started (which modules a program imports, what a hash is) cannot be seen here.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ["accelerate", "imgtok.cli", "imgtok.train.loop", "imgtok.sample.quickstart"]
"""What most of them need. The quickstart's stages are forked from the same process, when its tests say so."""


@dataclass(frozen=True)
class Done:
    """As of `subprocess.run`."""

    returncode: int
    stdout: str
    stderr: str


def python(*words: object, **environment: str) -> Done:
    """`python WORDS`, that is `-c CODE ...`, `-m MODULE ...` or `FILE ...`, in this folder and with as many threads as
    this process has; `environment` is added to ours.
    """
    (done,) = _run(words, [{"OMP_NUM_THREADS": str(torch.get_num_threads())} | environment])
    return done


def two(*words: object, **environment: str) -> list[Done]:
    """The same in both processes of a launch, as torchrun would start them, with one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    launch |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    return _run(words, [launch | {"RANK": rank, "LOCAL_RANK": rank} | environment for rank in "01"])


def _run(words: tuple[object, ...], environments: list[dict[str, str]]) -> list[Done]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        started: list[tuple[ForkServerProcess, Path]] = []
        for number, environment in enumerate(environments):
            told = Path(folder) / str(number)
            everything = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
            process = context.Process(
                target=_python, args=([str(word) for word in words], everything, Path.cwd(), told)
            )
            process.start()
            started.append((process, told))
        try:
            for process, told in started:
                process.join(timeout=300)
                assert process.exitcode is not None, f"it hangs: {told.with_suffix('.err').read_text()[-3000:]}"
        finally:
            for process, _ in started:
                process.kill()
                process.join()
        return [
            Done(int(process.exitcode or 0), told.with_suffix(".out").read_text(), told.with_suffix(".err").read_text())
            for process, told in started
        ]


def _python(words: list[str], environment: Mapping[str, str], folder: Path, told: Path) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(told.with_suffix(suffix), os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # it was imported in another environment
    os.fsync = lambda descriptor: None  # as in conftest.py
    first, *rest = words
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")
