"""The fast path of xAR (`generators/xar.py`): the same numbers, to rounding, with less work.

`Span` runs several entities through the network: it computes nothing that the mask forbids, and shares gates, scales
and shifts among the tokens of an entity. `SamplingNetwork` keeps finished entities in a key/value cache and leaves out
unconditional rows that nobody reads. `ModulationTable` computes what times and classes do to the blocks for all calls
of a `generate` at once. `tests/generators/test_xar.py` compares all of them with the plain algorithm.

Shapes: B images, C channels, L tokens, N entities, W width, R rows of a sampling call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imgtok import flow
from imgtok.generators.conditioning import Condition, Control, Reading, controlled
from imgtok.generators.entities import Entities
from imgtok.layers.attention import Look
from imgtok.layers.cache import KVCache, Memory

if TYPE_CHECKING:
    from imgtok.generators.xar import XAR, EntityPlan

# ---------------------------------------------------------------- several entities in one call


def velocity(model: XAR, x: Tensor, t: Tensor, condition: Condition | Reading) -> Tensor:
    """`XAR.velocity` of the first entities of R sequences, as training calls it: x (R, L, C), t (R, N) -> (R, L, C)."""
    reading = model.read(condition)
    labels = None if reading.labels is None else reading.labels[:, None]
    span = Span.of(model.entities, 0, t.shape[1], model.entity)
    return span.call(model, x, model.modulations(model.condition(t, labels)), memory=reading.memory)


@dataclass(frozen=True)
class Span:
    """Consecutive entities that go through the network in one call, after those that a cache holds."""

    sizes: tuple[int, ...]
    places: slice
    """Where their tokens are in the sequence."""
    looks: Sequence[Look]
    """What they see, in the keys of the cache and of this call."""
    last_look: Look
    """What the last of them sees."""
    entity: Tensor
    """(L,) which of them each token belongs to."""

    @classmethod
    def of(cls, entities: Entities, first: int, stop: int, entity: Tensor) -> Span:
        """Entities `first` to `stop`, all that came before being in the cache; `entity` is that of every token.

        A look for each entity computes nothing that is masked; above `MOST_LOOKS` there is one for all, with a mask.
        """
        offsets, start, end = entities.offsets, entities.offsets[first], entities.offsets[stop]
        last = Look(slice(offsets[stop - 1] - start, end - start), slice(0, end))
        if stop - first <= MOST_LOOKS:
            looks = [
                Look(slice(offsets[i] - start, offsets[i + 1] - start), slice(0, offsets[i + 1]))
                for i in range(first, stop)
            ]
        else:
            looks = [Look(slice(None), slice(None), entity[start:end, None] >= entity[:end])]
        return cls(entities.sizes[first:stop], slice(start, end), looks, last, entity[start:end] - first)

    @property
    def length(self) -> int:
        return sum(self.sizes)

    @property
    def even(self) -> bool:
        """Whether all entities have one size, so that gates, scales and shifts broadcast and are not copied out."""
        return len(set(self.sizes)) == 1

    def call(
        self,
        model: XAR,
        x: Tensor,
        modulations: Sequence[Tensor],
        *,
        memory: Memory | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Velocities of x (R, L, C) under `modulations` (R, N, 6 W); with `last_only`, those of the last entity."""
        if self.even:  # (R, N, l, C) against (R, N, 1, 6 W)
            x = x.unflatten(1, (len(self.sizes), -1))
            modulations, wanted = [part[:, :, None] for part in modulations], slice(-1, None)
        else:
            modulations, wanted = [part[:, self.entity] for part in modulations], slice(-self.sizes[-1], None)
        last = (self.last_look, wanted) if last_only else None
        v = model.network(x, modulations, self.places, self.looks, memory=memory, cache=cache, last=last)
        return v.flatten(1, -2)


MOST_LOOKS = 16
"""Entities that attend one after the other; more of them go through one masked attention."""


# ---------------------------------------------------------------- sampling


class SamplingNetwork:
    """The network of one `generate` call: the entities finished so far, and the cache.

    Rows are the images with their classes or captions and, if anything is guided, the same images without: two
    branches. An entity enters the cache once, finished and at time 0: the first call after it carries it before the
    current one. A branch that is not called (no guidance for an entity, or at a time) falls back and catches up in
    the same way, so the null branch of a first entity with guidance 1 is never computed. Captions are read once, unless
    a control reads them anew.
    """

    def __init__(
        self, model: XAR, reading: Reading, plans: Sequence[EntityPlan], control: Control | None = None
    ) -> None:
        """`reading` is that of the images or, if anything is guided, of both branches; `control` that of `generate`."""
        guided = any(plan.ever_guided for plan in plans)
        self.model = model
        self.batch = len(reading) // 2 if guided else len(reading)
        self.reading = reading
        self.control = control
        self.plans = plans
        row_of: dict[float, int] = {}  # entities share the times, and so the rows of the table
        self.rows = [[row_of.setdefault(t, len(row_of)) for t in plan.times] for plan in plans]
        self.modulations = ModulationTable(model, reading, self.batch, list(row_of))
        self.finished: list[Tensor] = []
        self.held = [0, 0]  # entities in the cache, by branch
        config, length = model.config, model.entities.length
        self.cache = KVCache(
            2 * config.depth, len(reading), config.num_heads, length, config.head_dim, model.readout.weight
        )

    def velocity(self, x: Tensor, step: int, t: float) -> Tensor:
        """The velocity of the entity x (B, l, C) after the finished ones, guided as its plan says."""
        plan = self.plans[len(self.finished)]
        if self.control is not None:
            done = sum(before.steps for before in self.plans[: len(self.finished)])
            self.reading = controlled(self.control, done + step, self.reading)
        if not plan.guided(t):
            return self._call(x, step, CONDITIONAL)
        if self.held[0] == self.held[1]:
            v_cond, v_null = self._call(x, step, BOTH).chunk(2)
        else:
            v_cond, v_null = self._call(x, step, CONDITIONAL), self._call(x, step, NULL)
        return flow.classifier_free_guidance(v_cond, v_null, plan.guidance)

    @torch.no_grad()
    def _call(self, x: Tensor, step: int, branches: range) -> Tensor:
        """Velocities of the current entity x (B, l, C) at a step, for the rows of the branches."""
        current, held, memory = len(self.finished), self.held[branches.start], self.reading.memory
        new, rows = self.finished[held:], slice(branches.start * self.batch, branches.stop * self.batch)
        offsets = self.model.entities.offsets
        tokens = torch.cat([*new, x], dim=1).repeat(len(branches), 1, 1)
        self.held[branches.start : branches.stop] = [current] * len(branches)  # the current one is not finished
        v = Span.of(self.model.entities, held, current + 1, self.model.entity).call(
            self.model,
            tokens.to(self.model.readout.weight.dtype),
            self.modulations.of_span(len(new), self.rows[current][step], rows),
            memory=None if memory is None else memory.rows(rows),
            cache=self.cache.rows(rows, offsets[held]),
            last_only=True,
        )
        return v.float()


CONDITIONAL, NULL, BOTH = range(1), range(1, 2), range(2)
"""Branches of a sampling call."""


class ModulationTable:
    """What times and classes do to the blocks, a third of the weights, for all calls of a `generate` at once.

    It depends on nothing else, and entities share the times: so it is computed in a few large products and not in one
    small product a block and call. Times are taken together as far as `MOST_NUMBERS` goes; beyond that they come round
    with every entity. Rows without a class share one row of the table; equal classes do not, because a CPU rounds by
    the number of rows, and an image must not tell which classes were drawn beside it.
    """

    def __init__(self, model: XAR, reading: Reading, batch: int, times: Sequence[float]) -> None:
        """The first `batch` of the conditions are those of images; any others are none."""
        self.model = model
        self.labels: Tensor | None = None
        labels, device = reading.labels, model.readout.weight.device
        if labels is None:  # the modulation knows the time alone: one row of it serves all
            self.row = torch.zeros(len(reading), dtype=torch.long, device=device)
        else:
            self.row = torch.arange(len(labels), device=device).clamp(max=batch)
            self.labels = labels[: batch + 1]  # one that is none serves all of them
        self.times = torch.tensor([0.0, *times], device=self.row.device)
        numbers = (1 if self.labels is None else len(self.labels)) * len(model.blocks) * 6 * model.config.width
        self.together = max(1, MOST_NUMBERS // numbers)
        self.clean = self._compute(self.times[:1])
        self.loaded, self.part = -1, self.clean

    def of_span(self, clean: int, time: int, rows: slice) -> list[Tensor]:
        """For each block (R, clean + 1, 6 W): so many finished entities, then one at the time of that number."""
        part, place = divmod(time, self.together)
        if part != self.loaded:
            self.loaded = part
            self.part = self._compute(self.times[1:][part * self.together : (part + 1) * self.together])
        row = self.row[rows]
        return [
            torch.stack([*[finished[0, row]] * clean, noisy[place, row]], dim=1)
            for finished, noisy in zip(self.clean, self.part, strict=True)
        ]

    def _compute(self, times: Tensor) -> list[Tensor]:
        """(T, classes, 6 W) for each block; (T, 1, 6 W) without classes."""
        return self.model.modulations(self.model.condition(times[:, None], self.labels))


MOST_NUMBERS = 1 << 26
"""The most numbers of a `ModulationTable` in memory at once: 256 MB in float32."""
