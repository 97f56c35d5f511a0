"""The distance against other formulas for the same quantity."""

from __future__ import annotations

import pytest
import torch

from imgtok.metrics.frechet import frechet_distance


def gaussian(dimension: int, seed: int, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dimension, rank or 2 * dimension, generator=generator, dtype=torch.float64)
    mean = torch.randn(dimension, generator=generator, dtype=torch.float64)
    return mean, factor @ factor.T / factor.shape[1]


def by_product(mean_1, covariance_1, mean_2, covariance_2) -> float:
    """The textbook form: square roots of the eigenvalues of the (not symmetric) product."""
    roots = torch.linalg.eigvals(covariance_1 @ covariance_2).sqrt().real.sum()
    return float((mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace() - 2 * roots)


@pytest.mark.parametrize("dimension", [1, 8, 64, 200])
def test_equals_the_textbook_form(dimension):
    one, two = gaussian(dimension, 1), gaussian(dimension, 2)
    assert frechet_distance(*one, *two) == pytest.approx(by_product(*one, *two), rel=1e-9)
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-9)


def test_closed_form_of_diagonal_covariances():
    """Also where the covariances share no direction: distance of the deviations, axis by axis."""
    first, second = torch.tensor([4.0, 9.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 25.0, 0.0])
    zero = torch.zeros(4)
    expected = (2 - 1) ** 2 + 3**2 + 5**2
    assert frechet_distance(zero, first.diag(), zero, second.diag()) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(zero, first.diag(), zero + 2, second.diag()) == pytest.approx(expected + 16, rel=1e-12)


@pytest.mark.parametrize(("dimension", "rank"), [(8, None), (64, None), (64, 10), (300, 40), (300, 1)])
def test_identical_sets_are_at_zero_even_when_singular(dimension, rank):
    mean, covariance = gaussian(dimension, 3, rank)
    assert frechet_distance(mean, covariance, mean, covariance) < 1e-9 * float(covariance.trace())


def test_singular_against_full_rank():
    one, two = gaussian(40, 4, rank=5), gaussian(40, 5)
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-7)


@pytest.mark.slow
def test_2048_dimensions():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 2048, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(2048, 2048, generator=generator, dtype=torch.float64)).Q
    zero = torch.zeros(2048)
    expected = float((first.sqrt() - second.sqrt()).square().sum())
    turned = [(rotation * variances) @ rotation.T for variances in (first, second)]
    assert frechet_distance(zero, turned[0], zero, turned[1]) == pytest.approx(expected, rel=1e-9)


def test_refuses_values_that_are_not_finite_and_shapes_that_differ():
    mean, covariance = gaussian(3, 0)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(mean * torch.nan, covariance, mean, covariance)
    with pytest.raises(ValueError, match=r"\(D,\)"):
        frechet_distance(mean, covariance, mean[:2], covariance[:2, :2])
