"""`imgtok train tokenizer`: trains a tokenizer on images."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from imgtok import pictures
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveFloat, Range, check
from imgtok.data.images import DataConfig, ImageSource
from imgtok.data.loaders import Batch
from imgtok.losses.repa import AlignedFlexTok, REPAConfig, load_teacher, teacher_features
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.base import Losses, Tokenizer, powers_of_two
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig
from imgtok.tokenizers.vae import load_vae
from imgtok.train.config import TrainingConfig
from imgtok.train.image_job import ImageJob, open_split
from imgtok.train.loop import fit
from imgtok.vision.dino import DINOv2


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a tokenizer and writes a run folder with the model in `final/`."""

    job: Literal["train-tokenizer"] = "train-tokenizer"
    """Which program this file is for."""
    out: Path
    """Run folder: configuration, log, previews, checkpoints, and the model in `final/`."""
    data: DataConfig = ShapesConfig()
    """Images to train on."""
    flip: bool = False
    """Mirror each training image with probability one half; not for shapes."""
    crop: Literal["center", "random"] = "center"
    """Which square of a training image is used; the held-out images and shapes are always cropped in the centre."""
    held_out: Annotated[float, Range(0.0, 0.9)] = 0.1
    """Share of the images that is kept from training and shown in previews; 0 shows training images."""
    model: FlexTokConfig = FlexTokConfig()
    """The model."""
    vae: str | None = None
    """The frozen autoencoder under a tokenizer: a folder or a Hub name, of imgtok's or of a diffusers AutoencoderKL, a
    file in the layout of `kl16.ckpt`, or one that ships with imgtok (`shapes32`)."""
    vae_scaling_factor: PositiveFloat | None = None
    """Factor on the autoencoder's latents; null takes its own."""
    repa: REPAConfig | None = None
    """Alignment of the decoder with a frozen image encoder while training, such as repa={}; null is none."""
    checkpoint_activations: bool = False
    """Compute the trunks' activations again in the backward pass instead of keeping them: memory for time."""
    num_preview: NonNegativeInt = 12
    """Held-out images shown in a preview."""
    half: bool = False
    """Save the finished weights in float16: half the size; they are read back as float32."""
    training: TrainingConfig
    """Length, optimiser, precision, logging."""

    def __post_init__(self) -> None:
        check(self)
        if self.vae_scaling_factor is not None and self.vae is None:
            raise ValueError("vae_scaling_factor: there is no autoencoder to scale, name one with vae=FOLDER")
        if self.repa and self.repa.tap >= self.model.decoder.depth:
            blocks = self.model.decoder.depth
            raise ValueError(f"repa.tap: {self.repa.tap}, but the decoder's blocks are 0 to {blocks - 1}")
        if self.model.vae is not None:
            raise ValueError(
                "model.vae: training fills this in from the autoencoder itself, with its trained weights: leave it "
                "out and name the autoencoder, vae=FOLDER or vae=shapes32"
            )


def main(config: Config) -> None:
    """Trains, and leaves a model folder in `out/final`."""
    model = build_model(config)
    size = model.image_size
    source, shown = open_split(config.data, size, flip=config.flip, crop=config.crop, held_out=config.held_out)
    job: TokenizerJob
    if isinstance(model, FlexTok) and config.repa is not None:
        job = AlignedJob(config, model, load_teacher(config.repa), source, shown)
    else:
        job = TokenizerJob(config, model, source, shown)
    fit(job, config.training, config.out, config)


def build_model(config: Config) -> Tokenizer:
    """A freshly initialised model; its weights depend on the seed alone."""
    torch.manual_seed(config.training.seed)  # modules initialise themselves from the global generator
    if config.vae is None:
        model = FlexTok(config.model)
    else:
        vae = load_vae(config.vae, config.vae_scaling_factor)
        torch.manual_seed(config.training.seed)
        model = FlexTok(replace(config.model, vae=vae.config))
        assert model.vae is not None
        model.vae.load_state_dict(vae.state_dict())
    if config.checkpoint_activations:
        model.recompute_activations()
    return model


class TokenizerJob(ImageJob):
    """What the training loop needs to know about a tokenizer."""

    def __init__(self, config: Config, model: Tokenizer, source: ImageSource, shown: ImageSource) -> None:
        super().__init__(source, shown, config.training)
        self.config = config
        self.model: nn.Module = model

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Losses:
        losses: Losses = model(batch.images, generator=generator)
        return losses

    @torch.no_grad()
    def preview(self, model: nn.Module, path: Path) -> None:
        """Held-out images above their reconstructions, one row a token count."""
        if not self.config.num_preview:
            return
        assert isinstance(model, Tokenizer)
        device = next(model.parameters()).device
        originals = self.shown.batch(range(min(self.config.num_preview, len(self.shown)))).images.to(device)
        tokens = model.encode(originals)
        rows = {"original": originals} | {
            str(count): model.decode(tokens.truncate(count)) for count in powers_of_two(model.num_tokens)
        }
        grid = pictures.grid_with_titles(torch.cat(list(rows.values())), columns=len(originals), row_titles=list(rows))
        pictures.save_png(grid, path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The model folder."""
        assert isinstance(model, Tokenizer)
        if self.config.half:
            model = copy.deepcopy(model).half()
        model.save_pretrained(folder)


class AlignedJob(TokenizerJob):
    """A FlexTok that is trained with REPA. The teacher is no part of the model: it is neither trained nor saved."""

    def __init__(
        self, config: Config, model: FlexTok, teacher: DINOv2, source: ImageSource, shown: ImageSource
    ) -> None:
        assert config.repa is not None
        super().__init__(config, model, source, shown)
        self.teacher = teacher
        self.model = AlignedFlexTok(model, config.repa, teacher.width)

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Losses:
        losses: Losses = model(batch.images, self.targets(batch.images), generator=generator)
        return losses

    def targets(self, images: Tensor) -> Tensor:
        """The teacher's features of the images, in the run's precision."""
        precision = self.config.training.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        with torch.autocast(images.device.type, dtype=dtype, enabled=precision != "fp32"):
            return teacher_features(self.teacher.to(images.device), images)

    def preview(self, model: nn.Module, path: Path) -> None:
        assert isinstance(model, AlignedFlexTok)
        super().preview(model.tokenizer, path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The tokenizer alone."""
        assert isinstance(model, AlignedFlexTok)
        super().save(model.tokenizer, folder)


if __name__ == "__main__":
    run_job(sys.modules[__name__])
