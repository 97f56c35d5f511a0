"""The continuous autoencoder below the token models: diffusers' `AutoencoderKL`, any size of it.

Images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H / f, W / f) with f = 2^(levels - 1), multiplied by
`scaling_factor` so that they have about unit deviation. Here it is wrapped with the suite's
configuration and file format; `imgtok train autoencoder` trains it (train/autoencoder.py has the losses), FlexTok and
others hold one frozen inside, or are trained on its cached moments (imgtok.data.latents). `load_vae`
takes every form that one comes in. A small one for 32-pixel shapes ships with the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from imgtok.config import NonNegativeFloat, PositiveFloat, PositiveInt, check
from imgtok.flow import OnStep
from imgtok.hub import Found, load, resolve
from imgtok.runtime import check_doc_strings
from imgtok.tokenizers.base import Autoencoder, Losses, NoDecoding, Reconstruction
from imgtok.tokenizers.checks import check_widths


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
    encoder_attention: bool = False
    """Attention after each residual block of the encoder's last level, as KL-16 has it."""

    def __post_init__(self) -> None:
        check(self)
        check_widths(self.block_channels, self.norm_groups)

    @property
    def factor(self) -> int:
        """Pixels a side of one latent cell."""
        return 2 ** (len(self.block_channels) - 1)

    @property
    def decoding(self) -> NoDecoding:
        """Settings of the decoder, which has none."""
        return NoDecoding()


class VAE(Autoencoder):
    """`AutoencoderKL` with the suite's scaling."""

    config_class: ClassVar[type] = VAEConfig
    not_of_the_latents: ClassVar[tuple[str, ...]] = ("scaling_factor", "kl_weight")
    measured_at_end: ClassVar[tuple[str, ...]] = ("scaling_factor",)
    only_decodes: ClassVar[tuple[str, ...]] = ("autoencoder.decoder.*", "autoencoder.post_quant_conv.*")
    decodes_by: ClassVar[tuple[str, ...]] = ("kl_weight",)

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        check_doc_strings("diffusers")
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # costs seconds to import

        self.config = config
        levels = len(config.block_channels)
        self.autoencoder = AutoencoderKL(
            block_out_channels=config.block_channels,
            down_block_types=encoder_blocks(levels, config.encoder_attention),
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_groups,
            latent_channels=config.latent_channels,
        )

    def forward(self, images: Tensor, *, generator: torch.Generator) -> Reconstruction:
        """Decodes a sample of each image's posterior; the loss besides is the KL divergence, in nats per image element,
        times `kl_weight`.
        """
        rows, columns = (side // self.config.factor for side in images.shape[-2:])
        shape = (len(images), self.config.latent_channels, rows, columns)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(images.device)
        return self.forward_drawn(images, noise)

    def forward_drawn(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """`forward` with its random numbers given: a function of tensors, which `training.compile` makes one graph."""
        posterior = self.autoencoder.encode(images).latent_dist
        decoded = self.autoencoder.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().sum() / images.numel()
        return Reconstruction(decoded, Losses(self.config.kl_weight * kl, {"kl": kl}))

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that gives the decoded images."""
        weight: nn.Parameter = self.autoencoder.decoder.conv_out.weight
        return weight

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set `scaling_factor` to one over the deviation of the latents of held-out images (B, 3, H, W)."""
        with torch.no_grad():
            deviation = torch.cat([self.encode(images) for images in batches]).std() / self.config.scaling_factor
        self.config = replace(self.config, scaling_factor=float(1 / deviation))

    def moments(self, images: Tensor) -> Tensor:
        """The posteriors, not scaled: means, then log-variances from -30 to 20, (B, 2 C, H / f, W / f)."""
        posterior = self.autoencoder.encode(images.to(self.last_layer.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def decode(
        self,
        latents: Tensor,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images in about [-1, 1], not clamped. The decoder draws nothing and has no settings: only `latents` count."""
        return self.autoencoder.decode((latents / self.config.scaling_factor).to(self.last_layer.dtype)).sample


def encoder_blocks(levels: int, attention: bool) -> tuple[str, ...]:
    """Diffusers' names of the encoder's levels."""
    plain, last = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
    return (plain,) * (levels - 1) + (last if attention else plain,)


def load_vae(name: str | Path | Found, scaling_factor: float | None = None) -> VAE:
    """An autoencoder in evaluation mode, by any name that `hub.resolve` follows. `scaling_factor` replaces its own.

    Raises FileNotFoundError, ConfigError or ValueError that name the file.
    """
    vae: VAE = load(resolve(name, expect=VAE).scaled(scaling_factor))
    return vae
