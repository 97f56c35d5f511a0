"""GPT over image tokens: LlamaGen (arXiv 2406.06525) and FlexTok's generators (arXiv 2502.13967).

A decoder-only transformer reads a prefix of condition slots and then the tokens, and predicts at each position the
token that follows. The prefix is one slot with a class's embedding (LlamaGen), or with a learned start vector to which
the class's embedding is added (FlexTok), or with the start vector alone while every block also attends to the features
of a caption (FlexTok from text); or it is as many slots as a caption may have features, which stand there (LlamaGen
from text). Conditions are dropped now and then while training, so that sampling can be guided
away from "no class" or the empty caption. Token sequences are ordered (learned positions; FlexTok) or a raster
(two-dimensional rotary; LlamaGen), of one length or ended by an end mark. Training and sampling run the same `hidden`
path; sampling hands it a cache.

The law of a token is one softmax over all ids; or, with a `head`, it is that of the digits of its id, each given those
before it, or independent of them (`digits.py`).

Where a tokenizer picks slots (KARL), a sequence is pairs of a slot and an id, slots s_1 < s_2 < ... < s_n, and

    p = p(s_1) p(id_1 | s_1)  p(s_2 | pair 1) p(id_2 | s_2, pair 1)  ...  p(end | all pairs)

where p(s | ...) is over the slots after the last one and the end, or for the first pair the slots alone; a sequence of
the greatest length has no further factor. This holds for any increasing slots, prefixes or not, and adds up to 1. The
slot comes before its id because it decides what the id means. Both are read out of one state, so that a pair costs one
pass, as a token without a slot does. The end is one more slot, which comes after all the others: so the length is drawn
too, and a simple image takes fewer passes.

Shapes: B batch, L tokens, D width, V vocabulary (and end mark), S slots, C digits of an id.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok import hub, randomness
from imgtok.config import FROM_DATA, Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from imgtok.generators import decoding, speculative_gpt
from imgtok.generators.conditioning import (
    ClassSlot,
    Condition,
    ConditionalGenerator,
    ConditionConfig,
    Control,
    Reading,
    StartPlusClass,
    TextCrossAttention,
    TextPrefix,
)
from imgtok.generators.decoding import Uniforms, closed_slots
from imgtok.generators.digits import DigitRows, Digits, DigitsConfig, IndependentHead
from imgtok.generators.dimension_head import DimensionHead
from imgtok.generators.sampling import TokenSampling
from imgtok.layers.attention import Attention, CrossAttention
from imgtok.layers.cache import KVCache, LayerCache, MemoryLayer, Window
from imgtok.layers.feed_forward import SwiGLU
from imgtok.layers.linear import packed_linears
from imgtok.layers.norms import RMSNorm
from imgtok.layers.positions import rotary_1d, rotary_2d, rotate
from imgtok.layers.recompute import call_block
from imgtok.layers.record import LayerRecord
from imgtok.tokenizers.base import Losses, Tokenizer
from imgtok.tokenizers.calls import Calls
from imgtok.tokenizers.tokens import Tokens

TOKEN_PARTS = (
    "token_embedding",
    "head",
    "digit_embedding",
    "digit_head",
    "slot_embedding",
    "slot_head",
    "slot_modulation",
)
"""What reads and draws tokens, and so belongs to their tokenizer."""
LlamaGenSize = Literal["B", "L", "XL", "XXL", "3B"]


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ConditionConfig):
    """A GPT; the defaults are LlamaGen-B in size."""

    kind: Literal["gpt"] = "gpt"
    vocab_size: Annotated[PositiveInt, FROM_DATA] = 16384
    """Token ids; training fills it in from the token cache."""
    num_tokens: Annotated[PositiveInt, FROM_DATA] = 256
    """Tokens of an image, at most; training fills it in from the token cache."""
    ends: Annotated[bool, FROM_DATA] = False
    """Whether an image may have fewer tokens, at least one: then an end mark can be drawn in place of a token.
    Training fills it in from the tokenizer."""
    num_slots: Annotated[NonNegativeInt, FROM_DATA] = 0
    """Slots of the tokenizer that a token can come from, increasing along a sequence that `ends`; 0 where token k is
    slot k. Training fills it in from the tokenizer."""
    width: PositiveInt = 768
    """Channels; a multiple of num_heads."""
    depth: PositiveInt = 12
    """Blocks."""
    num_heads: PositiveInt = 12
    """Attention heads."""
    mlp_multiple: PositiveInt = 256
    """The feed-forward width is 8/3 of `width`, rounded up to a multiple of this."""
    levels: tuple[int, ...] = ()
    """FSQ levels of the tokenizer, or empty. Given, ids that share digits share a part of their embeddings and logits,
    so that what is learned of one id helps its neighbours. Training fills it in where `share_digits` is set."""
    head: DigitsConfig | None = None
    """Ids are read and drawn digit by digit: for large vocabularies, and for digits that say something. null has an
    embedding and a logit for each id."""
    positions: Literal["learned", "rotary_1d", "rotary_2d"] = "learned"
    """`learned` (FlexTok) or `rotary_1d` for ordered tokens, `rotary_2d` for a square raster (LlamaGen)."""
    rotary_base: PositiveFloat = 10000.0
    """Of rotary positions: the ratio of the fastest turning to the slowest, or nearly so."""
    zero_prefix: bool = True
    """Of rotary positions: queries and keys of the condition's slots are set to nought, so that all tokens look at
    them alike; LlamaGen was trained with that. false turns them by their place in the row (`rotary_1d`) or leaves them
    unturned (`rotary_2d`)."""
    qk_norm: bool = False
    """Normalise queries and keys over a head's channels, without parameters."""
    condition: ClassSlot | StartPlusClass | TextPrefix | TextCrossAttention = ClassSlot()
    """What it draws for, and how that enters. `class_slot`: the slot before the first token is the class's embedding,
    "no class" being one more row of the table (LlamaGen). `start_plus_class`: it is a learned start vector plus the
    class's embedding, "no class" adding nothing (FlexTok). `text_prefix`: a caption's features stand there, one a slot
    (LlamaGen). `cross_attention`: it is the start vector, and every block attends to a caption's features (FlexTok)."""
    dropout: Fraction = 0.1
    """Dropout of embeddings, attention and feed-forward outputs."""
    attention_dropout: Fraction = 0.0
    """Dropout of attention weights."""
    sampling: TokenSampling = TokenSampling()
    """How `generate` draws unless it is told otherwise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            raise ValueError(f"width: {self.width} is not a multiple of num_heads = {self.num_heads}")
        if self.num_slots and not (self.ends and self.num_slots >= self.num_tokens):
            raise ValueError(f"num_slots: {self.num_slots} slots need ends=true and at most as many tokens")
        if self.levels and math.prod(self.levels) != self.vocab_size:
            made = f"{list(self.levels)} make {math.prod(self.levels)} ids"
            raise ValueError(f"levels: {made}, but vocab_size is {self.vocab_size}")
        if self.head is not None:
            if self.levels:
                raise ValueError("levels: with a head, ids share what head.digits lets them; leave share_digits out")
            self.head.check_ids(self.vocab_size)
        if self.positions != "learned" and self.head_dim % (4 if self.positions == "rotary_2d" else 2):
            multiple = 4 if self.positions == "rotary_2d" else 2
            raise ValueError(
                f"width: heads of {self.head_dim} channels cannot be turned by positions = {self.positions}, "
                f"width / num_heads must be a multiple of {multiple}"
            )
        if self.positions == "rotary_2d" and round(self.num_tokens**0.5) ** 2 != self.num_tokens:
            raise ValueError(f"positions: rotary_2d needs a square number of tokens, num_tokens is {self.num_tokens}")

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def digits(self) -> tuple[int, ...]:
        """How many values each digit has, where ids are drawn digit by digit; empty where they are drawn as a whole."""
        return () if self.head is None else self.head.digits

    @property
    def end(self) -> int | None:
        """The output that ends a sequence in place of an id; None if none does, or the slots' outputs do."""
        return self.vocab_size if self.ends and not self.num_slots else None

    @property
    def prefix_length(self) -> int:
        """Slots that the condition takes before the tokens."""
        return self.condition.text_length if isinstance(self.condition, TextPrefix) else 1

    @property
    def mlp_hidden(self) -> int:
        return -(-(8 * self.width // 3) // self.mlp_multiple) * self.mlp_multiple


LLAMAGEN_SIZES: dict[LlamaGenSize, tuple[int, int, int]] = {
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1280, 36, 20),
    "XXL": (1536, 48, 24),
    "3B": (3200, 24, 32),
}
"""Width, blocks and heads of the published models."""


def llamagen_size(name: LlamaGenSize, *, num_tokens: int = 256, text: bool = False) -> GPTConfig:
    """LlamaGen's generator of this size, from classes or from text, on a raster of 256 or 576 tokens of 16,384 ids.

    Guidance and top-k are those of its published figures or, from text, of its demonstration.
    """
    width, depth, heads = LLAMAGEN_SIZES[name]
    guidance = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}[name]
    return GPTConfig(
        num_tokens=num_tokens,
        width=width,
        depth=depth,
        num_heads=heads,
        positions="rotary_2d",
        condition=TextPrefix() if text else ClassSlot(),
        sampling=TokenSampling(guidance=7.5, top_k=1000) if text else TokenSampling(guidance=guidance),
    )


FLEXTOK_CLASS_DEPTHS = (10, 12, 16, 20, 24, 30)
FLEXTOK_TEXT_DEPTHS = (12, 18, 26, 36)


def flextok_size(depth: int, *, text: bool = False) -> GPTConfig:
    """FlexTok's generator of this depth, from classes or from text: width 64 x depth, `depth` heads, 256 of 64 000 ids.

    12 (without text) or 16 (with it) x depth x width^2 weights in the blocks: the table of published sizes.
    """
    return GPTConfig(
        vocab_size=64000,
        width=64 * depth,
        depth=depth,
        num_heads=depth,
        mlp_multiple=1,
        condition=TextCrossAttention() if text else StartPlusClass(),
        attention_dropout=0.1,
        sampling=TokenSampling(guidance=3.0 if text else 1.5),  # the defaults of the authors' release
    )


class Block(nn.Module):
    """Pre-norm attention, attention to a caption where there are captions, and gated feed-forward; no biases."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, heads = config.width, config.num_heads
        self.attention_norm = RMSNorm(width)
        dropout, weight_dropout, qk_norm = config.dropout, config.attention_dropout, config.qk_norm
        self.attention = Attention(width, heads, qk_norm=qk_norm, dropout=dropout, weight_dropout=weight_dropout)
        attends = isinstance(config.condition, TextCrossAttention)
        self.cross_norm = RMSNorm(width) if attends else None
        self.cross_attention = (
            CrossAttention(width, heads, qk_norm=qk_norm, dropout=dropout, weight_dropout=weight_dropout)
            if attends
            else None
        )
        self.mlp_norm = RMSNorm(width)
        self.mlp = SwiGLU(width, config.mlp_hidden, dropout=config.dropout)

    def forward(
        self,
        x: Tensor,
        window: Window,
        table: Tensor | None,
        cache: LayerCache | None,
        caption: MemoryLayer | None = None,
        record: LayerRecord | None = None,
    ) -> Tensor:
        """`window` says what x's positions see, `table` holds their rotary rows, (L, ...) or (R, 1, L, ...), and
        `caption` is what this layer sees of the captions; `record` keeps what it sees of a prefix.
        """
        turn = None if table is None else (lambda y: rotate(y, table))
        mask = window.mask if cache is None else None  # a cache knows its window
        x = x + self.attention(
            self.attention_norm(x), mask=mask, causal=window.causal, rotate=turn, cache=cache, record=record
        )
        if self.cross_attention is not None and self.cross_norm is not None:
            assert caption is not None, "a model that attends to captions was called without"
            x = x + self.cross_attention(self.cross_norm(x), caption)
        return x + self.mlp(self.mlp_norm(x))


class GPT(ConditionalGenerator):
    """Class- or text-conditional GPT. Calling it gives the training loss; `generate` samples."""

    config_class: ClassVar[type] = GPTConfig
    learns_from = "tokens"
    config: GPTConfig
    rotary: Tensor | None
    start: nn.Parameter | None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        started = isinstance(config.condition, StartPlusClass | TextCrossAttention)
        rows = config.num_classes + isinstance(config.condition, ClassSlot)  # none for a model that reads text
        self.class_embedding = nn.Embedding(rows, config.width) if rows else None
        self.token_embedding = (
            nn.Embedding(config.vocab_size, config.width)
            if config.head is None
            else Digits(config.head.digits, config.width)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width)
        self.head = self._make_head()
        self.digit_embedding = DigitRows(config.levels, config.width) if config.levels else None
        self.digit_head = DigitRows(config.levels, config.width) if config.levels else None
        slots, width = config.num_slots, config.width
        self.slot_embedding = nn.Embedding(slots, width) if slots else None
        self.slot_head = nn.Linear(width, slots + 1, bias=False) if slots else None  # the last output is the end
        self.slot_modulation = nn.Embedding(slots, 2 * width) if slots else None
        if config.positions == "learned":
            places = config.prefix_length + config.num_tokens - 1  # the last token is never read
            self.positions = nn.Parameter(torch.empty(places, config.width))
        self.register_buffer("rotary", rotary_table(config), persistent=False)
        self.register_parameter("start", nn.Parameter(torch.empty(config.width)) if started else None)
        self._add_text(config.width)
        self.recompute = False
        self.drafts: dict[str, GPT] = {}  # no part of this model: see `_draft`
        self.replays = True  # on a GPU steps are CUDA graphs: see `replay`
        self._initialise()

    def _make_head(self) -> nn.Linear | DimensionHead | IndependentHead:
        config, ends = self.config, self.config.end is not None
        if config.head is None:
            return nn.Linear(config.width, config.vocab_size + ends, bias=False)
        first, *others = config.digits
        sizes = (first + ends, *others)  # what ends a sequence does so by its first digit
        if config.head.stack is None:
            return IndependentHead(config.width, sizes)
        return DimensionHead(config.width, sizes, config.head.stack, dropout=config.dropout, first_step="corrected")

    @torch.no_grad()
    def _initialise(self) -> None:
        """N(0, 0.02) everywhere, except norms at one and the heads at zero; that of digits has seen to itself."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2 and not (self.config.digits and name.startswith("head.")):
                nn.init.normal_(parameter, std=0.02)
        if self.start is not None:
            nn.init.normal_(self.start, std=0.02)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.weight)
        if self.digit_head is not None:
            nn.init.zeros_(self.digit_head.table)
        if self.slot_head is not None:
            nn.init.zeros_(self.slot_head.weight)

    def adapt(self, stored: dict[str, Tensor], start: GPTConfig) -> dict[str, str]:
        """Besides, weights of a model of another tokenizer's tokens: of other ids, slots or digits what reads and draws
        tokens starts afresh; of another number of tokens, learned positions are kept as far as both go.
        """
        said, here = super().adapt(stored, start), self.config
        if (here.prefix_length, here.positions, here.width) != (start.prefix_length, start.positions, start.width):
            return said  # another model, and refused by its shapes
        different = [
            f"{name} is {getattr(here, name)} here, {getattr(start, name)} there"
            for name in ("vocab_size", "levels", "digits", "num_slots")
            if getattr(here, name) != getattr(start, name)
        ]
        if different:
            why = f"tokens of another kind ({'; '.join(different)}): what reads and draws them starts afresh"
            said |= self.start_afresh(stored, TOKEN_PARTS, why)
        if here.positions == "learned" and "positions" in stored and len(stored["positions"]) != len(self.positions):
            kept, rows = min(len(stored["positions"]), len(self.positions)), self.positions.detach().clone()
            rows[:kept] = stored["positions"][:kept]
            stored["positions"] = rows
            others = f", and {len(rows) - kept} start afresh" if len(rows) > kept else ""
            said["positions"] = (
                f"positions: at most {here.num_tokens} tokens here, {start.num_tokens} there: the first {kept} places "
                f"are kept{others}"
            )
        return said

    def recompute_activations(self) -> None:
        """From now on keep only the blocks' inputs for the backward pass."""
        self.recompute = True
        if isinstance(self.head, DimensionHead):
            self.head.recompute = True

    def read(self, condition: Condition | Reading) -> Reading:
        """What stands before the tokens, and what the blocks attend to beside them; of a reading, itself."""
        reading = super().read(condition)
        if isinstance(condition, Reading) or reading.prefix is not None:
            return reading
        return replace(reading, prefix=self.slot(condition)[:, None], labels=None)

    def slot(self, condition: Condition) -> Tensor:
        """What stands before the tokens, (B, D)."""
        if self.class_embedding is None:
            assert self.start is not None
            return self.start.expand(len(condition), -1)
        assert isinstance(condition, Tensor), "a class-conditional model was called with captions"
        labels_B = torch.where(condition == -1, self.null_class, condition)
        if self.start is None:
            return self.class_embedding(labels_B)
        with_none = F.pad(self.class_embedding.weight, (0, 0, 0, 1))  # (C + 1, D): "no class" adds zeros
        return self.start + F.embedding(labels_B, with_none)

    # ------------------------------------------------ one path for training and sampling

    def hidden(
        self,
        condition: Condition | Reading | None,
        ids_BL: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        slots: Tensor | None = None,
    ) -> Tensor:
        """[prefix of the condition | tokens] -> normed states (B, L or L + 1, D) of the prefix's last slot and the
        tokens; the state at a token predicts the next.

        Without `condition`, or what `read` made of it, it is already in the cache, and the ids follow what each row
        holds, or stand at `positions` (B, L), which count the prefix. `slots` (B, L) are the tokenizer's, for a model
        that draws them.
        """
        x = self.token_embedding(ids_BL)
        if self.digit_embedding is not None:
            x = x + self.digit_embedding(ids_BL)
        if self.slot_embedding is not None:
            assert slots is not None, "this model reads the slots of tokens"
            x = x + self.slot_embedding(slots)
        before, memory, prefix_mask, record = 0, None, None, None
        if condition is not None:
            reading = self.read(condition)
            assert reading.prefix is not None
            x = torch.cat([reading.prefix.to(x.dtype), x], dim=1)
            before, memory, prefix_mask = reading.prefix.shape[1] - 1, reading.memory, reading.prefix_mask
            record = reading.prefix_record
            if cache is not None:
                cache.memory, cache.prefix_mask, cache.prefix_record = memory, prefix_mask, record
        elif cache is not None:
            memory, record = cache.memory, cache.prefix_record
        window = Window.first(x.shape[1], prefix_mask) if cache is None else cache.open(x.shape[1], positions)
        if self.config.positions == "learned":
            x = x + window.of(self.positions)
        x = self.dropout(x)
        table = None if self.rotary is None else window.of(self.rotary)
        if table is not None and window.positions is not None:
            table = table[:, None]  # the same for all heads
        layers = [None] * len(self.blocks) if cache is None else cache.layers(window)
        for index, block in enumerate(self.blocks):
            caption = None if memory is None else memory.layer(index)
            watch = None if record is None else record.of_layer(index, self.config.prefix_length)
            again = self.recompute and cache is None and watch is None
            x = call_block(block, x, window, table, layers[index], caption, watch, recompute=again)
        return self.norm(x[:, before:])

    def features(self, states: Tensor, slots: Tensor | None = None) -> Tensor:
        """What the head reads (..., D) of normed states (..., D); for a model that draws slots, of the tokens that come
        from `slots` (...).
        """
        if self.slot_modulation is None:
            return states
        assert slots is not None, "this model draws a token's slot before its id"
        scale, shift = self.slot_modulation(slots).chunk(2, dim=-1)
        return torch.addcmul(shift, states, 1 + scale)

    def read_out(self, states: Tensor, slots: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Logits (..., V) in float32 of normed states (..., D), from `slots` as in `features`.

        Of a model that draws digits, logits (..., C, most values of a digit) of each digit of the `ids` (...) given
        those before it, where they are not independent.
        """
        states = self.features(states, slots)
        if self.config.digits:
            assert ids is not None, "this model draws the digits of ids"
            digits = self.digits.split(ids)
            return self.head(states.flatten(0, -2), digits.flatten(0, -2)).unflatten(0, ids.shape)
        logits = self.head(states)
        if self.digit_head is not None:
            of_ids = F.linear(states, self.digit_head())
            logits = logits + F.pad(of_ids, (0, logits.shape[-1] - of_ids.shape[-1]))
        return logits.float()

    @property
    def digits(self) -> Digits:
        """How ids are made of digits, for a model that draws those."""
        assert isinstance(self.token_embedding, Digits), "this model draws ids as a whole"
        return self.token_embedding

    def slot_logits(self, states: Tensor) -> Tensor:
        """Logits (..., S + 1) in float32 of the slot that the next token comes from, or the end, which is the last."""
        assert self.slot_head is not None
        return self.slot_head(states).float()

    def logits(self, condition: Condition | Reading, ids_BL: Tensor, slots: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) in float32 of all L tokens given the condition, the tokens before each, and its slot; or of
        their digits, see `read_out`.
        """
        before = None if slots is None else slots[:, :-1]
        return self.read_out(self.hidden(condition, ids_BL[:, :-1], slots=before), slots, ids_BL)

    # ------------------------------------------------ training

    def forward(self, content: Tokens, condition: Condition, *, generator: torch.Generator) -> Losses:
        """Mean cross-entropy of all tokens that are meant, or of their digits, and of the end and the slots where they
        are drawn; labels (B,) or captions, dropped at random. The parts are in nats a token also where digits are
        drawn.
        """
        return self.forward_drawn(content, self._drop_some(condition, generator))

    def forward_drawn(self, content: Tokens, condition: Condition) -> Losses:
        """`forward` with the conditions dropped: a function of tensors, which `training.compile` makes one graph."""
        config, content = self.config, content.padded()
        ids, slots = content.ids, content.slots
        if (slots is not None) != (config.num_slots > 0):
            raise ValueError(f"tokens {'without' if slots is None else 'with'} slots, num_slots is {config.num_slots}")
        if ids.shape[1] > config.num_tokens:
            raise ValueError(
                f"{ids.shape[1]} tokens an image, but this model has positions for num_tokens = {config.num_tokens}"
            )
        if config.ends and ids.shape[1] < config.num_tokens:  # room for the end of the longest
            ids, slots = F.pad(ids, (0, 1)), None if slots is None else F.pad(slots, (0, 1))
        states = self.hidden(condition, ids[:, :-1], slots=None if slots is None else slots[:, :-1])
        targets = targets_of(ids, content.lengths, config.end)
        if self.config.digits:
            loss, parts = self._digits_loss(states, slots, targets)
        else:
            logits = self.read_out(states, slots)
            loss = cross_entropy(logits, targets)
            parts = {"cross_entropy": loss, "first_token": F.cross_entropy(logits[:, 0], ids[:, 0])}
        if slots is not None:
            previous = F.pad(slots[:, :-1], (1, 0), value=-1)
            of_slots = self.slot_logits(states).masked_fill(closed_slots(previous, config.num_slots), -torch.inf)
            parts["slots"] = cross_entropy(of_slots, targets_of(slots, content.lengths, config.num_slots))
            loss = loss + parts["slots"]
        return Losses(loss, parts)

    def _digits_loss(self, states: Tensor, slots: Tensor | None, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy of the digits of targets (B, L), and the parts in nats a token."""
        meant, ids = targets != IGNORED, targets.clamp(min=0)
        digits = self.digits.split(ids)
        logits = self.read_out(states, slots, ids)
        errors = F.cross_entropy(logits.flatten(0, 2), digits.flatten(), reduction="none").view(digits.shape)
        first = torch.arange(digits.shape[-1], device=ids.device) == 0
        told = meant[..., None] & (first | (ids < self.config.vocab_size)[..., None])  # an end by its first digit alone
        errors = errors.where(told, 0)
        total = errors.sum()
        parts = {"cross_entropy": total / meant.sum(), "first_token": errors[:, 0].sum() / len(errors)}
        return total / told.sum(), parts

    # ------------------------------------------------ sampling

    def generate(
        self,
        condition: Condition | Reading,
        *,
        seed: int,
        indices: Sequence[int],
        sampling: TokenSampling | None = None,
        num_tokens: int | None = None,
        on_step: Callable[[int], None] | None = None,
        control: Control | None = None,
        cached: bool = True,
    ) -> Tokens:
        """Tokens (B, num_tokens), or fewer in rows that end, for labels (B,), -1 for no class, or captions, or for what
        `reading` made of them; the first of a longer request are those of a shorter one (but for its last, where
        `sampling.decoding` guesses tokens), and row b uses the uniforms of (`seed`, `indices[b]`) alone.

        `on_step` is told how many tokens are drawn. A `control` may replace the reading before each token, see
        `conditioning.Control`: what the cache holds stays as it was computed, unless the `prefix` is another tensor,
        with which the tokens drawn so far are computed anew. `cached=False` recomputes the whole prefix at each step:
        slow, kept as the oracle of the cache. Raises ValueError for a condition that the model does not know, more
        tokens than it draws, or settings that do not suit it.
        """
        count = self.config.num_tokens if num_tokens is None else num_tokens
        if not 1 <= count <= self.config.num_tokens:
            raise ValueError(f"num_tokens: this model draws 1 to {self.config.num_tokens} tokens, asked for {count}")
        sampling = sampling or self.config.sampling
        if max(sampling.forbidden, default=0) >= self.config.vocab_size:
            raise ValueError(f"sampling.forbidden: ids lie in 0 to {self.config.vocab_size - 1}")
        if self.config.digits and sampling.forbidden:
            raise ValueError("sampling.forbidden: this model draws ids digit by digit, and cannot leave ids out")
        most = max(self.config.digits, default=self.config.vocab_size)
        if sampling.top_k > most:
            raise ValueError(f"sampling.top_k: there are {most} to choose from, cannot keep {sampling.top_k}; 0 is all")
        if sampling.decoding != "exact":
            if control is not None or not cached:
                what = "control: goes" if cached else "cached=False: goes"
                raise ValueError(f"{what} with sampling.decoding=exact alone, given {sampling.decoding}")
            draft = None if sampling.draft_model is None else self._draft(sampling.draft_model)
            with torch.no_grad(), packed_linears(self), nullcontext() if draft is None else packed_linears(draft):
                return speculative_gpt.generate(
                    self,
                    condition,
                    seed=seed,
                    indices=indices,
                    num_tokens=count,
                    sampling=sampling,
                    on_step=on_step,
                    draft=draft,
                )
        shape = (self.config.num_tokens,)
        of_ids = (*shape, len(self.config.digits)) if self.config.digits else shape
        uniforms = Uniforms(
            randomness.uniform(seed, indices, of_ids, "tokens")[:, :count],
            randomness.uniform(seed, indices, shape, "slots")[:, :count] if self.config.num_slots else None,
        )
        loop = decoding.cached if cached else decoding.plain
        with torch.no_grad(), packed_linears(self):
            if cached and control is None and speculative_gpt.draws_exactly(self, condition):
                tokens = speculative_gpt.exact(self, condition, uniforms, sampling, on_step)
            else:
                tokens = loop(self, condition, uniforms, sampling, on_step, control)
        ended = (tokens.lengths < tokens.ids.shape[1]).long()  # by one more call
        return replace(tokens, calls=Calls.one_each(tokens.lengths + ended))

    def _draft(self, name: str) -> GPT:
        """The model that `sampling.draft_model` names, which is read once. Raises what `hub.resolve` does."""
        if name not in self.drafts:
            self.drafts[name] = hub.load(hub.resolve(name, expect=GPT)).eval()
        return self.drafts[name].to(self.device)

    def rates(self) -> list[int]:
        """Every number of tokens up to all: a longer draw begins with the shorter one. None if sequences end."""
        return [] if self.config.ends else list(range(1, self.config.num_tokens + 1))

    def check_decoder(self, decoder: nn.Module) -> None:
        """Raises ValueError for anything but a tokenizer of this vocabulary and these slots, whose sequences end where
        the model's do and may be as long.
        """
        config = self.config
        if not isinstance(decoder, Tokenizer):
            raise ValueError(f"the generator draws tokens, which a {type(decoder).__name__} does not decode")
        if config.vocab_size != decoder.vocab_size or config.num_tokens > decoder.num_tokens:
            raise ValueError(
                f"the generator draws {config.num_tokens} tokens of {config.vocab_size}, but the tokenizer decodes "
                f"{decoder.num_tokens} of {decoder.vocab_size}: they were not trained together"
            )
        if config.ends == decoder.fixed_length:
            drawn = "sequences that end" if config.ends else "as many tokens for every image"
            takes = "takes as many tokens for every image" if decoder.fixed_length else "takes sequences that end"
            raise ValueError(f"the generator draws {drawn}, but the tokenizer {takes}: they were not trained together")
        if (config.num_slots or None) != decoder.num_slots:
            raise ValueError(
                f"the generator draws tokens of {config.num_slots or 'no'} slots, but the tokenizer has "
                f"{decoder.num_slots or 'none'}: they were not trained together"
            )

    def prefill(self, condition: Condition | Reading, cache: KVCache) -> Tensor:
        """What comes first, (R, 1, ...), as `step` says it; the condition, or what `read` made of it, goes into an
        empty cache.
        """
        assert cache.length == 0, "a prefill wants an empty cache: truncate it to 0"
        none = torch.empty(len(cache), 0, dtype=torch.long, device=self.device)
        return self.predict(self.hidden(condition, none, cache, slots=none)[:, -1:])

    def step(
        self, ids_RL: Tensor, cache: KVCache, positions: Tensor | None = None, slots: Tensor | None = None
    ) -> Tensor:
        """Logits (R, L, V) of the token after each of `ids_RL`, which follow what each row of the cache holds.

        A model that draws slots needs the `slots` (R, L) of the ids. What it draws next is a slot, and the law of the
        id depends on that: so it gives states (R, L, D), for `slot_logits(states)` and then `read_out(states, slots)`.
        One that draws digits gives states too, for its `head` to read `features(states, slots)`.

        With `positions` (R, L), those of the ids in the cache, prefix included, shapes depend on L alone: what
        torch.compile and CUDA graphs need. See `KVCache.open`, also for what to do near the end of a cache.
        """
        return self.predict(self.hidden(None, ids_RL, cache, positions, slots))

    def predict(self, states: Tensor) -> Tensor:
        """What a token is drawn from, of the normed states (..., D) before it: its logits (..., V), or the states where
        its slot is drawn first, or its digits are.
        """
        return states if self.config.num_slots or self.config.digits else self.read_out(states)

    def new_cache(self, rows: int, num_tokens: int) -> KVCache:
        """An empty cache for the drawing of `num_tokens` tokens, the last of which never enters."""
        config = self.config
        capacity = config.prefix_length + num_tokens - 1
        return KVCache(config.depth, rows, config.num_heads, capacity, config.head_dim, self.norm.weight)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device


def rotary_table(config: GPTConfig) -> Tensor | None:
    """The rotary rows (prefix + tokens, E / 2, 2) of a model's slots and tokens; None for learned positions."""
    if config.positions == "learned":
        return None
    prefix, base, zero_prefix = config.prefix_length, config.rotary_base, config.zero_prefix
    if config.positions == "rotary_1d":
        return rotary_1d(config.head_dim, config.num_tokens, prefix, base, zero_prefix=zero_prefix)
    return rotary_2d(config.head_dim, math.isqrt(config.num_tokens), prefix, base, zero_prefix=zero_prefix)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over those targets (B, L) that are not `IGNORED`; logits (B, L, V)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def targets_of(numbers: Tensor, lengths: Tensor, end: int | None) -> Tensor:
    """What is to be predicted in place of `numbers` (B, K), of which `lengths` (B,) are meant: they, then the end."""
    columns, lengths = torch.arange(numbers.shape[1], device=numbers.device), lengths.to(numbers.device)[:, None]
    targets = numbers.masked_fill(columns >= lengths, IGNORED)
    return targets if end is None else targets.masked_fill(columns == lengths, end)


IGNORED = -100
"""A target that counts for nothing in the loss."""
