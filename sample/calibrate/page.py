"""The page: the settings that fit, how the latents are distributed, and what levels and range cost, with diagrams."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imgtok.quantizers.normal import NormalConfig, NormalQuantizer
from imgtok.sample.calibrate.results import Decoded, Found
from imgtok.sample.page import MAIN, OTHERS, diagram, inline_svg, inline_thumbnail, notes_of, section, settings

SHOWN = 8
"""Images whose reconstructions are shown."""
LARGE = 160
"""Pixels a side of a picture, at most."""
BARS = 120
"""Bars of the histogram."""
STYLE = """
.row{display:grid;grid-template-columns:7rem repeat(8,1fr);gap:.45rem;margin:.3rem 0;align-items:center;font-size:.8rem}
.row img{width:100%;display:block}
"""
TITLES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "mae": "MAE",
    "fd_lite0": "fd_lite0",
    "perceptual_lite0": "perceptual_lite0",
}
"""What scores are called in tables."""


@dataclass(frozen=True)
class About:
    """What the page says of itself, in words."""

    model: str
    data: str
    notes: Sequence[str]
    """What should be known before anything else is read."""
    made_of: Mapping[str, str]
    """The settings."""
    lines: str
    """The YAML."""
    decoded: int
    """Images that were decoded."""


def body(found: Found, decoded: Decoded, about: About) -> str:
    """All sections."""
    parts = [
        f"<h1>Rounding the latents of {html.escape(about.model)}</h1><p class=lead>{found.images:,} images "
        f"({html.escape(about.data)}); {about.decoded:,} of them decoded at every setting.</p>",
        notes_of(about.notes),
        headline(found, decoded),
        section("The settings", f"<pre>{html.escape(about.lines)}</pre>"),
        section("The numbers of the latents", numbers(found)),
        section("The channels", channels(found)),
        section("How many levels", levels(found, decoded)),
        section("How wide a range", ranges(found, decoded)),
        section("Before and after", pictures(found, decoded)),
        section("How this was made", settings(about.made_of, BESIDE)),
    ]
    return "".join(parts)


BESIDE = (
    "<code>calibration.yaml</code>, the settings, to be combined with a configuration; <code>calibration.json</code>, "
    "the numbers of this page."
)


# ---------------------------------------------------------------- numbers and words


def headline(found: Found, decoded: Decoded) -> str:
    """The table on top."""
    rounding, chosen = found.roundings[found.chosen], found.chosen
    continuous, psnr = (decoded.scores[setting]["psnr"] for setting in (None, chosen))
    bits = found.numbers * math.log2(chosen.levels)
    shape = " x ".join(map(str, found.shape))
    rows = [
        ("scale: the factor on the latents", f"{found.factor:.5g}"),
        ("deviation of the latents with it", f"{found.deviation:.3f}"),
        ("range of the levels", f"±{chosen.range[1]:g}"),
        ("what the outermost levels stand for", f"{rounding.reach[0]:.3f} and {rounding.reach[1]:.3f}"),
        ("numbers beyond these (saturated)", share(sum(rounding.beyond) / len(rounding.beyond))),
        (f"an image at {chosen.levels} levels: {shape} ids", f"{bits:,.0f} bits"),
        ("the same when it is known how often each id occurs", f"{rounding.bits * found.numbers:,.0f} bits"),
        ("PSNR, not rounded", f"{continuous:.2f} dB"),
        (f"PSNR at {chosen.levels} levels", f"{psnr:.2f} dB, {continuous - psnr:.3f} dB less"),
    ]
    return "<table>" + "".join(f"<tr><td>{html.escape(name)}<td>{value}" for name, value in rows) + "</table>"


def share(part: float) -> str:
    """In percent, with more digits where it is small."""
    return f"{100 * part:.2f} %" if part >= 1e-4 or not part else f"{100 * part:.1g} %"


def numbers(found: Found) -> str:
    own = " Each channel is brought to mean 0 and deviation 1 first." if found.chosen.means else ""
    return (
        "<p>Samples of the distributions that the autoencoder gives, scaled: what is rounded in training. The dashed "
        f"line is a normal of the same mean and deviation, ticks at the bottom are the levels.{own}</p>"
        f"{histogram(found)}"
    )


def channels(found: Found) -> str:
    """The table and the diagram of the channels."""
    beyond = found.roundings[found.chosen].beyond
    rows = []
    for place, number in enumerate(found.order):
        channel = found.channels[number]
        rows.append(
            f"<tr><td>{place + 1}<td>{number}<td>{100 * channel.low_frequencies:.1f} %<td>{channel.mean:.3f}"
            f"<td>{channel.deviation:.3f}<td>{channel.noise:.3f}<td>{channel.least:.2f}<td>{channel.largest:.2f}"
            f"<td>{share(beyond[number])}"
        )
    head = "".join(
        f"<th>{title}"
        for title in (
            "",
            "channel",
            "low frequencies",
            "mean",
            "deviation",
            "of it chance",
            "least",
            "largest",
            "beyond",
        )
    )
    return (
        "<p>In the order of the settings: first those with the largest share of their energy in low frequencies, up to "
        "a quarter of the highest one. <i>Chance</i> is the deviation of the distributions that the autoencoder gives: "
        f"rounding far below it costs nothing.</p>{low_frequencies(found)}"
        f"<details><summary>Show {len(rows)} channels</summary><table><tr>{head}{''.join(rows)}</table></details>"
    )


def levels(found: Found, decoded: Decoded) -> str:
    """What more levels are good for."""
    rows = [*found.by_levels, found.uniform]
    names = {setting: str(setting.levels) for setting in found.by_levels}
    names[found.uniform] = f"{found.uniform.levels}, evenly spaced"
    return (
        "<p>Images are decoded from the means of the distributions that the autoencoder gives, as they are and "
        f"rounded, at a range of ±{found.chosen.range[1]:g}. The last row has levels at equal steps.</p>"
        f"{psnr_over_levels(found, decoded)}{table(found, decoded, rows, names, 'levels')}"
    )


def ranges(found: Found, decoded: Decoded) -> str:
    """What a narrower or a wider one costs."""
    names = {setting: f"±{setting.range[1]:g}" for setting in found.by_range}
    return (
        "<p>A narrow range moves what lies beyond its outermost levels to these, a wide one has coarser levels. The "
        f"dotted line marks ±{found.chosen.range[1]:g}, which the settings above have.</p>"
        f"{error_over_range(found)}{table(found, decoded, found.by_range, names, 'range')}"
    )


def table(
    found: Found, decoded: Decoded, rows: Sequence[NormalConfig], names: Mapping[NormalConfig, str], first: str
) -> str:
    """A row a setting, the continuous latents above."""
    continuous = decoded.scores[None]
    keys = list(continuous)
    heads = [first, "bits an id", "its entropy", "saturated", "error of latents"]
    for key in keys:
        heads += [TITLES[key], "lost"] if key == "psnr" else [TITLES[key]]
    lines = [f"<tr><td>not rounded<td><td><td><td>{cells(continuous, None)}"]
    for setting in rows:
        rounding = found.roundings[setting]
        beyond = share(sum(rounding.beyond) / len(rounding.beyond))
        lines.append(
            f"<tr{' class=chosen' if setting == found.chosen else ''}><td>{names[setting]}"
            f"<td>{math.log2(setting.levels):.2f}<td>{rounding.bits:.2f}<td>{beyond}<td>{rounding.error:.1e}"
            f"{cells(decoded.scores[setting], continuous)}"
        )
    head = "".join(f"<th>{title}" for title in heads)
    return (
        f"<table><tr>{head}{''.join(lines)}</table><p class=small>Error of latents: mean square over their variance. "
        f"Scores: {html.escape('; '.join(decoded.names))}.</p>"
    )


def cells(scores: Mapping[str, float], continuous: Mapping[str, float] | None) -> str:
    shown = []
    for key, value in scores.items():
        shown.append(f"<td>{value:.2f}" if key in ("psnr", "fd_lite0", "mae") else f"<td>{value:.4f}")
        if key == "psnr":
            shown.append("<td>" if continuous is None else f"<td>{continuous['psnr'] - value:.3f}")
    return "".join(shown)


def pictures(found: Found, decoded: Decoded) -> str:
    """The first images, and what is left of them."""
    rows = {"original": decoded.originals, "not rounded": decoded.pictures[None]}
    rows |= {f"{setting.levels} levels": decoded.pictures[setting] for setting in reversed(found.by_levels)}
    return "".join(
        f"<div class=row><span>{title}</span>{''.join(inline_thumbnail(image, LARGE) for image in images)}</div>"
        for title, images in rows.items()
    )


# ---------------------------------------------------------------- diagrams


def histogram(found: Found) -> str:
    """The distribution of the numbers that are rounded, with a normal and the levels."""
    figure, axis = diagram(9.6, 3.2)
    values = found.sample.numpy()
    low, high = np.percentile(values, (0.02, 99.98))
    side = max(abs(low), abs(high), found.chosen.range[1]) * 1.05
    counts, edges = np.histogram(values, BARS, (-side, side))
    width = edges[1] - edges[0]
    axis.stairs(counts / len(values) / width, edges, fill=True, color=MAIN, alpha=0.75, label="latents")
    mean, deviation, x = values.mean(), values.std(), np.linspace(-side, side, 400)
    density = np.exp(-(((x - mean) / deviation) ** 2) / 2) / (deviation * math.sqrt(2 * math.pi))
    axis.plot(x, density, "--", color=OTHERS[0], linewidth=1.3, label="a normal")
    base = NormalConfig(levels=found.chosen.levels, range=found.chosen.range, cut=found.chosen.cut)
    ticks = NormalQuantizer(base).values[0].numpy()
    floor = 0.3 / len(values) / width
    axis.set(yscale="log", ylim=(floor, 3 * max(counts.max() / len(values) / width, density.max())))
    axis.plot(ticks, np.full(len(ticks), floor * 1.6), "|", color="black", markersize=6, label="levels")
    for end in found.chosen.range:
        axis.axvline(end, color=OTHERS[4], linewidth=1, linestyle=":")
    axis.set(xlabel="number, scaled", ylabel="density", xlim=(-side, side))
    axis.legend(fontsize=8, loc="upper right")
    return inline_svg(figure)


def low_frequencies(found: Found) -> str:
    """A bar a channel, in order."""
    figure, axis = diagram(9.6, 2.6)
    shares = [100 * found.channels[number].low_frequencies for number in found.order]
    axis.bar(range(len(shares)), shares, color=MAIN, alpha=0.8)
    if len(shares) <= 48:
        axis.set_xticks(range(len(shares)), [str(number) for number in found.order], fontsize=8)
    axis.set(xlabel="channel, in order", ylabel="energy in low\nfrequencies, %", xlim=(-0.7, len(shares) - 0.3))
    return inline_svg(figure)


def psnr_over_levels(found: Found, decoded: Decoded) -> str:
    """PSNR at each number of levels, and without rounding."""
    figure, axis = diagram(7.2, 3.2)
    counts = [setting.levels for setting in found.by_levels]
    axis.plot(
        counts, [decoded.scores[setting]["psnr"] for setting in found.by_levels], "o-", color=MAIN, label="rounded"
    )
    axis.axhline(decoded.scores[None]["psnr"], color=OTHERS[0], linestyle="--", label="not rounded")
    axis.plot(
        [found.uniform.levels],
        [decoded.scores[found.uniform]["psnr"]],
        "s",
        color=OTHERS[3],
        ms=5,
        label="evenly spaced",
    )
    axis.set(xscale="log", xlabel="levels", ylabel="PSNR, dB")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return inline_svg(figure)


def error_over_range(found: Found) -> str:
    """A line a number of levels."""
    figure, axis = diagram(7.2, 3.2)
    colours = iter([MAIN, *OTHERS] * len(found.curves))
    for count, curve in sorted(found.curves.items(), reverse=True):
        axis.plot(curve.ranges, curve.errors, color=next(colours), label=f"{count} levels")
    axis.axvline(found.chosen.range[1], color="#888", linewidth=1, linestyle=":")
    axis.set(yscale="log", xlabel="range, ±", ylabel="error of latents\nover their variance")
    axis.legend(fontsize=8)
    return inline_svg(figure)
