"""`imgtok train generator`: trains a generator on what a frozen tokenizer or autoencoder made of a data set.

Which of the two caches a generator takes, tokens (`imgtok cache`) or latents (`imgtok cache latents`), its class says
by `learns_from`; `imgtok.data.content` makes the two alike.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from imgtok import announce, hub, pictures
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveFloat, Range, check
from imgtok.data.captions import CaptionDataset
from imgtok.data.content import CONTENTS, Content
from imgtok.data.images import DataError
from imgtok.data.latents import LatentBatch
from imgtok.data.overlap import refuse_copies, refuse_shared_rows
from imgtok.data.tokens import TokenBatch
from imgtok.generators.conditioning import ConditionalGenerator
from imgtok.generators.pipeline import ROWS, write_cards
from imgtok.hub import Found
from imgtok.randomness import spread
from imgtok.runs import TRAINED_WHOLE
from imgtok.sections import ByKind, Section, Settings
from imgtok.text import words
from imgtok.tokenizers.base import Losses
from imgtok.train.captions import (
    check_same_encoder,
    condition_facts,
    digest_with,
    open_captions,
    preview_condition,
    preview_titles,
)
from imgtok.train.config import TrainingConfig
from imgtok.train.frozen import freeze
from imgtok.train.initialise import Init, check_kind, configure, find_init, model_in_words, start_from
from imgtok.train.loop import Job, fit
from imgtok.train.lora import add_adapters, check_lora, merged, trained_whole
from imgtok.train.validation import HeldOut, Measure, check_validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a generator on what `imgtok cache` or `imgtok cache latents` wrote; `final/` holds it with its tokenizer,
    ready to sample.
    """

    job: Literal["train-generator"] = "train-generator"
    """Which program this file is for."""
    out: Path
    """Run folder: configuration, log, previews, checkpoints, and the model in `final/`."""
    tokens: Path | None = None
    """Folder of cached tokens, for a generator that learns from tokens."""
    latents: Path | None = None
    """Folder of cached latents, for a generator that learns from latents: of `imgtok cache latents`, or MAR's .npz
    files."""
    tokenizer: str
    """Any name of the tokenizer that made the tokens, or of the autoencoder that made the latents: a folder, a Hub
    name, a file like kl16.ckpt, or one that ships with imgtok (`shapes32`). Copied into `final/tokenizer`."""
    vae_scaling_factor: PositiveFloat | None = None
    """Factor on the autoencoder's latents, as their cache was made with; null takes its own."""
    text: Path | None = None
    """Folder of cached text features of the same images, for a model.condition that reads text."""
    held_out: Annotated[float, Range(0.0, 0.9)] = 0.0
    """Share of the cache's images, from all over it, that is kept from training for training.validate_every."""
    validation: Path | None = None
    """Folder of another cache of the same kind, for training.validate_every; null takes what `held_out` keeps."""
    validation_text: Path | None = None
    """Folder of cached text features of the images in `validation`."""
    made_from: str | None = None
    """Fingerprint of the tokens' (and texts') models and data, filled in at the start: a run goes on only with the
    same."""
    model: Annotated[Section, ByKind(hub.GENERATORS)] | None = None
    """The model. What the data decides is filled in (vocabulary, length, channels, grid, classes, text fields) and may
    be left out; another value is refused. With `init`, null or a field left out is as there."""
    init: str | None = None
    """Any name of a generator whose weights the training starts from; null starts afresh."""
    init_new: tuple[str, ...] = ()
    """Patterns (such as head.*) of the parameters that may start afresh, because `init` lacks them or has another
    shape."""
    init_drop: tuple[str, ...] = ()
    """Patterns of the parameters of `init` that are left out."""
    share_digits: bool = False
    """Hand the tokenizer's FSQ levels, or its bits, to the model, so that ids which share digits share embeddings and
    logits."""
    sampling: Settings = Settings()
    """How previews are drawn: the model's own settings, in place of those in `model.sampling`."""
    decoding: Settings = Settings()
    """How previews are decoded: settings of the tokenizer or autoencoder, in place of its own."""
    num_preview: NonNegativeInt = 64
    """Images in a preview."""
    checkpoint_activations: bool = False
    """Compute blocks again in the backward pass instead of keeping their activations: memory for time."""
    training: TrainingConfig
    """Length, optimiser, precision, logging."""

    def __post_init__(self) -> None:
        check(self)
        check_kind(self.model, self.init)
        check_validation(self.validation, self.training)
        if self.validation is not None and self.held_out:
            raise ValueError(
                f"held_out: {self.held_out} keeps images from training, and validation={self.validation} is what is "
                "looked at: give one of the two"
            )
        if (self.validation_text is not None) != (self.validation is not None and self.text is not None):
            raise ValueError("validation_text: goes with validation and text: give all three, or validation alone")
        check_lora(self.training, self.init)
        kind = None if self.model is None else self.model.kind
        if kind is not None:
            check_inputs(self, hub.model_class(kind))


def check_inputs(config: Config, model_class: type[ConditionalGenerator]) -> None:
    """Raise ValueError for a cache that a generator of this class needs, or has no use for."""
    kind, needed = model_class.config_class.kind, model_class.learns_from
    (other,) = set(CONTENTS) - {needed}
    if getattr(config, needed) is None:
        command = CONTENTS[needed].COMMAND
        raise ValueError(f"{needed}: is required with model.kind={kind}; `{command}` makes such a folder")
    if getattr(config, other) is not None:
        raise ValueError(f"{other}: model.kind={kind} learns from {needed}; leave {other} out")
    if needed == "tokens" and config.vae_scaling_factor is not None:
        raise ValueError("vae_scaling_factor: a tokenizer has its own; only for latents, leave it out")


def main(config: Config) -> None:
    """Trains, and leaves a model folder in `out/final`."""
    init = find_init(config, ConditionalGenerator)
    kind = config.model.kind if config.model is not None else None
    model_class = hub.model_class(kind) if kind is not None else find_class(config, init)
    found = hub.resolve(config.tokenizer).scaled(config.vae_scaling_factor)
    config = replace(config, tokenizer=found.name)  # of a run: the folder that is taken today
    folder: Path = getattr(config, model_class.learns_from)
    content = CONTENTS[model_class.learns_from](folder, found)
    captions = open_captions(config.text, content.cache)
    config = with_fingerprint(config, digest_with(content.digest, captions))
    facts = facts_of(config, content, captions, model_class)
    base = without_names_of_others(init, content)
    config = replace(config, model=configure(config.model, base, facts, f"the data in {folder}"))
    check_text(config.model, config)
    torch.manual_seed(config.training.seed)  # modules initialise themselves from the global generator
    model = model_class(config.model)
    fresh = start_from(model, init, config.init_new, config.init_drop)
    freeze(model, config.training)
    say_of_decoder(init, found)
    if captions is not None:
        model.set_empty_caption(captions.empty)
    if config.checkpoint_activations:
        model.recompute_activations()
    job = GeneratorJob(config, model, content, found, captions)
    if config.training.lora is not None:
        whole = trained_whole(init, fresh, config.out)
        add_adapters(model, config.training.lora, whole)
        job.identity = {**job.identity, TRAINED_WHOLE: whole}
    with_texts = "" if captions is None else f", with the texts of {config.text}"
    announce.begins(
        "train generator",
        data=f"{content.in_words} in {folder}{with_texts}",
        model=model_in_words(config),
        tokenizer=found.in_words,
        out=config.out,
    )
    fit(job, config.training, config.out, config)


def without_names_of_others(init: Init | None, content: Content) -> Init | None:
    """What to start from, without its names of classes where the data have another number of them, and no names."""
    if init is None or content.class_names or init.config.num_classes in (0, content.num_classes):
        return init
    return init._replace(config=init.config.with_condition(classes=()))


def say_of_decoder(init: Init | None, decoder: Found) -> None:
    """Say in the log if the model to start from drew for another tokenizer or autoencoder, where that is known."""
    with contextlib.suppress(OSError, ValueError):
        before = None if init is None or init.weights is None else init.weights.part("tokenizer")
        if before is not None and before.fingerprint() not in (decoder.fingerprint(), *decoder.encodes_as):
            logger.info(
                "init: %s drew for another tokenizer or autoencoder than %s: what it knows of tokens or latents is "
                "learned anew, and the rest is kept", before.path.parent, decoder.name,
            )  # fmt: skip


def find_class(config: Config, init: Init | None) -> type[ConditionalGenerator]:
    """The class of the model to start from."""
    assert init is not None, "Config has checked this"
    model_class: type[ConditionalGenerator] = hub.model_class(init.config.kind)
    check_inputs(config, model_class)
    return model_class


def facts_of(
    config: Config, content: Content, captions: CaptionDataset | None, model_class: type[ConditionalGenerator]
) -> dict[str, Any]:
    """What content and captions decide of the model's configuration."""
    facts = content.facts | condition_facts(content.num_classes, captions, content.class_names)
    fields, kind = model_class.config_class.__dataclass_fields__, model_class.config_class.kind
    for name in sorted(content.needed):
        if name.partition(".")[0] not in fields:
            raise ValueError(
                f"{model_class.learns_from}: they have {name} = {facts[name]!r:.60}, and model.kind={kind} has no such "
                "field: it cannot learn from them"
            )
    levels = getattr(content.decoder, "levels", ())
    given = config.model.given.get("levels") if isinstance(config.model, Section) else None
    if config.share_digits and not (levels and "levels" in fields):
        what = "the tokenizer's ids have no digits" if "levels" in fields else f"model.kind={kind} knows of no digits"
        raise ValueError(f"share_digits: {what}; leave it out")
    return facts | ({"levels": levels} if config.share_digits or given else {})


def check_text(model: Any, config: Config) -> None:
    """Raise ValueError unless there are captions if and only if the model reads them."""
    name = f"model.condition.kind={model.condition.kind}"
    if model.reads_text and config.text is None:
        raise ValueError(f"text: is required with {name}; `imgtok cache text` makes such a folder")
    if config.text is not None and not model.reads_text:
        raise ValueError(f"text: {name} reads no text; set model.condition.kind=cross_attention")


def with_fingerprint(config: Config, made_from: str) -> Config:
    """Fills in `made_from`, which `fit` compares with that of the run in `out`: remade tokens have the same path."""
    if config.made_from not in (None, made_from):
        raise ValueError(
            f"made_from: {config.tokens or config.latents} holds {made_from}, and {config.made_from} is asked for: "
            "made again by another tokenizer or of other data; choose another `out` and leave made_from out"
        )
    return replace(config, made_from=made_from)


class GeneratorJob(Job):
    """What the training loop needs to know about a generator. The decoder is there for previews, and saved with it."""

    def __init__(
        self,
        config: Config,
        model: ConditionalGenerator,
        content: Content,
        decoder: Found,
        captions: CaptionDataset | None = None,
    ) -> None:
        self.config = config
        self.model: nn.Module = model
        self.content = content
        self.decoder = decoder
        self.captions = captions
        self.identity = {"tokenizer": decoder.fingerprint(), "made_from": config.made_from}
        own: Any = model.config
        self.sampling = config.sampling.over(own.sampling, "sampling")
        self.decoding = config.decoding.over(content.decoder.config.decoding, "decoding")
        self.rows: list[int] | None = None  # those that are trained on; None is all
        self.kept: list[int] = []
        if config.held_out:
            self.rows, self.kept = content.divide(config.held_out)

    def batches(self, *, start_step: int, rank: int, world: int) -> Iterator[TokenBatch | LatentBatch]:
        training = self.config.training
        return self.content.batches(
            training.batch_size,
            seed=training.seed,
            start_step=start_step * training.accumulate,
            rank=rank,
            world=world,
            num_workers=training.num_workers,
            captions=self.captions,
            among=self.rows,
        )

    def held_out(self) -> HeldOut:
        config, content = self.config, self.content
        if config.validation is None:
            if self.rows is None:
                raise DataError(
                    "training.validate_every: no images are held out: held_out=0.1 keeps a tenth of the cache's from "
                    f"training, or validation=FOLDER names another cache, of `{content.COMMAND} split=held_out`"
                )
            trained, kept, folder = self.rows, self.kept, config.tokens or config.latents
            held_out = self.rows_of(content, kept, self.captions, f"rows of {folder} that are held out")

            def check(places: Sequence[int]) -> None:
                refuse_copies(content.cache, trained, kept, [kept[place] for place in places])

            return replace(held_out, check=check)
        other = content.beside(config.validation)
        content.check_like(other, "validation")
        refuse_shared_rows(content.cache, other.cache, "validation")
        captions = open_captions(config.validation_text, other.cache)
        if captions is not None and self.captions is not None:
            check_same_encoder(captions.info, self.captions.info)
        return self.rows_of(other, range(len(other.cache)), captions, f"rows of {config.validation}")

    def rows_of(self, content: Content, rows: Sequence[int], captions: CaptionDataset | None, words: str) -> HeldOut:
        """Some rows of a cache, to validate on."""
        return HeldOut(
            len(rows), lambda places, seed: content.rows([rows[place] for place in places], seed, captions), words
        )

    def scores(self, wanted: Sequence[str], held_out: HeldOut, num: int) -> Measure:
        from imgtok.train.scores import DrawnScores  # which brings the networks that judge

        chosen = spread(min(num, held_out.count), held_out.count).tolist()

        def real() -> Iterator[Tensor]:
            for start in range(0, len(chosen), ROWS):
                yield self.decoded(held_out.batch(chosen[start : start + ROWS], 0).content, range(start, num))

        names = self.content.class_names if self.captions is None else ()
        return DrawnScores(wanted, num, self.content.image_size, names, self.drawn, real)

    def loss(self, model: nn.Module, batch: TokenBatch | LatentBatch, generator: torch.Generator) -> Losses:
        losses: Losses = model(batch.content, batch.condition, generator=generator)
        return losses

    def names(self, batch: TokenBatch | LatentBatch) -> Sequence[str]:
        return batch.names

    @torch.no_grad()
    def preview(self, model: nn.Module, path: Path) -> None:
        """Images of the first classes in turn or of the first captions, always from the same seed."""
        if not self.config.num_preview:
            return
        assert isinstance(model, ConditionalGenerator)
        indices = range(self.config.num_preview)
        images, groups = self.drawn(model, indices).clamp(-1, 1), dict[str, list[int]]()
        for index, title in enumerate(preview_titles(len(indices), model.config, self.content.indices, self.captions)):
            groups.setdefault(title, []).append(index)
        pictures.save_png(pictures.labelled_grid([(title, images[own]) for title, own in groups.items()]), path)

    @torch.no_grad()
    def drawn(self, model: nn.Module, indices: range) -> Tensor:
        """Images in about [-1, 1] of the classes in turn or of the first captions; `indices` begin at 0."""
        model = merged(model)
        assert isinstance(model, ConditionalGenerator)
        device = next(model.parameters()).device
        classes = model.config.num_classes
        condition = preview_condition(len(indices), classes, self.content.indices, self.captions, device)
        generate: Any = model.generate
        blocks = []
        for start in range(0, len(indices), ROWS):  # as `pipeline` draws: memory does not grow with their number
            rows = indices[start : start + ROWS]
            drawn = generate(condition[start : start + ROWS], seed=0, indices=rows, sampling=self.sampling)
            blocks.append(self.decoded(drawn, rows))
        return torch.cat(blocks)

    @torch.no_grad()
    def decoded(self, drawn: Any, indices: range) -> Tensor:
        """The decoder's images of tokens or latents, whose noise goes by the `indices`, of which there may be more."""
        device = next(self.model.parameters()).device
        drawn, decoder = drawn.to(device), self.content.decoder.to(device)
        blocks = [
            decoder.decode(drawn[start : start + ROWS], seed=0, indices=rows, decoding=self.decoding)
            for start in range(0, len(drawn), ROWS)
            for rows in [indices[start : min(start + ROWS, len(drawn))]]
        ]
        return torch.cat(blocks)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The model folder, with the decoder inside: all that sampling needs."""
        model = merged(model)
        assert isinstance(model, ConditionalGenerator)
        write_cards(folder, str(self.config.out / "final"), model.config, self.content.decoder.config)
        model.save_pretrained(folder)
        if self.decoder.layout == hub.OURS and self.config.vae_scaling_factor is None:
            own = shutil.ignore_patterns("README.md")  # which tells of the place that it is copied from
            shutil.copytree(self.decoder.path, folder / "tokenizer", ignore=own, dirs_exist_ok=True)
        else:
            self.content.decoder.save_pretrained(folder / "tokenizer")
        if self.captions is not None and words.is_words(encoder := Path(self.captions.info.encoder).expanduser()):
            words.copy(encoder, folder / words.NAME)


if __name__ == "__main__":
    run_job(sys.modules[__name__])
