"""The scalar quantizer of TokenBridge against a memory copy of as many bytes, on a CPU.

    python benchmarks/quantizer.py
    python benchmarks/quantizer.py --check 100000000

A row is a number of latents of 16 x 16 x 16. The bytes of an operation are those that it reads and those that it
writes: 4 for a number, 8 for its id (int64), so 12 for `encode`, 16 for number to value and id, 12 for `decode`. A
share of 25 % is a quarter of the bytes that `Tensor.copy_` moves in a second between tensors larger than the caches,
into memory that is there, while the operations take new memory for what they return, as they do in training. One
thread each. Processor time counts, which another program disturbs less than wall time; of `--rounds` rounds, in which
all take turns, the least. `--check N` first compares the fast form with the definition on N random numbers, and on
every edge and the floats beside it, for several numbers of levels.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from imgtok.quantizers.normal import NormalConfig, NormalQuantizer

LATENT = 16 * 16 * 16
COPIED = 1 << 24
"""Numbers of the copy: 64 MB, and as many written."""


def least(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least processor time of each, in seconds."""
    found = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):
        for name, call in work.items():
            start = time.process_time()
            call()
            found[name] = min(found[name], time.process_time() - start)
    return found


def check(quantizer: NormalQuantizer, count: int) -> None:
    generator, done = torch.Generator().manual_seed(0), 0
    while done < count:
        x = torch.randn(min(20_000, count - done), generator=generator) * (1 + done % 3)
        assert torch.equal(quantizer.encode(x), quantizer.encode_plainly(x)), (
            "the fast form differs from the definition"
        )
        done += len(x)
    print(f"{done:,} random numbers: the ids of the definition")


def check_edges(config: NormalConfig) -> None:
    """Every edge, and the three floats at either side of it."""
    quantizer = NormalQuantizer(config)
    edges = quantizer.edges.flatten()
    found = [edges]
    for towards in (-torch.inf, torch.inf):
        near = edges
        for _ in range(3):
            near = torch.nextafter(near, torch.tensor(towards))
            found.append(near)
    for x in torch.cat(found).split(20_000):
        assert torch.equal(quantizer.encode(x), quantizer.encode_plainly(x)), "the fast form differs at an edge"
    print(f"{config.levels} levels, {config.spacing}: {len(edges)} edges and the floats beside them likewise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=64)
    parser.add_argument("--images", type=int, nargs="*", default=[1, 64, 512])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--check", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quantizer = NormalQuantizer(NormalConfig(levels=arguments.levels))
    if arguments.check:
        for levels in sorted({2, 8, 16, 32, 64, 128, 512, arguments.levels}):
            for spacing in ("normal", "uniform"):
                check_edges(NormalConfig(levels=levels, spacing=spacing))
        check(quantizer, arguments.check)
    source, target = torch.randn(COPIED), torch.empty(COPIED)
    print("| images | encode, ns a number (share of a copy) | both | decode |\n|---|---|---|---|")
    for images in arguments.images:
        x = torch.randn(images, 16, 16, 16)
        ids = quantizer.ids(x)
        calls: dict[str, tuple[Callable[[], object], int]] = {
            "encode": (lambda x=x: quantizer.ids(x), 12),
            "both": (lambda x=x: quantizer(x), 16),
            "decode": (lambda ids=ids: quantizer.decode(ids), 12),
        }
        repeats = max(1, (1 << 21) // x.numel())
        work: dict[str, Callable[[], object]] = {
            name: (lambda call=call, repeats=repeats: [call() for _ in range(repeats)])
            for name, (call, _) in calls.items()
        }
        found = least(work | {"copy": lambda: target.copy_(source)}, arguments.rounds)
        a_byte = found["copy"] / COPIED / 8
        cells = []
        for name, (_, size) in calls.items():
            seconds = found[name] / repeats / x.numel()
            cells.append(f"{seconds * 1e9:.2f} ({a_byte * size / seconds:.0%})")
        print(f"| {images} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
