"""The quickstart's plan, figures and page, on files of the kind that its stages leave. (Its stages are other tests.)"""

from __future__ import annotations

import json
import re
import shlex

import processes
import pytest
import torch

from imgtok import pictures
from imgtok.config import ConfigError
from imgtok.sample import quickstart
from imgtok.sample.report import Run, caption, write_page
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import ShapesConfig


@pytest.fixture
def config(tmp_path):
    return quickstart.Config(out=tmp_path / "run", seed=3, num=8)


def test_every_stage_is_a_command_that_a_user_can_type(config):
    from imgtok.cli import JOBS, parse

    for title, arguments in quickstart.Plan.make(config).stages():
        assert shlex.split(shlex.join(arguments)) == arguments
        job = next(name for name in JOBS if arguments[: name.count(" ") + 1] == name.split())
        module = __import__(JOBS[job][0], fromlist=["Config"])
        rest = arguments[job.count(" ") + 1 :]
        assert parse(module.Config, rest, getattr(module, "POSITIONAL", None)), title


def test_trained_and_untrained_go_through_the_same_scoring(config):
    plan = quickstart.Plan.make(config)
    trained, untrained = plan.scoring(""), plan.scoring("-untrained")
    assert [[text.replace("-untrained", "") for text in arguments] for _, arguments in untrained] == [
        arguments for _, arguments in trained
    ]


def test_all_stages_see_the_same_images(config):
    plan = quickstart.Plan.make(config)
    images = {
        tuple(sorted(text for text in arguments if text.startswith("data.") and "num_images" not in text))
        for _, arguments in plan.stages()
        if any(text.startswith("data.") for text in arguments)
    }
    assert len(images) == 1


@pytest.mark.parametrize("text", ["training.steps=3", "tokenizer.data.scale=2", "generator.sampling.top_k=1"])
def test_an_override_of_no_training_is_refused(config, tmp_path, text):
    with pytest.raises(ValueError, match="overrides"):
        quickstart.Plan.make(quickstart.Config(out=tmp_path, overrides=(text,)))


def test_the_commands_are_the_same_in_a_checkout_and_without_one(tmp_path, monkeypatch):
    here = quickstart.Plan.make(quickstart.Config()).stages()
    monkeypatch.chdir(tmp_path)
    assert quickstart.Plan.make(quickstart.Config()).stages() == here
    assert here[0][1][2] == "configs/quickstart/tokenizer.yaml"


def test_configs_elsewhere_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.yaml; leave configs out"):
        quickstart.Plan.make(quickstart.Config(configs=tmp_path))


@pytest.fixture
def forked(monkeypatch):
    """Stages come from the process that other tests fork from."""
    monkeypatch.setattr(quickstart, "PRELOADED", processes.PRELOADED)


@pytest.mark.usefixtures("forked")
def test_a_failing_stage_stops_the_quickstart(tmp_path):
    with pytest.raises(ValueError, match="'try' failed with exit status 2"):
        quickstart.run_stage("try", ["nonsense"], tmp_path / "stages.json")
    assert not (tmp_path / "stages.json").exists()


@pytest.mark.usefixtures("forked")
def test_seconds_of_finished_work_are_kept(tmp_path):
    times = tmp_path / "stages.json"
    times.write_text(json.dumps({"version": 1000.0}))
    seconds, peak = quickstart.run_stage("version", ["--version"], times)
    assert seconds == 1000.0
    assert 100 < peak < 4096  # a process that has imported torch
    assert quickstart.run_stage("other", ["--version"], times)[0] < 100
    assert set(json.loads(times.read_text())) == {"version", "other"}


def test_results_of_an_earlier_quickstart_go_when_there_are_new_ones(config, monkeypatch):
    """Results of another request are not replaced, so they are moved; a stage that fails puts them back."""
    before = [config.out / f"reconstruction.{suffix}" for suffix in ("json", "csv", "png")]
    others = [config.out / f"reconstructions.{suffix}" for suffix in ("json", "csv", "png")]  # beside a folder
    for path in (*before, *others):
        path.parent.mkdir(exist_ok=True)
        path.write_text("before")

    def stage(title, arguments, times):
        if arguments[0] == "evaluate":
            assert not any(path.exists() for path in before)
            before[0].write_text("half of it")
            raise ValueError("no space left")
        return 1.0, 1.0

    monkeypatch.setattr(quickstart, "run_stage", stage)
    with pytest.raises(ValueError, match="no space"):
        quickstart.main(config)
    assert [path.read_text() for path in (*before, *others)] == ["before"] * 6
    with quickstart.set_aside(before):
        before[0].write_text("now")
    assert sorted(path.name for path in config.out.iterdir() if "ions" not in path.name) == ["reconstruction.json"]


def write_scores(path, scores):
    rows = [{"key": key, "rate": rate, "value": value} for (key, rate), value in scores.items()]
    path.write_text(json.dumps({"scores": rows}))


def leave_results(out, suffix, value):
    """What the stages write, with 8 real renders as samples."""
    images, labels = ShapesDataset(ShapesConfig(textures=("solid",), scale=1.3, num_images=64), 32).batch(range(8))
    (out / f"samples{suffix}").mkdir(parents=True)
    for index, image in enumerate(pictures.to_uint8(images)):
        pictures.save_png(image, out / f"samples{suffix}/{index:06d}.png")
    (out / f"samples{suffix}/samples.json").write_text(json.dumps({"request": {}, "labels": labels.tolist()}))
    pictures.save_png(torch.zeros(3, 40, 60, dtype=torch.uint8), out / f"reconstructions{suffix}/grid.png")
    generation = {("oracle_top1", None): value, ("fd_shapes", None): 1.5, ("fd_shapes_clean", None): 0.5}
    write_scores(out / f"generation{suffix}.json", generation)
    reconstruction = {("psnr", "1"): 10.0 + value, ("psnr", "4"): 20.0 + value, ("oracle_top1", "1"): 0.0}
    write_scores(out / f"reconstruction{suffix}.json", {**reconstruction, ("oracle_top1", "4"): value})


def test_figures_are_those_of_the_highest_rate(tmp_path):
    leave_results(tmp_path, "", 0.75)
    figures = quickstart.figures_of(tmp_path, "")
    assert figures["oracle_top1"] == figures["oracle_reconstruction"] == 0.75
    assert figures["psnr_by_tokens"] == {"1": 10.75, "4": 20.75}
    assert figures["oracle_by_tokens"] == {"1": 0.0, "4": 0.75}


def test_the_page_shows_every_figure_beside_its_untrained_value(tmp_path):
    leave_results(tmp_path, "", 0.75)
    leave_results(tmp_path, "-untrained", 0.125)
    for name in ("tokenizer", "generator"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.0}\n')
    run = Run(seed=3, data="shapes", stages=[("a stage", "imgtok sample 'a b'", 12.0)])
    run.figures = {
        **quickstart.figures_of(tmp_path, ""),
        "untrained": quickstart.figures_of(tmp_path, "-untrained"),
        "seconds": 60.0,
        "peak_rss_mib": 1024.0,
    }
    page = write_page(run, tmp_path).read_text()
    assert "<td>75.0 %<td>12.5 %" in page
    assert "<td>20.8<td>20.1" in page
    assert page.count("class=right") == 16
    assert "class=wrong" not in page
    assert "imgtok sample &#x27;a b&#x27;" in page
    assert "<svg" in page
    style = page[: page.index("</style>")]
    assert ".samples img{width:100%;image-rendering:pixelated}" in style, "enlarged: sharp"
    sharp = re.findall(r"([\w. ]+)\{[^}]*pixelated", style)
    assert [each.strip() for each in sharp] == [".samples img", "img.small"]
    assert "<img class=small" not in page, "what is shrunk is not, or its labels could not be read"
    assert json.loads((tmp_path / "report.json").read_text())["oracle_top1"] == 0.75
    assert (tmp_path / "overview.png").exists()


def test_captions_say_what_was_read():
    assert "class=right>read: red circle" in caption(0, 0)
    assert "class=wrong>read: green circle" in caption(0, 1)
    assert "class=wrong>read: no single shape" in caption(0, -1)


def test_the_configuration_is_checked():
    with pytest.raises(ConfigError, match="num"):
        quickstart.Config(num=0)
