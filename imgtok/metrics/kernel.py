"""Kernel distance of two sets of features (arXiv:1801.01401): the squared maximum mean discrepancy, unbiased, with the
cubic kernel k(x, y) = (x.y / D + 1)^3.

Published KIDs are means over random subsets. Here all features are taken at once: the expectation is the same, nothing
is drawn, and nothing depends on an order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MOST_IMAGES = 10_000
"""The most images of each side that are compared; the time goes with the square of the number."""

_BLOCK = 2048  # rows of the kernel's matrix at once: 160 MB at 10,000 columns


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Unbiased squared discrepancy of `first` (N, D) and `second` (M, D), in float64: 0 on average for two samples of
    one distribution, and hence below 0 about as often as above.

    Raises ValueError for fewer than two rows on a side, other widths, or a value that is not finite.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features must be (N, D) and (M, D) of one D, got {(*first.shape,)} and {(*second.shape,)}")
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a kernel distance needs at least 2 images a side, got {len(first)} and {len(second)}")
    if not all(bool(side.isfinite().all()) for side in (first, second)):
        raise ValueError("some image gave features that are NaN or infinite")
    a, b = first.double(), second.double()
    return _mean_of_others(a) + _mean_of_others(b) - 2 * float(_sum(a, b)) / (len(a) * len(b))


def _mean_of_others(rows: Tensor) -> float:
    """Mean of the kernel over all pairs of two different rows."""
    own = (rows.square().sum(dim=1) / rows.shape[1] + 1).pow(3).sum()
    return float(_sum(rows, rows) - own) / (len(rows) * (len(rows) - 1))


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack(list(_sums(a, b))).sum()


def _sums(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    for part in a.split(_BLOCK):
        yield (part @ b.T / a.shape[1] + 1).pow(3).sum()
