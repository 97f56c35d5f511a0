"""The program's half of a benchmark against published code: two worker processes, calls in turn, the table.

A benchmark (`flextok.py`, `xar.py`) says which cases there are, what each side's worker file is, how outputs are
compared and what ratio is wanted. What is here does not know what is timed: it starts the two processes (`protocol.py`
is their half), loads the same weights on both, compares the first call of every case, lets the sides take
turns, one call each a round, every second round in the other order, and prints medians and ratios. A ratio is
of the two calls of one round, so that what slows both down cancels out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import Setup

HERE = Path(__file__).resolve().parent
SHARED = [HERE.parent / "tests" / "parity", HERE]  # where `recipe` and `protocol` are

# ---------------------------------------------------------------- the two processes


class Worker:
    """A process that runs one implementation; see `protocol.py`."""

    def __init__(self, name: str, command: list[str], search_path: list[Path]) -> None:
        self.name = name
        paths = [*map(str, search_path), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command and its answer; an error of the worker ends the program."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the empty answer below says so
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended; its last words are above"}
        if "error" in answer:
            raise SystemExit(f"{self.name} in {shlex.join(map(str, self.process.args))}: {answer['error']}")
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def both(name: str, arguments: argparse.Namespace, peer_name: str | None = None) -> Iterator[tuple[Worker, Worker]]:
    """Ours and the peer's process, `workers/<name>_ours.py` and `_peer.py` (or `<peer_name>.py`), closed at the end."""
    peer_file = f"{peer_name or f'{name}_peer'}.py"
    ours = Worker("ours", [sys.executable, str(HERE / "workers" / f"{name}_ours.py")], [HERE.parent, *SHARED])
    checkout = [arguments.peer] if arguments.peer else []
    peer = Worker("the peer", [arguments.python, str(HERE / "workers" / peer_file)], [*checkout, *SHARED])
    try:
        yield ours, peer
    finally:
        ours.close()
        peer.close()


# ---------------------------------------------------------------- one case


@dataclass(frozen=True)
class Call:
    """One timed call."""

    wall: float
    cpu: float
    peak: int
    own_peak: bool
    """`peak` is of this call, not of the process so far."""


@dataclass(frozen=True)
class Row:
    """One case: its calls, round by round, and how far the two outputs are apart."""

    size: str
    case: Any
    """A dataclass of the benchmark's own, with a `batch`."""
    ours: Sequence[Call] = ()
    peer: Sequence[Call] = ()
    difference: str = ""
    what: str = ""
    """The case in words."""
    goal: float | None = None
    """The least ratio that the project asks for; None if none."""
    memory_goal: float = 1.0
    """The largest share of the peer's memory that it asks for."""

    def ratios(self, field: str = "wall") -> list[float]:
        """Peer / ours of each round."""
        return [getattr(b, field) / getattr(a, field) for a, b in zip(self.ours, self.peer, strict=True)]


def measure(ours: Worker, peer: Worker, case: Any, rounds: int) -> tuple[list[Call], list[Call]]:
    """Calls in turn: ours first in even rounds, the peer first in odd ones."""
    calls: dict[str, list[Call]] = {ours.name: [], peer.name: []}
    for number in range(rounds):
        for worker in (ours, peer) if number % 2 == 0 else (peer, ours):
            calls[worker.name].append(Call(**worker.ask("run", case=asdict(case))))
    return calls[ours.name], calls[peer.name]


def apart(ours: np.ndarray, peer: np.ndarray) -> tuple[str, bool]:
    """Largest and root-mean-square difference in units of the peer's, and whether the largest is at most 1e-4."""
    largest = float(np.abs(ours - peer).max() / np.abs(peer).max())
    spread = float(np.sqrt(np.square(ours - peer).mean() / np.square(peer).mean()))
    return f"{largest:.1e} (rms {spread:.1e})", largest <= 1e-4


# ---------------------------------------------------------------- the report


def table(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    """The rows in Markdown: medians of seconds and their range, least / median / most of the ratios, largest peaks."""
    titles = (
        "model",
        "what",
        "batch",
        "ours s",
        "peer s",
        "peer / ours: min, median, max",
        "of CPU seconds",
        "images/s ours, peer",
        "peak GB ours, peer",
        "apart by",
        "goal",
    )
    lines = ["| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)]
    return "\n".join(lines + [line(row, arguments) for row in rows])


def line(row: Row, arguments: argparse.Namespace) -> str:
    """One row of the table."""
    batch = row.case.batch
    ours, peer = (statistics.median(call.wall for call in calls) for calls in (row.ours, row.peer))
    ours_peak, peer_peak = (max(call.peak for call in calls) for calls in (row.ours, row.peer))
    ratios = row.ratios()
    reached = "" if row.goal is None else f"{row.goal}: {'yes' if statistics.median(ratios) >= row.goal else 'no'}"
    aim, fits = "" if row.memory_goal == 1 else f" {row.memory_goal}", ours_peak <= row.memory_goal * peer_peak
    memory = f"memory{aim}: {'yes' if fits else 'no'}" if aim or not fits else ""
    cells = (
        row.size,
        row.what,
        str(batch),
        seconds(row.ours),
        seconds(row.peer),
        f"{min(ratios):.2f}, **{statistics.median(ratios):.2f}**, {max(ratios):.2f}",
        "" if arguments.device != "cpu" else f"{statistics.median(row.ratios('cpu')):.2f}",
        f"{batch / ours:.3g}, {batch / peer:.3g}",
        f"{ours_peak / 1e9:.2f}, {peer_peak / 1e9:.2f}",
        row.difference,
        "; ".join(filter(None, (reached, memory))),
    )
    return "| " + " | ".join(cells) + " |"


def seconds(calls: Sequence[Call]) -> str:
    """Median, least and most of the wall seconds."""
    walls = [call.wall for call in calls]
    return f"{statistics.median(walls):.3f} ({min(walls):.3f}–{max(walls):.3f})"


def machine(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    about = {"system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
    if arguments.device == "cpu":
        about["cpu"] = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            fields = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
            fields = {name.strip(): value.strip() for name, value in fields.items()}
            about["cpu"] = fields.get("model name", about["cpu"])
            flags = fields.get("flags", "").split()
            wide = [flag for flag in flags if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")]
            about["vectors"] = " ".join(wide)
        about["threads"] = arguments.threads
        about["load"] = [round(load, 1) for load in os.getloadavg()]
    else:
        about["gpu"] = torch.cuda.get_device_name(arguments.device)
    return about


# ---------------------------------------------------------------- the program


def make_parser(description: str | None, repository: str, *, needs_checkout: bool = True) -> argparse.ArgumentParser:
    """What every benchmark of this kind is told; without `needs_checkout` it says itself when `--peer` is missing."""
    first, _, rest = (description or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peer", type=Path, required=needs_checkout, metavar="PATH", help=f"a checkout of github.com/{repository}")
    add("--python", default=sys.executable, metavar="FILE", help="interpreter with the peer's requirements (ours)")
    add("--rounds", type=int, default=5, help="timed pairs of calls for each row (5)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--threads", type=int, default=2, help="CPU threads of each side (2)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of ours (fp32)")
    add("--compile", action="store_true", help="compile the blocks of ours")
    add("--seed", type=int, default=0, help="of weights and inputs (0)")
    add("--json", type=Path, metavar="FILE", help="write every call here as well")
    return parser


Compare = Callable[[Worker, Worker, Any, Path], tuple[str, bool]]
"""Runs both sides on a case's input, and says how far they are apart and whether that is near enough; the folder is for
arrays."""


def setup_of(size: str, arguments: argparse.Namespace) -> Setup:
    """How a side builds its model of one size; the peer at the precision that is meant for it."""
    return Setup(
        size=size,
        device=arguments.device,
        dtype=arguments.peer_dtype,
        threads=arguments.threads,
        seed=arguments.seed,
        shapes={},
    )


def run_size(
    name: str,
    setup: Setup,
    cases: Iterable[Row],
    compare: Compare,
    needs: str,
    arguments: argparse.Namespace,
    peer_name: str | None = None,
) -> tuple[list[Row], dict[str, Any]]:
    """Every case of one size, and what the processes said of themselves. `peer_name` is as for `both`.

    `setup` is the peer's; ours has the same, with the shapes of the parameters, which come from the peer. `cases` are
    rows with nothing measured yet. Ends the program where two sides in fp32 do not do the same.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder, both(name, arguments, peer_name) as (ours, peer):
        try:
            theirs = peer.ask("load", setup=asdict(setup))
        except SystemExit as error:
            raise SystemExit(f"{error}\nThe peer needs:\n{needs}") from None
        setup = replace(setup, dtype=arguments.dtype, shapes=theirs.pop("shapes"), compile=arguments.compile)
        loaded = {"ours": ours.ask("load", setup=asdict(setup)), "peer": theirs}
        del loaded["ours"]["shapes"]
        exact = arguments.dtype == arguments.peer_dtype == "fp32"
        for row in cases:
            difference, good = compare(ours, peer, row.case, Path(folder))
            if exact and not good:
                raise SystemExit(f"{row.case}: ours and the peer differ by {difference}; nothing was timed")
            calls = measure(ours, peer, row.case, arguments.rounds)
            rows.append(replace(row, ours=calls[0], peer=calls[1], difference=difference))
            print(line(rows[-1], arguments), file=sys.stderr, flush=True)
    return rows, loaded


def report(run: Callable[[str], tuple[list[Row], dict[str, Any]]], arguments: argparse.Namespace, peer: str) -> None:
    """Runs every size and prints what came of it; `peer` says how the peer was run."""
    about = machine(arguments)
    rows, loaded = [], {}
    for size in arguments.sizes:
        size_rows, loaded[size] = run(size)
        rows += size_rows
    if arguments.device == "cpu":
        about["load at the end"] = [round(load, 1) for load in os.getloadavg()]
    about["ours"] = f"{arguments.dtype}{', compiled' if arguments.compile else ''}"
    about["peer"] = peer
    print(", ".join(f"{name}: {value}" for name, value in about.items()), end="\n\n")
    print(table(rows, arguments))
    if arguments.json:
        content = {"machine": about, "loaded": loaded, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
