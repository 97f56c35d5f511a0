"""The fast path of FlexTok (`imgtok/tokenizers/flextok.py`): the same numbers, to rounding, with less work.

Shapes: B batch, N patches, K registers, D width, T times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok.layers.attention import Look

# ---------------------------------------------------------------- encoder


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


@dataclass(frozen=True)
class Packing:
    """Several sequences [patches | registers] one behind the other, as guidance needs two of them.

    Layers that treat every position alike see all in one go, which makes better use of the weights than one pass each;
    attention keeps the sequences apart.
    """

    num_patches: int
    num_registers: tuple[int, ...]
    biases: tuple[Tensor | None, ...]
    """What is added to the attention logits of each sequence."""

    @property
    def lengths(self) -> list[int]:
        """Patches, registers, patches, registers, and so on."""
        return [length for count in self.num_registers for length in (self.num_patches, count)]

    def looks(self, patches_only: bool) -> list[Look]:
        """Within each sequence everything looks at everything."""
        looks, start = [], 0
        for count, bias in zip(self.num_registers, self.biases, strict=True):
            patches, stop = start + self.num_patches, start + self.num_patches + count
            looks.append(Look(slice(start, patches if patches_only else stop), slice(start, stop), bias))
            start = stop
        return looks

    def patches(self, x: Tensor) -> Tensor:
        """The patches of all sequences."""
        parts = x.split(self.lengths, dim=1)[::2]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def without_registers(self) -> Packing:
        return replace(self, num_registers=(0,) * len(self.num_registers))


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


@dataclass(frozen=True)
class Modulations:
    """What the times do to each block, and to the readout; T rows each."""

    blocks: Sequence[Tensor]
    readout: Tensor

    def row(self, index: int) -> Modulations:
        """One time's, as a batch of one."""
        return Modulations([rows[index : index + 1] for rows in self.blocks], self.readout[index : index + 1])
