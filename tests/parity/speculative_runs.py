"""What each case of speculative decoding asks of our code: functions from a case to named outputs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from cases import Case
from torch import Tensor

from imgtok.generators import speculative_rules as rules
from imgtok.generators.sampling import draw, filter_logits

Outputs = dict[str, Tensor]


def laws(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Drafts (B, L), their laws q and the laws p by which they are judged, (B, L, V) each, as the steps say."""
    drafts, logits, noise = (case.input(name) for name in ("draft_tokens", "draft_logits", "target_noise"))
    target = torch.cat([logits[:, 1:] + noise, case.input("target_last")[:, None]], dim=1)
    top_k = case.about["top_k"]
    if top_k:
        drafts = logits.topk(top_k, dim=-1).indices.gather(-1, (drafts % top_k)[..., None]).squeeze(-1)
        logits, target = (filter_logits(values, top_k=top_k) for values in (logits, target))
    p, q = (values.double().softmax(dim=-1).float() for values in (target, logits))
    for slot in case.about["one_hot_slots"]:
        q[:, slot] = torch.zeros_like(q[:, slot]).scatter(-1, drafts[:, slot, None], 1.0)
    return drafts, q, p


def rule(case: Case) -> rules.Rule:
    if case.about["build"]["method"] == "sjd":
        return rules.token_rule
    return partial(rules.grouped, **group_options(case))


def group_options(case: Case) -> dict[str, Any]:
    about = case.about["groups"]
    return {
        "size": 2 * about["half"],
        "rule": "released",
        "probability_gap": about["prob_threshold"],
        "embedding": case.input("embedding"),
        "distance": about["distance_threshold"],
    }


def padded(values: Tensor, fill: float) -> Tensor:
    """With a slot 0 that holds nothing, as the cases have it."""
    return torch.cat([torch.full_like(values[:, :1], fill), values], dim=1)


def step(case: Case) -> Outputs:
    """The round, and what it is made of."""
    drafts, q, p = laws(case)
    judged = (p[:, :-1], q[:, 1:], drafts[:, 1:])
    accept = rule(case)(*judged)
    fresh_u, accept_u, how = case.input("fresh_u"), case.input("accept_u")[:, 1:], partial(rules.judge, rule=rule(case))
    first = how(p, *judged[1:], accept_u, fresh_u).accepted[:, None]
    pick = fresh_u.scatter(1, first, case.input("residual_u")[:, None])  # where none failed, fresh_u stands
    pick = pick.where(first < drafts.shape[1] - 1, fresh_u)
    found = how(p, *judged[1:], accept_u, pick)
    committed = found.accepted + 1
    failing = found.accepted.clamp(max=drafts.shape[1] - 2)
    rows = torch.arange(len(drafts))
    residual = rules.residual(p[rows, failing], q[rows, failing + 1])
    shortest = int(committed.min())
    outputs = {
        "draft": drafts,
        "q": q,
        "p": p,
        "fresh": draw(p, fresh_u),
        "accept_prob": padded(accept, torch.nan),
        "first_rejected": committed,
        "out_tokens": found.tokens,
        "residual": residual * (committed < drafts.shape[1])[:, None],
        "batch_committed_tokens": found.tokens[:, :shortest],
        "batch_left_tokens": found.tokens[:, shortest:],
        "out_scores_sum_abs": released_scores(p, q, found.accepted),
    }
    if case.about["laws"]:
        outputs |= emitted(case, p[:, :-1], q[:, 1:])
    return outputs | (groups(case, *judged) if "groups" in case.about else {})


def released_scores(p: Tensor, q: Tensor, accepted: Tensor) -> Tensor:
    """How far the laws that the published step hands on with its tokens are from p: the drafts' where accepted."""
    slot = torch.arange(p.shape[1])
    old = torch.cat([q[:, 1:], p[:, -1:]], dim=1)
    handed = old.where((slot < accepted[:, None])[..., None], p)
    return (handed - p).abs().sum(dim=-1)


def emitted(case: Case, p: Tensor, q: Tensor) -> Outputs:
    law = rules.slot_law(p, q, rules.accept_all(rule(case), p, q))
    return {"law": padded(law, 0.0), "law_tv": (law - p).abs().sum(dim=-1) / 2}


def groups(case: Case, p: Tensor, q: Tensor, drafts: Tensor) -> Outputs:
    found = rules.groups(p, drafts, **group_options(case))
    nowhere = ~found.window.any(dim=-1)
    return {
        "window": padded(found.members.masked_fill(~found.window, -1), -1),
        "window_kept": padded(found.kept.float(), 0.0),
        "group_p": padded(found.sums(p).masked_fill(nowhere, torch.nan), torch.nan),
        "group_q": padded(found.sums(q).masked_fill(nowhere, torch.nan), torch.nan),
    }
