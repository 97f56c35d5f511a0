"""Transformed convolutions: the numbers of the plain ones, where they may be used, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from imgtok.layers import convolution
from imgtok.layers.convolution import SiLU, WinogradConv2d, by_picture, speed_up, transforms
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig

pytestmark = pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="this torch has no NNPACK")


@pytest.fixture
def transformed(monkeypatch) -> list[torch.Size]:
    """The shapes of what is transformed meanwhile."""
    seen, original = [], torch._nnpack_spatial_convolution

    def watched(x, *rest):
        seen.append(x.shape)
        return original(x, *rest)

    monkeypatch.setattr(torch, "_nnpack_spatial_convolution", watched)
    return seen


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 96, 3, padding=1)]
    return nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(96, 64, 3, padding=1, stride=2), nn.Conv2d(64, 64, 1))


def test_the_numbers_are_the_same(transformed):
    plain, x = network(), torch.randn(3, 3, 20, 24, generator=torch.Generator().manual_seed(1))
    fast = copy.deepcopy(plain)
    assert speed_up(fast)
    assert [type(layer) for layer in fast] == [
        nn.Conv2d, nn.GroupNorm, SiLU, WinogradConv2d, SiLU, nn.Conv2d, nn.Conv2d,
    ]  # fmt: skip
    with torch.no_grad():
        found, wanted = by_picture(fast, x.clone()), plain.double()(x.double()).float()
        assert transformed == [(1, 64, 20, 24)] * 3
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
        assert torch.equal(found[1:2], by_picture(fast, x[1:2])), "a picture's numbers depend on its neighbours"


def test_only_inference_in_float32_is_transformed(transformed):
    fast, x = network(), torch.randn(2, 3, 20, 24)
    speed_up(fast)
    by_picture(fast, x).sum().backward()
    with torch.no_grad():
        fast(x)  # several pictures at a time
        by_picture(fast, x[..., :15, :])
        with torch.autocast("cpu", torch.bfloat16):
            by_picture(fast, x)
        by_picture(copy.deepcopy(fast).bfloat16(), x.bfloat16())
        assert not transformed
        assert not transforms(torch.empty(1, device="meta"))


def test_what_does_not_pay_is_left(transformed):
    few = nn.Sequential(nn.Conv2d(63, 64, 3, padding=1), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, 2, 1))
    grouped = nn.Conv2d(64, 64, 3, padding=1, groups=2), nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect")
    assert not speed_up(nn.Sequential(*few, *grouped))


def test_an_autoencoder_is_what_it_was(transformed, monkeypatch):
    torch.manual_seed(0)
    config = MaskGITVQGANConfig(latent_channels=64, vocab_size=32, block_channels=(64, 128), layers_per_block=1)
    model = MaskGITVQGAN(config).eval()
    names = list(model.state_dict())
    images = torch.rand(2, 3, 64, 32) * 2 - 1
    with torch.no_grad():
        latents, decoded = model.encode(images), model.decode(model.features(images))
        assert len(transformed) == 2 * (8 + 8 + 10), "all but those of pixels, for each picture"
        monkeypatch.setattr(convolution, "transforms", lambda x: False)
        torch.testing.assert_close(model.decode(model.features(images)), decoded, atol=1e-4, rtol=0)
        torch.testing.assert_close(model.encode(images), latents)
    assert names == list(model.state_dict())
