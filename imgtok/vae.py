"""The continuous autoencoder below the token models: diffusers' `AutoencoderKL`, any size of it.

Images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H / f, W / f) with f = 2^(levels - 1), multiplied by
`scaling_factor` so that they have about unit deviation. Here it is wrapped with the suite's
configuration and file format; `imgtok train vae` trains it (train/vae.py has the losses), FlexTok and
others hold one frozen inside. A small one for 32-pixel shapes ships with the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from imgtok.config import NonNegativeFloat, PositiveFloat, PositiveInt, check
from imgtok.hub import Pretrained


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of the autoencoder, and how much its latent is kept near a standard normal."""

    kind: Literal["vae"] = "vae"
    latent_channels: PositiveInt = 4
    """Channels of the latent."""
    block_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each level; every level but the last halves the image."""
    layers_per_block: PositiveInt = 2
    """Residual blocks a level in the encoder; the decoder has one more."""
    norm_groups: PositiveInt = 32
    """Groups of every group normalisation; divides all widths."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies latents after encoding; measured at the end of training as 1 / their deviation."""
    kl_weight: NonNegativeFloat = 1e-6
    """Weight of the KL divergence in training (in nats, summed over an image's latent, per image element)."""

    def __post_init__(self) -> None:
        check(self)
        for width in self.block_channels:
            if width < 1 or width % self.norm_groups:
                raise ValueError(
                    f"block_channels: {width} is not a positive multiple of norm_groups = {self.norm_groups}"
                )

    @property
    def factor(self) -> int:
        """Pixels a side of one latent cell."""
        return 2 ** (len(self.block_channels) - 1)


class Reconstruction(NamedTuple):
    """What training compares: decoded `images` (B, 3, H, W), and the `kl` of the latents, a scalar."""

    images: Tensor
    kl: Tensor


class VAE(nn.Module, Pretrained):
    """`AutoencoderKL` with the suite's scaling."""

    config_class: ClassVar[type] = VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # costs seconds to import

        self.config = config
        levels = len(config.block_channels)
        self.autoencoder = AutoencoderKL(
            block_out_channels=config.block_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_groups,
            latent_channels=config.latent_channels,
        )

    def forward(self, images: Tensor, *, generator: torch.Generator) -> Reconstruction:
        """Decodes a sample of each image's posterior; the KL divergence is in nats per image element."""
        posterior = self.autoencoder.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=generator.device).to(images.device)
        decoded = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        return Reconstruction(decoded, posterior.kl().sum() / images.numel())

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents: the posterior's mean, or with standard-normal `noise` a sample of it."""
        posterior = self.autoencoder.encode(images).latent_dist
        latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise
        return latents * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images in about [-1, 1], not clamped."""
        return self.autoencoder.decode(latents / self.config.scaling_factor).sample


def packaged_vae(name: str) -> Path:
    """Folder of an autoencoder that ships with imgtok, such as "shapes32"."""
    root = Path(str(resources.files("imgtok"))) / "assets"
    folder = root / f"vae-{name}"
    if not folder.is_dir():
        known = sorted(path.name.removeprefix("vae-") for path in root.glob("vae-*"))
        raise FileNotFoundError(f"imgtok ships no autoencoder named {name!r}; it has {known}")
    return folder
