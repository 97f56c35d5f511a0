"""`imgtok train tokenizer`: trains a tokenizer on images, or the continuous autoencoder that one stands on."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from imgtok import images as pictures
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveFloat, PositiveInt, Range, check
from imgtok.data.images import DataConfig, ImageSource, open_images
from imgtok.data.loaders import Batch, eval_loader, train_loader
from imgtok.data.shapes import ShapesConfig
from imgtok.flextok import FlexTok, FlexTokConfig
from imgtok.hub import find_folder, load
from imgtok.repa import AlignedFlexTok, REPAConfig, Teacher, load_teacher
from imgtok.tokenizer import Losses, Tokenizer, powers_of_two
from imgtok.vae import VAE, VAEConfig, from_diffusers, is_diffusers, packaged_vae
from train.config import TrainingConfig
from train.loop import fit


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a tokenizer (or an autoencoder: model.kind=vae) and writes a run folder with the model in `final/`."""

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
    image_size: PositiveInt | None = None
    """Pixels a side of an autoencoder's training images; a tokenizer has its own in `model`."""
    model: FlexTokConfig | VAEConfig = FlexTokConfig()
    """The model."""
    vae: str | None = None
    """The frozen autoencoder under a tokenizer: a folder or a Hub name, of imgtok's or of a diffusers AutoencoderKL, or
    one that ships with imgtok (`shapes32`)."""
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
        if isinstance(self.model, VAEConfig) and self.image_size is None:
            raise ValueError("image_size: an autoencoder needs the size of its training images")
        if isinstance(self.model, VAEConfig) and self.vae is not None:
            raise ValueError(f"vae: only a tokenizer stands on an autoencoder, given {self.vae!r} with model.kind=vae")
        if not isinstance(self.model, FlexTokConfig) and (self.repa or self.checkpoint_activations):
            raise ValueError("repa and checkpoint_activations are for a tokenizer, model.kind=flextok: leave them out")
        if self.vae_scaling_factor is not None and self.vae is None:
            raise ValueError("vae_scaling_factor: there is no autoencoder to scale, name one with vae=FOLDER")
        if self.repa and isinstance(self.model, FlexTokConfig) and self.repa.tap >= self.model.decoder.depth:
            blocks = self.model.decoder.depth
            raise ValueError(f"repa.tap: {self.repa.tap}, but the decoder's blocks are 0 to {blocks - 1}")
        if isinstance(self.model, FlexTokConfig) and self.image_size is not None:
            raise ValueError("image_size: a tokenizer has its own, set model.image_size instead")
        if isinstance(self.model, FlexTokConfig) and self.model.vae is not None:
            raise ValueError(
                "model.vae: training fills this in from the autoencoder itself, with its trained weights: leave it "
                "out and name the autoencoder, vae=FOLDER or vae=shapes32"
            )


def main(config: Config) -> None:
    """Trains, and leaves a model folder in `out/final`."""
    model, size = build_model(config)
    source = open_images(config.data, size, flip=config.flip, crop=config.crop, held_out_fraction=config.held_out)
    split: Literal["train", "held_out"] = "held_out" if config.held_out else "train"
    shown = open_images(config.data, size, split=split, held_out_fraction=config.held_out)
    job: TokenizerJob
    if isinstance(model, FlexTok) and config.repa is not None:
        job = AlignedJob(config, model, load_teacher(config.repa), source, shown)
    else:
        job = TokenizerJob(config, model, source, shown)
    fit(job, config.training, config.out, config)


def build_model(config: Config) -> tuple[Tokenizer | VAE, int]:
    """A freshly initialised model, and the size of its images; its weights depend on the seed alone."""
    torch.manual_seed(config.training.seed)  # modules initialise themselves from the global generator
    if isinstance(config.model, VAEConfig):
        assert config.image_size is not None
        return VAE(config.model), config.image_size
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
    return model, config.model.image_size


def load_vae(name: str, scaling_factor: float | None = None) -> VAE:
    """An autoencoder by folder, Hub name or the name of a packaged one; `scaling_factor` replaces its own."""
    folder = find_folder(name) if "/" in name or Path(name).is_dir() else packaged_vae(name)
    if is_diffusers(folder):
        return from_diffusers(folder, scaling_factor)
    vae = load(folder, expect=VAE)
    assert isinstance(vae, VAE)
    if scaling_factor is not None:
        vae.config = replace(vae.config, scaling_factor=scaling_factor)
    return vae


class TokenizerJob:
    """What the training loop needs to know about a tokenizer."""

    def __init__(self, config: Config, model: Tokenizer | VAE, source: ImageSource, shown: ImageSource) -> None:
        self.config = config
        self.model: nn.Module = model
        self.source = source
        self.shown = shown

    def batches(self, *, start_step: int, rank: int, world: int) -> Iterator[Batch]:
        training = self.config.training
        return train_loader(
            self.source,
            training.batch_size,
            seed=training.seed,
            start_step=start_step * training.accumulate,
            rank=rank,
            world=world,
            num_workers=training.num_workers,
        )

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Losses:
        losses: Losses = model(batch.images, generator=generator)
        return losses

    def names(self, batch: Batch) -> Sequence[str]:
        return batch.names

    @torch.no_grad()
    def preview(self, model: nn.Module, path: Path) -> None:
        """Held-out images above their reconstructions; for a tokenizer one row a token count."""
        if not self.config.num_preview:
            return
        device = next(model.parameters()).device
        originals = self.shown.batch(range(min(self.config.num_preview, len(self.shown)))).images.to(device)
        if isinstance(model, VAE):
            rows = {"original": originals, "decoded": model.decode(model.encode(originals)).clamp(-1, 1)}
        else:
            assert isinstance(model, Tokenizer)
            tokens = model.encode(originals)
            rows = {"original": originals} | {
                str(count): model.decode(tokens.truncate(count)) for count in powers_of_two(model.num_tokens)
            }
        grid = pictures.grid_with_titles(torch.cat(list(rows.values())), columns=len(originals), row_titles=list(rows))
        pictures.save_png(grid, path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The model folder; an autoencoder first learns the deviation of its latents on held-out images."""
        assert isinstance(model, Tokenizer | VAE)
        if isinstance(model, VAE):
            measure_scaling(model, self.shown, self.config.training.batch_size)
        if self.config.half:
            model = copy.deepcopy(model).half()
        model.save_pretrained(folder)


class AlignedJob(TokenizerJob):
    """A FlexTok that is trained with REPA. The teacher is no part of the model: it is neither trained nor saved."""

    def __init__(
        self, config: Config, model: FlexTok, teacher: Teacher, source: ImageSource, shown: ImageSource
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
            features: Tensor = self.teacher.to(images.device)(images)
        return features

    def preview(self, model: nn.Module, path: Path) -> None:
        assert isinstance(model, AlignedFlexTok)
        super().preview(model.tokenizer, path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The tokenizer alone."""
        assert isinstance(model, AlignedFlexTok)
        super().save(model.tokenizer, folder)


@torch.no_grad()
def measure_scaling(vae: VAE, source: ImageSource, batch_size: int) -> None:
    """Sets `scaling_factor` to one over the deviation of the latents of at most 256 images from all of the source."""
    device = next(vae.parameters()).device
    chosen = range(0, len(source), -(-len(source) // 256))  # not the first: those may all be of one class
    latents = [vae.encode(batch.images.to(device)) for batch in eval_loader(source, batch_size, indices=chosen)]
    deviation = torch.cat(latents).std() / vae.config.scaling_factor
    vae.config = replace(vae.config, scaling_factor=float(1 / deviation))


if __name__ == "__main__":
    run_job(sys.modules[__name__])
