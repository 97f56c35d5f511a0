"""Images that are not square, from a FlexTok of squares to a generator's images, through the programs."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import imgtok
from imgtok.cli import main
from imgtok.config import read_yaml
from imgtok.data.tokens import TokenDataset
from imgtok.sample import check
from imgtok.sample.demo import Rebuilding
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig

TRUNK = TrunkConfig(width=16, depth=1, head_dim=8)
QUIET = [
    "training.preview_every=0",
    "training.trackers=[]",
    "training.steps=2",
    "training.batch_size=2",
    "training.learning_rate=1e-3",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number, shape in enumerate([(40, 60), (50, 50), (32, 48), (90, 40), (37, 61), (64, 64), (80, 33), (40, 44)]):
        path = folder / ("cats" if number % 2 else "dogs") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def square(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    size = {"image_size": 32, "patch_size": 8, "num_registers": 4, "levels": (4, 4)}
    model = FlexTok(FlexTokConfig(**size, encoder=TRUNK, decoder=TRUNK, decoding=FlexTokDecoding(steps=2)))
    model.save_pretrained(folder := tmp_path_factory.mktemp("square"))
    return folder


@pytest.fixture(scope="module")
def trained(square, photos, tmp_path_factory) -> Path:
    """A tokenizer of 32 x 48 pixels from that of squares."""
    out, said = tmp_path_factory.mktemp("trained"), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("imgtok").addHandler(handler)
    data = ["data.kind=folder", f"data.path={photos}", "held_out=0.25", "num_preview=2"]
    size = ["model.image_size=[32, 48]", "training.preview_every=2"]
    try:
        assert main(["train", "tokenizer", f"init={square}", *data, f"out={out}", *QUIET, *size]) == 0
    finally:
        logging.getLogger("imgtok").removeHandler(handler)
    (out / "said.txt").write_text("\n".join(said))
    return out


@pytest.fixture(scope="module")
def generator(trained, photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    tokenizer, tokens, out = trained / "final", folder / "tokens", folder / "gpt"
    data = ["data.kind=folder", f"data.path={photos}"]
    views = ["crops=random", "num_crops=2", "mirrored=true"]
    assert main(["cache", str(tokenizer), *data, f"out={tokens}", *views]) == 0
    shape = "model={kind: gpt, width: 16, depth: 1, num_heads: 2, mlp_multiple: 8}"
    given = [f"tokens={tokens}", f"tokenizer={tokenizer}", "num_preview=2"]
    assert main(["train", "generator", *given, f"out={out}", shape, *QUIET, "training.preview_every=2"]) == 0
    return folder


def test_the_tokenizer_takes_the_weights_and_says_what_became_of_the_positions(trained, square):
    said = (trained / "said.txt").read_text()
    assert "init: positions: 4 x 4 patches there, 4 x 6 here: the same table, continued beyond where" in said
    assert "32 x 48 px" in said
    model = imgtok.load(trained / "final")
    assert model.image_size == (32, 48)
    assert json.loads((trained / "final/config.json").read_text())["image_size"] == [32, 48]
    assert read_yaml(trained / "config.yaml")["model"]["image_size"] == [32, 48]
    before, after = (load_file(folder / "model.safetensors") for folder in (square, trained / "final"))
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}
    assert not torch.equal(before["encoder.patch_proj.weight"], after["encoder.patch_proj.weight"]), "it was trained"


def test_a_part_of_the_table_of_squares_is_called_cropped(square, photos, tmp_path, caplog):
    data = ["data.kind=folder", f"data.path={photos}", "num_preview=0"]
    with caplog.at_level(logging.INFO):
        main(["train", "tokenizer", f"init={square}", *data, f"out={tmp_path}", *QUIET, "model.image_size=[16, 32]"])
    assert "init: positions: 4 x 4 patches there, 2 x 4 here: the same table cropped" in caplog.text


def test_pictures_go_through_the_tokenizer_in_python(trained, photos):
    model = imgtok.load(trained / "final")
    images = imgtok.preprocess([photos / "dogs/0.png", photos / "cats/3.png"], model.image_size)
    assert images.shape == (2, 3, 32, 48)
    decoded = imgtok.to_pil(model.decode(model.encode(images)))
    assert [picture.size for picture in decoded] == [(48, 32)] * 2
    other = images.transpose(2, 3)
    with pytest.raises(ValueError, match="larger than the position table of 4 x 6"):
        model.encode(other)


def test_reconstructions_are_scored_on_what_the_tokenizer_sees(trained, photos, tmp_path):
    tokenizer, data = trained / "final", ["data.kind=folder", f"data.path={photos}", "held_out=1"]
    assert main(["reconstruct", str(tokenizer), *data, f"out={tmp_path / 'rows'}", "num=3"]) == 0
    record = json.loads((tmp_path / "rows/rates.json").read_text())
    assert record["data"]["image_size"] == [32, 48]
    scored = [f"out={tmp_path / 'scores.json'}", "metrics=psnr,mae", "rates=4"]
    assert main(["evaluate", f"tokenizer={tokenizer}", *data, *scored]) == 0
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["protocol"]["size"] == "48x32"
    assert "scaled until it covers the size" in json.dumps(written)


def test_another_size_than_the_tokenizers_is_refused(trained, photos, tmp_path, capsys):
    data = ["data.kind=folder", f"data.path={photos}", f"out={tmp_path}"]
    assert main(["reconstruct", str(trained / "final"), *data, "image_size=48,32"]) != 0
    assert "image_size: this tokenizer takes images of 32 x 48 pixels, given 48 x 32" in capsys.readouterr().err
    assert main(["reconstruct", str(trained / "final"), *data, "image_size=[32,48]", "num=1"]) == 0


def test_the_cache_holds_crops_of_that_size(generator):
    info = TokenDataset(generator / "tokens").info
    assert info.image_size == (32, 48)
    assert len(TokenDataset(generator / "tokens")) == 4 * info.num_images


def test_a_run_and_a_cache_go_on_where_they_stopped(trained, photos, tmp_path, capsys):
    """What was written of the size, a list in YAML and JSON, is the size that is given."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    data = ["data.kind=folder", f"data.path={photos}"]
    words = [*QUIET, "model.image_size=[32, 48]", "num_preview=2", "held_out=0.25", "training.preview_every=2"]
    given = read_yaml(run / "config.yaml")["init"]
    assert main(["train", "tokenizer", f"init={given}", *data, f"out={run}", *words, "training.steps=3"]) == 0
    assert imgtok.load(run / "final").image_size == (32, 48)
    cache = ["cache", str(run / "final"), *data, f"out={tmp_path / 'tokens'}", "shard_size=2"]
    assert main(cache) == 0
    sorted((tmp_path / "tokens").glob("*.safetensors"))[1].unlink()
    assert main(cache) == 0
    assert len(TokenDataset(tmp_path / "tokens")) == 6


def test_a_generator_draws_images_of_that_size(generator, tmp_path):
    pipe = imgtok.pipeline(generator / "gpt/final")
    assert pipe.image_size == (32, 48)
    assert "32 x 48 pixels" in repr(pipe)
    assert [picture.size for picture in pipe([0, 1], seed=3)] == [(48, 32)] * 2
    assert main(["sample", str(generator / "gpt/final"), "num=2", f"out={tmp_path / 'samples'}"]) == 0
    shapes = {Image.open(path).size for path in (tmp_path / "samples").rglob("0*.png")}
    assert shapes == {(48, 32)}


def test_samples_are_compared_with_images_cropped_likewise(generator, photos, tmp_path):
    """Scores of files: the images of the generator as they are, and photos of any size brought to theirs."""
    pipe = imgtok.pipeline(generator / "gpt/final")
    for number, picture in enumerate(pipe([0, 1], seed=3)):
        (tmp_path / "ours").mkdir(exist_ok=True)
        picture.save(tmp_path / f"ours/{number}.png")
    (tmp_path / "theirs").mkdir()
    for number in range(2):
        Image.open(photos / f"{'cats' if number else 'dogs'}/{number}.png").save(tmp_path / f"theirs/{number}.png")
    files = [f"images={tmp_path / 'ours'}", f"originals={tmp_path / 'theirs'}", "metrics=psnr"]
    out = tmp_path / "scores.json"
    assert main(["evaluate", *files, "resize=32,48", f"out={out}"]) == 0
    assert "resize=32,48: scaled until it covers" in out.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "tokenizer", "model.image_size=[30,48]"],
            "image_size: a height of 30 is not a multiple of 8, the pixels a side",
        ),
        (
            ["train", "tokenizer", "model.image_size=[32,48]", "data={kind: shapes}"],
            "data: data.kind=shapes draws squares",
        ),
    ],
)
def test_mistakes_name_the_field_and_the_remedy(square, photos, tmp_path, capsys, words, message):
    data = [] if words[-1].startswith("data") else ["data.kind=folder", f"data.path={photos}"]
    assert main([*words, f"init={square}", *data, f"out={tmp_path}", *QUIET]) != 0
    assert message in capsys.readouterr().err


def test_the_oracle_and_the_benchmark_of_shapes_read_squares(generator, trained, photos, tmp_path, capsys):
    out = f"out={tmp_path / 'scores.json'}"
    drawn = [f"model={generator / 'gpt/final'}", "data.kind=folder", f"data.path={photos}", "num=2", "metrics=oracle"]
    for words, field in (
        (["evaluate", *drawn, out], "metrics: the oracle reads squares: leave it out"),
        (["evaluate", "shapes", f"tokenizer={trained / 'final'}", out], "tokenizer: the scenes of the benchmark"),
    ):
        assert main(words) != 0
        said = capsys.readouterr().err
        assert field in said
        assert "32 x 48 pixels (height x width)" in said


def test_a_cache_of_latents_and_an_autoencoder_are_of_squares(photos, tmp_path, capsys):
    data = ["data.kind=folder", f"data.path={photos}", f"out={tmp_path}", "image_size=[32,48]"]
    for words in (["cache", "latents", "vae=shapes32"], ["train", "autoencoder", "init=shapes32", *QUIET]):
        assert main([*words, *data]) != 0
        assert "image_size: given [32, 48], must be an integer of at least 1, the side of a square" in (
            capsys.readouterr().err
        )


def test_the_check_shows_a_model_pictures_of_its_size():
    shown = check.pictures((32, 48), check.Config(model="x", precision="bf16", num=3))
    assert shown.shape == (3, 3, 32, 48)
    assert torch.equal(shown, check.pictures(48, check.Config(model="x", precision="bf16", num=3))[:, :, :32])


def test_the_demo_rebuilds_pictures_of_any_shape(trained, photos):
    model = Rebuilding(imgtok.load(trained / "final"))
    encoded = model.encode(Image.open(photos / "cats/3.png"))
    assert encoded[-1].ids.shape == (1, 4)
    shown, _ = model.at(encoded, len(encoded) - 1)
    assert 2 * shown.width == 3 * shown.height


def test_the_tokenizer_is_trained_from_scratch_too(photos, tmp_path):
    trunk = "{width: 16, depth: 1, head_dim: 8}"
    size = "image_size: [16, 24], patch_size: 8, num_registers: 2, levels: [4]"
    model = f"model={{kind: flextok, {size}, encoder: {trunk}, decoder: {trunk}, decoding: {{steps: 2}}}}"
    data = ["data.kind=folder", f"data.path={photos}", "held_out=0.25", "num_preview=0", "crop=random", "flip=true"]
    score = ["training.validate_every=2", "training.validation_scores=psnr", "training.num_scored=2"]
    assert main(["train", "tokenizer", model, *data, f"out={tmp_path}", *QUIET, *score]) == 0
    assert imgtok.load(tmp_path / "final").image_size == (16, 24)
