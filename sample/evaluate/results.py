"""What an evaluation found, and how it is shown: a table, a CSV file, and curves over the mean number of tokens.

Rows are rates and columns are scores; the full names with their protocols stand below the table and in the JSON.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imgtok.files import replacing
from imgtok.metrics.scorers import Score
from imgtok.tokenizers.base import Rate
from imgtok.tokenizers.calls import Totals

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from imgtok.sample.evaluate.sources import Procedure


@dataclass(frozen=True)
class Row:
    """A score, and the rate that it was measured at (None: images have no tokens, or there is one version only)."""

    score: Score
    rate: Rate | None


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; `rows` is empty in all but the main process."""

    rows: list[Row]
    num: int
    """Images that were asked for; unreadable ones among them are not in the scores."""
    scored: int
    """Images that were scored."""
    size: tuple[int, int]
    """Height and width of the images."""
    procedure: Procedure
    """How they came to be."""
    device: str
    """What computed, and in how many processes."""
    weights: dict[str, str]
    """Hashes of all weights that the scores depend on."""
    real: str | None = None
    """Which other real images they are compared with, in words."""
    notes: Sequence[str] = ()
    """What some of the scores are worth."""
    drawing: Totals | None = None
    """What drawing the images took, where their generator counts it."""


PANELS: Sequence[tuple[str, Sequence[str]]] = (
    ("rFID (lower is better)", ("rfid",)),
    ("FID (lower is better)", ("fid",)),
    ("sFID (lower is better)", ("sfid",)),
    ("Inception score (higher is better)", ("is",)),
    ("KID (lower is better)", ("kid",)),
    ("precision, recall (higher is better)", ("precision", "recall")),
    ("Fréchet distance in EfficientNet-Lite0, not FID (lower is better)", ("fd_lite0",)),
    ("kernel distance in EfficientNet-Lite0 (lower is better)", ("kd_lite0",)),
    ("precision, recall in EfficientNet-Lite0 (higher is better)", ("precision_lite0", "recall_lite0")),
    ("share read right by EfficientNet-Lite0 (higher is better)", ("top1_lite0", "top5_lite0")),
    ("class read by the probe (higher is better)", ("top1_probe", "top1_probe_originals")),
    ("mean absolute error, grey levels (lower is better)", ("mae",)),
    ("PSNR, dB (higher is better)", ("psnr",)),
    ("SSIM (higher is better)", ("ssim",)),
    ("LPIPS (lower is better)", ("lpips",)),
    ("perceptual distance in EfficientNet-Lite0 (lower is better)", ("perceptual_lite0",)),
    ("DINOv2 similarity (higher is better)", ("dino", "dino_patches")),
    ("oracle, share read as asked for (higher is better)", ("oracle_top1", "oracle_shape", "oracle_colour")),
    ("fd_shapes, not FID (lower is better)", ("fd_shapes", "fd_shapes_clean")),
    ("share of the codebook that is used", ("codebook_use",)),
)
"""Title and scores of each panel of the figure, in order."""
ONLY_IN_TABLES = ("tokens", "bits", "codebook_perplexity", "oracle_extra", "oracle_unread")


@dataclass(frozen=True)
class Line:
    """One score against the mean number of tokens."""

    label: str
    tokens: tuple[float, ...]
    """Ascending."""
    values: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """A small diagram."""

    title: str
    lines: tuple[Line, ...]


# ---------------------------------------------------------------- text


def files_of(out: Path) -> list[Path]:
    """The files that are written: the result `out`, its table, and its curves, which not every result has."""
    return [out, out.with_suffix(".csv"), out.with_suffix(".png")]


def table(rows: Sequence[Row]) -> str:
    """The scores as text: a row a rate, or a line a score where there is one version only."""
    rates, keys = _rates(rows), _keys(rows)
    if len(rates) == 1:
        width = max(len(row.score.name) for row in rows)
        return "\n".join(f"{row.score.name:{width}s}  {row.score.value:10.4f}" for row in rows)
    values = {(row.rate, row.score.key): f"{row.score.value:.4f}" for row in rows}
    cells = [["rate", *keys], *([str(rate), *(values.get((rate, key), "") for key in keys)] for rate in rates)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(f"{cell:>{width}s}" for cell, width in zip(line, widths, strict=True)) for line in cells]
    names = {row.score.key: row.score.name for row in rows}
    width = max(map(len, names))
    return "\n".join([*lines, "", *(f"{key:{width}s}  {name}" for key, name in names.items())])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A row a rate (empty where there is one version only), a column a score; no value is an empty cell."""
    values = {(row.rate, row.score.key): row.score.value for row in rows}
    keys = _keys(rows)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rate", *keys])
        for rate in _rates(rows):
            found = [values.get((rate, key), math.nan) for key in keys]
            writer.writerow([rate, *(value if math.isfinite(value) else None for value in found)])


def _rates(rows: Sequence[Row]) -> list[Rate | None]:
    """In ascending order of tokens, then from the largest tolerance, which needs the fewest, to none."""

    def order(rate: Rate | None) -> tuple[int, float]:
        if rate is None:
            return (0, 0.0)
        return (rate.num_tokens, math.inf if rate.tolerance is None else -rate.tolerance)

    return sorted({row.rate for row in rows}, key=order)


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.score.key for row in rows))


# ---------------------------------------------------------------- curves


def panels(rows: Sequence[Row]) -> list[Panel]:
    """What the figure shows: nothing for a single rate, else a panel for each kind of score that was found."""
    if len(_rates(rows)) < 2:
        return []
    drawn = [
        Panel(title, tuple(line for line in (_line(rows, key) for key in keys) if line.tokens))
        for title, keys in PANELS
    ]
    return [panel for panel in drawn if panel.lines]


def _line(rows: Sequence[Row], key: str) -> Line:
    means = {row.rate: row.score.value for row in rows if row.score.key == "tokens"}
    points = sorted(
        (means.get(row.rate, float(row.rate.num_tokens)), row.score.value)
        for row in rows
        if row.score.key == key and row.rate is not None and math.isfinite(row.score.value)
    )
    return Line(key, tuple(tokens for tokens, _ in points), tuple(value for _, value in points))


def draw(shown: Sequence[Panel], path: Path, title: str = "") -> None:
    """Writes the panels side by side, three in a row, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # costs a second to import
    from matplotlib.figure import Figure

    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: whatever display the user's matplotlib is set to stays unused
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, panel in zip(axes, shown, strict=False):
        draw_panel(axis, panel)
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def draw_panel(axis: Axes, panel: Panel) -> None:
    """Draws the lines over a logarithmic axis on which each number of tokens that was measured is written."""
    for line in panel.lines:
        axis.plot(line.tokens, line.values, marker="o", markersize=4, label=line.label)
    counts = sorted({count for line in panel.lines for count in line.tokens})
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, labels=[f"{count:.4g}" for count in counts])
    axis.minorticks_off()
    axis.set_xlabel("tokens, mean of an image")
    axis.set_title(panel.title, fontsize=9)
    axis.grid(alpha=0.3)
    if len(panel.lines) > 1:
        axis.legend(fontsize=8)
