"""Published TokenBridge checkpoints: `checkpoint-last.pth` of the Hub repository Epiphqny/TokenBridge.

Tensors are matched by name, strictly in both directions; the size of the model follows from their shapes. A file holds
a training run's `model` and `model_ema`, of which the averaged one lacks the three tables that the other has beside its
weights. Tables are computed here; stored ones are compared with ours before they are left, and tell where the normal is
cut. What no file says is as in the published code: latents between -5 and 5, the order of KL-16's channels, and the
heads of encoder and decoder, which are those of the published sizes, or 64 channels wide. `save` writes the same
layout.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imgtok.config import ConfigError
from imgtok.files import replacing
from imgtok.generators.conditioning import ClassBuffer
from imgtok.generators.dimension_head import StackConfig
from imgtok.generators.tokenbridge import (
    PUBLISHED_ORDER,
    TOKENBRIDGE_SIZES,
    TokenBridge,
    TokenBridgeConfig,
    tokenbridge_size,
)
from imgtok.hub import Found
from imgtok.published.names import Place, check_telling, depth_of, joined, places
from imgtok.quantizers.normal import NormalConfig, normal_boundaries
from imgtok.weights import Weights, check_tensors, fill, skeleton, write_pickle, write_tensors

logger = logging.getLogger(__name__)

NAMES: Mapping[str, str] = {
    "class_embedding.": "class_emb.",
    "null_embedding": "fake_latent",
    "input_proj.": "z_proj.",
    "input_norm.": "z_proj_ln.",
    "encoder_positions": "encoder_pos_embed_learned",
    "decoder_positions": "decoder_pos_embed_learned",
    "output_positions": "output_pos_embed",
    "middle_proj.": "decoder_embed.",
    "head.input_proj.": "condition_proj.",
    "head.step_positions": "channel_embed",
    "head.step_conditions": "timesteps_embeddings",
    "head.blocks.": "channel_blocks.",
    "head.norm.": "channel_norm.",
    "head.final_modulation.": "channel_final.adaLN_modulation.1.",
    ".attention_norm.": ".norm1.",
    ".attention.qkv_proj.": ".attn.qkv.",
    ".attention.q_norm.": ".attn.q_norm.",
    ".attention.k_norm.": ".attn.k_norm.",
    ".attention.out_proj.": ".attn.proj.",
    ".mlp_norm.": ".norm2.",
    ".mlp.up_proj.": ".mlp.fc1.",
    ".mlp.down_proj.": ".mlp.fc2.",
    ".modulation.": ".adaLN_modulation.1.",
}
"""Ours -> published; see `imgtok.published.names`."""
BATCHED = frozenset(
    {
        "mask_token",
        "encoder_pos_embed_learned",
        "decoder_pos_embed_learned",
        "output_pos_embed",
        "channel_embed",
        "timesteps_embeddings",
    }
)
"""Published with a batch axis in front."""
BUFFERS = frozenset({"channel_mask", "reconstruction_values", "boundaries"})
"""What a published file may hold beside weights: tables that are computed here."""

KIND = "tokenbridge"
LOOKS_LIKE = "a TokenBridge like checkpoint-last.pth"
TELLING = {
    "class_emb.weight": 2,
    "z_proj.weight": 2,
    "decoder_embed.weight": 2,
    "encoder_pos_embed_learned": 3,
    "output_pos_embed": 3,
    "condition_proj.weight": 2,
    "channel_heads.0.weight": 2,
    "channel_blocks.0.attn.q_norm.weight": 1,
}
"""The tensors whose shapes tell the configuration, and their numbers of dimensions. MAR has no channel_heads."""


def recognise(description: Mapping[str, Any], names: Set[str]) -> bool:
    return not description and names >= {*TELLING}


def published_places(ours: Iterable[str], channels: int) -> dict[str, Place]:
    """Where published tensors are in a model of ours, which has the embeddings and classifiers of all steps in one."""
    fused = {
        "head.token_embedding": tuple(f"token_embeddings.{step}.weight" for step in range(channels - 1)),
        "head.readout.": tuple(f"channel_heads.{step}." for step in range(channels)),
    }
    return places(ours, NAMES, fused)


def configuration(found: Found) -> TokenBridgeConfig:
    """The configuration that the shapes of the tensors tell. Raises ValueError where they tell none."""
    return config_of(found.weights().blank, found.path)


def load(
    found: Found, *, raw: bool = False, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> TokenBridge:
    """The model in a published file, in evaluation mode; see `read`."""
    stored = found.weights(raw=raw)
    given = tables_in(stored)
    if not given and not raw:  # averaged weights lack them
        with suppress(ValueError):  # of a file that has no others
            given = tables_in(found.weights(raw=True))
            logger.info("%s: of its trained weights the tables alone were looked at", found.path)
    return read(stored, given, map_location=map_location, dtype=dtype)


def read(
    stored: Weights,
    given: Mapping[str, Tensor],
    *,
    map_location: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> TokenBridge:
    """The model whose published tensors these are, and what `tables_in` its file. Raises ValueError for tensors that do
    not fit (all of them are listed) and for tables of another quantizer.
    """
    config = config_of(stored.blank, stored.path)
    if "boundaries" in given:
        config = replace(config, quantizer=cut_of(given["boundaries"], config.quantizer, stored.path))
    found = {name: value for name, value in stored.blank.items() if name not in BUFFERS}
    model = skeleton(lambda: TokenBridge(config))
    blank = model.state_dict()
    known = published_places(blank, config.latent_channels)
    wanted = {name: as_published(name, place.view(blank)) for name, place in known.items()}
    check_tensors(found, wanted, stored.path, "TokenBridge that this file")
    check_tables(given, tables(model), stored.path)
    return fill(model, joined(known, stored, as_ours), map_location=map_location, dtype=dtype)


def config_of(stored: Mapping[str, Tensor], path: Path) -> TokenBridgeConfig:
    """The configuration that the shapes of published tensors tell. Raises ValueError where they tell none."""
    check_telling(stored, TELLING, "TokenBridge", path)
    width, channels = stored["z_proj.weight"].shape
    decoder_width, head_width = stored["decoder_embed.weight"].shape[0], stored["condition_proj.weight"].shape[0]
    length, slots = stored["output_pos_embed"].shape[1], stored["encoder_pos_embed_learned"].shape[1]
    grid = math.isqrt(length)
    depths = [depth_of(stored, stack) for stack in ("encoder_blocks", "decoder_blocks", "channel_blocks")]
    if grid**2 != length or slots <= length or not all(depths):
        raise ValueError(
            f"{path}: {slots} slots and positions, {length} of them positions, and {depths} blocks are no TokenBridge's"
        )
    size = next((name for name, sizes in TOKENBRIDGE_SIZES.items() if sizes[0] == width), None)
    named = tokenbridge_size(size) if size else TokenBridgeConfig()  # type: ignore[arg-type]
    heads = []
    for stack, wide in (("encoder", width), ("decoder", decoder_width)):
        known = size is not None and wide == width
        if not known:
            logger.warning("%s: nothing tells the heads of %s %d wide: taken as 64 wide", path, stack, wide)
        heads.append(named.encoder.num_heads if known else max(1, wide // 64))
    head_heads = head_width // max(1, stored["channel_blocks.0.attn.q_norm.weight"].shape[0])
    try:
        return replace(
            named,
            latent_channels=channels,
            grid=grid,
            condition=ClassBuffer(num_classes=len(stored["class_emb.weight"]), num_slots=slots - length),
            quantizer=NormalConfig(levels=len(stored["channel_heads.0.weight"])),
            channel_order=PUBLISHED_ORDER if channels == len(PUBLISHED_ORDER) else (),
            encoder=StackConfig(width=width, depth=depths[0], num_heads=heads[0]),
            decoder=StackConfig(width=decoder_width, depth=depths[1], num_heads=heads[1]),
            head=StackConfig(width=head_width, depth=depths[2], num_heads=head_heads),
        )
    except ValueError as error:
        raise ValueError(f"{path}: a TokenBridge that imgtok cannot stand for: {error}") from error


# ---------------------------------------------------------------- tables


def tables(model: TokenBridge) -> dict[str, Tensor]:
    """What the published code keeps beside the weights, as ours computes it."""
    quantizer, channels = model.config.quantizer, model.config.latent_channels
    return {
        "channel_mask": torch.full((channels, channels), -torch.inf).triu(1),
        "reconstruction_values": model.quantizer.levels,
        "boundaries": normal_boundaries(quantizer.levels, quantizer.cut).float(),
    }


def tables_in(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tables that are stored beside weights."""
    return {name: stored[name].float() for name in sorted(BUFFERS) if name in stored}


def cut_of(boundaries: Tensor, quantizer: NormalConfig, path: Path) -> NormalConfig:
    """The quantizer with the cut that the ends of its cells tell. Raises ValueError where they are no such table."""
    shape = (quantizer.levels + 1,)
    if boundaries.shape != shape:
        raise ValueError(f"{path}: the table boundaries is {tuple(boundaries.shape)}, must be {shape}")
    try:
        return replace(quantizer, cut=float(boundaries[-1]))
    except ValueError as error:
        raise ValueError(f"{path}: the table boundaries is another than that of a quantizer: {error}") from error


def check_tables(stored: Mapping[str, Tensor], ours: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError for a stored table that is another than ours: then ids would mean other numbers."""
    for name, table in ours.items():
        if name not in stored:
            continue
        value = stored[name]
        if value.shape != table.shape or not torch.allclose(value, table, rtol=0.0, atol=1e-4):
            raise ValueError(f"{path}: the table {name} is another than that of the published quantizer")


# ---------------------------------------------------------------- writing

NOT_IN_THE_FILE = ("least_hidden", "hidden_deviation", "head_share", "table_std", "dropout", "condition", "sampling")
"""Fields of a configuration that a published file says nothing of: they are about training, or can be chosen anew."""


def save(model: TokenBridge, path: Path) -> None:
    """Write `model` by the names of the published code, tables included, in a .pth file, which that code reads, or in a
    .safetensors file.

    How it was trained and its sampling settings are not in such a file. Raises ValueError for another ending,
    ConfigError for a model that the published code cannot run, OSError (a full disk) with the file as it was.
    """
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path}: a TokenBridge is published as a file: give a name that ends in .pth or .safetensors")
    state = model.state_dict()
    tensors = {
        name: as_published(name, place.view(state)).detach().contiguous()
        for name, place in published_places(state, model.config.latent_channels).items()
    } | tables(model)
    told = config_of(tensors, path)
    for field in fields(told):
        mine, theirs = getattr(model.config, field.name), getattr(told, field.name)
        if field.name not in NOT_IN_THE_FILE and mine != theirs:
            raise ConfigError(f"{field.name}: the published code would run {theirs}, this TokenBridge has {mine}")
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            write_tensors(tensors, temporary, {"format": "pt"})
        else:
            averaged = {name: value for name, value in tensors.items() if name not in BUFFERS}
            write_pickle({"model": tensors, "model_ema": averaged}, temporary)  # the published code reads the latter


def as_ours(published: str, value: Tensor) -> Tensor:
    """Without the batch axis that some are published with."""
    return value[0] if published in BATCHED else value


def as_published(published: str, value: Tensor) -> Tensor:
    """The other way round."""
    return value[None] if published in BATCHED else value
