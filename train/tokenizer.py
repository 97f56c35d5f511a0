"""`imgtok train tokenizer`: trains a tokenizer on images."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from imgtok import announce, hub, pictures
from imgtok.cli import run_job
from imgtok.config import REMEDY, NonNegativeInt, PositiveFloat, Range, check
from imgtok.data.images import HOW_TO_NAME, DataConfig, ImageSource, open_split
from imgtok.data.loaders import Batch
from imgtok.losses.reconstruction import PerceptualNetwork, ReconstructionLossConfig
from imgtok.losses.repa import Aligned, REPAConfig, Teacher, load_teacher
from imgtok.runs import ENCODES_AS
from imgtok.sections import ByKind, Section
from imgtok.sizes import sides
from imgtok.tokenizers.base import Autoencoder, Losses, Tokenizer
from imgtok.train.config import TrainingConfig
from imgtok.train.frozen import check_decoder_only, encodes_as, freeze, train_decoder_only
from imgtok.train.image_job import ImageJob, held_out_images, to_train
from imgtok.train.initialise import check_kind, configure, find_init, model_in_words, start_from
from imgtok.train.loop import fit
from imgtok.train.lora import refuse_lora
from imgtok.train.validation import HeldOut, Measure, check_validation


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a tokenizer and writes a run folder with the model in `final/`."""

    job: Literal["train-tokenizer"] = "train-tokenizer"
    """Which program this file is for."""
    out: Path
    """Run folder: configuration, log, previews, checkpoints, and the model in `final/`."""
    data: DataConfig = field(metadata={REMEDY: HOW_TO_NAME})
    """Images to train on."""
    flip: bool = False
    """Mirror each training image with probability one half; not for shapes."""
    crop: Literal["center", "random"] = "center"
    """Which part of a training image is used; the held-out images and shapes are always cropped in the centre."""
    held_out: Annotated[float, Range(0.0, 0.9)] = 0.1
    """Share of the images that is kept from training and shown in previews; 0 shows training images."""
    validation: DataConfig | None = None
    """Images for training.validate_every, such as data of another folder; null takes the held-out images. Of built-in
    shapes those are taken that no training sees."""
    model: Annotated[Section, ByKind(hub.TOKENIZERS)] | None = None
    """The model. With `init`, null or a field left out is as there."""
    init: str | None = None
    """Any name of a tokenizer whose weights the training starts from; null starts afresh."""
    init_new: tuple[str, ...] = ()
    """Patterns of the parameters that may start afresh, because `init` lacks them or has another shape."""
    init_drop: tuple[str, ...] = ()
    """Patterns of the parameters of `init` that are left out."""
    decoder_only: bool = False
    """Train nothing but what decodes: with `init`, every image keeps its tokens to the bit, and caches of them stay
    valid."""
    vae: str | None = None
    """The autoencoder under the tokenizer, by any name: a folder or a Hub name, of imgtok's or of a diffusers
    AutoencoderKL, a published file (`kl16.ckpt`, `vqgan.ckpt`), or one that ships with imgtok (`shapes32`). It stays as
    it is, unless the model says that it is trained too."""
    vae_scaling_factor: PositiveFloat | None = None
    """Factor on the autoencoder's latents; null takes its own."""
    loss: ReconstructionLossConfig | None = None
    """What reconstructions are judged by, for tokenizers that decode images while they are trained; null is the plain
    distances. Others have losses of their own alone."""
    repa: REPAConfig | None = None
    """Alignment of one of the tokenizer's blocks with a frozen image encoder while training, such as repa={}; null is
    none."""
    checkpoint_activations: bool = False
    """Compute blocks again in the backward pass instead of keeping their activations: memory for time."""
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
        if self.vae_scaling_factor is not None and self.vae is None:
            raise ValueError("vae_scaling_factor: there is no autoencoder to scale, name one with vae=FOLDER")
        if self.init is None and self.vae is None:
            check_autoencoder(configure(self.model, None))


def check_autoencoder(model: Any) -> None:
    """Raise ValueError for an autoencoder that the configuration describes, and whose weights nothing names."""
    field = hub.model_class(model.kind).stands_on
    if field is not None and getattr(model, field) is not None:
        raise ValueError(
            f"model.{field}: training fills this in from the autoencoder itself, with its trained weights: leave it "
            "out and name the autoencoder, vae=FOLDER or vae=shapes32"
        )


def main(config: Config) -> None:
    """Trains, and leaves a model folder in `out/final`."""
    model, trained = build_model(config)
    config = replace(config, model=model.config)
    size = model.image_size
    perceptual = None
    if trained is not model:
        loss = config.loss or ReconstructionLossConfig()
        smallest = min(sides(size))
        loss.check_size(smallest)
        perceptual = loss.load_perceptual(smallest)
    teacher = load_teacher(config.repa) if config.repa is not None else None  # before the data: it may be missing
    source, shown, images = open_split(config.data, size, flip=config.flip, crop=config.crop, held_out=config.held_out)
    job: TokenizerJob
    if teacher is not None:
        job = AlignedJob(config, model, teacher, source, shown)
    else:
        job = TokenizerJob(config, model, trained, source, shown, perceptual)
    if config.vae is not None:
        found = hub.resolve(config.vae, expect=Autoencoder).scaled(config.vae_scaling_factor)
        job.identity["vae"] = found.fingerprint()
    if config.decoder_only:
        job.identity[ENCODES_AS] = encodes_as(find_init(config, Tokenizer), config.out)
    announce.begins("train tokenizer", data=images, model=model_in_words(config), out=config.out)
    fit(job, config.training, config.out, config)


def build_model(config: Config) -> tuple[Tokenizer, nn.Module]:
    """The model with the weights of `init` or fresh ones, which depend on the seed alone, and with its autoencoder; and
    what is trained, the model itself or something around it.
    """
    init = find_init(config, Tokenizer)
    kind = config.model.kind if config.model is not None else None
    model_class: type[Tokenizer] = hub.model_class(kind or (init.config.kind if init else ""))
    autoencoder = find_autoencoder(config, model_class)
    facts, holder = {}, f"the autoencoder {config.vae}"
    if autoencoder is not None:
        facts = {str(model_class.stands_on): autoencoder.config}
    elif init is not None and hasattr(init.config, str(model_class.stands_on)):
        facts = {str(model_class.stands_on): getattr(init.config, str(model_class.stands_on))}
        holder = f"the model {config.init}, whose frozen autoencoder is kept unless vae=MODEL names another,"
    model_config = configure(config.model, init, facts, holder)
    torch.manual_seed(config.training.seed)  # modules initialise themselves from the global generator
    model = model_class(model_config)
    if config.vae_scaling_factor is not None and not model.scales_latents:
        raise ValueError(
            f"vae_scaling_factor: a {model_class.__name__} on {config.vae} takes its codes as they are; leave it out"
        )
    fresh = start_from(model, init, config.init_new, config.init_drop)
    if config.decoder_only:
        train_decoder_only(model, init, fresh)
    freeze(model, config.training, config.loss)
    if autoencoder is not None:
        getattr(model, str(model_class.stands_on)).load_state_dict(autoencoder.state_dict())
    if config.checkpoint_activations:
        model.recompute_activations()
    trained = to_train(model, config.loss, config.training.accumulate)
    if config.repa is not None and trained is not model:
        raise ValueError(f"repa: a {model_class.__name__} is trained by its reconstructions; leave repa out")
    return model, trained


def find_autoencoder(config: Config, model_class: type[Tokenizer]) -> Autoencoder | None:
    """The autoencoder that `vae` names. Raises ValueError if the tokenizer has no place for one."""
    if config.vae is None:
        return None
    if model_class.stands_on is None:
        raise ValueError(f"vae: a {model_class.__name__} stands on no autoencoder; leave vae out")
    found = hub.resolve(config.vae, expect=Autoencoder)
    autoencoder: Autoencoder = hub.load(found.scaled(config.vae_scaling_factor))
    return autoencoder


class TokenizerJob(ImageJob):
    """What the training loop needs to know about a tokenizer."""

    def __init__(
        self,
        config: Config,
        model: Tokenizer,
        trained: nn.Module,
        source: ImageSource,
        shown: ImageSource,
        perceptual: PerceptualNetwork | None = None,
    ) -> None:
        """`trained` is the tokenizer, or something around it."""
        judges = trained is not model
        super().__init__(trained, source, shown, config.training, judges=judges, perceptual=perceptual)
        self.config = config
        self.tokenizer = model

    def held_out(self) -> HeldOut:
        return held_out_images(self.source, self.shown, self.config)

    def scores(self, wanted: Sequence[str], held_out: HeldOut, num: int) -> Measure:
        return self.measure(self.tokenizer, wanted, held_out, num)

    @torch.no_grad()
    def preview(self, model: nn.Module, path: Path) -> None:
        """Held-out images above their reconstructions, one row a rate."""
        if not self.config.num_preview:
            return
        device = next(model.parameters()).device
        originals = self.preview_images(self.config.num_preview).to(device)
        rates = self.tokenizer.rates()
        tokens = dict(zip(map(str, rates), self.tokenizer.encode_at(originals, rates), strict=True))
        rows = {"original": originals}
        rows |= {
            f"{rate} token{'s' if rate != '1' else ''}": self.tokenizer.decode(each) for rate, each in tokens.items()
        }
        grid = pictures.grid_with_titles(torch.cat(list(rows.values())), columns=len(originals), row_titles=list(rows))
        pictures.save_png(grid, path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The tokenizer's folder, after what it measures was measured, without what is only there for training."""
        tokenizer = self.tokenizer
        if not self.config.decoder_only:
            self.calibrate(tokenizer)
        if self.config.half:
            tokenizer = copy.deepcopy(tokenizer).half()
        tokenizer.save_pretrained(folder, repo_id=str(self.config.out / "final"))


class AlignedJob(TokenizerJob):
    """A tokenizer that is trained with REPA. The teacher is no part of the model: it is neither trained nor saved."""

    def __init__(
        self, config: Config, model: Tokenizer, teacher: Teacher, source: ImageSource, shown: ImageSource
    ) -> None:
        assert config.repa is not None
        super().__init__(config, model, Aligned(model, config.repa, teacher.width), source, shown)
        self.teacher = teacher

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Losses:
        losses: Losses = model(batch.images, self.targets(batch.images), generator=generator)
        return losses

    def targets(self, images: Tensor) -> Tensor:
        """The teacher's features of the images, in the run's precision."""
        precision = self.config.training.precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        with torch.autocast(images.device.type, dtype=dtype, enabled=precision != "fp32"):
            self.teacher.to(images.device)
            return self.teacher.maps(images)


if __name__ == "__main__":
    run_job(sys.modules[__name__])
