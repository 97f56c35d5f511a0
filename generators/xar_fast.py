"""The fast path of xAR (`generators/xar.py`): the same numbers, to rounding, with less work.

`Span` runs several entities through the network and computes nothing that the mask forbids; `SamplingNetwork` keeps
finished entities in a key/value cache and leaves out unconditional rows that nobody reads; `ModulationTable` computes
what times and classes do to the blocks for all calls of a `generate` at once.

Shapes: B images, C channels, L tokens, N entities, W width, R rows of a sampling call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imgtok import flow
from imgtok.generators.conditioning import Condition
from imgtok.generators.entities import Entities
from imgtok.layers.attention import Look
from imgtok.layers.cache import KVCache
from imgtok.text.captions import Captions

if TYPE_CHECKING:
    from imgtok.generators.xar import XAR, EntityPlan

# ---------------------------------------------------------------- several entities in one call


@dataclass(frozen=True)
class Span:
    """Consecutive entities that go through the network in one call."""

    sizes: tuple[int, ...]
    looks: Sequence[Look]
    """What they see, in the keys of the cache and of this call."""
    last_look: Look
    """What the last of them sees."""
    lengths: Tensor
    """`sizes` on the device."""

    @classmethod
    def of(cls, entities: Entities, first: int, stop: int, lengths: Tensor) -> Span:
        """Entities `first` to `stop`, all that came before being in the cache; `lengths` are all entities' sizes.

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
            looks = [Look(slice(None), slice(None), entities.may_look()[start:end, :end].to(lengths.device))]
        return cls(entities.sizes[first:stop], looks, last, lengths[first:stop])

    @property
    def length(self) -> int:
        return sum(self.sizes)

    def only_last(self) -> Span:
        """The last entity alone, which still sees all."""
        return Span(self.sizes[-1:], [self.last_look], self.last_look, self.lengths[-1:])

    def apply(self, base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        """Base + x * factor, where x is (R, L, W) and the others are that or (R, N, W), one row an entity."""
        if len(set(self.sizes)) == 1:  # as a view: nothing is copied out to the tokens
            count = len(self.sizes)
            x4, base4 = (part.unflatten(1, (count, -1)) for part in (x, base))
            return torch.addcmul(base4, x4, factor[:, :, None]).flatten(1, 2)
        base, factor = (part if part.shape[1] == x.shape[1] else self.spread(part) for part in (base, factor))
        return torch.addcmul(base, x, factor)

    def spread(self, values: Tensor) -> Tensor:
        """(R, N, ...) -> (R, L, ...), each entity's value at all its tokens."""
        return values.repeat_interleave(self.lengths, dim=1, output_size=self.length)


MOST_LOOKS = 16
"""Entities that attend one after the other; more of them go through one masked attention."""


# ---------------------------------------------------------------- sampling


class SamplingNetwork:
    """The network of one `generate` call: the entities finished so far, and the cache.

    Rows are the images with their classes or captions and, if anything is guided, the same images without: two
    branches. An entity enters the cache once, finished and at time 0: the first call behind it carries it in front of
    the current one. A branch that is not called (no guidance for an entity, or at a time) falls behind and catches up
    in the same way, so the null branch of a first entity with guidance 1 is never computed. Captions are read once.
    """

    def __init__(self, model: XAR, condition: Condition, plans: Sequence[EntityPlan], *, cached: bool) -> None:
        guided = any(plan.ever_guided for plan in plans)
        rows = model.with_unconditional(condition) if guided else condition
        self.model = model
        self.batch = len(condition)
        self.memory = model.read(rows).memory
        times = list(dict.fromkeys(t for plan in plans for t in plan.times))
        self.modulations = ModulationTable(model, rows, self.batch, times)
        self.finished: list[Tensor] = []
        self.held = [0, 0]  # entities in the cache, by branch
        config, length = model.config, model.entities.length
        self.cache = (
            KVCache(2 * config.depth, len(rows), config.num_heads, length, config.head_dim, model.readout.weight)
            if cached
            else None
        )

    def guided(self, plan: EntityPlan) -> flow.Velocity:
        """The velocity of the entity behind the finished ones, as its plan guides it."""

        def velocity(x: Tensor, t: float) -> Tensor:
            if not plan.guided(t):
                return self._call(x, t, CONDITIONAL)
            if self.held[0] == self.held[1]:
                v_cond, v_null = self._call(x, t, BOTH).chunk(2)
            else:
                v_cond, v_null = self._call(x, t, CONDITIONAL), self._call(x, t, NULL)
            return flow.classifier_free_guidance(v_cond, v_null, plan.guidance)

        return velocity

    def _call(self, x: Tensor, t: float, branches: range) -> Tensor:
        """Velocities of the current entity x (B, L, C), for the rows of the branches."""
        current, held = len(self.finished), self.held[branches.start]
        new, rows = self.finished[held:], slice(branches.start * self.batch, branches.stop * self.batch)
        offsets = self.model.entities.offsets
        cache = None
        if self.cache is not None:
            cache = self.cache.rows(rows, offsets[held])
        tokens = torch.cat([*new, x], dim=1).repeat(len(branches), 1, 1)
        v = self.model.velocity(
            tokens.to(self.model.readout.weight.dtype),
            self.modulations.of_span(len(new), t, rows),
            Span.of(self.model.entities, held, current + 1, self.model.lengths),
            offsets[held],
            cache,
            last_only=True,
            memory=None if self.memory is None else self.memory.rows(rows),
        )
        if self.cache is not None:  # with the view `cache` goes the current entity, which is not finished
            self.held[branches.start : branches.stop] = [current] * len(branches)
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

    def __init__(self, model: XAR, condition: Condition, batch: int, times: Sequence[float]) -> None:
        """The first `batch` of the conditions are images', any others are none."""
        self.model = model
        self.labels: Tensor | None = None
        if isinstance(condition, Captions):  # the modulation knows the time alone: one row of it serves all
            self.row = torch.zeros(len(condition), dtype=torch.long, device=condition.features.device)
        else:
            classes, nulls = condition[:batch], len(condition) - batch
            self.row = torch.arange(len(condition), device=condition.device).clamp(max=batch)
            self.labels = torch.cat([classes, condition[batch : batch + 1]]) if nulls else classes
        self.times = times
        numbers = (1 if self.labels is None else len(self.labels)) * len(model.blocks) * 6 * model.config.width
        self.together = max(1, MOST_NUMBERS // numbers)
        self.clean = self._compute([0.0])
        self.loaded, self.part = -1, self.clean

    def of_span(self, clean: int, t: float, rows: slice) -> list[Tensor]:
        """For each block (R, clean + 1, 6 W): so many finished entities, then one at time t."""
        part, place = divmod(self.times.index(t), self.together)
        if part != self.loaded:
            self.loaded = part
            self.part = self._compute(self.times[part * self.together : (part + 1) * self.together])
        row = self.row[rows]
        return [
            torch.stack([*[finished[0, row]] * clean, noisy[place, row]], dim=1)
            for finished, noisy in zip(self.clean, self.part, strict=True)
        ]

    def _compute(self, times: Sequence[float]) -> list[Tensor]:
        """(T, classes, 6 W) for each block; (T, 1, 6 W) without classes."""
        t = torch.tensor(times, device=self.row.device)
        return self.model.modulations(self.model.condition(t[:, None], self.labels))


MOST_NUMBERS = 1 << 26
"""Of a `ModulationTable` in memory at once: 256 MB in float32."""
