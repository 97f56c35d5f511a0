"""The ruler of fd_shapes: the same each time, kept once, and it sees what it should."""

from __future__ import annotations

import logging

import pytest
import torch

from imgtok.metrics.accumulate import Moments
from imgtok.metrics.reference import Statistics
from imgtok.pictures import from_uint8, to_uint8
from imgtok.shapes import classifier
from imgtok.shapes.classifier import Recipe, ShapesNet, cache_name, fingerprint, load_or_train, resize, train
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import ShapesConfig

QUICK = Recipe(steps=2, batch=8)


def test_two_trainings_give_the_same_bits_and_leave_no_trace():
    torch.manual_seed(7)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        torch.set_num_threads(1)
        first = train(QUICK)
        torch.set_num_threads(2)
        torch.rand(3)
        second = train(QUICK)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert fingerprint(first) == fingerprint(second)
    assert not first.training
    torch.set_rng_state(state)
    other = train(Recipe(steps=2, batch=8, seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert fingerprint(other) != fingerprint(first)


def test_size_and_scale_of_the_features():
    net = train(QUICK)
    assert 25_000 < sum(p.numel() for p in net.parameters()) < 100_000
    source = ShapesDataset(ShapesConfig(num_images=64), 32)
    features = net.features(source.batch(range(16, 48))[0])
    assert features.shape == (32, 64)
    assert 0.3 < float(features.std(dim=0).mean()) < 3
    assert not features.requires_grad


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (48, 48), (64, 80)])
def test_every_size_is_brought_to_32_pixels(size):
    assert resize(torch.full((1, 3, *size), 0.25)).shape == (1, 3, 32, 32)
    assert torch.allclose(resize(torch.full((1, 3, *size), 0.25)), torch.tensor(0.25))


def test_larger_images_are_reduced_by_area():
    image = torch.rand(1, 3, 64, 64)
    assert torch.allclose(resize(image), image.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5)), atol=1e-6)


def test_trained_once_then_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IMGTOK_CACHE", str(tmp_path))
    first = load_or_train(QUICK)
    assert [path.name for path in tmp_path.iterdir()] == [cache_name(QUICK)]
    monkeypatch.setattr(classifier, "train", lambda recipe: pytest.fail("trained again"))
    second = load_or_train(QUICK)
    assert fingerprint(first) == fingerprint(second)
    assert not second.training


def test_another_recipe_is_another_file():
    assert cache_name(QUICK) != cache_name(Recipe(steps=3, batch=8))


def test_a_damaged_cache_is_made_again(tmp_path):
    first = load_or_train(QUICK, tmp_path)
    path = tmp_path / cache_name(QUICK)
    path.write_bytes(path.read_bytes()[:200])
    assert fingerprint(load_or_train(QUICK, tmp_path)) == fingerprint(first)
    assert path.stat().st_size > 200


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="imgtok.shapes.classifier"):
        net = load_or_train(QUICK, tmp_path / "file")
    assert isinstance(net, ShapesNet)
    assert "cannot keep" in caplog.text


def statistics(net: ShapesNet, images: torch.Tensor) -> Statistics:
    moments = Moments(64)
    moments.update(net.features(from_uint8(images)))
    return Statistics.of(moments)


def damages(images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ever worse versions of uint8 images, by name and degree."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(images.float(), 3, 1, 1, count_include_pad=False)
    return {
        "noise 16": (images + 16 * noise).clamp(0, 255).to(torch.uint8),
        "noise 64": (images + 64 * noise).clamp(0, 255).to(torch.uint8),
        "blur": blurred.round().to(torch.uint8),
        "no triangles": images[labels // 8 != 2],
        "half the shapes": images[labels < 32],
        "one class": images[labels == 13].repeat(64, 1, 1, 1),
        "blank": torch.full_like(images, 235),
    }


def distances(net: ShapesNet, num: int) -> dict[str, float]:
    source = ShapesDataset(ShapesConfig(split="val", num_images=2 * num), 32)
    reference = statistics(net, to_uint8(source.batch(range(num))[0]))
    images, labels = source.batch(range(num, 2 * num))
    versions = {"clean": to_uint8(images), **damages(to_uint8(images), labels)}
    return {name: statistics(net, pixels).distance(reference) for name, pixels in versions.items()}


def assert_ordered(found: dict[str, float], margin: float) -> None:
    """`margin`: how many times the clean value the slight damages must reach."""
    for name in ("noise 16", "blur", "no triangles"):
        assert found[name] > margin * found["clean"], name
    assert found["no triangles"] < found["half the shapes"] < found["one class"]
    assert found["noise 16"] < found["noise 64"]
    assert found["blank"] > 50 * found["clean"]


@pytest.mark.slow
def test_order_of_damages_after_a_short_training():
    assert_ordered(distances(train(Recipe(steps=80, batch=32)), 512), margin=1.1)


@pytest.mark.slow
def test_the_recipe_that_is_shipped():
    """The figures of its documentation; other versions of torch may move them a little."""
    net = train()
    images, labels = ShapesDataset(ShapesConfig(split="val", num_images=1024), 32).batch(range(1024))
    with torch.no_grad():
        shapes, colours = net(images)
    assert (shapes.argmax(1) == labels // 8).float().mean() > 0.97
    assert (colours.argmax(1) == labels % 8).float().mean() > 0.99
    found = distances(net, 1024)
    assert found["clean"] < 0.2
    assert_ordered(found, margin=4)
