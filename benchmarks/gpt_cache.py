"""Sampling of the GPT with the key/value cache, against recomputing the prefix or against another checkout.

    python benchmarks/gpt_cache.py [--tokens 64] [--batch 1 16] [--rounds 5] [--threads 2]
    python benchmarks/gpt_cache.py --peer PATH ...

With `--peer`, the folder of another version of this repository, each side is a process of its own that samples with its
cache; without it the peer is this version with `cached=False`. The sides take turns, in the other order every second
round; a ratio is peer / ours in one round, above 1 where ours is faster, of wall time and of the process's CPU seconds,
which another program on the machine disturbs less. The ids of both are compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve()


class Side:
    """A process that samples when asked, with the package in the folder `root`."""

    def __init__(self, name: str, root: Path, arguments: argparse.Namespace, *, cached: bool) -> None:
        self.name = name
        options = ["--tokens", str(arguments.tokens), "--threads", str(arguments.threads)]
        command = [sys.executable, str(HERE), "--worker", "cached" if cached else "plain", *options]
        environment = os.environ | {"PYTHONPATH": str(root)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def sample(self, batch: int) -> dict[str, Any]:
        """Seconds of one call, and its ids."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def work(arguments: argparse.Namespace) -> None:
    """The process of one side: a batch size a line comes in, seconds and ids go out."""
    package = "imgtok.generators" if importlib.util.find_spec("imgtok.generators") else "generators"  # as it once was
    gpt = importlib.import_module(f"{package}.gpt")
    GPT, GPTConfig = gpt.GPT, gpt.GPTConfig

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1024, num_tokens=arguments.tokens, width=256, depth=6, num_heads=8)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.05)  # a head of zeros would draw the same ids whatever comes before
    for line in sys.stdin:
        batch = int(line)
        labels = torch.arange(batch)
        wall, cpu = time.perf_counter(), time.process_time()
        drawn = model.generate(labels, seed=0, indices=range(batch), cached=arguments.worker == "cached")
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        ids = drawn if isinstance(drawn, torch.Tensor) else drawn.ids
        print(json.dumps({"wall": wall, "cpu": cpu, "ids": ids.tolist()}), flush=True)


def compare(ours: Side, peer: Side, batch: int, rounds: int) -> None:
    """One batch size: rounds in turn, then medians."""
    ratios: dict[str, list[float]] = {"wall": [], "cpu": []}
    for number in range(rounds + 1):
        order = (ours, peer) if number % 2 else (peer, ours)
        found = {side.name: side.sample(batch) for side in order}
        mine, other = found[ours.name], found[peer.name]
        if mine["ids"] != other["ids"]:
            raise SystemExit(f"batch {batch}: the two sides draw different ids")
        if number:  # the first round warms up
            for what, values in ratios.items():
                values.append(other[what] / mine[what])
            print(
                f"batch {batch:3d}  {ours.name} {mine['wall']:7.3f} s  {peer.name} {other['wall']:7.3f} s", flush=True
            )
    for what, values in ratios.items():
        spread = f"min {min(values):.2f}, max {max(values):.2f}"
        print(f"batch {batch:3d}  {what:4s} {peer.name} / {ours.name}: {statistics.median(values):.2f} ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=["cached", "plain"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
        return
    root = HERE.parents[1]
    ours = Side("cached", root, arguments, cached=True)
    if arguments.peer:
        peer = Side("peer", arguments.peer.resolve(), arguments, cached=True)
    else:
        peer = Side("recomputed", root, arguments, cached=False)
    for batch in arguments.batch:
        compare(ours, peer, batch, arguments.rounds)
    ours.close()
    peer.close()


if __name__ == "__main__":
    main()
