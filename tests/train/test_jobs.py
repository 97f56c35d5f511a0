"""What the training jobs do besides the loop: models from configurations, and what they refuse."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import processes
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import imgtok
from imgtok import pictures
from imgtok.cli import main
from imgtok.config import ConfigError, load
from imgtok.data.images import open_images
from imgtok.pictures import save_png
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.flextok import FlexTok
from imgtok.train import autoencoder, cache_tokens, generator, tokenizer
from imgtok.train.ema import EMA
from imgtok.train.state import complete_steps

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/tiny"
QUIET = ["training.preview_every=0", "training.trackers=[]", "training.log_every=4"]


def train(job, name: str, out: Path, *overrides: str) -> Path:
    job.main(load(job.Config, TINY / f"{name}.yaml", [f"out={out}", *QUIET, *overrides]))
    return out / "final"


def cache(out: Path, model: Path, *overrides: str) -> Path:
    overrides = (f"out={out}", f"tokenizer={model}", *overrides)
    cache_tokens.main(load(cache_tokens.Config, TINY / "cache.yaml", overrides))
    return out


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def flextok(tmp_path_factory) -> Path:
    return train(tokenizer, "flextok", tmp_path_factory.mktemp("flextok"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, flextok) -> Path:
    return cache(tmp_path_factory.mktemp("tokens"), flextok)


# ---------------------------------------------------------------------------------------- killed and resumed

KILLED = """
import os, signal, sys
from imgtok.cli import main
from imgtok.train.ema import EMA

update = EMA.update

def dying(self, step):
    if step == 2:  # the optimizer has moved the weights, and their average does not know it
        os.kill(os.getpid(), signal.SIGKILL)
    update(self, step)

EMA.update = dying
main(sys.argv[1:])
"""
update = EMA.update


def interrupted(self, step):
    if step == 2:
        raise KeyboardInterrupt
    update(self, step)


@pytest.mark.parametrize("how", ["interrupted", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_gpt_with_dropout_that_was_stopped_ends_with_the_same_weights(tmp_path, flextok, tokens, monkeypatch, how):
    """Interrupted at the place where it is killed, it has left the same files; a kill needs a process of its own."""
    inputs = [f"tokens={tokens}", f"tokenizer={flextok}", "model.dropout=0.1", *QUIET]
    whole = train(generator, "gpt", tmp_path / "whole", *inputs)
    arguments = ["train", "generator", str(TINY / "gpt.yaml"), *inputs, f"out={tmp_path / 'killed'}"]
    if how == "killed":
        assert processes.python("-c", KILLED, *arguments).returncode == -signal.SIGKILL
    else:
        with monkeypatch.context() as patch:
            patch.setattr(EMA, "update", interrupted)
            assert main(arguments) == 130
    assert complete_steps(tmp_path / "killed/checkpoints") == [2]
    assert main(arguments) == 0
    assert same(tmp_path / "killed/final", whole)
    without = train(generator, "gpt", tmp_path / "without", *inputs, "model.dropout=0.0")
    assert not same(without, whole), "dropout had no part in this test"


# ------------------------------------------------------------------------------------------- the same images


def test_a_run_goes_on_with_its_images_elsewhere_but_not_with_others(tmp_path):
    for index in range(4):
        path = tmp_path / f"here/{'ab'[index % 2]}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * index, 0, 0)).save(path)

    def run(where: str, steps: int) -> Path:
        file = tmp_path / "folder.yaml"
        text = (
            (TINY / "flextok.yaml").read_text().replace("{kind: shapes, num_images: 64}", "{kind: folder, path: here}")
        )
        file.write_text(text)
        overrides = [f"data.path={tmp_path / where}", "held_out=0.25", "training.schedule=constant"]
        overrides += [f"out={tmp_path / 'run'}", f"training.steps={steps}", *QUIET]
        tokenizer.main(load(tokenizer.Config, file, overrides))
        return tmp_path / "run"

    run("here", 2)
    (tmp_path / "here").rename(tmp_path / "there")
    run("there", 3)
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "there/a/0.png")
    with pytest.raises(ValueError, match=r"^data.path = .*there: not what the run in .*: other sizes or bytes of the"):
        run("there", 4)


# --------------------------------------------------------------------------------------------- no steps at all


@pytest.mark.parametrize("warmup", [0, 100])
def test_no_steps_leave_the_untrained_tokenizer(tmp_path, flextok, warmup):
    overrides = ["training.steps=0", f"training.warmup={warmup}"]
    untrained = train(tokenizer, "flextok", tmp_path, *overrides)
    config = load(tokenizer.Config, TINY / "flextok.yaml", [f"out={tmp_path}"])
    fresh, _ = tokenizer.build_model(config)
    saved = load_file(untrained / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in fresh.state_dict().items())
    assert not same(untrained, flextok)
    assert (tmp_path / "samples/step_0000000.png").is_file()
    train(tokenizer, "flextok", tmp_path, *overrides)  # a second time there is nothing to do


def test_an_untrained_generator_draws_all_tokens_alike(tmp_path, flextok, tokens):
    untrained = train(generator, "gpt", tmp_path, f"tokens={tokens}", f"tokenizer={flextok}", "training.steps=0")
    model = imgtok.load(untrained)
    assert not model.logits(torch.tensor([3]), torch.zeros(1, 4, dtype=torch.long)).any()
    assert imgtok.load(untrained / "tokenizer").num_tokens == 4
    assert f'imgtok.pipeline("{untrained}")' in (untrained / "README.md").read_text()
    assert f'imgtok.load("{flextok}")' in (flextok / "README.md").read_text()
    assert not [page for page in (untrained, flextok) for text in page.rglob("README.md") if ".tmp" in text.read_text()]


def test_previews_are_decoded_in_blocks_by_the_jobs_settings(tmp_path, flextok, tokens, monkeypatch):
    seen = []
    decode = FlexTok.decode

    def watched(self, drawn, **options):
        seen.append((list(options["indices"]), options["decoding"].steps))
        return decode(self, drawn, **options)

    monkeypatch.setattr(FlexTok, "decode", watched)
    inputs = [f"tokens={tokens}", f"tokenizer={flextok}", "training.steps=0", "num_preview=20"]
    train(generator, "gpt", tmp_path, *inputs, "decoding.steps=3")
    assert seen == [(list(range(16)), 3), (list(range(16, 20)), 3)]
    with Image.open(tmp_path / "samples/step_0000000.png") as picture:
        assert picture.width == 8 * 96 + 7 * 4, "enlarged six times"
        assert picture.height > 3 * (96 + 16), "each under its class"
    with pytest.raises(ValueError, match="decoding.steps: given 0"):
        train(generator, "gpt", tmp_path / "other", *inputs, "decoding.steps=0")


# --------------------------------------------------------------------------------------------- the autoencoder


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path):
    full, half = (
        train(tokenizer, "flextok", tmp_path / value, f"half={value}", "training.steps=0")
        for value in ("false", "true")
    )
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (full, half)]
    assert sizes[1] < 0.75 * sizes[0]  # the header keeps its size
    again = train(tokenizer, "flextok", tmp_path / "false", "half=true", "training.steps=0")  # may change: written anew
    assert same(again, half)
    full = train(tokenizer, "flextok", tmp_path / "false", "half=false", "training.steps=0")
    loaded = imgtok.load(half)
    reference = load_file(full / "model.safetensors")
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, reference[name], atol=1e-3, rtol=1e-3)


def test_an_unknown_autoencoder_is_answered_with_the_known_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model folder 'shapes64'.*ships shapes32"):
        train(tokenizer, "flextok", tmp_path, "vae=shapes64")


def test_a_tokenizer_is_no_autoencoder(tmp_path, flextok):
    with pytest.raises(ValueError, match=r"holds a FlexTok .* but an autoencoder is needed"):
        train(tokenizer, "flextok", tmp_path, f"vae={flextok}")


def test_a_tokenizer_stands_on_the_packaged_autoencoder(tmp_path):
    model = imgtok.load(
        train(tokenizer, "flextok", tmp_path, "vae=shapes32", "model.image_size=32", "model.patch_size=1",
              "training.steps=0")
    )  # fmt: skip
    assert model.vae is not None
    assert model.config.vae.scaling_factor != 1
    images = open_images(ShapesConfig(textures=("solid",), scale=1.3, num_images=64), 32).batch(range(16)).images
    error = (model.to_images(model.to_latents(images)) - images).square().mean()
    assert error < 0.01  # on a scale of 2 from black to white: better than 26 dB


# --------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("flextok", "image_size=32", "no field 'image_size'; did you mean 'model.image_size'?"),
        ("flextok", "model.vae={block_channels: [32]}", "model.vae: .* vae=FOLDER or vae=shapes32"),
        ("flextok", "model.image_size=-16", "model.image_size: given -16"),
        ("flextok", "model.kind=gpt", "model.kind: given 'gpt'"),
        ("flextok", "training.stepz=1", "did you mean"),
    ],
)
def test_what_does_not_go_together_is_said_at_once(name, override, message):
    with pytest.raises(ConfigError, match=message):
        load(tokenizer.Config, TINY / f"{name}.yaml", [override])


@pytest.mark.parametrize("override", ["flip=true", "crop=random"])
def test_shapes_are_not_augmented(tmp_path, override):
    with pytest.raises(ValueError, match=rf"{override} is not possible with data.kind=shapes"):
        train(tokenizer, "flextok", tmp_path, override)


def test_previews_can_be_left_out_and_nothing_held_out(tmp_path):
    train(tokenizer, "flextok", tmp_path / "none", "num_preview=0", "training.steps=1", "held_out=0")
    assert not list((tmp_path / "none/samples").glob("*"))


@pytest.mark.parametrize(("job", "name"), [(tokenizer, "flextok"), (autoencoder, "vae")])
def test_previews_show_the_same_images_of_all_classes(tmp_path, monkeypatch, job, name):
    for folder, count in {"a": 20, "b": 10, "c": 10}.items():
        for index in range(count):
            grey = 6 * index + {"a": 0, "b": 120, "c": 190}[folder]  # another for each image
            save_png(torch.full((3, 16, 16), grey, dtype=torch.uint8), tmp_path / f"images/{folder}/{index:02d}.png")
    seen = []
    grid = pictures.grid_with_titles

    def watched(images, columns, row_titles):
        seen.append(images[:columns])
        return grid(images, columns=columns, row_titles=row_titles)

    monkeypatch.setattr(pictures, "grid_with_titles", watched)
    data = f"data={{kind: folder, path: {tmp_path / 'images'}}}"
    train(job, name, tmp_path / "out", data, "held_out=0.5", "num_preview=8", "training.steps=1")
    first, last = seen  # before the first step and after the last one
    assert torch.equal(first, last)
    train(job, name, tmp_path / "more", data, "held_out=0.5", "num_preview=99", "training.steps=0")
    whole = [round(grey) for grey in pictures.to_uint8(seen[2]).float().mean((1, 2, 3)).tolist()]
    assert len(whole) == 20  # all that are held out, class by class
    assert pictures.to_uint8(first).float().mean((1, 2, 3)).tolist() == [whole[place * 20 // 8] for place in range(8)]
    assert sum(grey >= 120 for grey in whole[:8]) == 0  # of the first ones none would be of another class
    assert sum(grey >= 190 for grey in pictures.to_uint8(first)[:, 0, 0, 0].tolist()) > 0


def test_nothing_held_out_of_a_folder(tmp_path):
    for index in range(6):
        save_png(torch.full((3, 20, 24), 40 * index, dtype=torch.uint8), tmp_path / f"images/{index}.png")
    (tmp_path / "images/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    data = f"data={{kind: folder, path: {tmp_path / 'images'}}}"
    train(tokenizer, "flextok", tmp_path / "out", data, "held_out=0", "training.steps=1")
    assert (tmp_path / "out/samples/step_0000001.png").is_file()  # of the readable ones


# ---------------------------------------------------------------------------------------------------- tokens


def test_tokens_are_those_of_the_tokenizer(flextok, tokens, tmp_path):
    from imgtok.data.tokens import TokenDataset

    cached = TokenDataset(tokens)
    batch = open_images(ShapesConfig(num_images=64), 16).batch(range(64))
    assert torch.equal(cached.tokens(range(len(cached))).ids, imgtok.load(flextok).encode(batch.images).ids)
    assert torch.equal(cached.labels, batch.labels)


def test_mirrored_tokens(flextok, tmp_path):
    from imgtok.data.tokens import TokenDataset
    from imgtok.pictures import from_uint8, save_png

    pictures = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for index, picture in enumerate(pictures):
        save_png(picture, tmp_path / f"images/{index}.png")
    data = (f"data={{kind: folder, path: {tmp_path / 'images'}, labels: none}}", "held_out=0", "batch_size=10")
    cached = TokenDataset(cache(tmp_path / "tokens", flextok, "mirrored=true", *data))
    both = torch.stack([from_uint8(pictures), from_uint8(pictures).flip(-1)], dim=1).flatten(0, 1)
    assert torch.equal(cached.tokens(range(len(cached))).ids, imgtok.load(flextok).encode(both).ids)
    assert cached.indices.tolist() == [index for index in range(5) for _ in range(2)]
    assert cached.views.tolist() == [0, 1] * 5
    with pytest.raises(ConfigError, match=r"mirrored: not possible with data.kind=shapes"):
        cache(tmp_path / "shapes", flextok, "mirrored=true")


def test_an_interrupted_cache_writes_only_what_is_missing(flextok, tokens, tmp_path):
    shutil.copytree(tokens, tmp_path, dirs_exist_ok=True)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    content, written = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 shards missing"):
        train(generator, "gpt", tmp_path / "gpt", f"tokens={tmp_path}", f"tokenizer={flextok}")
    cache(tmp_path, flextok)
    assert (first.stat().st_mtime_ns, second.read_bytes()) == (written, content)


def test_tokens_of_another_tokenizer_are_refused(flextok, tokens, tmp_path):
    other = train(tokenizer, "flextok", tmp_path / "other", "training.seed=1", "training.steps=0")
    with pytest.raises(ValueError, match="tokenizer"):
        train(generator, "gpt", tmp_path / "gpt", f"tokens={tokens}", f"tokenizer={other}")
    with pytest.raises(ValueError, match="fingerprint"):
        cache(tokens, other)


def test_a_finished_generator_of_another_tokenizer_is_not_called_complete(flextok, tokens, tmp_path):
    inputs = [f"tokens={tmp_path / 'tokens'}", f"tokenizer={tmp_path / 'model'}", "training.steps=1"]
    shutil.copytree(flextok, tmp_path / "model")
    shutil.copytree(tokens, tmp_path / "tokens")
    train(generator, "gpt", tmp_path / "gpt", *inputs)
    shutil.rmtree(tmp_path / "model")
    shutil.rmtree(tmp_path / "tokens")
    other = train(tokenizer, "flextok", tmp_path / "other", "training.seed=1", "training.steps=0")
    shutil.copytree(other, tmp_path / "model")
    cache(tmp_path / "tokens", other)
    with pytest.raises(
        ValueError, match=r"^tokenizer = .*not what the run in .*: \w+ then, \w+ now. Choose another `out`"
    ):
        train(generator, "gpt", tmp_path / "gpt", *inputs)


@pytest.mark.parametrize("finished", [True, False])
def test_a_generator_does_not_go_on_with_other_tokens_at_the_same_path(flextok, tokens, tmp_path, finished):
    inputs = [f"tokens={tmp_path / 'tokens'}", f"tokenizer={flextok}"]
    shutil.copytree(tokens, tmp_path / "tokens")
    train(generator, "gpt", tmp_path / "gpt", *inputs)
    if not finished:
        shutil.rmtree(tmp_path / "gpt/final")
        shutil.rmtree(tmp_path / "gpt/checkpoints/step_0000004")
    shutil.rmtree(tmp_path / "tokens")
    cache(tmp_path / "tokens", flextok, "data.num_images=32")
    with pytest.raises(ValueError, match=r"^tokens = .*not what the run in .* Choose another `out`"):
        train(generator, "gpt", tmp_path / "gpt", *inputs)
    with pytest.raises(ValueError, match=r"made_from: .*made again"):
        generator.main(load(generator.Config, tmp_path / "gpt/config.yaml"))


def test_a_generator_goes_on_with_the_same_tokens_elsewhere(flextok, tokens, tmp_path):
    steps = ["training.schedule=constant", "training.steps=2"]
    train(generator, "gpt", tmp_path / "gpt", f"tokens={tokens}", f"tokenizer={flextok}", *steps)
    shutil.copytree(tokens, tmp_path / "tokens")
    shutil.copytree(flextok, tmp_path / "model")
    steps[1] = "training.steps=3"
    moved = [f"tokens={tmp_path / 'tokens'}", f"tokenizer={tmp_path / 'model'}"]
    there = train(generator, "gpt", tmp_path / "gpt", *moved, *steps)
    assert same(there, train(generator, "gpt", tmp_path / "whole", *moved, *steps))


def test_a_generator_is_no_tokenizer(flextok, tokens, tmp_path):
    gpt = train(generator, "gpt", tmp_path, f"tokens={tokens}", f"tokenizer={flextok}", "training.steps=0")
    with pytest.raises(ValueError, match=r"holds a GPT .* but a tokenizer is needed"):
        cache(tmp_path / "tokens", gpt)
