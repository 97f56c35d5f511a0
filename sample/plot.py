"""`imgtok plot`: the training and validation curves of one or several runs, as a picture and as one HTML page.

All it reads is `log.jsonl` in the folders of the runs, which may still be going on.
"""

from __future__ import annotations

import html
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from imgtok import announce
from imgtok.cli import run_job
from imgtok.config import REMEDY, ConfigError, check
from imgtok.files import check_there, replacing
from imgtok.runs import MORE_IS_BETTER
from imgtok.sample.page import MAIN, OTHERS, inline_svg, section, write_html

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POSITIONAL = "runs"
LOG, VALIDATION = "log.jsonl", "validation/"
ACROSS = 3
"""Diagrams in a row."""
LINE, LETTER = 0.6, 0.08
"""Inches of the legend that the line of an entry takes, and a letter of its name."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draws the curves of training runs: one diagram a figure, a colour a run; of figures that were measured on
    held-out images with them, and with what is best of these marked. Writes a PNG and an HTML page.
    """

    job: Literal["plot"] = "plot"
    """Which program this file is for."""
    runs: tuple[Path, ...] = field(
        metadata={REMEDY: "imgtok plot RUN, the folder of a training run; several are laid over each other"}
    )
    """Folders of training runs."""
    names: tuple[str, ...] = ()
    """What the runs are called in the legend, as many as there are; by default the parts of their paths that differ."""
    figures: tuple[str, ...] = ()
    """What is drawn, by its names in log.jsonl, such as loss,grad_norm or psnr@4,psnr@16; by default the loss, what is
    measured on held-out images (of PSNR by tokens that with all of them), and the learning rate."""
    against: Literal["steps", "hours"] = "steps"
    """What the curves are drawn over."""
    out: Path | None = None
    """Both files, without an ending; null is `curves` in the folder of the run, and outputs/curves for several runs."""

    def __post_init__(self) -> None:
        check(self)
        if not self.runs:
            raise ConfigError("runs: name the folder of a training run: imgtok plot RUN")
        if self.names and len(self.names) != len(self.runs):
            raise ConfigError(f"names: {len(self.names)} names for {len(self.runs)} runs; give each run one, or none")


@dataclass(frozen=True)
class Curve:
    """A figure of a run."""

    steps: Sequence[int]
    hours: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Run:
    """The curves of one run by the names of their figures: of the training images, and of held-out ones."""

    name: str
    training: Mapping[str, Curve]
    validation: Mapping[str, Curve]


def main(config: Config) -> None:
    """Writes `out`.png and `out`.html."""
    names = config.names or called(config.runs)
    announce.begins("plot", data=f"{len(config.runs)} run{'s'[: len(config.runs) != 1]}, {', '.join(names)}")
    runs = [read_run(folder, name) for folder, name in zip(config.runs, names, strict=True)]
    figures = chosen_figures(runs, config.figures)
    out = config.out or (folder_of(config.runs[0]) / "curves" if len(runs) == 1 else Path("outputs/curves"))
    figure = draw(runs, figures, config.against)
    picture = out.with_name(f"{out.name}.png")
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png")
    page = write_html(out.with_name(f"{out.name}.html"), ", ".join(names), body_of(runs, figures, figure, config))
    announce.ends(picture, page)


# ---------------------------------------------------------------- reading


def folder_of(path: Path) -> Path:
    """The folder of a run, of which one may also name the log, a model or a checkpoint in it.

    Raises FileNotFoundError for what is no run.
    """
    check_there(path, "runs")
    path = path.expanduser()
    for folder in (path, *list(path.absolute().parents)[:2]):
        if (folder / LOG).is_file():
            return folder
    raise FileNotFoundError(f"runs: {path}: no {LOG}: this is not the folder of a training run, or it has not begun")


def called(paths: Sequence[Path]) -> list[str]:
    """The parts of the paths by which the runs can be told apart."""
    parts = [folder_of(path).resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_run(path: Path, name: str) -> Run:
    """The curves in a run's log; a line that is only half written is left out. Raises ValueError for an empty log."""
    log = folder_of(path) / LOG
    lines = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    training, validation = dict[str, list[Any]](), dict[str, list[Any]]()
    for line in lines:
        for key, value in line.items():
            if key in ("step", "seconds") or not isinstance(value, int | float):
                continue
            curves = validation if key.startswith(VALIDATION) else training
            row = (line["step"], line.get("seconds", math.nan) / 3600, value)
            curves.setdefault(key.removeprefix(VALIDATION), []).append(row)
    if not training and not validation:
        raise ValueError(f"runs: {log}: no line has been written yet; the first comes after the first step")
    return Run(
        name, *({key: Curve(*zip(*rows, strict=True)) for key, rows in c.items()} for c in (training, validation))
    )


def chosen_figures(runs: Sequence[Run], asked: Sequence[str]) -> list[str]:
    """What is drawn. Raises ConfigError for a figure that no run has."""
    known = list(dict.fromkeys(name for run in runs for name in (*run.training, *run.validation)))
    asked = [name.removeprefix(VALIDATION) for name in asked]
    for name in asked:
        if name not in known:
            raise ConfigError(f"figures: {name!r} is in the log of no run; there are: {', '.join(known)}")
    if asked:
        return asked
    measured = [
        name for run in runs for name in run.validation if name not in ("images", "seconds") and "@" not in name
    ]
    return [name for name in dict.fromkeys(["loss", *measured, "lr"]) if name in known]


# ---------------------------------------------------------------- drawing


def draw(runs: Sequence[Run], figures: Sequence[str], against: Literal["steps", "hours"]) -> Figure:
    """One diagram a figure: thin lines of training images, lines with dots of held-out ones, the best one marked."""
    from matplotlib.figure import Figure  # costs a second to import

    columns = min(ACROSS, len(figures))
    rows = -(-len(figures) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained", dpi=120)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, name in zip(axes, figures, strict=False):
        draw_figure(axis, runs, name, against)
    for axis in axes[len(figures) :]:
        axis.set_axis_off()
    handles: dict[str, Any] = {}
    for axis in axes:  # lines of training are faint in the first diagram, beside those of held-out images
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, line)
    width, height = figure.get_size_inches()
    fitting = max(1, int(width / (LINE + LETTER * max(map(len, handles), default=1))))
    across = min(fitting, len(handles) or 1)
    figure.set_size_inches(width, height + 0.25 + 0.2 * -(-len(handles) // across))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=across, frameon=False, fontsize=9)
    return figure


def draw_figure(axis: Axes, runs: Sequence[Run], name: str, against: Literal["steps", "hours"]) -> None:
    """One figure of all runs, and in words which of its values lie outside."""
    shown: list[float] = []
    drawn: list[Curve] = []
    for colour, run in zip(colours(len(runs)), runs, strict=True):
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        held_out = run.validation.get(name)
        if (trained := run.training.get(name)) is not None:
            faint = 0.45 if held_out is not None else 1.0
            axis.plot(
                getattr(trained, against),
                trained.values,
                color=colour,
                linewidth=1.2,
                alpha=faint,
                label=f"{prefix}training",
            )
            shown += after_the_start(trained)
            drawn.append(trained)
        if held_out is not None:
            places = getattr(held_out, against)
            axis.plot(places, held_out.values, color=colour, linewidth=1.6, marker=".", label=f"{prefix}held out")
            shown += after_the_start(held_out)
            drawn.append(held_out)
            if (best := best_of(held_out, name)) is not None:
                axis.plot(places[best], held_out.values[best], "o", color=colour, markerfacecolor="none", markersize=9)
    axis.set_title(name, fontsize=10)
    axis.set_xlabel(against, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if shown and max(shown) > min(shown):
        room = 0.06 * (max(shown) - min(shown))
        low, high = min(shown) - room, max(shown) + room
        axis.set_ylim(low, high)
        points = [point for curve in drawn for point in zip(curve.values, curve.steps, strict=True)]
        say_outside(axis, [point for point in points if point[0] > high], above=True)
        say_outside(axis, [point for point in points if point[0] < low], above=False)


def say_outside(axis: Axes, points: Sequence[tuple[float, int]], *, above: bool) -> None:
    """A line at the edge of a diagram about values that its limits leave out, each with its step, such as `1 value
    above: 17.36 at step 0`.
    """
    if not points:
        return
    side, to, place, aligned = ("above", "up to ", 0.99, "top") if above else ("below", "down to ", 0.01, "bottom")
    value, step = (max if above else min)(points)
    count = f"{len(points)} values {side}, {to}" if len(points) > 1 else f"1 value {side}: "
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
    axis.text(
        0.99, place, f"{count}{value:.4g} at step {step}",
        transform=axis.transAxes, fontsize=7, horizontalalignment="right", verticalalignment=aligned, bbox=box,
    )  # fmt: skip


def colours(count: int) -> list[str]:
    """A colour for each run."""
    known = (MAIN, *OTHERS)
    return [known[place % len(known)] for place in range(count)]


def after_the_start(curve: Curve) -> list[float]:
    """The values that a diagram has room for: all but those of the first twentieth of a longer curve, which would
    flatten what follows.
    """
    first = len(curve.values) // 20 + (len(curve.values) > 4)
    return [value for value in curve.values[first:] if math.isfinite(value)]


def best_of(curve: Curve, name: str) -> int | None:
    """The place of the best value; None where none is finite."""
    finite = [place for place, value in enumerate(curve.values) if math.isfinite(value)]
    if not finite:
        return None
    choose = max if name.startswith(MORE_IS_BETTER) else min
    return choose(finite, key=lambda place: curve.values[place])


# ---------------------------------------------------------------- the page


def body_of(runs: Sequence[Run], figures: Sequence[str], figure: Figure, config: Config) -> str:
    """The diagrams, and what they end with as a table."""
    rows = "".join(row_of(run, name) for name in figures for run in runs)
    table = (
        "<table><tr><th>figure<th>run<th>training, last<th>held out, last<th>held out, best<th>after step"
        f"{rows}</table>"
    )
    places = ", ".join(f"<code>{html.escape(str(path))}</code>" for path in config.runs)
    note = (
        "<p class=small>Training: means since the last line of the log, of the weights as they were then. Held out: "
        "always the same images and noise, with the averaged weights where the run keeps an average; a circle marks "
        "the best.</p>"
    )
    return f"<h1>Curves</h1><p class=lead>{places}</p>{inline_svg(figure)}{note}{section('In numbers', table)}"


def row_of(run: Run, name: str) -> str:
    """One figure of one run."""
    trained, held_out = run.training.get(name), run.validation.get(name)
    if trained is None and held_out is None:
        return ""
    best = None if held_out is None else best_of(held_out, name)
    cells = ["" if curve is None else f"{curve.values[-1]:.5g}" for curve in (trained, held_out)]
    if held_out is not None and best is not None:
        cells += [f"{held_out.values[best]:.5g}", str(held_out.steps[best])]
    else:
        cells += ["", ""]
    named = "".join(f"<td class=left>{html.escape(text)}" for text in (name, run.name))
    return f"<tr>{named}{''.join(f'<td>{cell}' for cell in cells)}"


if __name__ == "__main__":
    run_job(sys.modules[__name__])
