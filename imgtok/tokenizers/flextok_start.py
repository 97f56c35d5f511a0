"""What a FlexTok starts from: the published initialisation, that of short runs, and the widths that muP asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from imgtok.layers.mup import note_width

if TYPE_CHECKING:
    from imgtok.tokenizers.flextok import FlexTok


@torch.no_grad()
def initialise(model: FlexTok) -> None:
    """Xavier for matrices; zero for biases, modulation and readouts; 0.02 for vectors."""
    for part in (model.encoder, model.decoder):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    for block in blocks_of(model):  # q, k, v and gate, up are matrices of their own, though they lie in one
        for fused, count in ((block.attention.qkv_proj, 3), (block.mlp.gate_up_proj, 2)):
            for matrix in fused.weight.chunk(count):
                nn.init.xavier_uniform_(matrix)
    modulations: list[Any] = [block.modulation for block in model.decoder.blocks]
    for linear in (*modulations, model.decoder.readout_modulation, model.decoder.readout):
        nn.init.zeros_(linear.weight)
    nn.init.zeros_(model.encoder.readout.weight)
    for vector in vectors_of(model):
        nn.init.trunc_normal_(vector, std=0.02, a=-0.04, b=0.04)
    if model.config.short_runs.initialisation == "aligned":
        align(model, modulations)


def align(model: FlexTok, modulations: Sequence[nn.Linear]) -> None:
    """Registers and patches that see each other, open gates, codes that use their levels.

    From the published start all tokens are alike and reach no patch until the gates have grown. Here register r has
    the position of patch r * N / K, and queries equal keys, so that like looks at like.
    """
    patches = math.prod(model.config.grid)
    facing = torch.arange(model.num_tokens) * patches // model.num_tokens
    for part, registers in (
        (model.encoder, model.encoder.registers),
        (model.decoder, model.decoder.register_positions),
    ):
        nn.init.normal_(part.positions)
        registers.copy_(part.positions.flatten(0, 1)[facing])
    for block in blocks_of(model):
        # what was measured in docs/quickstart.md started with the bound of the fused matrices, which is smaller
        for fused, count in ((block.attention.qkv_proj, 3), (block.mlp.gate_up_proj, 2)):
            inputs, outputs = fused.in_features, fused.out_features
            fused.weight.mul_(((inputs + outputs / count) / (inputs + outputs)) ** 0.5)
        queries, keys, _ = block.attention.qkv_proj.weight.chunk(3)
        keys.copy_(queries)
    for vector in (model.decoder.mask_vector, model.decoder.null_vector):
        nn.init.normal_(vector, std=0.5)
    nn.init.normal_(model.decoder.code_proj.weight, std=0.5)
    nn.init.normal_(model.encoder.readout.weight, std=model.config.encoder.width**-0.5)
    for linear in modulations:
        nn.init.ones_(linear.bias.unflatten(0, (2, 6, -1))[:, :2])


def note_widths(model: FlexTok) -> None:
    """For muP: matrices that read a trunk's width. Those that read latents, codes or time features do not."""
    encoder, decoder = model.encoder, model.decoder
    note_width(model.config.encoder.width, encoder.blocks, encoder.readout)
    hidden = (decoder.blocks, decoder.time_mlp[2], decoder.readout_modulation, decoder.readout)
    note_width(model.config.decoder.width, *hidden)


def blocks_of(model: FlexTok) -> list[Any]:
    """The blocks of both trunks, in order."""
    return [*model.encoder.blocks, *model.decoder.blocks]


def vectors_of(model: FlexTok) -> list[nn.Parameter]:
    """The learned vectors that are added or stand in for something: registers, positions, mask, null."""
    encoder, decoder = model.encoder, model.decoder
    vectors = [encoder.registers, decoder.register_positions, decoder.mask_vector, decoder.null_vector]
    positions = (encoder.positions, decoder.positions)
    return vectors + [table for table in positions if isinstance(table, nn.Parameter)]
