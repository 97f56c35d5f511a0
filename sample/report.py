"""The quickstart's page: pictures, curves and figures of one run, the untrained control beside each of them.

`write_page` makes one self-contained HTML file; nothing in it is loaded from elsewhere.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from imgtok import pictures
from imgtok.files import replacing
from imgtok.metrics.saved_images import RECORD
from imgtok.sample.evaluate.results import Line, Panel, draw_panel
from imgtok.sample.images import image_path, read_image
from imgtok.sample.page import inline_file, inline_png, inline_svg, section, write_html
from imgtok.shapes.oracle import read_classes
from imgtok.shapes.world import CLASS_NAMES


@dataclass
class Run:
    """What the quickstart has measured, filled in as its stages end."""

    seed: int
    data: str
    """The images in words: shapes, size, textures."""
    figures: dict[str, Any] = field(default_factory=dict)
    """report.json: the trained model's figures, and under `untrained` the same ones at step 0."""
    stages: list[tuple[str, str, float]] = field(default_factory=list)
    """(title, command, seconds) of each stage."""


def write_page(run: Run, out: Path) -> Path:
    """Writes `index.html`, `overview.png` and `report.json` into the run's folder."""
    write_overview(out)
    with replacing(out / "report.json") as temporary:
        temporary.write_text(json.dumps(run.figures, indent=2) + "\n", encoding="utf-8")
    sections = [
        headline(run),
        section("Reconstructions at each token count", RECONSTRUCTION_TEXT + reconstruction_pictures(out)),
        section("New images", SAMPLES_TEXT + sample_cells(out / "samples")),
        section(
            "The same generator before its first step", UNTRAINED_TEXT + sample_cells(out / "samples-untrained", 16)
        ),
        section("Curves", curves(run, out)),
        section("What was run", commands(run.stages)),
    ]
    return write_html(out / "index.html", "imgtok quickstart", "".join(sections))


RECONSTRUCTION_TEXT = """<p>Held-out images above, and what the tokenizer makes of their first 1, 2, 4, ... tokens.
Few tokens say roughly where; more say which colour and shape.
Second picture: the same tokenizer before training.</p>"""
SAMPLES_TEXT = """<p>Class-conditional samples. Under each: the class asked for, and what the oracle read. The oracle
compares an image with renders of every shape and colour; no network is involved.</p>"""
UNTRAINED_TEXT = (
    "<p>Random tokens through the trained tokenizer: what of the above the generator did not have to learn.</p>"
)


# ---------------------------------------------------------------- figures


def headline(run: Run) -> str:
    """The table of figures, each beside its value without training."""
    trained, untrained = run.figures, run.figures["untrained"]
    floor = f"other real renders score {trained['fd_shapes_clean']:.2f}"
    rows = [
        ("Samples read as the class asked for (oracle top-1; chance 1.6 %)", "oracle_top1", percent),
        ("Reconstructions read as their original (oracle)", "oracle_reconstruction", percent),
        (f"fd_shapes, a Fréchet distance on shape features, not FID ({floor})", "fd_shapes", "{:.2f}".format),
    ]
    cells = [(title, show(trained[key]), show(untrained[key])) for title, key, show in rows]
    for count, score in trained["psnr_by_tokens"].items():
        cells.append(
            (f"PSNR at {count} token{'s' if int(count) > 1 else ''}, dB", f"{score:.1f}",
             f"{untrained['psnr_by_tokens'][count]:.1f}")
        )  # fmt: skip
    body = "".join(f"<tr><td>{html.escape(a)}<td>{b}<td>{c}" for a, b, c in cells)
    minutes = trained["seconds"] / 60
    return f"""<h1>imgtok quickstart</h1><p class=lead>{html.escape(run.data)}. Seed {run.seed}, {minutes:.1f} minutes,
peak memory {trained["peak_rss_mib"] / 1024:.1f} GiB.</p>
<table><tr><th>figure<th>trained<th>untrained (step 0){body}</table>"""


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def commands(stages: Sequence[tuple[str, str, float]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(title)}<td class=left><code>{html.escape(command)}</code><td>{seconds:.0f} s"
        for title, command, seconds in stages
    )
    return f"<table><tr><th>stage<th>command<th>time{rows}</table>"


# ---------------------------------------------------------------- pictures


def reconstruction_pictures(out: Path) -> str:
    return inline_file(out / "reconstructions/grid.png") + inline_file(out / "reconstructions-untrained/grid.png")


def sample_cells(folder: Path, count: int = 64) -> str:
    """The first samples of a folder with what was asked for and what the oracle read."""
    labels = json.loads((folder / RECORD).read_text(encoding="utf-8"))["labels"][:count]
    images = torch.stack([read_image(image_path(folder, i)) for i in range(len(labels))])
    readings = read_classes(images.float() / 255)[0].tolist()
    cells = [
        f"<div>{inline_png(image)}{caption(label, reading)}</div>"
        for image, label, reading in zip(images, labels, readings, strict=True)
    ]
    return f"<div class=samples>{''.join(cells)}</div>"


def caption(label: int, reading: int) -> str:
    """The class asked for, and what the oracle read."""
    read = "no single shape" if reading < 0 else CLASS_NAMES[reading]
    kind = "right" if reading == label else "wrong"
    return f"{CLASS_NAMES[label]}<br><span class={kind}>read: {read}</span>"


def write_overview(out: Path) -> Path:
    """`overview.png`: the reconstructions above the first 64 samples."""
    count = len(json.loads((out / "samples" / RECORD).read_text(encoding="utf-8"))["labels"])
    samples = torch.stack([read_image(image_path(out / "samples", i)) for i in range(min(64, count))])
    parts = [
        read_image(out / "reconstructions/grid.png"),
        pictures.make_grid(pictures.enlarged(samples, 2), columns=16),
    ]
    width = max(part.shape[2] for part in parts)
    gap = torch.full((3, 8, width), 255, dtype=torch.uint8)
    rows = [torch.nn.functional.pad(part, (width - part.shape[2], 0), value=255) for part in parts]
    pictures.save_png(torch.cat([rows[0], gap, rows[1]], dim=1), out / "overview.png")
    return out / "overview.png"


# ---------------------------------------------------------------- curves


def curves(run: Run, out: Path) -> str:
    """PSNR against token count, and both training losses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    psnr, tokenizer, generator = figure.subplots(1, 3)
    lines = []
    for name, scores in (("trained", run.figures), ("untrained", run.figures["untrained"])):
        by_tokens: Mapping[str, float] = scores["psnr_by_tokens"]
        lines.append(Line(name, tuple(float(count) for count in by_tokens), tuple(by_tokens.values())))
    draw_panel(psnr, Panel("PSNR of reconstructions, dB", tuple(lines)))
    for axis, title, folder in ((tokenizer, "Tokenizer loss", "tokenizer"), (generator, "Generator loss", "generator")):
        steps, losses = read_log(out / folder / "log.jsonl")
        axis.plot(steps, losses)
        axis.set(xlabel="step", title=title)
    return inline_svg(figure)


def read_log(path: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a run's log, whose lines of validations are left out."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if "loss" in line]
    return [line["step"] for line in lines], [line["loss"] for line in lines]
