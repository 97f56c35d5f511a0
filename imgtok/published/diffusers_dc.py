"""DC-AE as diffusers keeps it: a folder with the config.json of an `AutoencoderDC` and its weights.

The suite's `DCAE` holds that very class, so only the settings in config.json are used, in our names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from imgtok.config import ConfigError
from imgtok.files import replacing
from imgtok.hub import CONFIG_NAME, Found
from imgtok.published.diffusers import WEIGHTS_NAME
from imgtok.tokenizers.dcae import DCAE, SIDE, WHOLE, DCAEConfig, DCAESide
from imgtok.weights import check_tensors, fill, skeleton, state_of, write_tensors

KIND = "dcae"
LOOKS_LIKE = "the folder of an AutoencoderDC of diffusers"
FIXED = {"in_channels": 3, "decoder_conv_act_fn": "relu"}
"""Settings that `DCAE` does not have, at the only values that it can stand for."""


def recognise(description: Mapping[str, Any], names: Set[str]) -> bool:
    return description.get("_class_name") == "AutoencoderDC"


def configuration(found: Found) -> DCAEConfig:
    """The shape and the scale. Raises ConfigError for settings that are missing or that `DCAE` cannot stand for."""
    path, told = found.path / CONFIG_NAME, found.config
    needed = [*WHOLE.values(), *(f"{side}_{name}" for side in ("encoder", "decoder") for name in SIDE.values())]
    if missing := [name for name in (*needed, "scaling_factor") if told.get(name) is None]:
        remedy = "; give it yourself, vae_scaling_factor=NUMBER" if missing == ["scaling_factor"] else ""
        raise ConfigError(f"{path}: lacks {', '.join(missing)}{remedy or '; copy or download the folder again'}")
    for name, value in FIXED.items():
        if told.get(name, value) != value:
            raise ConfigError(f"{path}: {name}: {told[name]!r}, imgtok can use {value!r} alone")
    try:
        levels = len(told["decoder_block_out_channels"])
        sides = {
            side: DCAESide(**{ours: _listed(told[f"{side}_{theirs}"], levels) for ours, theirs in SIDE.items()})
            for side in ("encoder", "decoder")
        }
        whole: dict[str, Any] = {ours: told[theirs] for ours, theirs in WHOLE.items()} | sides
        whole |= {name: _listed(whole[name], levels) for name in ("norms", "activations")}
        return DCAEConfig(**whole, scaling_factor=float(told["scaling_factor"]))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _listed(value: Any, levels: int) -> tuple[Any, ...]:
    """An entry a level: one word stands for all of them, and a list for the one kernel in it. Raises ValueError for a
    list of several.
    """
    if isinstance(value, str):
        return (value,) * levels
    if several := [item for item in value if isinstance(item, list) and len(item) > 1]:
        raise ValueError(f"qkv_multiscales: {several[0]}, imgtok can use one kernel a level")
    return tuple((item or [0])[0] if isinstance(item, list) else item for item in value)


def load(
    found: Found, *, raw: bool = False, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DCAE:
    """The `AutoencoderDC` in a folder that diffusers wrote, as a `DCAE` in evaluation mode.

    Raises ConfigError for settings that it cannot stand for, FileNotFoundError without weights, ValueError for weights
    that do not fit.
    """
    config = configuration(found)
    stored = found.weights(raw=raw)
    model = skeleton(lambda: DCAE(config))
    check_tensors(stored.blank, model.autoencoder.state_dict(), stored.path, f"autoencoder that {CONFIG_NAME}")
    pairs = ((f"autoencoder.{name}", value) for name, value in stored.items())
    return fill(model, pairs, map_location=map_location, dtype=dtype)


def save(model: DCAE, folder: Path) -> None:
    """Write `model` as diffusers reads it. Raises OSError (a full disk) with the folder as it was."""
    data = json.loads(model.autoencoder.to_json_string()) | {"scaling_factor": model.config.scaling_factor}
    with replacing(folder / CONFIG_NAME) as description, replacing(folder / WEIGHTS_NAME) as weights:
        description.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        write_tensors(state_of(model.autoencoder), weights, {"format": "pt"})
