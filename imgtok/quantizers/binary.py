"""Binary quantization (the BAE of ELM, arXiv 2410.16257): each of a few numbers becomes a bit; a token is the number
that the bits write.

There is no table, so that 24 bits, 16.8 million ids, cost no more than 24 numbers. A number goes through a sigmoid,
which gives the probability s of a one. Training draws the bit with that probability, or takes the more probable of the
two; encoding always takes that, since an image has one sequence of tokens. Gradients go through the rounding as if it
were not there, and through the sigmoid. The first number's bit is the most significant, so that the digits of a GPT's
head (imgtok/generators/digits.py) are bits that lie next to each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn

from imgtok.config import NonNegativeFloat, Range, check
from imgtok.quantizers.ids import check_ids

MOST_BITS = 32


@dataclass(frozen=True, kw_only=True)
class BinaryConfig:
    """Bits; the defaults are those of the published `bae_16`."""

    kind: Literal["binary"] = "binary"
    bits: Annotated[int, Range(1, MOST_BITS)] = 16
    """Bits of a token, one for each number of a code: there are 2^bits ids."""
    training: Literal["bernoulli", "threshold"] = "bernoulli"
    """How bits are chosen in training: drawn with the probability that the sigmoid gives, or the more probable one, as
    encoding has it."""
    variance_weight: NonNegativeFloat = 0.0
    """Weight of the loss that makes choices sure, the mean of s (1 - s)."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def width(self) -> int:
        """Numbers of a code."""
        return self.bits

    @property
    def vocab_size(self) -> int:
        """Ids that there are."""
        return 1 << self.bits


class Bits(NamedTuple):
    """What became of numbers (..., n)."""

    codes: Tensor
    """Their bits (..., n), float32 zeros and ones, with the straight-through gradient."""
    ids: Tensor
    """The numbers that they write (...), int64."""
    variance: Tensor
    """The mean of s (1 - s), which is that of a bit that is drawn; a scalar, 0.25 at most."""
    entropy: Tensor
    """How evenly zeros and ones are used: the entropy, in bits, of each bit by its mean over all of them, and the mean
    of that; a scalar without a gradient, 1 at most."""


class BinaryQuantizer(nn.Module):
    """Quantizer for codes of `bits` bits: z (..., n) <-> codes (..., n) of zeros and ones <-> ids (...); in float32."""

    places: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.vocab_size = 1 << bits
        self.register_buffer("places", 1 << torch.arange(bits - 1, -1, -1), persistent=False)

    def forward(self, z: Tensor, uniforms: Tensor | None = None) -> Bits:
        """The bits of each z; drawn by `uniforms` (..., n) in [0, 1), if given, else the more probable ones."""
        with torch.autocast(z.device.type, enabled=False):
            ones = z.float().sigmoid()
            bits = z > 0 if uniforms is None else uniforms < ones
            codes = bits.float() + (ones - ones.detach())
            share = bits.float().reshape(-1, bits.shape[-1]).mean(dim=0)
            entropy = (torch.special.entr(share) + torch.special.entr(1 - share)).mean() / math.log(2)
            return Bits(codes, self._number(bits), (ones * (1 - ones)).mean(), entropy)

    def nearest(self, z: Tensor) -> Tensor:
        """Ids (...) of the more probable bits of z (..., n)."""
        return self._number(z > 0)

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids in [0, vocab_size) -> float32 codes (..., n). Raises ValueError outside that range."""
        check_ids(ids, self.vocab_size)
        return self.codes_of(ids)

    def codes_of(self, ids: Tensor) -> Tensor:
        """`ids_to_codes` of ids that are known to exist; nothing is read by the host."""
        return (ids[..., None] & self.places).ne(0).float()

    def _number(self, bits: Tensor) -> Tensor:
        return (bits * self.places).sum(dim=-1)
