"""The orders themselves are compared with the published ones in tests/parity."""

from __future__ import annotations

import pytest
import torch

from imgtok.config import ConfigError
from imgtok.generators.entities import Cells, Patches, Scales, Subsamples, WholeImage, cells, scales, subsamples

KINDS = [Cells(height=2, width=2), Cells(height=1, width=4), Subsamples(side=2), Patches(), WholeImage()]


@pytest.mark.parametrize("kind", [*KINDS, Scales(sides=(1, 2, 4))], ids=repr)
def test_joining_undoes_cutting(kind):
    entities = kind.lay_out(4)
    latents = torch.randn(2, 3, 4, 4)
    tokens = entities.cut(latents)
    assert tokens.shape == (2, entities.length, 3)
    assert torch.equal(entities.join(tokens), latents)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_partition_holds_every_position_once(kind):
    entities = kind.lay_out(4)
    assert sorted(entities.order.tolist()) == list(range(16))
    assert entities.offsets[-1] == entities.length == 16
    rows, columns = entities.places.unbind(-1)
    assert torch.equal((rows * 4 + columns).long(), entities.order)


def test_subsamples_are_spread_over_the_grid():
    assert subsamples(4, 2).order.view(-1, 4)[1].tolist() == [1, 3, 9, 11]


def test_scales_lie_at_the_centres_of_what_they_stand_for():
    entities = scales(4, (1, 2, 4))
    assert entities.sizes == (1, 4, 16)
    assert entities.places[0].tolist() == [1.5, 1.5]
    assert entities.places[1:5].tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]
    assert entities.places[-1].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cells(16, 5, 8), r"entities.height: cells of 5 do not tile a grid of 16; use one of 1, 2, 4, 8, 16"),
        (lambda: cells(16, 8, 32), r"entities.width: cells of 32 do not tile"),
        (lambda: subsamples(16, 3), r"entities.side: 3 does not divide a grid of 16"),
        (lambda: scales(16, (4, 8)), r"entities.sides: \[4, 8\] must grow and end at the grid's 16"),
        (lambda: scales(4, (2, 2, 4)), r"must grow"),
        (lambda: Cells(height=0), r"height.*at least 1"),
    ],
)
def test_what_does_not_fit_the_grid_is_refused(build, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        build()


def test_a_latent_of_another_size_is_refused():
    with pytest.raises(ValueError, match="a latent of 8 x 8, but the generator was made for 4 x 4"):
        Patches().lay_out(4).cut(torch.zeros(1, 3, 8, 8))
