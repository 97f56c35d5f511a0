"""Our KARL against the published code, in one interleaved run with the same weights.

    git clone https://github.com/ShivamDuggal4/karl PATH
    python benchmarks/karl.py --peer PATH

Two processes, one per implementation, build the same model from the same drawn weights. Before a case is timed, both do
it with the same image: ids of tokens must be equal, vectors, decoded pixels, or the loss and the norm of the gradient
of a training step agree within 1e-4 of the largest. Then they take turns, one call each a round,
every second round in the other order, and a ratio is of the two calls of one round. Prints a Markdown table; the goals
in its last column are measured, not asserted.

The published call encodes and decodes an image, always, and takes one at a time: a batch is as many calls of it. Ours
gives tokens alone (`tokens`), or tokens and the image (`both`), with as many tokens kept as the drawn weights say, or
with `--kept` of the 256, for which the threshold is moved on both sides; the published code's time does not depend on
it. A size such as tiny/vqgan/train is one step of the generator in stage 2, with the adversarial term: two runs, LPIPS,
one of the published eight discriminators, backward, clip, AdamW, average. Ours has one discriminator and one LPIPS.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import Row, Worker, apart, make_parser, report, run_size, setup_of
from karl_case import SIZES, VARIANTS, Case, parse_size, training

from imgtok import randomness

NEEDS = """\
    git clone https://github.com/ShivamDuggal4/karl {path}
    git -C {path} checkout 5c1a569
    {python} -m pip install einops PyYAML
Its repository names no licence; nothing of it is copied into this one."""


def compare(ours: Worker, peer: Worker, case: Case, folder: Path) -> tuple[str, bool]:
    """What both make of the case with one image: tokens, ids equal or vectors alike, the decoded image with as many
    tokens kept, or loss and norm of a training step.
    """
    case = replace(case, batch=1)
    noise = randomness.normal(0, [0], (16, 16, 16), "posterior")
    np.savez(folder / "draws.npz", noise=noise.numpy())
    ours.ask("run", case=asdict(case), save=str(folder / "ours.npy"))
    peer.ask("run", case=asdict(case), save=str(folder / "peer.npy"), draws=str(folder / "draws.npz"))
    a, b = np.load(folder / "ours.npy"), np.load(folder / "peer.npy")
    if case.what == "train":
        return apart(a / b, np.ones_like(b))
    if a.dtype == np.int64:
        equal = float((a == b).mean())
        return f"{equal:.1%} of ids equal", equal == 1.0
    return apart(a, b)


def goal(case: Case, device: str) -> float | None:
    """The least ratio that the project asks for: tokens alone, 32 kept at batch 1, a batch, and on a GPU."""
    if device != "cpu":
        return 3.0 if case.batch >= 32 else None
    if case.what == "tokens":
        return 2.0
    if case.what == "train":
        return 1.5
    if case.batch > 1:
        return 1.5
    return 1.3 if case.kept is not None and case.kept <= 32 else None


def cases(size: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Every case of one size, not yet measured."""
    if training(size):
        for case in (Case("train", batch) for batch in arguments.batch or [1]):
            aim = goal(case, arguments.device)
            yield Row(size, case, what="training step of stage 2", goal=aim, memory_goal=0.5)
        return
    for batch in arguments.batch or [1, 8]:
        yield Row(size, Case("tokens", batch), what="tokens", goal=goal(Case("tokens", batch), arguments.device))
        for kept in (*arguments.kept, None):
            case = Case("both", batch, kept)
            words = "as many kept as it says" if kept is None else f"{kept} kept"
            yield Row(size, case, what=f"tokens and image, {words}", goal=goal(case, arguments.device))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "ShivamDuggal4/karl")
    add = parser.add_argument
    known = f"{', '.join(SIZES)} / {', '.join(VARIANTS)}"
    add(
        "--sizes",
        nargs="+",
        default=["small/vqgan", "small/vae"],
        metavar="SIZE",
        help=f"{known}, and /train for a step of stage 2 (small/vqgan ...)",
    )
    add("--batch", nargs="+", type=int, metavar="B", help="images of a call (1 8), or of a training step (1)")
    add("--kept", nargs="*", type=int, default=[32], metavar="K", help="tokens kept of 256 (32)")
    add("--peer-dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="precision of the peer (fp32)")
    arguments = parser.parse_args(argv)
    arguments.peer = arguments.peer.resolve()
    for size in arguments.sizes:
        try:
            parse_size(size)
        except ValueError:
            parser.error(f"--sizes: {size} is none of {known}")
    if not (arguments.peer / "kolmogorov_tokenizers").is_dir():
        parser.exit(2, f"{arguments.peer} is no checkout of KARL. It comes from:\n{needs(arguments)}\n")
    return arguments


def needs(arguments: argparse.Namespace) -> str:
    return NEEDS.format(path=arguments.peer, python=arguments.python)


def run(size: str, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    return run_size("karl", setup_of(size, arguments), cases(size, arguments), compare, needs(arguments), arguments)


def main() -> None:
    arguments = parse()
    report(partial(run, arguments=arguments), arguments, arguments.peer_dtype)


if __name__ == "__main__":
    main()
