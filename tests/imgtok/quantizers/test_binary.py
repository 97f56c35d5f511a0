"""Binary quantization: bits, the numbers that they write, gradients, and what a mistake would change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imgtok.quantizers.binary import BinaryConfig, BinaryQuantizer


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 5, 24, 32])
def test_ids_there_and_back(bits):
    """The first number's bit is the most significant."""
    quantizer = BinaryQuantizer(bits)
    z = numbers(3, 4, bits)
    codes, ids, *_ = quantizer(z)
    assert torch.equal(codes, (z > 0).float())
    written = [int("".join(str(int(bit)) for bit in row), 2) for row in codes.flatten(0, 1)]
    assert ids.flatten().tolist() == written
    assert torch.equal(quantizer.nearest(z), ids)
    assert torch.equal(quantizer.ids_to_codes(ids), codes)
    assert quantizer.vocab_size == BinaryConfig(bits=bits).vocab_size == 2**bits
    last = torch.tensor(2**bits - 1)
    assert torch.equal(quantizer.ids_to_codes(last), torch.ones(bits))


def test_drawn_bits_come_as_often_as_the_sigmoid_says():
    """20,000 draws of each of three numbers: deviations of at most 0.0035, and four of them are allowed."""
    z = torch.tensor([-1.5, 0.0, 0.4])
    uniforms = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(1))
    drawn = BinaryQuantizer(3)(z.expand(20_000, 3), uniforms)
    torch.testing.assert_close(drawn.codes.mean(0), z.sigmoid(), atol=0.014, rtol=0)
    of_drawn = BinaryQuantizer(3).ids_to_codes(drawn.ids)
    assert torch.equal(of_drawn, drawn.codes)
    assert BinaryQuantizer(3)(z, torch.tensor([0.0, 0.999, 0.999])).codes.tolist() == [1, 0, 0]


@pytest.mark.parametrize("drawn", [True, False])
def test_gradients_go_through_the_sigmoid_as_if_nothing_were_rounded(drawn):
    z, weight = numbers(4, 6).requires_grad_(), numbers(4, 6, seed=1)
    uniforms = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) if drawn else None
    (BinaryQuantizer(6)(z, uniforms).codes * weight).sum().backward()
    ones = z.detach().sigmoid()
    torch.testing.assert_close(z.grad, weight * ones * (1 - ones))


def test_the_variance_is_of_one_sigmoid_and_falls_as_choices_become_sure():
    z = numbers(4, 6).requires_grad_()
    found = BinaryQuantizer(6)(z).variance
    torch.testing.assert_close(found, z.sigmoid().sub(0.5).square().neg().add(0.25).mean())
    found.backward()
    assert torch.equal(z.grad.sign(), -z.sign()), "it drives numbers away from 0"
    assert BinaryQuantizer(6)(torch.zeros(2, 6)).variance.item() == pytest.approx(0.25)
    assert BinaryQuantizer(6)(torch.full((2, 6), 50.0)).variance.item() == pytest.approx(0)


def test_the_entropy_says_how_evenly_bits_are_used():
    always, half, quarter = torch.ones(8), torch.tensor([1.0, -1] * 4), torch.tensor([1.0, 1, 1, -1] * 2)
    found = [BinaryQuantizer(1)(z[:, None]).entropy.item() for z in (always, half, quarter)]
    assert found == pytest.approx([0, 1, 0.8113], abs=1e-4)
    both = torch.stack([always, half], dim=-1)
    assert BinaryQuantizer(2)(both).entropy.item() == pytest.approx(0.5)


def test_float32_under_autocast_and_bits_of_half_numbers():
    quantizer, z = BinaryQuantizer(12), numbers(64, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes, ids, variance, _ = quantizer(z)
    assert codes.dtype == variance.dtype == torch.float32
    assert torch.equal(ids, quantizer.to(torch.bfloat16).nearest(z.bfloat16()))


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 8\); got 0 to 8"):
        BinaryQuantizer(3).ids_to_codes(torch.tensor([0, 8]))
    for bits in (0, 33):
        with pytest.raises(ValueError, match=rf"bits: given {bits}, must be an integer between 1 and 32"):
            BinaryConfig(bits=bits)
