"""PSNR, MAE and SSIM against direct formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from imgtok.metrics.reconstruction import mae, psnr, ssim
from imgtok.pictures import from_uint8, to_uint8


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    original = torch.randint(0, 256, (3, 3, 16, 14), generator=generator, dtype=torch.uint8)
    noise = torch.tensor([2, 20, 60]).view(3, 1, 1, 1) * torch.randn(original.shape, generator=generator)
    return (original + noise).clamp(0, 255).to(torch.uint8), original


def test_psnr_and_mae_of_a_constant_error():
    original = torch.full((2, 3, 5, 5), 100, dtype=torch.uint8)
    changed = original.clone()
    changed[1] += 10
    assert psnr(changed, original).tolist() == pytest.approx([100.0, 20 * math.log10(25.5)])
    assert mae(changed, original).tolist() == [0, 10]


def test_scores_belong_to_single_images(pair):
    for score in (psnr, mae, ssim):
        together = score(*pair)
        alone = torch.cat([score(pair[0][i : i + 1], pair[1][i : i + 1]) for i in range(3)])
        assert together.shape == (3,)
        assert together.tolist() == pytest.approx(alone.tolist(), rel=1e-12)


def slow_ssim(image: np.ndarray, original: np.ndarray) -> float:
    """Window by window, in plain loops; (H, W) each."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for top in range(image.shape[0] - 10):
        for left in range(image.shape[1] - 10):
            x, y = (p[top : top + 11, left : left + 11].astype(float) for p in (image, original))
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(values))


def test_ssim_equals_the_direct_formula(pair):
    expected = [
        np.mean([slow_ssim(a.numpy(), b.numpy()) for a, b in zip(x, y, strict=True)])
        for x, y in zip(*pair, strict=True)
    ]
    assert ssim(*pair).tolist() == pytest.approx(expected, abs=1e-9)
    assert ssim(pair[1], pair[1]).tolist() == pytest.approx([1, 1, 1], abs=1e-12)


def test_bad_pairs_are_refused(pair):
    with pytest.raises(ValueError, match="uint8"):
        psnr(pair[0].float(), pair[1])
    with pytest.raises(ValueError, match="alike"):
        mae(pair[0][:, :, 1:], pair[1])
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(pair[0][..., :10], pair[1][..., :10])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_all_grey_levels_survive_the_way_through_a_model(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels).to(dtype)), levels)
