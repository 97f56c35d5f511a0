"""Which methods of speculative decoding are lossless: draws by each of them, held against a law that is known.

    python benchmarks/lossless.py              # ours, and others as released: the table of docs/speculative.md
    python benchmarks/lossless.py --num 20000  # fewer draws, quicker and less sensitive
    python benchmarks/lossless.py --groups     # how far groups lead away from the law, by their size

The toy is a network of five tokens of three ids, so that the probability of each of 243 sequences is known; where it is
said so, of four tokens of six ids. A method is
exact if the chi-square statistic of its draws is what it is for the law itself: z, its deviations from the mean, stays
below 4 or so. The released rules are in tests/released_decoders.py, written from their description.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


import toy_law
from released_decoders import Mistakes, jacobi, sjd_pac

from imgtok.generators.sampling import TokenSampling
from imgtok.generators.speculative_rules import accept_all, grouped, slot_law

REPAIRED = Mistakes(path=False, siblings=False, failing=False, bonus=False)
Draw = Callable[..., Tensor]


def ours(**how: object) -> Draw:
    return lambda sampling, images, **given: toy_law.drawn(sampling, images, **given, **how).ids  # type: ignore[arg-type]


def as_released(method: Draw, *given: object, **how: object) -> Draw:
    return lambda sampling, images, seed, shape: method(sampling, images, *given, seed=seed, shape=shape, **how)


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
    ("  F3, six ids", "", pac(failing=True), "that of the draft itself"),
    ("  F4, any token after a whole path", "", pac(bonus=True), "a draw from p"),
    ("  all repaired", "", as_released(sjd_pac, REPAIRED), ""),
    ("  all repaired, six ids", "", as_released(sjd_pac, REPAIRED), ""),
    ("SJD-PAC, one branch", "lossless", as_released(sjd_pac, Mistakes(), branches=1), "a draw from p after a path"),
    ("  bonus repaired", "", as_released(sjd_pac, Mistakes(bonus=False), branches=1), ""),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=100_002, help="draws of each method, a multiple of 7")
    parser.add_argument("--law", choices=toy_law.LAWS, default="plain", help="guidance and filters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", action="store_true", help="total variation by group size, and nothing else")
    given = parser.parse_args()
    sampling, images = toy_law.LAWS[given.law], given.num - given.num % 7
    if given.groups:
        by_group_size(sampling, images, given.seed)
        return
    print(f"{images} draws, law {given.law}, seed {given.seed}\n")
    print("| method | claimed | z | TV | repair |\n| --- | --- | --- | --- | --- |")
    for name, claim, method, repair in METHODS:
        shape = toy_law.WIDE if "six ids" in name else toy_law.SMALL
        expected = toy_law.probabilities(sampling, shape)
        ids = method(sampling, images, seed=given.seed, shape=shape)
        z, _ = toy_law.goodness(ids, expected, shape)
        print(f"| {name} | {claim} | {z:.1f} | {toy_law.distance(ids, expected, shape):.3f} | {repair} |", flush=True)


def by_group_size(sampling: TokenSampling, images: int, seed: int) -> None:
    """Of whole sequences of the toy, by drawing; and of one judged slot, by adding up, where laws are flat."""
    shape = toy_law.WIDE
    expected = toy_law.probabilities(sampling, shape)
    print(f"Four tokens of six ids, {images} draws, window 4\n")
    print("| group_size | accepted | TV, jacobi | TV, coupled |\n| --- | --- | --- | --- |")
    for size in range(1, shape[0] + 1):
        found = [
            toy_law.drawn(sampling, images, group=size, keep=keep, seed=seed, shape=shape) for keep in (False, True)
        ]
        accepted = found[0].calls.summary()["accepted_share"]
        far = [f"{toy_law.distance(tokens.ids, expected, shape):.3f}" for tokens in found]
        print(f"| {size} | {accepted} | {' | '.join(far)} |", flush=True)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, 1024, generator=generator)
    p = logits.softmax(dim=-1)
    q = (logits + torch.randn(8, 1024, generator=generator)).softmax(dim=-1)
    print("\nOne slot of 1,024 ids, logits N(0, 1) and drafts N(0, 1) beside them, 8 laws\n")
    print("| group_size | accepted, nearest | TV | accepted, released | TV |\n| --- | --- | --- | --- | --- |")
    for size in (1, 2, 3, 5, 10, 14, 25, 50, 100):
        row = [str(size)]
        for rule in ("nearest", "released"):
            accept = torch.stack(
                [accept_all(partial(grouped, size=size, rule=rule), a, b) for a, b in zip(p, q, strict=True)]
            )
            law = slot_law(p, q, accept)
            row += [f"{(q * accept).sum(-1).mean():.3f}", f"{(law - p).abs().sum(-1).mean() / 2:.3f}"]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
