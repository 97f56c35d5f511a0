"""Judges of pairs that are networks: how alike a reconstruction and its original are to DINOv2, to LPIPS and to
EfficientNet-Lite0.

Both sides are uint8 images (B, 3, H, W). A reconstruction is scored at each token count against the same originals, so
the features of the last originals are kept, but for LPIPS's, which would take gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok.losses.lite0 import Lite0Distance, between
from imgtok.losses.lpips import LPIPS
from imgtok.pictures import from_uint8
from imgtok.vision.dino import DINOFeatures, DINOv2
from imgtok.vision.features import KeepsLast, full_precision


class DINOSimilarity:
    """Cosine similarity of DINOv2's features: 1 for equal images, about 0 for unrelated ones.

    `dino` compares the class tokens, which stand for the whole image (what is in it); `dino_patches` compares the two
    patch tokens at each place and takes the mean over places (what is where).
    """

    keys = ("dino", "dino_patches")
    smallest: Mapping[str, int] = MappingProxyType({})

    def __init__(self, net: DINOv2, name: str, device: torch.device) -> None:
        """`name` of the network as it stands in the names of scores; ValueError for one without a class token."""
        if not net.has_class_token:
            raise ValueError(f"dino_model: {name} has no class token, which the score dino compares; choose a DINOv2")
        self.protocol = f"{name}, {net.size} px bicubic, cosine, mean over images"
        self._net, self._device = net.to(device), device
        self._of_originals = KeepsLast(self._features)

    @torch.no_grad()
    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        """(B, 2) float32."""
        found, real = self._features(images), self._of_originals(originals)
        assert found.whole is not None
        assert real.whole is not None
        places = F.cosine_similarity(found.patches, real.patches, dim=-1).mean(dim=1)
        return torch.stack([F.cosine_similarity(found.whole, real.whole, dim=-1), places], dim=1)

    def _features(self, images: Tensor) -> DINOFeatures:
        with full_precision(self._device):
            features: DINOFeatures = self._net(from_uint8(images.to(self._device)))
        return features


class LPIPSDistance:
    """`lpips`: 0 for equal images, rarely above 1. The images go in as they are, without resizing, in [-1, 1]."""

    keys = ("lpips",)

    def __init__(self, net: LPIPS, name: str, device: torch.device) -> None:
        """`name` of the network as it stands in the names of scores."""
        self.protocol = f"{name}, v0.1, mean over images"
        self.smallest: Mapping[str, int] = {"lpips": net.smallest}
        self._net, self._device = net.to(device), device

    @torch.no_grad()
    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        """(B, 1) float32."""
        pair = (from_uint8(side.to(self._device)) for side in (images, originals))
        with full_precision(self._device):
            distances: Tensor = self._net(*pair)
        return distances[:, None]


class Lite0Perceptual:
    """`perceptual_lite0`: 0 for equal images, 4 at the most. The images go in as they are, without resizing."""

    keys = ("perceptual_lite0",)

    def __init__(self, distance: Lite0Distance, device: torch.device) -> None:
        self.protocol = f"{distance.net.name}, five stages, mean over images"
        self.smallest: Mapping[str, int] = {"perceptual_lite0": distance.smallest}
        self._distance, self._device = distance.to(device), device
        self._of_originals = KeepsLast(self._features)

    @torch.no_grad()
    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        """(B, 1) float32."""
        return between(self._features(images), self._of_originals(originals))[:, None]

    def _features(self, images: Tensor) -> list[Tensor]:
        with full_precision(self._device):
            return self._distance.features(from_uint8(images.to(self._device)))
