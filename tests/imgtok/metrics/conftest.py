from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from imgtok.vision.features import Features
from imgtok.vision.inception import INCEPTION_NAME


class SmallExtractor:
    """Stands in for the Inception network: fixed random projections of the reduced image."""

    name = INCEPTION_NAME
    width = 12

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.matrices = [torch.randn(3 * 16, width, generator=generator) / 7 for width in (12, 20, 10)]

    def __call__(self, images: torch.Tensor) -> Features:
        assert images.dtype == torch.uint8
        pixels = F.adaptive_avg_pool2d(images.float() / 25, 4).flatten(1)
        pool, spatial, logits = (torch.tanh(pixels @ matrix) for matrix in self.matrices)
        return Features(pool, spatial, 4 * logits)


@pytest.fixture
def extractor() -> SmallExtractor:
    return SmallExtractor()


def random_images(count: int, seed: int = 0, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return (F.interpolate(coarse, size=(size, size), mode="bilinear") * 255).to(torch.uint8)


@pytest.fixture(name="random_images")
def random_images_fixture():
    return random_images


def _reduce_together(*parts) -> None:
    """Calls `reduce` of accumulators of one kind as if each lived in a process of its own."""
    given: list[list[torch.Tensor]] = [[] for _ in parts]
    for part, seen in zip(parts, given, strict=True):
        # The first pass only listens: each part gets its own tensors back.
        part.reduce(_Process(len(parts), lambda x, seen=seen: seen.append(x.clone()) or x))
    sums = [sum(tensors[1:], tensors[0]) for tensors in zip(*given, strict=True)]
    for part in parts:
        answers = iter(sums)
        part.reduce(_Process(len(parts), lambda x, answers=answers: next(answers).clone()))


class _Process:
    device = torch.device("cpu")

    def __init__(self, num_processes, answer) -> None:
        self.num_processes = num_processes
        self._answer = answer

    def reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        assert reduction == "sum"
        return self._answer(tensor)


@pytest.fixture
def reduce_together():
    return _reduce_together
