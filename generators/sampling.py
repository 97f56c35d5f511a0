"""From logits to token ids: one law that every decoder shares, and draws from it by inverse CDF with given uniforms.

One uniform per (sample, step) decides a token, so a sample depends on its own seed and index and
not on who shares its batch, and two decoders fed the same uniforms can be compared token by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from imgtok.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, check

GroupRule = Literal["nearest", "released"]
"""See `speculative_rules.groups`."""


@dataclass(frozen=True, kw_only=True)
class TokenSampling:
    """How tokens are drawn."""

    temperature: NonNegativeFloat = 1.0
    """Divides the logits; at 0 the most likely token is taken."""
    top_k: NonNegativeInt = 0
    """Keeps the k most likely tokens; 0 keeps all."""
    top_p: Annotated[float, Range(0.0, 1.0, exclusive_low=True)] = 1.0
    """Keeps the most likely tokens that together hold this probability."""
    guidance: Annotated[float, Range(0.0, None)] = 1.5
    """Classifier-free guidance scale of the logits; 1 is none."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How guidance goes along the tokens: the same for all, or rising from 1 to its scale at the last token, evenly
    (ELM) or slowly at both ends."""
    interval: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """Tokens that are guided, from the first number up to, and not with, the second; null guides all. LlamaGen's
    cfg_interval of k is 0,k+2."""
    forbidden: tuple[NonNegativeInt, ...] = ()
    """A few ids that are never drawn."""
    decoding: Literal["exact", "draft", "jacobi", "grouped", "coupled"] = "exact"
    """How many tokens a call of the network gives. `exact`: one. The others guess tokens and judge them in one call:
    guesses of another, smaller network (`draft`), or of the call before (`jacobi`), which `coupled` changes as little
    as possible, so that more of them stand. These three draw from the same law as `exact`. `grouped` accepts guesses
    for which others would have done as well: faster, and from another law."""
    window: PositiveInt = 16
    """Tokens in one call of the network, the last settled one among them; `exact` does without."""
    group_size: PositiveInt | None = None
    """Tokens of similar probability that count as one: with `grouped`, where null is 10 and 1 is `jacobi`, or with
    `coupled`, where null is 1 and more are another law."""
    group_rule: GroupRule = "nearest"
    """Which tokens those are: as many above as below, of those that may be drawn; or as the authors released it."""
    coupling: Literal["maximal", "gumbel"] = "maximal"
    """How `coupled` guesses stay: by being judged again, or by noise that a token keeps."""
    draft_model: str | None = None
    """Folder or Hub name of the smaller network of `draft`, which draws the same tokens."""

    def __post_init__(self) -> None:
        check(self)
        if self.interval is not None and self.interval[0] >= self.interval[1]:
            raise ValueError(f"interval: {list(self.interval)} must be [first, end], the first below the end")
        if self.group_size is not None and self.decoding not in ("grouped", "coupled"):
            raise ValueError(f"group_size: {self.decoding} has no groups; say decoding=grouped, or group_size=null")
        if (self.draft_model is None) == (self.decoding == "draft"):
            remedy = "name one" if self.draft_model is None else f"{self.decoding} has none; say draft_model=null"
            raise ValueError(f"draft_model: goes with decoding=draft; {remedy}")

    def scale(self, token: int, num_tokens: int) -> float:
        """The guidance scale of a token, of which an image has `num_tokens`; 1 is none."""
        if self.interval is not None and not self.interval[0] <= token < self.interval[1]:
            return 1.0
        share = (token + 1) / num_tokens
        if self.schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.guidance if self.schedule == "constant" else 1 + (self.guidance - 1) * share

    def at(self, token: int, num_tokens: int) -> TokenSampling:
        """The settings for one token, with a guidance that is its own."""
        if self.schedule == "constant" and self.interval is None:
            return self
        return replace(self, guidance=self.scale(token, num_tokens), schedule="constant", interval=None)


def law(
    logits: Tensor, sampling: TokenSampling, unconditional: Tensor | None = None, closed: Tensor | None = None
) -> Tensor:
    """Probabilities (..., V), float32, by which the next token is drawn given its logits (..., V).

    In order: guidance away from the `unconditional` logits, if given, by the scale itself and not its schedule (see
    `TokenSampling.at`); ids that are `closed` (boolean, broadcasts to
    (..., V)) or forbidden; temperature, where 0 leaves the first of the largest; top-k; top-p; softmax. At least one
    id must be open.
    """
    logits = logits.float()
    if unconditional is not None:
        logits = guide(logits, unconditional.float(), sampling.guidance)
    if closed is not None:
        logits = logits.masked_fill(closed, -torch.inf)
    if sampling.forbidden:
        logits = logits.clone()
        for forbidden in sampling.forbidden:  # one by one: a list of ids would be copied to the device for every token
            logits[..., forbidden] = -torch.inf
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    kept = filter_logits(logits, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
    return kept.softmax(dim=-1)


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Divides (..., V) logits by `temperature`, then sets all but the top k, then the nucleus p, to -inf.

    top_k = 0 and top_p = 1 keep everything. Ties with the k-th logit are kept. The most likely token always stays.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token is dropped if those before it already hold p: the one that crosses p is kept.
        dropped = probabilities.cumsum(dim=-1) - probabilities > top_p
        dropped[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Ids (...) from probabilities (..., V) and as many uniforms (...) in [0, 1), by inverse CDF in float64.

    The probabilities need not add up to one exactly. A token of probability zero is never drawn.
    """
    return draw_several(probabilities, uniforms[..., None]).squeeze(-1)


def draw_several(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The same, several ids (..., W) from each law (..., V), by uniforms (..., W)."""
    device = probabilities.device
    if device.type == "mps":  # which has no float64
        probabilities = probabilities.cpu()
    cumulative = probabilities.double().cumsum(dim=-1)
    thresholds = uniforms.to(cumulative) * cumulative[..., -1:]
    found = torch.searchsorted(cumulative, thresholds, right=True)
    return found.clamp(max=probabilities.shape[-1] - 1).to(device)


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """Guided logits: unconditional + scale * (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)
