"""What both sides of a benchmark share: a process that answers one command at a time, and its clock.

Each implementation runs in a process of its own, so that its peak memory is its own, and waits while the
other one runs. A command is one line of JSON on standard input, its answer one line on standard output;
arrays travel as `.npy` files. Imports nothing but NumPy and torch, so that it also runs in the peer's environment.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Setup:
    """How a side builds its model."""

    size: str
    """Such as d18-d28: depth of the encoder and of the decoder; width is 64 x depth."""
    device: str
    dtype: Literal["fp32", "bf16"]
    threads: int
    seed: int
    """Of the weights and inputs that `recipe` draws."""
    shapes: dict[str, list[int]]
    """Published name -> shape of each drawn parameter; empty for the peer, which is where they come from."""
    attention: str = "dense"
    """The peer's: "dense" or "flex"."""
    compile: bool = False
    """Ours: compile every block."""

    @property
    def depths(self) -> tuple[int, int]:
        encoder, decoder = self.size.removeprefix("d").split("-d")
        return int(encoder), int(decoder)


@dataclass(frozen=True)
class Case:
    """One thing to time: `encode` to `tokens` ids, or `decode` them in `steps` guided Euler steps."""

    what: Literal["encode", "decode"]
    batch: int
    tokens: int
    steps: int = 1
    guidance: float = 7.5


class Side(Protocol):
    """One implementation with its model."""

    shapes: dict[str, list[int]]

    def prepare(self, case: Case) -> Callable[[], Tensor]:
        """Draws the inputs and returns the call to time: ids (B, k), or latents (B, C, H, W) for `decode`."""
        ...

    def start_from(self, noise: Tensor | None) -> None:
        """Decode from this noise (B, C, H, W) rather than from the side's own; None for its own again."""
        ...


def serve(build: Callable[[Setup], Side]) -> None:
    """Answers commands until standard input ends. Whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = _Worker(build)
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


class _Worker:
    def __init__(self, build: Callable[[Setup], Side]) -> None:
        self.build = build
        self.device = torch.device("cpu")
        self.side: Side | None = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "load":
            return self.load(Setup(**command["setup"]))
        assert self.side is not None, "load comes first"
        noise = command.get("noise")
        self.side.start_from(None if noise is None else torch.from_numpy(np.load(noise)).to(self.device))
        return self.run(Case(**command["case"]), command.get("save"))

    def load(self, setup: Setup) -> dict[str, Any]:
        torch.set_num_threads(setup.threads)
        self.device = torch.device(setup.device)
        self.side = self.build(setup)
        return {"torch": torch.__version__, "shapes": self.side.shapes, "peak": peak_bytes(self.device)}

    def run(self, case: Case, save: str | None) -> dict[str, Any]:
        """Wall and CPU seconds of one call, and the most memory that the process held meanwhile."""
        assert self.side is not None
        call = self.side.prepare(case)
        own_peak = reset_peak(self.device)
        synchronize(self.device)
        cpu, wall = time.process_time(), time.perf_counter()
        out = call()
        synchronize(self.device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        answer = {"wall": wall, "cpu": cpu, "peak": peak_bytes(self.device), "own_peak": own_peak}
        if save is not None:
            np.save(save, out.float().cpu().numpy() if out.is_floating_point() else out.cpu().numpy())
        return answer


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> bool:
    """Starts the peak anew; False where the system cannot, and the peak stays that of the process so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: see proc_pid_clear_refs(5)
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """The most memory held: of the device's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def autocast(setup: Setup) -> torch.autocast:
    """Mixed precision where the setup asks for bf16."""
    return torch.autocast(torch.device(setup.device).type, torch.bfloat16, enabled=setup.dtype == "bf16")
