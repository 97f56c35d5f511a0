"""The channels of an autoencoder's latents: which of them TokenBridge draws first (arXiv 2503.16430, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0.25
"""Frequencies up to this share of the highest one count as low."""


def low_frequency_shares(x: Tensor) -> Tensor:
    """The share (C,), float64, of the energy of maps (N, C, h, w) within a circle of `LOW` of the highest frequency, by
    a Fourier transform; the mean of a map counts as its lowest frequency.

    TokenBridge draws the channels with the largest shares first. How its published order was found is not known but for
    the idea; the cut-off is ours.
    """
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) / 0.5 for side in x.shape[-2:])
    low = torch.hypot(rows[:, None], columns) <= LOW + 1e-9
    inside = torch.zeros(x.shape[1], dtype=torch.float64)
    whole = torch.zeros_like(inside)
    for part in x.split(256):
        energy = torch.fft.fft2(part.cpu().double()).abs().square().sum(dim=0)
        inside += energy[:, low].sum(dim=1)
        whole += energy.sum(dim=(1, 2))
    return inside / whole.clamp(min=1e-30)
