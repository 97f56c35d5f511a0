"""Published xAR checkpoints: `xAR-B.pth` and its like, or a training checkpoint of the published code.

Tensors are matched by name, strictly in both directions; the size of the model follows from their shapes. A file
holds either the weights, or a training run's `model` and `model_ema`. What no file
says is as in the published code: four cells of half the grid's side, and heads 64 channels wide unless a rotary table
shows another width. The tables that are stored beside the weights (mask, rotary positions) are computed here; stored
ones are compared with ours before they are left, so that another order of cells is not read as this one. `save`
writes the same layout.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Set
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imgtok.config import ConfigError
from imgtok.files import replacing
from imgtok.generators.conditioning import ClassModulation
from imgtok.generators.entities import Cells
from imgtok.generators.xar import XAR, XAR_SIZES, XARConfig, xar_size
from imgtok.hub import Found
from imgtok.published.names import check_telling, depth_of, places
from imgtok.weights import Weights, check_tensors, fill, skeleton, write_pickle, write_tensors

logger = logging.getLogger(__name__)

NAMES: Mapping[str, str] = {
    "class_embedding.": "class_emb.",
    "time_mlp.": "time_embed.mlp.",
    "input_proj.": "z_proj.",
    "input_norm.": "z_proj_ln.",
    "first_positions": "encoder_pos_embed_learned",
    "second_positions": "decoder_pos_embed_learned",
    "first_norm.": "encoder_norm.",
    "second_norm.": "decoder_norm.",
    "middle_proj.": "decoder_embed.",
    "readout.": "pred.",
    "first_blocks.": "encoder_blocks.",
    "second_blocks.": "decoder_blocks.",
    ".attention.qkv_proj.": ".attn.qkv.",
    ".attention.out_proj.": ".attn.proj.",
    ".mlp.gate_proj.": ".mlp.fc1_g.",
    ".mlp.up_proj.": ".mlp.fc1_x.",
    ".mlp.down_proj.": ".mlp.fc2.",
    ".modulation.": ".ada_lin.1.",
}
"""Ours -> published; see `imgtok.published.names`."""
POSITIONS = ("encoder_pos_embed_learned", "decoder_pos_embed_learned")
"""Published with a batch axis in front."""
BUFFERS = re.compile(r"mask|(en|de)coder_blocks\.\d+\.attn\.rope\.freqs(_cos|_sin)?")
"""What a published file holds beside weights: tables that are computed here."""


KIND = "xar"
LOOKS_LIKE = "an xAR like xAR-B.pth"
TELLING_NAMES = (
    "class_emb.weight",
    "time_embed.mlp.0.weight",
    "z_proj.weight",
    "encoder_pos_embed_learned",
    "encoder_blocks.0.ada_lin.1.weight",
    "pred.weight",
)
"""What a file has that is one of these. MAR's and TokenBridge's share names with it, but modulate no block."""


def recognise(description: Mapping[str, Any], names: Set[str]) -> bool:
    return not description and names >= {*TELLING_NAMES}


def configuration(found: Found) -> XARConfig:
    """The configuration that the shapes of the tensors tell. Raises ValueError where they tell none."""
    return config_of(found.weights().blank, found.path)


def load(
    found: Found, *, raw: bool = False, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> XAR:
    """The model in a published file, in evaluation mode; see `read`."""
    return read(found.weights(raw=raw), map_location=map_location, dtype=dtype)


def read(stored: Weights, *, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> XAR:
    """The model whose published tensors these are. Raises ValueError for ones that do not fit (all of them are listed)
    and for tables of another order of cells.
    """
    config = config_of(stored.blank, stored.path)
    found = {name: value for name, value in stored.blank.items() if not BUFFERS.fullmatch(name)}
    model = skeleton(lambda: XAR(config))
    blank = model.state_dict()
    known = places(blank, NAMES, {})
    wanted = {name: as_published(name, place.view(blank)) for name, place in known.items()}
    check_tensors(found, wanted, stored.path, "xAR that this file")
    check_tables(stored, tables(model), stored.path)
    pairs = ((place.name, as_ours(name, stored[name])) for name, place in known.items())
    return fill(model, pairs, map_location=map_location, dtype=dtype)


TELLING = {"z_proj.weight": 2, "class_emb.weight": 2, "encoder_pos_embed_learned": 3}
"""The tensors whose shapes tell the configuration, and their numbers of dimensions."""


def config_of(stored: Mapping[str, Tensor], path: Path) -> XARConfig:
    """The configuration that the shapes of published tensors tell. Raises ValueError where they tell none."""
    check_telling(stored, TELLING, "xAR", path)
    (width, channels), length = stored["z_proj.weight"].shape, stored[POSITIONS[0]].shape[1]
    depth = depth_of(stored, "encoder_blocks")
    grid = math.isqrt(length)
    if grid**2 != length or grid % 2 or not depth:
        raise ValueError(f"{path}: {length} positions and {depth} blocks are no xAR's; four cells make an even square")
    named = {sizes[0]: xar_size(name) for name, sizes in XAR_SIZES.items()}.get(width)  # type: ignore[arg-type]
    cosines = [value for name, value in stored.items() if name.endswith("attn.rope.freqs_cos")]
    if cosines and cosines[0].ndim == 2 and cosines[0].shape[1]:
        heads = width // cosines[0].shape[1]
    elif named:
        heads = named.num_heads
    else:
        heads = max(1, width // 64)
        logger.warning("%s: no rotary table tells the heads of an xAR %d wide: taken as %d", path, width, heads)
    try:
        return replace(
            named or XARConfig(width=4, num_heads=1),
            latent_channels=channels,
            grid=grid,
            condition=ClassModulation(num_classes=len(stored["class_emb.weight"]) - 1),
            entities=Cells(height=grid // 2, width=grid // 2),
            width=width,
            depth=depth,
            num_heads=heads,
        )
    except ValueError as error:
        raise ValueError(f"{path}: an xAR that imgtok cannot stand for: {error}") from error


# ---------------------------------------------------------------- tables


def tables(model: XAR) -> dict[str, Tensor]:
    """What a published file holds beside weights: published name -> table."""
    mask = torch.zeros(model.entities.length, model.entities.length)
    half = model.config.head_dim // 2
    # In the published table each frequency stands for two neighbouring channels.
    cos, sin = (part.repeat_interleave(2, dim=1) for part in model.rotary.cpu().unbind(-1))  # (L, E)
    frequencies = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float32) / half)  # (E / 4,)
    found = {"mask": mask.masked_fill(~model.entities.may_look(), -torch.inf)[None, None]}
    for stack in ("encoder_blocks", "decoder_blocks"):
        for block in range(model.config.depth):
            name = f"{stack}.{block}.attn.rope.freqs"
            found |= {name: frequencies.clone(), f"{name}_cos": cos.clone(), f"{name}_sin": sin.clone()}
    return found


def check_tables(stored: Mapping[str, Tensor], ours: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError that names the stored tables that are not those of four cells."""
    others = [name for name, table in ours.items() if name in stored and not _alike(stored[name], table)]
    if others:
        raise ValueError(
            f"{path}: {', '.join(others)}: other tables than those of an xAR with four cells and these heads, so its "
            "weights mean something else; imgtok reads only what the published code writes"
        )


def _alike(stored: Tensor, ours: Tensor) -> bool:
    """To the precision that it is stored in."""
    if stored.shape != ours.shape or not stored.is_floating_point():
        return False
    return torch.allclose(stored.float(), ours, rtol=0.0, atol=1e-4 + torch.finfo(stored.dtype).eps)


# ---------------------------------------------------------------- writing

NOT_IN_THE_FILE = ("times", "dropout", "condition", "sampling")
"""Fields of a configuration that a published file says nothing of: they are about training, or can be chosen anew."""


def save(model: XAR, path: Path) -> None:
    """Write `model` as the published code reads it: all weights and tables by name, in a .pth or .safetensors file.

    How it was trained and its sampling settings are not in such a file. Raises ValueError for another ending,
    ConfigError for a model that the published code cannot run, OSError (a full disk) with the file as it was.
    """
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path}: an xAR is published as a file: give a name that ends in .pth or .safetensors")
    config = model.config
    for name, mine, published in (
        ("condition.kind", config.condition.kind, "class"),
        ("grid", config.grid, 16),
        ("condition.num_classes", config.num_classes, 1000),
        ("entities", config.entities, Cells(height=8, width=8)),
    ):
        if mine != published:
            raise ConfigError(f"{name}: the published code runs {published} alone, this xAR has {mine}")
    state = model.state_dict()
    tensors = {
        name: as_published(name, place.view(state)).detach().contiguous()
        for name, place in places(state, NAMES, {}).items()
    } | tables(model)
    told = config_of(tensors, path)
    for field in fields(told):
        mine = getattr(model.config, field.name)
        if field.name not in NOT_IN_THE_FILE and mine != getattr(told, field.name):
            raise ConfigError(f"{field.name}: {mine}, which the published code does not know")
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            write_tensors(tensors, temporary, {"format": "pt"})
        else:
            write_pickle(tensors, temporary)


def as_ours(published: str, value: Tensor) -> Tensor:
    """Positions are published with a batch axis in front."""
    return value[0] if published in POSITIONS else value


def as_published(published: str, value: Tensor) -> Tensor:
    """The other way round."""
    return value[None] if published in POSITIONS else value
