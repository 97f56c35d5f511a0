"""The VQGAN of MaskGIT (arXiv 2202.04200) as MAGE published it: images to a grid of codes, convolutions only.

It is the autoencoder under KARL, and one of the suite: its latents are rows of a table of codes, the nearest to what
the encoder gives, and have no variance. `features` are what the encoder gives itself, which KARL reads; the decoder
takes any latents, not rows of the table alone.

Unlike the VQGAN of arXiv 2012.09841 it has no attention, no bias in most convolutions, halves by averaging, and has as
many residual blocks in the decoder as in the encoder. Where a block changes the number of channels, its 1x1
convolution reads the block's *own output* h, and the block gives h + conv(h): its input does not come through there.
MaskGIT's code has this slip, and published weights were trained with it, so it is kept.

The networks see pixels in [0, 1], as they were trained; outside, images lie in [-1, 1] as everywhere. Names of
parameters are those of the published file, but for the table of codes (imgtok/published/maskgit_vqgan.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.config import NonNegativeFloat, PositiveFloat, PositiveInt, check
from imgtok.flow import OnStep
from imgtok.layers.convolution import channels_first, channels_last, norm_silu_conv, silu, speed_up, through
from imgtok.quantizers.vq import VectorQuantizer
from imgtok.tokenizers.base import Autoencoder, CodedLosses, NoDecoding, Reconstruction
from imgtok.tokenizers.checks import check_widths


@dataclass(frozen=True, kw_only=True)
class MaskGITVQGANConfig:
    """Shape of the autoencoder, and the weights of its quantizer's loss; the defaults are as published."""

    kind: Literal["maskgit_vqgan"] = "maskgit_vqgan"
    latent_channels: PositiveInt = 256
    """Channels of the latent, and numbers of a code."""
    vocab_size: PositiveInt = 1024
    """Rows of the table of codes."""
    block_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    """Width of each level; every level but the last halves the image."""
    layers_per_block: PositiveInt = 2
    """Residual blocks a level, in the encoder and in the decoder."""
    norm_groups: PositiveInt = 32
    """Groups of every group normalisation; divides all widths."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies latents after encoding."""
    commitment_weight: NonNegativeFloat = 1.0
    """Weight of the loss that pulls features to their codes."""
    codebook_weight: NonNegativeFloat = 0.25
    """Weight of the loss that pulls codes to their features; published code has the two the other way round than the
    paper of vector quantization."""

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


# ---------------------------------------------------------------- blocks


class Block(nn.Module):
    """Residual block; see the top of this file for what happens where the number of channels changes."""

    def __init__(self, given: int, made: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, given, eps=1e-6)
        self.conv1 = nn.Conv2d(given, made, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, made, eps=1e-6)
        self.conv2 = nn.Conv2d(made, made, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(made, made, 1, bias=False) if given != made else None

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu_conv(self.norm1, self.conv1, x)
        h = norm_silu_conv(self.norm2, self.conv2, h)
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class Blocks(nn.Module):
    """The residual blocks of one level, and in the decoder what doubles the sides after them."""

    def __init__(self, given: int, made: int, config: MaskGITVQGANConfig, *, doubles: bool = False) -> None:
        super().__init__()
        widths = [given, *[made] * config.layers_per_block]
        self.block = nn.ModuleList(Block(a, b, config.norm_groups) for a, b in pairwise(widths))
        self.upsample = nn.ModuleDict({"conv": nn.Conv2d(made, made, 3, padding=1)}) if doubles else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if self.upsample is not None:
            x = self.upsample["conv"](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Middle(nn.Module):
    """The two residual blocks at the lowest resolution."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.block_1 = Block(width, width, groups)
        self.block_2 = Block(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.block_1(x))


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] -> features (B, C, H / f, W / f)."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        widths = config.block_channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(
            Blocks(given, made, config) for given, made in zip((widths[0], *widths[:-1]), widths, strict=True)
        )
        self.mid = Middle(widths[-1], config.norm_groups)
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for level, blocks in enumerate(self.down):
            x = blocks(x if level == 0 else F.avg_pool2d(x, 2))
        features: Tensor = self.conv_out(silu(self.norm_out(self.mid(x))))
        return features


class Decoder(nn.Module):
    """Latents (B, C, h, w) -> pixels (B, 3, f h, f w) in about [0, 1]."""

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        widths = config.block_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], config.norm_groups)
        self.up = nn.ModuleList(  # counted from the finest level, and run through from the other end
            Blocks(widths[min(level + 1, last)], widths[level], config, doubles=level > 0) for level in range(last + 1)
        )
        self.norm_out = nn.GroupNorm(config.norm_groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for level in reversed(range(len(self.up))):
            x = self.up[level](x)
        pixels: Tensor = self.conv_out(silu(self.norm_out(x)))
        return pixels


# ---------------------------------------------------------------- the autoencoder


class MaskGITVQGAN(Autoencoder):
    """Encoder, table of codes, decoder."""

    config_class: ClassVar[type] = MaskGITVQGANConfig
    not_of_the_latents: ClassVar[tuple[str, ...]] = ("scaling_factor", "commitment_weight", "codebook_weight")
    only_decodes: ClassVar[tuple[str, ...]] = ("decoder.*",)
    decodes_by: ClassVar[tuple[str, ...]] = ("commitment_weight", "codebook_weight")

    def __init__(self, config: MaskGITVQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = VectorQuantizer(config.vocab_size, config.latent_channels)
        self.decoder = Decoder(config)
        self._sped_up = speed_up(self)

    def forward(self, images: Tensor, *, generator: torch.Generator) -> Reconstruction:
        """Decodes each image's codes; the loss besides is the quantizer's. Nothing is drawn."""
        return self.forward_drawn(images)

    def forward_drawn(self, images: Tensor) -> Reconstruction:
        """`forward`: a function of tensors, which `training.compile` makes one graph."""
        codes, ids, commitment, codebook = self.quantizer(channels_last(self.features(images)))
        loss = self.config.commitment_weight * commitment + self.config.codebook_weight * codebook
        losses = CodedLosses(loss, {"quantizer": loss}, ids, self.quantizer.vocab_size)
        return Reconstruction(self.to_pixels(channels_first(codes)), losses)

    def features(self, images: Tensor) -> Tensor:
        """What the encoder gives for images (B, 3, H, W) in [-1, 1], before the nearest code: (B, C, H / f, W / f)."""
        # In [0, 1] first: 16 bits hold dark pixels more finely there than near -1.
        dtype = self.last_layer.dtype
        pixels = (images.to(torch.promote_types(images.dtype, dtype)) + 1) / 2
        return through(self.encoder, pixels.to(dtype), sped_up=self._sped_up)

    def to_pixels(self, latents: Tensor) -> Tensor:
        """Images in about [-1, 1], not clamped, of latents (B, C, h, w) that are not scaled."""
        return through(self.decoder, latents.to(self.last_layer.dtype), sped_up=self._sped_up) * 2 - 1

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that gives the decoded images."""
        conv: nn.Conv2d = self.decoder.conv_out
        return conv.weight  # type: ignore[return-value]

    def moments(self, images: Tensor) -> Tensor:
        """Each cell's code, not scaled, and the log-variance -30, which stands for none: (B, 2 C, H / f, W / f)."""
        features = channels_last(self.features(images))
        codes = channels_first(F.embedding(self.quantizer.nearest(features), self.quantizer.rows()))
        codes = codes.to(features.dtype)
        return torch.cat([codes, torch.full_like(codes, -30.0)], dim=1)

    def decode(
        self,
        latents: Tensor,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images in about [-1, 1], not clamped, of latents as they are, which need not be codes of the table."""
        return self.to_pixels(latents / self.config.scaling_factor)
