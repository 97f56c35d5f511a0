"""Finite scalar quantization (arXiv 2309.15505): each of a few numbers is rounded to one of L levels.

There is no codebook and no auxiliary loss; a token is the mixed-radix number of the digits, the
first dimension being the least significant. Even level counts need the half-step offset, and the
atanh shift that keeps z = 0 in the middle of its cell.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from imgtok.quantizers.ids import check_ids


class FSQ(nn.Module):
    """Quantizer for `levels` such as (8, 8, 8, 5, 5, 5): z (..., n) <-> codes (..., n) <-> ids (...)."""

    half_range: Tensor
    offset: Tensor
    shift: Tensor
    half_width: Tensor
    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ needs at least 2 levels in every dimension, not {levels}")
        counts = torch.tensor(levels)
        half_range = (counts - 1) * (1 + 1e-3) / 2
        offset = torch.where(counts % 2 == 0, 0.5, 0.0)
        basis = torch.cumprod(torch.tensor((1, *levels[:-1])), dim=0)
        self.vocab_size = math.prod(levels)
        for name, value in {
            "levels": counts,
            "half_range": half_range,
            "offset": offset,
            "shift": torch.atanh(offset / half_range),
            "half_width": (counts // 2).float(),
            "basis": basis,
        }.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Codes in [-1, 1], rounded, with the straight-through gradient; float32 whatever z is."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bound(z)
            rounded = bounded + (bounded.round() - bounded).detach()
            return rounded / self.half_width

    def bound(self, z: Tensor) -> Tensor:
        """What is rounded: z squeezed into a little more than [-L / 2, L / 2 - 1] (L even) or +-(L - 1) / 2 (L odd)."""
        return torch.tanh(z.float() + self.shift) * self.half_range - self.offset

    def codes_to_ids(self, codes: Tensor) -> Tensor:
        """Codes (..., n) -> int64 ids (...). The sum stays in integers."""
        digits = (codes.float() * self.half_width + self.half_width).round().long()
        return (digits * self.basis).sum(-1)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids in [0, vocab_size) -> float32 codes (..., n). Raises ValueError outside that range."""
        check_ids(ids, self.vocab_size)
        digits = (ids[..., None] // self.basis) % self.levels
        return (digits - self.half_width) / self.half_width
