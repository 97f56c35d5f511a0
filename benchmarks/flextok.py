"""Our FlexTok against the published code, in one interleaved run with the same weights.

    git clone https://github.com/apple/ml-flextok PATH
    python -m pip install hydra-core mup
    python benchmarks/flextok.py --peer PATH

Two processes, one per implementation, build the same model from the same drawn weights; the first call of
every case is compared (same ids; same velocity, within 1e-4 of its scale) and serves as warm-up. Then they
take turns, one call each a round, every second round in the other order, and a ratio is of the two calls
of one round. Prints a Markdown table; the goals in its last column are measured, not asserted.

Encoding takes latents and gives ids, decoding takes ids and gives latents after `--steps` guided Euler
steps (projected guidance, two passes a step): the VAE is the same for both and is left out. The peer always
computes all 256 tokens and keeps the first ones, as its page says.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import Case, Setup

from imgtok import randomness

HERE = Path(__file__).resolve().parent
SHARED = [HERE.parent / "tests" / "parity", HERE]  # where `recipe` and `protocol` are

NEEDS = """\
    git clone https://github.com/apple/ml-flextok {path}
    {python} -m pip install hydra-core mup torchvision diffusers einops huggingface_hub safetensors
Its code is under Apple's sample code licence and is never copied into this repository."""


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
def both(arguments: argparse.Namespace) -> Iterator[tuple[Worker, Worker]]:
    """Ours and the peer's process, closed at the end."""
    ours = Worker("ours", [sys.executable, str(HERE / "workers" / "flextok_ours.py")], [HERE.parent, *SHARED])
    peer = Worker("the peer", [arguments.python, str(HERE / "workers" / "flextok_peer.py")], [arguments.peer, *SHARED])
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
    case: Case
    ours: list[Call]
    peer: list[Call]
    difference: str

    def ratios(self, field: str = "wall") -> list[float]:
        """Peer / ours of each round."""
        return [getattr(b, field) / getattr(a, field) for a, b in zip(self.ours, self.peer, strict=True)]


def measure(ours: Worker, peer: Worker, case: Case, rounds: int) -> tuple[list[Call], list[Call]]:
    """Calls in turn: ours first in even rounds, the peer first in odd ones."""
    calls: dict[str, list[Call]] = {ours.name: [], peer.name: []}
    for number in range(rounds):
        for worker in (ours, peer) if number % 2 == 0 else (peer, ours):
            calls[worker.name].append(Call(**worker.ask("run", case=asdict(case))))
    return calls[ours.name], calls[peer.name]


def compare(ours: Worker, peer: Worker, case: Case, folder: Path, *, exact: bool) -> str:
    """Runs both on the same input, the first Euler step alone when decoding, and says how far they are apart.

    With `exact`, ends the program if ids differ or velocities by more than 1e-4 of their scale.
    """
    case = replace(case, steps=1)
    noise_path = None
    if case.what == "decode":
        noise_path = str(folder / "noise.npy")
        noise = randomness.normal(0, range(case.batch), (16, 32, 32), "flextok").numpy()
        np.save(noise_path, noise)
    ours.ask("run", case=asdict(case), save=str(folder / "ours.npy"))
    peer.ask("run", case=asdict(case), save=str(folder / "peer.npy"), noise=noise_path)
    a, b = np.load(folder / "ours.npy"), np.load(folder / "peer.npy")
    if case.what == "encode":
        different = int((a != b).sum())
        said, good = f"{different} of {a.size} ids", different == 0
    else:
        a, b = noise - a, noise - b  # one step of size 1: what was subtracted is the velocity
        largest = float(np.abs(a - b).max() / np.abs(b).max())
        spread = float(np.sqrt(np.square(a - b).mean() / np.square(b).mean()))
        said, good = f"{largest:.1e} (rms {spread:.1e})", largest <= 1e-4
    if exact and not good:
        raise SystemExit(f"{case}: ours and the peer differ by {said}; nothing was timed")
    return said


# ---------------------------------------------------------------- the report


def goal(size: str, case: Case, device: str, dtype: str) -> float | None:
    """The least ratio that the project asks for: of d12-d12 on a CPU, of decoding 16 tokens on a GPU; None if none."""
    if device != "cpu":
        return 3.0 if case.what == "decode" and case.tokens == 16 else None
    if size != "d12-d12":
        return None
    if dtype == "bf16":
        return 4.0
    if case.what == "decode":
        return {16: 2.2, 256: 1.4}.get(case.tokens)
    if case.tokens == 16:
        return 1.8
    return {1: 1.3, 8: 2.0}.get(case.batch)


def table(rows: list[Row], arguments: argparse.Namespace) -> str:
    """The rows in Markdown: medians of seconds, least / median / most of the ratios, largest peaks."""
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
    case = row.case
    ours, peer = (statistics.median(call.wall for call in calls) for calls in (row.ours, row.peer))
    ours_peak, peer_peak = (max(call.peak for call in calls) for calls in (row.ours, row.peer))
    ratios = row.ratios()
    least = goal(row.size, case, arguments.device, arguments.dtype)
    reached = "" if least is None else f"{least}: {'yes' if statistics.median(ratios) >= least else 'no'}"
    memory = "" if ours_peak <= peer_peak else "memory: no"
    what = f"encode, {case.tokens} ids" if case.what == "encode" else f"{case.steps} steps, {case.tokens} ids"
    cells = (
        row.size,
        what,
        str(case.batch),
        f"{ours:.3f}",
        f"{peer:.3f}",
        f"{min(ratios):.2f}, **{statistics.median(ratios):.2f}**, {max(ratios):.2f}",
        "" if arguments.device != "cpu" else f"{statistics.median(row.ratios('cpu')):.2f}",
        f"{case.batch / ours:.3g}, {case.batch / peer:.3g}",
        f"{ours_peak / 1e9:.2f}, {peer_peak / 1e9:.2f}",
        row.difference,
        "; ".join(filter(None, (reached, memory))),
    )
    return "| " + " | ".join(cells) + " |"


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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peer", type=Path, required=True, metavar="PATH", help="a checkout of github.com/apple/ml-flextok")
    add("--python", default=sys.executable, metavar="FILE", help="interpreter with the peer's requirements (ours)")
    add("--sizes", nargs="+", default=["d12-d12"], metavar="dE-dD", help="depths, such as d12-d12 d18-d18 d18-d28")
    add("--what", nargs="+", choices=("encode", "decode"), default=["encode", "decode"])
    add("--tokens", nargs="+", type=int, default=[256, 16], metavar="K", help="tokens kept (256 16)")
    add("--batch", nargs="+", type=int, default=[1, 8], metavar="B", help="images a call (1 8)")
    add("--steps", type=int, default=1, help="guided Euler steps of one decoding (1)")
    add("--guidance", type=float, default=7.5, help="guidance scale; 1 runs no second pass (7.5)")
    add("--rounds", type=int, default=5, help="timed pairs of calls for each row (5)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--threads", type=int, default=2, help="CPU threads of each side (2)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of ours (fp32)")
    add(
        "--peer-dtype",
        choices=("fp32", "bf16"),
        help="precision of the peer; by default that of ours on a GPU, and fp32 on a CPU, where its own "
        "`get_bf16_context` never turns bf16 on",
    )
    add(
        "--peer-attention",
        choices=("dense", "flex"),
        help="the peer's path: materialised masks and scaled_dot_product_attention, or its default, compiled "
        "flex_attention (dense on a CPU, flex on a GPU)",
    )
    add("--compile", action="store_true", help="compile the blocks of ours")
    add("--seed", type=int, default=0, help="of weights, latents and ids (0)")
    add("--json", type=Path, metavar="FILE", help="write every call here as well")
    arguments = parser.parse_args(argv)
    on_cpu = arguments.device == "cpu"
    arguments.peer = arguments.peer.resolve()
    arguments.peer_dtype = arguments.peer_dtype or ("fp32" if on_cpu else arguments.dtype)
    arguments.peer_attention = arguments.peer_attention or ("dense" if on_cpu else "flex")
    if not (arguments.peer / "flextok" / "flextok_wrapper.py").exists():
        parser.exit(2, f"{arguments.peer} is no checkout of ml-flextok. It comes from:\n{needs(arguments)}\n")
    return arguments


def needs(arguments: argparse.Namespace) -> str:
    return NEEDS.format(path=arguments.peer, python=arguments.python)


def run_size(size: str, arguments: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Every case of one size, and what the processes said of themselves."""
    setup = Setup(
        size=size,
        device=arguments.device,
        dtype=arguments.peer_dtype,
        threads=arguments.threads,
        seed=arguments.seed,
        shapes={},
        attention=arguments.peer_attention,
    )
    rows = []
    with both(arguments) as (ours, peer):
        try:
            theirs = peer.ask("load", setup=asdict(setup))
        except SystemExit as error:
            raise SystemExit(f"{error}\nThe peer needs:\n{needs(arguments)}") from None
        setup = replace(setup, dtype=arguments.dtype, shapes=theirs.pop("shapes"), compile=arguments.compile)
        loaded = {"ours": ours.ask("load", setup=asdict(setup)), "peer": theirs}
        del loaded["ours"]["shapes"]
        exact = arguments.dtype == arguments.peer_dtype == "fp32"
        for batch in arguments.batch:
            for what in arguments.what:
                for tokens in arguments.tokens:
                    case = Case(what, batch, tokens, arguments.steps, arguments.guidance)
                    difference = compare(ours, peer, case, folder, exact=exact)
                    rows.append(Row(size, case, *measure(ours, peer, case, arguments.rounds), difference))
                    print(line(rows[-1], arguments), file=sys.stderr, flush=True)
    return rows, loaded


def main() -> None:
    arguments = parse()
    about = machine(arguments)
    rows, loaded = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            size_rows, loaded[size] = run_size(size, arguments, Path(folder))
            rows += size_rows
    if arguments.device == "cpu":
        about["load at the end"] = [round(load, 1) for load in os.getloadavg()]
    about["ours"] = f"{arguments.dtype}{', compiled' if arguments.compile else ''}"
    about["peer"] = f"{arguments.peer_dtype}, {arguments.peer_attention} attention"
    print(", ".join(f"{name}: {value}" for name, value in about.items()), end="\n\n")
    print(table(rows, arguments))
    if arguments.json:
        content = {"machine": about, "loaded": loaded, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
