"""The fast path of FlexTok (`flextok.py`): the same numbers, to rounding, with less work.

`encode` computes no more registers than are asked for and nothing that the mask forbids. `GuidedDecoder` runs the flow
with masked and null registers as one each, both branches of guidance in one pass, and all modulations computed at once.
`tests/imgtok/tokenizers/test_flextok.py` compares them with `FlexTok.encode_plainly` and `decode_plainly`.

Shapes: B batch, C H W latents, N patches, K registers, D width, n FSQ dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok import flow
from imgtok.layers.attention import Look
from imgtok.layers.norms import layer_norm
from imgtok.layers.recompute import call_block

if TYPE_CHECKING:
    from imgtok.tokenizers.flextok import Decoder, Encoder, FlexTok, Modulations

# ---------------------------------------------------------------- encoder


def encode(encoder: Encoder, latents: Tensor, num_tokens: int) -> Tensor:
    """`encoder(latents)` (B, k, n) of the first `num_tokens` registers; later ones could not change them.

    After the last block only registers are read, so only they are computed there.
    """
    x = encoder.sequence(latents, num_tokens)
    looks = encoder_looks(x.shape[1] - num_tokens, num_tokens, x.device)
    for block in encoder.blocks[:-1]:
        x = call_block(block, x, looks, recompute=encoder.recompute)
    x = call_block(encoder.blocks[-1], x, looks[-1:], looks[-1].queries, recompute=encoder.recompute)
    out: Tensor = encoder.readout(layer_norm(x))
    return out


def encoder_looks(num_patches: int, num_registers: int, device: torch.device) -> list[Look]:
    """`prefix_causal_mask` in two parts: patches among themselves, where nothing is masked, and the registers."""
    patches, registers = slice(num_patches), slice(num_patches, None)
    seen = prefix_causal_mask(num_patches, num_registers, device)[registers]
    hidden = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf)
    return [Look(patches, patches), Look(registers, slice(None), hidden)]


def prefix_causal_mask(num_patches: int, num_registers: int, device: torch.device) -> Tensor:
    """True where a query (row) sees a key: patches see patches; register r sees patches and registers 0..r."""
    mask = torch.ones(num_patches + num_registers, num_patches + num_registers, dtype=torch.bool, device=device).tril()
    mask[:num_patches, :num_patches] = True
    return mask


# ---------------------------------------------------------------- decoder


class GuidedDecoder:
    """The decoder of one `decode` call, guided away from the null condition unless by 1."""

    def __init__(
        self,
        model: FlexTok,
        codes: Tensor,
        keep_B: Tensor,
        times: Sequence[float],
        *,
        guidance: flow.Guidance,
        projected: bool,
    ) -> None:
        """Codes (B, k, n) of which the first `keep_B` of a row are meant; `times` are those of the steps.

        What the time alone decides, half of the decoder's weights, is computed here for all steps.
        """
        self.model = model
        self.guidance = guidance
        self.condition = collapsed_condition(model.decoder, codes, keep_B)
        self.null = null_condition(model.decoder, len(codes))
        self.modulations = model.decoder.modulations(torch.tensor(times, device=codes.device))
        apg = flow.AdaptiveProjectedGuidance() if projected else None
        self.combine = apg or flow.classifier_free_guidance

    def velocity(self, x: Tensor, step: int, t: float) -> Tensor:
        """The guided velocity at a step; where the scale is 1 there is no unconditional branch."""
        scale = self.guidance(t) if callable(self.guidance) else self.guidance
        conditions = [self.condition] if scale == 1 else [self.condition, self.null]
        estimates = velocities(self.model.decoder, x, conditions, self.modulations.row(step))
        estimates = [self.model.as_velocity(estimate, x, t) for estimate in estimates]
        return estimates[0] if scale == 1 else self.combine(estimates[0], estimates[1], scale)


@dataclass(frozen=True)
class Condition:
    """What the decoder is told of the images: registers, one of which may stand for several identical ones.

    Identical registers stay identical through every block, as they see the same keys. One of them with the log of
    their number added to its logits takes their place exactly, and most of the work with it.
    """

    registers: Tensor
    """(B, R, D)"""
    log_counts: Tensor | None = None
    """(B, R), the log of how many registers each stands for (-inf: none, a place that is not used); null is 1 each."""

    def attention_bias(self, num_patches: int) -> Tensor | None:
        """What is added to the logits of [patches | registers], (B, 1, 1, N + R); None is nothing."""
        if self.log_counts is None:
            return None
        return F.pad(self.log_counts, (num_patches, 0))[:, None, None]


def collapsed_condition(decoder: Decoder, codes: Tensor, keep_B: Tensor) -> Condition:
    """`decoder.condition` in max(keep) + 1 registers: those kept, and one for all that became the mask vector."""
    total, most = decoder.register_positions.shape[0], int(keep_B.max())
    if int(keep_B.min()) == total:
        return Condition(decoder.condition(codes, keep_B))
    registers = (
        decoder.code_proj(codes[:, :most].to(decoder.code_proj.weight.dtype)) + decoder.register_positions[:most]
    )
    hidden = torch.arange(most, device=codes.device) >= keep_B[:, None]
    mask = decoder.mask_vector.to(registers.dtype).expand(len(codes), 1, -1)
    log_counts = torch.zeros_like(hidden, dtype=registers.dtype).masked_fill(hidden, -torch.inf)
    masked = (total - keep_B).to(registers.dtype).log()[:, None]  # -inf where nothing is masked
    return Condition(torch.cat([registers, mask], dim=1), torch.cat([log_counts, masked], dim=1))


def null_condition(decoder: Decoder, batch: int) -> Condition:
    """The null condition of every image, in one register."""
    registers = decoder.null_vector.expand(batch, 1, -1)
    return Condition(registers, registers.new_full((batch, 1), math.log(decoder.register_positions.shape[0])))


def velocities(
    decoder: Decoder, x_BCHW: Tensor, conditions: Sequence[Condition], modulations: Modulations
) -> list[Tensor]:
    """The decoder's output under each of the conditions, in one pass, at the time of `modulations`.

    The sequences [patches | registers] lie one after the other. Layers that treat every position alike see all in one
    go, which makes better use of the weights than one pass each; attention keeps the sequences apart.
    """
    patches = decoder.patches(x_BCHW)
    num_patches = patches.shape[1]
    sequence = [part for each in conditions for part in (patches, each.registers.to(patches.dtype))]
    looks, last_looks, start = [], [], 0
    for condition in conditions:
        stop = start + num_patches + condition.registers.shape[1]
        bias, keys = condition.attention_bias(num_patches), slice(start, stop)
        looks.append(Look(keys, keys, bias))
        last_looks.append(Look(slice(start, start + num_patches), keys, bias))
        start = stop
    lengths = [part.shape[1] for part in sequence]
    out = decoder.network(torch.cat(sequence, dim=1), modulations, lengths, looks, last_looks)
    return [decoder.grid(part, x_BCHW) for part in out.split(num_patches, dim=1)]
