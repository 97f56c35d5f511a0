"""Our xAR against the published code, in one interleaved run with the same weights.

    git clone https://github.com/OliverRensu/xAR PATH
    python benchmarks/xar.py --peer PATH

Two processes, one per implementation, build the same model from the same drawn weights. Before a case is timed, both
run it from the same noise: final latents of three steps for each cell, or loss and norm of the gradient of a training
step, must agree within 1e-4. Then they take turns, one call each a round, every second round in the other order, and
a ratio is of the two calls of one round. Prints a Markdown table; the goals in its last column are measured, not
asserted.

Sampling is the published stochastic Euler over four cells, labels in and latents out, `--steps` calls of the network
for each cell: seconds grow in proportion, so that the 40 of xAR-B take about 40 / 6 of what 6 take. Training is one
step without dropout: forward, backward, clip, AdamW, average. The autoencoder, the same for both, is left out.
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
from xar_case import ENTITIES, TOKENS, Case

from imgtok import randomness

NEEDS = """\
    git clone https://github.com/OliverRensu/xAR {path}
    git -C {path} checkout 121e9c9
    {python} -m pip install timm einops
Its repository names no licence; nothing of it is copied into this one."""
SHORT = 3
"""Steps of the comparison: the fewest that the published code can do."""


def compare(ours: Worker, peer: Worker, case: Case, folder: Path) -> tuple[str, bool]:
    """Both from the same draws: latents after a few steps, or loss and norm of a training step, within 1e-4."""
    case = replace(case, steps=SHORT)
    np.savez(folder / "draws.npz", **draws_of(case))
    ours.ask("run", case=asdict(case), save=str(folder / "ours.npy"))
    peer.ask("run", case=asdict(case), save=str(folder / "peer.npy"), draws=str(folder / "draws.npz"))
    a, b = np.load(folder / "ours.npy"), np.load(folder / "peer.npy")
    return apart(a, b) if case.what == "sample" else apart(a / b, np.ones_like(b))


def draws_of(case: Case) -> dict[str, np.ndarray]:
    """What our side draws for a case, in the order in which the published code asks for it."""
    if case.what == "sample":
        shape = (case.steps, TOKENS, CHANNELS)
        each = [randomness.normal(0, range(case.batch), shape, f"entity {entity}") for entity in range(ENTITIES)]
        return {"noise": torch.stack(each).transpose(1, 2).numpy()}
    generator = randomness.step_generator(0, 0)
    return {
        "drop": torch.rand(case.batch, generator=generator).numpy(),
        "times": torch.randn(ENTITIES * case.batch, generator=generator).numpy(),
        "train_noise": torch.randn((case.batch, ENTITIES * TOKENS, CHANNELS), generator=generator).numpy(),
    }


def goal(size: str, case: Case, device: str, dtype: str) -> float | None:
    """The least ratio that the project asks for: of xAR-B on a CPU, of sampling on a GPU; None if none."""
    if device != "cpu":
        return 2.5 if case.what == "sample" else None
    if size != "B":
        return None
    if case.what == "train":
        return 1.2 if dtype == "fp32" else None
    if dtype == "bf16":
        return 3.0
    return 1.15 if case.guidance > 1 else 1.8


def cases(size: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Every case of one size, not yet measured: training last, for the memory that its optimizer keeps."""
    planned = []
    if "sample" in arguments.what:
        for batch in arguments.batch:
            for guidance in arguments.guidance:
                how = f"guidance {guidance:g}" if guidance > 1 else "no guidance"
                planned.append((Case("sample", batch, arguments.steps, guidance), f"{arguments.steps} steps, {how}"))
    if "train" in arguments.what:
        planned += [(Case("train", batch), "training step") for batch in arguments.train_batch]
    for case, words in planned:
        yield Row(size, case, what=words, goal=goal(size, case, arguments.device, arguments.dtype))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "OliverRensu/xAR")
    add_options(parser)
    add = parser.add_argument
    add("--guidance", nargs="+", type=float, default=[2.7, 1.0], metavar="G", help="scales; 1 is none (2.7 1)")
    add("--steps", type=int, default=6, help="calls for each cell; 3 or more, published are 40 for B (6)")
    add("--train-batch", nargs="+", type=int, default=[4], metavar="B", help="images of a training step, 2 or more (4)")
    arguments = parser.parse_args(argv)
    complete(parser, arguments)
    if arguments.steps < SHORT or min(arguments.train_batch) < 2:
        parser.error(f"the published code needs --steps of at least {SHORT} and a --train-batch of at least 2")
    if not (arguments.peer / "models" / "xar.py").exists():
        parser.exit(2, f"{arguments.peer} is no checkout of xAR. It comes from:\n{needs(arguments)}\n")
    return arguments


def needs(arguments: argparse.Namespace) -> str:
    return NEEDS.format(path=arguments.peer, python=arguments.python)


def run(size: str, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    return run_size("xar", setup_of(size, arguments), cases(size, arguments), compare, needs(arguments), arguments)


def main() -> None:
    arguments = parse()
    report(partial(run, arguments=arguments), arguments, arguments.peer_dtype)


if __name__ == "__main__":
    main()
