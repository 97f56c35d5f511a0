"""Decoders of ordered tokens at two lengths: what a prefix does to their features should be what all tokens do.

NesTok (2026), loss 2: the decoder's features under the first r tokens are drawn to those under all K of the same pass,
and these are the target, so that no gradient reaches them. No other network teaches.

Shapes: B images, N patches, K registers, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-3
"""Norms below this count as this: vectors near zero, which gates that start shut may leave, have no direction."""


def features(sequence: Tensor, count: int, keep_B: Tensor) -> Tensor:
    """[mean of the registers that carry a token | patches] (B, 1 + N, D), of a sequence (B, N + K, D) of N patches and
    K = `count` registers, of which the first `keep_B` carry one. The others are one mask vector, and left out.
    """
    patches, registers = sequence.float().split([sequence.shape[1] - count, count], dim=1)
    shown = (torch.arange(count, device=sequence.device) < keep_B[:, None]).to(registers.dtype)
    mean = torch.einsum("bkd,bk->bd", registers, shown) / keep_B[:, None]
    return torch.cat([mean[:, None], patches], dim=1)


def alignment(prefix: Tensor, whole: Tensor) -> Tensor:
    """One less the mean cosine of an image's features under a prefix and under all tokens, (B,) in 0..2.

    Both are (B, 1 + N, D); `whole` is the target, and gets no gradient.
    """
    return 1 - F.cosine_similarity(prefix, whole.detach(), dim=-1, eps=SMALLEST).mean(dim=1)
