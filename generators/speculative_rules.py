"""The rules of speculative decoding, as functions of tensors: which drafts are accepted, and what is drawn instead.

A draft x was drawn from a law q, and the network says afterwards that the law was p. The **token rule** accepts x with
probability min(1, p(x) / q(x)) and otherwise draws from the residual, max(p - q, 0) normalised: what comes out has the
law p exactly, whatever q was (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). Speculative Jacobi
decoding (SJD, arXiv 2410.01699) applies it to drafts that the same network proposed one round before.

The other rules accept more and so draw from another law than p. `grouped` (GSD, arXiv 2508.07747) compares the
probabilities of a group of tokens about x; `amplified` and `added` are the baselines that it has to beat.

`judge` is a round for a whole batch: it looks at all slots at once. How later drafts depend on earlier ones is its
coupling (SCD, arXiv 2510.24211): what a slot emits always has the law p of this round, and a coupling makes it likely
that this is the old draft again.

Shapes: B rows, L slots of a round, of which L - 1 have a draft, V vocabulary, G members of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from imgtok.generators.sampling import GroupRule, draw

Rule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(p, q, drafts) -> probabilities (...) that drafts (...) are accepted, of laws p and q (..., V)."""

# ---------------------------------------------------------------- when a draft is accepted


def token_rule(p: Tensor, q: Tensor, drafts: Tensor) -> Tensor:
    """min(1, p(x) / q(x)): exact."""
    return _ratio(_at(p, drafts), _at(q, drafts))


def amplified(p: Tensor, q: Tensor, drafts: Tensor, factor: float) -> Tensor:
    """min(1, factor p(x) / q(x)): a baseline that is not exact."""
    return _ratio(factor * _at(p, drafts), _at(q, drafts))


def added(p: Tensor, q: Tensor, drafts: Tensor, amount: float) -> Tensor:
    """min(1, (p(x) + amount) / q(x)): a baseline that is not exact, and accepts tokens of probability zero."""
    return _ratio(_at(p, drafts) + amount, _at(q, drafts))


def grouped(
    p: Tensor,
    q: Tensor,
    drafts: Tensor,
    size: int,
    *,
    rule: GroupRule = "nearest",
    probability_gap: float | None = None,
    embedding: Tensor | None = None,
    distance: float | None = None,
) -> Tensor:
    """min(1, p(group of x) / q(group of x)), where the group is `groups` of the same arguments: not exact, except that
    a group of one is the token rule to the bit.

    By `released`, the token rule stands in where there is no group. By `nearest`, a token that p excludes is not
    accepted.
    """
    found = groups(p, drafts, size, rule=rule, probability_gap=probability_gap, embedding=embedding, distance=distance)
    of_p, of_q = found.sums(p), found.sums(q)
    if rule == "released":
        return torch.where(found.window.any(dim=-1), _ratio(of_p, of_q), token_rule(p, q, drafts))
    return _ratio(of_p, of_q).masked_fill(_at(p, drafts) == 0, 0)


@dataclass(frozen=True)
class Groups:
    """Groups of tokens, one for each draft."""

    members: Tensor
    """(..., G) ids by rising probability."""
    window: Tensor
    """(..., G): which of them are there at all; by the released rule some drafts have none."""
    kept: Tensor
    """(..., G): which of these belong to the group."""

    def sums(self, law: Tensor) -> Tensor:
        """The probability (...) of each group by a law (..., V)."""
        return (law.gather(-1, self.members) * self.kept).sum(dim=-1)


def groups(
    p: Tensor,
    drafts: Tensor,
    size: int,
    *,
    rule: GroupRule = "nearest",
    probability_gap: float | None = None,
    embedding: Tensor | None = None,
    distance: float | None = None,
) -> Groups:
    """The tokens beside each draft (...) in the order of the law p (..., V), ties by id.

    nearest: `size` tokens, the draft in their middle (with one more below it where the number is even), shifted where
        the order ends; of them those to which p gives a probability.
    released: as the published code has them: size // 2 below the draft and (size - 1) // 2 above it, cut at the upper
        end; none at all where fewer than size // 2 are below it.

    Of these, members whose probability is within `probability_gap` of the draft's, and whose row of the `embedding`
    (V, D) is within the squared Euclidean `distance`; None leaves a filter out. Raises ValueError for a size below 1 or
    above V.
    """
    count = p.shape[-1]
    if not 1 <= size <= count:
        raise ValueError(f"group_size: a group holds 1 to {count} tokens, as many as the vocabulary has; given {size}")
    if (embedding is None) != (distance is None):
        raise ValueError("distance: needs the embedding whose rows are compared, and the other way round")
    own, ids = _at(p, drafts)[..., None], torch.arange(count, device=p.device)
    rank = ((p < own) | ((p == own) & (ids < drafts[..., None]))).sum(dim=-1)
    below, order = size // 2, p.sort(dim=-1, stable=True).indices
    first = rank - below
    if rule == "nearest":
        first = first.clamp(0, count - size)
    places = first[..., None] + torch.arange(size, device=p.device)
    window = (first >= 0)[..., None] & (places < count)
    members = order.gather(-1, places.clamp(0, count - 1))
    of_members, kept = p.gather(-1, members), window
    if rule == "nearest":
        kept = kept & (of_members > 0)
    if probability_gap is not None:
        kept = kept & ((of_members - own).abs() < probability_gap)
    if embedding is not None and distance is not None:
        kept = kept & (_squared_distances(embedding, drafts, members) < distance)
    return Groups(members, window, kept)


def _squared_distances(embedding: Tensor, drafts: Tensor, members: Tensor) -> Tensor:
    """Between the rows of drafts (...) and members (..., G), (..., G)."""
    return (embedding[members] - embedding[drafts][..., None, :]).square().sum(dim=-1)


def _at(law: Tensor, ids: Tensor) -> Tensor:
    """The probabilities (...) of ids (...) by a law (..., V)."""
    return law.gather(-1, ids[..., None]).squeeze(-1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """min(1, above / below), and 0 for 0 / 0."""
    return (above / below).clamp(max=1).masked_fill(above == 0, 0)


# ---------------------------------------------------------------- what is drawn instead


def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(p - q, 0), normalised (..., V): the law of what takes the place of a draft that was not accepted.

    Where the laws are equal, nothing was rejected but by rounding, and it is p.
    """
    left = (p - q).clamp(min=0)
    total = left.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, left / total, p)


def slot_law(p: Tensor, q: Tensor, accept: Tensor) -> Tensor:
    """The law (..., V) of what a judged slot emits, where each possible draft is accepted with `accept` (..., V): p
    itself for the token rule.
    """
    accepted = q * accept
    return accepted + (1 - accepted.sum(dim=-1, keepdim=True)) * residual(p, q)


def accept_all(rule: Rule, p: Tensor, q: Tensor) -> Tensor:
    """The probabilities (..., V) with which a rule accepts each possible draft; V times the work of one draft."""
    every = torch.arange(p.shape[-1], device=p.device).expand(*p.shape)
    wide = (*p.shape, p.shape[-1])
    return rule(p[..., None, :].expand(wide), q[..., None, :].expand(wide), every)


# ---------------------------------------------------------------- a round


class Round(NamedTuple):
    """What a round found."""

    tokens: Tensor
    """(B, L): in each row the accepted drafts, one more token, and then drafts for the next round, whose law is p."""
    accepted: Tensor
    """(B,): accepted drafts; one more token than these is committed."""


def judge(
    p: Tensor,
    q: Tensor,
    drafts: Tensor,
    accept: Tensor,
    pick: Tensor,
    *,
    rule: Rule = token_rule,
    keep: bool = False,
    noise: Tensor | None = None,
    settled: Tensor | None = None,
) -> Round:
    """A round: drafts (B, L - 1) that were drawn from q (B, L - 1, V) are held against p (B, L, V), whose last slot has
    no draft. `accept` (B, L - 1) and `pick` (B, L) are uniforms in [0, 1).

    Up to the first draft that is not accepted, drafts stay; that one is replaced by a draw from the residual. After
    it, drafts for the next round are drawn: from p independently of all that came before (SJD); with `keep`, by the
    rule again, so that a draft stays with the greatest probability that is possible (maximal coupling); or, with
    Gumbel `noise` (B, L, V) that a position keeps from round to round, as the largest of log p + noise (Gumbel
    coupling). Drafts that are `settled` (B, L - 1) are accepted in any case.
    """
    passes = accept < rule(p[:, :-1], q, drafts)
    if settled is not None:
        passes = passes | settled
    accepted = passes.long().cumprod(dim=1).sum(dim=1)
    slot = torch.arange(drafts.shape[1], device=drafts.device)
    stays = passes if keep else slot < accepted[:, None]
    falls = ~passes if keep else slot == accepted[:, None]
    law = torch.where(falls[..., None], residual(p[:, :-1], q), p[:, :-1])
    drawn = draw(torch.cat([law, p[:, -1:]], dim=1), pick)
    if noise is not None:
        failing = torch.nn.functional.pad(falls, (0, 1))
        drawn = drawn.where(failing, (p.log() + noise).argmax(dim=-1))
    return Round(torch.cat([drafts.where(stays, drawn[:, :-1]), drawn[:, -1:]], dim=1), accepted)
