"""The kernel distance against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imgtok.metrics import kernel
from imgtok.metrics.kernel import kernel_distance


def directly(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, with a Python loop over all pairs."""

    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    own = sum(np.mean([k(x, y) for i, x in enumerate(side) for j, y in enumerate(side) if i != j]) for side in (a, b))
    return own - 2 * np.mean([k(x, y) for x in a for y in b])


@pytest.fixture
def sides() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(23, 6, generator=generator), torch.randn(17, 6, generator=generator) * 2 + 1


@pytest.mark.parametrize("block", [4, 2048])
def test_it_is_the_definition_in_blocks_of_any_size(sides, block, monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", block)
    first, second = sides
    assert kernel_distance(first, second) == pytest.approx(
        directly(first.double().numpy(), second.double().numpy()), rel=1e-12
    )


def test_neither_order_nor_side_matters(sides):
    first, second = sides
    found = kernel_distance(first, second)
    assert kernel_distance(second, first) == pytest.approx(found, rel=1e-12)
    assert kernel_distance(first.flip(0), second[torch.randperm(17)]) == pytest.approx(found, rel=1e-12)


def test_two_samples_of_one_distribution_are_at_zero_on_average():
    """And not above: a biased estimate would be, by about 2 / n of the kernel's mean."""
    generator = torch.Generator().manual_seed(1)
    found = [kernel_distance(*torch.randn(2, 30, 4, generator=generator)) for _ in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20
    assert min(found) < 0 < max(found)


def test_it_is_the_mean_of_published_kid_over_subsets(sides):
    """torch-fidelity's, with all images in its one subset."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    first, second = (side[:17] for side in sides)
    published = kid_features_to_metric(
        first, second, kid_subsets=1, kid_subset_size=17, kid_kernel="poly", rng_seed=0, verbose=False
    )
    assert kernel_distance(first, second) == pytest.approx(published["kernel_inception_distance_mean"], rel=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), r"of one D, got \(3, 2\) and \(3, 4\)"),
        (torch.zeros(1, 2), torch.zeros(3, 2), "at least 2 images a side, got 1 and 3"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, 2), "NaN"),
    ],
)
def test_what_has_no_distance_is_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(first, second)
