"""The benchmark of guessed tokens with a tiny model: its rows, its judges, its prediction, its figures, its options."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from imgtok.generators.conditioning import ClassSlot
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.quantizers.vq import TableConfig
from imgtok.shapes import classifier
from imgtok.tokenizers.vq import VQ, VQConfig

FOLDER = Path(__file__).parents[2] / "benchmarks"
COMMAND = ["--windows", "4", "--groups", "3", "--images", "3", "--batch", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def programs():
    """The benchmark, and the one that draws several of its results."""
    sys.path.insert(0, str(FOLDER))
    try:
        names = ("speculative", "speculative_figure")
        yield [runpy.run_path(str(FOLDER / f"{name}.py"), run_name="benchmark") for name in names]
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a GPT over sixteen VQ tokens, with its tokenizer, which was trained on shapes."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"width": 16, "depth": 1, "num_heads": 2, "mlp_multiple": 8}
    gpt = GPT(GPTConfig(vocab_size=16, num_tokens=16, condition=ClassSlot(num_classes=64), **shape))
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    gpt.save_pretrained(folder)
    table = TableConfig(vocab_size=16, width=4)
    small = {"block_channels": (8, 8, 8), "layers_per_block": 1, "hidden_channels": 8, "norm_groups": 4}
    VQ(VQConfig(image_size=16, quantizer=table, **small)).save_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "config.yaml").write_text("data: {kind: shapes, textures: [solid]}\n", encoding="utf-8")
    return folder


@pytest.mark.slow
def test_methods_are_counted_judged_predicted_and_drawn(programs, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "load_or_train", lambda: classifier.ShapesNet().eval())
    program, figure = programs
    out, drawn = tmp_path / "out.json", tmp_path / "figure.png"
    program["main"]([str(model), *COMMAND, "--oracle", "--out", str(out), "--figure", str(drawn)])
    written = json.loads(out.read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in written["rows"]}
    assert [*rows] == ["exact", "jacobi", "coupled", "coupled, gumbel", "grouped G=3", "coupled G=3"]
    exact, jacobi = rows["exact"], rows["jacobi"]
    assert (exact["NFE"], exact["tokens a call"], exact["accepted length"], exact["by token"]) == (16, 1, 1, None)
    assert 1 + 15 / 4 <= jacobi["NFE"] < 16
    assert jacobi["tokens a call"] == round(16 / jacobi["NFE"], 2)
    assert jacobi["accepted length"] == pytest.approx(15 / (jacobi["NFE"] - 1), abs=2e-3)
    shares = jacobi["by token"]
    assert len(shares) == 16
    assert shares[0] is shares[-1] is None, "the first and the last are never guessed"
    assert 0 < sum(filter(None, shares)) < 14
    assert exact["fd_shapes"] != jacobi["fd_shapes"]
    assert exact["of renders"] == jacobi["of renders"]
    assert written["model"]["images"] == 3
    assert Image.open(drawn).width > 1000
    assert "| exact | 1 | 16.0 | 1.0 | 1.0 |" in capsys.readouterr().out

    program["main"](["--predict", str(out), "--tiny", "--rounds", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert "Predicted for GPT-B by the guesses of" in "\n".join(lines)
    assert "| exact | 1 | 1.0 | 1.0 | 1.0 |" in lines

    figure["main"]([f"a={out}", f"b={out}", "--out", str(drawn)])
    width, height = Image.open(drawn).size
    assert height > 0.7 * width


def test_a_prediction_is_what_calls_give_by_what_they_cost(programs):
    program, medians = programs[0], {1: 0.1, 4: 0.1, 8: 0.2}
    assert [program["cost"](window, medians) for window in (1, 6, 8, 20)] == [1, pytest.approx(1.5), 2, 5]
    assert program["predicted"]({"window": 8, "accepted length": 3.0}, medians) == 1.5


def test_a_tokenizer_of_other_images_has_no_oracle(programs, model):
    record = model / "tokenizer" / "config.yaml"
    text = record.read_text(encoding="utf-8")
    try:
        record.unlink()
        with pytest.raises(
            SystemExit, match=r"--oracle: reads shapes of one object, and .* has no record of its train"
        ):
            programs[0]["main"]([str(model), *COMMAND, "--oracle"])
    finally:
        record.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name a model, or say --passes"),
        (["--passes", "--oracle"], "--oracle and --figure need a model"),
        (["x", "--windows", "0"], "--windows and --groups are numbers of at least 1"),
    ],
)
def test_what_cannot_be_run_is_named(programs, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        programs[0]["options_of"](options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("exact", ("exact", None)),
        ("coupled, gumbel", ("coupled, gumbel", None)),
        ("coupled G=25", ("coupled, grouped", 25)),
        ("grouped G=3, tail last", ("grouped", 3)),
    ],
)
def test_methods_are_of_a_kind(programs, method, kind):
    assert programs[1]["kind_of"]({"method": method}) == kind
