"""Adaptive weights of a prompt's words (FRAP, arXiv 2408.11706, TMLR 2025).

One weight for each piece of the prompt is moved while images are drawn, so that every object is seen somewhere and its
adjectives are seen where it is. Latents, states and network stay as they are; that idea is published [abstract].

No code of FRAP is public, and the body of the paper could not be read. What stands in summaries of it is marked
[summary]; every choice that had to be made is marked [ours] and is a setting, never a fact about the method.
`tests/parity` holds the functions of the first half of this file against the formulas, evaluated in float64.

Shapes: T columns of a caption, D width of a state, Q = P * P queries, S objects, R pairs of an object and a modifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------- weights

Way = Literal["interpolate", "scale", "logit"]


def bounded(alpha: Tensor, low: float, high: float) -> Tensor:
    """Weights within (low, high): alpha = 0 is the middle, exactly 1 for .6 and 1.4. The bounds are ours."""
    return low + (high - low) * alpha.sigmoid()


def plain(alpha: Tensor) -> Tensor:
    """Weights without bounds: 1 + alpha [ours]."""
    return 1 + alpha


def interpolated(states: Tensor, null: Tensor, weights: Tensor) -> Tensor:
    """States (..., T, D) on the line from those of the empty prompt, weight 0, through their own, weight 1 [ours: what
    libraries of prompt weighting do above 1]. Weights of 1 give the states themselves, to the bit.
    """
    return states + (weights - 1)[..., None] * (states - null)


def scaled(states: Tensor, weights: Tensor) -> Tensor:
    """States (..., T, D) times their weights [ours]."""
    return states * weights[..., None]


# ---------------------------------------------------------------- maps


def kernel(sigma: float = 0.5) -> Tensor:
    """3 x 3 weights of sum 1, exp(-(distance / (2 sigma))^2) along each axis [ours, after Attend-and-Excite, which
    divides by (2 sigma)^2 where a normal density has 2 sigma^2].
    """
    line = torch.exp(-(((torch.arange(3.0) - 1) / (2 * sigma)) ** 2))
    square = line[:, None] * line
    return square / square.sum()


def smoothed(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps (..., Q, T) after a 3 x 3 Gaussian of sigma .5 over the grid, reflected at its edges [ours]."""
    images = maps.mT.reshape(-1, 1, *grid)
    weights = kernel().to(images)[None, None]
    blurred = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), weights)
    return blurred.reshape(maps.mT.shape).mT


Prob = Literal["sum", "softmax"]


def probabilities(maps: Tensor, how: Prob) -> Tensor:
    """Maps (..., Q, T) as distributions over the queries: divided by their sums, or by softmax. Under softmax maps of
    values within [0, 1] are nearly all alike; which of the two is meant is not known [ours].
    """
    if how == "softmax":
        return maps.softmax(dim=-2)
    return maps / (maps.sum(dim=-2, keepdim=True) + TINY)


def presence(maps: Tensor, objects: Sequence[int]) -> Tensor:
    """1 - the strongest that each object is seen anywhere, (..., S), of smoothed maps (..., Q, T) [summary]."""
    return 1 - maps[..., list(objects)].amax(dim=-2)


Reduce = Literal["sum", "mean"]


def overlap(maps: Tensor, pairs: Sequence[tuple[int, int]], *, prob: Prob = "sum", reduce: Reduce = "sum") -> Tensor:
    """What distributions of an object and of its modifier share, (..., R), of smoothed maps (..., Q, T): the sum over
    the queries of the smaller of the two, or its mean, as summaries have it, which is at most 1 / Q.
    """
    p = probabilities(maps, prob)
    shared = torch.minimum(p[..., [s for s, _ in pairs]], p[..., [r for _, r in pairs]])
    return shared.sum(dim=-2) if reduce == "sum" else shared.mean(dim=-2)


def objective(
    maps: Tensor,
    objects: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    *,
    strength: float = 1.0,
    prob: Prob = "sum",
    reduce: Reduce = "sum",
) -> Tensor:
    """Mean presence loss - strength * mean overlap, of smoothed maps (Q, T) [summary]; the means are ours."""
    loss = presence(maps, objects).mean()
    if pairs:
        loss = loss - strength * overlap(maps, pairs, prob=prob, reduce=reduce).mean()
    return loss


# ---------------------------------------------------------------- one update


def updated(alpha: Tensor, gradient: Tensor, free: Tensor, *, step: float, normalised: bool) -> Tensor:
    """Coefficients (..., T) - step * gradient, where `free` (..., T); others keep theirs, such as those of the start
    and of padding, which would drift without meaning.

    `normalised` divides by the largest gradient of each prompt first [ours], so that no coefficient moves by more than
    `step`; the plain form is in summaries.
    """
    gradient = gradient.masked_fill(~free, 0)
    if normalised:
        gradient = gradient / gradient.abs().amax(dim=-1, keepdim=True).clamp(min=TINY)
    return alpha - step * gradient


def step_of(change: float, low: float, high: float) -> float:
    """The step of a normalised update by which no bounded weight moves by more than `change` [ours]: a sigmoid is
    steepest in the middle, at a quarter.
    """
    return 4 * change / (high - low)


TINY = 1e-12
"""Keeps divisions finite."""
