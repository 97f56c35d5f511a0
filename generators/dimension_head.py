"""The dimension-wise head of TokenBridge (arXiv 2503.16430, section 3.3): from what a network says of a position to a
few ids, one for each of its dimensions, drawn one after the other by a small causal transformer. TokenBridge's
dimensions are the channels of a latent, a GPT's are the digits of a token's id.

A dimension is classified at its *step*; which dimension has which step is for the caller to say. The feature of the
position is the input of the first step, the id drawn before is that of every other one. Feature and step also modulate
every block. Where steps have unequal numbers of words, all have rows for the most that one has, and those that a step
lacks are never drawn. `forward` gives the logits of all steps when the ids are known (training), `draw_plainly` runs
all earlier steps again for each id (the definition), and `draw` keeps their keys and values.

Shapes: N positions, C dimensions and so steps, V words, Z width of a feature, D width of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.config import PositiveInt, check
from imgtok.generators.sampling import TokenSampling, draw, law
from imgtok.layers.attention import NormedAttention
from imgtok.layers.cache import KVCache, LayerCache
from imgtok.layers.feed_forward import MLP
from imgtok.layers.norms import layer_norm
from imgtok.layers.recompute import call_block

EPS = 1e-6
"""The epsilon of every norm."""
MOST_NUMBERS = 1 << 26
"""The most numbers of modulations that are kept for all steps at once: 256 MB in float32."""
LOWEST = torch.finfo(torch.float32).min
"""The logit of a word that a step lacks: a number, since guidance takes differences, and between infinities there are
none."""

Choose = Callable[[int, Tensor], Tensor]
"""`choose(step, logits)`: ids (N,) from logits (N, V) in float32."""


class Choice:
    """Chooses the ids of N positions, step by step, by their uniforms (N, C) in [0, 1)."""

    def __init__(self, temperature: float, uniforms: Tensor, *, scored: bool = False) -> None:
        self.sampling = TokenSampling(temperature=temperature, guidance=1.0)
        self.uniforms = uniforms
        self.scored = scored
        self.score = torch.zeros(len(uniforms))
        """(N,): the sum of the log-probabilities of what was drawn, before the temperature; if `scored`."""

    def __call__(self, step: int, logits: Tensor) -> Tensor:
        ids = draw(law(logits, self.sampling), self.uniforms[:, step])
        if self.scored:
            chosen = logits.log_softmax(dim=-1).gather(1, ids[:, None]).squeeze(1)
            self.score = chosen if step == 0 else self.score + chosen
        return ids


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """The size of a stack of transformer blocks."""

    width: PositiveInt
    """Channels; a multiple of num_heads."""
    depth: PositiveInt
    """Blocks."""
    num_heads: PositiveInt
    """Attention heads."""

    def __post_init__(self) -> None:
        check(self)
        if self.width % self.num_heads:
            raise ValueError(f"width: {self.width} must be a multiple of num_heads = {self.num_heads}")


class HeadBlock(nn.Module):
    """Attention over the steps and a feed-forward layer, each with its scale, shift and gate at every step."""

    def __init__(self, config: StackConfig, dropout: float) -> None:
        super().__init__()
        width = config.width
        self.attention_norm = nn.LayerNorm(width, eps=EPS)
        self.attention = NormedAttention(
            width, config.num_heads, eps=EPS, bias=True, dropout=dropout, weight_dropout=dropout
        )
        self.mlp_norm = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, 4 * width, dropout=dropout)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, modulation: Tensor, cache: LayerCache | None = None) -> Tensor:
        """X (N, L, D) under its modulation (N, L, 6 D). A `cache` holds the steps before x, and takes up x."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        h = torch.addcmul(shift_a, self.attention_norm(x), 1 + scale_a)
        x = torch.addcmul(x, gate_a, self.attention(h, causal=cache is None, cache=cache))
        return torch.addcmul(x, gate_m, self.mlp(torch.addcmul(shift_m, self.mlp_norm(x), 1 + scale_m)))


class DimensionHead(nn.Module):
    """Features (N, Z) -> ids (N, C), in the order of the steps."""

    lacking: Tensor | None

    def __init__(
        self,
        feature_width: int,
        sizes: Sequence[int],
        config: StackConfig,
        *,
        dropout: float,
        first_step: Literal["published", "corrected"],
    ) -> None:
        """`sizes` are the numbers of words of the steps; `first_step` is whether the input of the first step carries
        that step's embedding in sampling alone, as published, or also in training.
        """
        super().__init__()
        width, num_steps, vocab_size = config.width, len(sizes), max(sizes)
        self.config = config
        self.num_steps = num_steps
        self.vocab_size = vocab_size
        self.first_step = first_step
        self.input_proj = nn.Linear(feature_width, width)
        self.step_positions = nn.Parameter(torch.empty(num_steps, width))
        self.step_conditions = nn.Parameter(torch.empty(num_steps, width))
        self.token_embedding = nn.Parameter(
            torch.empty((num_steps - 1) * vocab_size, width)
        )  # of one step after another
        self.blocks = nn.ModuleList(HeadBlock(config, dropout) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.final_modulation = nn.Linear(width, 2 * width)
        self.readout = nn.Linear(width, num_steps * vocab_size)  # likewise
        lacking = torch.arange(vocab_size) >= torch.tensor(sizes)[:, None] if min(sizes) < vocab_size else None
        self.register_buffer("lacking", lacking, persistent=False)  # (C, V): words that a step does not have
        self.recompute = False
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Xavier for matrices, one classifier of the readout at a time; zero for modulations, so that every block
        starts as the identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for classifier in self.readout.weight.chunk(self.num_steps):
            nn.init.xavier_uniform_(classifier)
        for modulation in (*(block.modulation for block in self.head_blocks), self.final_modulation):
            nn.init.zeros_(modulation.weight)
        for table in (self.step_positions, self.step_conditions):
            nn.init.normal_(table, std=0.02)
        nn.init.normal_(self.token_embedding)

    @property
    def head_blocks(self) -> list[HeadBlock]:
        return [block for block in self.blocks if isinstance(block, HeadBlock)]

    # ------------------------------------------------ training

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """Logits (N, C, V), float32, of each step given the ids (N, C) of those before it."""
        projected = self.input_proj(features)
        conditions = self.conditions(projected)
        first = conditions[:, :1] if self.first_step == "corrected" else projected[:, None]
        x = self.inputs(first, ids[:, :-1])
        active = F.silu(conditions)
        for block in self.head_blocks:
            x = call_block(block, x, block.modulation(active), recompute=self.recompute)
        x = self.final(x, self.final_modulation(active))
        weight = self.readout.weight.view(self.num_steps, self.vocab_size, -1)
        logits = (torch.einsum("ncd,cvd->ncv", x, weight) + self.readout.bias.view(self.num_steps, -1)).float()
        return logits if self.lacking is None else logits.masked_fill(self.lacking, LOWEST)

    def conditions(self, projected: Tensor) -> Tensor:
        """What each step is modulated by, (N, C, D), for projected features (N, D)."""
        return projected[:, None] + self.step_conditions

    def inputs(self, first: Tensor, ids: Tensor) -> Tensor:
        """The inputs (N, 1 + L, D) of the steps, for that of the first (N, 1, D) and the first ids (N, L)."""
        count = ids.shape[1]
        offsets = self.vocab_size * torch.arange(count, device=ids.device)
        tokens = F.embedding(ids + offsets, self.token_embedding)
        return torch.cat([first, tokens.to(first.dtype)], dim=1) + self.step_positions[: 1 + count]

    def final(self, x: Tensor, modulation: Tensor) -> Tensor:
        """What the classifiers see of x (N, L, D) under the final modulation (N, L, 2 D): scale first, then shift."""
        scale, shift = modulation.chunk(2, dim=-1)
        return torch.addcmul(shift, layer_norm(self.norm(x), EPS), 1 + scale)

    def logits_of(self, step: int, x: Tensor) -> Tensor:
        """Logits (N, V), float32, of one step from what its classifier sees, (N, D)."""
        rows = slice(step * self.vocab_size, (step + 1) * self.vocab_size)
        logits = F.linear(x, self.readout.weight[rows], self.readout.bias[rows]).float()
        return logits if self.lacking is None else logits.masked_fill(self.lacking[step], LOWEST)

    # ------------------------------------------------ sampling

    def draw_plainly(self, features: Tensor, choose: Choose) -> Tensor:
        """Ids (N, C), each from a pass over all steps up to its own."""
        conditions = self.conditions(self.input_proj(features))
        ids = torch.empty(len(features), 0, dtype=torch.long, device=features.device)
        for step in range(self.num_steps):
            x, active = self.inputs(conditions[:, :1], ids), F.silu(conditions[:, : step + 1])
            for block in self.head_blocks:
                x = block(x, block.modulation(active))
            x = self.final(x, self.final_modulation(active))
            ids = torch.cat([ids, choose(step, self.logits_of(step, x[:, -1]))[:, None]], dim=1)
        return ids

    def draw(self, features: Tensor, choose: Choose) -> Tensor:
        """The same ids. A step runs its own input alone, over the keys and values of those before it; and modulations,
        which are known beforehand, are computed for all steps in one product where they are not too many.
        """
        conditions = self.conditions(self.input_proj(features))
        modulations = StepModulations(self, F.silu(conditions))
        config = self.config
        cache = KVCache(
            config.depth, len(features), config.num_heads, self.num_steps, config.width // config.num_heads, conditions
        )
        x, ids = conditions[:, :1] + self.step_positions[:1], []
        for step in range(self.num_steps):
            of_blocks, final = modulations.of(step)
            layers = cache.layers(cache.open(1))
            for block, modulation, layer in zip(self.head_blocks, of_blocks, layers, strict=True):
                x = block(x, modulation, layer)
            ids.append(choose(step, self.logits_of(step, self.final(x, final)[:, 0])))
            if step + 1 < self.num_steps:
                token = F.embedding(ids[-1] + step * self.vocab_size, self.token_embedding)
                x = token[:, None].to(conditions.dtype) + self.step_positions[step + 1]
        return torch.stack(ids, dim=1)


class StepModulations:
    """What steps do to the blocks, a third of the head's work: for all of them at once, or, where that would take too
    much memory, one step after the other.
    """

    def __init__(self, head: DimensionHead, active: Tensor) -> None:
        """`active` (N, C, D) are the steps' conditions after their SiLU."""
        self.head = head
        self.active = active
        numbers = active.numel() * (6 * head.config.depth + 2)
        self.whole = self._compute(active) if numbers <= MOST_NUMBERS else None

    def of(self, step: int) -> tuple[Sequence[Tensor], Tensor]:
        """(N, 1, 6 D) for each block, and (N, 1, 2 D) for the readout."""
        here = slice(step, step + 1)
        if self.whole is None:
            return self._compute(self.active[:, here])
        blocks, final = self.whole
        return [part[:, here] for part in blocks], final[:, here]

    def _compute(self, active: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        return [block.modulation(active) for block in self.head.head_blocks], self.head.final_modulation(active)
