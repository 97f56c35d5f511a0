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
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flextok_case import Case
from interleaved import Row, Worker, apart, make_parser, measure, report, run_size, setup_of

from imgtok import randomness

__all__ = ["Case", "Row", "goal", "measure"]

NEEDS = """\
    git clone https://github.com/apple/ml-flextok {path}
    {python} -m pip install hydra-core mup torchvision diffusers einops huggingface_hub safetensors
Its code is under Apple's sample code licence and is never copied into this repository."""


def compare(ours: Worker, peer: Worker, case: Case, folder: Path) -> tuple[str, bool]:
    """Both on the same input, of decoding the first Euler step: ids must be equal, velocities within 1e-4."""
    case = replace(case, steps=1)
    draws = None
    if case.what == "decode":
        draws = str(folder / "draws.npz")
        noise = randomness.normal(0, range(case.batch), (16, 32, 32), "flextok").numpy()
        np.savez(draws, noise=noise)
    ours.ask("run", case=asdict(case), save=str(folder / "ours.npy"))
    peer.ask("run", case=asdict(case), save=str(folder / "peer.npy"), draws=draws)
    a, b = np.load(folder / "ours.npy"), np.load(folder / "peer.npy")
    if case.what == "encode":
        different = int((a != b).sum())
        return f"{different} of {a.size} ids", different == 0
    a, b = noise - a, noise - b  # one step of size 1: what was subtracted is the velocity
    return apart(a, b)


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


def cases(size: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Every case of one size, not yet measured."""
    for batch in arguments.batch:
        for what in arguments.what:
            for tokens in arguments.tokens:
                case = Case(what, batch, tokens, arguments.steps, arguments.guidance)
                words = f"encode, {tokens} ids" if what == "encode" else f"{case.steps} steps, {tokens} ids"
                least = goal(size, case, arguments.device, arguments.dtype)
                yield Row(size, case, what=words, goal=least)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "apple/ml-flextok")
    add = parser.add_argument
    add("--sizes", nargs="+", default=["d12-d12"], metavar="dE-dD", help="depths, such as d12-d12 d18-d18 d18-d28")
    add("--what", nargs="+", choices=("encode", "decode"), default=["encode", "decode"])
    add("--tokens", nargs="+", type=int, default=[256, 16], metavar="K", help="tokens kept (256 16)")
    add("--batch", nargs="+", type=int, default=[1, 8], metavar="B", help="images a call (1 8)")
    add("--steps", type=int, default=1, help="guided Euler steps of one decoding (1)")
    add("--guidance", type=float, default=7.5, help="guidance scale; 1 runs no second pass (7.5)")
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


def run(size: str, arguments: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    setup = replace(setup_of(size, arguments), attention=arguments.peer_attention)
    return run_size("flextok", setup, cases(size, arguments), compare, needs(arguments), arguments)


def main() -> None:
    arguments = parse()
    peer = f"{arguments.peer_dtype}, {arguments.peer_attention} attention"
    report(partial(run, arguments=arguments), arguments, peer)


if __name__ == "__main__":
    main()
