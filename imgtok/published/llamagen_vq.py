"""LlamaGen's VQ tokenizers, from the files that they were published in (`vq_ds16_c2i.pt`, `vq_ds8_c2i.pt`,
`vq_ds16_t2i.pt`).

Widths, levels, codes and their width are read off the tensors; the 32 groups of the normalisations are in no file, and
the size of images neither: it is 256 pixels, the size of the reported figures, unless the name says another one. Names
are those of the suite's `VQ`, but for the table. Files are read without running anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from imgtok.hub import Found
from imgtok.published.kl16 import count_of
from imgtok.published.names import check_telling, without
from imgtok.quantizers.vq import TableConfig
from imgtok.tokenizers.vq import VQ, VQConfig
from imgtok.weights import check_tensors, fill, skeleton

KIND = "vq"
LOOKS_LIKE = "a VQ tokenizer like vq_ds16_c2i.pt"

LEFTOVERS = ("quantize.codebook_used", "loss.")
"""How the names of what only its training needed begin: which codes were used last, the discriminator, LPIPS."""
TABLE = "quantize.embedding.weight"
TELLING = {TABLE: 2, "encoder.conv_blocks.0.res.0.conv1.weight": 4, "quant_conv.weight": 4}
"""What a file has that is one of these, and the numbers of dimensions."""


def published_name(name: str) -> str:
    """The published name of a parameter of `VQ`."""
    return TABLE if name == "quantizer.table" else name


def recognise(description: Mapping[str, Any], names: Set[str]) -> bool:
    return not description and names >= {*TELLING}


def configuration(found: Found) -> VQConfig:
    """The shape as the tensors tell it. Raises ValueError for tensors of anything else."""
    return config_of(found.weights().blank, found)


def load(
    found: Found, *, raw: bool = False, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> VQ:
    """The tokenizer in a published file, in evaluation mode.

    An `image_size` in the configuration of `found` is taken over. Raises ValueError for weights that are damaged,
    missing, unexpected or misshapen (all are listed).
    """
    stored = without(found.weights(raw=raw), LEFTOVERS)
    config = config_of(stored.blank, found)
    model = skeleton(lambda: VQ(config))
    names = {name: published_name(name) for name in model.state_dict()}
    wanted = {names[name]: value for name, value in model.state_dict().items()}
    check_tensors(stored.blank, wanted, found.path, "VQ tokenizer that its first and last layers")
    return fill(
        model, ((name, stored[theirs]) for name, theirs in names.items()), map_location=map_location, dtype=dtype
    )


def config_of(tensors: Mapping[str, Tensor], found: Found) -> VQConfig:
    """The shape as the tensors, by their published names, tell it; `found` is the file that they are from."""
    check_telling(tensors, TELLING, "VQ tokenizer", found.path)
    levels = count_of(tensors, r"encoder\.conv_blocks\.(\d+)\.")
    firsts = [f"encoder.conv_blocks.{level}.res.0.conv1.weight" for level in range(levels)]
    missing = [name for name in firsts if name not in tensors]
    if missing:
        raise ValueError(f"{found.path}: not a published VQ tokenizer: it lacks {', '.join(missing)}")
    rows, width = tensors[TABLE].shape
    try:
        return VQConfig(
            image_size=found.config.get("image_size", VQConfig.image_size),
            quantizer=TableConfig(vocab_size=rows, width=width),
            block_channels=tuple(len(tensors[name]) for name in firsts),
            layers_per_block=count_of(tensors, r"encoder\.conv_blocks\.0\.res\.(\d+)\."),
            hidden_channels=tensors["quant_conv.weight"].shape[1],
        )
    except (ValueError, TypeError) as error:  # TypeError: a number alone where a kernel should be
        raise ValueError(f"{found.path}: a VQ tokenizer that imgtok cannot stand for: {error}") from error
