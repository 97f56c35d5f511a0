"""KL-16, the autoencoder under MAR, xAR, TokenBridge and KARL, from the file that it was published in.

256 pixels -> 16 channels of 16 x 16, times 0.2325. It is the suite's `VAE` with attention in the encoder's last
level; only names and the form of the attention's kernels (1x1 convolutions there, matrices here) differ. The
published `kl16.ckpt` is a pickle, which is read without running anything. Widths, levels and
channels are read off the tensors; the 32 groups of the normalisations and the scale are in no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from imgtok.hub import Found
from imgtok.published.names import without
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.weights import check_tensors, fill, skeleton

KIND = "vae"
LOOKS_LIKE = "an autoencoder like kl16.ckpt"

KL16 = VAEConfig(
    latent_channels=16,
    block_channels=(128, 128, 256, 256, 512),
    layers_per_block=2,
    norm_groups=32,
    scaling_factor=0.2325,
    encoder_attention=True,
)
"""The published shape: 66,456,019 parameters (the KL-16 that came with MAR, arXiv 2406.11838)."""

LEFTOVERS = ("loss.",)
"""How the names of what only its training needed begin: the discriminator, LPIPS."""

NAMES: Mapping[str, str] = {
    ".mid_block.resnets.0.": ".mid.block_1.",
    ".mid_block.attentions.0.": ".mid.attn_1.",
    ".mid_block.resnets.1.": ".mid.block_2.",
    ".down_blocks.": ".down.",
    ".resnets.": ".block.",
    ".attentions.": ".attn.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
    ".conv_norm_out.": ".norm_out.",
}
"""What stands in a name of diffusers' -> in a published one; decoder levels are also counted from the other end."""


def published_name(name: str, levels: int) -> str:
    """The published name of a parameter of `VAE.autoencoder`."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)


def is_kernel(published: str) -> bool:
    """Whether a tensor is a 1x1 convolution in the file, (out, in, 1, 1), and a matrix here."""
    return re.search(r"\.attn(\.|_1\.)(\d+\.)?(q|k|v|proj_out)\.weight$", published) is not None


TELLING = (
    "encoder.conv_in.weight",
    "encoder.down.0.block.0.conv1.weight",
    "decoder.up.0.block.0.conv1.weight",
    "quant_conv.weight",
    "post_quant_conv.weight",
)
"""What a file has that is one of these; a VQGAN has all of them too, and a codebook `quantize.*`."""


def recognise(description: Mapping[str, Any], names: Set[str]) -> bool:
    return not description and names >= {*TELLING} and not any(name.startswith("quantize.") for name in names)


def configuration(found: Found) -> VAEConfig:
    """The shape as the tensors tell it. Raises ValueError for tensors of anything else."""
    return config_of(found.weights().blank, found)


def load(
    found: Found, *, raw: bool = False, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> VAE:
    """The autoencoder in a published file, in evaluation mode.

    A `scaling_factor` in the configuration of `found` replaces KL-16's. Raises ValueError for weights that are damaged,
    missing, unexpected or misshapen (all are listed).
    """
    stored = without(found.weights(raw=raw), LEFTOVERS)
    config = config_of(stored.blank, found)
    vae = skeleton(lambda: VAE(config))
    blank = vae.autoencoder.state_dict()
    names = {name: published_name(name, len(config.block_channels)) for name in blank}
    wanted = {names[name]: as_published(names[name], value) for name, value in blank.items()}
    check_tensors(stored.blank, wanted, found.path, "KL autoencoder that its first and last layers")
    pairs = ((f"autoencoder.{name}", stored[theirs].reshape(blank[name].shape)) for name, theirs in names.items())
    return fill(vae, pairs, map_location=map_location, dtype=dtype)


def as_published(published: str, value: Tensor) -> Tensor:
    """A tensor of `VAE.autoencoder` in the shape that it has in a file."""
    return value[..., None, None] if is_kernel(published) else value


def config_of(tensors: Mapping[str, Tensor], found: Found) -> VAEConfig:
    """The shape as the tensors tell it; how far the others agree with these is for the caller to check."""
    levels = count_of(tensors, r"encoder\.down\.(\d+)\.")
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    missing = [name for name in (*firsts, "post_quant_conv.weight") if name not in tensors]
    if missing or not levels:
        listed = ", ".join(missing or ["encoder.down.0.block.0.conv1.weight"])
        held = ", ".join(list(tensors)[:3])
        raise ValueError(
            f"{found.path}: not a KL autoencoder in the layout of kl16.ckpt: it lacks {listed} (found: {held})"
        )
    try:
        return VAEConfig(
            latent_channels=tensors["post_quant_conv.weight"].shape[0],
            block_channels=tuple(tensors[name].shape[0] for name in firsts),
            layers_per_block=count_of(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
            norm_groups=KL16.norm_groups,
            scaling_factor=found.config.get("scaling_factor", KL16.scaling_factor),
            encoder_attention=f"encoder.down.{levels - 1}.attn.0.norm.weight" in tensors,
        )
    except (ValueError, IndexError) as error:  # IndexError: a single number where a kernel should be
        raise ValueError(f"{found.path}: an autoencoder that imgtok cannot stand for: {error}") from error


def count_of(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number at a place in the names; 0 without any."""
    matches = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)
