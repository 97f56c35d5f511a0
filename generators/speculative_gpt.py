"""Speculative decoding of a GPT: its settings as a drafter and a rule, and the network as the loop knows it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imgtok import randomness
from imgtok.config import ConfigError
from imgtok.generators.conditioning import Condition, Reading
from imgtok.generators.decoding import Uniforms
from imgtok.generators.sampling import TokenSampling
from imgtok.generators.speculative import Drafter, DraftNetwork, Jacobi, Law, Network, Noise, OnStep, Window, decode
from imgtok.generators.speculative_rules import Rule, grouped, token_rule
from imgtok.tokenizers.tokens import Tokens

if TYPE_CHECKING:
    from imgtok.generators.gpt import GPT

GROUP_SIZE = 10
"""Members of a group where decoding is grouped and nothing else is said."""


class GPTNetwork:
    """A GPT over a cache of its own, see `speculative.Network`."""

    def __init__(self, model: GPT, reading: Reading, images: int, num_tokens: int) -> None:
        """`reading` is of R rows: the images, and as many that say nothing where there is guidance."""
        self.model, self.reading, self.streams = model, reading, len(reading) // images
        self.cache = model.new_cache(len(reading), num_tokens)

    def first(self) -> Tensor:
        return self.model.prefill(self.reading, self.cache)[:, -1]

    def score(self, ids: Tensor, first: Tensor | int) -> Tensor:
        ids, prefix = ids.repeat(self.streams, 1), self.model.config.prefix_length
        if isinstance(first, int):
            self.cache.truncate(prefix + first)
            return self.model.step(ids, self.cache)
        before = prefix + first.repeat(self.streams)
        self.cache.truncate(before)
        return self.model.step(ids, self.cache, before[:, None] + torch.arange(ids.shape[1], device=ids.device))


def generate(
    model: GPT,
    condition: Condition | Reading,
    *,
    seed: int,
    indices: Sequence[int],
    num_tokens: int,
    sampling: TokenSampling,
    on_step: OnStep | None = None,
    draft: GPT | None = None,
) -> Tokens:
    """Tokens (B, num_tokens) of a GPT, by any `sampling.decoding` but exact.

    `draft` is the smaller network of decoding=draft. Raises ConfigError for a model or settings that do not go
    together.
    """
    check(model, sampling, draft)
    if draft is not None and isinstance(condition, Reading):
        raise ConfigError("sampling.decoding: draft takes labels or captions, since two networks read them")
    config = model.config

    def network(of: GPT) -> GPTNetwork:
        reading = of._reading(condition, len(indices), guided=sampling.guidance != 1)
        return GPTNetwork(of, reading, len(indices), num_tokens)

    return decode_by(
        network(model),
        sampling,
        seed=seed,
        indices=indices,
        num_tokens=num_tokens,
        length=config.num_tokens,
        vocab_size=config.vocab_size,
        device=model.device,
        draft=None if draft is None else network(draft),
        on_step=on_step,
        replay=model.replays,
    )


def draws_exactly(model: GPT, condition: Condition | Reading) -> bool:
    """Whether `exact` is for this drawing: on a GPU where steps are to be graphs, whole ids, as many for every image,
    and nothing that a `Reading` may want to be told of each step.
    """
    config = model.config
    whole = not (config.ends or config.digits or config.num_slots)
    return model.device.type == "cuda" and model.replays and whole and not isinstance(condition, Reading)


def exact(
    model: GPT, condition: Condition | Reading, uniforms: Uniforms, sampling: TokenSampling, on_step: OnStep | None
) -> Tokens:
    """What `decoding.cached` draws, by steps of one shape each, of which a GPU makes a graph: rounds of one token."""
    images, count = uniforms.ids.shape
    ids, device = uniforms.ids.to(model.device), model.device
    reading = model._reading(condition, images, guided=sampling.guidance != 1)
    law = Law(sampling, model.config.num_tokens, device)
    rounds = ids[:, 1:, None, None].expand(-1, -1, 1, 3)
    network = GPTNetwork(model, reading, images, count)
    noise, nothing = Noise(ids[:, 0], rounds), Undrafted()
    return decode(network, law, nothing, noise, num_tokens=count, window=1, on_step=on_step, replay=model.replays)


class Undrafted:
    """Drafts where there are none, see `speculative.Drafter`."""

    def begin(self, first: Tensor, width: int) -> None: ...
    def propose(self, tokens: Tensor, window: Window, uniforms: Tensor) -> Tensor:
        raise AssertionError("a window of one token has no drafts")

    def learn(self, laws: Tensor, window: Window, ids: Tensor) -> None: ...


def decode_by(
    network: Network,
    sampling: TokenSampling,
    *,
    seed: int,
    indices: Sequence[int],
    num_tokens: int,
    length: int,
    vocab_size: int,
    device: torch.device,
    draft: Network | None = None,
    on_step: OnStep | None = None,
    replay: bool = False,
) -> Tokens:
    """Tokens (B, num_tokens) of any network by the settings; `exact` is a window of one token.

    `length` is how many tokens a whole image has, on which guidance may depend; `draft` is the network of
    decoding=draft; `replay` is that of `speculative.decode`.
    """
    window = 1 if sampling.decoding == "exact" else sampling.window
    first = randomness.uniform(seed, indices, (length,), "tokens")[:, 0]
    rounds = randomness.uniform(seed, indices, (num_tokens - 1, window, 3), "rounds")
    noise = Noise(*(None if part is None else part.to(device) for part in (first, rounds)))
    if sampling.decoding == "coupled" and sampling.coupling == "gumbel":
        noise = noise._replace(gumbel=gumbel(seed, indices, num_tokens, vocab_size).to(device))
    law = Law(sampling, length, device)
    drafter: Drafter = Jacobi(gumbel=noise.gumbel) if draft is None else DraftNetwork(draft, law, num_tokens)
    return decode(
        network,
        law,
        drafter,
        noise,
        num_tokens=num_tokens,
        window=window,
        rule=rule_of(sampling),
        keep=sampling.decoding == "coupled" and sampling.coupling == "maximal",
        on_step=on_step,
        replay=replay,
    )


def check(model: GPT, sampling: TokenSampling, draft: GPT | None) -> None:
    """Raises ConfigError for a model or settings that do not go together."""
    config, way = model.config, sampling.decoding
    if config.ends or config.digits:
        what = "draws sequences that end" if config.ends else "draws ids digit by digit"
        raise ConfigError(f"sampling.decoding: {way} is not there for a model that {what}; say exact")
    check_group(sampling, config.vocab_size)
    if (draft is None) == (way == "draft"):
        raise ConfigError("sampling.draft_model: goes with decoding=draft, which needs one: a GPT of the same ids")
    if draft is None:
        return
    theirs = draft.config
    for name, own, other in (
        ("ids", config.vocab_size, theirs.vocab_size),
        ("tokens", config.num_tokens, theirs.num_tokens),
        ("classes", config.num_classes, theirs.num_classes),
        ("channels of a caption's feature", *(getattr(c.condition, "text_width", 0) for c in (config, theirs))),
    ):
        if own != other:
            raise ConfigError(f"sampling.draft_model: it has {other} {name}, and the model {own}; both must agree")
    if theirs.ends or theirs.digits:
        raise ConfigError("sampling.draft_model: it must draw ids as a whole, and as many for every image")


def check_group(sampling: TokenSampling, vocab_size: int) -> None:
    """Raises ConfigError for groups of more ids than there are."""
    if sampling.group_size is not None and sampling.group_size > vocab_size:
        raise ConfigError(
            f"sampling.group_size: a group of {sampling.group_size} is larger than the vocabulary, which has "
            f"{vocab_size} ids"
        )


def rule_of(sampling: TokenSampling) -> Rule:
    """When a draft is accepted."""
    size = sampling.group_size or (GROUP_SIZE if sampling.decoding == "grouped" else 1)
    return token_rule if size == 1 else partial(grouped, size=size, rule=sampling.group_rule)


def gumbel(seed: int, indices: Sequence[int], num_tokens: int, vocab_size: int) -> Tensor:
    """Noise (B, N, V) float32 that each token of an image keeps, 4 bytes times N and V of memory for an image."""
    rows = torch.empty(len(indices), num_tokens, vocab_size)
    for row, index in zip(rows, indices, strict=True):
        uniforms = randomness.uniform(seed, [index], (num_tokens, vocab_size), "gumbel")[0]
        row.copy_(uniforms.clamp(min=2.0**-54).log().neg().log().neg())
    return rows
