"""Streamed sums: any batch size, any number of processes, any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from imgtok.metrics.accumulate import Histogram, InceptionScore, Moments, Rows

N, D = 333, 16


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0)) * 3 + 5


def test_moments_are_those_of_numpy(features):
    moments = Moments(D)
    moments.update(features)
    expected = np.cov(features.double().numpy().T)
    assert moments.mean.numpy() == pytest.approx(features.double().mean(0).numpy(), abs=1e-12)
    assert moments.covariance.numpy() == pytest.approx(expected, abs=1e-10)
    assert moments.covariance.dtype == torch.float64


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 7, 333])
def test_moments_do_not_depend_on_batches_or_processes(features, reduce_together, processes, batch):
    whole = Moments(D)
    whole.update(features)
    parts = [Moments(D) for _ in range(processes)]
    for rank, part in enumerate(parts):
        for chunk in features[rank::processes].split(batch):
            part.update(chunk)
    if processes > 1:
        reduce_together(*parts)
    else:
        parts[0].reduce(None)
    for part in parts:
        assert int(part.count) == N
        torch.testing.assert_close(part.mean, whole.mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(part.covariance, whole.covariance, rtol=0, atol=1e-10)


def test_covariance_of_one_image_is_refused(features):
    moments = Moments(D)
    moments.update(features[:1])
    with pytest.raises(ValueError, match="at least 2 images"):
        _ = moments.covariance


def inception_score(logits: torch.Tensor, order=None, splits: int = 10) -> torch.Tensor:
    score = InceptionScore(logits.shape[1], len(logits), splits)
    order = torch.arange(len(logits)) if order is None else order
    for chunk in order.split(50):
        score.update(chunk.tolist(), logits[chunk])
    return score.scores()


def sorted_by_class(n: int) -> torch.Tensor:
    logits = torch.randn(n, 20, generator=torch.Generator().manual_seed(1))
    logits[torch.arange(n), torch.arange(n) * 20 // n] += 6
    return logits


@pytest.mark.parametrize("n", [10, 333, 1000])
def test_inception_score_equals_torch_fidelity(n):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = sorted_by_class(n)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=True, rng_seed=2020)
    ours = inception_score(logits)
    assert float(ours.mean()) == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert float(ours.std(correction=0)) == pytest.approx(theirs["inception_score_std"], rel=1e-9, abs=1e-12)


def test_inception_score_of_samples_saved_class_by_class_is_that_of_shuffled_ones():
    """Consecutive parts would hold two classes each and score about 2 of the 20."""
    logits = sorted_by_class(1000)
    shuffled = logits[torch.randperm(1000, generator=torch.Generator().manual_seed(2))]
    first, second = float(inception_score(logits).mean()), float(inception_score(shuffled).mean())
    assert first == pytest.approx(second, rel=0.05)
    assert first > 10


def test_inception_score_does_not_depend_on_the_order_of_arrival(reduce_together):
    logits = sorted_by_class(200)
    expected = inception_score(logits)
    assert torch.allclose(inception_score(logits, torch.arange(200).flip(0)), expected, rtol=1e-12)
    parts = [InceptionScore(20, 200), InceptionScore(20, 200)]
    for rank, part in enumerate(parts):
        indices = list(range(rank, 200, 2))
        part.update(indices, logits[indices])
    reduce_together(*parts)
    assert torch.allclose(parts[0].scores(), expected, rtol=1e-12)


def test_inception_score_of_certain_logits_is_finite():
    logits = torch.full((40, 4), -2000.0)
    logits[torch.arange(40), torch.arange(40) % 4] = 2000.0
    scores = inception_score(logits)
    assert scores.isfinite().all()
    assert 1 <= scores.min() <= scores.max() <= 4 + 1e-9


def test_inception_score_needs_an_image_for_each_part():
    with pytest.raises(ValueError, match="at least 10 images, got 9"):
        InceptionScore(4, 9)


def test_rows_are_in_order_of_index_and_bit_identical_over_processes(features, reduce_together):
    parts = [Rows(N, D), Rows(N, D)]
    for rank, part in enumerate(parts):
        indices = list(range(rank, N, 2))
        part.update(indices, features[indices])
    reduce_together(*parts)
    assert torch.equal(parts[0].scored, features.double())


def test_rows_leave_out_unreadable_images_and_refuse_repeats(features):
    rows = Rows(4, D)
    rows.update([0, 1], features[:2])
    rows.update([3], features[3:4])
    rows.reduce(None)
    assert torch.equal(rows.scored, features[[0, 1, 3]].double())
    rows.update([3], features[3:4])
    with pytest.raises(RuntimeError, match="image 3 was scored more than once"):
        rows.reduce(None)


def test_a_histogram_of_several_processes_is_that_of_one(reduce_together):
    ids = torch.randint(0, 40, (100, 3), generator=torch.Generator().manual_seed(0))
    whole, *parts = (Histogram(64) for _ in range(3))
    whole.update(ids)
    for rank, part in enumerate(parts):
        for chunk in ids[rank::2].split(7):
            part.update(chunk)
    reduce_together(*parts)
    assert torch.equal(parts[0].counts, torch.bincount(ids.flatten(), minlength=64))
    assert (parts[1].use, parts[1].perplexity) == (whole.use, whole.perplexity)
    assert whole.use == len(ids.unique()) / 64


def test_perplexity_is_the_number_of_ids_where_all_are_as_frequent():
    even, single = Histogram(8), Histogram(8)
    even.update(torch.arange(5).repeat(3))
    single.update(torch.tensor([7, 7]))
    assert even.perplexity == pytest.approx(5)
    assert (single.perplexity, single.use) == (pytest.approx(1), 1 / 8)
