"""FlexTok as it was published: its checkpoints read into our `FlexTok`, and ours written as it reads them.

A checkpoint is a configuration (`imgtok.published.flextok_template`) and tensors. The names differ, positions are
channels first, and where we have one matrix for queries, keys and values they have three: a published
tensor is a block of rows of one of ours, its `Place`: loading puts these rows together, and `save` writes them out.
Their fixed position tables are stored, ours are computed: stored ones are compared before they are left.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imgtok.config import ConfigError
from imgtok.files import replacing
from imgtok.hub import CONFIG_NAME, WEIGHTS_NAME, Found
from imgtok.layers.positions import sincos_2d
from imgtok.published import diffusers
from imgtok.published.diffusers import todays_names
from imgtok.published.flextok_config import AUTOENCODER_FOLDER, PUBLISHED_VAE, our_config, write_config
from imgtok.published.flextok_template import DESCRIPTION, ROOTS, read_numbers
from imgtok.published.names import Place, places
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokenizers.vae import VAEConfig
from imgtok.weights import Weights, check_tensors, fill, skeleton, write_tensors

logger = logging.getLogger(__name__)

KIND = "flextok"
LOOKS_LIKE = "a published FlexTok"

# ---------------------------------------------------------------- sizes

SIZES: Mapping[str, tuple[int, int]] = {"d12-d12": (12, 12), "d18-d18": (18, 18), "d18-d28": (18, 28)}
"""Depth of the encoder and of the decoder of the published models (arXiv 2502.13967)."""


def sized_config(size: str, vae: VAEConfig | None = None) -> FlexTokConfig:
    """The published model of a size, such as "d18-d28": width 64 x depth, on 16 latent channels of 256 pixels.

    `vae` is the autoencoder below; the default has the published shape and no scaling factor of its own,
    since that number is known from the checkpoints alone. Raises ValueError for another size.
    """
    if size not in SIZES:
        raise ValueError(f"size: given {size!r}, must be one of {', '.join(SIZES)}")
    encoder, decoder = (TrunkConfig(width=64 * depth, depth=depth) for depth in SIZES[size])
    return FlexTokConfig(encoder=encoder, decoder=decoder, vae=vae or PUBLISHED_VAE)


# ---------------------------------------------------------------- names of parameters

NAMES: Mapping[str, str] = {
    "vae.autoencoder.": "vae.vae.",
    "encoder.patch_proj.": "encoder.module_dict.enc_patch_emb.patch_proj.",
    "encoder.positions": "encoder.module_dict.enc_posemb_module.posembs",
    "encoder.registers": "encoder.module_dict.enc_register_module.registers",
    "encoder.blocks.": "encoder.module_dict.enc_transformer.blocks.",
    "encoder.readout.": "encoder.module_dict.enc_to_latents.proj.",
    "decoder.code_proj.": "decoder.module_dict.dec_from_latents.proj.",
    "decoder.register_positions": "decoder.module_dict.dec_registers_posemb_module.posembs",
    "decoder.mask_vector": "decoder.module_dict.dec_nested_dropout.dropout_mask_token",
    "decoder.null_vector": "decoder.module_dict.dec_latent_dropout.nullcond",
    "decoder.patch_proj.": "decoder.module_dict.dec_noise_patch_emb.patch_proj.",
    "decoder.positions": "decoder.module_dict.dec_patches_posemb_module.posembs",
    "decoder.time_mlp.": "decoder.module_dict.dec_time_embedder.mlp.",
    "decoder.blocks.": "decoder.module_dict.dec_transformer.blocks.",
    "decoder.readout_modulation.": "decoder.module_dict.dec_to_patches.adaLN_modulation.1.",
    "decoder.readout.": "decoder.module_dict.dec_to_patches.proj.",
    ".modulation.": ".adaLN_modulation.1.",
    ".attention.out_proj.": ".attn.proj.",
    ".mlp.down_proj.": ".mlp.fc2.",
}
"""How a name of ours begins, or with a dot in front what stands in it -> the same in a published name."""

FUSED: Mapping[str, tuple[str, ...]] = {
    ".attention.qkv_proj.": (".attn.wq.", ".attn.wk.", ".attn.wv."),
    ".mlp.gate_up_proj.": (".mlp.fc1.", ".mlp.fc3."),
}
"""A matrix of ours -> the published ones whose rows it holds, from top to bottom."""

TABLES = ("encoder.positions", "decoder.positions")
REGISTER_POSITIONS = NAMES["decoder.register_positions"]


def flextok_places(ours: Iterable[str]) -> dict[str, Place]:
    return places(ours, NAMES, FUSED)


def as_ours(published: str, value: Tensor) -> Tensor:
    """Positions are published channels first: registers (1, 1, D, K), tables (1, D, h, w). Ours end in D."""
    if published == REGISTER_POSITIONS:
        return value[0, 0].T
    return value[0].permute(1, 2, 0) if published.endswith(".posembs") else value


def as_published(published: str, value: Tensor) -> Tensor:
    """The other way round."""
    if published == REGISTER_POSITIONS:
        return value.T[None, None]
    return value.permute(2, 0, 1)[None] if published.endswith(".posembs") else value


def _tensors(model: FlexTok) -> dict[str, Tensor]:
    """The model's state, and its position tables even where they are fixed and not saved by us."""
    tables = {"encoder.positions": model.encoder.positions, "decoder.positions": model.decoder.positions}
    return {**tables, **model.state_dict()}


# ---------------------------------------------------------------- checkpoints


def recognise(description: Mapping[str, Any], names: Set[str]) -> bool:
    if description:
        return "kind" not in description and not description.keys().isdisjoint(DESCRIPTION)
    return names >= {*TELLING}


def configuration(found: Found) -> FlexTokConfig:
    """What its config.json, or the header of its lone file, describes. Raises ConfigError."""
    numbers, source = _numbers(found, None if found.path.is_dir() else found.weights())
    return our_config(numbers, source)


def load(
    found: Found, *, raw: bool = False, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> FlexTok:
    """The published FlexTok in a folder, or in a lone .safetensors file whose header describes it.

    The stored position tables are taken for ours where they are the sine-cosine table; if one
    is not, both become learned positions with the stored values. Raises FileNotFoundError, ConfigError (the
    description) or ValueError (the weights; every missing, unexpected and misshapen tensor is listed).
    """
    whole = found.weights(raw=raw)
    numbers, source = _numbers(found, whole)
    config = our_config(numbers, source)
    stored = whole.select(
        todays_names(name for name in whole if name != TRAINING_ONLY or not numbers["learnable_logvar"])
    )
    model = skeleton(lambda: FlexTok(config))
    shapes = _tensors(model)
    wanted = {name: as_published(name, place.view(shapes)) for name, place in flextok_places(shapes).items()}
    described = "its header" if found.path.is_file() else source.name
    check_tensors(stored.blank, wanted, whole.path, f"FlexTok that {described}")
    if not all(_is_sincos(stored[NAMES[name]]) for name in TABLES):
        logger.warning("%s: its position tables are not the sine-cosine table: loaded as learned positions", whole.path)
        learned = replace(config, short_runs=replace(config.short_runs, positions="learned"))
        model = skeleton(lambda: FlexTok(learned))
    return fill(model, _ours(model.state_dict(), stored), map_location=map_location, dtype=dtype)


def _ours(names: Iterable[str], stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of ours, put together of the rows that published ones hold."""
    parts: dict[str, list[str]] = {}
    for published, place in flextok_places(names).items():
        parts.setdefault(place.name, []).append(published)
    for name, blocks in parts.items():
        rows = [as_ours(published, stored[published]) for published in blocks]
        yield name, rows[0] if len(rows) == 1 else torch.cat(rows)


def _numbers(found: Found, stored: Weights | None) -> tuple[dict[str, Any], Path]:
    """What the description says, and the file that it is in."""
    if found.path.is_dir():
        source = found.path / CONFIG_NAME
        return read_numbers(found.config, source), source
    assert stored is not None
    return read_numbers(_header(stored.metadata, found.path), found.path), found.path


TELLING = (
    "encoder.module_dict.enc_register_module.registers",
    "encoder.module_dict.enc_to_latents.proj.weight",
    "decoder.module_dict.dec_from_latents.proj.weight",
    "decoder.module_dict.dec_to_patches.proj.weight",
)
"""What a lone file has that is one of these."""
TRAINING_ONLY = "vae.logvar"
"""A parameter of the published autoencoder's loss, stored where `learnable_logvar` is on."""


def _is_sincos(table: Tensor) -> bool:
    """Whether a stored table (1, D, h, w) is the sine-cosine table, to the precision that it is stored in."""
    ours = sincos_2d(*table.shape[1:]).permute(2, 0, 1)[None]
    return bool((table.float() - ours).abs().max() <= 1e-4 + torch.finfo(table.dtype).eps)


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The description in a file's header, where every entry is text: a Python literal, or JSON."""
    if not DESCRIPTION.keys() & metadata.keys():
        found = ", ".join(metadata) or "nothing"
        raise ConfigError(
            f"{path}: its header does not describe a published FlexTok (found: {found}); "
            f"give the folder that holds it and its {CONFIG_NAME}"
        )
    data: dict[str, Any] = {}
    for name, text in metadata.items():
        if name in DESCRIPTION:
            data[name] = _literal(text, name, path)
        elif name != "format":  # what other programs write; it says that the tensors are PyTorch's
            data[name] = text
    return data


def _literal(text: str, name: str, path: Path) -> Any:
    for parse in (json.loads, ast.literal_eval):  # neither runs anything
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise ConfigError(f"{path}: {name}: the header's text is neither JSON nor a Python literal: {text[:60]!r}")


def save(model: FlexTok, folder: Path) -> None:
    """Write `model` as the published code reads it: config.json, and model.safetensors with the same in its header.

    All tensors are there in its names and shapes, the fixed tables too. An autoencoder of another shape than
    the published one also goes to `vae/`, in the layout of diffusers: start the published code in `folder`
    then. Raises ConfigError for a model that the published code cannot run, OSError (a full disk) with the
    files as they were.
    """
    data = write_config(model.config)
    ours = _tensors(model)
    tensors = {
        name: as_published(name, place.view(ours)).detach().contiguous() for name, place in flextok_places(ours).items()
    }
    header = {"_target_": ROOTS[0]} | {name: str(entry) for name, entry in data.items()}
    if data["vae"]["hf_hub_path"] is not None:
        assert model.vae is not None
        diffusers.save(model.vae, folder / AUTOENCODER_FOLDER)
    with replacing(folder / CONFIG_NAME) as description, replacing(folder / WEIGHTS_NAME) as weights:
        description.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        write_tensors(tensors, weights, header)
