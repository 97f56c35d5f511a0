"""PSNR, mean absolute error and SSIM of reconstructions, one value for each image.

Both sides are uint8 images (B, 3, H, W): what is scored is what a file would hold. A data set's score is the mean of
the images' scores (for PSNR that is not the PSNR of the mean error).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

PSNR_OF_EQUAL_IMAGES = 100.0
"""dB; the true value is infinite, which no mean survives."""

SSIM_WINDOW = 11
"""Pixels a side of the windows that SSIM compares."""

_SIGMA = 1.5


def psnr(images: Tensor, originals: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (peak 255), (B,); equal images count as 100 dB."""
    first, second = _pair(images, originals)
    error = (first - second).square().mean(dim=(1, 2, 3))
    decibels = 10 * torch.log10(255.0**2 / error)
    return torch.where(error == 0, torch.full_like(error, PSNR_OF_EQUAL_IMAGES), decibels)


def mae(images: Tensor, originals: Tensor) -> Tensor:
    """Mean absolute error in grey levels, 0 to 255, (B,)."""
    first, second = _pair(images, originals)
    return (first - second).abs().mean(dim=(1, 2, 3))


def ssim(images: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), (B,): Gaussian window of 11 and deviation 1.5, range 255.

    The mean over channels and the windows that lie inside the image. Raises ValueError below 11 pixels a side.
    """
    first, second = _pair(images, originals)
    if min(first.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {tuple(first.shape[-2:])}")
    mean_1, mean_2 = _blur(first), _blur(second)
    variance_1 = _blur(first * first) - mean_1 * mean_1
    variance_2 = _blur(second * second) - mean_2 * mean_2
    covariance = _blur(first * second) - mean_1 * mean_2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_1 * mean_2 + c1) / (mean_1 * mean_1 + mean_2 * mean_2 + c1)
    structure = (2 * covariance + c2) / (variance_1 + variance_2 + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


class PixelScores:
    """psnr, ssim and mae, whichever of them are wanted: a judge of pairs (see `imgtok.metrics.scorers.PairJudge`)."""

    FUNCTIONS: ClassVar = {"psnr": psnr, "ssim": ssim, "mae": mae}
    protocol = "uint8, mean over images"

    def __init__(self, metrics: Collection[str], device: torch.device | None = None) -> None:
        """Computes on `device`: on a CPU, SSIM of large images takes longer than decoding them elsewhere."""
        self.keys = tuple(key for key in self.FUNCTIONS if key in metrics)
        self.smallest = {"ssim": SSIM_WINDOW} if "ssim" in metrics else {}
        self._device = device or torch.device("cpu")

    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        """(B, len(keys)); both uint8 (B, 3, H, W)."""
        pair = images.to(self._device), originals.to(self._device)
        return torch.stack([self.FUNCTIONS[key](*pair) for key in self.keys], dim=1)


def _blur(x: Tensor) -> Tensor:
    """The window's weighted means, rows then columns, without padding."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = (-(offsets**2) / (2 * _SIGMA**2)).exp()
    weights = weights / weights.sum()
    flat = x.flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return flat.view(*x.shape[:2], *flat.shape[-2:])


def _pair(images: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != originals.shape or images.ndim != 4:
        shapes = f"{tuple(images.shape)} and {tuple(originals.shape)}"
        raise ValueError(f"images and originals must be (B, C, H, W) alike, got {shapes}")
    if images.dtype != torch.uint8 or originals.dtype != torch.uint8:
        raise ValueError(f"images and originals must be uint8 (use to_uint8), got {images.dtype} and {originals.dtype}")
    # Variances are differences of squares up to 65,025, hence float64; Apple's GPUs have none.
    dtype = torch.float32 if images.device.type == "mps" else torch.float64
    return images.to(dtype), originals.to(images.device, dtype)
