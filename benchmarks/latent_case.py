"""What the benchmarks of generators of latents share; all processes read it: it imports the standard library alone."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

CHANNELS, GRID, CLASSES = 16, 16, 1000
"""KL-16's latent of 256 pixels, and ImageNet's classes."""


@dataclass(frozen=True)
class Recipe:
    """A published training recipe."""

    betas: tuple[float, float]
    clip: float
    rate: float = 4e-4
    decay: float = 0.02
    ema: float = 0.9999


def own_size(size: str) -> tuple[int, int] | None:
    """(width, blocks of a stack) of a size such as 128x2; None for B, L and H. Raises ValueError for anything else."""
    if size in ("B", "L", "H"):
        return None
    width, depth = size.split("x")
    return int(width), int(depth)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Sizes, rows, batches and the precision of the peer."""
    add = parser.add_argument
    add("--sizes", nargs="+", default=["B"], metavar="SIZE", help="B, L, H, or width x depth such as 128x2 (B)")
    add("--what", nargs="+", choices=("sample", "train"), default=["sample", "train"])
    add("--batch", nargs="+", type=int, default=[1, 4], metavar="B", help="images of a sampling call (1 4)")
    add(
        "--peer-dtype",
        choices=("fp32", "fp16", "bf16"),
        help="precision of the peer; by default fp32 on a CPU, and on a GPU the fp16 of its scripts",
    )


def complete(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What the parsed options of `add_options` leave open; a size that there is not ends the program."""
    arguments.peer = arguments.peer.resolve()
    arguments.peer_dtype = arguments.peer_dtype or ("fp32" if arguments.device == "cpu" else "fp16")
    for size in arguments.sizes:
        try:
            own_size(size)
        except ValueError:
            parser.error(f"--sizes: {size} is none of B, L, H and no width x depth such as 128x2")
