from __future__ import annotations

import pytest
import torch

from imgtok.metrics import precision_recall as module
from imgtok.metrics.precision_recall import precision_recall


def direct(generated: torch.Tensor, real: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """From the definition, one image at a time, in float64."""

    def share_inside(points, centres):
        inside = 0
        for point in points:
            for centre in centres:
                radius = (centres - centre).norm(dim=1).sort().values[k]
                if (point - centre).norm() <= radius:
                    inside += 1
                    break
        return inside / len(points)

    generated, real = generated.double(), real.double()
    return share_inside(generated, real), share_inside(real, generated)


@pytest.mark.parametrize("in_parts", [False, True])
def test_equals_the_definition_and_knows_its_sides(monkeypatch, in_parts):
    monkeypatch.setattr(module, "_KEEP_ALL_DISTANCES", 0 if in_parts else 10_000)
    generator = torch.Generator().manual_seed(0)
    generated = torch.randn(40, 6, generator=generator) * 0.5  # a part of the real spread: precise, but misses much
    real = torch.randn(50, 6, generator=generator)
    found = precision_recall(generated, real)
    assert found == pytest.approx(direct(generated, real))
    assert found.precision > found.recall + 0.2


def test_needs_more_images_than_neighbours():
    with pytest.raises(ValueError, match="more than 3 images; got 3 generated and 9 real"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
