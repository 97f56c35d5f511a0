"""Vector quantization: nearest rows, ids there and back. Losses and gradients are in tests/parity/test_karl.py."""

from __future__ import annotations

import pytest
import torch

from imgtok.quantizers.vq import VectorQuantizer, isotropy_loss


@pytest.mark.parametrize("unit_length", [True, False])
def test_the_nearest_row(unit_length):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(20, 3, unit_length=unit_length)
    quantizer.table.data = torch.randn(20, 3) * torch.linspace(0.5, 3, 20)[:, None]
    z = torch.randn(4, 5, 3)
    one, rows = (x / x.norm(dim=-1, keepdim=True) if unit_length else x for x in (z, quantizer.table))
    wanted = torch.cdist(one, rows[None].expand(4, -1, -1)).argmin(-1)
    codes, ids, *_ = quantizer(z)
    assert torch.equal(ids, wanted)
    torch.testing.assert_close(codes, quantizer.ids_to_codes(ids))
    assert torch.equal(quantizer.nearest(quantizer.ids_to_codes(ids)), ids)


def test_float32_under_autocast():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4096, 12, unit_length=True)
    z = torch.randn(64, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes, ids, *_ = quantizer(z)
    assert codes.dtype == torch.float32
    assert torch.equal(ids, quantizer(z).ids)


def test_ids_outside_the_table():
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 20\); got 0 to 20"):
        VectorQuantizer(20, 3).ids_to_codes(torch.tensor([0, 20]))


def test_rows_are_overwritten_in_a_ring():
    quantizer = VectorQuantizer(5, 3, unit_length=True)
    vectors = torch.randn(4, 3)
    quantizer.write(vectors, 3)
    rows = quantizer.rows()
    assert torch.allclose(rows[[3, 4, 0, 1]], torch.nn.functional.normalize(vectors, dim=-1), atol=1e-6)
    assert quantizer.nearest(vectors).tolist() == [3, 4, 0, 1]


def test_directions_all_over_are_isotropic_and_those_along_a_line_are_not():
    """The deviation of each number is the same for both."""
    torch.manual_seed(0)
    everywhere = torch.nn.functional.normalize(torch.randn(4096, 1, 6), dim=-1)
    along = torch.ones(4096, 1, 6) / 6**0.5 * torch.randn(4096, 1, 1).sign()
    assert isotropy_loss(everywhere).item() == pytest.approx(0, abs=0.02)
    assert isotropy_loss(along).item() == pytest.approx(5, abs=0.05)
    assert isotropy_loss(everywhere[:1].expand(8, -1, -1)).item() == pytest.approx(1), "all alike"


@pytest.mark.parametrize("unit_length", [True, False])
def test_the_entropy_is_lowest_where_choices_are_sure_and_rows_used_alike(unit_length):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(8, 3, unit_length=unit_length)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)  # all of the same length
    quantizer.table.data = corners
    sure_and_even, one_for_all, undecided = corners, corners[:1].expand(8, -1), 1e-4 * torch.ones(8, 3)
    found = [quantizer.entropy_loss(z * 2 if unit_length else z) for z in (sure_and_even, one_for_all)]
    assert found[0].item() == pytest.approx(-torch.tensor(8.0).log().item(), abs=1e-3)
    assert found[1].item() == pytest.approx(0, abs=1e-3)
    if not unit_length:  # near the middle each row is chosen as often, but never surely
        assert quantizer.entropy_loss(undecided, temperature=10.0).item() == pytest.approx(0, abs=1e-2)


def test_the_entropy_is_of_distances_and_has_gradients_for_both():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(20, 3)
    quantizer.table.data = torch.randn(20, 3)
    z = torch.randn(4, 5, 3, requires_grad=True)
    choices = (-torch.cdist(z.flatten(0, 1), quantizer.table).square() / 0.5).softmax(dim=-1)
    mean = choices.mean(dim=0)
    wanted = -(choices * choices.log()).sum(dim=-1).mean() + (mean * (mean + 1e-5).log()).sum()
    found = quantizer.entropy_loss(z, temperature=0.5)
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert z.grad.abs().sum() > 0
    assert quantizer.table.grad.abs().sum() > 0
