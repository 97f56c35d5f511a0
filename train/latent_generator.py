"""What the training loop needs to know about a generator of continuous latents: `imgtok train generator` with xAR."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from imgtok import pictures
from imgtok.data.captions import CaptionDataset
from imgtok.data.latents import LatentBatch, Latents
from imgtok.data.loaders import latent_loader
from imgtok.generators.xar import XAR
from imgtok.tokenizers.base import Losses
from imgtok.tokenizers.vae import VAE
from imgtok.train.captions import preview_condition
from imgtok.train.config import TrainingConfig
from imgtok.train.loop import Job


class LatentGeneratorJob(Job):
    """An xAR on cached latents; the autoencoder is there for previews, and saved beside the model."""

    def __init__(
        self,
        model: XAR,
        latents: Latents,
        vae: VAE,
        training: TrainingConfig,
        num_preview: int,
        captions: CaptionDataset | None = None,
    ) -> None:
        self.model: nn.Module = model
        self.latents = latents
        self.vae = vae
        self.training = training
        self.num_preview = num_preview
        self.captions = captions

    def batches(self, *, start_step: int, rank: int, world: int) -> Iterator[LatentBatch]:
        return latent_loader(
            self.latents,
            self.training.batch_size,
            seed=self.training.seed,
            start_step=start_step * self.training.accumulate,
            rank=rank,
            world=world,
            num_workers=self.training.num_workers,
            captions=self.captions,
        )

    def loss(self, model: nn.Module, batch: LatentBatch, generator: torch.Generator) -> Losses:
        condition = batch.labels if batch.captions is None else batch.captions
        losses: Losses = model(batch.latents, condition, generator=generator)
        return losses

    def names(self, batch: LatentBatch) -> Sequence[str]:
        return batch.names

    @torch.no_grad()
    def preview(self, model: nn.Module, path: Path) -> None:
        """Images of the first classes in turn or of the first captions, always from the same seed."""
        if not self.num_preview:
            return
        assert isinstance(model, XAR)
        device = model.readout.weight.device
        indices = range(self.num_preview)
        classes, sources = model.config.num_classes, self.latents.indices
        condition = preview_condition(len(indices), classes, sources, self.captions, device)
        latents = model.generate(condition, seed=0, indices=indices)
        images = self.vae.to(device).decode(latents).clamp(-1, 1)
        pictures.save_png(pictures.make_grid(images, columns=8), path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The model folder, with the autoencoder inside: all that sampling needs."""
        assert isinstance(model, XAR)
        model.save_pretrained(folder)
        self.vae.save_pretrained(folder / "tokenizer")
