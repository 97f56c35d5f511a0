"""How the scores of an evaluation are shown: a table, a CSV file, and curves of quality against the number of tokens.

Rows are token counts and columns are scores; the full names with their protocols stand below the table and in the JSON.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imgtok.files import replacing
from imgtok.sample.evaluate.scoring import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS: Sequence[tuple[str, Sequence[str]]] = (
    ("rFID (lower is better)", ("rfid",)),
    ("FID (lower is better)", ("fid",)),
    ("sFID (lower is better)", ("sfid",)),
    ("Inception score (higher is better)", ("is",)),
    ("precision, recall (higher is better)", ("precision", "recall")),
    ("mean absolute error, grey levels (lower is better)", ("mae",)),
    ("PSNR, dB (higher is better)", ("psnr",)),
    ("SSIM (higher is better)", ("ssim",)),
    ("LPIPS (lower is better)", ("lpips",)),
    ("DINOv2 similarity (higher is better)", ("dino", "dino_patches")),
    ("oracle, share read as asked for (higher is better)", ("oracle_top1", "oracle_shape", "oracle_colour")),
    ("fd_shapes, not FID (lower is better)", ("fd_shapes", "fd_shapes_clean")),
)
"""Title and scores of each panel of the figure, in order."""
ONLY_IN_TABLES = ("oracle_extra", "oracle_unread")


@dataclass(frozen=True)
class Line:
    """One score against the number of tokens."""

    label: str
    counts: tuple[int, ...]
    """Ascending."""
    values: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """A small diagram."""

    title: str
    lines: tuple[Line, ...]


# ---------------------------------------------------------------- text


def table(rows: Sequence[Row]) -> str:
    """The scores as text: a row a token count, or a line a score where there is one version only."""
    counts, keys = _counts(rows), _keys(rows)
    if len(counts) == 1:
        width = max(len(row.score.name) for row in rows)
        return "\n".join(f"{row.score.name:{width}s}  {row.score.value:10.4f}" for row in rows)
    values = {(row.num_tokens, row.score.key): f"{row.score.value:.4f}" for row in rows}
    cells = [["tokens", *keys], *([str(count), *(values.get((count, key), "") for key in keys)] for count in counts)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(f"{cell:>{width}s}" for cell, width in zip(line, widths, strict=True)) for line in cells]
    names = {row.score.key: row.score.name for row in rows}
    width = max(map(len, names))
    return "\n".join([*lines, "", *(f"{key:{width}s}  {name}" for key, name in names.items())])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """A row a token count (empty where there is one version only), a column a score; no value is an empty cell."""
    values = {(row.num_tokens, row.score.key): row.score.value for row in rows}
    keys = _keys(rows)
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["num_tokens", *keys])
        for count in _counts(rows):
            found = [values.get((count, key), math.nan) for key in keys]
            writer.writerow([count, *(value if math.isfinite(value) else None for value in found)])


def _counts(rows: Sequence[Row]) -> list[int | None]:
    return sorted({row.num_tokens for row in rows}, key=lambda count: count or 0)


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.score.key for row in rows))


# ---------------------------------------------------------------- curves


def panels(rows: Sequence[Row]) -> list[Panel]:
    """What the figure shows: nothing for a single token count, else a panel for each kind of score that was found."""
    if len(_counts(rows)) < 2:
        return []
    drawn = [
        Panel(title, tuple(line for line in (_line(rows, key) for key in keys) if line.counts))
        for title, keys in PANELS
    ]
    return [panel for panel in drawn if panel.lines]


def _line(rows: Sequence[Row], key: str) -> Line:
    points = sorted(
        (row.num_tokens, row.score.value)
        for row in rows
        if row.score.key == key and row.num_tokens is not None and math.isfinite(row.score.value)
    )
    return Line(key, tuple(count for count, _ in points), tuple(value for _, value in points))


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
    """Draws the lines over a logarithmic axis on which each count that was measured is written."""
    for line in panel.lines:
        axis.plot(line.counts, line.values, marker="o", markersize=4, label=line.label)
    counts = sorted({count for line in panel.lines for count in line.counts})
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, labels=[str(count) for count in counts])
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    axis.set_title(panel.title, fontsize=9)
    axis.grid(alpha=0.3)
    if len(panel.lines) > 1:
        axis.legend(fontsize=8)
