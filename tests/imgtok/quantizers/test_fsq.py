from __future__ import annotations

import pytest
import torch

from imgtok.quantizers.fsq import FSQ

PUBLISHED = (8, 8, 8, 5, 5, 5)


@pytest.mark.parametrize("levels", [PUBLISHED, (7, 5, 5, 5), (4, 3, 2), (2,), (16, 16)])
def test_every_id_survives_the_round_trip(levels):
    fsq = FSQ(levels)
    ids = torch.arange(fsq.vocab_size)
    codes = fsq.ids_to_codes(ids)
    assert codes.unique(dim=0).shape[0] == fsq.vocab_size
    assert torch.equal(fsq.codes_to_ids(codes), ids)


def test_values_that_the_specification_names():
    fsq = FSQ(PUBLISHED)
    assert fsq.vocab_size == 64_000
    assert fsq.codes_to_ids(fsq(torch.zeros(6))).item() == 32_036
    assert torch.equal(fsq.ids_to_codes(torch.tensor(0)), -torch.ones(6))
    assert fsq.basis.tolist() == [1, 8, 64, 512, 2560, 12800]
    assert fsq.ids_to_codes(torch.arange(8))[:, 0].tolist() == [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75]
    assert fsq.ids_to_codes(512 * torch.arange(5))[:, 3].tolist() == [-1, -0.5, 0, 0.5, 1]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_every_level_is_reached_and_no_other(count):
    fsq = FSQ((count,))
    ids = fsq.codes_to_ids(fsq(torch.linspace(-8, 8, 4001)[:, None]))
    assert ids.unique().tolist() == list(range(count))
    assert (ids.diff() >= 0).all()


def test_extreme_inputs_stay_in_range():
    fsq = FSQ(PUBLISHED)
    z = torch.tensor([-1e30, 1e30, -torch.inf, torch.inf])[:, None].expand(-1, 6)
    assert fsq.codes_to_ids(fsq(z)).tolist() == [0, 63_999, 0, 63_999]


def test_the_gradient_is_that_of_the_tanh():
    fsq = FSQ((8, 5))
    z = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(fsq(z).sum(), z)
    expected = (1 - torch.tanh(z + fsq.shift) ** 2) * fsq.half_range / fsq.half_width
    torch.testing.assert_close(gradient, expected)


def test_half_precision_inputs_are_quantized_in_float32():
    fsq = FSQ(PUBLISHED)
    z = torch.randn(256, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = fsq(z)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, fsq(z.float()))


@pytest.mark.parametrize("bad", [-1, 24])
def test_ids_out_of_range(bad):
    with pytest.raises(ValueError, match=r"\[0, 24\)"):
        FSQ((4, 3, 2)).ids_to_codes(torch.tensor([0, bad]))


def test_no_ids_at_all():
    assert FSQ((4, 3, 2)).ids_to_codes(torch.empty(0, 4, dtype=torch.long)).shape == (0, 4, 3)


@pytest.mark.parametrize("levels", [(), (1,), (8, 0)])
def test_too_few_levels(levels):
    with pytest.raises(ValueError, match="at least 2 levels"):
        FSQ(levels)


def test_nothing_is_stored():
    assert FSQ(PUBLISHED).state_dict() == {}
