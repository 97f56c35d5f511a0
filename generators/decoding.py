"""From a GPT and a law to sequences of ids: the loops that draw one token after the other.

`plain` is the definition: every token's law is read from a pass over the whole prefix. `cached` draws the same tokens
from one prefill and one step a token, over a key/value cache. Both keep to what an accelerator likes: nothing is copied
to the device for a token, and nothing read by the host, but for one look every `LOOK_EVERY` tokens whether all
sequences have ended, where they can end. On a CPU, where looking costs nothing, it looks after every token.

Shapes: B images, R rows through the network (2B where guided), K tokens, D width, V outputs, S slots, C digits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from imgtok.generators.conditioning import Condition, Control, Reading, controlled
from imgtok.generators.digits import IndependentHead
from imgtok.generators.dimension_head import DimensionHead
from imgtok.generators.sampling import TokenSampling, draw, law
from imgtok.tokenizers.tokens import Tokens

if TYPE_CHECKING:
    from imgtok.generators.gpt import GPT

OnStep = Callable[[int], None]
LOOK_EVERY = 16
"""Tokens between two looks at an accelerator whether there is anything left to draw."""


class Uniforms(NamedTuple):
    """The random numbers of a call, in [0, 1)."""

    ids: Tensor
    """(B, K): one for each id, or for the end in its place; (B, K, C) for a model that draws digits of ids."""
    slots: Tensor | None = None
    """(B, K): one for each slot, or for the end in its place; for a model that draws slots."""

    def to(self, device: torch.device) -> Uniforms:
        """The same where they are needed, in one copy; MPS has no float64, so for it they stay on the host."""
        if device.type == "mps":
            return self
        return Uniforms(self.ids.to(device), None if self.slots is None else self.slots.to(device))


@torch.no_grad()
def plain(
    model: GPT,
    condition: Condition | Reading,
    uniforms: Uniforms,
    sampling: TokenSampling,
    on_step: OnStep | None = None,
    control: Control | None = None,
) -> Tokens:
    """Tokens (B, K) by recomputing the whole prefix for each of them: slow, and the oracle of `cached`.

    `condition`, `control` and errors are those of `GPT.generate`, here and in `cached`.
    """
    drawing = Drawing(model, uniforms, sampling, plainly=True)
    reading = drawing.reading(condition)
    for k in range(drawing.count):
        reading = controlled(control, k, reading)
        ids, slots = drawing.columns(slice(0, k))
        drawing.add(k, model.predict(model.hidden(reading, ids, slots=slots)[:, -1]))
        if on_step is not None:
            on_step(k + 1)
    return drawing.tokens()


@torch.no_grad()
def cached(
    model: GPT,
    condition: Condition | Reading,
    uniforms: Uniforms,
    sampling: TokenSampling,
    on_step: OnStep | None = None,
    control: Control | None = None,
) -> Tokens:
    """The same tokens, from a prefill and one step a token over what the cache holds."""
    drawing = Drawing(model, uniforms, sampling)
    reading = controlled(control, 0, drawing.reading(condition))
    cache = model.new_cache(len(reading), drawing.count)
    found = model.prefill(reading, cache)
    for k in range(drawing.count):
        drawing.add(k, found[:, -1])
        if on_step is not None:
            on_step(k + 1)
        if k + 1 == drawing.count or drawing.has_ended(k):
            break
        first = k
        if control is not None:
            before, reading = reading, controlled(control, k + 1, reading)
            if reading.prefix is not before.prefix:
                cache.truncate(0)
                model.prefill(reading, cache)
                first = 0
            cache.memory, cache.prefix_mask = reading.memory, reading.prefix_mask
            cache.prefix_record = reading.prefix_record
        ids, slots = drawing.columns(slice(first, k + 1))
        found = model.step(ids, cache, slots=slots)
    return drawing.tokens()


class Drawing:
    """The tokens of one call as they are drawn, one column after the other."""

    def __init__(self, model: GPT, uniforms: Uniforms, sampling: TokenSampling, *, plainly: bool = False) -> None:
        """`plainly` is how a head draws digits; see `dimension_head`."""
        config, device = model.config, model.device
        batch, self.count = uniforms.ids.shape[:2]
        self.plainly = plainly
        self.model = model
        self.uniforms = uniforms.to(device)
        self.sampling = sampling
        self.streams = 1 if sampling.guidance == 1 else 2
        self.ids = torch.zeros(batch, self.count, dtype=torch.long, device=device)
        self.slots = torch.zeros_like(self.ids) if config.num_slots else None
        self.lengths = torch.full((batch,), 0 if config.ends else self.count, device=device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)

    def reading(self, condition: Condition | Reading) -> Reading:
        """What the rows of the network read."""
        return self.model._reading(condition, len(self.ids), guided=self.streams == 2)

    def add(self, k: int, found: Tensor) -> None:
        """Draws token k of each row from what `GPT.predict` makes of the states before it: logits (R, V), or states
        (R, D) of a model that draws slots or digits.
        """
        config, of_rows = self.model.config, None
        if self.slots is not None:
            assert self.uniforms.slots is not None, "a model that draws slots needs random numbers for them"
            previous = self.slots[:, k - 1] if k else torch.full_like(self.lengths, -1)
            closed = closed_slots(previous, config.num_slots)
            probabilities = self._law(self.model.slot_logits(found), of_slots(self._sampling(k)), closed)
            slots = draw(probabilities, self.uniforms.slots[:, k])
            self.alive = self.alive & (slots != config.num_slots)
            slots = slots.where(self.alive, 0)
            self.slots[:, k] = slots
            of_rows = slots.repeat(self.streams)
        if isinstance(self.model.head, DimensionHead | IndependentHead):
            ids = self._draw_digits(k, self.model.features(found, of_rows), self.model.head)
        else:
            logits = found if of_rows is None else self.model.read_out(found, of_rows)
            ids = self._draw(k, logits, config.end if k == 0 else None, self.uniforms.ids[:, k])
        if config.end is not None:
            self.alive = self.alive & (ids < config.end)
        if config.ends:
            self.lengths += self.alive
            ids = ids.where(self.alive, 0)
        self.ids[:, k] = ids

    def _draw_digits(self, k: int, features: Tensor, head: DimensionHead | IndependentHead) -> Tensor:
        """Ids (B,) of token k by the digits that the head draws from features (R, D), the same in both streams."""
        config = self.model.config

        def choose(step: int, logits: Tensor) -> Tensor:
            end = config.digits[0] if config.end is not None and k == step == 0 else None
            return self._draw(k, logits, end, self.uniforms.ids[:, k, step]).repeat(self.streams)

        digits = (head.draw_plainly if self.plainly else head.draw)(features, choose)
        return self.model.digits.join(digits[: len(self.ids)])

    def _sampling(self, k: int) -> TokenSampling:
        """The settings for token k."""
        return self.sampling.at(k, self.model.config.num_tokens)

    def _draw(self, k: int, logits: Tensor, closed: int | None, uniforms: Tensor) -> Tensor:
        """Numbers (B,) of token k by the law of logits (R, V), where one of them may be closed."""
        mask = None if closed is None else torch.arange(logits.shape[-1], device=logits.device).eq(closed)
        return draw(self._law(logits, self._sampling(k), mask), uniforms)

    def _law(self, logits: Tensor, sampling: TokenSampling, closed: Tensor | None) -> Tensor:
        """The law (B, V) of logits (R, V), whose second half is the unconditional stream where there is guidance."""
        if self.streams == 1:
            return law(logits, sampling, closed=closed)
        conditional, unconditional = logits.chunk(2)
        return law(conditional, sampling, None if sampling.guidance == 1 else unconditional, closed)

    def columns(self, columns: slice) -> tuple[Tensor, Tensor | None]:
        """Ids and slots of some tokens, the same for both streams: (R, columns)."""
        slots = None if self.slots is None else self.slots[:, columns].repeat(self.streams, 1)
        return self.ids[:, columns].repeat(self.streams, 1), slots

    def has_ended(self, k: int) -> bool:
        """Whether nothing is left to draw after token k, as far as anyone looked."""
        look = self.alive.device.type == "cpu" or (k + 1) % LOOK_EVERY == 0
        # a number, since the suite's fake GPU answers 1 and so goes on
        return self.model.config.ends and look and int(self.alive.sum()) == 0

    def tokens(self) -> Tokens:
        """All of them, with zeros after the end of a row."""
        return Tokens(self.ids, self.lengths, self.slots)


@functools.lru_cache(maxsize=4096)
def of_slots(sampling: TokenSampling) -> TokenSampling:
    """How slots are drawn: filters and forbidden numbers are meant for ids."""
    return replace(sampling, top_k=0, top_p=1.0, forbidden=())


def closed_slots(previous: Tensor, num_slots: int) -> Tensor:
    """What cannot follow a token of the slots `previous` (...), -1 before the first: boolean (..., S + 1).

    Those are the slots up to it, and for the first token the end, which is number S.
    """
    choices = torch.arange(num_slots + 1, device=previous.device)
    before = previous[..., None]
    return (choices <= before) | ((choices == num_slots) & (before < 0))
