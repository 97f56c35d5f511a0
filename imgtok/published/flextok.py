"""FlexTok as it was published: its checkpoints read into our `FlexTok`, and ours written as it reads them.

A checkpoint is a configuration (`imgtok.published.flextok_config`) and tensors. The names differ, positions are
channels first, and where we have one matrix for queries, keys and values they have three: a published
tensor is a block of rows of one of ours, its `Place`. `places` gives that map for any model; loading
copies each tensor from the mapped file into its rows, and `save` writes the same rows out again.
Their fixed position tables are stored, ours are computed: stored ones are compared before they are left.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from imgtok import hub
from imgtok.config import ConfigError
from imgtok.files import replacing
from imgtok.layers.positions import sincos_2d
from imgtok.published.flextok_config import (
    AUTOENCODER_FOLDER,
    DESCRIPTION,
    PUBLISHED_VAE,
    ROOTS,
    our_config,
    read_numbers,
    write_config,
)
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokenizers.vae import DIFFUSERS_WEIGHTS, VAE, VAEConfig, todays_names

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------- sizes

SIZES: Mapping[str, tuple[int, int]] = {"d12-d12": (12, 12), "d18-d18": (18, 18), "d18-d28": (18, 28)}
"""Depth of the encoder and of the decoder of the published models (section 1)."""


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


@dataclass(frozen=True)
class Place:
    """Where a published parameter lives in our model: one of `parts` equal blocks of rows of a tensor."""

    name: str
    part: int = 0
    parts: int = 1

    def view(self, ours: Mapping[str, Tensor]) -> Tensor:
        """These rows of `ours`, by name: writable, and gradients are looked up the same way."""
        return ours[self.name].chunk(self.parts)[self.part]


def places(
    ours: Iterable[str], names: Mapping[str, str] = NAMES, fused: Mapping[str, tuple[str, ...]] = FUSED
) -> dict[str, Place]:
    """Published name -> place, for all the tensors of ours that are named."""
    return {published: place for name in ours for published, place in _published_names(name, names, fused)}


def _published_names(
    name: str, names: Mapping[str, str], fused: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, Place]]:
    published = name
    for mine, theirs in names.items():
        if mine.startswith("."):
            published = published.replace(mine, theirs)
        elif name.startswith(mine):
            published = theirs + published.removeprefix(mine)
    for mine, parts in fused.items():
        if mine in published:
            for part, theirs in enumerate(parts):
                yield published.replace(mine, theirs), Place(name, part, len(parts))
            return
    yield published, Place(name)


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


def load(path: Path, map_location: str | torch.device = "cpu") -> FlexTok:
    """The published FlexTok in a folder, or in a lone .safetensors file whose header describes it.

    The file is mapped into memory, never read whole: each tensor goes from it straight to its rows of ours,
    as float32. The stored position tables are taken for ours where they are the sine-cosine table; if one
    is not, both become learned positions with the stored values. Raises FileNotFoundError, ConfigError (the
    description) or ValueError (the weights; every missing, unexpected and misshapen tensor is listed).
    """
    weights = path / hub.WEIGHTS_NAME if path.is_dir() else path
    if not weights.is_file():
        raise FileNotFoundError(f"{path} has a {hub.CONFIG_NAME} but no {hub.WEIGHTS_NAME}; copy or download it")
    try:
        with safe_open(weights, framework="pt") as file:
            return _load(file, weights, path, map_location)
    except SafetensorError as error:
        raise hub.damaged(weights, error) from error


def _load(file: Any, weights: Path, path: Path, map_location: str | torch.device) -> FlexTok:
    source = path / hub.CONFIG_NAME if path.is_dir() else weights
    data = hub.read_json(source) if path.is_dir() else _header(file.metadata() or {}, weights)
    numbers = read_numbers(data, source)
    config = our_config(numbers, source)
    with torch.device("meta"):  # shapes alone, so that a mistake is found before any number is read
        blank = FlexTok(config)
    shapes = _tensors(blank)
    wanted = places(shapes)
    stored = todays_names(  # name -> name in the file
        name for name in sorted(file.keys()) if name != TRAINING_ONLY or not numbers["learnable_logvar"]
    )
    hub.check_tensors(
        {name: torch.empty(file.get_slice(old).get_shape(), device="meta") for name, old in stored.items()},
        {name: as_published(name, place.view(shapes)) for name, place in wanted.items()},
        weights,
        f"FlexTok that {'its header' if source == weights else source.name}",
    )
    whole = [name for name in stored.values() if not file.get_slice(name).get_dtype().startswith(("F", "BF"))]
    if whole:
        raise ValueError(f"{weights}: {', '.join(sorted(whole))}: not floating-point numbers")
    tables = {NAMES[name]: file.get_tensor(NAMES[name]) for name in TABLES}
    if not all(_is_sincos(table) for table in tables.values()):
        logger.warning("%s: its position tables are not the sine-cosine table: loaded as learned positions", weights)
        config = replace(config, positions="learned")
    with torch.random.fork_rng(devices=[]):  # the first weights are overwritten: leave the caller's RNG alone
        model = FlexTok(config)
    state = model.state_dict()
    for name, place in places(state).items():
        place.view(state).copy_(as_ours(name, file.get_tensor(stored[name])))
    return model.to(map_location).eval()


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
            f"give the folder that holds it and its {hub.CONFIG_NAME}"
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
    tensors = {name: as_published(name, place.view(ours)).detach().contiguous() for name, place in places(ours).items()}
    header = {"_target_": ROOTS[0]} | {name: str(entry) for name, entry in data.items()}
    if data["vae"]["hf_hub_path"] is not None:
        assert model.vae is not None
        _save_autoencoder(model.vae, folder / AUTOENCODER_FOLDER)
    with replacing(folder / hub.CONFIG_NAME) as description, replacing(folder / hub.WEIGHTS_NAME) as weights:
        description.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        hub.write_tensors(tensors, weights, header)


def _save_autoencoder(vae: VAE, folder: Path) -> None:
    """As diffusers does, whose own method would leave half a file on a full disk, and another scaling factor."""
    data = json.loads(vae.autoencoder.to_json_string()) | {"scaling_factor": vae.config.scaling_factor}
    state = {name: value.detach().contiguous() for name, value in vae.autoencoder.state_dict().items()}
    with (
        replacing(folder / hub.CONFIG_NAME) as description,
        replacing(folder / DIFFUSERS_WEIGHTS) as weights,
    ):
        description.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        hub.write_tensors(state, weights, {"format": "pt"})
