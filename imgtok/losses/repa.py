"""REPA (arXiv 2410.06940): early features of a tokenizer are drawn towards those of a frozen image encoder.

A flow decoder has to find out by itself what is in an image before it can paint it. DINOv2 already knows: a small
MLP reads the patches after one early block and is trained to predict DINOv2's patch features of the clean
image, up to their length. The gradient teaches the MLP, that block and those before it, the codes and the encoder.
It mainly speeds convergence up and helps small token counts. Only training knows of all this: the teacher is
part of no checkpoint, the MLP part of no saved tokenizer. It works with any tokenizer that has `taps`.

Shapes: B batch, N patches, D width of the tapped block, C teacher width, H W the teacher's grid.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.config import NonNegativeFloat, NonNegativeInt, PositiveInt, check
from imgtok.layers.mup import note_width
from imgtok.layers.norms import layer_norm
from imgtok.tokenizers.base import Losses, Tokenizer
from imgtok.vision import dino
from imgtok.vision.dino import DINOv2


@dataclass(frozen=True, kw_only=True)
class REPAConfig:
    """Teacher, tapped block and the head between them; the defaults are FlexTok's, as far as they are published."""

    encoder: str = "vit_large_patch14_dinov2.lvd142m"
    """timm's name of the teacher: any DINOv2, or another vision transformer."""
    weights: str | None = None
    """Its weights: a file (.safetensors, or .pth and .bin without code), or a folder or Hub repository with
    model.safetensors; null is timm's repository of that name, downloaded unless a cache of this machine has it."""
    image_size: PositiveInt = 518
    """Pixels a side at which the teacher sees images; divided by its patch size, the grid to which the block's map is
    interpolated (518 / 14 = 37)."""
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


# ---------------------------------------------------------------- the teacher


def load_teacher(config: REPAConfig) -> DINOv2:
    """The frozen teacher; its weights are downloaded if need be.

    Raises ValueError for a name that timm does not know and for weights that do not fit, FileNotFoundError for
    weights that are not there.
    """
    fields = dino.Fields("repa.encoder", "repa.weights", "repa.image_size")
    try:
        path = dino.find_weights(config.encoder, config.weights, fields, download=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Without a teacher: repa=null") from error
    return dino.load(config.encoder, path, config.image_size, fields)


def teacher_features(teacher: DINOv2, images: Tensor) -> Tensor:
    """What the head is to predict: features (B, C, H, W) in float32 of the patches of images (B, 3, any, any)."""
    patches = teacher(images).patches.float()  # (B, H W, C)
    return patches.transpose(1, 2).unflatten(2, (teacher.grid, teacher.grid))


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


def alignment_loss(projected: Tensor, targets: Tensor) -> Tensor:
    """Minus the cosine similarity, averaged over positions: -1 is perfect.

    `projected` (B, N, C), a square grid of patches row by row, is interpolated to the grid of `targets` (B, C, H, W).
    """
    side = math.isqrt(projected.shape[1])
    maps = projected.float().transpose(1, 2).unflatten(2, (side, side))  # (B, C, side, side)
    if maps.shape[-2:] != targets.shape[-2:]:
        maps = F.interpolate(maps, targets.shape[-2:], mode="bilinear", antialias=True)
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

    def forward(self, images: Tensor, targets: Tensor, *, generator: torch.Generator) -> Losses:
        """The tokenizer's losses with the alignment to the teacher's `targets` (B, C, H, W) of the same images."""
        tapped: list[Tensor] = []

        def keep_tapped(block: int, patches: Tensor) -> None:
            if block == self.config.tap:
                tapped.append(patches)

        total, parts = self.tokenizer(images, generator=generator, on_block=keep_tapped)
        alignment = alignment_loss(self.projection(tapped[0]), targets)
        return Losses(total + self.config.weight * alignment, {**parts, "repa": alignment})
