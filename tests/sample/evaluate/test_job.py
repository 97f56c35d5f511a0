"""`imgtok evaluate` from end to end, at tiny sizes."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from imgtok.cli import parse
from imgtok.config import ConfigError, from_dict, load
from imgtok.data.images import ImageFolderConfig
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.losses.lpips import LPIPS
from imgtok.metrics.scorers import CodeScorer, Score
from imgtok.pictures import save_png, to_uint8
from imgtok.sample.evaluate import scoring
from imgtok.sample.evaluate.job import Config, describe_result, main
from imgtok.sample.evaluate.results import Evaluation, Row
from imgtok.sample.evaluate.sources import Procedure
from imgtok.sections import Settings
from imgtok.shapes import classifier
from imgtok.shapes.classifier import Recipe
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig
from imgtok.vision import inception as features
from imgtok.vision import lite0
from imgtok.vision.features import Features
from imgtok.vision.inception import cached_inception_weights

ROOT = Path(__file__).parents[3]
PROFILE = ShapesConfig(textures=("solid",), sizes=("large",), num_images=320)
TRUNK = TrunkConfig(width=32, depth=1, head_dim=16)


class SmallExtractor:
    width = 12

    def __init__(self, path, device) -> None:
        self.name = "inception-v3-compat"

    def __call__(self, images: torch.Tensor) -> Features:
        pixels = torch.nn.functional.adaptive_avg_pool2d(images.float() / 50, 2).flatten(1)
        return Features(pixels, pixels[:, :6].sin(), pixels.cos())


@pytest.fixture(scope="module")
def quick_net():
    return classifier.train(Recipe(steps=2, batch=8))


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch, quick_net):
    """A small stand-in for either network, and an empty cache; EfficientNet-Lite0 is tested in test_lite0.py."""
    monkeypatch.setattr(lite0, "installed", lambda: False)
    monkeypatch.setenv("IMGTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("IMGTOK_OFFLINE", "1")
    monkeypatch.setattr(classifier, "load_or_train", lambda: quick_net)


@pytest.fixture
def inception(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"hello")
    monkeypatch.setattr(features, "INCEPTION_SHA256", "2cf24dba")
    monkeypatch.setattr(scoring, "Inception", SmallExtractor)
    return path


@pytest.fixture
def samples(tmp_path):
    """64 real renders in the layout of `imgtok sample`."""
    images, labels = ShapesDataset(PROFILE, 32).batch(range(64))
    for index, image in enumerate(to_uint8(images)):
        save_png(image, tmp_path / "samples" / f"{index:06d}.png")
    (tmp_path / "samples" / "samples.json").write_text(json.dumps({"labels": labels.tolist(), "seed": 0}))
    return tmp_path / "samples"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    torch.manual_seed(0)
    config = FlexTokConfig(
        image_size=32,
        num_registers=4,
        patch_size=8,
        levels=(4, 4),
        encoder=TRUNK,
        decoder=TRUNK,
        decoding=FlexTokDecoding(steps=2),
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = FlexTok(config)
    for parameter in tokenizer.parameters():  # at its start a decoder gives its noise back, whatever the tokens
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generator(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("generator")
    config = GPTConfig(vocab_size=16, num_tokens=4, width=32, depth=1, num_heads=2, mlp_multiple=32)
    config = config.with_condition(num_classes=64)
    gpt = GPT(config)
    torch.nn.init.normal_(gpt.head.weight, std=0.5)  # from the start at zero every token would be as likely
    gpt.save_pretrained(folder)
    (folder / "tokenizer").symlink_to(tokenizer)
    return folder


def run(tmp_path, **fields) -> dict:
    out = tmp_path / "out" / "scores.json"
    shutil.rmtree(out.parent, ignore_errors=True)  # scores of another request are not replaced
    main(Config(out=out, **{"exact": True} | fields))
    return json.loads(out.read_text())


def scores(record: dict) -> dict:
    """By key and rate, less what the images cost."""
    return {(row["key"], row["rate"]): row["value"] for row in record["scores"] if row["key"] not in CodeScorer.KEYS}


def test_folder_of_shapes(samples, tmp_path, capsys):
    record = run(tmp_path, images=samples, data=PROFILE)
    found = scores(record)
    assert found["oracle_top1", None] > 0.95
    assert found["fd_shapes", None] < 3 * found["fd_shapes_clean", None]
    names = [row["name"] for row in record["scores"]]
    assert "fd_shapes-64[shapesnet-1@32]" in names
    assert not any("fid" in name.lower() for name in names)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert len(record["weights"]["fd_shapes"]) == 8
    assert record["num"] == 64
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert from_dict(Config, record["config"]).data == PROFILE


def test_npz_gives_the_same_scores_whatever_the_batch(samples, tmp_path):
    images, labels = ShapesDataset(PROFILE, 32).batch(range(64))
    path = tmp_path / "samples.npz"
    np.savez(path, to_uint8(images).permute(0, 2, 3, 1).numpy(), labels.numpy())
    common = {"metrics": ("oracle",), "num": 16}
    first = scores(run(tmp_path, images=samples, **common))
    assert first["oracle_top1", None] >= 0.9
    assert scores(run(tmp_path, images=path, batch_size=9, **common)) == first
    np.savez(path, to_uint8(images).permute(0, 2, 3, 1).numpy())
    assert scores(run(tmp_path, images=path, labels="balanced", **common)) == first
    with pytest.raises(ValueError, match="labels"):
        run(tmp_path, images=path, **common)
    with pytest.raises(ValueError, match=r"num: 65 images are asked for, and .* holds 64"):
        run(tmp_path, images=samples, metrics=("oracle",), num=65)


@pytest.mark.parametrize("name", ["model", pytest.param("tokenizer", marks=pytest.mark.slow)])
def test_a_model_that_is_trained_further_has_scores_of_its_own(generator, tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(generator if name == "model" else tokenizer, "run/final")
    fields = {name: "run/final", "num": 2, "data": PROFILE, "metrics": ("oracle",), "held_out": 1}

    def train(step: int) -> None:
        weights = load_file("run/final/model.safetensors")
        save_file({key: value + 0.01 for key, value in weights.items()}, "run/final/model.safetensors")
        Path("run/final/state.json").write_text(json.dumps({"step": step, "files": {}}))

    for step in (1000, 2000):
        train(step)
        main(Config(**fields))
    main(Config(**fields))  # the same model replaces its own
    folder = Path("outputs/evaluate")
    assert sorted(path.name for path in folder.glob("*.json")) == [
        "run-final-step_0001000.json", "run-final-step_0002000.json",
    ]  # fmt: skip
    train(2000)
    before = (folder / "run-final-step_0002000.json").read_bytes()
    with pytest.raises(ValueError, match=rf"\(different: weights of the {name}\); choose another file with out=FILE"):
        main(Config(**fields))
    assert (folder / "run-final-step_0002000.json").read_bytes() == before
    main(Config(**fields, out=Path("again.json")))


def test_generator_without_files(generator, tmp_path):
    record = run(tmp_path, model=str(generator), data=PROFILE, num=20, classes=(3, 5), seed=1)
    found = scores(record)
    assert 0 <= found["oracle_top1", None] <= 1
    assert found["fd_shapes", None] > found["fd_shapes_clean", None]
    assert "model" in record["weights"]
    assert not list((tmp_path / "out").glob("*.png"))
    assert record["drawing"]["images"] == 20
    assert record["drawing"]["tokens_per_call"] == 1
    again = run(tmp_path, model=str(generator), data=PROFILE, num=20, classes=(3, 5), seed=1, batch_size=7)
    assert scores(again) == pytest.approx(found, rel=1e-3)
    with pytest.raises(ValueError, match="64 is not a class of the model"):
        run(tmp_path, model=str(generator), data=PROFILE, num=20, classes=(64,))


def test_reconstructions_at_each_token_count(tokenizer, tmp_path):
    record = run(tmp_path, tokenizer=str(tokenizer), data=PROFILE, num=12)
    found = scores(record)
    assert {rate for key, rate in found if key == "psnr"} == {"1", "2", "4"}
    assert {key for key, _ in found} >= {"psnr", "ssim", "mae", "oracle_top1", "fd_shapes"}
    assert all(3 < value < 40 for (key, _), value in found.items() if key == "psnr")
    single = scores(run(tmp_path, tokenizer=str(tokenizer), data=PROFILE, num=12, rates=("2",), metrics=("psnr",)))
    assert single == {("psnr", "2"): pytest.approx(found["psnr", "2"])}
    with pytest.raises(ValueError, match="1 to 4 tokens an image and no tolerance, given 9"):
        run(tmp_path, tokenizer=str(tokenizer), data=PROFILE, rates=("9",))


def test_unreadable_originals_are_left_out(samples, tokenizer, tmp_path):
    (samples / "000002.png").write_bytes(b"broken")
    data = ImageFolderConfig(path=samples)
    record = run(tmp_path, tokenizer=str(tokenizer), data=data, held_out=0.9, rates=("4",))
    assert {row["name"].split("[")[0] for row in record["scores"] if row["key"] not in CodeScorer.KEYS} <= {
        "PSNR-57",
        "SSIM-57",
        "MAE-57",
        "PSNR-58",
        "SSIM-58",
        "MAE-58",
    }


def test_inception_scores_against_images_statistics_and_data(samples, inception, tmp_path):
    metrics = ("fid", "sfid", "is", "precision_recall")
    common = {"images": samples, "metrics": metrics, "inception_weights": inception}
    stats = tmp_path / "real.safetensors"
    record = run(tmp_path, **common, reference=samples, save_reference=stats)
    found = scores(record)
    assert found["fid", None] == pytest.approx(0, abs=1e-6)
    assert found["precision", None] == found["recall", None] == 1
    assert record["weights"]["inception"].startswith("2cf24dba")
    assert record["scores"][0]["name"] == "FID-64[inception-v3-compat, samples]"
    from_file = run(tmp_path, **{**common, "metrics": ("fid", "sfid")}, reference=stats)
    assert scores(from_file)["fid", None] == pytest.approx(0, abs=1e-6)
    against_data = run(tmp_path, **{**common, "metrics": ("fid",)}, data=PROFILE)
    assert against_data["scores"][0]["name"] == "FID-64[inception-v3-compat, shapes-train]"
    assert 0 < against_data["scores"][0]["value"] < 5
    with pytest.raises(ValueError, match="real images themselves"):
        run(tmp_path, **common, reference=stats)


def test_rfid_compares_with_the_originals_own_crops_in_one_pass(tokenizer, inception, tmp_path, monkeypatch):
    judged, judge = [], SmallExtractor.__call__
    monkeypatch.setattr(SmallExtractor, "__call__", lambda self, images: judged.append(images) or judge(self, images))
    stats = tmp_path / "originals.safetensors"
    common = {"tokenizer": str(tokenizer), "data": PROFILE, "num": 20, "metrics": ("rfid",)}
    common |= {"inception_weights": inception}
    record = run(tmp_path, **common, rates=("1", "2", "4"), batch_size=8, save_reference=stats)
    names = [score["name"] for score in record["scores"] if score["key"] == "rfid"]
    assert names == ["rFID-20[inception-v3-compat, own originals]"] * 3
    found = scores(record)
    assert len(set(found.values())) == 3
    assert sum(map(len, judged)) == 20 * 4  # the originals once, not once a token count
    # What was judged are the cropped originals, rounded as their reconstructions are ...
    held_out = replace(PROFILE, split="val", num_images=32)
    originals = to_uint8(ShapesDataset(held_out, 32).batch(range(20))[0])
    assert any(torch.equal(batch, originals[:8]) for batch in judged)
    # ... and they serve as a reference like any other.
    from_files = run(
        tmp_path, tokenizer=str(tokenizer), data=PROFILE, num=20, rates=("1", "2", "4"), metrics=("fid",),
        reference=stats, inception_weights=inception,
    )  # fmt: skip
    assert {count: value for (_, count), value in scores(from_files).items()} == pytest.approx(
        {count: value for (_, count), value in found.items()}, rel=1e-6
    )
    with pytest.raises(ConfigError, match="against the originals themselves ask for rfid"):
        from_dict(Config, {"tokenizer": "a", "data": {"kind": "shapes"}, "metrics": ["fid"]})


def test_a_reference_of_another_size_is_refused(samples, inception, tmp_path):
    save_png(torch.zeros(3, 16, 16, dtype=torch.uint8), tmp_path / "real" / "a.png")
    with pytest.raises(ValueError, match="images of 16x16, but those to score are 32x32"):
        run(tmp_path, images=samples, metrics=("fid",), reference=tmp_path / "real", inception_weights=inception)


def test_missing_weights_stop_before_anything_is_drawn(generator, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "pipeline", lambda *a, **k: pytest.fail("loaded the model first"))
    with pytest.raises(FileNotFoundError, match=r"fid: the Inception weights .* are missing") as caught:
        run(tmp_path, model=str(generator), metrics=("fid", "oracle"), data=PROFILE)
    assert str(caught.value).count("\n") == 1
    assert "IMGTOK_OFFLINE" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ("oracle",)}, "these images have none"),
        ({"metrics": ("is",), "num": 9}, "is needs at least 10 images, and num is 9"),
        ({"metrics": ("precision_recall",), "num": 3, "reference": "samples"}, "at least 4 images, and num is 3"),
    ],
)
def test_what_files_lack_is_said_before_any_is_judged(samples, inception, tmp_path, monkeypatch, fields, message):
    (samples / "samples.json").unlink()
    if "reference" in fields:
        fields = {**fields, "reference": samples}
    monkeypatch.setattr(SmallExtractor, "__call__", lambda *a: pytest.fail("judged an image first"))
    monkeypatch.setattr(scoring, "OracleScorer", lambda *a: pytest.fail("made a scorer first"))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, images=samples, inception_weights=inception, **fields)


def test_ssim_of_small_images_is_refused_before_any_is_decoded(tmp_path):
    config = FlexTokConfig(image_size=8, num_registers=2, patch_size=4, levels=(4,), encoder=TRUNK, decoder=TRUNK)
    FlexTok(config).save_pretrained(tmp_path / "tokenizer")
    images = to_uint8(ShapesDataset(PROFILE, 32).batch(range(12))[0])
    for index, image in enumerate(images):
        save_png(image, tmp_path / "data" / f"{index}.png")
    data = ImageFolderConfig(path=tmp_path / "data")
    with pytest.raises(ValueError, match="ssim needs images of at least 11 pixels a side, got 8x8"):
        run(tmp_path, tokenizer=str(tmp_path / "tokenizer"), data=data, held_out=0.5)


def test_a_score_without_a_value_is_null():
    rows = [Row(Score("fid", "FID", float("nan")), None), Row(Score("is", "IS", 2.0), None)]
    found = Evaluation(rows, 1, 1, (8, 8), Procedure(images="files"), "cpu", {})
    record = describe_result(Config(images=Path("a")), found, 0.0)
    assert [score["value"] for score in record["scores"]] == [None, 2.0]
    json.dumps(record, allow_nan=False)


def test_drawing_and_decoding_use_the_threads_of_the_job(generator, tokenizer, tmp_path, monkeypatch):
    seen = []
    decode = FlexTok.decode
    monkeypatch.setattr(
        FlexTok, "decode", lambda self, *a, **k: seen.append(torch.get_num_threads()) or decode(self, *a, **k)
    )
    for threads in (1, 3):
        for fields in ({"model": str(generator)}, {"tokenizer": str(tokenizer), "rates": ("2",)}):
            run(tmp_path, data=PROFILE, metrics=("oracle",), num=4, threads=threads, **fields)
    assert seen == [1, 1, 3, 3]


@pytest.mark.slow
def test_two_processes_find_the_same_scores_as_one(samples, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("ACCELERATE_USE_CPU", None)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [f"images={samples}", "data.kind=shapes", "metrics=[oracle]", "num=15", f"out={tmp_path / 'two.json'}"]
    done = subprocess.run(
        [*launch, "-m", "imgtok.sample.evaluate.job", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written to") == 1  # with the images of both: a share would have another name
    one = run(tmp_path, images=samples, data=PROFILE, metrics=("oracle",), num=15)
    assert json.loads((tmp_path / "two.json").read_text())["scores"] == one["scores"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of images=PATH"),
        ({"images": "a", "model": "b"}, "give one of images=PATH"),
        ({"images": "a", "rates": ["1", "2"]}, "finished images have no tokens"),
        ({"tokenizer": "a", "originals": "b"}, "these belong to images=PATH"),
        ({"images": "a", "metrics": ["rfid", "dino"]}, "rfid, dino compare with originals"),
        ({"images": "a", "originals": "b", "metrics": ["sfid"]}, "against the originals themselves ask for rfid"),
        ({"images": "a", "out": "scores.txt"}, "must end in .json"),
        ({"images": "a", "metrics": ["psnr"]}, "psnr compare with originals"),
        ({"images": "a", "metrics": ["fid"]}, "fid compare with real images"),
        ({"images": "a", "metrics": ["oracle"], "save_reference": "x"}, "save_reference"),
        ({"images": "a", "metrics": ["dreamsim"]}, "dreamsim"),
        ({"images": "a", "num": 0}, "num"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Config, fields)


def test_the_commands_of_the_page_are_commands():
    section = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    lines = section.split("```sh\n")[1].split("```")[0].replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if "evaluate " in line and not line.startswith("#")]
    assert len(words) == 6
    configs = [parse(Config, command[4 if command[0] == "accelerate" else 2 :]) for command in words]
    assert configs[0].chosen_metrics == ("rfid", "mae", "psnr", "ssim", "lpips", "dino")
    assert configs[0].held_out == 1
    assert configs[3].rates == (1, 2, 4, 8, 16)
    fields = set(Config.__dataclass_fields__)
    named = set(re.findall(r"`(\w+)=", section)) - {"metrics"}
    assert named
    assert named <= fields


def test_default_scores_fit_what_is_given(monkeypatch):
    installed = []
    monkeypatch.setattr(lite0, "installed", lambda: bool(installed))

    def chosen(*words):
        return load(Config, None, list(words)).chosen_metrics

    assert chosen("images=a", "data.kind=shapes") == ("oracle", "fd_shapes")
    assert chosen("images=a", "data.kind=shapes", "data.mode=text") == ("fd_shapes",)
    assert chosen("images=a", "reference=b") == ("fid", "is")
    assert chosen("images=a") == ("is",)
    folder = ["data.kind=folder", "data.path=b"]
    pairs = ["tokenizer=a", *folder]
    assert chosen("images=a", *folder) == ("fid", "is")
    assert chosen(*pairs) == ("mae", "psnr", "ssim")
    assert chosen("images=a", "originals=b") == ("mae", "psnr", "ssim")
    judges = ["inception_weights=i", "lpips_heads=l", "dino_weights=d"]
    all_of_them = ("rfid", "mae", "psnr", "ssim", "lpips", "dino")
    assert chosen(*pairs, *judges) == all_of_them
    # The package of EfficientNet-Lite0 serves where weights of the others are not, and the images are real.
    installed.append(True)
    assert chosen("images=a", *folder) == ("fd_lite0",)
    assert chosen("images=a", "reference=b") == ("fid", "is")  # the file may hold Inception's statistics
    assert chosen("images=a") == ("is",)
    assert chosen(*pairs) == ("mae", "psnr", "ssim", "perceptual_lite0", "fd_lite0")
    assert chosen(*pairs, "lpips_heads=l") == ("mae", "psnr", "ssim", "lpips", "fd_lite0")
    assert chosen(*pairs, *judges) == all_of_them
    assert chosen("images=a", "data.kind=shapes") == ("oracle", "fd_shapes")
    cached = cached_inception_weights()
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert chosen("images=a", *folder) == ("fid", "is")
    assert chosen(*pairs) == ("rfid", "mae", "psnr", "ssim", "perceptual_lite0")
    # fd_shapes serves there, and Inception takes seconds an image on a CPU.
    assert chosen("tokenizer=a", "data.kind=shapes") == ("mae", "psnr", "ssim", "oracle", "fd_shapes")


# Networks that compare an image with its original


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[str, str]:
    """Small networks with random weights, as fields of the configuration."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judges")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), folder / "dino.safetensors")
    return {"dino_weights": folder / "dino.safetensors", "dino_model": "test_vit", "dino_size": 32}


class LightLPIPS(torch.nn.Module):
    smallest = 16

    def forward(self, images, references):
        return (images - references).abs().mean(dim=(1, 2, 3))


@pytest.fixture
def lpips(tmp_path, monkeypatch) -> dict[str, Path]:
    """Files that stand for LPIPS's, and a light network in place of VGG; the network itself is tested elsewhere."""
    fields = {"lpips_backbone": tmp_path / "vgg.pth", "lpips_heads": tmp_path / "heads.pth"}
    for path in fields.values():
        path.write_bytes(b"hello")
    monkeypatch.setattr(LPIPS, "from_files", lambda net, *paths: LightLPIPS())
    return fields


def test_all_scores_of_reconstructions_in_one_job(tokenizer, judges, lpips, inception, tmp_path, capsys):
    metrics = ("rfid", "mae", "psnr", "ssim", "lpips", "dino", "oracle")
    fields = {**judges, **lpips, "inception_weights": inception, "metrics": metrics}
    record = run(tmp_path, tokenizer=str(tokenizer), data=PROFILE, num=12, **fields)
    found = scores(record)
    keys = {key for key, _ in found}
    assert keys >= {"rfid", "mae", "psnr", "ssim", "lpips", "dino", "dino_patches", "oracle_top1"}
    assert set(found) == {(key, count) for key in keys for count in ("1", "2", "4")}
    for count in ("1", "2", "4"):
        assert found["lpips", count] == pytest.approx(found["mae", count] / 127.5, rel=1e-4)
        assert 0 < found["dino", count] < 1
    weights = record["weights"]
    assert set(weights) == {"inception", "lpips_backbone", "lpips_heads", "dino", "tokenizer"}
    names = {score["key"]: score["name"] for score in record["scores"]}
    assert names["dino"] == f"DINO-12[test_vit:{weights['dino'][:8]}, 32 px bicubic, cosine, mean over images]"
    assert names["lpips"] == "LPIPS-12[vgg:2cf24dba:2cf24dba, v0.1, mean over images]"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["rate", *names]
    assert [line.split()[0] for line in printed[1:4]] == ["1", "2", "4"]
    assert all(any(line.startswith(key) and line.endswith(name) for line in printed) for key, name in names.items())
    out = tmp_path / "out"
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert [{key: float(row[key]) for key in keys} for row in rows] == [
        {key: pytest.approx(found[key, count]) for key in keys} for count in ("1", "2", "4")
    ]
    with Image.open(out / "scores.png") as picture:
        picture.load()
        assert min(picture.size) > 300


def test_the_record_states_the_protocol(tokenizer, generator, samples, tmp_path):
    record = run(
        tmp_path, tokenizer=str(tokenizer), data=PROFILE, num=12, metrics=("psnr",), decoding=Settings(guidance=1.5)
    )
    assert record["protocol"].pop("tokenizer")["decoding"]["solver"] == "euler"
    assert record["protocol"] == {
        "images": "reconstructions of the held-out images of data (shapes, share 0.1), 12 of 32: the first, of all "
        "classes in turn",
        "originals": "the same images, cropped",
        "tokens": "encoded at each of the rates 1, 2, 4 (tokens an image, at most, and the tolerance after an @)",
        "crop": "none: rendered at this size",
        "decoding": {"steps": 2, "guidance": 1.5, "solver": "euler", "projected_guidance": True},
        "sampling": None,
        "precision": None,
        "generator": None,
        "real": None,
        "size": "32x32",
        "rounding": "clamped to [-1, 1], rounded to the nearest of 256 levels; the same for originals",
        "scored": 12,
        "device": "cpu, 1 process(es), torch.float32",
    }
    drawn = run(tmp_path, model=str(generator), data=PROFILE, num=4, metrics=("oracle",), rates=("2",))
    assert drawn["protocol"]["tokens"] == "2 tokens an image"
    assert drawn["protocol"]["sampling"]["guidance"] == 1.5
    assert drawn["protocol"]["precision"] == "fp32"
    assert drawn["protocol"]["generator"]["num_tokens"] == drawn["protocol"]["tokenizer"]["num_registers"] == 4
    assert set(drawn["weights"]) == {"model", "tokenizer"}
    data = ImageFolderConfig(path=samples)
    cropped = run(tmp_path, tokenizer=str(tokenizer), data=data, held_out=1.0, rates=("4",), metrics=("psnr",))
    assert cropped["protocol"]["images"] == "reconstructions of all images of data (folder)"
    assert "ADM" in cropped["protocol"]["crop"]


def test_a_part_of_a_folder_is_from_all_over_it(tokenizer, tmp_path):
    """A folder holds one class after the other: its first images would be of the first."""
    images, labels = ShapesDataset(PROFILE, 32).batch(range(64))
    for index, image in enumerate(to_uint8(images)):
        save_png(image, tmp_path / "data" / f"{labels[index]:02d}" / "a.png")
    seen = []

    class Spy(scoring.ReconstructionScorer):
        def update(self, batch):
            seen.extend(batch.labels.tolist())
            super().update(batch)

    def labels_of(**fields):
        seen.clear()
        data = ImageFolderConfig(path=tmp_path / "data")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scoring, "ReconstructionScorer", Spy)
            run(tmp_path, tokenizer=str(tokenizer), data=data, held_out=1.0, rates=("1",), metrics=("mae",), **fields)
        return list(seen)

    part = labels_of(num=8)
    assert sorted(part) == part
    assert max(part) > 32
    assert set(part) < set(labels_of(num=16))
    assert labels_of(num=8, batch_size=3) == part
    assert labels_of() == list(range(64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metrics": ("lpips",)}, r"lpips: the backbone of LPIPS with vgg: missing: looked for .*lpips_backbone=PATH"),
        (
            {"metrics": ("dino",)},
            r"dino_weights: the weights of vit_large.* missing: looked for .*dinov2_vitl14_pretrain",
        ),
        ({"metrics": ("dino",), "dino_weights": Path("no.pth")}, r"looked for no\.pth"),
        ({"metrics": ("rfid",)}, r"rfid: the Inception weights .* are missing"),
    ],
)
def test_missing_judges_are_named_before_the_model_is_loaded(tokenizer, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(scoring, "open_model", lambda *a, **k: pytest.fail("loaded the model first"))
    with pytest.raises(FileNotFoundError, match=f"(?s){message}"):
        run(tmp_path, tokenizer=str(tokenizer), data=PROFILE, **fields)


def test_lpips_of_small_images_is_refused_before_any_is_decoded(lpips, tmp_path):
    config = FlexTokConfig(image_size=8, num_registers=2, patch_size=4, levels=(4,), encoder=TRUNK, decoder=TRUNK)
    FlexTok(config).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="lpips needs images of at least 16 pixels a side, got 8x8"):
        run(tmp_path, tokenizer=str(tmp_path / "tokenizer"), data=PROFILE, metrics=("lpips",), **lpips)


# A generator at several token counts


def test_a_generator_is_scored_at_each_token_count(generator, tmp_path):
    common = {"model": str(generator), "data": PROFILE, "num": 20, "seed": 1}
    record = run(tmp_path, **common, rates=("1", "2", "4"))
    found = scores(record)
    assert {count for _, count in found} == {"1", "2", "4"}
    assert {key for key, _ in found} >= {"oracle_top1", "fd_shapes"}
    assert len({found["fd_shapes", count] for count in ("1", "2", "4")}) == 3
    cost = {row["rate"]: row["value"] for row in record["scores"] if row["key"] == "bits"}
    assert cost == {"1": 4.0, "2": 8.0, "4": 16.0}  # of a vocabulary of 16
    assert (tmp_path / "out" / "scores.png").is_file()
    for count in ("1", "2", "4"):  # one draw of all tokens gives what as many draws of fewer give
        alone = scores(run(tmp_path, **common, rates=(count,)))
        assert alone == {key: value for key, value in found.items() if key[1] == count}
    everything = scores(run(tmp_path, **common))
    assert everything == {(key, None): value for (key, count), value in found.items() if count == "4"}
    with pytest.raises(ValueError, match=r"the generator draws 1 to 4 tokens, given \[2, 5\]"):
        run(tmp_path, **common, rates=("2", "5"))


# Pairs of files


@pytest.fixture
def pairs(tmp_path):
    """Ten images as PNG and their slightly darker reconstructions, of which one lies deeper."""
    originals = to_uint8(ShapesDataset(PROFILE, 32).batch(range(10))[0])
    for index, image in enumerate(originals):
        name = f"deep/{index}" if index == 9 else str(index)
        save_png(image, tmp_path / "originals" / f"{name}.png")
        save_png(image - image.clamp(max=index), tmp_path / "images" / f"{name}.png")
    return {"images": tmp_path / "images", "originals": tmp_path / "originals"}


def test_two_folders_are_compared_by_file_name(pairs, judges, lpips, inception, tmp_path):
    metrics = ("psnr", "ssim", "mae", "lpips", "dino", "rfid")
    record = run(tmp_path, **pairs, metrics=metrics, **judges, **lpips, inception_weights=inception)
    found = scores(record)
    assert {key for key, _ in found} == {*metrics, "dino_patches"}
    assert found["mae", None] == pytest.approx(4.5, abs=0.5)  # black pixels cannot be darker
    assert record["protocol"]["originals"] == f"the files of the same names in {pairs['originals']}"
    assert not (tmp_path / "out" / "scores.png").exists()
    (pairs["images"] / "3.png").unlink()  # an original too many does no harm: the pairs stay pairs
    fewer = scores(run(tmp_path, **pairs, metrics=("mae",)))
    assert fewer["mae", None] == pytest.approx((10 * found["mae", None] - 3) / 9, abs=0.1)


def test_an_image_without_an_original_is_named(pairs, tmp_path):
    (pairs["originals"] / "4.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 10 images have no original of their name in .*; the first is 4, and"):
        run(tmp_path, **pairs)
    assert run(tmp_path, **pairs, num=4)["num"] == 4


def test_two_processes_share_the_work_without_overlap():
    class Half:
        num_processes = 2

        def __init__(self, rank):
            self.process_index = rank

    shares = [list(scoring._share(7, Half(rank))) for rank in range(2)]
    assert shares == [[0, 2, 4, 6], [1, 3, 5]]
    assert Accelerator().num_processes == 1
