"""Transformed convolutions: the numbers of the plain ones, where they may be used, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.layers import convolution
from imgtok.layers.convolution import (
    SiLU,
    WinogradConv2d,
    by_picture,
    convolve_frozen,
    norm_silu_conv,
    speed_up,
    transforms,
)
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


def test_only_float32_is_transformed(transformed):
    fast, x = network(), torch.randn(2, 3, 20, 24)
    speed_up(fast)
    with torch.no_grad():
        fast(x)  # several pictures at a time
        by_picture(fast, x[..., :15, :])
    for training in (False, True):
        with torch.set_grad_enabled(training):
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


# ---------------------------------------------------------------- training


def gradients(out: Tensor, x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Gradients of a weighted sum of `out`, by x and by what is not frozen."""
    torch.manual_seed(2)
    wanted = [x, *(parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad)]
    return list(torch.autograd.grad(out, wanted, torch.randn(out.shape, dtype=torch.float64).to(out)))


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for mine, exact in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, rtol=0, atol=3e-5 * float(exact.abs().max()))


def layers_of(given: int, made: int) -> tuple[nn.GroupNorm, nn.Conv2d]:
    torch.manual_seed(0)
    norm, conv = nn.GroupNorm(8, given), nn.Conv2d(given, made, 3, padding=1)
    nn.init.normal_(norm.weight)
    conv.__class__ = WinogradConv2d
    return norm, conv


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("made", "size"), [(96, (35, 30)), (64, (16, 20)), (64, (8, 9))])
def test_training_has_the_values_of_plain_layers_and_their_gradients(transformed, made, size, normed, form):
    norm, conv = layers_of(64, made)
    exact_norm, exact_conv = copy.deepcopy(norm).double(), copy.deepcopy(conv).double()
    x = torch.randn(2, 64, *size).to(memory_format=form).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    out = norm_silu_conv(norm, conv, x) if normed else conv(x)
    plain = nn.Conv2d.forward(conv, F.silu(norm(x)) if normed else x)
    assert torch.equal(out, plain), "values are not transformed"
    assert not transformed
    exact = exact_conv(F.silu(exact_norm(exact_x)) if normed else exact_x)
    found = gradients(out, x, *([norm] if normed else []), conv)
    assert_equal(found, gradients(exact, exact_x, *([exact_norm] if normed else []), exact_conv))
    assert len(transformed) == (2 if min(size) >= 16 else 0), "each picture backward"
    assert found[0].stride() == x.stride()


def test_training_an_autoencoder_has_the_values_that_it_had(transformed, monkeypatch):
    torch.manual_seed(0)
    config = MaskGITVQGANConfig(latent_channels=64, vocab_size=32, block_channels=(64, 128), layers_per_block=1)
    model, images, found = MaskGITVQGAN(config), torch.rand(2, 3, 64, 32) * 2 - 1, []
    for plainly in (False, True):
        if plainly:
            monkeypatch.setattr(convolution, "_can_transform", lambda x: False)
        made = model.forward_drawn(images)
        total = made.images.square().mean() + made.losses.total
        found.append((made.images, torch.autograd.grad(total, list(model.parameters()))))
        assert len(transformed) == 2 * (8 + 10), "gradients of both pictures, the first time"
    assert torch.equal(found[0][0], found[1][0])
    for mine, plain in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))


def test_a_frozen_convolution_is_transformed_forward_and_backward(transformed):
    conv = layers_of(64, 96)[1].requires_grad_(False)
    conv.__class__ = nn.Conv2d
    x = torch.randn(2, 64, 20, 18, requires_grad=True)
    exact_conv, exact_x = copy.deepcopy(conv).double(), x.detach().double().requires_grad_()
    out, exact = convolve_frozen(conv, x), exact_conv(exact_x)
    assert_equal([out.detach(), *gradients(out, x)], [exact.detach(), *gradients(exact, exact_x)])
    assert transformed == [(1, 64, 20, 18)] * 2 + [(1, 96, 20, 18)] * 2
    with torch.no_grad():
        assert torch.equal(convolve_frozen(conv, x), conv(x)), "only where gradients are asked for"
    assert torch.equal(convolve_frozen(conv.requires_grad_(), x), conv(x)), "only what is frozen"


def test_only_the_input_is_kept_for_the_backward_pass():
    norm, conv = layers_of(64, 64)
    x = torch.randn(1, 64, 32, 32, requires_grad=True)

    def kept(out: Tensor) -> set[int]:
        found, nodes = set(), [out.grad_fn]
        while nodes:
            node = nodes.pop()
            for name in dir(node):
                value = getattr(node, name) if name.startswith(("_saved_", "saved_tensors")) else None
                for tensor in value if isinstance(value, tuple) else (value,):
                    if isinstance(tensor, Tensor) and tensor.numel() >= x.numel():
                        found.add(tensor.data_ptr())
            nodes += [below for below, _ in node.next_functions if below is not None]
        return found

    assert kept(norm_silu_conv(norm, conv, x)) == {x.data_ptr()}
    assert len(kept(nn.Conv2d.forward(conv, F.silu(norm(x))))) == 3
    assert not kept(convolve_frozen(conv.requires_grad_(False), x))


@pytest.mark.parametrize("kind", ["normed", "plain", "frozen"])
def test_gradients_of_gradients(kind):
    norm, conv = layers_of(64, 64)
    conv.requires_grad_(kind != "frozen")
    x, found = torch.randn(1, 64, 32, 32), []
    for dtype in (torch.float32, torch.float64):
        norm, conv, at = norm.to(dtype), conv.to(dtype), x.to(dtype).requires_grad_()
        by = [at, *(parameter for parameter in conv.parameters() if parameter.requires_grad)]
        if kind == "normed":
            out = norm_silu_conv(norm, conv, at)
            by += norm.parameters()
        else:
            out = conv(at) if kind == "plain" else convolve_frozen(conv, at)
        first = torch.autograd.grad(out.square().mean(), by, create_graph=True)
        found.append(list(torch.autograd.grad(sum(each.square().sum() for each in first), by)))
    assert_equal(*found)
