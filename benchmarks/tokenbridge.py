"""Our TokenBridge against the published code, in one interleaved run with the same weights.

    git clone https://github.com/YuqingWang1029/TokenBridge PATH
    python benchmarks/tokenbridge.py --peer PATH

Two processes, one per implementation, build the same model from the same drawn weights. Before a case is timed, both
run it from the same draws: ids of one sampled image must be equal (but for a few that lie on an edge), loss and norm
of the gradient of a training step agree within 1e-4. Then they take turns, one call each a round, every second round in
the other order, and a ratio is of the two calls of one round. Prints a Markdown table; the goals in its last column are
measured, not asserted.

Sampling is 256 positions in `--iterations` calls of encoder and decoder, labels in and latents out, linear guidance and
temperature as published. All 256 x 16 ids are drawn whatever the number of iterations, so that the head's time is the
same and that of the others grows with it; published are 256. Training is one step without dropout: forward, backward,
clip, AdamW, average, and for `--head-share` below 1 also with a part of the hidden positions on our side. The
autoencoder, the same for both, is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from interleaved import Row, Worker, apart, make_parser, report, run_size, setup_of
from latent_case import CHANNELS, add_options, complete
from tokenbridge_case import LEAST_HIDDEN, POSITIONS, Case

from imgtok import randomness
from imgtok.generators.tokenbridge import hidden_share

NEEDS = """\
    git clone https://github.com/YuqingWang1029/TokenBridge {path}
    git -C {path} checkout 3ede281
    {python} -m pip install timm scipy
Its licence is MIT; nothing of it is copied into this repository."""
NEARLY = 0.99
"""The least share of ids that are the same: a draw that lies within rounding of an edge may fall on either side, and
what is drawn afterwards sees it."""


Found = dict[Case, tuple[str, bool]]


def compare_once(found: Found, ours: Worker, peer: Worker, case: Case, folder: Path) -> tuple[str, bool]:
    """`compare`, which takes as long as a row, once for all rows that differ in what it does not look at."""
    case = replace(case, head_share=1.0, batch=1 if case.what == "sample" else case.batch)
    if case not in found:
        found[case] = compare(ours, peer, case, folder)
    return found[case]


def compare(ours: Worker, peer: Worker, case: Case, folder: Path) -> tuple[str, bool]:
    """Both from the same draws: ids that are drawn, or loss and norm of a training step, within 1e-4."""
    np.savez(folder / "draws.npz", **draws_of(case))
    ours.ask("run", case=asdict(case), save=str(folder / "ours.npy"))
    peer.ask("run", case=asdict(case), save=str(folder / "peer.npy"), draws=str(folder / "draws.npz"))
    a, b = np.load(folder / "ours.npy"), np.load(folder / "peer.npy")
    if case.what == "train":
        return apart(a / b, np.ones_like(b))
    equal = float(np.isclose(a, b, rtol=0.0, atol=1e-4).mean())  # levels are further apart
    return f"{equal:.2%} of ids equal", equal >= NEARLY


def draws_of(case: Case) -> dict[str, np.ndarray]:
    """What our side draws for a case."""
    if case.what == "sample":
        keys = randomness.uniform(0, range(case.batch), (POSITIONS,), "order")
        uniforms = randomness.uniform(0, range(case.batch), (POSITIONS, CHANNELS), "tokens")
        return {"order": keys.argsort(dim=1, stable=True).numpy(), "uniforms": uniforms.numpy()}
    generator = randomness.step_generator(0, 0)
    drop = torch.rand(case.batch, generator=generator)
    order = torch.rand(case.batch, POSITIONS, generator=generator).argsort(dim=1, stable=True)
    share = hidden_share(torch.rand((), generator=generator, dtype=torch.float64).item(), LEAST_HIDDEN)
    return {"drop": drop.numpy(), "order": order.numpy(), "share": np.array([share])}


def goal(case: Case, device: str) -> float | None:
    """The least ratio that the project asks for: of sampling on a CPU and on a GPU, of a training step on a CPU."""
    if case.what == "train":
        return 1.3 if device == "cpu" and case.head_share == 1 else None
    return 2.0 if device == "cpu" else 4.0


def cases(size: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Every case of one size, not yet measured: training last, for the memory that its optimizer keeps."""
    planned = []
    if "sample" in arguments.what:
        for iterations in arguments.iterations:
            words = f"{iterations} iterations, guidance {arguments.guidance:g}"
            planned += [(Case("sample", batch, iterations, arguments.guidance), words) for batch in arguments.batch]
    if "train" in arguments.what:
        for share in arguments.head_share:
            words = "training step" if share == 1 else f"training step, our head from {share:g} of what is hidden"
            planned += [(Case("train", batch, head_share=share), words) for batch in arguments.train_batch]
    for case, words in planned:
        yield Row(size, case, what=words, goal=goal(case, arguments.device))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "YuqingWang1029/TokenBridge")
    add_options(parser)
    add = parser.add_argument
    add("--iterations", nargs="+", type=int, default=[8], metavar="N", help="of the 256 that are published (8)")
    add("--guidance", type=float, default=3.1, metavar="G", help="scale; 1 is none (3.1)")
    add("--train-batch", nargs="+", type=int, default=[2], metavar="B", help="images of a training step (2)")
    add("--head-share", nargs="+", type=float, default=[1.0], metavar="S", help="of hidden positions, in training (1)")
    arguments = parser.parse_args(argv)
    complete(parser, arguments)
    if not 1 <= min(arguments.iterations) <= max(arguments.iterations) <= POSITIONS:
        parser.error(f"--iterations: {arguments.iterations} must lie in 1 to {POSITIONS}, the positions of an image")
    if not (arguments.peer / "models" / "tokenbridge.py").exists():
        parser.exit(2, f"{arguments.peer} is no checkout of TokenBridge. It comes from:\n{needs(arguments)}\n")
    return arguments


def needs(arguments: argparse.Namespace) -> str:
    return NEEDS.format(path=arguments.peer, python=arguments.python)


def run(size: str, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    found: Found = {}
    once = partial(compare_once, found)
    planned = cases(size, arguments)
    return run_size("tokenbridge", setup_of(size, arguments), planned, once, needs(arguments), arguments)


def main() -> None:
    arguments = parse()
    report(partial(run, arguments=arguments), arguments, arguments.peer_dtype)


if __name__ == "__main__":
    main()
