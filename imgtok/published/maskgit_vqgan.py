"""The VQGAN under MAGE and KARL, from the file that it was published in (`vqgan.ckpt`).

Of MaskGIT's kind: 256 pixels -> codes of 256 numbers on a grid of 16 x 16, from a table of 1024. Widths, levels,
channels and codes are read off the tensors; the 32 groups of the normalisations are in no file. Names are those of
the suite's `MaskGITVQGAN`, but for the table. Files are read without running anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from imgtok.hub import Found
from imgtok.published.kl16 import count_of
from imgtok.published.names import without
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from imgtok.weights import check_tensors, fill, skeleton

KIND = "maskgit_vqgan"
LOOKS_LIKE = "a VQGAN of MaskGIT's kind like vqgan.ckpt"

LEFTOVERS = ("loss.",)
"""How the names of what only its training needed begin: the discriminator, LPIPS."""
TABLE = "quantize.embedding.weight"
TELLING = (TABLE, "encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight")
"""What a file has that is one of these."""
OTHERS = ("encoder.conv_in.bias", "quant_conv.weight", "encoder.mid.attn_1.q.weight")
"""What other VQGANs have besides."""


def published_name(name: str) -> str:
    """The published name of a parameter of `MaskGITVQGAN`."""
    return TABLE if name == "quantizer.table" else name


def recognise(description: Mapping[str, Any], names: Set[str]) -> bool:
    return not description and names >= {*TELLING} and names.isdisjoint(OTHERS)


def configuration(found: Found) -> MaskGITVQGANConfig:
    """The shape as the tensors tell it. Raises ValueError for tensors of anything else."""
    return config_of(found.weights().blank, found)


def load(
    found: Found, *, raw: bool = False, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> MaskGITVQGAN:
    """The autoencoder in a published file, in evaluation mode.

    A `scaling_factor` in the configuration of `found` is taken over. Raises ValueError for weights that are damaged,
    missing, unexpected or misshapen (all are listed).
    """
    stored = without(found.weights(raw=raw), LEFTOVERS)
    config = config_of(stored.blank, found)
    model = skeleton(lambda: MaskGITVQGAN(config))
    names = {name: published_name(name) for name in model.state_dict()}
    wanted = {names[name]: value for name, value in model.state_dict().items()}
    check_tensors(stored.blank, wanted, found.path, "VQGAN that its first and last layers")
    return fill(
        model, ((name, stored[theirs]) for name, theirs in names.items()), map_location=map_location, dtype=dtype
    )


def config_of(tensors: Mapping[str, Tensor], found: Found) -> MaskGITVQGANConfig:
    """The shape as the tensors, by their published names, tell it; `found` is the file that they are from."""
    levels = count_of(tensors, r"encoder\.down\.(\d+)\.")
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in range(levels)]
    missing = [name for name in (*firsts, TABLE) if name not in tensors]
    if missing or not levels:
        listed = ", ".join(missing or ["encoder.down.0.block.0.conv1.weight"])
        raise ValueError(f"{found.path}: not a VQGAN in the layout of vqgan.ckpt: it lacks {listed}")
    try:
        return MaskGITVQGANConfig(
            latent_channels=tensors[TABLE].shape[1],
            vocab_size=tensors[TABLE].shape[0],
            block_channels=tuple(tensors[name].shape[0] for name in firsts),
            layers_per_block=count_of(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
            scaling_factor=found.config.get("scaling_factor", 1.0),
        )
    except (ValueError, IndexError) as error:  # IndexError: a single number where a kernel should be
        raise ValueError(f"{found.path}: a VQGAN that imgtok cannot stand for: {error}") from error
