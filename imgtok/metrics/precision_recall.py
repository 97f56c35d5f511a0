"""Precision and recall of generated images (arXiv:1904.06991): torch-fidelity's computation with ADM's settings."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NEIGHBOURS = 3
MOST_REAL_FEATURES = 10_000
"""Real images that generated ones are compared with, as in ADM's evaluator; more would take hours."""

_KEEP_ALL_DISTANCES = 10_000  # above this many images the distance matrix (400 MB here) is made in parts


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Shares of `generated` (N, D) near some real image and of `real` (M, D) near some generated one.

    "Near" is inside the ball around an image that reaches its `neighbours`-th nearest neighbour.
    Raises ValueError when a side has too few images for that.
    """
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(
            f"precision and recall look at {neighbours} neighbours, so each side needs more than {neighbours} images; "
            f"got {len(generated)} generated and {len(real)} real"
        )
    from torch_fidelity.metric_prc import prc_features_to_metric  # costs seconds to import

    found = prc_features_to_metric(
        generated.float(),
        real.float(),
        prc_neighborhood=neighbours,
        save_cpu_ram=max(len(generated), len(real)) > _KEEP_ALL_DISTANCES,
        verbose=False,
    )
    return PrecisionRecall(float(found["precision"]), float(found["recall"]))
