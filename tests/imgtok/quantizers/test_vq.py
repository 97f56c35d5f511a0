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
