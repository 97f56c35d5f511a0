"""Scores as a table, as CSV and as curves."""

from __future__ import annotations

import csv

import pytest
from matplotlib.figure import Figure
from PIL import Image

from imgtok.metrics.scorers import CodeScorer, OracleScorer, Score
from imgtok.sample.evaluate.results import (
    ONLY_IN_TABLES,
    PANELS,
    Line,
    Panel,
    Row,
    draw,
    draw_panel,
    panels,
    table,
    write_csv,
)
from imgtok.tokenizers.base import Rate

COUNTS = (1, 2, 4, 8, 16)


def row(key: str, value: float, count: int | None) -> Row:
    return Row(Score(key, f"{key.upper()}-9[how]", value), None if count is None else Rate(count))


@pytest.fixture
def rows() -> list[Row]:
    """As an evaluation gives them, but the counts in no order; one value is missing."""
    return [
        row(key, float("nan") if (key, count) == ("rfid", 2) else scale * count, count)
        for count in (4, 1, 16, 2, 8)
        for key, scale in (("psnr", 1.0), ("rfid", -1.0), ("oracle_top1", 0.01), ("oracle_extra", 0.5))
    ]


def test_a_panel_holds_a_point_for_each_count(rows):
    shown = {panel.title.split(" ")[0]: panel for panel in panels(rows)}
    assert list(shown) == ["rFID", "PSNR,", "oracle,"]
    assert shown["PSNR,"].lines == (Line("psnr", COUNTS, (1.0, 2.0, 4.0, 8.0, 16.0)),)
    assert shown["rFID"].lines[0].tokens == (1, 4, 8, 16)
    assert [line.label for line in shown["oracle,"].lines] == ["oracle_top1"]


def test_a_single_count_makes_no_curve():
    assert panels([row("psnr", 1.0, 4), row("mae", 1.0, 4)]) == []
    assert panels([row("fid", 1.0, None)]) == []


def test_every_score_has_its_place_in_the_figure():
    scorers = {"rfid", "fid", "sfid", "is", "precision", "recall", "psnr", "ssim", "mae", "lpips", "dino"}
    scorers |= {"kid", "fd_lite0", "kd_lite0", "precision_lite0", "recall_lite0", "top1_lite0", "top5_lite0"}
    scorers |= {"top1_probe", "top1_probe_originals"}
    scorers |= {
        "perceptual_lite0",
        "dino_patches",
        "fd_shapes",
        "fd_shapes_clean",
        *OracleScorer.KEYS,
        *CodeScorer.KEYS,
    }
    drawn = [key for _, keys in PANELS for key in keys]
    assert sorted([*drawn, *ONLY_IN_TABLES]) == sorted(scorers)


def test_the_figure_is_a_picture_with_all_panels(rows, tmp_path):
    draw(panels(rows), tmp_path / "curve.png", "9 images")
    with Image.open(tmp_path / "curve.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.width > 2.5 * picture.height  # three panels side by side
    draw(panels(rows)[:1], tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.width < 1.5 * picture.height


def test_the_axis_names_each_count_on_a_logarithmic_scale():
    axis = Figure().subplots()
    draw_panel(axis, Panel("PSNR", (Line("a", COUNTS, tuple(map(float, COUNTS))), Line("b", (1, 32), (0.0, 1.0)))))
    assert axis.get_xscale() == "log"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "4", "8", "16", "32"]
    assert [len(line.get_xdata()) for line in axis.lines] == [5, 2]
    assert axis.get_legend() is not None


def test_the_table_has_a_row_a_count_and_the_protocols_below(rows):
    lines = table(rows).splitlines()
    assert lines[0].split() == ["rate", "psnr", "rfid", "oracle_top1", "oracle_extra"]
    assert [line.split() for line in lines[1:3]] == [
        ["1", "1.0000", "-1.0000", "0.0100", "0.5000"],
        ["2", "2.0000", "nan", "0.0200", "1.0000"],
    ]
    assert len({len(line) for line in lines[:6]}) == 1  # columns stand under each other
    assert lines[7].split() == ["psnr", "PSNR-9[how]"]
    assert len(lines) == 6 + 1 + 4


def test_one_version_is_a_line_a_score():
    assert table([row("fid", 2.5, None), row("is", 10.0, None)]).splitlines() == [
        "FID-9[how]      2.5000",
        "IS-9[how]      10.0000",
    ]


def test_the_csv_file_leaves_out_what_has_no_value(rows, tmp_path):
    write_csv(rows, tmp_path / "scores.csv")
    found = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [line["rate"] for line in found] == ["1", "2", "4", "8", "16"]
    assert [line["rfid"] for line in found] == ["-1.0", "", "-4.0", "-8.0", "-16.0"]
    write_csv([row("fid", 2.5, None)], tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_text() == "rate,fid\n,2.5\n"


def test_rates_stand_in_order_and_curves_over_the_mean_number_of_tokens(tmp_path):
    """A tolerance makes the number of tokens that of the image."""
    means = {Rate(4, 0.05): 3.5, Rate(16, 0.05): 11.25, Rate(16, 0.4): 2.0, Rate(16): 16.0}
    rows = [
        Row(Score(key, key, value), rate)
        for rate, mean in means.items()
        for key, value in (("tokens", mean), ("psnr", 10 + mean))
    ]
    assert panels(rows)[0].lines == (Line("psnr", (2.0, 3.5, 11.25, 16.0), (12.0, 13.5, 21.25, 26.0)),)
    assert [line.split()[0] for line in table(rows).splitlines()[1:5]] == ["4@0.05", "16@0.4", "16@0.05", "16"]
    write_csv(rows, tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_text().splitlines()[:2] == ["rate,tokens,psnr", "4@0.05,3.5,13.5"]
    axis = Figure().subplots()
    draw_panel(axis, panels(rows)[0])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["2", "3.5", "11.25", "16"]
