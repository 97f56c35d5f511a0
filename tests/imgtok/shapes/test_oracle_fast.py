"""The fast reading is the plain one: of clear pictures by itself, of doubtful ones by asking it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from imgtok.shapes import oracle, oracle_fast
from imgtok.shapes.oracle import Detection
from imgtok.shapes.render import render
from imgtok.shapes.world import ShapesConfig, sample_scenes

pytestmark = pytest.mark.usefixtures("one_thread")


def names(detection: Detection) -> tuple[object, ...]:
    return detection.known, detection.shape, detection.colour, detection.texture, detection.size


def pictures(size: int, count: int, start: int = 0) -> torch.Tensor:
    return render(sample_scenes(ShapesConfig(mode="text", split="val"), range(start, start + count)), size)


def damaged(images: torch.Tensor) -> torch.Tensor:
    """Half of them noisy and soft."""
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)
    noise = 0.15 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return torch.cat([images[: len(images) // 2], (soft + noise)[len(images) // 2 :]]).clamp(0, 1)


@pytest.mark.parametrize(("size", "count"), [(64, 24), (32, 10)])
def test_readings_are_those_of_the_plain_search(size, count):
    images = damaged(pictures(size, count))
    for fast, plain in zip(oracle_fast.read(images), oracle.read(images), strict=True):
        assert [names(one) for one in fast] == [names(one) for one in plain]
        for one, other in zip(fast, plain, strict=True):
            assert (one.x, one.y) == pytest.approx((other.x, other.y), abs=0.015)
            assert one.radius == pytest.approx(other.radius, rel=0.15)
            assert one.area == other.area


def test_most_of_a_clear_picture_is_read_without_the_plain_search(monkeypatch):
    asked = []
    explain = oracle._explain

    def counted(parts, scale, solid):
        asked.append(len(parts.image))
        return explain(parts, scale, solid)

    monkeypatch.setattr(oracle, "_explain", counted)
    images = pictures(64, 16, start=40)
    found = oracle_fast.read(images)
    assert sum(asked) < 0.15 * sum(map(len, found))


def test_readings_do_not_depend_on_which_images_are_read_together(monkeypatch):
    images = damaged(pictures(32, 7, start=60))
    alone = [names(one) for image in images for one in oracle_fast.read(image[None])[0]]
    monkeypatch.setattr(oracle_fast, "_IMAGES", 2)
    monkeypatch.setattr(oracle_fast, "_WAITING", 5)
    together = oracle_fast.read(images)
    assert len(together) == len(images)
    assert [names(one) for detections in together for one in detections] == alone


def test_nothing_and_noise():
    blank = torch.full((1, 3, 32, 32), 0.92)
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    nothing, unknown = oracle_fast.read(torch.cat([blank, noise]))
    assert nothing == []
    assert not any(one.known for one in unknown)
    assert oracle_fast.read(torch.zeros(0, 3, 32, 32)) == []


def test_the_noise_is_measured_at_the_median():
    noisy = 0.5 + 0.1 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy[1] = 0.5 + (noisy[1] - 0.5) / 2
    assert oracle._noise(noisy).tolist() == pytest.approx([0.1, 0.05], rel=0.03)
    noisy[:, :, 20:24, 20:24] += torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))  # few pixels, large
    assert oracle._noise(noisy).tolist() == pytest.approx([0.1, 0.05], rel=0.03)


def test_the_largest_around_is_that_of_a_pool():
    values = torch.randint(-1, 9, (3, 7, 5), generator=torch.Generator().manual_seed(0))
    expected = F.max_pool2d(values.float(), 3, 1, 1).to(values.dtype)
    assert torch.equal(oracle._largest_around(values), expected)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.6])
def test_components_are_those_of_spreading_labels(share):
    mask = torch.rand(5, 24, 30, generator=torch.Generator().manual_seed(0)) < share
    labels = torch.arange(mask.numel(), dtype=torch.float32).view_as(mask) * mask
    while True:
        spread = F.max_pool2d(labels, 3, 1, 1) * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    assert torch.equal(oracle._components(mask), labels)
