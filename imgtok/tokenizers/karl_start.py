"""What a KARL starts from: the published initialisation, and one for short runs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from imgtok.layers.attention import Attention
from imgtok.tokenizers.karl_networks import read_table

if TYPE_CHECKING:
    from imgtok.tokenizers.karl import KARL


@torch.no_grad()
def initialise(model: KARL) -> None:
    """Truncated normals of deviation 0.02, zero biases, Xavier for queries, keys and values (karl.md 3.9)."""
    for part in (model.encoder, model.decoder):
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, Attention):
                nn.init.xavier_uniform_(module.qkv_proj.weight)
    if model.config.initialisation == "aligned":
        align(model)


def align(model: KARL) -> None:
    """Let slots and cells see each other, tokens differ between images, and conditions between tolerances.

    The published deviation is meant for a width of 1024; in narrow transformers, and in the first thousands of steps of
    wide ones, slots hear next to nothing of the image, all images get the same tokens, and the decoder learns to do
    without. Here each slot has the position of a cell, and queries equal keys, so that like looks at like. The first
    slots face cells all over the image, whatever their number.
    """
    config = model.config
    for module in [*model.encoder.modules(), *model.decoder.modules()]:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, Attention):
            for matrix in module.qkv_proj.weight.chunk(3):
                nn.init.xavier_uniform_(matrix)
            queries, keys, _ = module.qkv_proj.weight.chunk(3)
            keys.copy_(queries)
    nn.init.xavier_uniform_(model.encoder.patch_proj.weight.flatten(1))
    facing = all_over(config.grid**2)
    facing = facing.repeat(-(-config.max_tokens // len(facing)))[: config.max_tokens]
    for part, slots in ((model.encoder, model.encoder.slots), (model.decoder, model.decoder.slot_positions)):
        nn.init.normal_(part.positions)
        slots.copy_(read_table(part.positions, config.grid)[facing])
    nn.init.normal_(model.encoder.conditions)
    nn.init.normal_(model.encoder.readout.weight, std=config.encoder.width**-0.5)
    length = config.token_width**0.5 if config.quantized else 1.0  # directions are shorter than vectors by this factor
    nn.init.normal_(model.decoder.code_proj.weight, std=0.5 * length)


def all_over(count: int) -> Tensor:
    """The numbers 0..count-1 in an order of which every beginning is spread evenly: steps by the golden section."""
    step = max(1, round(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, count) > 1:
        step += 1
    return torch.arange(count) * step % count
