"""The linear probe: it learns what it is shown, once, and says of which images and how well."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from imgtok.data.images import DataError, ImageFolderConfig, ShapesConfig, open_images
from imgtok.metrics import probe as module
from imgtok.metrics.probe import Probe, Recipe, choose, fit, load_or_train
from imgtok.pictures import save_png, to_uint8
from imgtok.vision.features import Features

COLOURS = {"blue": (40, 60, 200), "green": (30, 180, 60), "red": (200, 40, 40)}
RECIPE = Recipe(train_images=12, held_out_images=6)


class Means:
    """Stands in for a network: the mean colours of the image and of its upper half, and a constant."""

    name = "means"
    width = 7

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: torch.Tensor) -> Features:
        assert images.dtype == torch.uint8
        self.batches.append(len(images))
        pixels = images.float() / 255
        halves = [pixels.mean(dim=(2, 3)), pixels[:, :, :16].mean(dim=(2, 3)), torch.ones(len(images), 1)]
        return Features(torch.cat(halves, dim=1))


def paint(folder: Path, each: int = 10, seed: int = 0, colours=COLOURS) -> Path:
    """A folder a colour, with noisy images of 32 px of it."""
    generator = torch.Generator().manual_seed(seed)
    for name, colour in colours.items():
        for index in range(each):
            noise = 60 * torch.randn(3, 32, 32, generator=generator)
            image = (torch.tensor(colour)[:, None, None] + noise).clamp(0, 255).to(torch.uint8)
            save_png(image, folder / name / f"{index:02d}.png")
    return folder


def parts(folder: Path, size: int = 32, **fields):
    config = ImageFolderConfig(path=folder, **fields)
    return [open_images(config, size, split=split, held_out_fraction=0.2) for split in ("train", "held_out")]


@pytest.fixture(scope="module")
def painted(tmp_path_factory) -> Path:
    return paint(tmp_path_factory.mktemp("data"))


def train(folder: Path, cache: Path, **fields) -> Probe:
    return load_or_train(Means(), *parts(folder), recipe=RECIPE, folder=cache, quiet=True, **fields)


def test_colours_are_told_apart(painted, tmp_path):
    found = train(painted, tmp_path)
    assert (found.right, found.held_out, found.num_classes, found.accuracy) == (6, 6, 3, 1.0)
    name = f"probe-1:{found.fingerprint[:8]} on means"
    assert found.label == f"{name}, 3 classes; 100.0 % of 6 held-out real images"
    fresh = parts(paint(tmp_path / "fresh", each=2, seed=1))
    batch = fresh[0].batch(range(len(fresh[0])))
    assert torch.equal(found.logits(Means()(to_uint8(batch.images)).pool).argmax(dim=1), batch.labels)


def test_the_accuracy_counts_what_is_read_wrong(painted, tmp_path):
    """One held-out image lies in the folder of another colour."""
    _, held_out = parts(painted)
    place = next(place for place in range(len(held_out)) if "/red/" in held_out.name(place))
    data = paint(tmp_path / "data")
    wrong = data / Path(held_out.name(place)).relative_to(painted)
    wrong.write_bytes((data / "blue" / "00.png").read_bytes())
    found = train(data, tmp_path)
    assert (found.right, found.held_out) == (5, 6)
    assert found.label.endswith("3 classes; 83.3 % of 6 held-out real images")


def test_the_reading_is_the_minimum_that_a_direct_computation_finds():
    """Newton's method on the same function, from features of very different scales."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 3
    features = torch.randn(40, 4, generator=generator) + F.one_hot(labels, 4)
    features = features * torch.tensor([1.0, 100.0, 0.01, 1.0]) + torch.tensor([0.0, 50.0, 0.0, -3.0])
    recipe = Recipe(penalty=0.05, tolerance=1e-8)
    found = fit(features, labels, 3, recipe)
    rows = features.double().numpy()
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    rows = torch.from_numpy((rows - mean) / deviation)
    weights = torch.zeros(5 * 3, dtype=torch.float64)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        weight, bias = flat[:12].view(4, 3), flat[12:]
        logits = rows @ weight + bias
        right = logits.gather(1, labels[:, None])[:, 0]
        return (logits.exp().sum(dim=1).log() - right).mean() + 0.025 * weight.square().sum()

    for _ in range(20):
        slope, curve = torch.func.grad(loss)(weights), torch.func.hessian(loss)(weights)
        weights = weights - torch.linalg.pinv(curve) @ slope
    assert torch.allclose(found["mean"], torch.from_numpy(mean), rtol=1e-6)
    assert torch.allclose(found["deviation"], torch.from_numpy(deviation), rtol=1e-6)
    assert torch.allclose(found["weight"].flatten(), weights[:12], atol=1e-5)
    assert torch.allclose(found["bias"], weights[12:], atol=1e-5)
    probe = Probe("a", "b", "c", **found, right=1, held_out=1)
    assert torch.allclose(probe.logits(features), rows @ weights[:12].view(4, 3) + weights[12:], atol=1e-4)
    assert not probe.logits(features).requires_grad


def test_a_feature_that_never_varied_decides_nothing(painted, tmp_path):
    found = train(painted, tmp_path)
    features = Means()(to_uint8(parts(painted)[0].batch([0]).images)).pool
    assert features[0, 6] == 1
    moved = features.clone()
    moved[0, 6] = 1.5
    assert torch.allclose(found.logits(moved), found.logits(features), atol=1e-6)


def test_trained_once_then_read_from_the_cache(painted, tmp_path, monkeypatch):
    monkeypatch.setenv("IMGTOK_CACHE", str(tmp_path))
    extractor = Means()
    first = load_or_train(extractor, *parts(painted), recipe=RECIPE)
    assert sum(extractor.batches) == 12 + 6
    (path,) = tmp_path.iterdir()
    assert path.name.startswith(f"probe-1-{first.fingerprint[:8]}")
    monkeypatch.setattr(module, "fit", lambda *a: pytest.fail("trained again"))
    second = load_or_train(extractor, *parts(painted), recipe=RECIPE)
    assert sum(extractor.batches) == 12 + 6
    assert (second.label, second.right, second.held_out) == (first.label, first.right, first.held_out)
    for name in ("mean", "deviation", "weight", "bias"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert getattr(second, name).dtype == torch.float64


def test_the_network_sees_blocks_of_one_size(painted, tmp_path):
    extractor = Means()
    recipe = Recipe(train_images=12, held_out_images=6, block=8)
    load_or_train(extractor, *parts(painted), recipe=recipe, folder=tmp_path)
    assert extractor.batches == [8, 4, 6]


def print_of(folder: Path, cache: Path, *, recipe: Recipe = RECIPE, extractor=None, size: int = 32, **fields) -> str:
    return load_or_train(extractor or Means(), *parts(folder, size, **fields), recipe=recipe, folder=cache).fingerprint


def test_whatever_decides_a_probe_is_in_its_fingerprint(painted, tmp_path):
    cache = tmp_path / "cache"
    known = print_of(painted, cache)
    assert print_of(paint(tmp_path / "moved"), cache) == known
    assert len(list(cache.iterdir())) == 1
    other = Means()
    other.name = "means:12345678"
    renamed = dict(zip(("blue", "green", "zinc"), COLOURS.values(), strict=True))
    prints = [
        known,
        print_of(painted, cache, extractor=other),
        print_of(painted, cache, size=40),
        print_of(painted, cache, recipe=Recipe(train_images=11, held_out_images=6)),
        print_of(painted, cache, recipe=Recipe(train_images=12, held_out_images=6, penalty=0.2)),
        print_of(paint(tmp_path / "content", seed=3), cache),  # other pixels under the same names
        print_of(paint(tmp_path / "more", each=11), cache),
        print_of(paint(tmp_path / "names", colours=renamed), cache),
    ]
    assert len(set(prints)) == len(prints)


def test_a_single_changed_image_of_few_is_noticed(painted, tmp_path):
    known = print_of(painted, tmp_path)
    data = paint(tmp_path / "data")
    source, _ = parts(data)
    recipe = Recipe(train_images=12, held_out_images=6)
    assert recipe.compared >= 12  # so all that it learns from are compared
    path = Path(source.name(choose(source.labels, 12)[5]))
    save_png(torch.full((3, 32, 32), 7, dtype=torch.uint8), path)
    assert print_of(data, tmp_path) != known


@pytest.mark.parametrize("damage", ["cut", "shape", "missing", "foreign"])
def test_a_damaged_cache_is_made_again_and_says_so(painted, tmp_path, caplog, damage):
    first = train(painted, tmp_path)
    (path,) = tmp_path.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "foreign":
        path.write_bytes(b"hello")
    else:
        tensors = load_file(path)
        tensors["bias"] = tensors["bias"][:2].clone()
        if damage == "missing":
            del tensors["mean"]
        save_file(tensors, path)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        again = train(painted, tmp_path)
    assert "is damaged and will be made again" in caplog.text
    assert torch.equal(again.weight, first.weight)
    caplog.clear()
    train(painted, tmp_path)
    assert "damaged" not in caplog.text


def test_a_cache_that_cannot_be_written_costs_only_time(painted, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        assert train(painted, tmp_path / "file").accuracy == 1
    assert "cannot keep" in caplog.text


def test_unreadable_images_are_left_out(tmp_path):
    data = paint(tmp_path / "data")
    source, _ = parts(data)
    Path(source.name(choose(source.labels, 12)[3])).write_bytes(b"broken")
    found = train(data, tmp_path / "cache")
    assert (found.right, found.held_out) == (6, 6)


# Which images


def test_as_many_of_each_class_as_possible_from_all_over():
    labels = np.repeat(np.arange(10), 500)
    chosen = choose(labels, 1000)
    assert chosen == sorted(set(chosen))
    assert Counter(labels[chosen].tolist()) == dict.fromkeys(range(10), 100)
    assert set(np.array(chosen) // 50) == set(range(100))
    assert choose(labels, 5000) == choose(labels, 9999) == list(range(5000))
    # Classes in turn, which every tenth image would be one of.
    assert Counter((np.arange(5000) % 10)[choose(np.arange(5000) % 10, 500)].tolist()) == dict.fromkeys(range(10), 50)
    # A rare class gives what it has.
    rare = np.array([0] * 90 + [1] * 7 + [2] * 3)
    assert Counter(rare[choose(rare, 20)].tolist()) == {0: 10, 1: 7, 2: 3}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"colours": {"blue": (0, 0, 255)}}, "has only one class"),
        ({"num_classes": 5}, r"2 of the 5 classes have no image in the training part of the data \(3, 4\)"),
        ({"num_classes": 13}, "probe-1 learns from 12 images, too few for 13 classes"),
    ],
)
def test_data_that_no_probe_can_learn_from(tmp_path, data, message):
    fields = dict(data)
    folder = paint(tmp_path / "data", colours=fields.pop("colours", COLOURS))
    with pytest.raises(DataError, match=message):
        load_or_train(Means(), *parts(folder, **fields), recipe=RECIPE, folder=tmp_path)


def test_data_without_labels(tmp_path):
    class Unlabelled:
        num_classes = 0

    with pytest.raises(DataError, match="its data has no labels"):
        load_or_train(Means(), Unlabelled(), Unlabelled(), recipe=RECIPE, folder=tmp_path)


def test_a_class_whose_images_are_all_held_out_is_named(painted, tmp_path):
    training, held_out = parts(painted)
    training._indices = training._indices[training.labels != 1]
    with pytest.raises(DataError, match=r"1 of the 3 classes have no image .* \(green\)"):
        load_or_train(Means(), training, held_out, recipe=RECIPE, folder=tmp_path)


def test_rendered_shapes_have_labels_too(tmp_path):
    training, held_out = (open_images(ShapesConfig(num_images=256), 32, split=part) for part in ("train", "held_out"))
    recipe = Recipe(train_images=128, held_out_images=20)
    found = load_or_train(Means(), training, held_out, recipe=recipe, folder=tmp_path)
    assert (found.num_classes, found.held_out) == (64, 20)
    assert np.array_equal(training.labels, training.batch(range(256)).labels.numpy())
    assert training.name(5) == training[5].name
