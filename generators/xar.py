"""xAR (arXiv 2502.20388): next-X prediction, where X is an entity of a continuous latent, drawn by flow matching.

The latent of an image is cut into a few large *entities*, the X of the title (section 3.2; `generators/entities.py`).
A transformer sees the sequence of all entities, each moved towards noise by its own time, and predicts the velocity of
each token; attention is full within an entity and to all earlier ones, and there is none to later ones. *Noisy Context
Learning* (section 3.4) is the training: every entity is at once what is denoised and the noisy context of those after
it, so that no clean copy of the sequence is needed (`XAR.forward`). *Next-X prediction* is the sampling: one entity
after the other is integrated from noise to data; the finished ones are the context, at time 0
(`XAR.generate_plainly`, fifteen lines). Time and class reach every block as gates, scales and shifts, which are the
same for all tokens of an entity. A caption, which neither the paper nor its code conditions on, is attended to.

This file holds the algorithm. What makes it fast (a cache of finished entities, no masked attention, modulation
computed once) is in `generators/xar_fast.py`, and a test holds it to `XAR.velocity` and `generate_plainly`.
Read downwards: configuration, how an entity is drawn, blocks, network, training, sampling.

Shapes: B images, C channels, G grid side, L tokens, N entities, W width, R rows of a call of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok import flow, randomness
from imgtok.config import FROM_DATA, Fraction, NonNegativeFloat, PositiveInt, check
from imgtok.generators import xar_fast
from imgtok.generators.conditioning import (
    ClassModulation,
    Condition,
    ConditionalGenerator,
    ConditionConfig,
    Control,
    Reading,
    TextCrossAttention,
)
from imgtok.generators.entities import Cells, EntityConfig
from imgtok.layers.attention import Attention, CrossAttention, Look
from imgtok.layers.cache import KVCache, LayerCache, Memory, MemoryLayer
from imgtok.layers.linear import packed_linears
from imgtok.layers.norms import RMSNorm, rms_norm
from imgtok.layers.positions import rotary_of, rotate, time_features
from imgtok.layers.recompute import call_block
from imgtok.tokenizers.base import Losses

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True, kw_only=True)
class FlowSampling:
    """How entities are drawn; the defaults are those of the published xAR-B."""

    steps: tuple[PositiveInt, ...] = (40,)
    """Calls of the network for an entity: one number for all, or one each (DiSA takes fewer for later ones)."""
    guidance: tuple[NonNegativeFloat, ...] = (2.7,)
    """Guidance scale. One number rises linearly from 1 at the first entity to itself at the last, as published; a
    number for each entity is taken as it stands. At 1 and below nothing is guided."""
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Times between which guidance is at work."""
    solver: Literal["stochastic", "euler", "adams"] = "stochastic"
    """Stochastic Euler as published; or without added noise, Euler or two-step Adams-Bashforth."""

    def __post_init__(self) -> None:
        check(self)
        for name, value in (("steps", self.steps), ("guidance", self.guidance)):
            if value == ():
                raise ValueError(f"{name}: give one number, or one for each entity")
        if self.interval[0] > self.interval[1]:
            raise ValueError(f"interval: {list(self.interval)} must be [lower, upper]")


@dataclass(frozen=True, kw_only=True)
class XARConfig(ConditionConfig):
    """An xAR; the defaults are xAR-B for 256-pixel images in KL-16 latents."""

    kind: Literal["xar"] = "xar"
    latent_channels: Annotated[PositiveInt, FROM_DATA] = 16
    """Channels of the latent; training fills it in from the latent cache."""
    grid: Annotated[PositiveInt, FROM_DATA] = 16
    """Positions a side of the latent, which the entities have to tile; that of the latent cache."""
    condition: ClassModulation | TextCrossAttention = ClassModulation()
    """What it draws for, and how that enters. `class`: its embedding, "no class" being one more row of the table, joins
    that of the time. `cross_attention`: every block attends to the features of a caption, and is modulated by the time
    alone; this is ours, the paper has no text."""
    entities: EntityConfig = Cells()
    """What is predicted next: the X of the paper."""
    width: PositiveInt = 768
    """Channels; a multiple of num_heads."""
    depth: PositiveInt = 8
    """Blocks of each of the two stacks."""
    num_heads: PositiveInt = 12
    """Attention heads; their width is a multiple of 4."""
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    """Training times: the sigmoid of a normal (the published code), or uniform (the paper)."""
    whole_times: bool = True
    """Cut 1000 t down to a whole number for the time embedding, as published weights were trained."""
    dropout: Fraction = 0.1
    """Dropout of attention weights, attention outputs, and within and after the feed-forward layer."""
    sampling: FlowSampling = FlowSampling()
    """How `generate` draws unless it is told otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads or self.head_dim % 4:
            raise ValueError(f"width: {self.width} must be a multiple of 4 num_heads = {4 * self.num_heads}")
        plan_entities(self.sampling, len(self.entities.lay_out(self.grid)))

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return 2 * (4 * self.width) // 3


XAR_SIZES = {"B": (768, 8, 12), "L": (1024, 16, 16), "H": (1280, 20, 16)}
"""Width, blocks of a stack and heads of the published models."""


def xar_size(name: Literal["B", "L", "H"]) -> XARConfig:
    """xAR-B, -L or -H (table 2), with the sampling of the published README."""
    width, depth, heads = XAR_SIZES[name]
    steps, guidance = {"B": (40, 2.7), "L": (50, 2.3), "H": (50, 2.2)}[name]
    sampling = FlowSampling(steps=(steps,), guidance=(guidance,))
    return XARConfig(width=width, depth=depth, num_heads=heads, sampling=sampling)


# ---------------------------------------------------------------- how an entity is drawn


@dataclass(frozen=True)
class EntityPlan:
    """How one entity is drawn."""

    solver: Literal["stochastic", "euler", "adams"]
    steps: int
    guidance: float
    interval: tuple[float, float]

    @property
    def times(self) -> list[float]:
        """Where the network is called."""
        return flow.stochastic_times(self.steps) if self.solver == "stochastic" else flow.step_times(self.steps)

    def guided(self, t: float) -> bool:
        return self.guidance > 1 and self.interval[0] <= t <= self.interval[1]

    @property
    def ever_guided(self) -> bool:
        return any(self.guided(t) for t in self.times)

    @property
    def num_draws(self) -> int:
        """Normal numbers that a token's channel takes: where it starts, and one more for each noisy step."""
        return self.steps if self.solver == "stochastic" else 1

    def solve(self, velocity: flow.Velocity, draws: Tensor, on_step: flow.OnStep | None = None) -> Tensor:
        """The entity (B, l, C) from its `draws` (num_draws, B, l, C)."""
        if self.solver == "stochastic":
            return flow.stochastic_euler(velocity, draws[0], self.steps, list(draws[1:]), on_step)
        walk = flow.euler if self.solver == "euler" else flow.adams
        return walk(velocity, draws[0], self.steps, on_step)


def plan_entities(sampling: FlowSampling, count: int) -> list[EntityPlan]:
    """The plan of each of `count` entities.

    Raises ValueError for a list of another length, and for fewer steps than the solver needs.
    """
    steps, guidance = sampling.steps, sampling.guidance
    for name, values in (("steps", steps), ("guidance", guidance)):
        if len(values) not in (1, count):
            raise ValueError(f"{name}: {len(values)} numbers for {count} entities; give one, or one for each entity")
    if len(steps) == 1:
        steps = steps * count
    if len(guidance) == 1 and count > 1:
        guidance = tuple(1 + (guidance[0] - 1) * entity / (count - 1) for entity in range(count))
    plans = [EntityPlan(sampling.solver, steps[i], guidance[i], sampling.interval) for i in range(count)]
    for plan in plans:
        try:
            _ = plan.times
        except ValueError as error:
            raise ValueError(f"steps: {error}") from error
    return plans


# ---------------------------------------------------------------- blocks


class GEGLU(nn.Module):
    """fc2(GELU(fc1_g h) * fc1_x h), all with bias. The published class is named SwiGLU and handed an exact GELU.

    Two projections, not a fused one: on a CPU the GELU of half of a wide tensor's columns costs a twentieth of a call.
    """

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden)
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.gelu(self.gate_proj(x)), self.up_proj(x)
        gated = gate * up if torch.is_grad_enabled() else gate.mul_(up)
        return self.dropout(self.down_proj(self.dropout(gated)))


class XARBlock(nn.Module):
    """Attention and gated feed-forward after a norm without parameters, each with its scale, shift and gate.

    Between the two, where there are captions, is attention to them: after the same norm, and without gate, scale or
    shift. That place and form are ours; neither the paper nor its code conditions on text.
    """

    def __init__(self, config: XARConfig) -> None:
        super().__init__()
        self.attention = Attention(
            config.width, config.num_heads, bias=True, dropout=config.dropout, weight_dropout=config.dropout
        )
        self.cross_attention = (
            CrossAttention(config.width, config.num_heads, dropout=config.dropout, weight_dropout=config.dropout)
            if config.reads_text
            else None
        )
        self.mlp = GEGLU(config.width, config.mlp_hidden, config.dropout)
        self.modulation = nn.Linear(config.width, 6 * config.width)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotary: Tensor,
        looks: Sequence[Look],
        cache: LayerCache | None = None,
        wanted: slice | None = None,
        caption: MemoryLayer | None = None,
    ) -> Tensor:
        """X (R, ..., W) in any shape against which `modulation` (R, ..., 6 W) broadcasts: (R, L, W), or by entity.

        `looks` say who sees whom, `rotary` (L, E / 2, 2) where the tokens are, `caption` what this layer sees
        of the captions. With `wanted`, a slice of dimension 1 that the looks ask for, the other tokens are looked at
        and not computed.
        """
        # This order is published; a is attention, m the feed-forward layer
        gate_a, gate_m, scale_a, scale_m, shift_a, shift_m = modulation.chunk(6, dim=-1)
        attended = self.attention(
            torch.addcmul(shift_a, rms_norm(x, EPS), 1 + scale_a).flatten(1, -2),
            looks=looks,
            rotate=lambda y: rotate(y, rotary),
            cache=cache,
        )
        if wanted is not None:
            x, gate_a, gate_m, scale_m, shift_m = (part[:, wanted] for part in (x, gate_a, gate_m, scale_m, shift_m))
        x = torch.addcmul(x, attended.view_as(x), gate_a)
        if self.cross_attention is not None:
            assert caption is not None, "a model that reads text was called without captions"
            x = x + self.cross_attention(rms_norm(x, EPS).flatten(1, -2), caption).view_as(x)
        return torch.addcmul(x, self.mlp(torch.addcmul(shift_m, rms_norm(x, EPS), 1 + scale_m)), gate_m)


EPS = 1e-6
"""The epsilon of every norm."""


# ---------------------------------------------------------------- the network


class XAR(ConditionalGenerator):
    """Class- or text-conditional xAR. Calling it gives the training loss; `generate` samples."""

    config_class: ClassVar[type] = XARConfig
    learns_from = "latents"
    config: XARConfig
    rotary: Tensor
    entity: Tensor

    def __init__(self, config: XARConfig) -> None:
        super().__init__()
        self.config = config
        self.entities = config.entities.lay_out(config.grid)
        width, length = config.width, self.entities.length
        self.class_embedding = None if config.reads_text else nn.Embedding(config.num_classes + 1, width)
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.input_proj = nn.Linear(config.latent_channels, width)
        self.first_positions = nn.Parameter(torch.empty(length, width))
        self.input_norm = RMSNorm(width, EPS)
        self.first_blocks = nn.ModuleList(XARBlock(config) for _ in range(config.depth))
        self.first_norm = RMSNorm(width, EPS)
        self.middle_proj = nn.Linear(width, width)
        self.second_positions = nn.Parameter(torch.empty(length, width))
        self.second_blocks = nn.ModuleList(XARBlock(config) for _ in range(config.depth))
        self.second_norm = RMSNorm(width, EPS)
        self.readout = nn.Linear(width, config.latent_channels)
        self.register_buffer("rotary", rotary_of(self.entities.places, config.head_dim), persistent=False)
        self.register_buffer("entity", self.entities.which(), persistent=False)  # (L,): the entity of each token
        self._add_text(width)
        self.recompute = False
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Xavier for every matrix, modulation and readout included; 0.02 for tables: as the published code does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        classes = [] if self.class_embedding is None else [self.class_embedding.weight]
        for table in (*classes, self.first_positions, self.second_positions):
            nn.init.normal_(table, std=0.02)

    def adapt(self, stored: dict[str, Tensor], start: XARConfig) -> dict[str, str]:
        """Besides, weights of a model of another autoencoder's latents: of another number of channels what reads and
        predicts them starts afresh.
        """
        said, here, there = super().adapt(stored, start), self.config.latent_channels, start.latent_channels
        if here != there:
            why = f"latents of {here} channels here, of {there} there: input_proj and readout start afresh"
            said |= self.start_afresh(stored, ("input_proj", "readout"), why)
        return said

    @property
    def positions_at_once(self) -> int:
        return self.entities.length

    @property
    def blocks(self) -> list[XARBlock]:
        """The blocks of both stacks, in order."""
        both = (*self.first_blocks, *self.second_blocks)
        return [block for block in both if isinstance(block, XARBlock)]

    def recompute_activations(self) -> None:
        """From now on keep only the blocks' inputs for the backward pass."""
        self.recompute = True

    # ------------------------------------------------ the network

    def condition(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Embedding of times in [0, 1] plus that of labels, -1 for none; shapes (...) that broadcast -> (..., W).

        A model that reads text has no table of classes: there it is the embedding of the times alone.
        """
        thousandths = t.float() * 1000  # in float64 the product would sometimes lie below the next whole number
        if self.config.whole_times:
            thousandths = thousandths.trunc()
        features = time_features(thousandths.flatten(), max_period=10000.0).unflatten(0, t.shape)
        embedded: Tensor = self.time_mlp(features.to(self.readout.weight.dtype))
        if self.class_embedding is None:
            return embedded
        assert labels is not None, "a class-conditional model was called without labels"
        return embedded + self.class_embedding(torch.where(labels == -1, self.null_class, labels))

    def modulations(self, condition: Tensor) -> list[Tensor]:
        """What a condition (..., W) does to each block, (..., 6 W) each."""
        active = F.silu(condition)
        return [block.modulation(active) for block in self.blocks]

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | Reading) -> Tensor:
        """Velocities (R, L, C) of the first entities of R sequences, x (R, L, C), whose times are t (R, N), for labels
        (R,), -1 for none, captions or what `read` made of them.

        A token sees its own entity and all earlier ones (section 3.3). Here this is one mask, and every token has its
        own copy of its entity's modulation; `xar_fast.velocity` is the same with less work.
        """
        which = self.entity[: x.shape[1]]
        reading = self.read(condition)
        labels = None if reading.labels is None else reading.labels[:, None]
        modulations = [part[:, which] for part in self.modulations(self.condition(t, labels))]
        sight = Look(slice(None), slice(None), which[:, None] >= which)
        return self.network(x, modulations, slice(0, x.shape[1]), [sight], memory=reading.memory)

    def network(
        self,
        x: Tensor,
        modulations: Sequence[Tensor],
        places: slice,
        looks: Sequence[Look],
        *,
        memory: Memory | None = None,
        cache: KVCache | None = None,
        last: tuple[Look, slice] | None = None,
    ) -> Tensor:
        """Velocities of tokens x (R, ..., C), which have the `places` of the sequence; (R, L, C), or by entity.

        `modulations` (R, ..., 6 W) for each block broadcast against x; `looks` say who sees whom, `memory` is what
        `read` made of R captions. The `cache` holds what comes before the tokens.
        With `last`, the last block computes only a slice of dimension 1, which looks as said there.
        """
        rotary, blocks = self.rotary[places], self.blocks
        layers = [None] * len(blocks) if cache is None else cache.layers(cache.open(len(rotary), causal=False))
        first, second = (
            table[places].unflatten(0, x.shape[1:-1]) for table in (self.first_positions, self.second_positions)
        )
        h = self.input_norm(self.input_proj(x) + first)
        for index, block in enumerate(blocks):
            if index == self.config.depth:
                h = self.middle_proj(self.first_norm(h)) + second
            wanted = None
            if last is not None and index == len(blocks) - 1:
                looks, wanted = [last[0]], last[1]
            caption = None if memory is None else memory.layer(index)
            inputs = (modulations[index], rotary, looks, layers[index], wanted, caption)
            h = call_block(block, h, *inputs, recompute=self.recompute)
        return self.readout(self.second_norm(h))

    # ------------------------------------------------ training

    def forward(self, latents: Tensor, condition: Condition, *, generator: torch.Generator) -> Losses:
        """Noisy Context Learning (section 3.4): mean squared error of all velocities.

        `latents` (B, C, G, G), scaled to about unit deviation; labels (B,), -1 for none, or captions, dropped at
        random. All random numbers but those of dropout layers come from `generator`.
        """
        device, shape = latents.device, (len(latents), self.entities.length, self.config.latent_channels)
        condition = self._drop_some(condition, generator)
        t = self._draw_times(len(latents) * len(self.entities), generator)
        t = t.view(len(self.entities), len(latents)).T.to(device)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(device)
        return self.forward_drawn(latents, condition, t, noise)

    def forward_drawn(self, latents: Tensor, condition: Condition, t: Tensor, noise: Tensor) -> Losses:
        """`forward` with its random numbers given, times t (B, N), one an entity, and noise (B, L, C): a function of
        tensors, which `training.compile` makes one graph.
        """
        tokens = self.entities.cut(latents)  # (B, L, C)
        noisy = flow.interpolate(tokens, noise, t[:, self.entity])
        v = xar_fast.velocity(self, noisy, t, condition)
        errors = (v.float() - flow.velocity_target(tokens, noise)).square().mean(dim=(0, 2))  # (L,)
        loss, first = errors.mean(), errors[: self.entities.sizes[0]].mean()
        return Losses(loss, {"flow": loss, "first_entity": first})

    def _draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        if self.config.times == "uniform":
            return torch.rand(count, generator=generator, device=generator.device)
        return flow.logit_normal_times(count, generator)

    # ------------------------------------------------ sampling

    @torch.no_grad()
    def generate_plainly(
        self,
        condition: Condition,
        *,
        seed: int,
        indices: Sequence[int],
        sampling: FlowSampling | None = None,
    ) -> Tensor:
        """Next-X prediction, as simply as it can be said; `generate` gives the same numbers with less work."""
        condition, plans = self._checked(condition), self._plans(sampling)
        finished: list[Tensor] = []
        for entity, (plan, draws) in enumerate(zip(plans, self._draws(plans, seed, indices), strict=True)):

            def velocity(x: Tensor, step: int, t: float, entity: int = entity, plan: EntityPlan = plan) -> Tensor:
                """The current entity at time t, after the finished ones, which are at time 0."""
                sequence = torch.cat([*finished, x], dim=1).to(self.readout.weight.dtype)
                times = torch.tensor([[0.0] * entity + [t]], device=x.device).expand(len(x), -1)
                v = self.velocity(sequence, times, condition)[:, -x.shape[1] :].float()
                if not plan.guided(t):
                    return v
                v_null = self.velocity(sequence, times, self.unconditional(condition))[:, -x.shape[1] :].float()
                return flow.classifier_free_guidance(v, v_null, plan.guidance)

            finished.append(plan.solve(velocity, draws))
        return self.entities.join(torch.cat(finished, dim=1))

    def generate(
        self,
        condition: Condition | Reading,
        *,
        seed: int,
        indices: Sequence[int],
        sampling: FlowSampling | None = None,
        on_step: Callable[[int, Tensor | None], None] | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """Latents (B, C, G, G) for labels (B,), -1 for no class, or captions, or for what `reading` made of them; row b
        uses the noise of (`seed`, `indices[b]`) alone.

        `on_step` is told the number of steps done, over all entities, and what the latents are expected to become, with
        zeros where no entity has begun (None while only small scales are there). A `control` may replace the reading
        before each step, see `conditioning.Control`; finished entities in the cache stay as they were computed. Raises
        ValueError for a condition that the model does not know.
        """
        plans, done = self._plans(sampling), 0
        with packed_linears(self):
            with torch.no_grad():
                reading = self._reading(condition, len(indices), guided=any(plan.ever_guided for plan in plans))
                network = xar_fast.SamplingNetwork(self, reading, plans, control)
            for plan, draws in zip(plans, self._draws(plans, seed, indices), strict=True):
                report = None if on_step is None else self._report(on_step, done, network.finished)
                done += plan.steps
                network.finished.append(plan.solve(network.velocity, draws, report))
        return self.entities.join(torch.cat(network.finished, dim=1))

    def _plans(self, sampling: FlowSampling | None) -> list[EntityPlan]:
        return plan_entities(sampling or self.config.sampling, len(self.entities))

    def _draws(self, plans: Sequence[EntityPlan], seed: int, indices: Sequence[int]) -> list[Tensor]:
        """The normal numbers of each entity (num_draws, B, l, C), of (seed, index) alone; on the device in one copy.

        In float32 like the solver, whatever the network's precision.
        """
        shapes = [
            (plan.num_draws, size, self.config.latent_channels)
            for plan, size in zip(plans, self.entities.sizes, strict=True)
        ]
        draws = [randomness.normal(seed, indices, shape, f"entity {i}").flatten(1) for i, shape in enumerate(shapes)]
        parts = torch.cat(draws, dim=1).to(self.readout.weight.device).split([part.shape[1] for part in draws], dim=1)
        return [part.unflatten(1, shape).transpose(0, 1) for part, shape in zip(parts, shapes, strict=True)]

    def _report(
        self, on_step: Callable[[int, Tensor | None], None], before: int, finished: Sequence[Tensor]
    ) -> flow.OnStep:
        """What a solver tells of the entity after the finished ones, as `on_step` of `generate` wants it."""

        def report(step: int, _: Tensor, guess: Tensor) -> None:
            tokens = torch.cat([*finished, guess], dim=1)
            missing = self.entities.length - tokens.shape[1]
            scales = self.entities.length > self.entities.grid**2
            whole = None if scales and missing else self.entities.join(F.pad(tokens, (0, 0, 0, missing)))
            on_step(before + step, whole)

        return report
