"""The blocks of FlexTok's two transformers: attention and a gated feed-forward layer, after norms without parameters.

Shapes: B batch, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from imgtok.layers.attention import Attention, Look
from imgtok.layers.feed_forward import SwiGLU
from imgtok.layers.norms import layer_norm
from imgtok.tokenizers.flextok_config import TrunkConfig


def trunk_attention(config: TrunkConfig) -> Attention:
    """Attention as FlexTok has it: normalised queries and keys, and the muP scale 8 / head width."""
    return Attention(config.width, config.width // config.head_dim, qk_norm=True, scale=8 / config.head_dim)


class EncoderBlock(nn.Module):
    """Pre-norm attention and gated feed-forward; norms without parameters, no biases."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.attention = trunk_attention(config)
        self.mlp = SwiGLU(config.width, config.mlp_hidden)

    def forward(self, x: Tensor, looks: Sequence[Look], wanted: slice | None = None) -> Tensor:
        """The positions in `wanted`, which `looks` ask for; all of them by default."""
        attended = self.attention(layer_norm(x), looks=looks)
        x = (x if wanted is None else x[:, wanted]) + attended
        return x + self.mlp(layer_norm(x))


class DecoderBlock(nn.Module):
    """The same, with shift, scale and gate from the time embedding: one set for patches, one for registers."""

    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.attention = trunk_attention(config)
        self.mlp = SwiGLU(config.width, config.mlp_hidden)
        self.modulation = nn.Linear(config.width, 12 * config.width)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        lengths: Sequence[int],
        looks: Sequence[Look],
        patches_only: bool = False,
    ) -> Tensor:
        """X (B, L, D) holds patches and registers, in stretches of these `lengths` in turn; `modulation` (B or 1, 12 D)
        is this block's row for the time.

        With `patches_only`, as `looks` must then say too, registers are looked at and not computed: nobody reads them
        after the last block.
        """
        patch_set, register_set = modulation.unflatten(-1, (2, 6, 1, -1)).unbind(1)  # (B or 1, 6, 1, D)
        gates, shifts, scales = ([patch_set[:, i], register_set[:, i]] for i in ATTENTION_CHUNKS)
        attended = self.attention(modulate(layer_norm(x), lengths, shifts, scales), looks=looks)
        if patches_only:
            x, lengths = patches_of(x, lengths), [0 if i % 2 else length for i, length in enumerate(lengths)]
        x = add_gated(x, attended, lengths, gates)
        gates, shifts, scales = ([patch_set[:, i], register_set[:, i]] for i in MLP_CHUNKS)
        return add_gated(x, self.mlp(modulate(layer_norm(x), lengths, shifts, scales)), lengths, gates)


ATTENTION_CHUNKS = (0, 2, 3)
"""Where a modulation set holds the attention's gate, shift and scale: both gates come first."""
MLP_CHUNKS = (1, 4, 5)


def patches_of(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The patches of a sequence of patches and registers in turn."""
    parts = x.split(list(lengths), dim=1)[::2]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def modulate(x: Tensor, lengths: Sequence[int], shifts: Sequence[Tensor], scales: Sequence[Tensor]) -> Tensor:
    """X * (1 + scale) + shift; stretches of x take the pair for patches and the one for registers in turn."""
    factors = [1 + scale for scale in scales]
    parts = x.split(list(lengths), dim=1)
    return torch.cat([torch.addcmul(shifts[i % 2], part, factors[i % 2]) for i, part in enumerate(parts)], dim=1)


def add_gated(x: Tensor, branch: Tensor, lengths: Sequence[int], gates: Sequence[Tensor]) -> Tensor:
    """X + gate * branch, in the same stretches."""
    pairs = zip(x.split(list(lengths), dim=1), branch.split(list(lengths), dim=1), strict=True)
    return torch.cat([torch.addcmul(part, added, gates[i % 2]) for i, (part, added) in enumerate(pairs)], dim=1)
