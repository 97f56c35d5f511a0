"""TokenBridge (arXiv 2503.16430): continuous latents as discrete tokens, drawn by a masked autoregressive transformer.

Every number of a latent is rounded on its own (`quantizers/normal.py`), so that a position is C ids. As in MAR, an
encoder sees the positions that are known, in front of them slots that all hold the class; a decoder sees these and a
learned vector in place of each hidden one, and says of every hidden position a feature (`TokenBridge.features`). From
it the dimension-wise head (`dimension_head.py`) draws the C ids one after the other. Inputs are never ids: the networks
see the numbers that ids stand for. *Training* hides a random share of the positions, most of them, and is plain
cross-entropy (`TokenBridge.forward`). *Sampling* reveals the positions in an order, few at first (`generate_plainly`);
guidance acts on the features.

`tokenbridge_fast.py` does the same with less work, and a test holds it to `generate_plainly`.
Read downwards: configuration, which positions are revealed when, blocks, network, training, sampling.

Shapes: B images, C channels, G grid side, L positions, K positions that are drawn at once, V that are visible, P slots
of the class, R rows of a call of the network, E and D widths of encoder and decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok import randomness
from imgtok.config import FROM_DATA, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check
from imgtok.generators import tokenbridge_fast
from imgtok.generators.conditioning import (
    ClassBuffer,
    Condition,
    ConditionalGenerator,
    ConditionConfig,
    Control,
    Reading,
)
from imgtok.generators.dimension_head import EPS, Choice, DimensionHead, StackConfig
from imgtok.generators.known import Known
from imgtok.generators.sampling import guide
from imgtok.layers.attention import Attention
from imgtok.layers.feed_forward import MLP
from imgtok.layers.positions import at
from imgtok.layers.recompute import call_block
from imgtok.quantizers.normal import NormalConfig, NormalQuantizer, check_channels, check_finite
from imgtok.tokenizers.base import Losses

# ---------------------------------------------------------------- configuration


@dataclass(frozen=True, kw_only=True)
class RevealSampling:
    """How positions are revealed; the defaults are those of the published TokenBridge-L."""

    iterations: PositiveInt = 256
    """Calls of encoder and decoder. Few positions are revealed at first, as a cosine says, but at least one."""
    order: Literal["random", "raster", "confidence"] = "random"
    """Which positions come next: `random` of each image's own, as published; `raster`, row by row; `confidence`, of all
    hidden positions those whose drawn ids were the most probable (the rule is ours: none is published)."""
    guidance: NonNegativeFloat = 3.1
    """Guidance scale of the features; 1 is none."""
    schedule: Literal["linear", "constant"] = "linear"
    """`linear`: guidance grows from 1 with the share of positions that are revealed, as published; or it is `constant`.
    """
    temperature: NonNegativeFloat = 0.96
    """Divides the logits of the head; at 0 the most likely id is taken."""

    def __post_init__(self) -> None:
        check(self)


PUBLISHED_ORDER = (8, 1, 10, 9, 6, 12, 4, 0, 3, 11, 7, 14, 2, 15, 13, 5)
"""The channels of KL-16 by how much of their energy is in low frequencies, the most first: as published weights draw
them."""


@dataclass(frozen=True, kw_only=True)
class TokenBridgeConfig(ConditionConfig):
    """A TokenBridge; the defaults are TokenBridge-L for 256-pixel images in KL-16 latents but for their order."""

    kind: Literal["tokenbridge"] = "tokenbridge"
    latent_channels: Annotated[PositiveInt, FROM_DATA] = 16
    """Channels of the latent; training fills it in from the latent cache."""
    grid: Annotated[PositiveInt, FROM_DATA] = 16
    """Positions a side of the latent; that of the latent cache."""
    condition: ClassBuffer = ClassBuffer()
    """What it draws for, and how that enters."""
    quantizer: NormalConfig = NormalConfig()
    """How the numbers of a latent, scaled to about unit deviation, are rounded to ids."""
    channel_order: tuple[NonNegativeInt, ...] = ()
    """The channels in the order in which the head draws them; empty for 0, 1, 2, ... Published weights have another."""
    encoder: StackConfig = StackConfig(width=1024, depth=16, num_heads=16)
    """Blocks that see the visible positions."""
    decoder: StackConfig = StackConfig(width=1024, depth=16, num_heads=16)
    """Blocks that see all positions."""
    head: StackConfig = StackConfig(width=1024, depth=4, num_heads=8)
    """Blocks that see the ids of one position."""
    first_step: Literal["published", "corrected"] = "published"
    """The input of the head's first step carries that step's embedding: `published`, while sampling but not in
    training, as published weights were made and have to be used; `corrected`, in both."""
    least_hidden: Fraction = 0.7
    """Training hides at least this share of the positions: that of a normal around 1, cut here and at 1."""
    hidden_deviation: PositiveFloat = 0.25
    """Deviation of that normal; published 0.25. From 1 on all shares are about equally frequent, as images of few
    positions want it: one sixth of 256 positions says much of the others, one sixth of 16 nearly nothing."""
    head_share: Fraction = 1.0
    """Training draws this share of an image's hidden positions, at least one, and the head learns from those alone. It
    is most of the work of a step, so that a small share buys many more steps. Published: 1, all of them."""
    table_std: PositiveFloat = 0.02
    """Deviation with which the tables of classes and positions start, published 0.02: beside the numbers of a latent
    that is little, and a visible token hardly says where it stands until its table has grown."""
    dropout: Fraction = 0.1
    """Dropout of attention weights, attention outputs, and within and after the feed-forward layer."""
    sampling: RevealSampling = RevealSampling()
    """How `generate` draws unless it is told otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_channels(self.channel_order, self.quantizer, self.latent_channels)

    @property
    def order_of_channels(self) -> tuple[int, ...]:
        return self.channel_order or tuple(range(self.latent_channels))


TOKENBRIDGE_SIZES = {"B": (768, 12, 12, 768, 4), "L": (1024, 16, 16, 1024, 4), "H": (1280, 20, 16, 1024, 6)}
"""Width, depth and heads of encoder and decoder each, width and depth of the head; B is in the published code alone."""


def tokenbridge_size(name: Literal["B", "L", "H"]) -> TokenBridgeConfig:
    """TokenBridge-B, -L or -H in KL-16 latents, with the sampling of the published README (of B, that of L)."""
    width, depth, heads, head_width, head_depth = TOKENBRIDGE_SIZES[name]
    stack = StackConfig(width=width, depth=depth, num_heads=heads)
    guidance, temperature = (3.45, 0.91) if name == "H" else (3.1, 0.96)
    return TokenBridgeConfig(
        encoder=stack,
        decoder=stack,
        head=StackConfig(width=head_width, depth=head_depth, num_heads=8),
        channel_order=PUBLISHED_ORDER,
        sampling=RevealSampling(guidance=guidance, temperature=temperature),
    )


# ---------------------------------------------------------------- which positions are revealed when


@dataclass(frozen=True)
class Reveal:
    """One iteration of sampling."""

    count: int
    """Positions of an image that it draws; 0 where there are more iterations than positions."""
    left: int
    """Positions that are hidden after it by the schedule; the last iteration draws those too."""
    guidance: float


def plan_reveals(sampling: RevealSampling, hidden: int, positions: int) -> list[Reveal]:
    """The iterations that reveal all of `hidden` positions out of `positions`: MAR's cosine (arXiv 2406.11838)."""
    plan, before = [], hidden
    for step in range(sampling.iterations if hidden else 0):
        left = math.floor(hidden * math.cos(math.pi / 2 * (step + 1) / sampling.iterations))
        left = max(1, min(before - 1, left))
        last = step == sampling.iterations - 1
        guidance = sampling.guidance
        if sampling.schedule == "linear":
            guidance = 1 + (guidance - 1) * (positions - left) / positions
        plan.append(Reveal(before if last else before - left, left, guidance))
        before = left
    return plan


def hidden_share(uniform: float, least: float, deviation: float = 0.25) -> float:
    """The share of positions that training hides: a quantile of a normal around 1 that is cut at `least` and at 1."""
    shares = NormalDist(1.0, deviation)
    below = shares.cdf(least)
    return min(1.0, max(least, shares.inv_cdf(below + uniform * (0.5 - below))))


# ---------------------------------------------------------------- blocks


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a norm and beside a skip."""

    def __init__(self, config: StackConfig, dropout: float) -> None:
        super().__init__()
        width = config.width
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.attention = Attention(width, config.num_heads, bias=True, dropout=dropout, weight_dropout=dropout)
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, 4 * width, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


# ---------------------------------------------------------------- the network


class TokenBridge(ConditionalGenerator):
    """Class-conditional TokenBridge. Calling it gives the training loss; `generate` samples."""

    config_class: ClassVar[type] = TokenBridgeConfig
    learns_from = "latents"
    keeps_known = True
    config: TokenBridgeConfig
    order: Tensor
    inverse: Tensor

    def __init__(self, config: TokenBridgeConfig) -> None:
        super().__init__()
        self.config = config
        self.length, self.num_slots = config.grid**2, config.condition.num_slots
        width, decoder_width = config.encoder.width, config.decoder.width
        self.quantizer = NormalQuantizer(config.quantizer)
        self.class_embedding = nn.Embedding(config.num_classes, width)
        self.null_embedding = nn.Parameter(torch.empty(1, width))
        self.input_proj = nn.Linear(config.latent_channels, width)
        self.encoder_positions = nn.Parameter(torch.empty(self.num_slots + self.length, width))
        self.input_norm = nn.LayerNorm(width, eps=EPS)
        self.encoder_blocks = nn.ModuleList(Block(config.encoder, config.dropout) for _ in range(config.encoder.depth))
        self.encoder_norm = nn.LayerNorm(width, eps=EPS)
        self.middle_proj = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, decoder_width))
        self.decoder_positions = nn.Parameter(torch.empty(self.num_slots + self.length, decoder_width))
        self.decoder_blocks = nn.ModuleList(Block(config.decoder, config.dropout) for _ in range(config.decoder.depth))
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=EPS)
        self.output_positions = nn.Parameter(torch.empty(self.length, decoder_width))
        self.head = DimensionHead(
            decoder_width,
            [config.quantizer.levels] * config.latent_channels,
            config.head,
            dropout=config.dropout,
            first_step=config.first_step,
        )
        order = torch.tensor(config.order_of_channels)
        self.register_buffer("order", order, persistent=False)  # the channel that each step of the head draws
        self.register_buffer("inverse", order.argsort(), persistent=False)  # the step that draws each channel
        self._add_text(width)
        self.recompute = False
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Xavier for matrices, normal numbers for tables, as the published code does; the head has seen to itself."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("head."):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        tables = (self.class_embedding.weight, self.null_embedding, self.mask_token)
        for table in (*tables, self.encoder_positions, self.decoder_positions, self.output_positions):
            nn.init.normal_(table, std=self.config.table_std)

    def adapt(self, stored: dict[str, Tensor], start: TokenBridgeConfig) -> dict[str, str]:
        """Besides, weights of a model of another autoencoder's latents, or of other levels: what reads the numbers and
        draws them starts afresh.
        """
        said, here = super().adapt(stored, start), self.config
        if here.latent_channels != start.latent_channels:
            why = f"latents of {here.latent_channels} channels here, of {start.latent_channels} there: "
            said |= self.start_afresh(stored, ("input_proj", "head"), f"{why}input_proj and head start afresh")
        elif here.quantizer.levels != start.quantizer.levels:
            why = f"{here.quantizer.levels} levels here, {start.quantizer.levels} there: head starts afresh"
            said |= self.start_afresh(stored, ("head",), why)
        return said

    def recompute_activations(self) -> None:
        """From now on keep only the blocks' inputs for the backward pass."""
        self.recompute = self.head.recompute = True

    def positions_of(self, latents: Tensor) -> Tensor:
        """Latents (B, C, G, G) -> positions (B, L, C), row by row."""
        return latents.flatten(2).transpose(1, 2)

    def latents_of(self, positions: Tensor) -> Tensor:
        """Positions (B, L, C) -> latents (B, C, G, G)."""
        return positions.transpose(1, 2).unflatten(2, (self.config.grid, -1))

    # ------------------------------------------------ the network

    def read(self, condition: Condition | Reading) -> Reading:
        """The slots that stand before the positions, (R, P, E), for labels (R,), -1 for none; of a reading, itself."""
        if isinstance(condition, Reading):
            return condition
        assert isinstance(condition, Tensor), "a class-conditional model was called with captions"
        none = (condition < 0) | (condition == self.null_class)
        embedded = self.class_embedding(condition.masked_fill(none, 0))
        embedded = torch.where(none[:, None], self.null_embedding, embedded)
        return Reading(prefix=embedded[:, None].expand(-1, self.num_slots, -1))

    def features(self, x: Tensor, visible: Tensor, reading: Reading, wanted: Tensor) -> Tensor:
        """Features (R, K, D) of the `wanted` positions (R, K), given numbers x (R, V, C) at the `visible` (R, V)."""
        h = self.decoder_input(self.encode(x, visible, reading), visible)
        for block in self.decoder_blocks:
            h = call_block(block, h, recompute=self.recompute)
        return self.feature(at(h[:, self.num_slots :], wanted), wanted)

    def encode(self, x: Tensor, visible: Tensor, reading: Reading) -> Tensor:
        """What the encoder says (R, P + V, E) of the slots and the visible positions."""
        assert reading.prefix is not None, "the reading has no slots"
        slots, places = self.encoder_positions[: self.num_slots], self.encoder_positions[self.num_slots :]
        tokens = self.input_proj(x.to(self.input_proj.weight.dtype)) + F.embedding(visible, places)
        h = self.input_norm(torch.cat([(reading.prefix + slots).to(tokens.dtype), tokens], dim=1))
        for block in self.encoder_blocks:
            h = call_block(block, h, recompute=self.recompute)
        return self.encoder_norm(h)

    def decoder_input(self, encoded: Tensor, visible: Tensor) -> Tensor:
        """The slots and all positions (R, P + L, D): a learned vector where nothing is visible."""
        h = self.middle_proj(encoded)
        slots, tokens = h[:, : self.num_slots], h[:, self.num_slots :]
        hidden = self.mask_token.to(h.dtype).expand(len(h), self.length, -1)
        placed = hidden.scatter(1, visible[..., None].expand_as(tokens), tokens)
        return torch.cat([slots, placed], dim=1) + self.decoder_positions

    def feature(self, h: Tensor, places: Tensor) -> Tensor:
        """What the head is given of decoded positions h (R, K, D) at their places."""
        return self.decoder_norm(h) + F.embedding(places, self.output_positions)

    # ------------------------------------------------ training

    def forward(self, latents: Tensor, condition: Condition, *, generator: torch.Generator) -> Losses:
        """Mean cross-entropy of all ids of the hidden positions (section 3.3 of the paper).

        `latents` (B, C, G, G), scaled to about unit deviation; labels (B,), -1 for none, dropped at random. Every image
        hides positions of its own, but all as many, by one draw. All random numbers but those of dropout layers come
        from `generator`. Raises ValueError for latents and labels that do not fit this model; of labels on an
        accelerator only the number is looked at.
        """
        self._check_examples(latents, condition)
        condition, device = self._drop_some(condition, generator), latents.device
        draws = torch.rand(len(latents), self.length, generator=generator, device=generator.device)
        share = hidden_share(self._draw_share(generator), self.config.least_hidden, self.config.hidden_deviation)
        order = draws.argsort(dim=1, stable=True)
        hidden, visible = self.hide(order, share)
        if self.config.head_share < 1:  # the first of a random order are a random choice
            count = max(1, math.ceil(self.config.head_share * hidden.shape[1]))
            hidden = order[:, :count].sort(dim=1).values
        return self.forward_drawn(latents, condition, hidden.to(device), visible.to(device))

    def _check_examples(self, latents: Tensor, condition: Condition) -> None:
        grid, channels = self.config.grid, self.config.latent_channels
        shape = (len(latents), channels, grid, grid) if latents.ndim else ()
        if latents.shape != shape or len(condition) != len(latents):
            raise ValueError(
                f"latents {tuple(latents.shape)} with {len(condition)} labels; this model takes latents "
                f"(B, {channels}, {grid}, {grid}) with B labels: set latent_channels and grid to those of the latents"
            )
        if isinstance(condition, Tensor) and condition.device.type == "cpu":
            self._checked(condition)

    def _draw_share(self, generator: torch.Generator) -> float:
        return torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).item()

    def hide(self, order: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """(hidden, visible) places, ascending, (B, K) and (B, V): the first of each order (B, L) are hidden."""
        count = math.ceil(self.length * share)
        return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values

    def forward_drawn(self, latents: Tensor, condition: Condition, hidden: Tensor, visible: Tensor) -> Losses:
        """`forward` with its random numbers given, the places (B, K) to learn from and (B, V) to see: a function of
        tensors, which `training.compile` makes one graph.
        """
        numbers = self.positions_of(latents)
        values, ids = self.quantizer(numbers, channel_dim=-1)
        features = self.features(at(values, visible), visible, self.read(condition), hidden)
        targets = at(ids[..., self.order], hidden).flatten(0, 1)  # (B K, C)
        logits = self.head(features.flatten(0, 1), targets)
        errors = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        of_steps = errors.view(targets.shape).mean(dim=0)
        loss = of_steps.mean() + 0 * latents.sum()  # numbers that are not finite have ids, but must not go unnoticed
        saturated = self.quantizer.beyond(numbers, channel_dim=-1).float().mean()
        return Losses(loss, {"cross_entropy": loss, "first_channel": of_steps[0], "saturated": saturated})

    # ------------------------------------------------ sampling

    @torch.no_grad()
    def generate_plainly(
        self,
        condition: Condition,
        *,
        seed: int,
        indices: Sequence[int],
        sampling: RevealSampling | None = None,
        known: Known | None = None,
    ) -> Tensor:
        """Sampling as simply as it can be said; `generate` gives the same numbers with less work."""
        how, condition = sampling or self.config.sampling, self._checked(condition)
        start = self._start(how, seed, indices, known)
        values, order, uniforms = start.values, start.order, start.uniforms
        for reveal in plan_reveals(how, start.hidden, self.length):
            hidden, visible = order[:, : start.hidden], order[:, start.hidden :]
            candidates = hidden if how.order == "confidence" else hidden[:, hidden.shape[1] - reveal.count :]
            if not reveal.count:
                continue
            seen = at(values, visible)
            features = self.features(seen, visible, self.read(condition), candidates)
            if how.guidance != 1:
                none = self.read(self.unconditional(condition))
                features = guide(features, self.features(seen, visible, none, candidates), reveal.guidance)
            choice = Choice(how.temperature, at(uniforms, candidates).flatten(0, 1), scored=how.order == "confidence")
            ids = self.head.draw_plainly(features.flatten(0, 1), choice).view(*candidates.shape, -1)
            if how.order == "confidence":
                best = choice.score.view(candidates.shape).argsort(dim=1, stable=True)  # the best last
                order = torch.cat([candidates.gather(1, best), visible], dim=1)
                best = best[:, best.shape[1] - reveal.count :]
                candidates, ids = candidates.gather(1, best), at(ids, best)
            drawn = self.quantizer.decode(ids[..., self.inverse], channel_dim=-1)
            values = values.scatter(1, candidates[..., None].expand_as(drawn), drawn)
            start.hidden -= reveal.count
        return self._finish(values, known)

    def generate(
        self,
        condition: Condition | Reading,
        *,
        seed: int,
        indices: Sequence[int],
        sampling: RevealSampling | None = None,
        known: Known | None = None,
        on_step: Callable[[int, Tensor | None], None] | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """Latents (B, C, G, G) for labels (B,), -1 for no class, or for what `reading` made of them; row b uses the
        random numbers of (`seed`, `indices[b]`) alone.

        What is `known` is kept, to the bit, and the rest drawn around it. `on_step` is told the number of iterations
        done, and the latents with zeros where nothing is revealed. A `control` may replace the reading before each
        iteration, see `conditioning.Control`. Raises ValueError for a condition or known latents that do not fit.
        """
        how = sampling or self.config.sampling
        start = self._start(how, seed, indices, known)
        reading = self._reading(condition, len(indices), guided=how.guidance != 1)
        drawing = tokenbridge_fast.Drawing(self, how, reading, start, control)
        for step, reveal in enumerate(plan_reveals(how, start.hidden, self.length)):
            if reveal.count:
                drawing.reveal(step, reveal)
            if on_step is not None:
                on_step(step + 1, self._finish(drawing.values, known))
        return self._finish(drawing.values, known)

    def _start(self, how: RevealSampling, seed: int, indices: Sequence[int], known: Known | None) -> Start:
        """What is there before the first iteration. Random numbers are drawn on the host and moved in one go.

        Raises ValueError for known latents that do not fit.
        """
        batch, length, device = len(indices), self.length, self.device
        if how.order == "random":
            keys = randomness.uniform(seed, indices, (length,), "order")
        else:  # from the end of the order to its start
            keys = torch.arange(length, 0, -1, dtype=torch.float64).expand(batch, -1) / (length + 1)
        uniforms = randomness.uniform(seed, indices, (length, self.config.latent_channels), "tokens")
        uniforms = uniforms if device.type == "mps" else uniforms.to(device)
        values, hidden = torch.zeros(batch, length, self.config.latent_channels, device=device), length
        if known is not None:
            mask = self._mask_of(known, batch)
            hidden = length - int(mask[:1].sum())
            keys = keys + mask.to(keys.device).double()  # what is known counts as revealed
            seen, latents = mask.to(device)[..., None], self.positions_of(known.latents.detach().to(device))
            exact = self.quantizer(latents.where(seen, 0), channel_dim=-1)[0]
            values = torch.where(seen, exact, values)
        order = keys.argsort(dim=1, stable=True).to(device)
        return Start(values, order, uniforms, hidden)

    def _mask_of(self, known: Known, batch: int) -> Tensor:
        """Which positions are known, (B, L), on the host."""
        grid, channels = self.config.grid, self.config.latent_channels
        shape, side = (batch, channels, grid, grid), (grid, grid)
        if known.latents.shape != shape or tuple(known.mask.shape) not in (side, (batch, *side)):
            raise ValueError(
                f"known: latents {tuple(known.latents.shape)} and mask {tuple(known.mask.shape)}; this model draws "
                f"{shape} here, and the mask is {side} or {(batch, *side)}"
            )
        if known.mask.dtype != torch.bool:
            raise ValueError(f"known.mask: must be boolean, True where the latent is known, not {known.mask.dtype}")
        mask = known.mask.cpu().expand(batch, *side).flatten(1)
        check_finite(known.latents.cpu()[mask.view(batch, 1, *side).expand(shape)], "known.latents")
        return mask

    def _finish(self, values: Tensor, known: Known | None) -> Tensor:
        """The latents, with what was known as it was given."""
        latents = self.latents_of(values)
        if known is None:
            return latents
        mask = known.mask.to(latents.device)
        return torch.where(mask if mask.ndim == 2 else mask[:, None], known.latents.detach().to(latents), latents)


@dataclass
class Start:
    """A call of `generate` before its first iteration."""

    values: Tensor
    """(B, L, C): what the ids stand for that are known, and zeros."""
    order: Tensor
    """(B, L): positions, revealed from the end to the start; those that are known stand last."""
    uniforms: Tensor
    """(B, L, C), in [0, 1), float64: one for each id, C in the order of the head's steps."""
    hidden: int
    """Positions that are not known, in every row."""
