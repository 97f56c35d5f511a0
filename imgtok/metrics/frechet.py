"""Frechet distance between two Gaussians, in float64, by two symmetric eigendecompositions.

|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2). The matrix under the root is symmetric, so there are no
complex parts to discard and no ridge to add for singular covariances.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> float:
    """Squared Frechet distance of N(mean_1, covariance_1) and N(mean_2, covariance_2); (D,) and (D, D).

    Raises ValueError when shapes differ or a value is not finite.
    """
    _check(mean_1, covariance_1, mean_2, covariance_2)
    first, second = _symmetric(covariance_1), _symmetric(covariance_2)
    root = _root_on_range(first)
    eigenvalues = torch.linalg.eigvalsh(root.T @ second @ root)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    offset = (mean_1.double() - mean_2.double()).square().sum()
    return max(0.0, float(offset + first.trace() + second.trace() - 2 * cross))


def _root_on_range(covariance: Tensor) -> Tensor:
    """R (D, rank) with R R^T = covariance.

    Directions without variance are left out: their eigenvalues are rounding noise, which a square root would enlarge.
    """
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    noise = eigenvalues.abs().max() * len(eigenvalues) * torch.finfo(torch.float64).eps
    kept = eigenvalues > noise
    return vectors[:, kept] * eigenvalues[kept].sqrt()


def _symmetric(covariance: Tensor) -> Tensor:
    matrix = covariance.double()
    return (matrix + matrix.T) / 2


def _check(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> None:
    dimension = mean_1.numel()
    shapes = [tuple(x.shape) for x in (mean_1, mean_2, covariance_1, covariance_2)]
    if shapes != [(dimension,)] * 2 + [(dimension, dimension)] * 2:
        raise ValueError(f"means must be (D,) and covariances (D, D) of one D, got {shapes}")
    if not all(bool(x.isfinite().all()) for x in (mean_1, covariance_1, mean_2, covariance_2)):
        raise ValueError("a mean or covariance is not finite: some image gave features that are NaN or infinite")
