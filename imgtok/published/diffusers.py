"""Autoencoders in the format of diffusers: a folder with the config.json of an `AutoencoderKL` and its weights.

The suite's `VAE` holds that very class, so only the numbers of config.json are used; settings that `VAE` does not have
must be at the values that it can stand for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch

from imgtok.config import ConfigError
from imgtok.files import replacing
from imgtok.hub import CONFIG_NAME, Found
from imgtok.tokenizers.vae import VAE, VAEConfig, encoder_blocks
from imgtok.weights import check_tensors, fill, skeleton, state_of, under_prefix, write_tensors

KIND = "vae"
LOOKS_LIKE = "the folder of an AutoencoderKL of diffusers"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

FIXED = {
    "in_channels": 3,
    "out_channels": 3,
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
"""Settings of an AutoencoderKL that `VAE` does not have, at the only values that it can stand for."""
BLOCKS = ("down_block_types", "up_block_types")
"""Where the kinds of its levels stand."""
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""How diffusers once named the parts of its attention, and how it does today."""


def recognise(description: Mapping[str, Any], names: Set[str]) -> bool:
    return description.get("_class_name") == "AutoencoderKL"


def diffusers_config(
    found: Mapping[str, Any], path: Path, scaling_factor: float | None = None, default_factor: float | None = None
) -> VAEConfig:
    """The shape that diffusers' config.json of an `AutoencoderKL`, `found` at `path`, describes.

    `scaling_factor` goes before the one there, `default_factor` stands where there is none. Raises ConfigError for an
    autoencoder of another kind, or without any factor.
    """
    if found.get("_class_name") != "AutoencoderKL":
        raise ConfigError(f"{path}: _class_name: {found.get('_class_name')!r}, must be 'AutoencoderKL'")
    needed = ("latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", *BLOCKS)
    missing = [name for name in needed if name not in found]
    if missing:
        raise ConfigError(f"{path}: lacks {', '.join(missing)}; copy or download the folder again")
    if not isinstance(found["block_out_channels"], list):
        raise ConfigError(f"{path}: block_out_channels: {found['block_out_channels']!r}, must be a list of integers")
    channels = tuple(found["block_out_channels"])
    encoder_attention = found["down_block_types"] == [*encoder_blocks(len(channels), True)]
    blocks = {
        "down_block_types": [*encoder_blocks(len(channels), encoder_attention)],
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }
    for name, value in (FIXED | blocks).items():
        if found.get(name, value) != value:
            raise ConfigError(f"{path}: {name}: {found[name]!r}, imgtok can use {value!r} alone")
    factor = next((n for n in (scaling_factor, found.get("scaling_factor"), default_factor) if n is not None), None)
    if factor is None:
        raise ConfigError(f"{path}: has no scaling_factor; give it yourself, vae_scaling_factor=NUMBER")
    try:
        return VAEConfig(
            latent_channels=found["latent_channels"],
            block_channels=channels,
            layers_per_block=found["layers_per_block"],
            norm_groups=found["norm_num_groups"],
            scaling_factor=factor,
            encoder_attention=encoder_attention,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def todays_names(stored: Iterable[str]) -> dict[str, str]:
    """Diffusers' name of today -> the name in a file, for all the names in it; none is lost if it has both."""
    names = list(stored)
    found = {}
    for name in names:
        today = name
        for old, new in OLD_ATTENTION.items() if ".attentions." in name else ():
            today = today.replace(old, new)
        found[name if today in names else today] = name
    return found


def configuration(found: Found) -> VAEConfig:
    """The shape and the scale. Raises ConfigError."""
    return diffusers_config(found.config, found.path / CONFIG_NAME)


def load(
    found: Found, *, raw: bool = False, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> VAE:
    """The `AutoencoderKL` in a folder that diffusers wrote, as a `VAE` in evaluation mode.

    The scaling factor has to be given (`Found.with_config`) where there is none. Raises ConfigError for an autoencoder
    of another kind, FileNotFoundError without weights, ValueError for weights that do not fit.
    """
    config = configuration(found)
    stored = found.weights(raw=raw)
    vae = skeleton(lambda: VAE(config))
    wanted = vae.autoencoder.state_dict()
    tensors = under_prefix(stored.select(todays_names(stored)), wanted.keys())
    check_tensors(tensors.blank, wanted, stored.path, f"autoencoder that {CONFIG_NAME}")
    pairs = ((f"autoencoder.{name}", value) for name, value in tensors.items())
    return fill(vae, pairs, map_location=map_location, dtype=dtype)


def save(model: VAE, folder: Path) -> None:
    """Write `model` as diffusers reads it. Raises OSError (a full disk) with the folder as it was."""
    data = json.loads(model.autoencoder.to_json_string()) | {"scaling_factor": model.config.scaling_factor}
    with replacing(folder / CONFIG_NAME) as description, replacing(folder / WEIGHTS_NAME) as weights:
        description.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        write_tensors(state_of(model.autoencoder), weights, {"format": "pt"})
