"""top1_probe in `imgtok evaluate`: a judge of three colours, on the real EfficientNet-Lite0."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy

from imgtok.config import ConfigError, from_dict, load
from imgtok.data.images import DataError, ImageFolderConfig, open_images
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.metrics import probe as probes
from imgtok.metrics.saved_images import SavedImages
from imgtok.pictures import from_uint8, save_png, to_uint8
from imgtok.sample.evaluate.job import Config, main
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig
from imgtok.vision import lite0

ROOT = Path(__file__).parents[3]
COLOURS = {"blue": (40, 60, 200), "green": (30, 180, 60), "red": (200, 40, 40)}
HELD_OUT = 0.25
pytestmark = pytest.mark.usefixtures("lite0_weights")

TRUNK = TrunkConfig(width=32, depth=1, head_dim=16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One for the whole file: the colours are learned once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def quick(cache, monkeypatch) -> None:
    monkeypatch.setenv("IMGTOK_CACHE", str(cache))


def paint(colour, seed: int, size: int = 32) -> torch.Tensor:
    noise = 40 * torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed))
    return (torch.tensor(colour)[:, None, None] + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ImageFolderConfig:
    """Five images of each colour; a quarter of all is held out."""
    folder = tmp_path_factory.mktemp("data")
    for label, (name, colour) in enumerate(COLOURS.items()):
        for index in range(5):
            save_png(paint(colour, 10 * label + index), folder / name / f"{index}.png")
    return ImageFolderConfig(path=folder)


@pytest.fixture
def samples(tmp_path) -> Path:
    """Two images of each colour in turn, the last of which was asked for as another one."""
    folder = tmp_path / "samples"
    for index in range(6):
        save_png(paint(list(COLOURS.values())[index % 3], 100 + index), folder / f"{index:06d}.png")
    (folder / "samples.json").write_text(json.dumps({"labels": [0, 1, 2, 0, 1, 0]}))
    return folder


def run(tmp_path, **fields) -> dict:
    out = tmp_path / "out" / "scores.json"
    shutil.rmtree(out.parent, ignore_errors=True)  # scores of another request are not replaced
    main(Config(out=out, **{"metrics": ("top1_probe",), "held_out": HELD_OUT} | fields))
    return json.loads(out.read_text())


def values(record: dict) -> dict:
    return {(row["key"], row["rate"]): row["value"] for row in record["scores"] if "probe" in row["key"]}


def test_files_by_their_recorded_classes(samples, data, tmp_path, lite0_weights, monkeypatch):
    record = run(tmp_path, images=samples, data=data)
    (score,) = record["scores"]
    assert (score["key"], score["rate"]) == ("top1_probe", None)
    digits = record["weights"]["top1_probe"][:8]
    judge = f"probe-1:{digits} on efficientnet-lite0, 3 classes; 100.0 % of 4 held-out real images"
    assert score["name"] == f"top1-probe-6[{judge}]"
    assert score["value"] == pytest.approx(5 / 6)
    assert record["weights"]["lite0"] == lite0.SHA256
    # The next time nothing is learned, and `balanced` asks for the data's classes in turn: all are read right.
    monkeypatch.setattr(probes, "fit", lambda *a: pytest.fail("trained again"))
    again = run(tmp_path, images=samples, data=data, labels="balanced", batch_size=4)
    assert again["scores"] == [{**score, "value": 1.0}]
    # As a direct computation reads them.
    (cached,) = Path(os.environ["IMGTOK_CACHE"]).iterdir()
    found = probes.read_weights(cached)
    net = lite0.load(lite0_weights)
    with torch.no_grad():
        pooled = net.pooled(from_uint8(SavedImages(samples).batch(range(6)))).double()
    logits = (pooled - found["mean"]) / found["deviation"] @ found["weight"] + found["bias"]
    assert logits.argmax(dim=1).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("generator")
    config = FlexTokConfig(
        image_size=32, num_registers=4, patch_size=8, levels=(4, 4), encoder=TRUNK, decoder=TRUNK,
        decoding=FlexTokDecoding(steps=1),
    )  # fmt: skip
    FlexTok(config).save_pretrained(folder / "tokenizer")
    gpt = GPTConfig(vocab_size=16, num_tokens=4, width=32, depth=1, num_heads=2, mlp_multiple=32)
    GPT(gpt.with_condition(num_classes=3)).save_pretrained(folder)
    return folder


def test_samples_of_a_generator_against_the_classes_asked_for(generator, data, tmp_path, monkeypatch):
    always_1 = torch.tensor([[0.0, 1.0, 0.0]])
    monkeypatch.setattr(probes.Probe, "logits", lambda self, features: always_1.expand(len(features), -1))
    share = [values(run(tmp_path, model=str(generator), data=data, num=2, classes=(label,))) for label in range(3)]
    assert [found["top1_probe", None] for found in share] == [0, 1, 0]
    more = ImageFolderConfig(path=data.path, num_classes=4)
    with pytest.raises(DataError, match=r"1 of the 4 classes have no image in the training part"):
        run(tmp_path, model=str(generator), data=more, num=2)


def test_a_generator_with_other_classes_is_refused_before_anything_is_learned_or_drawn(
    generator, tmp_path, data, monkeypatch
):
    for label in range(2):
        for index in range(4):
            save_png(paint((90, 90, 90), index), tmp_path / "two" / str(label) / f"{index}.png")
    monkeypatch.setattr(probes, "load_or_train", lambda *a, **k: pytest.fail("learned first"))
    two = ImageFolderConfig(path=tmp_path / "two")
    with pytest.raises(ValueError, match="top1_probe knows 2 classes, and the generator draws 3"):
        run(tmp_path, model=str(generator), data=two, num=2)
    one = ImageFolderConfig(path=data.path / "red")
    with pytest.raises(DataError, match="top1_probe reads classes, and its data has no labels"):
        run(tmp_path, model=str(generator), data=one, num=2)


@pytest.fixture
def tokenizer(tmp_path, monkeypatch) -> Path:
    toy.enter(monkeypatch)
    torch.manual_seed(0)
    toy.ToyTok(toy.ToyTokConfig(image_size=32, patch_size=8)).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_reconstructions_at_each_rate_beside_their_originals(tokenizer, data, tmp_path, monkeypatch):
    looked, look = [], lite0.Lite0Extractor._look
    monkeypatch.setattr(lite0.Lite0Extractor, "_look", lambda self, x: looked.append(x) or look(self, x))
    run(tmp_path, images=data.path / "red", data=data, labels="balanced", num=1)  # learns, if no test did before
    looked.clear()
    record = run(tmp_path, tokenizer=str(tokenizer), data=data, rates=("4@0.05", "16@0.05"), batch_size=3)
    found = values(record)
    assert {rate for _, rate in found} == {"4@0.05", "16@0.05"}
    assert found["top1_probe_originals", "4@0.05"] == found["top1_probe_originals", "16@0.05"] == 1
    assert found["top1_probe", "4@0.05"] < 1  # three quarters of each image are blank
    assert sum(map(len, looked)) == 3 * 4  # four held-out images, each of them once and at each rate
    originals = to_uint8(open_images(data, 32, split="held_out", held_out_fraction=HELD_OUT).batch(range(3)).images)
    assert torch.equal(looked[0], originals)
    names = {score["key"]: score["name"] for score in record["scores"]}
    assert names["top1_probe_originals"].startswith("top1-probe-originals-4[probe-1:")
    assert (tmp_path / "out" / "scores.png").is_file()


def test_a_validation_set_of_its_own_takes_a_probe_from_other_images(tokenizer, samples, data, tmp_path, cache):
    learned = {path.name for path in cache.iterdir()}
    fresh = tmp_path / "fresh"
    for label, (name, colour) in enumerate(COLOURS.items()):
        save_png(paint(colour, 200 + label), fresh / name / "0.png")
    fields = {"tokenizer": str(tokenizer), "data": ImageFolderConfig(path=fresh), "held_out": 1.0}
    found = values(run(tmp_path, **fields, probe_data=data, rates=("16@0.05",)))
    assert found["top1_probe_originals", "16@0.05"] == 1
    assert {path.name for path in cache.iterdir()} != learned  # of nine tenths, not of three quarters
    pairs = run(tmp_path, images=samples, originals=samples, probe_data=data)  # finished reconstructions
    assert values(pairs) == {(key, None): pytest.approx(5 / 6) for key in ("top1_probe", "top1_probe_originals")}


def test_small_images_and_missing_labels_are_refused_before_anything_is_learned(samples, data, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "load_or_train", lambda *a, **k: pytest.fail("learned first"))
    save_png(paint(COLOURS["red"], 0, size=24), tmp_path / "small" / "0.png")
    with pytest.raises(ValueError, match="top1_probe needs images of at least 32 pixels a side, got 24x24"):
        run(tmp_path, images=tmp_path / "small", data=data, labels="balanced")
    (samples / "samples.json").write_text(json.dumps({"labels": [0, 1, 2, 0, 1, 3]}))
    with pytest.raises(ValueError, match="top1_probe knows the classes 0 to 2, and .* has label 3"):
        run(tmp_path, images=samples, data=data)
    (samples / "samples.json").unlink()
    with pytest.raises(ValueError, match="top1_probe compares with labels, and these images have none"):
        run(tmp_path, images=samples, data=data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": "a"}, "top1_probe learns from real images with the classes that it reads: give data.kind"),
        ({"tokenizer": "a", "held_out": 1.0}, "held_out=1 leaves only one: give probe_data.kind=... "),
        ({"model": "a", "held_out": 0.0}, "held_out=0 leaves only one"),
        ({"images": "a", "metrics": ["is"], "probe_data": {"kind": "shapes"}}, "probe_data: only the score top1_probe"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    data = {} if "images" in fields else {"data": {"kind": "folder", "path": "b"}}
    with pytest.raises(ConfigError, match=message):
        from_dict(Config, {"metrics": ["top1_probe"], **data, **fields})


def test_what_the_probe_learns_from():
    words = ["tokenizer=a", "data.kind=folder", "data.path=b", "metrics=[top1_probe]"]
    assert load(Config, None, words).probe_images == (ImageFolderConfig(path=Path("b")), 0.1)
    other = [*words, "probe_data.kind=folder", "probe_data.path=c"]
    assert load(Config, None, [*other, "held_out=0.2"]).probe_images == (ImageFolderConfig(path=Path("c")), 0.2)
    assert load(Config, None, [*other, "held_out=1"]).probe_images == (ImageFolderConfig(path=Path("c")), 0.1)


@pytest.mark.slow
def test_one_of_two_processes_learns(samples, data, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["IMGTOK_CACHE"] = str(tmp_path / "cache")
    environment.pop("ACCELERATE_USE_CPU", None)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [f"images={samples}", f"originals={samples}", "data.kind=folder", f"data.path={data.path}"]
    words += ["metrics=[top1_probe]", f"held_out={HELD_OUT}", f"out={tmp_path / 'two.json'}"]
    done = subprocess.run(
        [*launch, "-m", "imgtok.sample.evaluate.job", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    one = run(tmp_path, images=samples, originals=samples, data=data)
    assert json.loads((tmp_path / "two.json").read_text())["scores"] == one["scores"]
