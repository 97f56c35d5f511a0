"""Our GPT against LlamaGen's own `generate` and transformers' `LlamaForCausalLM.generate`, with the same weights.

    git clone https://github.com/FoundationVision/LlamaGen PATH
    python benchmarks/gpt.py --peer PATH
    python benchmarks/gpt.py --peers transformers

Each implementation is a process of its own and builds the same model from the same drawn weights. Before a case is
timed, both sides take the most likely token of each step of one image, guided, and must find the same ids. Then they
take turns, one call each a round, every second round in the other order, and a ratio is of the two calls of one round.
Prints a Markdown table; the goals in its last column are measured, not asserted.

What is timed is one call: labels in, all ids of the images out, guided at a constant scale and drawn at temperature 1
without filters, as LlamaGen samples for its figures. `--guidance 1` is without: one stream. Both sides have weights of
16 bits where bf16 is asked for. transformers has no classes and no raster: it is given both, see
`workers/gpt_transformers.py`, so that it draws the same law.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gpt_case import Case, Shape
from interleaved import Row, Worker, make_parser, report, run_size, setup_of

PEERS = {"llamagen": "gpt_peer", "transformers": "gpt_transformers"}
"""What is compared with -> the worker's file."""
NEEDS = """\
    git clone https://github.com/FoundationVision/LlamaGen {path}
    git -C {path} checkout ce98ec4
    {python} -m pip install transformers
Its licence is MIT; nothing of it is copied into this repository. `--peers llamagen` needs no transformers,
`--peers transformers` no checkout."""
ENOUGH = 64
"""Ids from the first on that must be equal, or all if there are fewer: where two tokens are equally likely to the last
bits, either may be taken, and what follows sees it."""


def compare(ours: Worker, peer: Worker, case: Case, folder: Path) -> tuple[str, bool]:
    """The most likely ids of one image, or of as many tokens as are timed."""
    case = replace(case, batch=1, greedy=True)
    for name, worker in (("ours", ours), ("peer", peer)):
        worker.ask("run", case=asdict(case), save=str(folder / f"{name}.npy"))
    a, b = np.load(folder / "ours.npy"), np.load(folder / "peer.npy")
    if a.shape != b.shape:
        return f"{a.shape} and {b.shape}", False
    equal = int(np.cumprod(a == b).sum())
    return f"{equal} of {a.size} ids equal", equal >= min(ENOUGH, a.size)


def goal(case: Case, device: str) -> float | None:
    """The least ratio that the project asks for: on a CPU at any batch, on a GPU at batch 1."""
    if device == "cpu":
        return 1.5
    return 4.0 if case.batch == 1 else None


def cases(size: str, peer: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Every case of one size, not yet measured."""
    name, _, tokens = size.partition(":")
    for batch in arguments.batch:
        case = Case(batch, int(tokens), arguments.guidance)
        words = f"{tokens} tokens, guidance {arguments.guidance:g}, against {peer}"
        yield Row(name, case, what=words, goal=goal(case, arguments.device))


def run(size: str, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    """One size against every peer."""
    rows, loaded = [], {}
    for peer in arguments.peers:
        planned, setup = cases(size, peer, arguments), setup_of(size, arguments)
        found, told = run_size("gpt", setup, planned, compare, needs(arguments), arguments, PEERS[peer])
        rows += found
        loaded[peer] = told
    return rows, loaded


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "FoundationVision/LlamaGen", needs_checkout=False)
    add = parser.add_argument
    add("--sizes", nargs="+", default=["B"], metavar="SIZE", help="B, L, XL, XXL, 3B, or width x depth as 128x2 (B)")
    add("--peers", nargs="+", choices=[*PEERS], default=[*PEERS], help="what to compare with (both)")
    add("--tokens", type=int, default=256, metavar="N", help="of an image, a square number (256)")
    add("--batch", nargs="+", type=int, default=[1, 8], metavar="B", help="images of a call (1 8)")
    add("--guidance", type=float, default=2.0, metavar="G", help="scale; 1 is none (2)")
    add("--peer-dtype", choices=("fp32", "bf16"), help="precision of the peer (that of ours)")
    arguments = parser.parse_args(argv)
    if arguments.peer is not None:
        arguments.peer = arguments.peer.resolve()
    arguments.peer_dtype = arguments.peer_dtype or arguments.dtype
    for size in arguments.sizes:
        try:
            Shape.of(f"{size}:{arguments.tokens}")
        except ValueError as error:
            parser.error(
                f"--sizes, --tokens: {size} with {arguments.tokens} tokens: {error}; sizes are B, L, XL, XXL, 3B, or "
                "width x depth such as 128x2, and tokens a square number"
            )
    arguments.sizes = [f"{size}:{arguments.tokens}" for size in arguments.sizes]
    if "llamagen" in arguments.peers:
        if arguments.peer is None:
            parser.exit(2, f"--peer names no checkout of LlamaGen. It comes from:\n{needs(arguments)}\n")
        if not (arguments.peer / "autoregressive/models/generate.py").exists():
            parser.exit(2, f"{arguments.peer} is no checkout of LlamaGen. It comes from:\n{needs(arguments)}\n")
    return arguments


def needs(arguments: argparse.Namespace) -> str:
    return NEEDS.format(path=arguments.peer or "PATH", python=arguments.python)


def main() -> None:
    arguments = parse()
    report(partial(run, arguments=arguments), arguments, arguments.peer_dtype)


if __name__ == "__main__":
    main()
