"""`imgtok sample`: image i of seed s is the same however it is drawn, and a folder holds one request."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imgtok.cli import main as command_line
from imgtok.cli import parse
from imgtok.config import ConfigError
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.pipeline import ROWS, Pipeline, pipeline
from imgtok.metrics.saved_images import SavedImages
from imgtok.sample import images
from imgtok.sample.images import Config, grid_path, main
from imgtok.sections import Settings
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig
from imgtok.tokenizers.vae import VAEConfig

ROOT = Path(__file__).parents[2]
NUM = 37
GUIDED = Settings(guidance=1.5)


def randomise(model: torch.nn.Module) -> None:
    """Normal weights where a fresh model has zeros: its logits and velocities would not depend on anything."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    """A generator of some width with its tokenizer on an autoencoder: every kind of kernel takes part."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("generator")
    trunk = TrunkConfig(width=64, depth=1, head_dim=32)
    vae = VAEConfig(latent_channels=4, block_channels=(16, 32, 32), layers_per_block=1, norm_groups=8)
    tokenizer = FlexTok(
        FlexTokConfig(
            image_size=32, vae=vae, patch_size=2, num_registers=8, levels=(8, 5, 5), encoder=trunk, decoder=trunk,
            decoding=FlexTokDecoding(steps=2),
        )
    )  # fmt: skip
    model = GPT(
        GPTConfig(vocab_size=200, num_tokens=8, width=96, depth=2, num_heads=3, mlp_multiple=32).with_condition(
            num_classes=10
        )
    )
    randomise(model)
    randomise(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def sample(generator: Path, out: Path, **fields) -> Path:
    fields = {"num": NUM, "batch_size": 16, "sampling": GUIDED, "exact": True} | fields
    main(Config(model=str(generator), out=out, **fields))
    return out


@pytest.fixture(scope="module")
def samples(generator, tmp_path_factory) -> Path:
    return sample(generator, tmp_path_factory.mktemp("samples"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("0*.png"))])


def record(folder: Path) -> dict:
    return json.loads((folder / "samples.json").read_text())


# ------------------------------------------------------------------------------ (seed, index), and nothing else


def test_the_folder_of_a_job(samples):
    assert sorted(contents(samples)) == [f"{index:06d}.png" for index in range(NUM)]  # for tools that read all of them
    assert record(samples)["labels"] == [index % 10 for index in range(NUM)]
    images = pixels(samples)
    assert images.shape == (NUM, 32, 32, 3)
    assert len(np.unique(images.reshape(NUM, -1), axis=0)) == NUM
    assert images.std() > 10
    with Image.open(grid_path(samples)) as grid:
        assert grid.height == 10 * 96 + 9 * 2, "a row a class, enlarged three times"
        assert grid.width > 4 * 96 + 3 * 2 + 30, "four images and the number of the class"


def test_the_record_says_what_guessing_tokens_took(generator, samples, tmp_path):
    """Of all images together, of later jobs, too, that draw more of the same."""
    guessed = {"sampling": Settings(guidance=1.5, decoding="coupled", window=4), "exact": False, "grid": 0}
    for num in (3, 5):
        sample(generator, tmp_path, num=num, batch_size=2, **guessed)
        drawing = record(tmp_path)["drawing"]
        assert drawing["images"] == num
        assert 3 <= drawing["calls"] <= 8
        assert len(drawing["accepted_by_token"]) == 8
        assert drawing["seconds"] > 0
        assert sum(images for _, images in drawing["images_by_calls"]) == num
        figure = (tmp_path / "calls.svg").read_text(encoding="utf-8")
        assert figure.startswith("<svg")
        assert figure.rstrip().endswith("</svg>")
    assert not list(tmp_path.glob(".*"))
    assert sorted(contents(tmp_path)) == [f"{index:06d}.png" for index in range(5)]
    assert "drawing" not in record(samples), "where a token is a call"
    assert not (samples / "calls.svg").exists()


@pytest.mark.slow
def test_two_processes_and_another_batch_size_draw_the_same_bytes(generator, samples, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("ACCELERATE_USE_CPU", None)  # a machine without a GPU is enough
    environment.pop("OMP_NUM_THREADS", None)  # torchrun gives each process one thread
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(generator), f"out={tmp_path}", f"num={NUM}", "batch_size=5", "sampling.guidance=1.5", "exact=true"]
    done = subprocess.run(
        [*launch, "-m", "imgtok.sample.images", *arguments], env=environment, capture_output=True, text=True,
        check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "19 images to draw in this process, one of 2" in done.stderr  # the first one's; the other drew the rest
    assert contents(tmp_path) == contents(samples)
    assert record(tmp_path) == record(samples)


@pytest.mark.parametrize(("batch_size", "threads_around"), [(1, 1), (NUM, 1), (16, 3)])
def test_batch_size_and_threads_of_the_process_leave_no_trace(generator, samples, tmp_path, batch_size, threads_around):
    before = torch.get_num_threads()
    torch.set_num_threads(threads_around)
    try:
        num = 5 if batch_size == 1 else NUM
        sample(generator, tmp_path, batch_size=batch_size, num=num, grid=0)
        assert torch.get_num_threads() == threads_around  # and it is left as it was
    finally:
        torch.set_num_threads(before)
    known = contents(samples)
    assert contents(tmp_path) == {name: known[name] for name in sorted(known)[:num]}


def test_a_cpu_computes_blocks_of_one_size(generator, monkeypatch):
    """Not only the rounded pixels: whatever is asked for, the models see the same number of rows."""
    pipe = pipeline(generator, device="cpu", exact=True)
    seen = []
    decode = pipe.decoder.decode
    monkeypatch.setattr(
        pipe.decoder,
        "decode",
        lambda tokens, **rest: seen.append((len(tokens), torch.get_num_threads())) or decode(tokens, **rest),
    )
    for count in (1, ROWS, ROWS + 4):
        images = pipe.images([0] * count, range(count), seed=0)
        assert images.shape == (count, 3, 32, 32)
        assert images.dtype == torch.uint8
    assert seen == [(ROWS, 1)] * 4
    seen.clear()
    pipe.exact = False
    pipe.images([0] * 3, range(3), seed=0)
    assert seen == [(3, torch.get_num_threads())]  # by default not more rows than were asked for, and all threads


def test_by_default_noise_and_draws_are_the_same(generator, samples, tmp_path):
    """What `exact` adds is the last bits: rounded to pixels, nearly all images of so small a model are equal."""
    fast = pixels(sample(generator, tmp_path, exact=False, batch_size=3)).astype(int)
    differences = np.abs(fast - pixels(samples)).max(axis=(1, 2, 3))
    assert np.median(differences) <= 1
    assert (differences <= 1).mean() > 0.9


def test_exact_images_are_another_request(generator, tmp_path):
    sample(generator, tmp_path, num=2, exact=False)
    with pytest.raises(ValueError, match=r"another request \(different: exact\)"):
        sample(generator, tmp_path, num=2)


def test_another_seed_class_or_setting_draws_other_images(generator, samples, tmp_path):
    reference = pixels(samples)[:8]
    for name, fields in {
        "seed": {"seed": 1},
        "classes": {"classes": (9, 8)},
        "temperature": {"sampling": Settings(guidance=1.5, temperature=0.5)},
        "num_tokens": {"num_tokens": 1},
        "decoding.steps": {"decoding": Settings(steps=1)},
        "decoding.guidance": {"decoding": Settings(guidance=3.0)},
    }.items():
        other = pixels(sample(generator, tmp_path / name, num=8, **fields))
        assert (other != reference).any(axis=(1, 2, 3)).all(), name


def test_minus_one_draws_without_a_class(generator, tmp_path):
    out = sample(generator, tmp_path, num=4, classes=(-1, 3))
    assert record(out)["labels"] == [-1, 3, -1, 3]
    assert SavedImages(out).labels is None
    same = sample(generator, tmp_path / "unguided", num=4, classes=(-1, 3), sampling=Settings(guidance=0.0))
    assert (pixels(same)[[0, 2]] == pixels(out)[[0, 2]]).all()  # there is nothing to be guided to
    assert (pixels(same)[[1, 3]] != pixels(out)[[1, 3]]).any()


# --------------------------------------------------------------------------------------------- going on


def test_an_interrupted_job_draws_only_what_is_missing(generator, samples, tmp_path):
    shutil.copytree(samples, tmp_path, dirs_exist_ok=True)
    lost = ["000003.png", "000036.png"]
    for name in lost:
        (tmp_path / name).unlink()
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
    shutil.copy(grid_path(samples), tmp_path / "grid.png")  # as older versions had it
    sample(generator, tmp_path)
    assert contents(tmp_path) == contents(samples)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times
    assert grid_path(tmp_path).read_bytes() == grid_path(samples).read_bytes()


def test_an_overview_replaces_only_an_overview(tmp_path, caplog):
    out = tmp_path / "cat"
    out.mkdir()
    first, second = (torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (1, 2))
    assert images.save_grid(first, out) == images.save_grid(second, out) == tmp_path / "cat-grid.png"
    assert np.array(Image.open(tmp_path / "cat-grid.png")).max() == 2
    Image.new("RGB", (4, 4)).save(tmp_path / "cat-grid.png")  # somebody's own
    assert images.save_grid(first, out) is None
    assert Image.open(tmp_path / "cat-grid.png").size == (4, 4)
    assert f"no overview: {tmp_path}/cat-grid.png is there and none of this program's; move it" in caplog.text
    (tmp_path / "cat-grid.png").rename(tmp_path / "mine.png")
    assert images.save_grid(first, out), "the advice, followed"


@pytest.mark.parametrize("moment", ["while drawing", "while saving"])
def test_a_signal_leaves_whole_images_and_the_next_start_draws_the_rest(
    generator, samples, tmp_path, monkeypatch, capfd, moment
):
    """While the third batch is drawn, or when the fourth image of the second one is saved: then the batch is kept."""
    draw, save, calls = Pipeline.images_at, images.pictures.save_png, []
    here = (1, 16 + 4) if moment == "while saving" else (3, 0)

    def count(kind: int) -> None:
        calls.append(kind)
        if kind == (1 if here[1] == 0 else 2) and calls.count(kind) == (here[1] or here[0]):
            os.kill(os.getpid(), signal.SIGTERM)

    def watched_draw(self, *arguments, **options):
        count(1)
        return draw(self, *arguments, **options)

    def watched_save(*arguments):
        count(2)
        save(*arguments)

    words = [f"model={generator}", f"out={tmp_path}", f"num={NUM}", "batch_size=16", "sampling.guidance=1.5"]
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "images_at", watched_draw)
        patch.setattr(images.pictures, "save_png", watched_save)
        assert command_line(["sample", *words, "exact=true"]) == 143
    assert f"SIGTERM: stopped; what is finished is in {tmp_path}; start" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(f"{i:06d}.png" for i in range(32)), "samples.json"]
    assert command_line(["sample", *words, "exact=true"]) == 0
    assert contents(tmp_path) == contents(samples)


def test_ctrl_c_says_where_the_images_are(generator, tmp_path, monkeypatch, capfd):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "images_at", interrupt)
    assert command_line(["sample", str(generator), f"out={tmp_path}", "num=2"]) == 130
    assert f"SIGINT: stopped; what is finished is in {tmp_path}; start the same" in capfd.readouterr().err


def test_a_request_that_failed_does_not_keep_the_folder(generator, tmp_path, monkeypatch):
    """Point 10, whatever it was that was wrong: found out before the folder is taken, or while the first batch is
    drawn.
    """
    with pytest.raises(ValueError, match="num_tokens: the generator draws 1 to 8 tokens"):
        sample(generator, tmp_path, num=2, num_tokens=99)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "images_at", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sample(generator, tmp_path, num=2, seed=7)
    sample(generator, tmp_path, num=2, seed=3)
    with pytest.raises(ValueError, match=r"another request \(different: seed\)"):
        sample(generator, tmp_path, num=2, seed=7)


def test_a_finished_job_can_be_made_larger(generator, samples, tmp_path):
    sample(generator, tmp_path, num=10)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")}
    sample(generator, tmp_path, batch_size=7)
    assert contents(tmp_path) == contents(samples)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in times} == times
    assert len(record(tmp_path)["labels"]) == NUM


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"seed": 1}, "seed"),
        ({"classes": (1, 2)}, "classes"),
        ({"sampling": Settings(guidance=2.0)}, "sampling"),
        ({"num_tokens": 2}, "num_tokens"),
        ({"format": "npz"}, "format"),
    ],
)
def test_another_request_in_the_same_folder_is_refused(generator, samples, fields, name):
    before = contents(samples)
    with pytest.raises(ValueError, match=rf"another request \(different: {name}\).*out=FOLDER"):
        sample(generator, samples, **fields)
    assert contents(samples) == before


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_model_that_was_trained_again_is_another_request(generator, tmp_path, part):
    copy = shutil.copytree(generator, tmp_path / "generator")
    sample(copy, tmp_path / "samples", num=2)
    shutil.rmtree(copy)
    shutil.copytree(generator, tmp_path / "elsewhere")
    sample(tmp_path / "elsewhere", tmp_path / "samples", num=3)  # the same one under another name is no other request
    shutil.copytree(generator, copy)
    folder = copy / "tokenizer" if part == "tokenizer" else copy
    kind = FlexTok if part == "tokenizer" else GPT
    model = kind.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"different: {part}\)"):
        sample(copy, tmp_path / "samples", num=3)


# ------------------------------------------------------------------------------------------------- classes


def test_images_of_each_class(generator, tmp_path):
    arguments = ["--classes", "7,2", "--per-class", "3", "--sampling.guidance", "1.5", "--grid", "0", "--exact"]
    assert command_line(["sample", str(generator), "--out", str(tmp_path), *arguments]) == 0
    assert record(tmp_path)["labels"] == [7, 2, 7, 2, 7, 2]
    assert len(contents(tmp_path)) == 6


def test_classes_in_their_order(generator, samples, tmp_path):
    arguments = ["--per-class", "2", "--order", "by_class", "--sampling.guidance", "1.5", "--grid", "0", "--exact"]
    assert command_line(["sample", str(generator), "--out", str(tmp_path), *arguments]) == 0
    assert record(tmp_path)["labels"] == [index // 2 for index in range(20)]
    drawn = contents(tmp_path)
    assert len(drawn) == 20
    same = [index for index in range(20) if index // 2 == index % 10]
    assert same == [0, 19]
    for index in range(20):  # an image depends on its index and its label, however that came to it
        name = f"{index:06d}.png"
        assert (drawn[name] == contents(samples)[name]) == (index in same)
    sample(generator, tmp_path / "two", classes=(7, 2), per_class=3, order="by_class", grid=0)
    assert record(tmp_path / "two")["labels"] == [7, 7, 7, 2, 2, 2]


@pytest.mark.parametrize(
    ("fields", "names"), [({"per_class": 2}, "per_class"), ({"order": "in_turn"}, "order, per_class")]
)
def test_in_class_order_another_number_is_another_request(generator, tmp_path, fields, names):
    fixed = {"classes": (7, 2), "per_class": 1, "order": "by_class", "grid": 0}
    sample(generator, tmp_path, **fixed)
    before = contents(tmp_path)
    sample(generator, tmp_path, **fixed)
    with pytest.raises(ValueError, match=rf"another request \(different: {names}\)"):
        sample(generator, tmp_path, **fixed | fields)
    assert contents(tmp_path) == before


def test_the_record_of_a_job_in_turn_says_nothing_of_numbers(samples):
    request = record(samples)["request"]
    assert request.keys().isdisjoint({"per_class", "num"})
    assert request["sampling"]["guidance"] == 1.5  # all settings, the model's own among them
    assert request["decoding"]["steps"] == 2


def test_the_label_decides_and_not_its_place_in_the_list(generator, samples, tmp_path):
    sample(generator, tmp_path, num=2, classes=(0, 1), grid=0)  # as `samples` begins: 0, 1
    assert contents(tmp_path).items() <= contents(samples).items()


@pytest.mark.parametrize("classes", ["[10]", "[0, -2]"])
def test_a_class_outside_the_model_is_an_error(generator, tmp_path, capsys, classes):
    assert command_line(["sample", str(generator), f"out={tmp_path / 'out'}", f"classes={classes}"]) == 2
    assert "is not a class of" in (message := capsys.readouterr().err)
    assert "classes 0 to 9" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num=0", "num: given 0"),
        ("per_class=-1", "per_class: given -1"),
        ("order=by_class", "order: by_class needs per_class, the number of images of each class"),
        ("order=shuffled", "order: given 'shuffled'"),
        ("num_tokens=9", "draws 1 to 8 tokens, given [9]"),
        ("sampling.top_p=0", "sampling.top_p: given 0"),
        ("sampling.steps=4", "sampling has no field 'steps'"),
        ("decoding.steps=0", "decoding.steps: given 0"),
        ("format=jpg", "format: given 'jpg'"),
    ],
)
def test_values_out_of_range_are_named(generator, tmp_path, capsys, override, message):
    assert command_line(["sample", str(generator), f"out={tmp_path}", override]) == 2
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- one .npz


def test_npz_holds_the_same_images_and_labels(generator, samples, tmp_path):
    sample(generator, tmp_path, format="npz", grid=8)
    with np.load(tmp_path / "samples.npz") as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.dtype == np.uint8
    assert np.array_equal(images, pixels(samples))
    assert labels.dtype == np.int64
    assert labels.tolist() == record(samples)["labels"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.json", "samples.npz"]
    assert grid_path(tmp_path).is_file()


def test_a_finished_npz_is_not_drawn_again(generator, tmp_path, monkeypatch):
    sample(generator, tmp_path, format="npz", num=3, grid=0)
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "images_at", None)
        sample(generator, tmp_path, format="npz", num=3, grid=0)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_finished_npz_can_be_made_larger(generator, samples, tmp_path, monkeypatch):
    sample(generator, tmp_path, format="npz", num=3, grid=0)
    drawn = []
    images = Pipeline.images_at

    def seen(self, counts, subjects, *rest, **settings):
        drawn.extend(subjects)
        return images(self, counts, subjects, *rest, **settings)

    monkeypatch.setattr(Pipeline, "images_at", seen)
    sample(generator, tmp_path, format="npz", num=5, grid=0)
    assert drawn == [3, 4]
    with np.load(tmp_path / "samples.npz") as arrays:
        assert np.array_equal(arrays["arr_0"], pixels(samples)[:5])


def test_what_a_killed_process_left_among_the_parts_is_cleared(generator, tmp_path):
    (tmp_path / ".parts").mkdir()
    (tmp_path / ".parts" / ".000001.png.123.tmp").write_bytes(b"half")
    for _ in range(2):
        sample(generator, tmp_path, format="npz", num=2, grid=0)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.json", "samples.npz"]
        (tmp_path / ".parts").mkdir()


@pytest.mark.parametrize("name", ["000000.png", "7.png", "samples.npz"])
def test_images_of_unknown_origin_are_refused(generator, tmp_path, name):
    (tmp_path / name).write_bytes(b"someone's")
    with pytest.raises(ValueError, match=rf"holds {name} but no samples\.json.*out=FOLDER"):
        sample(generator, tmp_path, num=2)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# ------------------------------------------------------------------------------------------- the wrong model


def test_a_tokenizer_in_place_of_a_generator(generator, tmp_path):
    with pytest.raises(ValueError, match=r"holds a FlexTok .* but a generator is needed"):
        sample(generator / "tokenizer", tmp_path)


def test_a_generator_in_place_of_a_tokenizer(generator, tmp_path):
    with pytest.raises(ValueError, match=r"holds a GPT .* but a tokenizer is needed"):
        sample(generator, tmp_path, tokenizer=str(generator))


def test_a_generator_without_a_tokenizer(generator, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(generator / name, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer/ folder: say which one with tokenizer=FOLDER"):
        sample(tmp_path, tmp_path / "out")
    assert len(contents(sample(tmp_path, tmp_path / "out", tokenizer=str(generator / "tokenizer"), num=2))) == 2


def test_a_tokenizer_of_another_vocabulary(generator, tmp_path):
    trunk = TrunkConfig(width=16, depth=1, head_dim=8)
    FlexTok(
        FlexTokConfig(image_size=16, patch_size=4, num_registers=8, levels=(5, 5), encoder=trunk, decoder=trunk)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"8 tokens of 200.* 8 of 25: they were not trained together"):
        sample(generator, tmp_path / "out", tokenizer=str(tmp_path))


def test_a_model_must_be_named():
    with pytest.raises(ConfigError, match="model"):
        parse(Config, ["num=4"], "model")
