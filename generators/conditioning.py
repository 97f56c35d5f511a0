"""What an image is drawn for, once for all generators: a class, or the features of a caption.

`condition` of a configuration is one of the small dataclasses below, and says how a condition enters the network. A
network asks `read` what it sees of a batch of conditions: slots that stand before its content (`prefix`, with a mask
where captions are shorter), and what its cross-attention looks at (`memory`). Both stay the same for all calls of a
`generate`, so they are read once. While training, the condition of some samples is replaced by none, so that sampling
can be guided away from none: "no class" is a label of its own, "no caption" the empty text, or features that stand for
it; both are kept in the model's folder.

Nothing here switches gradients off, so that a control may differentiate through the reading and a call of the network.

Shapes: B images, R rows of a call, T columns of a caption, P prefix slots, W channels of a feature, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from imgtok.config import FROM_DATA, Fraction, NonNegativeInt, PositiveInt, check
from imgtok.hub import Pretrained
from imgtok.layers.attention import Attention, CrossAttention
from imgtok.layers.cache import Memory
from imgtok.layers.feed_forward import SwiGLU
from imgtok.layers.norms import RMSNorm
from imgtok.layers.record import AttentionRecord
from imgtok.text.captions import Captions
from imgtok.tokenizers.base import Autoencoder

Condition = Tensor | Captions
"""What images are made for: labels (B,), -1 for no class, or captions."""
WHOLE = (torch.int64, torch.int32)
"""Kinds of numbers that labels may be."""

CLASSES = "class_embedding.weight"
"""The table of classes, by the name that it has in every generator."""

# ---------------------------------------------------------------- how a condition enters


@dataclass(frozen=True, kw_only=True)
class FromClass:
    """A generator that draws for classes."""

    kind: str
    num_classes: Annotated[PositiveInt, FROM_DATA] = 1000
    """Classes; training fills it in from the cache of tokens or latents."""
    classes: Annotated[tuple[str, ...], FROM_DATA] = ()
    """Names of the classes in order, where they have any; training fills them in from the cache."""
    drop: Fraction = 0.1
    """Share of training samples whose class is replaced by none."""

    text_length: ClassVar[int] = 0
    text_encoder: ClassVar[str | None] = None
    controls: ClassVar[tuple[str, ...]] = ()
    """It reads no text."""

    def __post_init__(self) -> None:
        check(self)
        if len(self.classes) > self.num_classes:
            raise ValueError(
                f"classes: {len(self.classes)} names, such as {self.classes[0]!r}, for num_classes = "
                f"{self.num_classes}; give as many, or leave classes out"
            )


@dataclass(frozen=True, kw_only=True)
class FromText:
    """A generator that draws for captions, which it reads as the features of a frozen text encoder."""

    kind: str
    text_width: Annotated[PositiveInt, FROM_DATA] = 2048
    """Channels of a feature; training fills it in from the text cache."""
    text_length: Annotated[PositiveInt, FROM_DATA] = 120
    """Most features of a caption; training fills it in from the text cache."""
    text_encoder: Annotated[str | None, FROM_DATA] = None
    """Folder or Hub name of the text encoder, or minilm, where sampling looks for it; training fills it in."""
    empty_length: Annotated[PositiveInt, FROM_DATA] = 1
    """Features of the empty caption, by which the text encoder is known again; training fills it in from the text
    cache."""
    controls: Annotated[tuple[str, ...], FROM_DATA] = ()
    """Controls of prompts, by kind, that act on every prompt as they did on the captions of training; training fills
    it in from the text cache."""
    context_layers: NonNegativeInt = 0
    """Blocks in which a caption's features see each other before the network reads them, trained with the generator; 0
    for an encoder that has done so. 2 for encoder=words, which knows each word alone."""
    drop: Fraction = 0.1
    """Share of training samples whose caption is replaced by none."""

    def __post_init__(self) -> None:
        check(self)
        if self.empty_length > self.text_length:
            raise ValueError(f"empty_length: {self.empty_length} is more than text_length = {self.text_length}")


@dataclass(frozen=True, kw_only=True)
class ClassSlot(FromClass):
    """The slot before the first token is the class's embedding; "no class" is one more row of the table (LlamaGen)."""

    kind: Literal["class_slot"] = "class_slot"


@dataclass(frozen=True, kw_only=True)
class StartPlusClass(FromClass):
    """The slot is a learned start vector plus the class's embedding; "no class" adds nothing (FlexTok)."""

    kind: Literal["start_plus_class"] = "start_plus_class"


@dataclass(frozen=True, kw_only=True)
class ClassModulation(FromClass):
    """The class's embedding joins that of the time; "no class" is one more row of the table (xAR)."""

    kind: Literal["class"] = "class"


@dataclass(frozen=True, kw_only=True)
class ClassBuffer(FromClass):
    """Slots before the positions, `num_slots` of them, all hold the class's embedding; "no class" has one of its own
    (MAR, TokenBridge). They are also what the network computes with while nearly nothing of the image is there.
    """

    kind: Literal["class_buffer"] = "class_buffer"
    num_slots: PositiveInt = 64
    """Slots that hold the class's embedding."""


@dataclass(frozen=True, kw_only=True)
class TextCrossAttention(FromText):
    """Every block attends to the caption's features, after a small MLP; none is the empty caption (FlexTok)."""

    kind: Literal["cross_attention"] = "cross_attention"


@dataclass(frozen=True, kw_only=True)
class TextPrefix(FromText):
    """The caption's features, after a small MLP, stand in `text_length` slots before the first token, the last of them
    in the last slot; none is features that are drawn once and never trained, seen where the caption's are (LlamaGen).
    """

    kind: Literal["text_prefix"] = "text_prefix"


AnyCondition = ClassSlot | StartPlusClass | ClassModulation | ClassBuffer | TextPrefix | TextCrossAttention


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """What the configurations of all generators have; each says which values `kind` and `condition` take."""

    kind: str
    condition: AnyCondition

    def __post_init__(self) -> None:
        check(self)

    @property
    def reads_text(self) -> bool:
        """Whether captions are the condition, and not classes."""
        return isinstance(self.condition, FromText)

    @property
    def num_classes(self) -> int:
        """Classes that it draws for; 0 where captions are the condition."""
        return self.condition.num_classes if isinstance(self.condition, FromClass) else 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of its classes in order; () where they have none."""
        return self.condition.classes if isinstance(self.condition, FromClass) else ()

    def with_condition(self, **fields: Any) -> Self:
        """The same with other values in fields of `condition`."""
        return replace(self, condition=replace(self.condition, **fields))


# ---------------------------------------------------------------- the model's side


@dataclass(frozen=True)
class Reading:
    """What a network sees of R conditions; None where it sees nothing of that form."""

    prefix: Tensor | None = None
    """Slots (R, P, D) before the content."""
    prefix_mask: Tensor | None = None
    """How the slots are seen, (R, P), boolean (True = seen) or additive; None where all are seen as they stand."""
    memory: Memory | None = None
    """What cross-attention looks at."""

    prefix_record: AttentionRecord | None = None
    """What keeps the maps of a caption that stands in the slots, if they are asked for."""
    labels: Tensor | None = None
    """(R,): the classes, for a network that is modulated by them (xAR)."""

    def __len__(self) -> int:
        """R."""
        seen = (self.prefix, self.labels, None if self.memory is None else self.memory.mask)
        return next((len(part) for part in seen if part is not None), 0)

    def rows(self, rows: slice) -> Reading:
        """What some of the conditions are."""
        prefix, mask, labels = (
            None if part is None else part[rows] for part in (self.prefix, self.prefix_mask, self.labels)
        )
        memory = None if self.memory is None else self.memory.rows(rows)
        return replace(self, prefix=prefix, prefix_mask=mask, memory=memory, labels=labels)

    def recorded(self, record: AttentionRecord | None) -> Reading:
        """The same, with a record of what is seen of the captions; None records nothing."""
        memory = None if self.memory is None else self.memory.recorded(record)
        return replace(self, memory=memory, prefix_record=None if self.prefix_mask is None else record)


Control = Callable[[int, Reading], Reading | None]
"""A control of `generate`: `control(step, reading)` is called before each step, with the number of tokens (GPT), or of
steps over all entities (xAR), that are done, and the reading that the network sees: of the images and, where anything
is guided, of as many conditions that say nothing. What it returns is seen from this step on; None keeps the reading.
Only the prefix, its mask, the memory and the records may change, not the number of rows. Gradients are on while it
runs, and off in the network's own calls."""


def controlled(control: Control | None, step: int, reading: Reading) -> Reading:
    """The reading for a step. Raises ValueError for one that a control gave other rows or labels."""
    if control is None:
        return reading
    with torch.enable_grad():
        new = control(step, reading)
    if new is None:
        return reading
    if len(new) != len(reading) or new.labels is not reading.labels:
        raise ValueError("control: a reading has to keep its rows and labels")
    return new


class ConditionalGenerator(nn.Module, Pretrained):
    """A generator of tokens or latents for labels or captions, with what is done to either before it is read.

    A model calls `_add_text` where its parameters are made, and has a `CrossAttention` in each block if `condition` is
    `cross_attention`. Its configuration also has `sampling`, a dataclass: the settings that `generate` draws by unless
    it is given others. That of a generator of latents has `grid`, the latent's positions a side, and `latent_channels`;
    that of every decoder has `decoding`.
    """

    in_words: ClassVar[str] = "a generator"
    learns_from: ClassVar[Literal["tokens", "latents"]]
    """What it draws, and so what its cache holds and its decoder takes."""
    keeps_known: ClassVar[bool] = False
    """Whether `generate` takes `known`, latents of which a part is kept (`imgtok.generators.known.Known`)."""
    config: ConditionConfig
    text_proj: nn.Sequential | None
    text_context: TextContext | None
    empty_caption: Tensor | None
    """(empty_length, text_width): the empty text's features, by which the text encoder is known again, and which stand
    for "no caption" unless `no_caption` does; see `set_empty_caption`. None where no captions are read."""
    no_caption: Tensor | None
    """(text_length, text_width): what stands for "no caption" in a text prefix."""

    def _add_text(self, width: int) -> None:
        """The way of features (.., text_width) into a model of `width`, and what stands for no caption.

        That is saved, so that a folder knows its unconditional branch without the text encoder.
        """
        condition = self.config.condition
        self.text_proj, self.text_context, empty, none = None, None, None, None
        if isinstance(condition, FromText):
            empty = torch.zeros(condition.empty_length, condition.text_width)
        if isinstance(condition, TextCrossAttention):
            self.text_proj = text_projection(condition.text_width, condition.text_width, width)
        if isinstance(condition, TextPrefix):
            self.text_proj = text_projection(condition.text_width, width, width)
            none = torch.randn(condition.text_length, condition.text_width) / condition.text_width**0.5
        if isinstance(condition, FromText) and condition.context_layers:
            heads: Any = self.config  # as its own blocks have
            self.text_context = TextContext(width, heads.num_heads, condition.context_layers, condition.text_length)
        self.register_buffer("empty_caption", empty)
        self.register_buffer("no_caption", none)

    def adapt(self, stored: dict[str, Tensor], start: Any) -> dict[str, str]:
        """Weights of a model of other classes, or of another caption encoder: rows of classes are kept by their names,
        and what reads a caption's features starts afresh where these have another width or number.
        """
        return self._adapt_classes(stored, start) | self._adapt_captions(stored, start)

    def _adapt_classes(self, stored: dict[str, Tensor], start: ConditionConfig) -> dict[str, str]:
        """See `adapt`. Of classes without names a table of the same number is kept, and another one starts afresh."""
        table: Tensor | None = stored.get(CLASSES)
        fresh: Tensor | None = self.state_dict().get(CLASSES)
        if table is None or fresh is None or table.shape[1] != fresh.shape[1]:
            return {}
        none = len(fresh) - self.config.num_classes  # a row for "no class" comes last, in some models
        if len(table) - start.num_classes != none:
            return {}  # another way of conditioning
        before, now = start.class_names, self.config.class_names
        shared = [name for name in now if name in before]
        if start.num_classes == self.config.num_classes and (before == now or not shared):
            if before and now and before != now:
                return {CLASSES: f"{CLASSES}: no class of {len(now)} has the name of one there; each keeps its row"}
            return {}
        rows = fresh.clone()
        for row, name in enumerate(now):
            if name in before:
                rows[row] = table[before.index(name)]
        if none:
            rows[-none:] = table[-none:]
        stored[CLASSES] = rows
        kept = f"{len(shared)} of {self.config.num_classes} classes keep the row that their name has there"
        if not shared:
            why = "no name is shared" if before and now else "the classes of one of the two have no names"
            kept = f"{start.num_classes} classes there, {self.config.num_classes} here, and {why}: all start afresh"
        elif len(shared) < self.config.num_classes:
            kept += f" (such as {shared[0]}), the others start afresh"
        return {CLASSES: f"{CLASSES}: {kept}{'; the row of no class is kept' if none else ''}"}

    def _adapt_captions(self, stored: dict[str, Tensor], start: ConditionConfig) -> dict[str, str]:
        """See `adapt`."""
        here, there = self.config.condition, start.condition
        if not (isinstance(here, FromText) and isinstance(there, FromText) and here.kind == there.kind):
            return {}
        said, own = dict[str, str](), self.state_dict()
        if here.text_width != there.text_width:
            why = f"a caption has features of {here.text_width} numbers here, of {there.text_width} there: "
            said |= self.start_afresh(stored, ("text_proj",), f"{why}text_proj starts afresh")
        lengths = ("empty_caption", "no_caption", "text_context.positions")
        for name in (name for name in lengths if name in own and name in stored):
            if own[name].shape != stored[name].shape:
                shapes = f"{tuple(own[name].shape)} here, {tuple(stored[name].shape)} there"
                stored[name] = own[name].clone()
                said[name] = f"{name}: {shapes}: it starts afresh"
        return said

    def start_afresh(self, stored: dict[str, Tensor], parts: Sequence[str], why: str) -> dict[str, str]:
        """Let parts of the model (first words of names) keep their first values, whatever `stored` has of them; for
        `adapt`, which gives `why` by each of their names.
        """
        own = {name: tensor for name, tensor in self.state_dict().items() if name.split(".")[0] in parts}
        for name in [name for name in stored if name.split(".")[0] in parts]:
            del stored[name]
        stored.update({name: tensor.clone() for name, tensor in own.items()})
        return dict.fromkeys(own, why)

    def recompute_activations(self) -> None:
        """From now on compute activations again in the backward pass. Raises ValueError for a model that cannot."""
        raise ValueError(f"checkpoint_activations: {type(self).__name__} keeps its activations; leave it out")

    def generate(
        self,
        condition: Condition,
        *,
        seed: int,
        indices: Sequence[int],
        sampling: Any = None,
        on_step: Callable[..., None] | None = None,
    ) -> Any:
        """Tokens, or latents (B, C, G, G), for a condition; row b uses the random numbers of (`seed`, `indices[b]`)
        alone.

        A generator of tokens also takes `num_tokens`, one with `keeps_known` also `known`. `on_step(done)` or
        `on_step(done, latents)` follows the drawing: how much is done, and what the latents are expected to become. The
        generators of this suite take a `Reading` in place of the condition too, and a `control`, which may replace it
        between steps.
        """
        raise NotImplementedError

    def rates(self) -> list[int]:
        """The numbers of tokens that one draw can be decoded at; none for latents, and where the model decides."""
        return []

    @property
    def positions_at_once(self) -> int:
        """The most positions of an image that one call of the network may compute while sampling."""
        config: Any = self.config
        return 1 if self.learns_from == "tokens" else int(config.grid**2)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Raises ValueError: alone it could not draw an image. A pipeline uploads it together with its decoder."""
        raise ValueError(
            f"a generator needs its tokenizer or autoencoder beside it: save_pretrained(FOLDER), then "
            f"imgtok.pipeline(FOLDER, tokenizer=...).push_to_hub({repo_id!r})"
        )

    def check_decoder(self, decoder: nn.Module) -> None:
        """Raises ValueError for a tokenizer or autoencoder that cannot decode what this model draws.

        As it stands here, for a generator of latents: for anything but an autoencoder of as many channels.
        """
        if self.learns_from == "tokens":
            raise NotImplementedError
        if not isinstance(decoder, Autoencoder):
            raise ValueError(f"the generator draws latents, which a {type(decoder).__name__} does not decode")
        config: Any = self.config
        drawn, decoded = config.latent_channels, decoder.config.latent_channels
        if drawn != decoded:
            raise ValueError(
                f"the generator draws latents of {drawn} channels, but the autoencoder decodes {decoded}: they were "
                "not trained together"
            )

    @property
    def null_class(self) -> int:
        """The label that stands for "no class"; -1 does so too."""
        return self.config.num_classes

    @torch.no_grad()
    def set_empty_caption(self, features: Tensor) -> None:
        """Keep the features (empty_length, text_width) of the empty text, if captions are read here."""
        if self.empty_caption is not None:
            self.empty_caption.copy_(features)

    def unconditional(self, condition: Condition) -> Condition:
        """As many conditions that say nothing."""
        if isinstance(condition, Tensor):
            return torch.full_like(condition, self.null_class)
        if self.no_caption is not None:
            placed = self._placed(condition)
            none = self.no_caption.to(placed.features)
            return Captions(none.expand_as(placed.features), placed.mask, spans=placed.spans)
        assert self.empty_caption is not None, "this model reads no captions"
        return Captions.pad([self.empty_caption.to(condition.features)]).repeat(len(condition))

    def with_unconditional(self, condition: Condition) -> Condition:
        """The conditions, then as many that say nothing."""
        none = self.unconditional(condition)
        if isinstance(condition, Captions):
            assert isinstance(none, Captions)
            return Captions.cat([self._placed(condition), none])
        assert isinstance(none, Tensor)
        return torch.cat([condition, none])

    def reading(self, condition: Condition, *, guided: bool = True) -> Reading:
        """What `generate` reads of the condition of B images: that of 2B rows, the conditions and as many that say
        nothing; or, with `guided=False`, of B rows.

        It may be recorded or edited, and handed to `generate` in place of the condition. Raises ValueError for a
        condition that the model does not know.
        """
        condition = self._checked(condition)
        return self.read(self.with_unconditional(condition) if guided else condition)

    def _reading(self, condition: Condition | Reading, count: int, *, guided: bool) -> Reading:
        """What `generate` reads for `count` images; a reading that was given has to fit, or for `guided=False` its
        first half. Raises ValueError otherwise.
        """
        reading = condition if isinstance(condition, Reading) else self.reading(condition, guided=guided)
        rows = 2 * count if guided else count
        if isinstance(condition, Reading) and not guided and len(reading) == 2 * count:
            reading = reading.rows(slice(count))
        if len(reading) != rows:
            which = "of both streams: see `reading`" if guided else "or one of both streams"
            raise ValueError(f"{count} images need a reading of {rows} rows ({which}), not of {len(reading)}")
        return reading

    def read(self, condition: Condition | Reading) -> Reading:
        """What the network sees of the conditions; of a reading, itself."""
        if isinstance(condition, Reading):
            return condition
        if isinstance(condition, Tensor):
            return Reading(labels=condition)
        assert self.text_proj is not None, "a class-conditional model was called with captions"
        weight = next(self.text_proj.parameters())
        captions = self._placed(condition)
        context = self.text_proj(captions.features.to(weight.dtype))  # (R, T, D)
        if self.text_context is not None:
            context = self.text_context(context, captions)
        if self.no_caption is not None:
            return Reading(prefix=context, prefix_mask=captions.attention_mask[:, 0, 0])
        attentions = (module for module in self.modules() if isinstance(module, CrossAttention))  # block by block
        layers = [attention.keys_values(context) for attention in attentions]
        return Reading(memory=Memory(layers, captions.attention_mask))

    def _placed(self, captions: Captions) -> Captions:
        """The captions in the columns that the model knows: for a prefix, each moved to the last of its slots."""
        condition = self.config.condition
        return captions.aligned_right(condition.text_length) if isinstance(condition, TextPrefix) else captions

    def _drop_some(self, condition: Condition, generator: torch.Generator) -> Condition:
        """The share `drop` of the conditions replaced by none."""
        draws = torch.rand(len(condition), generator=generator, device=generator.device)
        dropped, none = draws < self.config.condition.drop, self.unconditional(condition)
        if isinstance(condition, Captions):
            assert isinstance(none, Captions)
            return self._placed(condition).replaced(dropped.to(condition.features.device), none)
        assert isinstance(none, Tensor)
        return torch.where(dropped.to(condition.device), none, condition)

    def _checked(self, condition: Condition) -> Condition:
        """The condition as sampling reads it. Raises ValueError for one that the model does not know."""
        how = self.config.condition
        if isinstance(condition, Captions) != isinstance(how, FromText):
            needed, given = ("captions", "labels") if isinstance(how, FromText) else ("labels", "captions")
            raise ValueError(f"this model (condition {how.kind}) draws for {needed}, given {given}")
        if isinstance(condition, Captions):
            assert isinstance(how, FromText)
            _, columns, width = condition.features.shape
            if width != how.text_width or columns > how.text_length:
                raise ValueError(
                    f"captions of {columns} features of width {width}; this model reads at most {how.text_length} "
                    f"of width {how.text_width}: encode them with its own text encoder"
                )
            if not condition.mask.any(1).all():
                raise ValueError("a caption of which no column is seen; even the empty text has those of its marks")
            # One width for every batch, or the last bits would tell who shared it
            return self._placed(condition.widen(how.text_length))
        if not isinstance(condition, Tensor) or condition.ndim != 1 or condition.dtype not in WHOLE:
            given = f"{condition.dtype} {tuple(condition.shape)}" if isinstance(condition, Tensor) else type(condition)
            raise ValueError(f"labels must be a tensor (B,) of whole numbers, such as torch.tensor([0]), got {given}")
        if len(condition) and not (int(condition.min()) >= -1 and int(condition.max()) <= self.null_class):
            raise ValueError(
                f"labels must lie in 0 to {self.config.num_classes - 1} (or -1 or {self.null_class} for no class), "
                f"got {int(condition.min())} to {int(condition.max())}"
            )
        return condition


class TextContext(nn.Module):
    """Pre-norm blocks in which the features of a caption see each other and their order, (R, T, D) -> (R, T, D).

    Columns that are not seen are left out of the count of places, so padding and holes leave no trace.
    """

    def __init__(self, width: int, num_heads: int, depth: int, text_length: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(text_length, width))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(depth))
        self.attentions = nn.ModuleList(Attention(width, num_heads) for _ in range(depth))
        self.mlp_norms = nn.ModuleList(RMSNorm(width) for _ in range(depth))
        self.mlps = nn.ModuleList(SwiGLU(width, 2 * width) for _ in range(depth))

    def forward(self, x: Tensor, captions: Captions) -> Tensor:
        """`captions` are those whose features x stands for."""
        place = (captions.mask.cumsum(dim=1) - 1).clamp(min=0)
        x = x + self.positions[place].to(x.dtype)
        mask = captions.attention_mask
        for norm, attention, mlp_norm, mlp in zip(self.norms, self.attentions, self.mlp_norms, self.mlps, strict=True):
            x = x + attention(norm(x), mask=mask)
            x = x + mlp(mlp_norm(x))
        return x


def text_projection(text_width: int, hidden: int, width: int) -> nn.Sequential:
    """A caption's features (.., text_width) -> (.., width): text_width -> hidden -> width, tanh-GELU, no biases."""
    return nn.Sequential(
        nn.Linear(text_width, hidden, bias=False),
        nn.GELU(approximate="tanh"),
        nn.Linear(hidden, width, bias=False),
    )
