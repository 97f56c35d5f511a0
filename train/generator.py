"""`imgtok train generator`: trains a generator on the cached tokens or latents of a frozen tokenizer.

A GPT learns from the ids that `imgtok cache` wrote, an xAR (`train/latent_generator.py` has its job) from the latents
of an autoencoder that `imgtok cache latents` wrote.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from imgtok import pictures
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveFloat, check
from imgtok.data.captions import CaptionDataset
from imgtok.data.latents import open_latents
from imgtok.data.loaders import TokenBatch, token_loader
from imgtok.data.tokens import TokenDataset, fingerprint
from imgtok.generators.gpt import GPT, GPTConfig, SamplingConfig
from imgtok.generators.xar import XAR, XARConfig
from imgtok.hub import find_folder, load
from imgtok.tokenizers.base import Losses, Tokenizer
from imgtok.tokenizers.vae import load_vae
from imgtok.train.captions import digest_with, open_captions, preview_condition, with_condition_fields
from imgtok.train.config import TrainingConfig
from imgtok.train.latent_generator import LatentGeneratorJob
from imgtok.train.loop import Job, fit


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
    """Folder of cached tokens, for model.kind=gpt."""
    latents: Path | None = None
    """Folder of cached latents, for model.kind=xar: of `imgtok cache latents`, or MAR's .npz files."""
    tokenizer: str
    """Model folder or Hub name of the tokenizer that made the tokens; for latents the autoencoder, also as a file like
    kl16.ckpt or one that ships with imgtok (`shapes32`). Copied into `final/tokenizer`."""
    vae_scaling_factor: PositiveFloat | None = None
    """Factor on the autoencoder's latents, as their cache was made with; null takes its own. For model.kind=xar."""
    text: Path | None = None
    """Folder of cached text features of the same images, for a model.condition that reads text."""
    made_from: str | None = None
    """Fingerprint of the tokens' (and texts') models and data, filled in at the start: a run goes on only with the
    same."""
    model: GPTConfig | XARConfig = GPTConfig()
    """The model. What the data decides is filled in: vocabulary, length and classes from the tokens, text fields from
    `text`; channels and classes from the latents."""
    share_digits: bool = False
    """Hand the tokenizer's FSQ levels to the model, so that ids which share digits share embeddings and logits."""
    sampling: SamplingConfig = SamplingConfig()
    """How previews of a GPT are drawn; an xAR's are as `model.sampling` says."""
    num_preview: NonNegativeInt = 64
    """Images in a preview."""
    checkpoint_activations: bool = False
    """Compute an xAR's blocks again in the backward pass instead of keeping their activations: memory for time."""
    training: TrainingConfig
    """Length, optimiser, precision, logging."""

    def __post_init__(self) -> None:
        check(self)
        needed, other = ("latents", "tokens") if isinstance(self.model, XARConfig) else ("tokens", "latents")
        if getattr(self, needed) is None:
            what = "imgtok cache latents" if needed == "latents" else "imgtok cache"
            raise ValueError(f"{needed}: is required with model.kind={self.model.kind}; `{what}` makes such a folder")
        if getattr(self, other) is not None:
            raise ValueError(f"{other}: model.kind={self.model.kind} learns from {needed}; leave {other} out")
        if self.checkpoint_activations and not isinstance(self.model, XARConfig):
            raise ValueError("checkpoint_activations: only for model.kind=xar; leave it out")
        if self.vae_scaling_factor is not None and not isinstance(self.model, XARConfig):
            raise ValueError("vae_scaling_factor: only for model.kind=xar; a tokenizer has its own, leave it out")
        if isinstance(self.model, XARConfig) and self.share_digits:
            raise ValueError("share_digits: only for model.kind=gpt, latents have no digits; leave it out")
        if self.model.reads_text and self.text is None:
            raise ValueError(
                f"text: is required with model.condition.kind={self.model.condition.kind}; `imgtok cache text` makes "
                "such a folder"
            )
        if self.text is not None and not self.model.reads_text:
            raise ValueError(
                f"text: model.condition.kind={self.model.condition.kind} reads no text; set "
                "model.condition.kind=cross_attention"
            )


def main(config: Config) -> None:
    """Trains, and leaves a model folder in `out/final`."""
    if isinstance(config.model, XARConfig):
        train_on_latents(config, config.model)
    else:
        train_on_tokens(config, config.model)


def train_on_latents(config: Config, model_config: XARConfig) -> None:
    """An xAR."""
    assert config.latents is not None, "Config has checked this"
    vae = load_vae(config.tokenizer, config.vae_scaling_factor)
    latents = open_latents(config.latents, vae)
    if model_config.grid != latents.grid:
        raise ValueError(
            f"model.grid: {model_config.grid}, but {config.latents} holds latents of {latents.grid} x {latents.grid}: "
            f"set model.grid={latents.grid}, and entities that tile it"
        )
    captions = open_captions(config.text, latents)
    config = with_fingerprint(config, digest_with(latents.digest, captions))
    model_config = with_condition_fields(model_config, latents, captions)
    model_config = replace(model_config, latent_channels=latents.latent_channels)
    torch.manual_seed(config.training.seed)  # modules initialise themselves from the global generator
    model = XAR(model_config)
    if captions is not None:
        model.set_empty_caption(captions.empty)
    if config.checkpoint_activations:
        model.recompute_activations()
    job = LatentGeneratorJob(model, latents, vae, config.training, config.num_preview, captions)
    fit(job, config.training, config.out, config)


def train_on_tokens(config: Config, model_config: GPTConfig) -> None:
    """A GPT."""
    assert config.tokens is not None, "Config has checked this"
    folder = find_folder(config.tokenizer)
    tokenizer = load(folder, expect=Tokenizer)
    tokens = TokenDataset(config.tokens, expect_fingerprint=fingerprint(folder))
    captions = open_captions(config.text, tokens)
    config = with_fingerprint(config, digest_with(tokens.info.digest, captions))
    torch.manual_seed(config.training.seed)  # modules initialise themselves from the global generator
    model = GPT(filled_in(config, model_config, tokens, tokenizer, captions))
    if captions is not None:
        model.set_empty_caption(captions.empty)
    fit(GeneratorJob(config, model, tokens, tokenizer, folder, captions), config.training, config.out, config)


def filled_in(
    config: Config, model: GPTConfig, tokens: TokenDataset, tokenizer: Tokenizer, captions: CaptionDataset | None
) -> GPTConfig:
    """The model with what the data decides filled in."""
    return replace(
        with_condition_fields(model, tokens, captions),
        vocab_size=tokenizer.vocab_size,
        num_tokens=tokens.info.num_tokens,
        levels=tokenizer.levels if config.share_digits else (),
    )


def with_fingerprint(config: Config, made_from: str) -> Config:
    """Fills in `made_from`, which `fit` compares with that of the run in `out`: remade tokens have the same path."""
    if config.made_from not in (None, made_from):
        raise ValueError(
            f"made_from: {config.tokens or config.latents} holds {made_from}, and {config.made_from} is asked for: "
            "made again by another tokenizer or of other data; choose another `out` and leave made_from out"
        )
    return replace(config, made_from=made_from)


class GeneratorJob(Job):
    """What the training loop needs to know about a generator."""

    def __init__(
        self,
        config: Config,
        model: GPT,
        tokens: TokenDataset,
        tokenizer: Tokenizer,
        tokenizer_folder: Path,
        captions: CaptionDataset | None = None,
    ) -> None:
        self.config = config
        self.model: nn.Module = model
        self.tokens = tokens
        self.tokenizer = tokenizer
        self.tokenizer_folder = tokenizer_folder
        self.captions = captions

    def batches(self, *, start_step: int, rank: int, world: int) -> Iterator[TokenBatch]:
        training = self.config.training
        return token_loader(
            self.tokens,
            training.batch_size,
            seed=training.seed,
            start_step=start_step * training.accumulate,
            rank=rank,
            world=world,
            captions=self.captions,
        )

    def loss(self, model: nn.Module, batch: TokenBatch, generator: torch.Generator) -> Losses:
        losses: Losses = model(batch.content, batch.condition, generator=generator)
        return losses

    def names(self, batch: TokenBatch) -> Sequence[str]:
        return batch.names

    @torch.no_grad()
    def preview(self, model: nn.Module, path: Path) -> None:
        """Images of the first classes in turn or of the first captions, always from the same seed."""
        if not self.config.num_preview:
            return
        assert isinstance(model, GPT)
        device = model.head.weight.device
        indices = range(self.config.num_preview)
        classes, images = model.config.num_classes, self.tokens.indices
        condition = preview_condition(len(indices), classes, images, self.captions, device)
        tokens = model.generate(condition, seed=0, indices=indices, sampling=self.config.sampling)
        self.tokenizer.to(device)
        drawn: Tensor = self.tokenizer.decode(tokens, seed=0, indices=indices)
        pictures.save_png(pictures.make_grid(drawn, columns=8), path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The model folder, with the tokenizer inside: all that sampling needs."""
        assert isinstance(model, GPT)
        model.save_pretrained(folder)
        shutil.copytree(self.tokenizer_folder, folder / "tokenizer", dirs_exist_ok=True)


if __name__ == "__main__":
    run_job(sys.modules[__name__])
