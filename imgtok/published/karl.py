"""KARL, from the files that it was published in, such as `karl_small_vqgan_quantized_latents.pth`.

They are training checkpoints, pickles that also hold the optimizer and the options of the command line; the averaged
weights are taken, and nothing is run. Left out is what only training needed: the discriminators and their copies of
LPIPS, and conditions of two losses that an early version had. Any other tensor that is missing or unexpected is an
error. A file has its own autoencoder, which was trained along.

Which autoencoder, whether tokens are quantized, and all sizes are read off the tensors, but for the number of heads,
which is known for the published sizes, the 32 groups of the autoencoder's normalisations, and the scale 0.2325.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from imgtok.hub import Found
from imgtok.published import kl16, maskgit_vqgan
from imgtok.published.names import places, without
from imgtok.tokenizers.karl import KARL, KARLConfig, TransformerConfig
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.weights import check_tensors, fill, skeleton

KIND = "karl"
LOOKS_LIKE = "a published KARL like karl_small_vae_continuous_latents.pth"

HEADS: dict[tuple[int, int], int] = {(512, 8): 8, (1024, 8): 8, (768, 12): 12, (1024, 12): 16, (1024, 16): 16}
"""Width and depth of a transformer -> its number of heads, which no file says."""
LEFTOVERS = ("gan_losses.", "code_loss_embeddings", "nll_loss_embeddings")
"""How the names of what only its training needed begin."""
IMAGE_CELLS = 16
"""Cells a side of the grid that published models were trained for."""

NAMES: Mapping[str, str] = {
    "encoder.conditions": "rec_loss_embeddings",
    "encoder.slots": "latent_tokens",
    "encoder.positions": "encoder_positional_embedding",
    "encoder.patch_proj.": "patch_embed.",
    "encoder.input_norm.": "encoder_ln_pre.",
    "encoder.halting_norm.": "encoder_ln_post_halt.",
    "encoder.halting_hidden.": "halting_mlp.0.",
    "encoder.halting_out.": "halting_mlp.2.",
    "encoder.readout_norm.": "encoder_ln_post.",
    "encoder.readout.": "pre_quantizer_mlp.",
    "quantizer.table": "quantize.embedding.weight",
    "decoder.code_proj.": "decoder_embed.",
    "decoder.slot_positions": "decoder_latent_tokens_timestep_embed",
    "decoder.query": "decoder_mask_token",
    "decoder.positions": "decoder_positional_embedding",
    "decoder.input_norm.": "decoder.ln_pre.",
    "decoder.output_norm.": "decoder.ln_post.",
    "decoder.hidden.": "decoder.ffn.0.",
    "decoder.readout.": "decoder.ffn.2.",
    ".blocks.": ".transformer.",
    ".attention_norm.": ".ln_1.",
    ".mlp_norm.": ".ln_2.",
    ".attention.qkv_proj.weight": ".attn.in_proj_weight",
    ".attention.qkv_proj.bias": ".attn.in_proj_bias",
    ".attention.out_proj.": ".attn.out_proj.",
    ".mlp_in.": ".mlp.c_fc.",
    ".mlp_out.": ".mlp.c_proj.",
}
"""How a name of ours begins, or with a dot in front what stands in it -> the same of a published one."""

VAE_PREFIX, VQGAN_PREFIX = "base_tokenizer.vae.", "base_tokenizer.vqgan."
TELLING = ("rec_loss_embeddings", "latent_tokens", "halting_mlp.2.weight", "decoder_latent_tokens_timestep_embed")
"""What a file has that is one of these."""


def recognise(description: Mapping[str, Any], names: Set[str]) -> bool:
    return not description and names >= {*TELLING}


# ---------------------------------------------------------------- names


def autoencoder_names(base: VAE | MaskGITVQGAN) -> dict[str, str]:
    """Our name -> published name, of the tensors of an autoencoder alone."""
    if isinstance(base, MaskGITVQGAN):
        return {name: maskgit_vqgan.published_name(name) for name in base.state_dict()}
    levels = len(base.config.block_channels)
    return {f"autoencoder.{name}": kl16.published_name(name, levels) for name in base.autoencoder.state_dict()}


def names_of(model: KARL) -> dict[str, str]:
    """Our name -> published name, of all tensors."""
    prefix = VQGAN_PREFIX if isinstance(model.base, MaskGITVQGAN) else VAE_PREFIX
    base = {f"base.{mine}": prefix + theirs for mine, theirs in autoencoder_names(model.base).items()}
    rest = [name for name in model.state_dict() if name not in base]
    return base | {place.name: published for published, place in places(rest, NAMES, {}).items()}


def as_published(published: str, value: Tensor) -> Tensor:
    """A tensor of ours in the shape that it has in a file."""
    if published == "decoder_mask_token":
        return value[None, None]
    return kl16.as_published(published, value)


def as_ours(model: KARL, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights, without leftovers, by our names. Raises KeyError for one that is not there."""
    return _renamed(names_of(model), model.state_dict(), weights)


def autoencoder_as_ours(base: VAE | MaskGITVQGAN, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same of an autoencoder alone."""
    return _renamed(autoencoder_names(base), base.state_dict(), weights)


def _renamed(names: Mapping[str, str], state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {mine: weights[theirs].reshape(state[mine].shape) for mine, theirs in names.items()}


# ---------------------------------------------------------------- files


def configuration(found: Found) -> KARLConfig:
    """The model as the tensors tell it. Raises ValueError for tensors of anything else."""
    return config_of(found.weights().blank, found)


def load(
    found: Found, *, raw: bool = False, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> KARL:
    """The model in a published file, in evaluation mode.

    Raises ValueError for weights that are damaged, missing, unexpected or misshapen (all are listed), and for a size
    whose number of heads is not known.
    """
    stored = without(found.weights(raw=raw), LEFTOVERS)
    config = config_of(stored.blank, found)
    model = skeleton(lambda: KARL(config))
    blank, names = model.state_dict(), names_of(model)
    wanted = {theirs: as_published(theirs, blank[mine]) for mine, theirs in names.items()}
    check_tensors(stored.blank, wanted, found.path, "KARL that its first and last layers")
    pairs = ((mine, stored[theirs].reshape(blank[mine].shape)) for mine, theirs in names.items())
    return fill(model, pairs, map_location=map_location, dtype=dtype)


def config_of(tensors: Mapping[str, Tensor], found: Found) -> KARLConfig:
    """The model as the tensors, by their published names, tell it; `found` is the file that they are from."""
    try:
        base = _base_of(tensors, found)
        table = tensors.get("quantize.embedding.weight")
        conditions = len(tensors["rec_loss_embeddings"])
        if conditions != len(KARLConfig.tolerances):
            raise ValueError(f"{conditions} tolerances, where published models have {len(KARLConfig.tolerances)}")
        return KARLConfig(
            image_size=IMAGE_CELLS * base.factor,
            base=base,
            base_use="published",
            quantized=table is not None,
            vocab_size=KARLConfig.vocab_size if table is None else len(table),
            token_width=len(tensors["pre_quantizer_mlp.weight"]),
            encoder=_transformer(tensors, "encoder", "latent_tokens"),
            decoder=_transformer(tensors, "decoder", "decoder_latent_tokens_timestep_embed"),
            max_tokens=len(tensors["latent_tokens"]),
            budget=min(KARLConfig.budget, len(tensors["latent_tokens"])),
            position_grid=tensors["encoder_positional_embedding"].shape[-1],
            halting_width=len(tensors["halting_mlp.0.weight"]),
        )
    except KeyError as error:
        raise ValueError(f"{found.path}: not a whole KARL: it lacks {error}") from error
    except (ValueError, IndexError, TypeError) as error:  # IndexError, TypeError: a number where a matrix should be
        raise ValueError(f"{found.path}: a KARL that imgtok cannot stand for: {error}") from error


def _base_of(tensors: Mapping[str, Tensor], found: Found) -> VAEConfig | MaskGITVQGANConfig:
    """The autoencoder that stands in the file."""
    inside = {
        prefix: {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in (VAE_PREFIX, VQGAN_PREFIX)
    }
    if inside[VQGAN_PREFIX]:
        return maskgit_vqgan.config_of(inside[VQGAN_PREFIX], found)
    return kl16.config_of(inside[VAE_PREFIX], found)


def _transformer(tensors: Mapping[str, Tensor], part: str, table: str) -> TransformerConfig:
    width = tensors[table].shape[1]
    depth = kl16.count_of(tensors, rf"{part}\.transformer\.(\d+)\.")
    if (width, depth) not in HEADS:
        known = ", ".join(f"{width} x {depth}" for width, depth in HEADS)
        raise ValueError(
            f"its {part} has width {width} and depth {depth}, and the number of heads is in no file; it is known of "
            f"the published sizes {known}"
        )
    return TransformerConfig(width=width, depth=depth, num_heads=HEADS[width, depth])
