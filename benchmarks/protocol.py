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
from collections.abc import Callable, Mapping
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
    """Size of the model, as the benchmark's options name it."""
    device: str
    dtype: Literal["fp32", "bf16", "fp16"]
    threads: int
    seed: int
    """Seed of the weights and inputs that `recipe` draws."""
    shapes: dict[str, list[int]]
    """Published name -> shape of each drawn parameter; empty for the peer, which is where they come from."""
    attention: str = "dense"
    """Attention in FlexTok's peer: "dense" or "flex"."""
    compile: bool = False
    """Ours: compile every block."""


class Side(Protocol):
    """One implementation with its model. A case is a dataclass of the benchmark's own (`flextok_case`, `xar_case`)."""

    shapes: dict[str, list[int]]

    def prepare(self, case: Any) -> Callable[[], Tensor]:
        """Draws the inputs and returns the call to time, whose output is what the two sides are compared by."""
        ...

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        """Take these random numbers in place of the side's own; empty for its own again."""
        ...


def serve(build: Callable[[Setup], Side], case_type: Callable[..., Any]) -> None:
    """Answers commands until standard input ends. Whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = _Worker(build, case_type)
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


class _Worker:
    def __init__(self, build: Callable[[Setup], Side], case_type: Callable[..., Any]) -> None:
        self.build = build
        self.case_type = case_type
        self.device = torch.device("cpu")
        self.side: Side | None = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "load":
            return self.load(Setup(**command["setup"]))
        assert self.side is not None, "load comes first"
        path = command.get("draws")
        arrays = {} if path is None else dict(np.load(path))
        self.side.start_from({name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()})
        return self.run(self.case_type(**command["case"]), command.get("save"))

    def load(self, setup: Setup) -> dict[str, Any]:
        torch.set_num_threads(setup.threads)
        self.device = torch.device(setup.device)
        self.side = self.build(setup)
        return {"torch": torch.__version__, "shapes": self.side.shapes, "peak": peak_bytes(self.device)}

    def run(self, case: Any, save: str | None) -> dict[str, Any]:
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
    """Mixed precision where the setup asks for bf16 or fp16."""
    dtype = torch.float16 if setup.dtype == "fp16" else torch.bfloat16
    return torch.autocast(torch.device(setup.device).type, dtype, enabled=setup.dtype != "fp32")
