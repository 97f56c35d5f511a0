"""The VQ tokenizer of LlamaGen (arXiv 2406.06525, section 3.1): images to a raster of codes, convolutions and a table.

An encoder of the VQGAN lineage (arXiv 2012.09841) halves the image level by level, a 1x1 convolution brings what it
gives to a few numbers a cell (8), and the nearest of a large table (16,384 rows) stands for the cell. Both are brought
to unit length first, and the decoder gets the row at unit length too, so that only directions count (ViT-VQGAN, arXiv
2110.04627). The token sequence is the raster row by row, and always whole: images cost the same number of tokens.

Levels are convolutions only, but for the lowest resolution, where positions attend to each other after every residual
block, in the encoder and in the decoder. The decoder has one residual block a level more.

Images lie in [-1, 1] inside as well. Names of parameters are those of the published files, but for the table
(imgtok/published/llamagen_vq.py). Training judges the decoded images (`imgtok.losses.reconstruction`); the loss of the
quantizer comes besides.

Shapes: B images, C channels, h x w cells, n numbers of a code, K = h w tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.config import PositiveInt, check
from imgtok.flow import OnStep
from imgtok.layers.convolution import channels_first, channels_last, norm_silu_conv, speed_up, through
from imgtok.quantizers.binary import BinaryConfig, BinaryQuantizer
from imgtok.quantizers.vq import TableConfig, VectorQuantizer
from imgtok.sizes import SquareSize
from imgtok.tokenizers.base import CodedLosses, Graph, NoDecoding, Rate, Reconstruction, Tokenizer
from imgtok.tokenizers.checks import check_images, check_side, check_whole, check_widths
from imgtok.tokenizers.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class VQConfig:
    """Shape of the tokenizer, and its quantizer; the defaults are the published `vq_ds16`."""

    kind: Literal["vq"] = "vq"
    image_size: SquareSize = 256
    """Pixels a side of the images; a multiple of the pixels a side of a cell. No weight depends on it."""
    quantizer: TableConfig | BinaryConfig = TableConfig()
    """From the numbers of a cell to its id: the nearest row of a `table` (LlamaGen), or their signs as bits, `binary`
    (ELM)."""
    block_channels: tuple[int, ...] = (128, 128, 256, 256, 512)
    """Width of each level; every level but the last halves the image."""
    layers_per_block: PositiveInt = 2
    """Residual blocks a level in the encoder; the decoder has one more."""
    hidden_channels: PositiveInt = 256
    """Channels of a cell between the encoder, or the decoder, and the 1x1 convolution to its code."""
    norm_groups: PositiveInt = 32
    """Groups of every group normalisation; divides all widths."""

    def __post_init__(self) -> None:
        check(self)
        check_widths(self.block_channels, self.norm_groups)
        if not self.block_channels:
            raise ValueError("block_channels: name the width of at least one level")
        if self.image_size % self.factor:
            raise ValueError(
                f"image_size: {self.image_size} must be a multiple of {self.factor}, the pixels a side of a cell"
            )

    @property
    def factor(self) -> int:
        """Pixels a side of one cell."""
        return 2 ** (len(self.block_channels) - 1)

    @property
    def grid(self) -> int:
        """Cells a side of an image."""
        return self.image_size // self.factor

    @property
    def decoding(self) -> NoDecoding:
        """Settings of the decoder, which has none."""
        return NoDecoding()


# ---------------------------------------------------------------- blocks


class Block(nn.Module):
    """Residual block; where the number of channels changes, its input comes through a 1x1 convolution."""

    def __init__(self, given: int, made: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, given, eps=1e-6)
        self.conv1 = nn.Conv2d(given, made, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, made, eps=1e-6)
        self.conv2 = nn.Conv2d(made, made, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(given, made, 1) if given != made else None

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu_conv(self.norm1, self.conv1, x)
        h = norm_silu_conv(self.norm2, self.conv2, h)
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class CellAttention(nn.Module):
    """Attention of all cells to each other with a single head, and a residual."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (channels_last(conv(normed)).flatten(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # (B, 1, h w, C)
        projected: Tensor = self.proj_out(channels_first(mixed[:, 0].unflatten(1, x.shape[-2:])))
        return x + projected


class Halve(nn.Module):
    """Half the sides, by a convolution that looks one pixel further to the right and down, not to the left and up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Double(nn.Module):
    """Twice the sides, by repeating pixels and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention where the level `attends`, and what leads to
    the next resolution.
    """

    def __init__(
        self,
        given: int,
        made: int,
        blocks: int,
        groups: int,
        *,
        attends: bool,
        halves: bool = False,
        doubles: bool = False,
    ) -> None:
        super().__init__()
        widths = [given, *[made] * blocks]
        self.res = nn.ModuleList(Block(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(CellAttention(made, groups) for _ in range(blocks if attends else 0))
        self.downsample = Halve(made) if halves else None
        self.upsample = Double(made) if doubles else None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for resize in (self.downsample, self.upsample):
            x = x if resize is None else resize(x)
        return x


def middle(width: int, groups: int) -> nn.Sequential:
    """What follows at the lowest resolution in the encoder, and comes first in the decoder."""
    return nn.Sequential(Block(width, width, groups), CellAttention(width, groups), Block(width, width, groups))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> features (B, C, H / f, W / f)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, groups, last = config.block_channels, config.norm_groups, len(config.block_channels) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(given, made, config.layers_per_block, groups, attends=level == last, halves=level < last)
            for level, (given, made) in enumerate(pairwise((widths[0], *widths)))
        )
        self.mid = middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.hidden_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.conv_blocks:
            x = level(x)
        return norm_silu_conv(self.norm_out, self.conv_out, self.mid(x))


class Decoder(nn.Module):
    """Features (B, C, h, w) -> images (B, 3, f h, f w) in about [-1, 1]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, groups = config.block_channels[::-1], config.norm_groups  # the lowest resolution comes first
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.hidden_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], groups)
        self.conv_blocks = nn.ModuleList(
            Level(given, made, config.layers_per_block + 1, groups, attends=level == 0, doubles=level < last)
            for level, (given, made) in enumerate(pairwise((widths[0], *widths)))
        )
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        x = self.mid(self.conv_in(features))
        for level in self.conv_blocks:
            x = level(x)
        return norm_silu_conv(self.norm_out, self.conv_out, x)


# ---------------------------------------------------------------- the tokenizer


class VQ(Tokenizer):
    """Encoder, table of codes, decoder."""

    config_class: ClassVar[type] = VQConfig
    reconstructs: ClassVar[bool] = True
    only_decodes: ClassVar[tuple[str, ...]] = ("post_quant_conv.*", "decoder.*")
    decodes_by: ClassVar[tuple[str, ...]] = tuple(
        f"quantizer.{name}"
        for name in ("codebook_weight", "commitment_weight", "entropy_weight", "variance_weight", "training")
    )
    config: VQConfig
    quantizer: VectorQuantizer | BinaryQuantizer

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        width = config.quantizer.width
        self.quant_conv = nn.Conv2d(config.hidden_channels, width, 1)
        self.quantizer = make_quantizer(config.quantizer)
        self.post_quant_conv = nn.Conv2d(width, config.hidden_channels, 1)
        self.decoder = Decoder(config)
        self._sped_up = speed_up(self)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_tokens(self) -> int:
        return self.config.grid**2

    def resize(self, num_tokens: int) -> None:
        """Take images of `num_tokens` cells, if they make a square."""
        side = math.isqrt(num_tokens)
        if side and side**2 == num_tokens:
            self.config = replace(self.config, image_size=side * self.config.factor)

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    @property
    def levels(self) -> tuple[int, ...]:
        """The digits of an id: its bits, where the quantizer is binary."""
        quantizer = self.config.quantizer
        return (2,) * quantizer.bits if isinstance(quantizer, BinaryConfig) else ()

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that gives the decoded images."""
        conv: nn.Conv2d = self.decoder.conv_out
        return conv.weight  # type: ignore[return-value]

    # ------------------------------------------------ training

    def forward(self, images: Tensor, *, generator: torch.Generator) -> Reconstruction:
        """Decodes the codes of images (B, 3, H, W); the losses besides are the quantizer's. Bits alone are drawn."""
        return self.forward_drawn(images, self._draw(images, generator))

    def _draw(self, images: Tensor, generator: torch.Generator) -> Tensor | None:
        """The numbers (B, h, w, n) in [0, 1) by which bits are drawn; None where none are."""
        quantizer = self.config.quantizer
        if not isinstance(quantizer, BinaryConfig) or quantizer.training == "threshold":
            return None
        batch, _, height, width = images.shape
        shape = (batch, height // self.config.factor, width // self.config.factor, quantizer.bits)
        return torch.rand(shape, generator=generator, device=generator.device).to(images.device)

    def forward_drawn(self, images: Tensor, uniforms: Tensor | None = None) -> Reconstruction:
        """`forward` with the random numbers drawn: a function of tensors, which `training.compile` makes one graph."""
        codes, losses = self._quantized(channels_last(self.vectors(images)), uniforms)
        return Reconstruction(self.to_pixels(codes), losses)

    def _quantized(self, vectors: Tensor, uniforms: Tensor | None) -> tuple[Tensor, CodedLosses]:
        """The codes of vectors (B, h, w, n), and the quantizer's losses."""
        config, quantizer = self.config.quantizer, self.quantizer
        if isinstance(config, BinaryConfig):
            codes, ids, variance, entropy = quantizer(vectors, uniforms)
            loss, parts = config.variance_weight * variance, {"variance": variance, "bit_entropy": entropy}
            return codes, CodedLosses(loss, parts, ids, self.vocab_size)
        assert isinstance(quantizer, VectorQuantizer)
        codes, ids, commitment, codebook = quantizer(vectors)
        loss = config.codebook_weight * codebook + config.commitment_weight * commitment
        parts = {"quantizer": loss}
        if config.entropy_weight:
            parts["entropy"] = quantizer.entropy_loss(vectors)
            loss = loss + config.entropy_weight * parts["entropy"]
        return codes, CodedLosses(loss, parts, ids, self.vocab_size)

    def graphs(self) -> dict[str, Graph]:
        """`encoder`, from images to their ids (B, K), row by row, and `decoder`, from those to images."""
        size, grid = self.config.image_size, self.config.grid
        images, ids = torch.zeros(2, 3, size, size), torch.zeros(2, self.num_tokens, dtype=torch.long)

        def encoder(images: Tensor) -> Tensor:
            return self.quantizer.nearest(channels_last(self.vectors(images))).flatten(1)

        def decoder(ids: Tensor) -> Tensor:
            return self.to_pixels(self.quantizer.codes_of(ids.unflatten(1, (grid, grid)))).clamp(-1, 1)

        return {
            "encoder": Graph(encoder, {"images": images}, "ids"),
            "decoder": Graph(decoder, {"ids": ids}, "images"),
        }

    # ------------------------------------------------ tokens

    def vectors(self, images: Tensor) -> Tensor:
        """What the encoder gives for images (B, 3, H, W) in [-1, 1], before the nearest code: (B, n, H / f, W / f)."""
        features = through(self.encoder, images.to(self.last_layer.dtype), sped_up=self._sped_up)
        vectors: Tensor = self.quant_conv(features)
        return vectors

    def to_pixels(self, codes: Tensor) -> Tensor:
        """Images in about [-1, 1], not clamped, of codes (B, h, w, n), of unit length or bits."""
        features = self.post_quant_conv(channels_first(codes.to(self.last_layer.dtype)))
        return through(self.decoder, features, sped_up=self._sped_up)

    @torch.no_grad()
    def encode(self, images: Tensor, *, rate: Rate | None = None) -> Tokens:
        """All tokens of images (B, 3, S, S) in [-1, 1], row by row. Raises ValueError for images that the model does
        not take.
        """
        if rate is not None:
            self.check_rate(rate)
        check_images(images, self.image_size)
        check_side(images, self.image_size)
        ids = self.quantizer.nearest(channels_last(self.vectors(images)))
        return Tokens.full(ids.flatten(1))

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] of all their tokens. Nothing is drawn, and there are no settings.

        Raises ValueError for settings, for ids that there are not, and for images that lack tokens.
        """
        if decoding is not None and not isinstance(decoding, self.decoding_class):
            raise ValueError("decoding: this tokenizer's decoder has no settings; leave it out")
        check_whole(tokens, indices, self.num_tokens, self.vocab_size)
        ids = tokens.ids.to(self.last_layer.device).unflatten(1, (self.config.grid, self.config.grid))
        return self.to_pixels(self.quantizer.codes_of(ids)).clamp(-1, 1)


def make_quantizer(config: TableConfig | BinaryConfig) -> VectorQuantizer | BinaryQuantizer:
    """The quantizer of a configuration."""
    if isinstance(config, BinaryConfig):
        return BinaryQuantizer(config.bits)
    return VectorQuantizer(config.vocab_size, config.width, unit_length=True)
