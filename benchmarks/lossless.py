"""Which methods of speculative decoding are lossless: draws by each of them, held against a law that is known.

    python benchmarks/lossless.py              # ours, and others as released: the table of docs/speculative.md
    python benchmarks/lossless.py --num 20000  # fewer draws, quicker and less sensitive

The toy is a network of five tokens of three ids, so that the probability of each of 243 sequences is known. A method is
exact if the chi-square statistic of its draws is what it is for the law itself: z, its deviations from the mean, stays
below 4 or so. The released rules are in tests/released_decoders.py, written from their description.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


import toy_law
from released_decoders import Mistakes, jacobi, sjd_pac

from imgtok.generators.speculative_rules import grouped

REPAIRED = Mistakes(path=False, siblings=False, failing=False, bonus=False)
Draw = Callable[..., Tensor]


def ours(**how: object) -> Draw:
    return lambda sampling, images, seed: toy_law.drawn(sampling, images, seed=seed, **how).ids  # type: ignore[arg-type]


def as_released(method: Draw, *given: object, **how: object) -> Draw:
    return lambda sampling, images, seed: method(sampling, images, *given, seed=seed, **how)


def pac(**mistakes: bool) -> Draw:
    chosen = Mistakes(**{name: mistakes.get(name, False) for name in ("path", "siblings", "failing", "bonus")})
    return as_released(sjd_pac, chosen)


PAIRS = partial(grouped, size=2, rule="released")
METHODS: list[tuple[str, str, Draw, str]] = [
    ("imgtok, window 1", "lossless", ours(window=1), ""),
    ("imgtok, draft", "lossless", ours(draft=True), ""),
    ("imgtok, jacobi", "lossless", ours(), ""),
    ("imgtok, coupled, maximal", "lossless", ours(keep=True), ""),
    ("imgtok, coupled, gumbel", "lossless", ours(gumbel=True), ""),
    ("imgtok, grouped, group_size 2", "lossy", ours(group=2), "group_size 1"),
    ("imgtok, coupled, group_size 2", "lossy", ours(group=2, keep=True), "group_size 1"),
    ("SJD, batch 1", "lossless", as_released(jacobi, stale=True), ""),
    ("SJD, batch 7", "lossless", as_released(jacobi, batch=7, stale=True), "hand on q = p, or ragged rows"),
    ("  q = p", "", as_released(jacobi, batch=7, stale=False), ""),
    ("GSD, groups of 2, batch 1", "lossy", as_released(jacobi, rule=PAIRS, stale=True), "none: the rule is not exact"),
    ("SCD, maximal", "lossless", as_released(jacobi, keep=True, stale=True), "hand on q = p"),
    ("  q = p", "", as_released(jacobi, keep=True, stale=False), ""),
    ("SCD, Gumbel, a table for 4 positions", "lossless", as_released(jacobi, table=4, stale=False), "noise for each"),
    ("SCD, Gumbel, a table for 2 positions", "lossless", as_released(jacobi, table=2, stale=False), "noise for each"),
    ("  noise for each position", "", as_released(jacobi, table=toy_law.TOKENS, stale=False), ""),
    ("SJD-PAC", "lossless", as_released(sjd_pac, Mistakes()), "all four"),
    ("  F1, the longest path", "", pac(path=True), "the first sibling that passes"),
    ("  F2, siblings of the residual", "", pac(siblings=True), "siblings from p, without the earlier"),
    ("  F3, residual of the last sibling", "", pac(failing=True), "that of the draft itself"),
    ("  F4, any token after a whole path", "", pac(bonus=True), "a draw from p"),
    ("  all repaired", "", as_released(sjd_pac, REPAIRED), ""),
    ("SJD-PAC, one branch", "lossless", as_released(sjd_pac, Mistakes(), branches=1), "a draw from p after a path"),
    ("  bonus repaired", "", as_released(sjd_pac, Mistakes(bonus=False), branches=1), ""),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=100_002, help="draws of each method, a multiple of 7")
    parser.add_argument("--law", choices=toy_law.LAWS, default="plain", help="guidance and filters")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sampling, images = toy_law.LAWS[given.law], given.num - given.num % 7
    expected = toy_law.probabilities(sampling)
    print(f"{images} draws, law {given.law}, seed {given.seed}; TV of as many draws of the law itself is about 0.02\n")
    print("| method | claimed | z | TV | repair |\n| --- | --- | --- | --- | --- |")
    for name, claim, method, repair in METHODS:
        ids = method(sampling, images, seed=given.seed)
        z, _ = toy_law.goodness(ids, expected)
        print(f"| {name} | {claim} | {z:.1f} | {toy_law.distance(ids, expected):.3f} | {repair} |", flush=True)


if __name__ == "__main__":
    main()
