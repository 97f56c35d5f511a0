"""`imgtok train vae`: trains the continuous autoencoder that tokenizers stand on.

The losses are L1, squared error and KL, which need nothing; LPIPS, which needs two files of weights; and a patch
discriminator's (imgtok/losses/adversarial.py), which is trained beside it. The published autoencoders of latent
diffusion have all of them; the small one that ships with imgtok has the first three.

What the loop trains is `VAETraining`, the autoencoder and its adversary in one module. One forward pass gives the sum
of both players' losses, each of which reaches one player's weights only, so the loop keeps its one backward pass, one
AdamW and one checkpoint. It treats the module's `adversary` apart in two ways: its gradient is clipped by its own norm,
and its weights are not averaged. The discriminator learns from the first step, at 2 % of the large autoencoder's
arithmetic, and the autoencoder listens to it from `adversarial_start` on. Only the autoencoder gets into `final/`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok import pictures
from imgtok.cli import run_job
from imgtok.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, check
from imgtok.data.images import DataConfig, ImageSource
from imgtok.data.loaders import Batch, eval_loader
from imgtok.losses.adversarial import PatchDiscriminator, adversarial_loss, balance, hinge_loss
from imgtok.losses.lpips import LPIPS, LPIPSNet, find_lpips_weights
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.base import Losses
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.train.config import TrainingConfig
from imgtok.train.image_job import ImageJob, open_split
from imgtok.train.loop import fit


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses; `model.kl_weight` is the KL's. Without LPIPS and adversary no other file is needed."""

    l1: NonNegativeFloat = 1.0
    """Weight of the mean absolute error, on the scale [-1, 1]."""
    mse: NonNegativeFloat = 1.0
    """Weight of the mean squared error."""
    lpips: NonNegativeFloat = 0.0
    """Weight of LPIPS; 0 leaves it out, and then it needs no weights."""
    lpips_net: LPIPSNet = "vgg"
    """The network that LPIPS looks with."""
    lpips_backbone: Path | None = None
    """torchvision's weights of that network, .pth or .safetensors; null looks in torch.hub's cache."""
    lpips_heads: Path | None = None
    """The published `vgg.pth` or `alex.pth` of LPIPS; null looks in torch.hub's cache and an installed `lpips`."""
    adversarial: NonNegativeFloat = 0.0
    """Weight of the adversarial term; 0 trains no discriminator."""
    adversarial_start: NonNegativeInt = 0
    """Optimizer step from which the autoencoder listens to the discriminator, which learns from the first."""
    adaptive: bool = False
    """Let `adversarial` be relative: the term's gradient gets that multiple of the reconstruction gradient's norm."""
    discriminator_channels: PositiveInt = 64
    """Channels of the discriminator's first layer; each layer doubles them, up to eightfold."""
    discriminator_layers: PositiveInt = 3
    """Layers of the discriminator that halve the image: 3 judge patches of 70 pixels, 2 of 34."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a continuous autoencoder and writes a run folder with the model in `final/`."""

    job: Literal["train-vae"] = "train-vae"
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
    image_size: PositiveInt
    """Pixels a side of the training images; the finished model takes any multiple of its `factor`."""
    model: VAEConfig = VAEConfig()
    """The autoencoder."""
    loss: LossConfig = LossConfig()
    """What it is trained by."""
    num_preview: NonNegativeInt = 12
    """Held-out images shown in a preview."""
    half: bool = False
    """Save the finished weights in float16: half the size; they are read back as float32."""
    training: TrainingConfig
    """Length, optimiser, precision, logging."""

    def __post_init__(self) -> None:
        check(self)
        if self.image_size % self.model.factor:
            raise ValueError(
                f"image_size: {self.image_size} is not a multiple of {self.model.factor}, "
                f"which {len(self.model.block_channels)} levels of model.block_channels ask for"
            )
        smallest = PatchDiscriminator.smallest(self.loss.discriminator_layers)
        if self.loss.adversarial and self.image_size < smallest:
            raise ValueError(
                f"loss.discriminator_layers: {self.loss.discriminator_layers} need images of at least {smallest} "
                f"pixels a side, given image_size = {self.image_size}"
            )


def main(config: Config) -> None:
    """Trains, and leaves a model folder in `out/final`."""
    perceptual = load_perceptual(config)  # first: what a missing file has to say should not wait for the data
    model = build_model(config)
    size = config.image_size
    source, shown = open_split(config.data, size, flip=config.flip, crop=config.crop, held_out=config.held_out)
    fit(VAEJob(config, model, perceptual, source, shown), config.training, config.out, config)


def load_perceptual(config: Config) -> LPIPS | None:
    """LPIPS if its weight is above 0. Raises FileNotFoundError or ValueError for its files, and for small images."""
    loss = config.loss
    if not loss.lpips:
        return None
    backbone, heads = find_lpips_weights(
        f"loss.lpips={loss.lpips}", loss.lpips_net, loss.lpips_backbone, loss.lpips_heads, section="loss."
    )
    perceptual = LPIPS.from_files(loss.lpips_net, backbone, heads)
    if config.image_size < perceptual.smallest:
        raise ValueError(
            f"loss.lpips_net={loss.lpips_net} needs images of at least {perceptual.smallest} pixels a side, "
            f"given image_size = {config.image_size}"
        )
    return perceptual


def build_model(config: Config) -> VAETraining:
    """A freshly initialised autoencoder and its adversary; the weights depend on the seed alone."""
    torch.manual_seed(config.training.seed)  # modules initialise themselves from the global generator
    return VAETraining(VAE(config.model), config.loss, start=config.loss.adversarial_start * config.training.accumulate)


class VAETraining(nn.Module):
    """An autoencoder, its adversary if there is one, and their losses."""

    seen: Tensor

    def __init__(self, vae: VAE, loss: LossConfig, *, start: int = 0) -> None:
        """`start` is the micro-batch from which the adversarial term counts."""
        super().__init__()
        self.vae = vae
        self.loss = loss
        self.start = start
        self.adversary = (
            PatchDiscriminator(loss.discriminator_channels, loss.discriminator_layers) if loss.adversarial else None
        )
        if loss.adversarial:  # saved with the weights, so a resumed run knows how far it is
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        images: Tensor,
        *,
        generator: torch.Generator,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Losses:
        """The sum of both players' losses for images (B, 3, H, W) in [-1, 1].

        `perceptual` gives distances (B,) of two batches. It is an argument and no part of the module because nothing
        of it is trained, averaged or saved.
        """
        loss = self.loss
        reconstruction = self.vae(images, generator=generator)
        decoded = judged = reconstruction.images
        if self.adversary is not None:
            weight = loss.adversarial * (self.seen >= self.start)  # on the device: no step waits to look at it
            if loss.adaptive:
                decoded, judged = balance(decoded.float(), weight)
        l1 = F.l1_loss(decoded, images)
        mse = F.mse_loss(decoded, images)
        total = loss.l1 * l1 + loss.mse * mse + self.vae.config.kl_weight * reconstruction.kl
        parts = {"l1": l1, "mse": mse, "kl": reconstruction.kl}
        if perceptual is not None:
            parts["lpips"] = perceptual(decoded, images).mean()
            total = total + loss.lpips * parts["lpips"]
        if self.adversary is not None:
            parts["adversarial"] = adversarial_loss(self.adversary, judged)
            parts["discriminator"] = hinge_loss(self.adversary, images, decoded)
            total = total + weight * parts["adversarial"] + parts["discriminator"]
            self.seen += 1
        return Losses(total, parts)


class VAEJob(ImageJob):
    """What the training loop needs to know about an autoencoder."""

    def __init__(
        self, config: Config, model: VAETraining, perceptual: LPIPS | None, source: ImageSource, shown: ImageSource
    ) -> None:
        super().__init__(source, shown, config.training)
        self.config = config
        self.model: nn.Module = model
        self.perceptual = perceptual

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Losses:
        if self.perceptual is not None:
            self.perceptual.to(batch.images.device)
        losses: Losses = model(batch.images, generator=generator, perceptual=self.perceptual)
        return losses

    @torch.no_grad()
    def preview(self, model: nn.Module, path: Path) -> None:
        """Held-out images above their reconstructions."""
        if not self.config.num_preview:
            return
        assert isinstance(model, VAETraining)
        device = next(model.parameters()).device
        originals = self.shown.batch(range(min(self.config.num_preview, len(self.shown)))).images.to(device)
        rows = {"original": originals, "decoded": model.vae.decode(model.vae.encode(originals)).clamp(-1, 1)}
        grid = pictures.grid_with_titles(torch.cat(list(rows.values())), columns=len(originals), row_titles=list(rows))
        pictures.save_png(grid, path)

    def save(self, model: nn.Module, folder: Path) -> None:
        """The autoencoder's folder, after the deviation of its latents was measured on held-out images."""
        assert isinstance(model, VAETraining)
        vae = model.vae
        measure_scaling(vae, self.shown, self.config.training.batch_size)
        if self.config.half:
            vae = copy.deepcopy(vae).half()
        vae.save_pretrained(folder)


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
