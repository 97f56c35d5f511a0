"""A perceptual distance whose weights come by pip: how different two images look to EfficientNet-Lite0.

As in LPIPS, the features of every position are brought to unit length over their channels, and the squares of their
differences are summed over channels and averaged over positions, here of the network's five stages, and then over the
stages: the network's strides are 2 to 32. No heads were trained on what people say of pairs of images, so each
channel and each stage counts as much as another. 0 for equal images, 4 at the most; it is not LPIPS, and its figures
are not to be compared with LPIPS's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from imgtok.losses.lpips import unit_length
from imgtok.vision import lite0


class Lite0Distance(nn.Module):
    """The distance of pairs of images; frozen, in float32 whatever the surrounding precision, differentiable in the
    first of each pair.
    """

    smallest = lite0.SMALLEST
    """Pixels a side that images must have."""

    def __init__(self, net: lite0.Lite0) -> None:
        super().__init__()
        self.net = net

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads the network's weights (`lite0.find_weights`); raises ValueError where the file holds others."""
        return cls(lite0.load(path))

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distances (B,) of images (B, 3, H, W) in [-1, 1], as they are, from as many others; symmetric.

        `references` get no gradient: their features are computed without a graph. Raises ValueError for two batches
        that cannot be compared, or for images with a side below `smallest`.
        """
        if images.shape != references.shape or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"the distance in {lite0.NAME} compares two batches (B, 3, H, W), given {tuple(images.shape)} and "
                f"{tuple(references.shape)}"
            )
        if min(images.shape[2:]) < self.smallest:
            raise ValueError(
                f"the distance in {lite0.NAME} needs images of at least {self.smallest} pixels a side, "
                f"given {tuple(images.shape[2:])}"
            )
        with torch.no_grad():
            wanted = self.features(references)
        return between(self.features(images), wanted)

    def features(self, images: Tensor) -> list[Tensor]:
        """What is compared: (B, C, h, w) of unit length over C, for each stage."""
        with torch.autocast(images.device.type, enabled=False):
            return [unit_length(features) for features in self.net.stages(images)]


def between(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Distances (B,) of pairs of images from their `features`."""
    by_stage = [(one - other).square().sum(1).mean((1, 2)) for one, other in zip(some, others, strict=True)]
    return torch.stack(by_stage).mean(0)
