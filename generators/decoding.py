"""From a GPT and a law to sequences of ids: the loops that draw one token after the other.

`plain` is the definition: every token's law is read from a pass over the whole prefix. `cached` draws the same ids from
one prefill and one step a token, over a key/value cache. Both keep to what an accelerator likes: nothing is read by the
host and nothing copied to the device for a token; uniforms go there once.

Shapes: B images, R rows through the network (2B where guided), K tokens, V outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imgtok.generators.conditioning import Condition
from imgtok.generators.sampling import TokenSampling, draw, law
from imgtok.tokenizers.tokens import Tokens

if TYPE_CHECKING:
    from imgtok.generators.gpt import GPT

OnStep = Callable[[int], None]


@torch.no_grad()
def cached(
    model: GPT, condition: Condition, uniforms: Tensor, sampling: TokenSampling, on_step: OnStep | None = None
) -> Tokens:
    """Ids (B, K) for the condition, from uniforms (B, K)."""
    count, guided = uniforms.shape[1], sampling.guidance != 1
    streams = model.with_unconditional(condition) if guided else condition
    ids = torch.zeros(uniforms.shape, dtype=torch.long, device=model.device)
    uniforms = on_device(uniforms, model.device)
    cache = model.new_cache(len(streams), count)
    logits = model.prefill(streams, cache)
    for k in range(count):
        ids[:, k] = draw(law_of(logits[:, -1], sampling), uniforms[:, k])
        if on_step is not None:
            on_step(k + 1)
        if k + 1 < count:
            logits = model.step(ids[:, k : k + 1].repeat(1 + guided, 1), cache)
    return Tokens.full(ids)


@torch.no_grad()
def plain(
    model: GPT, condition: Condition, uniforms: Tensor, sampling: TokenSampling, on_step: OnStep | None = None
) -> Tokens:
    """The same by recomputing the whole prefix for every token: slow, and the oracle of `cached`."""
    streams = model.with_unconditional(condition) if sampling.guidance != 1 else condition
    ids = torch.empty(len(condition), 0, dtype=torch.long, device=model.device)
    for k in range(uniforms.shape[1]):
        states = model.hidden(streams, ids.repeat(len(streams) // len(ids), 1))
        drawn = draw(law_of(model.read_out(states[:, -1]), sampling), uniforms[:, k])
        ids = torch.cat([ids, drawn[:, None]], dim=1)
        if on_step is not None:
            on_step(k + 1)
    return Tokens.full(ids)


def law_of(logits: Tensor, sampling: TokenSampling) -> Tensor:
    """The law (B, V) of logits (R, V), whose second half is the unconditional stream where there is guidance."""
    if sampling.guidance == 1:
        return law(logits, sampling)
    conditional, unconditional = logits.chunk(2)
    return law(conditional, sampling, unconditional)


def on_device(uniforms: Tensor, device: torch.device) -> Tensor:
    """The uniforms where they are needed, in one copy; MPS has no float64, so there they stay on the host."""
    return uniforms if device.type == "mps" else uniforms.to(device)
