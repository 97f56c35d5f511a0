"""What the numbers of the images come to: means, percentiles, a histogram, how well requests are met, and curves."""

from __future__ import annotations

from typing import Any

import numpy as np

from imgtok.sample.complexity.measuring import Array, Measured

PERCENTILES = (0, 10, 25, 50, 75, 90, 100)
MARGINS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05)
"""By how much an error may exceed eps, for the table of how well requests are met."""
BARS = 32
"""Bars of a histogram, at most."""


def summarise(found: Measured, at: float) -> dict[str, Any]:
    """Everything that the page and `complexity.json` say of all images together; `at` is the eps that sorts them.

    Keys that stand for an eps or a number of tokens are its text, such as "0.05" or "32".
    """
    request = found.request
    summary: dict[str, Any] = {
        "images": len(found),
        "budget": request.budget,
        "eps": list(request.eps),
        "sorted_by": at,
        "tokens": {text(eps): _tokens(found, eps) for eps in request.eps},
        "histogram": histogram(found),
    }
    if not request.errors:
        return summary
    summary["error"] = {text(eps): float(found.errors[eps].mean()) for eps in request.eps}
    summary["met"] = {"margins": list(MARGINS), "by_eps": {text(eps): _met(found, eps) for eps in request.eps}}
    summary["curve"] = {
        "fixed": [{"tokens": count, "error": float(errors.mean())} for count, errors in found.fixed.items()],
        "adaptive": [
            {"eps": eps, "tokens": float(found.tokens[eps].mean()), "error": float(found.errors[eps].mean())}
            for eps in request.eps
        ],
    }
    if (gain := found.gain) is not None:
        summary["delta"] = {
            "counts": [min(found.fixed), max(found.fixed)],
            "mean": float(gain.mean()),
            "percentiles": _percentiles(gain),
        }
    return summary


def text(number: float) -> str:
    """As in names of columns and in the page."""
    return f"{number:g}"


def _tokens(found: Measured, eps: float) -> dict[str, Any]:
    tokens = found.tokens[eps]
    return {
        "mean": float(tokens.mean()),
        "percentiles": _percentiles(tokens),
        "all_of_the_budget": float((tokens == found.request.budget).mean()),
    }


def _percentiles(values: Array) -> dict[str, float]:
    """Values that occur."""
    chosen = np.percentile(values, PERCENTILES, method="inverted_cdf").tolist()
    return {str(percent): value for percent, value in zip(PERCENTILES, chosen, strict=True)}


def histogram(found: Measured) -> dict[str, Any]:
    """How many images have first[i] to first[i + 1] - 1 tokens, at each eps."""
    budget = found.request.budget
    width = -(-budget // BARS)
    first = [*range(1, budget + 1, width), budget + 1]
    images = {text(eps): np.histogram(found.tokens[eps], first)[0].tolist() for eps in found.request.eps}
    return {"first": first, "images": images}


def _met(found: Measured, eps: float) -> dict[str, Any]:
    """How well a request is met: of all images, and of those from which tokens were dropped.

    Those that keep the whole budget have done what they could. `out_of_reach` is the share whose error exceeds eps with
    as many tokens as the budget, too, if that was measured.
    """
    dropped = found.tokens[eps] < found.request.budget
    whole = found.fixed.get(found.request.budget)
    return {
        "dropped": _missed(found.errors[eps][dropped], eps),
        "all": _missed(found.errors[eps], eps),
        "out_of_reach": None if whole is None else float((whole > eps).mean()),
    }


def _missed(errors: Array, eps: float) -> dict[str, Any]:
    """The shares of images whose error exceeds eps by more than each of `MARGINS`; null of no images."""
    above = errors[errors > eps]
    return {
        "images": len(errors),
        "above": [float((errors > eps + margin).mean()) if len(errors) else None for margin in MARGINS],
        "mean_error_above": float(above.mean()) if len(above) else None,
    }
