"""`imgtok train autoencoder`: trains the continuous autoencoder that tokenizers and generators of latents stand on.

What the loop trains is `Judged`, the autoencoder and the losses of its reconstructions in one module
(imgtok/losses/reconstruction.py), unless the autoencoder brings a module of its own (`for_training`). One forward pass
gives the sum of both players' losses, each of which reaches one player's weights only, so the loop keeps its one
backward pass, one AdamW and one checkpoint. The discriminator is a group of parameters of its own: its gradient is
clipped by its own norm, and its weights are not averaged. It learns from the first step, at 2 % of the large
autoencoder's arithmetic, and the autoencoder listens to it from `loss.adversarial_start` on. Only the autoencoder gets
into `final/`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from imgtok import announce, hub, pictures
from imgtok.cli import run_job
from imgtok.config import REMEDY, NonNegativeInt, Range, check
from imgtok.data.images import HOW_TO_NAME, DataConfig, ImageSource, open_split
from imgtok.losses.reconstruction import PerceptualNetwork, ReconstructionLossConfig
from imgtok.runs import ENCODES_AS
from imgtok.sections import ByKind, Section
from imgtok.sizes import SquareSize
from imgtok.tokenizers.base import Autoencoder
from imgtok.train.config import TrainingConfig
from imgtok.train.frozen import check_decoder_only, encodes_as, freeze, train_decoder_only
from imgtok.train.image_job import ImageJob, held_out_images, to_train
from imgtok.train.initialise import check_kind, configure, find_init, model_in_words, start_from
from imgtok.train.loop import fit
from imgtok.train.lora import refuse_lora
from imgtok.train.validation import HeldOut, Measure, check_validation


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a continuous autoencoder and writes a run folder with the model in `final/`."""

    job: Literal["train-autoencoder"] = "train-autoencoder"
    """Which program this file is for."""
    out: Path
    """Run folder: configuration, log, previews, checkpoints, and the model in `final/`."""
    data: DataConfig = field(metadata={REMEDY: HOW_TO_NAME})
    """Images to train on."""
    flip: bool = False
    """Mirror each training image with probability one half; not for shapes."""
    crop: Literal["center", "random"] = "center"
    """Which square of a training image is used; the held-out images and shapes are always cropped in the centre."""
    held_out: Annotated[float, Range(0.0, 0.9)] = 0.1
    """Share of the images that is kept from training and shown in previews; 0 shows training images."""
    validation: DataConfig | None = None
    """Images for training.validate_every, such as data of another folder; null takes the held-out images. Of built-in
    shapes those are taken that no training sees."""
    image_size: SquareSize
    """Pixels a side of the training images; the finished model takes any multiple of its `factor`."""
    model: Annotated[Section, ByKind(hub.AUTOENCODERS)] | None = None
    """The autoencoder. With `init`, null or a field left out is as there."""
    init: str | None = None
    """Any name of an autoencoder whose weights the training starts from; null starts afresh."""
    init_new: tuple[str, ...] = ()
    """Patterns of the parameters that may start afresh, because `init` lacks them or has another shape."""
    init_drop: tuple[str, ...] = ()
    """Patterns of the parameters of `init` that are left out."""
    decoder_only: bool = False
    """Train nothing but what decodes: with `init`, every image keeps its latents to the bit, and caches of them stay
    valid."""
    loss: ReconstructionLossConfig = ReconstructionLossConfig()
    """What its reconstructions are judged by; the model's own loss (a KL divergence) is added."""
    num_preview: NonNegativeInt = 12
    """Held-out images shown in a preview, from all over them."""
    half: bool = False
    """Save the finished weights in float16: half the size; they are read back as float32."""
    training: TrainingConfig
    """Length, optimiser, precision, logging."""

    def __post_init__(self) -> None:
        check(self)
        check_kind(self.model, self.init)
        check_validation(self.validation, self.training)
        check_decoder_only(self)
        refuse_lora(self.training)
        self.loss.check_size(self.image_size)
        if self.init is None:
            check_factor(self, configure(self.model, None))


def check_factor(config: Config, model: Any) -> None:
    """Raise ValueError for images that do not divide into cells of the latents."""
    if config.image_size % model.factor:
        raise ValueError(
            f"image_size: {config.image_size} is not a multiple of {model.factor}, the pixels a side of one cell of "
            "the latents"
        )


def main(config: Config) -> None:
    """Trains, and leaves a model folder in `out/final`."""
    # first: what a missing file has to say should not wait for the data
    perceptual = config.loss.load_perceptual(config.image_size)
    model, trained = build_model(config)
    config = replace(config, model=model.config)
    size = config.image_size
    source, shown, images = open_split(config.data, size, flip=config.flip, crop=config.crop, held_out=config.held_out)
    job = AutoencoderJob(config, model, trained, perceptual, source, shown)
    if config.decoder_only:
        job.identity[ENCODES_AS] = encodes_as(find_init(config, Autoencoder), config.out)
    announce.begins("train autoencoder", data=images, model=model_in_words(config), out=config.out)
    fit(job, config.training, config.out, config)


def build_model(config: Config) -> tuple[Autoencoder, nn.Module]:
    """An autoencoder with the weights of `init` or fresh ones, and what is trained: it and its losses, which depend on
    the seed alone.
    """
    init = find_init(config, Autoencoder)
    model_config = configure(config.model, init)
    check_factor(config, model_config)
    torch.manual_seed(config.training.seed)  # modules initialise themselves from the global generator
    model: Autoencoder = hub.model_class(model_config.kind)(model_config)
    trained = to_train(model, config.loss, config.training.accumulate)
    fresh = start_from(model, init, config.init_new, config.init_drop)
    if config.decoder_only:
        train_decoder_only(model, init, fresh)
    freeze(model, config.training, config.loss)
    return model, trained


class AutoencoderJob(ImageJob):
    """What the training loop needs to know about an autoencoder."""

    def __init__(
        self,
        config: Config,
        model: Autoencoder,
        trained: nn.Module,
        perceptual: PerceptualNetwork | None,
        source: ImageSource,
        shown: ImageSource,
    ) -> None:
        super().__init__(trained, source, shown, config.training, judges=True, perceptual=perceptual)
        self.config = config
        self.autoencoder = model

    def held_out(self) -> HeldOut:
        return held_out_images(self.source, self.shown, self.config)

    def scores(self, wanted: Sequence[str], held_out: HeldOut, num: int) -> Measure:
        return self.measure(self.autoencoder, wanted, held_out, num)

    @torch.no_grad()
    def preview(self, model: nn.Module, path: Path) -> None:
        """Held-out images above their reconstructions."""
        if not self.config.num_preview:
            return
        device = next(model.parameters()).device
        originals = self.preview_images(self.config.num_preview).to(device)
        decoded = self.autoencoder.reconstruct(originals)
        rows = {"original": originals, "decoded": decoded}
        grid = pictures.grid_with_titles(torch.cat(list(rows.values())), columns=len(originals), row_titles=list(rows))
        pictures.save_png(grid, path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The autoencoder's folder, after what is measured at the end was measured on held-out images."""
        autoencoder = self.autoencoder
        if not self.config.decoder_only:
            self.calibrate(autoencoder)
        if self.config.half:
            autoencoder = copy.deepcopy(autoencoder).half()
        autoencoder.save_pretrained(folder, repo_id=str(self.config.out / "final"))


if __name__ == "__main__":
    run_job(sys.modules[__name__])
