"""Controls of prompts in our generators that read text: GPT and xAR. All of this is ours; nothing is published on it.

Nothing here has steps that fix a layout early, as diffusion has: a token is drawn once. So images are drawn as a whole,
looked at in one pass over what was drawn, and the texts are updated by what is seen; then the images are drawn again,
with the same random numbers. Composites are bound before anything is drawn. What is only looked at may be less than an
image: the first of its tokens, or one from fewer steps of the flow (`look` of the controls).

A GPT's map is what the state before each token looks at among the columns of the caption; of captions that stand before
the tokens, among those columns alone. Where tokens have no place in the image there is no grid: entropy and smoothing
are left out. An xAR's map is taken at one time of the flow, of all its entities.

Shapes: B images, N rows of a call, T columns of a caption, L tokens, C channels, G positions a side of a latent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from imgtok import flow, randomness
from imgtok.generators import xar_fast
from imgtok.generators.conditioning import ConditionalGenerator
from imgtok.generators.controls.scene import Anchor, ControlRun, Prompt, PromptControl, Texts, frozen
from imgtok.generators.controls.tome import binding_loss, divergence
from imgtok.generators.gpt import GPT
from imgtok.generators.xar import XAR
from imgtok.layers.record import AttentionRecord
from imgtok.text.captions import Captions
from imgtok.text.parsing import Parse
from imgtok.tokenizers.calls import Calls
from imgtok.tokenizers.tokens import Tokens

FIRST = 8
"""Tokens of a phrase that a composite is bound by."""
LOOK_AT = 0.8
"""Time of the flow, of 1 (noise) to 0, at which an xAR is looked at."""

Encode = Callable[[Sequence[str]], Sequence[Captions]]


def check_reads(generator: ConditionalGenerator) -> None:
    """Raises ValueError for a generator that no control can act on."""
    kind, condition = generator.config.kind, generator.config.condition
    if not generator.config.reads_text:
        raise ValueError(
            f"controls: a generator with condition {condition.kind} draws classes, and has no prompt to control; leave "
            "controls out, or take one that reads text (cross_attention or text_prefix)"
        )
    if not isinstance(generator, GPT | XAR):
        raise ValueError(f"controls: a generator of kind {kind} shows no maps of its text; leave controls out")


class OwnScene:
    """A batch of one of our generators: the `Scene` of its controls.

    `encode` is that of the text encoder, which the captions of the parsed prompts came from; `notes` is filled with
    what controls did, and `options` are further ones of `generate`. Raises ValueError for a generator that no control
    can act on, and for captions without spans.
    """

    def __init__(
        self,
        generator: ConditionalGenerator,
        parses: Sequence[Parse],
        captions: Captions,
        encode: Encode,
        *,
        seed: int,
        indices: Sequence[int],
        notes: list[dict[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        check_reads(generator)
        self.look: Look = GPTLook(generator) if isinstance(generator, GPT) else XARLook(generator)  # type: ignore[arg-type]
        self.generator, self._encode, self.seed = generator, encode, seed
        self.images: Sequence[int] = list(indices)
        self.options: dict[str, Any] = {**options, "seed": seed, "indices": self.images}
        self.captions = self._placed(captions)
        if self.captions.spans is None:
            raise ValueError("controls: the captions do not say which characters their columns stand for")
        self.prompts: Sequence[Prompt] = [
            Prompt(parse, spans) for parse, spans in zip(parses, self.captions.spans.cpu(), strict=True)
        ]
        self.texts = self._texts(self.captions)
        self.latents: Tensor | None = None
        self.once = False
        self.step, self.steps = -1, 0
        self.less, self.grid = self.look.less(1.0, self.options)
        self.notes: list[dict[str, Any]] = [] if notes is None else notes
        self.bind_step: float | None = None
        self.content: Any = None
        self.counted: list[Calls] = []
        self.anchors: Anchor | None = None

    def draw(self, controls: Sequence[PromptControl]) -> Any:
        """What is drawn for the texts after all controls acted; its calls of the network are those of all drawings,
        those that are looked at too, without the passes of the controls. Raises ValueError as the controls do.
        """
        with frozen(self.generator):
            self._act(controls)
        drawn = self.generator.generate(self.captions_of(self.texts), **self.options)
        if isinstance(drawn, Tokens) and drawn.calls is not None:
            drawn = replace(drawn, calls=functools.reduce(Calls.plus, self.counted, drawn.calls))
        return drawn

    def _act(self, controls: Sequence[PromptControl]) -> None:
        """All that controls do."""
        runs: list[ControlRun] = [control.start(self) for control in controls]
        looks = [run.looks(self) for run in runs]
        self.steps = max(looks, default=0)
        share = max((run.config.look for run, count in zip(runs, looks, strict=True) if count > 0), default=1.0)
        self.less, self.grid = self.look.less(share, self.options)
        for step in range(self.steps):
            self.step = step
            for run, count in zip(runs, looks, strict=True):
                if step < count:
                    run.act(self)

    def captions_of(self, texts: Texts) -> Captions:
        """Texts as the generator reads them. Columns that are hidden have a weight of nothing, and keep their place."""
        return Captions(texts.seen.to(self.captions.features.dtype), texts.mask, texts.bias)

    def encode(self, prompts: Sequence[str]) -> Texts:
        """See `Scene`."""
        return self._texts(self._placed(Captions.cat([self._encode([prompt])[0] for prompt in prompts])))

    def maps(self, texts: Texts, rows: Tensor, latents: Tensor | None = None) -> Tensor:
        """See `Scene`: of what is drawn for the texts as they were before anything was looked at."""
        if self.content is None:
            with torch.no_grad():
                silent = {**self.options, "on_step": None}  # nobody is shown what is only looked at
                self.content = self.generator.generate(self.captions_of(self.texts), **silent | self.less)
            if isinstance(self.content, Tokens) and self.content.calls is not None:
                self.counted.append(self.content.calls)
        record = AttentionRecord()
        chosen = [self.images[row] for row in rows.tolist()]
        return self.look.maps(self.captions_of(texts), self.content[rows], record, self.seed, chosen)

    def coming_maps(self, weighted: Callable[[Texts], Texts], told: Callable[[Tensor], None]) -> None:
        """See `Scene`; no call draws all of an image, so this is a pass of its own."""
        texts = weighted(self.texts)
        told(self.maps(texts, torch.arange(len(texts), device=texts.states.device)))

    def redraw(self) -> None:
        """See `Scene`: with the same random numbers."""
        self.content = None

    def anchor(self, rows: Tensor, phrases: Sequence[str], *, published: bool, last: bool = False) -> Anchor:
        """See `Scene`; the phrases stay where they are, so neither option changes anything."""
        if self.anchors is None:
            chosen = [self.images[row] for row in rows.tolist()]
            captions = self.captions_of(replace(self.encode(phrases), null=self.texts.null))
            with torch.no_grad():
                self.anchors = self.look.anchor(captions, self.seed, chosen)
        return self.anchors

    def _placed(self, captions: Captions) -> Captions:
        found = self.generator._checked(captions)
        assert isinstance(found, Captions)
        return found

    def _texts(self, captions: Captions) -> Texts:
        none, empty = self.generator.no_caption, self.generator.empty_caption
        if none is None:  # column by column, and its last in all that follow
            assert empty is not None
            columns = torch.arange(captions.features.shape[1], device=empty.device).clamp(max=len(empty) - 1)
            none = empty[columns]
        return Texts(captions.features.float(), captions.mask, none.float(), captions.log_weights)


class Look(Protocol):
    """How one kind of generator is asked."""

    def less(self, share: float, options: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, int] | None]:
        """Of a drawing with options of `generate`: those by which about a share of it is drawn, at least a token or a
        step; and the grid of the maps of that, where they have one.
        """
        ...

    def maps(
        self, captions: Captions, content: Any, record: AttentionRecord, seed: int, indices: Sequence[int]
    ) -> Tensor:
        """Maps (N, Q, T) of what was drawn."""
        ...

    def anchor(self, captions: Captions, seed: int, indices: Sequence[int]) -> Anchor:
        """What phrases say."""
        ...


class GPTLook:
    """A GPT, by a pass over the tokens that were drawn."""

    def __init__(self, model: GPT) -> None:
        config = model.config
        self.model = model
        self.side = math.isqrt(config.num_tokens) if config.positions == "rotary_2d" else None

    def less(self, share: float, options: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, int] | None]:
        """See `Look`: the first tokens; of a raster the first rows, whole ones."""
        drawn = options.get("num_tokens") or self.model.config.num_tokens
        count, grid = max(1, math.ceil(share * drawn)), None
        if self.side is not None and drawn >= self.side:
            rows = min(-(-count // self.side), drawn // self.side)
            count, grid = rows * self.side, (rows, self.side)
        return {"num_tokens": count}, grid

    def maps(
        self, captions: Captions, content: Any, record: AttentionRecord, seed: int, indices: Sequence[int]
    ) -> Tensor:
        """See `Look`: query k is the state that token k was drawn from."""
        model, content = self.model, content.padded()
        reading = model.read(captions).recorded(record)
        slots = None if content.slots is None else content.slots[:, :-1]
        model.hidden(reading, content.ids[:, :-1], slots=slots)
        together = torch.cat([own[0] for own in record.maps.values()], dim=1).mean(dim=1)  # (N, L, T)
        if reading.memory is None:
            together = together[:, model.config.prefix_length - 1 :]
            together = together / together.sum(dim=-1, keepdim=True)
        if self.side is None:
            meant = torch.arange(together.shape[1], device=together.device) < content.lengths[:, None].to(
                together.device
            )
            return together * meant[..., None]
        return together

    def anchor(self, captions: Captions, seed: int, indices: Sequence[int]) -> Anchor:
        """See `Look`: the laws of the first tokens of an image of the phrase, drawn without guidance."""
        model = self.model
        first = min(FIRST, model.config.num_tokens)
        sampling = replace(model.config.sampling, guidance=1.0, decoding="exact")
        drawn = model.generate(captions, seed=seed, indices=indices, sampling=sampling, num_tokens=first).padded()

        def laws(captions: Captions) -> Tensor:
            return model.logits(captions, drawn.ids, drawn.slots)

        return Anchor(laws(captions), lambda tokens: laws(alone(tokens)), divergence)


class XARLook:
    """An xAR, at one time of the flow of all entities."""

    def __init__(self, model: XAR) -> None:
        self.model = model

    def less(self, share: float, options: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[int, int] | None]:
        """See `Look`: all entities, each by fewer steps."""
        sampling = options.get("sampling") or self.model.config.sampling
        steps = tuple(max(1, math.ceil(share * count)) for count in sampling.steps)
        return {"sampling": replace(sampling, steps=steps)}, (self.model.config.grid,) * 2

    def maps(
        self, captions: Captions, content: Any, record: AttentionRecord, seed: int, indices: Sequence[int]
    ) -> Tensor:
        """See `Look`."""
        model = self.model
        tokens = model.entities.cut(content.float())
        noise = randomness.normal(seed, indices, tuple(tokens.shape[1:]), "control").to(tokens)
        times = torch.full((len(tokens), len(model.entities)), LOOK_AT, device=tokens.device)
        x = flow.interpolate(tokens, noise, times[:, model.entity]).to(model.readout.weight.dtype)
        xar_fast.velocity(model, x, times, model.read(captions).recorded(record))
        together = torch.cat([own[0] for own in record.maps.values()], dim=1).mean(dim=1)
        return model.entities.join(together).flatten(2).mT

    def anchor(self, captions: Captions, seed: int, indices: Sequence[int]) -> Anchor:
        """See `Look`: the velocities of the first entity where it begins, in pure noise."""
        model = self.model
        shape = (model.entities.sizes[0], model.config.latent_channels)
        x = randomness.normal(seed, indices, shape, "entity 0").to(model.readout.weight)
        times = torch.ones(len(x), 1, device=x.device)

        def velocities(captions: Captions) -> Tensor:
            return xar_fast.velocity(model, x, times, captions).float()

        return Anchor(velocities(captions), lambda tokens: velocities(alone(tokens)), binding_loss)


def alone(tokens: Tensor) -> Captions:
    """Captions of one column, (N, D)."""
    return Captions(tokens[:, None], torch.ones(len(tokens), 1, dtype=torch.bool, device=tokens.device))
