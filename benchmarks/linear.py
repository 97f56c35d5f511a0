"""Linear layers with weights in oneDNN's layout against `F.linear`, by the number of rows, on a CPU.

    python benchmarks/linear.py

A row of the table multiplies so many rows of 768 channels by 34 weights of 4096 x 768, 428 MB, as much as GPT-B has and
more than any cache holds: so with few rows it is a measurement of how fast weights are read. Of `--rounds` rounds, in
which both take turns, the median of the ratios and the least wall times.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from imgtok.layers.linear import packed_linears

WIDTH, OUTPUTS, LAYERS = 768, 4096, 34


def seconds(layers: nn.ModuleList, x: Tensor) -> float:
    start = time.perf_counter()
    for layer in layers:
        layer(x)
    return time.perf_counter() - start


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 256], metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=LAYERS, help="weights of 4096 x 768 (34)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    plain = nn.ModuleList(nn.Linear(WIDTH, OUTPUTS, bias=False) for _ in range(arguments.layers))
    twin = nn.ModuleList(nn.Linear(WIDTH, OUTPUTS, bias=False) for _ in range(arguments.layers))
    twin.load_state_dict(plain.state_dict())
    size = sum(layer.weight.nbytes for layer in plain)
    start = time.perf_counter()
    with packed_linears(twin) as packed:
        took = time.perf_counter() - start
        if not packed:
            parser.exit(2, "nothing is packed here: see imgtok/layers/linear.py for what it takes\n")
        print(f"{arguments.threads} threads; laying out {size / 1e6:.0f} MB: {took:.2f} s\n")
        print("| rows | F.linear, ms (GB/s) | packed, ms (GB/s) | ratio |\n|---|---|---|---|")
        for rows in arguments.rows:
            x = torch.randn(rows, WIDTH)
            times = [(seconds(plain, x), seconds(twin, x)) for _ in range(arguments.rounds + 1)][
                1:
            ]  # the first warms up
            ratio = statistics.median(a / b for a, b in times)
            cells = [f"{least * 1e3:.1f} ({size / least / 1e9:.1f})" for least in map(min, zip(*times, strict=True))]
            print(f"| {rows} | {' | '.join(cells)} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
