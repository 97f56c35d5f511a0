"""What a reconstruction is judged by: distances of pixels, a perceptual distance, and a discriminator.

One module for every model that decodes images while it is trained. The pixel distances need nothing; LPIPS needs two
files of weights; the discriminator is trained beside the model, from the first step, and the model listens to it from
`adversarial_start` on. See `imgtok.losses.adversarial` for how one backward pass serves both players.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.config import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check
from imgtok.losses.adversarial import (
    Game,
    Norm,
    PatchDiscriminator,
    adversarial_loss,
    balance,
    discriminator_loss,
    last_layer_weight,
)
from imgtok.losses.lpips import LPIPS, LPIPSNet, find_lpips_weights
from imgtok.tokenizers.base import Losses

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distances (B,) of two batches of images."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionLossConfig:
    """Weights of the losses. Without LPIPS and discriminator no other file is needed."""

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
    """Optimizer step from which the model listens to the discriminator, which learns from the first."""
    game: Game = "hinge"
    """What the players minimise: hinge losses (the discriminator) and minus the mean logit (the model), or
    cross-entropies."""
    adaptive: Literal["images", "last_layer"] | None = None
    """Let `adversarial` be relative to the size of the reconstruction gradient, measured on the decoded images, or at
    the weight of the model's last layer, as VQGAN does; null takes it as it stands."""
    discriminator_channels: PositiveInt = 64
    """Channels of the discriminator's first layer; each layer doubles them, up to eightfold."""
    discriminator_layers: PositiveInt = 3
    """Layers of the discriminator that halve the image: 3 judge patches of 70 pixels, 2 of 34."""
    discriminator_norm: Norm = "group"
    """Norms of the discriminator: over groups of channels of one image, or over the batch, as VQGAN's."""
    discriminator_rate: PositiveFloat = 1.0
    """Factor on the learning rate for the discriminator."""
    discriminator_decay: NonNegativeFloat | None = None
    """AdamW's decay for the discriminator; null takes the model's."""
    discriminator_every: PositiveInt = 1
    """The discriminator is updated after each so many steps."""

    def __post_init__(self) -> None:
        check(self)

    def check_size(self, image_size: int) -> None:
        """Raise ValueError if images of `image_size` pixels a side are too small for the discriminator."""
        smallest = PatchDiscriminator.smallest(self.discriminator_layers)
        if self.adversarial and image_size < smallest:
            raise ValueError(
                f"loss.discriminator_layers: {self.discriminator_layers} need images of at least {smallest} "
                f"pixels a side, given image_size = {image_size}"
            )

    def load_perceptual(self, image_size: int) -> LPIPS | None:
        """LPIPS if its weight is above 0.

        Raises FileNotFoundError or ValueError for its files, and for images too small for it.
        """
        if not self.lpips:
            return None
        backbone, heads = find_lpips_weights(
            f"loss.lpips={self.lpips}", self.lpips_net, self.lpips_backbone, self.lpips_heads, section="loss."
        )
        perceptual = LPIPS.from_files(self.lpips_net, backbone, heads)
        if image_size < perceptual.smallest:
            raise ValueError(
                f"loss.lpips_net={self.lpips_net} needs images of at least {perceptual.smallest} pixels a side, "
                f"given image_size = {image_size}"
            )
        return perceptual


class ReconstructionLoss(nn.Module):
    """The losses of decoded images, and the discriminator if there is one."""

    seen: Tensor

    def __init__(self, config: ReconstructionLossConfig, *, start: int = 0) -> None:
        """`start` is the micro-batch from which the adversarial term counts."""
        super().__init__()
        self.config = config
        self.start = start
        self.discriminator = (
            PatchDiscriminator(config.discriminator_channels, config.discriminator_layers, config.discriminator_norm)
            if config.adversarial
            else None
        )
        if config.adversarial:  # saved with the weights, so a resumed run knows how far it is
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        decoded: Tensor,
        images: Tensor,
        *,
        perceptual: Perceptual | None = None,
        last_layer: Tensor | None = None,
    ) -> Losses:
        """The sum of both players' losses of `decoded` for `images`, both (B, 3, H, W) in [-1, 1].

        `perceptual` is an argument and no part of the module because nothing of it is trained, averaged or saved.
        `last_layer` is the weight that gave `decoded`, needed where `adaptive` is "last_layer".
        """
        config, judged = self.config, decoded
        if self.discriminator is not None:
            weight = config.adversarial * (self.seen >= self.start)  # on the device: no step waits to look at it
            if config.adaptive == "images":
                decoded, judged = balance(decoded.float(), weight)
        l1 = F.l1_loss(decoded, images)
        mse = F.mse_loss(decoded, images)
        total = config.l1 * l1 + config.mse * mse
        parts = {"l1": l1, "mse": mse}
        if perceptual is not None:
            parts["lpips"] = perceptual(decoded, images).mean()
            total = total + config.lpips * parts["lpips"]
        if self.discriminator is not None:
            parts["adversarial"] = adversarial_loss(self.discriminator, judged, config.game)
            if config.adaptive == "last_layer":
                assert last_layer is not None, "the model does not say which layer is its last"
                parts["adaptive_weight"] = last_layer_weight(total, parts["adversarial"], last_layer)
                weight = weight * parts["adaptive_weight"]
            parts["discriminator"] = discriminator_loss(self.discriminator, images, decoded, config.game)
            total = total + weight * parts["adversarial"] + parts["discriminator"]
            self.seen += 1
        return Losses(total, parts)
