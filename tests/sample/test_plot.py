"""`imgtok plot`: what it draws of logs, and what it says of folders that have none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from imgtok.cli import main
from imgtok.config import ConfigError
from imgtok.sample.plot import Config, Curve, after_the_start, best_of, called, chosen_figures, draw, read_run


def run(folder: Path, losses: list[float], held_out: dict[int, dict[str, float]], **more: Any) -> Path:
    """The folder of a run with these losses after each step, and these validations."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step, loss in enumerate(losses):
        lines.append({"step": step, "loss": loss, "lr": 0.1, "seconds": 36.0 * step})
        if step in held_out:
            own = {f"validation/{name}": value for name, value in held_out[step].items()}
            lines.append({"step": step, **own, "validation/images": 8, "seconds": 36.0 * step + 1})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    first = run(
        tmp_path / "a/gpt",
        [9.0, 3, 2, 1],
        {0: {"loss": 9, "psnr": 1}, 2: {"loss": 2.5, "psnr": 8}, 3: {"loss": 3, "psnr": 7}},
    )
    return [first, run(tmp_path / "b/gpt", [8.0, 4, 3, 2], {})]


def test_one_run_gets_its_picture_beside_it(runs, capsys):
    assert main(["plot", str(runs[0])]) == 0
    assert Image.open(runs[0] / "curves.png").size > (500, 300)
    page = (runs[0] / "curves.html").read_text()
    assert "<svg" in page
    assert "<tr><td class=left>loss<td class=left>gpt<td>1<td>3<td>2.5<td>2" in page
    assert "<tr><td class=left>psnr<td class=left>gpt<td><td>7<td>8<td>2" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


def test_several_runs_are_told_apart(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(runs[0]), str(runs[1] / "log.jsonl"), "figures=loss,lr", "against=hours"]) == 0
    page = (tmp_path / "outputs/curves.html").read_text()
    assert "a/gpt" in page
    assert "b/gpt" in page
    assert called(runs) == ["a/gpt", "b/gpt"]


@pytest.mark.parametrize(("more", "out"), [([], "outputs/curves"), (["out=here/both"], "here/both")])
def test_several_runs_are_drawn_below_outputs_unless_a_place_is_named(runs, tmp_path, monkeypatch, caplog, more, out):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "imgtok")
    before = {path.name for path in tmp_path.iterdir()}
    assert main(["plot", *map(str, runs), *more]) == 0
    assert caplog.messages[-1] == f"written to {out}.png, {out}.html"
    assert {path.name for path in tmp_path.iterdir()} == before | {out.split("/")[0]}
    assert {path.name for path in (tmp_path / out).parent.iterdir()} == {
        Path(f"{out}.{end}").name for end in ("png", "html")
    }


def test_what_is_drawn(runs):
    both = [read_run(folder, name) for folder, name in zip(runs, "xy", strict=True)]
    assert both[0].training["loss"] == Curve((0, 1, 2, 3), (0.0, 0.01, 0.02, 0.03), (9.0, 3, 2, 1))
    assert chosen_figures(both, []) == ["loss", "psnr", "lr"]
    assert chosen_figures(both, ["validation/psnr"]) == ["psnr"]
    curve = both[0].validation["psnr"]
    assert (best_of(curve, "psnr"), best_of(curve, "loss")) == (1, 0)
    assert after_the_start(both[0].training["loss"]) == [9.0, 3, 2, 1]
    figure = draw(both, ["loss"], "steps")
    assert [line.get_label() for line in figure.axes[0].get_lines()][:2] == ["x, training", "x, held out"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x, training", "x, held out", "y, training"]


def test_values_that_the_limits_leave_out_are_told(tmp_path, capsys):
    losses = [17.0, 9.0, 3.0, 2.5, *[2.0 + 0.1 * (step % 2) for step in range(36)]]
    held_out = {
        step: {"loss": 17.361 if step == 0 else 2.2, "psnr": 3.0 if step == 0 else 20.0 + step}
        for step in range(0, 40, 5)
    }
    folder = run(tmp_path / "run", losses, held_out)
    figure = draw([read_run(folder, "run")], ["loss", "psnr", "lr"], "hours")
    loss, psnr, rate = ([text.get_text() for text in axis.texts] for axis in figure.axes)
    assert loss == ["4 values above, up to 17.36 at step 0"]
    assert psnr == ["1 value below: 3 at step 0"]
    assert rate == []
    for axis, count in zip(figure.axes, (4, 1, 0), strict=True):  # as many as the lines that are drawn have there
        low, high = axis.get_ylim()
        values = [value for line in axis.get_lines() for value in line.get_ydata()]
        assert sum(not low <= value <= high for value in values) == count
    assert main(["plot", str(folder)]) == 0
    page = (folder / "curves.html").read_text()
    assert "4 values above, up to 17.36 at step 0" in page
    assert "1 value below: 3 at step 0" in page


@pytest.mark.parametrize("name", ["a", "fine-tuned from a model", "a run whose name is long enough for a line"])
@pytest.mark.parametrize("figures", [["loss"], ["loss", "lr"]])
def test_the_legend_is_no_wider_than_the_picture(runs, name, figures):
    both = [read_run(run, f"{name} {number}") for number, run in enumerate(runs)]
    figure = draw(both, figures, "steps")
    figure.canvas.draw()
    legend, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= legend.x0 < legend.x1 <= whole.x1
    assert whole.y0 <= legend.y0 < legend.y1 < whole.y1 / 2


def test_what_is_no_run_is_named(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"runs: \S*empty: no log.jsonl: this is not the folder of a training"):
        read_run(tmp_path / "empty", "")
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; did you mean \S*a/gpt"):
        read_run(tmp_path / "a/gtp", "")
    (tmp_path / "empty/log.jsonl").touch()
    with pytest.raises(ValueError, match="no line has been written yet"):
        read_run(tmp_path / "empty", "")
    with pytest.raises(
        ConfigError, match="figures: 'psnr@4' is in the log of no run; there are: loss, lr, psnr, images"
    ):
        chosen_figures([read_run(runs[0], "x")], ["psnr@4"])
    with pytest.raises(ConfigError, match="names: 1 names for 2 runs"):
        Config(runs=tuple(runs), names=("x",))
