"""What a job works on is named, by the user or by the record of its model; and it says so, at its start and its end.

Advice in messages is followed here, and a refused job leaves nothing behind.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imgtok
from imgtok.cli import main
from imgtok.generators.sampling import TokenSampling
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import ShapesConfig

TINY = Path(__file__).parents[1] / "configs/tiny"
TRAINING = "training={steps: 1, batch_size: 2, learning_rate: 1e-3, preview_every: 0, trackers: [], log_every: 9}"
QUIET = (TRAINING, "num_preview=0")
TRAINED, OTHER = 20, 12
"""Images of the folder that the models were trained on, and of another one."""


def draw(folder: Path, count: int, seed: int = 0) -> Path:
    """Images in three classes."""
    draws = np.random.default_rng(seed)
    for number in range(count):
        path = folder / f"class{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return folder


class Said(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Iterator[tuple[Path, dict[str, list[str]]]]:
    """A folder with `train/` and `other/`, and in it what each job made of `train/`; and what each has said."""
    folder, said = tmp_path_factory.mktemp("made"), {}
    draw(folder / "train", TRAINED)
    draw(folder / "other", OTHER, seed=1)
    images = f"data={{kind: folder, path: {folder}/train}}"
    commands = {
        "train tokenizer": [str(TINY / "flextok.yaml"), f"out={folder}/tok", images, "held_out=0.2", *QUIET],
        "train autoencoder": [str(TINY / "vae.yaml"), f"out={folder}/vae", images, "held_out=0.2", *QUIET],
        "cache": [f"{folder}/tok", f"out={folder}/tokens"],
        "cache latents": [f"{folder}/vae", f"out={folder}/latents", "image_size=16"],
        "train generator": [
            *(str(TINY / "gpt.yaml"), f"out={folder}/gpt", f"tokens={folder}/tokens", f"tokenizer={folder}/tok"),
            *QUIET,
        ],
        "sample": [f"{folder}/gpt", f"out={folder}/samples", "num=3"],
        "reconstruct": [f"{folder}/tok", f"out={folder}/shown"],
        "evaluate": [f"tokenizer={folder}/tok", f"out={folder}/scores.json", "metrics=psnr", "rates=4"],
        "export": [f"{folder}/gpt/checkpoints", f"out={folder}/exported", "layout=imgtok"],
    }
    handler, logger = Said(), logging.getLogger("imgtok")
    logger.addHandler(handler)
    try:
        for job, words in commands.items():
            handler.lines = []
            assert main([*job.split(), *words]) == 0, (job, handler.lines)
            said[job] = handler.lines
    finally:
        logger.removeHandler(handler)
    yield folder, said
    shutil.rmtree(folder)


def refused(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    return str(capsys.readouterr().err)


def start(caplog, *words: object) -> str:
    """The line that a job begins with."""
    caplog.set_level(logging.INFO, "imgtok")
    caplog.clear()
    assert main([*map(str, words)]) == 0
    job = " ".join(map(str, words[: 2 if words[0] == "train" else 1]))
    return next(message for message in caplog.messages if message.startswith(f"{job}: "))


# ------------------------------------------------------------------------------------------- said at start and end


def test_every_job_says_what_it_works_on_and_where_it_put_it(made, capsys):
    folder, said = made
    recorded = f"{folder}/train, as {folder}/tok/final was trained on"
    expected = {
        "train tokenizer": (f"data: {folder}/train: 16 images to train on, 4 held out, 3 classes, 16 px", "tok/final"),
        "train autoencoder": (f"data: {folder}/train: 16 images to train on, 4 held out", "vae/final"),
        "cache": (f"data: {recorded}: 16 images to train on (held_out=0.2), 3 classes", "tokens: tokens of 16 images"),
        "cache latents": (f"{folder}/train, as {folder}/vae/final was", "latents: latents of 16 images"),
        "train generator": (f"data: tokens of 16 images, 3 classes in {folder}/tokens; model: gpt", "gpt/final"),
        "sample": (f"model: {folder}/gpt/final (gpt, step 1); decoder: {folder}/gpt/final/tokenizer", "samples"),
        "reconstruct": (f"data: {recorded}: 4 images held out (held_out=0.2), 3 classes, 16 px", "shown/grid.png"),
        "evaluate": (f"data: {recorded}: 4 images held out (held_out=0.2)", None),
        "export": (f"model: {folder}/gpt/checkpoints/step_0000001 (gpt, step 1)", "exported"),
    }
    assert expected.keys() == said.keys()
    for job, (begins, ends) in expected.items():
        first = [line for line in said[job] if line.startswith(f"{job}: ")]
        assert len(first) == 1, job
        assert begins in first[0]
        assert "out: " in first[0]
        last = [line for line in said[job] if line.startswith("written to ")]
        assert [line.startswith(f"written to {folder}/{ends}") for line in last] == ([True] if ends else [])
    for job, to_do in (
        ("cache", "1 shard to write"),
        ("cache latents", "1 shard to write"),
        ("sample", "3 images to draw"),
    ):
        assert to_do in said[job]  # and no word of processes where there is one
    assert start_of_record(folder / "shown/rates.json") == (str(folder / "train"), 0.2, 4)
    assert json.loads((folder / "scores.json").read_text())["config"]["data"]["path"] == str(folder / "train")


def start_of_record(path: Path) -> tuple[str, float, int]:
    data = json.loads(path.read_text())["data"]
    return data["path"], data["held_out"], data["num"]


# ------------------------------------------------------------------------------------------- which images


def test_no_job_runs_on_images_that_nobody_named(made, tmp_path, capsys):
    folder, _ = made
    out = tmp_path / "out"
    for name in ("tok", "vae"):
        shutil.copytree(folder / name / "final", tmp_path / name)
        (tmp_path / name / "config.yaml").unlink()
    model = "model={kind: flextok, image_size: 16, patch_size: 4}"
    jobs: list[list[object]] = [
        ["train", "tokenizer", model, TRAINING],
        ["train", "autoencoder", "model={kind: vae}", "image_size=16", TRAINING],
        ["cache", tmp_path / "tok"],
        ["cache", "latents", tmp_path / "vae", "image_size=16"],
        ["cache", "text", "minilm"],
        ["reconstruct", tmp_path / "tok"],
    ]
    for words in jobs:
        message = refused(capsys, *words, f"out={out}")
        assert "data: is required" in message
        assert "data.kind=folder data.path=FOLDER" in message
        assert "data.kind=shapes" in message
    message = refused(capsys, "evaluate", f"tokenizer={tmp_path}/tok", f"out={out}/s.json")
    assert f"data: is required, since {tmp_path}/tok has no record" in message
    assert "data.kind: is required, must be one of 'folder'" in refused(
        capsys, *jobs[5], f"data.path={folder}", f"out={out}"
    )
    message = refused(capsys, "evaluate", f"images={folder}/samples", "metrics=fd_shapes", f"out={out}/s.json")
    assert "fd_shapes compares with built-in shapes: say which, data.kind=shapes" in message
    assert not out.exists()
    assert (
        main(["reconstruct", str(tmp_path / "tok"), f"out={out}", "data.kind=folder", f"data.path={folder}/other"]) == 0
    )


def test_the_words_of_the_readme_name_images_over_a_file_with_others(made, tmp_path, caplog):
    """`data.kind=folder data.path=DIR`, over a configuration that ships with imgtok and trains on shapes."""
    folder, _ = made
    words = ("data.kind=folder", f"data.path={folder}/other", f"out={tmp_path}", *QUIET)
    line = start(caplog, "train", "tokenizer", "tiny/flextok", *words)
    assert f"data: {folder}/other: 11 images to train on" in line
    assert "data.kind=folder in place of the file's shapes: its num_images=64 is left out" in caplog.text


def test_a_model_that_has_left_its_run_still_knows_its_images(made, tmp_path, capsys, caplog):
    folder, _ = made
    shutil.copytree(folder / "tok/final", tmp_path / "copied")
    assert main(["export", f"{folder}/tok/checkpoints", f"out={tmp_path}/exported", "layout=imgtok"]) == 0
    (folder / "gpt/inside").symlink_to(tmp_path / "copied")  # in the folder of a run that it is not of
    names = (tmp_path / "copied", tmp_path / "exported", folder / "gpt/inside")
    for name in names:
        assert f", as {name} was trained on: " in start(caplog, "reconstruct", name, f"out={tmp_path}/shown", "rates=4")
        shutil.rmtree(tmp_path / "shown")
    data = folder / "train"
    kept = data.rename(folder / "kept")
    try:
        draw(data, TRAINED, seed=5)  # as many, under the same names
        for name in names:
            message = refused(capsys, "cache", name, f"out={tmp_path}/tokens")
            assert f"{data} holds other images now than {name} was trained on (their content has changed)" in message
        (tmp_path / "copied/identity.json").unlink()  # as an earlier version left it: the place is all that is known
        line = start(caplog, "cache", tmp_path / "copied", f"out={tmp_path}/tokens")
        assert f"{data}, by the record of {tmp_path}/copied: 16 images" in line
    finally:
        (folder / "gpt/inside").unlink()
        shutil.rmtree(data)
        kept.rename(data)


def test_recorded_images_that_are_elsewhere_or_have_changed(made, tmp_path, capsys, caplog):
    folder, _ = made
    out = f"out={tmp_path}/out"
    shutil.copytree(folder / "tok", tmp_path / "tok")
    data = folder / "train"
    moved = data.rename(folder / "moved")
    try:
        message = refused(capsys, "reconstruct", tmp_path / "tok", out)
        assert f"{data}: no such folder of images. {tmp_path}/tok/final was trained on these images" in message
        assert "say where they lie now, data.kind=folder data.path=..." in message
        line = start(caplog, "reconstruct", tmp_path / "tok", out, "data.kind=folder", f"data.path={moved}")
        assert f"{moved}, as {tmp_path}/tok/final was trained on: 4 images held out" in line, "the advice, followed"
    finally:
        moved.rename(data)
    extra = data / "class0/extra.png"
    shutil.copy(data / "class0/00.png", extra)
    try:
        message = refused(capsys, "cache", tmp_path / "tok", out)
        assert f"{data} holds other images now than {tmp_path}/tok/final was trained on (images: 20 then, 21" in message
    finally:
        extra.unlink()
    (tmp_path / "tok/final/identity.json").unlink()  # a run of an earlier version
    line = start(caplog, "reconstruct", tmp_path / "tok", f"{out}-of-the-run")
    assert f"as {tmp_path}/tok/final was" in line
    (tmp_path / "tok/identity.json").unlink()  # and of a still earlier one: the place is what tells
    line = start(caplog, "reconstruct", tmp_path / "tok", f"{out}-of-the-place")
    assert f"by the record of {tmp_path}/tok/final: 4 images" in line


@pytest.mark.parametrize(
    ("words", "count", "told"),
    [
        (("train",), 4, "4 images held out (held_out=0.2)"),
        (("train", "held_out=0.5"), 10, "10 images held out (held_out=0.5)"),
        (("train", "held_out=1"), TRAINED, "all 20 images, 3 classes, 16 px, and"),
        (("train", "data.num=10"), 10, "all 10 images, 3 classes, 16 px, and"),
        (("train", "data.labels=none"), 4, "4 images held out (held_out=0.2), unlabelled"),
        (("other",), OTHER, "all 12 images, 3 classes, 16 px;"),
        (("other", "held_out=0.25"), 3, "3 images held out (held_out=0.25)"),
        (("parts",), 3, "the 3 images of its held-out part"),
        (("parts", "held_out=1"), 3, "the 3 images of its held-out part"),
    ],
)
def test_held_out_means_the_same_wherever_a_model_is_shown(made, tmp_path, caplog, words, count, told):
    folder, _ = made
    if not (folder / "parts").exists():
        draw(folder / "parts/train", 6, seed=2)
        draw(folder / "parts/val", 3, seed=3)
    data = ("data.kind=folder", f"data.path={folder}/{words[0]}", *words[1:], "rates=4")
    line = start(caplog, "reconstruct", folder / "tok", f"out={tmp_path}", "num=99", *data)
    assert told in line
    assert json.loads((tmp_path / "rates.json").read_text())["data"]["num"] == count
    line = start(caplog, "evaluate", f"tokenizer={folder}/tok", f"out={tmp_path}/s.json", "metrics=psnr", *data)
    assert told in line
    assert json.loads((tmp_path / "s.json").read_text())["num"] == count


def test_a_cache_is_divided_as_the_training_was(made, tmp_path, caplog):
    folder, _ = made
    data = ("data.kind=folder", f"data.path={folder}/other", f"out={tmp_path}/other")
    assert "11 images to train on (held_out=0.1)" in start(caplog, "cache", folder / "tok", *data)
    held = (f"out={tmp_path}/held", "split=held_out")
    assert "4 images held out (held_out=0.2)" in start(caplog, "cache", folder / "tok", *held)


# ------------------------------------------------------------------------------------------- few images, and advice


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images_are_trained_on(tmp_path, capsys, count):
    data = f"data={{kind: folder, path: {draw(tmp_path / 'data', count)}}}"
    train = ("train", "tokenizer", str(TINY / "flextok.yaml"), f"out={tmp_path}/run", data, *QUIET)
    advice: list[str] = []
    if count == 1:
        assert "held_out=0 trains on it and shows it; or add images" in refused(capsys, *train)
        advice = ["held_out=0"]
    assert main([*train, *advice]) == 0
    if count == 1:
        show = ("reconstruct", f"{tmp_path}/run", f"out={tmp_path}/shown")
        message = refused(capsys, *show)
        assert f"{tmp_path}/run/final was trained on all of {tmp_path}/data: held_out=1 takes all of it" in message
        assert main([*show, "held_out=1"]) == 0
        cached = ("cache", f"{tmp_path}/run", f"out={tmp_path}/tokens", "split=held_out")
        assert "or take the other part, split=train" in refused(capsys, *cached)
        assert main([*cached[:-1], "split=train"]) == 0


def test_shapes_of_a_part_that_has_no_held_out_ones(made, tmp_path, capsys):
    folder, _ = made
    data = ("data.kind=shapes", "data.split=val", "data.num_images=8")
    show = ("reconstruct", f"{folder}/tok", f"out={tmp_path}/shown", *data)
    assert "held_out=1 shows or scores all of it" in refused(capsys, *show, "held_out=0.1")
    assert main([*show, "held_out=1"]) == 0
    originals = ShapesDataset(ShapesConfig(split="val", num_images=8), 16)
    assert len(originals) == json.loads((tmp_path / "shown/rates.json").read_text())["data"]["num"]
    assert main(list(show)) == 0


def test_the_greedy_way_is_temperature_0(made, tmp_path):
    folder, _ = made
    model = imgtok.load(folder / "gpt")
    torch.nn.init.normal_(model.head.weight)
    classes, greedy = torch.arange(3), TokenSampling(temperature=0)
    drawn = [model.generate(classes, seed=seed, indices=range(3), sampling=greedy).ids for seed in (0, 1)]
    assert torch.equal(*drawn)
    assert main(["sample", f"{folder}/gpt", f"out={tmp_path}", "num=2", "sampling.temperature=0"]) == 0


# ------------------------------------------------------------------------------------------- refused, and corrected


BAD = {
    "train tokenizer": ("flip=1", "model.patch_size=5", "loss={l1: 1}", "held_out=2", "training.precision=fp16"),
    "train autoencoder": ("image_size=15", "data.path=nowhere", "training.trackers=[wandb]", "init=nowhere"),
    "train generator": ("tokens=nowhere", "model.vocab_size=5", "sampling.heat=1", "init_new=[x]", "share_digits=1"),
    "cache": ("rate=99", "split=test", "crops=five num_crops=3", "data.labels=csv", "held_out=1"),
    "cache latents": ("image_size=17", "vae_scaling_factor=-1", "data.path=nowhere", "dtype=int8"),
    "sample": ("num_tokens=99", "classes=[7]", "classes=[bird]", "sampling.top_p=2", "decoding.x=1", "prompts=a"),
    "reconstruct": ("rates=[99]", "image_size=8", "held_out=0", "decoding.steps=-1", "data.path=nowhere"),
    "evaluate": ("metrics=oracle", "metrics=fid", "rates=[99]", "num=999", "real=3", "data.path=nowhere"),
    "export": ("layout=theirs", "layout=published", "vae=nowhere", "vae=shapes32", "raw=2"),
}


@pytest.mark.parametrize("job", BAD)
def test_a_refused_job_leaves_nothing_behind(made, tmp_path, job):
    folder, _ = made
    out = tmp_path / "out"
    images = ("data.kind=folder", f"data.path={folder}/train")
    data = f"data={{kind: folder, path: {folder}/train}}"
    words = {
        "train tokenizer": (TINY / "flextok.yaml", data, *QUIET),
        "train autoencoder": (TINY / "vae.yaml", data, *QUIET),
        "train generator": (TINY / "gpt.yaml", f"tokens={folder}/tokens", f"tokenizer={folder}/tok", *QUIET),
        "cache": (folder / "tok", *images),
        "cache latents": (folder / "vae", "image_size=16", *images),
        "sample": (folder / "gpt", "num=2"),
        "reconstruct": (folder / "tok", "num=1", "rates=[1]", *images),
        "evaluate": (f"tokenizer={folder}/tok", "metrics=psnr", "rates=[1]", *images),
        "export": (folder / "gpt/final", "layout=imgtok"),
    }[job]
    target = f"out={out / 's.json' if job == 'evaluate' else out}"
    for bad in BAD[job]:
        assert main([*job.split(), *map(str, words), target, *bad.split(" ")]) == 2, bad
        assert not out.exists(), bad
    assert main([*job.split(), *map(str, words), target]) == 0
    assert out.exists()


def test_an_exported_generator_has_its_decoder_and_an_exported_tokenizer_its_record(made, tmp_path, caplog):
    folder, _ = made
    assert (folder / "exported/tokenizer/config.json").is_file()
    assert main(["sample", f"{folder}/exported", f"out={tmp_path}/samples", "num=2"]) == 0
    assert main(["export", f"{folder}/tok/checkpoints", f"out={tmp_path}/tok", "layout=imgtok"]) == 0
    line = start(caplog, "reconstruct", tmp_path / "tok", f"out={tmp_path}/shown")
    assert f"{folder}/train, as {tmp_path}/tok was trained on: 4 images held out" in line
    shutil.copytree(folder / "gpt", tmp_path / "gpt")
    shutil.rmtree(tmp_path / "gpt/final/tokenizer")
    assert main(["export", f"{tmp_path}/gpt/final", f"out={tmp_path}/alone", "layout=imgtok"]) == 0
    assert f"name one to sample from it, `imgtok sample {tmp_path}/alone tokenizer=MODEL`" in caplog.text
    named = f"tokenizer={folder}/tok"
    assert main(["sample", f"{tmp_path}/alone", named, f"out={tmp_path}/more", "num=2"]) == 0
