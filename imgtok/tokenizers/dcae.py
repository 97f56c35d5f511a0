"""DC-AE, the deep-compression autoencoder (arXiv 2410.10733): diffusers' `AutoencoderDC`, any size of it.

Images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H / f, W / f) with f = 2^(levels - 1), 32 as published, multiplied by
`scaling_factor`. Latents have no distribution: what the encoder gives is what the decoder gets. Published ones are read
by `published/diffusers_dc.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from imgtok.config import NonNegativeInt, PositiveFloat, PositiveInt, check
from imgtok.flow import OnStep
from imgtok.runtime import check_doc_strings
from imgtok.tokenizers.base import Autoencoder, Losses, NoDecoding, Reconstruction

BlockKind = Literal["ResBlock", "EfficientViTBlock"]


@dataclass(frozen=True, kw_only=True)
class DCAESide:
    """Levels of the encoder or of the decoder, from the finest to the coarsest; each list has an entry a level."""

    channels: tuple[PositiveInt, ...]
    """Width of each level; every level but the last halves the image."""
    layers: tuple[NonNegativeInt, ...]
    """Blocks of each level; 0 at the first leaves its resolution to a single convolution."""
    blocks: tuple[BlockKind, ...]
    """Kind of the blocks: convolutions, or attention that grows linearly with the number of positions."""
    kernels: tuple[NonNegativeInt, ...]
    """Kernel by which attention also looks at queries, keys and values with their neighbours; 0 for none."""

    def __post_init__(self) -> None:
        check(self)
        for name in ("layers", "blocks", "kernels"):
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(f"{name}: {len(getattr(self, name))} entries for {len(self.channels)} levels")


BLOCKS: tuple[BlockKind, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
CHANNELS, KERNELS = (128, 256, 512, 512, 1024, 1024), (0, 0, 0, 5, 5, 5)


@dataclass(frozen=True, kw_only=True)
class DCAEConfig:
    """Shape of the autoencoder; the defaults are those of the published f32c32 for SANA."""

    kind: Literal["dcae"] = "dcae"
    latent_channels: PositiveInt = 32
    """Channels of the latent."""
    encoder: DCAESide = DCAESide(channels=CHANNELS, layers=(2, 2, 2, 3, 3, 3), blocks=BLOCKS, kernels=KERNELS)
    """Levels of the encoder."""
    decoder: DCAESide = DCAESide(channels=CHANNELS, layers=(3, 3, 3, 3, 3, 3), blocks=BLOCKS, kernels=KERNELS)
    """Levels of the decoder, as many."""
    head_dim: PositiveInt = 32
    """Width of an attention head."""
    downsample: Literal["pixel_unshuffle", "conv"] = "conv"
    """How a level halves the image."""
    upsample: Literal["pixel_shuffle", "interpolate"] = "interpolate"
    """How a level doubles it."""
    norms: tuple[Literal["rms_norm", "batch_norm"], ...] = ("rms_norm",) * 6
    """Normalisation of each level of the decoder."""
    activations: tuple[Literal["silu", "relu"], ...] = ("silu",) * 6
    """Activation of each level of the decoder."""
    encoder_shortcut: bool = True
    """Whether means of channels skip the encoder's last convolution."""
    decoder_shortcut: bool = True
    """Whether repeated channels skip the decoder's first convolution."""
    scaling_factor: PositiveFloat = 0.41407
    """Multiplies latents after encoding."""

    def __post_init__(self) -> None:
        check(self)
        for name in ("norms", "activations"):
            if len(getattr(self, name)) != len(self.decoder.channels):
                raise ValueError(f"{name}: {len(getattr(self, name))} entries for {len(self.decoder.channels)} levels")
        if len(self.encoder.channels) != len(self.decoder.channels):
            raise ValueError(
                f"decoder.channels: {len(self.decoder.channels)} levels for {len(self.encoder.channels)} of the encoder"
            )

    @property
    def factor(self) -> int:
        """Pixels a side of one latent cell."""
        return 2 ** (len(self.encoder.channels) - 1)

    @property
    def decoding(self) -> NoDecoding:
        """Settings of the decoder, which has none."""
        return NoDecoding()


def arguments_of(config: DCAEConfig) -> dict[str, Any]:
    """The same in diffusers' names, but for the scale."""
    sides: dict[str, Any] = {}
    for name, side in (("encoder", config.encoder), ("decoder", config.decoder)):
        sides |= {f"{name}_{theirs}": getattr(side, ours) for ours, theirs in SIDE.items()}
        sides[f"{name}_{SIDE['kernels']}"] = tuple((size,) if size else () for size in side.kernels)
    return {theirs: getattr(config, ours) for ours, theirs in WHOLE.items()} | sides


WHOLE = {
    "latent_channels": "latent_channels",
    "head_dim": "attention_head_dim",
    "downsample": "downsample_block_type",
    "upsample": "upsample_block_type",
    "norms": "decoder_norm_types",
    "activations": "decoder_act_fns",
    "encoder_shortcut": "encoder_out_shortcut",
    "decoder_shortcut": "decoder_in_shortcut",
}
SIDE = {
    "channels": "block_out_channels",
    "layers": "layers_per_block",
    "blocks": "block_types",
    "kernels": "qkv_multiscales",
}
"""Our names of fields -> diffusers', which have `encoder_` or `decoder_` before those of a side."""


class DCAE(Autoencoder):
    """`AutoencoderDC` with the suite's scaling."""

    config_class: ClassVar[type] = DCAEConfig
    only_decodes: ClassVar[tuple[str, ...]] = ("autoencoder.decoder.*",)
    decodes_by: ClassVar[tuple[str, ...]] = ("decoder", "upsample", "norms", "activations", "decoder_shortcut")

    def __init__(self, config: DCAEConfig) -> None:
        super().__init__()
        check_doc_strings("diffusers")
        from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC  # costs seconds to import

        self.config = config
        self.autoencoder = AutoencoderDC(**arguments_of(config))

    def forward(self, images: Tensor, *, generator: torch.Generator) -> Reconstruction:
        """Decodes each image's latent. Nothing is drawn, and there is no loss besides."""
        return self.forward_drawn(images)

    def forward_drawn(self, images: Tensor) -> Reconstruction:
        """`forward`: a function of tensors, which `training.compile` makes one graph."""
        decoded = self.autoencoder.decode(self.autoencoder.encode(images).latent).sample
        return Reconstruction(decoded, Losses(images.new_zeros(()), {}))

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that gives the decoded images."""
        last: Any = self.autoencoder.decoder.conv_out
        weight: nn.Parameter = getattr(last, "conv", last).weight
        return weight

    def moments(self, images: Tensor) -> Tensor:
        """The latents, not scaled, and the log-variance -30, which stands for none: (B, 2 C, H / f, W / f)."""
        latents = self.autoencoder.encode(images.to(self.last_layer.dtype)).latent
        return torch.cat([latents, torch.full_like(latents, -30.0)], dim=1)

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
