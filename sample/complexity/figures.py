"""The diagrams of the page: how many images need how many tokens, what more tokens are good for, error over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from imgtok.sample.complexity.measuring import Measured
from imgtok.sample.complexity.summary import text
from imgtok.sample.page import MAIN, OTHERS, diagram, inline_svg

FEW_POINTS = 500
"""Dots up to which each is an element of the page; more are one picture."""


def histogram(summary: Mapping[str, Any]) -> str:
    """Bars for the eps that sorts the images, outlines for the others."""
    figure, axis = diagram(9.6, 3.2)
    first: Sequence[int] = summary["histogram"]["first"]
    edges = np.array(first) - 0.5
    chosen = text(summary["sorted_by"])
    colours = iter(OTHERS * len(summary["eps"]))
    for eps, images in summary["histogram"]["images"].items():
        if eps == chosen:
            axis.stairs(images, edges, fill=True, color=MAIN, alpha=0.75, label=f"eps = {eps}")
        else:
            axis.stairs(images, edges, color=next(colours), linewidth=1.5, label=f"eps = {eps}")
    axis.set(xlabel="tokens that an image needs, KC(eps)", ylabel="images", xlim=(edges[0], edges[-1]))
    axis.legend(fontsize=8)
    return inline_svg(figure)


def gain_over_tokens(found: Measured, at: float, letters: Mapping[str, int]) -> str:
    """A dot an image; some have letters, which stand for rows of `found`."""
    figure, axis = diagram(9.6, 4.2)
    tokens, gain = found.tokens[at], found.gain
    assert gain is not None
    many = len(found) > FEW_POINTS
    alpha = float(np.clip(300 / len(found), 0.15, 0.7))
    axis.scatter(tokens, gain, s=10, color=MAIN, alpha=alpha, linewidths=0, rasterized=many)
    for letter, row in letters.items():
        axis.plot(tokens[row], gain[row], "o", markersize=5, color="black")
        axis.annotate(
            letter, (tokens[row], gain[row]), (5, 5), textcoords="offset points", fontsize=11, fontweight="bold"
        )
    axis.axhline(0, color="#888", linewidth=0.8)
    fewest, most = min(found.fixed), max(found.fixed)
    axis.set(
        xlabel=f"tokens that an image needs, KC({text(at)})",
        ylabel=f"delta: error with {fewest} tokens\nless that with {most}",
    )
    return inline_svg(figure)


def error_over_tokens(summary: Mapping[str, Any]) -> str:
    """Means of all images: as many tokens for each, and as many as each needs."""
    figure, axis = diagram(7.2, 3.6)
    fixed, adaptive = summary["curve"]["fixed"], summary["curve"]["adaptive"]
    for points, label, marker, colour in (
        (fixed, "the same number of tokens for every image", "o-", MAIN),
        (adaptive, "as many as each image needs, at the eps beside it", "s--", OTHERS[0]),
    ):
        points = sorted(points, key=lambda point: point["tokens"])
        if points:
            axis.plot(
                [p["tokens"] for p in points], [p["error"] for p in points], marker, color=colour, ms=5, label=label
            )
    for point in adaptive:
        place = (point["tokens"], point["error"])
        axis.annotate(text(point["eps"]), place, (6, 5), textcoords="offset points", fontsize=9)
    highest = max(point["error"] for point in [*fixed, *adaptive])
    axis.set(xlabel="tokens of an image, mean", ylabel="error, mean", ylim=(0, 1.12 * highest))
    axis.legend(fontsize=8)
    return inline_svg(figure)
