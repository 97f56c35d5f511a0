"""Networks as judges of pairs: what equal and different images score, and that the originals are looked at once."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F

from imgtok.metrics.perceptual import DINOSimilarity, KeepsLast, LPIPSDistance
from imgtok.pictures import from_uint8
from imgtok.vision.dino import DINOv2

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net() -> DINOv2:
    torch.manual_seed(0)
    return DINOv2(timm.create_model("test_vit", num_classes=0, img_size=32), 32)


@pytest.fixture
def dino(net) -> DINOSimilarity:
    return DINOSimilarity(net, "test_vit:12345678", CPU)


def test_dino_is_the_cosine_of_class_tokens_and_of_patches_at_each_place(dino, net, random_images):
    images, originals = random_images(3, size=32), random_images(3, seed=1, size=32)
    found = dino(images, originals)
    ours, theirs = net(from_uint8(images)), net(from_uint8(originals))
    assert torch.equal(found[:, 0], F.cosine_similarity(ours.whole, theirs.whole))
    by_hand = [
        [F.cosine_similarity(ours.patches[b, n], theirs.patches[b, n], dim=0) for n in range(4)] for b in range(3)
    ]
    torch.testing.assert_close(found[:, 1], torch.tensor(by_hand).mean(dim=1))
    assert dino.keys == ("dino", "dino_patches")
    assert dino.protocol == "test_vit:12345678, 32 px bicubic, cosine, mean over images"


def test_a_network_without_a_class_token_is_refused():
    with pytest.raises(ValueError, match="dino_model: test_vit2:1 has no class token"):
        DINOSimilarity(DINOv2(timm.create_model("test_vit2", num_classes=0), 160), "test_vit2:1", CPU)


def test_equal_images_are_alike_and_others_less(dino, random_images):
    images = random_images(4, size=48)
    torch.testing.assert_close(dino(images, images.clone()), torch.ones(4, 2))
    noisy = (images.int() + torch.randint(-60, 61, images.shape)).clamp(0, 255).to(torch.uint8)
    assert bool((dino(noisy, images) < 0.9999).all())


def test_patches_tell_where_something_is(dino):
    """A mirrored image has the same content: patch by patch it is another image."""
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[..., :16] = 255
    assert float(dino(image.flip(3), image)[0, 1]) < 0.9999


def test_the_originals_are_looked_at_once_for_all_token_counts(dino, net, random_images, monkeypatch):
    seen = []
    prepare = net.prepare
    monkeypatch.setattr(net, "prepare", lambda images: seen.append(len(images)) or prepare(images))
    originals, others = random_images(2, size=32), random_images(3, seed=1, size=32)
    for _ in range(3):
        dino(random_images(2, seed=2, size=32), originals)
    assert seen == [2] * 4
    first = dino(others, others)
    assert torch.equal(dino(others, others.clone()), first)
    assert seen[4:] == [3] * 4


def test_what_is_kept_belongs_to_one_tensor():
    calls = []
    double = KeepsLast(lambda x: calls.append(0) or 2 * x)
    first, second = torch.ones(1), torch.ones(1)
    assert all(torch.equal(double(x), torch.full((1,), 2.0)) for x in (first, first, second, first))
    assert len(calls) == 3


def test_lpips_sees_both_images_in_its_range_and_at_their_size(random_images):
    class Spy(torch.nn.Module):
        smallest = 16

        def forward(self, images, references):
            for side in (images, references):
                assert side.shape == (2, 3, 16, 16)
            return (images - references).square().mean(dim=(1, 2, 3))

    judge = LPIPSDistance(Spy(), "vgg:1:2", CPU)
    black, white = (torch.full((2, 3, 16, 16), level, dtype=torch.uint8) for level in (0, 255))
    assert torch.equal(judge(black, white), torch.full((2, 1), 4.0))
    assert judge.smallest == {"lpips": 16}
    assert judge.protocol == "vgg:1:2, v0.1, mean over images"


@pytest.mark.gpu
def test_a_gpu_says_what_a_cpu_says(net, random_images):
    images, originals = random_images(2, size=32), random_images(2, seed=1, size=32)
    expected = DINOSimilarity(net, "x", CPU)(images, originals)
    found = DINOSimilarity(net, "x", torch.device("cuda"))(images, originals).cpu()
    net.to(CPU)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
