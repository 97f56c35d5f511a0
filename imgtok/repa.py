"""REPA (arXiv 2410.06940) for FlexTok: early decoder features are drawn towards those of a frozen image encoder.

A flow decoder has to find out by itself what is in an image before it can paint it. DINOv2 already knows: a small
MLP reads the patches behind one early decoder block and is trained to predict DINOv2's patch features of the clean
image, up to their length. The gradient teaches the MLP, that block and those before it, the codes and the encoder.
It mainly speeds convergence up and helps small token counts. Only training knows of all this: the teacher is
part of no checkpoint, the MLP part of no saved tokenizer.

Shapes: B batch, N patches, D decoder width, C teacher width, H W the teacher's grid.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from imgtok.config import NonNegativeFloat, NonNegativeInt, PositiveInt, check
from imgtok.flextok import FlexTok
from imgtok.hub import find_folder
from imgtok.layers.mup import note_width
from imgtok.layers.norms import layer_norm
from imgtok.tokenizer import Losses

WEIGHT_FILES = (".safetensors", ".pth", ".bin")
"""What teacher weights may be stored as; the last two are read with `weights_only`."""


@dataclass(frozen=True, kw_only=True)
class REPAConfig:
    """Teacher, tapped block and the head between them; the defaults are FlexTok's, as far as they are known."""

    encoder: str = "vit_large_patch14_dinov2.lvd142m"
    """timm's name of the teacher: any DINOv2, or another vision transformer."""
    weights: str | None = None
    """Its weights: a file (.safetensors, or .pth and .bin without code), or a folder or Hub repository with
    model.safetensors; null is timm's repository of that name, timm/ENCODER."""
    image_size: PositiveInt = 518
    """Pixels a side at which the teacher sees images; divided by its patch size, the grid to which the decoder's map is
    interpolated (518 / 14 = 37)."""
    tap: NonNegativeInt = 1
    """Decoder block whose output is aligned, counted from 0."""
    hidden_multiple: PositiveInt = 4
    """Hidden width of the head, in decoder widths."""
    layers: PositiveInt = 3
    """Linear layers of the head."""
    weight: NonNegativeFloat = 1.0
    """Weight of the alignment in the training loss."""

    def __post_init__(self) -> None:
        check(self)


# ---------------------------------------------------------------- the teacher


class Teacher(nn.Module):
    """A frozen vision transformer of timm's that maps images in [-1, 1] to a grid of patch features."""

    model: Any
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, image_size: int) -> None:
        """`model` takes images of `image_size` pixels a side; raises ValueError if it is not a vision transformer."""
        super().__init__()
        from timm.data import resolve_model_data_config

        patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        if patch_size is None or not hasattr(model, "num_prefix_tokens"):
            raise ValueError(f"repa.encoder: {type(model).__name__} has no patch tokens; choose a vision transformer")
        if image_size % patch_size[0]:
            raise ValueError(f"repa.image_size: {image_size} is not a multiple of the teacher's patch, {patch_size[0]}")
        self.model = model
        self.image_size = image_size
        self.grid = image_size // patch_size[0]
        self.width = int(model.num_features)
        preparation = resolve_model_data_config(model)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preparation[name])[:, None, None], persistent=False)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features (B, C, H, W) in float32 of the patches of images (B, 3, any, any)."""
        size = (self.image_size, self.image_size)
        images = F.interpolate(images.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)
        tokens = self.model.forward_features(((images + 1) / 2 - self.mean) / self.std)
        patches: Tensor = tokens[:, self.model.num_prefix_tokens :].float()  # without class token and registers
        return patches.transpose(1, 2).unflatten(2, (self.grid, self.grid))


def load_teacher(config: REPAConfig) -> Teacher:
    """The frozen teacher with its weights; positions are interpolated to `image_size` where they have to be.

    Raises ValueError for a name that timm does not know and for weights that do not fit, FileNotFoundError for
    weights that are not there.
    """
    import timm

    if not timm.is_model(config.encoder):
        similar = timm.list_models("*dinov2*")
        raise ValueError(f"repa.encoder: timm has no model {config.encoder!r}; its DINOv2 models: {', '.join(similar)}")
    path = find_weights(config)
    try:
        with torch.random.fork_rng(devices=[]):  # its first weights are overwritten: leave the caller's RNG alone
            model: Any = timm.create_model(
                config.encoder,
                pretrained=True,
                pretrained_cfg_overlay={"file": str(path), "custom_load": False},
                img_size=config.image_size,
            )
    except (RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"repa.encoder: cannot make timm's {config.encoder!r} of {config.image_size} pixels (repa.image_size) with "
            f"the weights in {path} (repa.weights): {error}"
        ) from error
    model.reset_classifier(0)  # not sooner: timm then lets missing and unknown weights pass
    return Teacher(model, config.image_size)


def find_weights(config: REPAConfig) -> Path:
    """The file of the teacher's weights, downloaded if need be; FileNotFoundError says what to do without a network."""
    name = config.weights or f"timm/{config.encoder}"
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in WEIGHT_FILES:
            raise ValueError(f"repa.weights: {path} is none of {', '.join(WEIGHT_FILES)}")
        return path
    try:
        path = find_folder(name) / "model.safetensors"
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"repa.weights: no weights for the teacher {config.encoder!r} at {name!r}: {error}. Where there is a "
            f"network, fetch model.safetensors of https://huggingface.co/timm/{config.encoder}, and give its path, "
            "repa.weights=FILE; or train without a teacher, repa=null"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"repa.weights: the folder {path.parent} holds no {path.name}")
    return path


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


class AlignedFlexTok(nn.Module):
    """A FlexTok and the head beside it: what is trained and checkpointed. Only the `tokenizer` is saved in the end."""

    def __init__(self, tokenizer: FlexTok, config: REPAConfig, target_width: int) -> None:
        super().__init__()
        assert config.tap < tokenizer.config.decoder.depth
        self.config = config
        self.tokenizer = tokenizer
        self.projection = Projection(tokenizer.config.decoder.width, config, target_width)

    def forward(self, images: Tensor, targets: Tensor, *, generator: torch.Generator) -> Losses:
        """The tokenizer's losses with the alignment to the teacher's `targets` (B, C, H, W) of the same images."""
        tapped: list[Tensor] = []

        def keep_tapped(block: int, patches: Tensor) -> None:
            if block == self.config.tap:
                tapped.append(patches)

        total, parts = self.tokenizer(images, generator=generator, on_block=keep_tapped)
        alignment = alignment_loss(self.projection(tapped[0]), targets)
        return Losses(total + self.config.weight * alignment, {**parts, "repa": alignment})
