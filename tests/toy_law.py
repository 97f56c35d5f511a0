"""A network whose law is a table, so that the probability of every sequence is known, and a test whether draws follow
it: what speculative decoding is judged by.

Five tokens of three ids make 243 sequences; what needs more ids has four tokens of six, 1,296 sequences.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from imgtok.generators.sampling import TokenSampling
from imgtok.generators.speculative import Drafter, DraftNetwork, Jacobi, Law, Noise, decode
from imgtok.generators.speculative_recycled import Recycling
from imgtok.generators.speculative_rules import grouped, token_rule
from imgtok.tokenizers.tokens import Tokens

IDS, TOKENS = 3, 5
Shape = tuple[int, int]
SMALL, WIDE = (IDS, TOKENS), (6, 4)
"""Ids and tokens."""
CPU = torch.device("cpu")
LAWS = {
    "plain": TokenSampling(guidance=1.0),
    "guided": TokenSampling(guidance=2.0, temperature=1.3, schedule="linear"),
    "top_k": TokenSampling(guidance=2.0, top_k=2),
    "top_p": TokenSampling(guidance=1.5, top_p=0.8),
    "all": TokenSampling(guidance=1.5, temperature=1.2, top_k=2, top_p=0.9, interval=(1, 4)),
}
METHODS: dict[str, dict[str, Any]] = {
    "exact": {"window": 1},
    "draft": {"draft": True},
    "jacobi": {},
    "jacobi, uniform tail": {"tail": "uniform"},
    "jacobi, recycled tail": {"tail": "recycled"},
    "maximal": {"keep": True},
    "maximal, recycled tail": {"tail": "recycled", "keep": True},
    "gumbel": {"gumbel": True},
}


@cache
def logits(seed: int, ids: int = IDS, tokens: int = TOKENS) -> Tensor:
    """(1 + V + V^2 + ..., V): the logits after each beginning of a sequence, beginnings in the order of `number_of`."""
    return torch.randn(sum(ids**n for n in range(tokens)), ids, generator=torch.Generator().manual_seed(seed))


def number_of(sequences: Tensor, ids: int = IDS) -> Tensor:
    """(B, N + 1): the row of the table for each beginning of sequences (B, N), that of none first."""
    found = [torch.zeros(len(sequences), dtype=torch.long)]
    for token in sequences.T:
        found.append(ids * found[-1] + 1 + token)  # as the nodes of a tree, breadth first
    return torch.stack(found, dim=1)


class TableNetwork:
    """`speculative.Network` of one table, or of two, the second without the condition."""

    def __init__(self, tables: Sequence[Tensor], images: int, tokens: int = TOKENS) -> None:
        self.tables, self.tokens, self.seen = tables, tokens, torch.zeros(images, tokens, dtype=torch.long)

    def first(self) -> Tensor:
        return torch.cat([table[:1].expand(len(self.seen), -1) for table in self.tables])

    def score(self, ids: Tensor, first: Tensor | int) -> Tensor:
        start = torch.full((len(ids),), first) if isinstance(first, int) else first
        places = start[:, None] + torch.arange(ids.shape[1])
        self.seen.scatter_(1, places, ids)
        rows = number_of(self.seen[:, : self.tokens - 1], self.tables[0].shape[1]).gather(1, places + 1)
        return torch.cat([table[rows] for table in self.tables])


def tables_of(sampling: TokenSampling, shape: Shape = SMALL, *, draft: bool = False) -> list[Tensor]:
    conditional = (logits(2, *shape) if draft else 1.2 * logits(0, *shape),)
    return [*conditional, *(() if sampling.guidance == 1 else (logits(1, *shape),))]


def uniforms(images: int, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, *shape, generator=generator, dtype=torch.float64)


def noise(images: int, window: int, seed: int = 0, shape: Shape = SMALL, *, gumbel: bool = False) -> Noise:
    """Of all images of a call."""
    ids, tokens = shape
    of_tokens = uniforms(images, tokens, ids, seed=seed + 2).clamp(min=1e-30).log().neg().log().neg()
    rounds = uniforms(images, tokens - 1, window, 3, seed=seed + 1)
    return Noise(uniforms(images, seed=seed), rounds, of_tokens if gumbel else None)


def drawn(
    sampling: TokenSampling,
    images: int,
    *,
    window: int = 4,
    tail: str = "last",
    keep: bool = False,
    gumbel: bool = False,
    draft: bool = False,
    group: int = 1,
    seed: int = 0,
    given: Noise | None = None,
    shape: Shape = SMALL,
) -> Tokens:
    """Sequences of the toy by one method."""
    given = noise(images, window, seed, shape, gumbel=gumbel) if given is None else given
    tokens = shape[1]
    law = Law(sampling, tokens, CPU)
    drafter: Drafter = Recycling() if tail == "recycled" else Jacobi(tail, given.gumbel)
    if draft:
        drafter = DraftNetwork(TableNetwork(tables_of(sampling, shape, draft=True), images, tokens), law, tokens)
    rule = token_rule if group == 1 else partial(grouped, size=group)
    network = TableNetwork(tables_of(sampling, shape), images, tokens)
    return decode(network, law, drafter, given, num_tokens=tokens, window=window, rule=rule, keep=keep)


def probabilities(sampling: TokenSampling, shape: Shape = SMALL) -> Tensor:
    """Of all sequences, in order: (243,) of the small toy."""
    ids, tokens = shape
    sequences = torch.tensor(list(itertools.product(range(ids), repeat=tokens)))
    rows, law = number_of(sequences, ids)[:, :-1], Law(sampling, tokens, CPU)
    tables = tables_of(sampling, shape)
    found = law(torch.cat([table[rows] for table in tables]), torch.arange(tokens).expand(rows.shape))
    return found.double().gather(2, sequences[..., None]).prod(dim=1)[:, 0]


def sequence_numbers(ids: Tensor, shape: Shape) -> Tensor:
    """(B,): which sequence each of ids (B, N) is."""
    return (ids * shape[0] ** torch.arange(shape[1] - 1, -1, -1)).sum(dim=1)


def goodness(ids: Tensor, expected: Tensor, shape: Shape = SMALL) -> tuple[float, float]:
    """How well draws (B, N) follow the probabilities of all sequences: the chi-square statistic as a number of standard
    deviations from its mean, z, and the probability of one as large or larger. Cells of fewer than 5 are one cell.

    An impossible sequence makes z infinite.
    """
    numbers = sequence_numbers(ids, shape)
    found, due = torch.bincount(numbers, minlength=len(expected)).double(), expected * len(ids)
    if found[due == 0].any():
        return math.inf, 0.0
    rare = due < 5
    found, due = (
        torch.cat([x[~rare], x[rare].sum()[None]]) if due[rare].sum() >= 5 else x[~rare] for x in (found, due)
    )
    freedom = len(due) - 1
    statistic = ((found - due) ** 2 / due).sum()
    beyond = torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic / 2)
    return float((statistic - freedom) / math.sqrt(2 * freedom)), float(beyond)


def distance(ids: Tensor, expected: Tensor, shape: Shape = SMALL) -> float:
    """Total variation of what was drawn from the law; a sample of 10^5 of the law itself has about 0.02."""
    numbers = sequence_numbers(ids, shape)
    return float((torch.bincount(numbers, minlength=len(expected)) / len(ids) - expected).abs().sum() / 2)
