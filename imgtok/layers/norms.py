"""Normalisations without surprises: statistics in float32 whatever the precision of the activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension without scale or shift, computed in float32 (FlexTok, QK norm).

    `eps` is not a detail: FlexTok's mask and null vectors have a deviation of about 0.02.
    """
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rms_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """RMS normalisation, x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32 (xAR's blocks)."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` times a learned weight (LlamaGen, xAR)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight
