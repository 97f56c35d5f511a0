"""What `speculative.py --out` wrote of one or several models, as a figure: a row a model.

    python benchmarks/speculative_figure.py VQ=vq.json FlexTok=flextok.json --out speculative.png

Left: the share of images that the oracle reads as they were asked for, with its standard error, against calls of the
network an image; groups are written beside their points, windows are sizes of points. Without an oracle it is the
speed-up in CPU seconds. Right: the share of judged guesses that stood, by the number of the token, at the largest
window; of groups those of a size near 10.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
COLOURS = {
    "exact": "black",
    "jacobi": "tab:blue",
    "coupled": "tab:green",
    "coupled, gumbel": "tab:olive",
    "grouped": "tab:red",
    "coupled, grouped": "tab:orange",
}
NEAR = 10
"""The size of groups whose acceptance is drawn by token."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="NAME=JSON", help="files of --out, by the names that they get")
    parser.add_argument("--out", type=Path, default=Path("speculative.png"))
    options = parser.parse_args(arguments)
    results: dict[str, Rows] = {}
    for given in options.files:
        name, equals, path = given.rpartition("=")
        if not equals:
            parser.error(f"{given}: name it, such as VQ={given}")
        results[name] = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    draw(results, options.out)


def draw(results: Mapping[str, Rows], path: Path) -> None:
    figure = Figure(figsize=(9, 3.4 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), (name, rows) in zip(panels, results.items(), strict=True):
        draw_cost(left, rows)
        draw_acceptance(right, rows)
        left.set_title(name, fontsize=9)
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def kind_of(row: Mapping[str, Any]) -> tuple[str, int | None]:
    """The method without its groups, and their size."""
    name, _, size = row["method"].partition(" G=")
    digits = "".join(letter for letter in size.partition(",")[0] if letter.isdigit())
    kind = "coupled, grouped" if digits and name == "coupled" else name
    return kind, int(digits) if digits else None


def draw_cost(axes: Axes, rows: Rows) -> None:
    """What the images are worth against calls, or what the calls were worth."""
    judged = "oracle, %" in rows[0]
    key = "oracle, %" if judged else "times, CPU"
    windows = sorted({row["window"] for row in rows if row["method"] != "exact"})
    named = set[str]()
    for row in rows:
        kind, size = kind_of(row)
        large = 4 + 4 * windows.index(row["window"]) / max(1, len(windows) - 1) if row["window"] in windows else 6
        error = row["+-"] if judged else None
        style = {"color": COLOURS.get(kind, "grey"), "markersize": large, "elinewidth": 0.5, "capsize": 2}
        axes.errorbar(row["NFE"], row[key], error, fmt="o", label="" if kind in named else kind, alpha=0.8, **style)
        named.add(kind)
        if size is not None:
            axes.annotate(str(size), (row["NFE"], row[key]), fontsize=6, textcoords="offset points", xytext=(4, 3))
    axes.axhline(rows[0][key], color="black", linewidth=0.6, linestyle=":")
    axes.set_xlabel(f"calls of the network an image; windows of {', '.join(map(str, windows))}")
    axes.set_ylabel("right by the oracle, %" if judged else "times faster, CPU seconds")


def draw_acceptance(axes: Axes, rows: Rows) -> None:
    """The share of guesses that stood, by token."""
    largest = max(row["window"] for row in rows)
    sizes = [size for row in rows if (size := kind_of(row)[1]) is not None]
    near = min(sizes, key=lambda size: abs(size - NEAR), default=None)
    for row in rows:
        kind, size = kind_of(row)
        shares = row.get("by token")
        if row["window"] != largest or size not in (None, near) or not shares:
            continue
        points = [(token, share) for token, share in enumerate(shares) if share is not None]
        label = row["method"]
        axes.plot(*zip(*points, strict=True), color=COLOURS.get(kind, "grey"), linewidth=1, label=label)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("number of the token")
    axes.set_ylabel(f"guesses accepted, window {largest}")


if __name__ == "__main__":
    main()
