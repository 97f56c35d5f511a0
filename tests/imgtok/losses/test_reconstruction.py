"""Which of the losses of a reconstruction reach it, and with which weights (the whole job: test_autoencoder.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok.losses.adversarial import adversarial_loss
from imgtok.losses.reconstruction import ReconstructionLoss, ReconstructionLossConfig


def images(seed: int) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).abs().flatten(1).amax(dim=1)


def test_distances_have_their_weights_and_need_no_discriminator():
    losses = ReconstructionLoss(ReconstructionLossConfig(l1=0.5, mse=3.0, lpips=2.0))(
        images(0), images(1), perceptual=distance
    )
    l1, mse = (images(0) - images(1)).abs().mean(), (images(0) - images(1)).square().mean()
    torch.testing.assert_close(losses.total, 0.5 * l1 + 3 * mse + 2 * distance(images(0), images(1)).mean())
    assert losses.parts.keys() == {"l1", "mse", "lpips"}


def test_a_perceptual_distance_is_named_and_weighted():
    for fields, name, weight in (
        ({"perceptual": "lite0", "perceptual_weight": 0.5}, "lite0", 0.5),
        ({"perceptual": "lite0"}, "lite0", ReconstructionLossConfig.perceptual_weight),
        ({"perceptual": "lpips", "perceptual_weight": 0.5}, "lpips", 0.5),
        ({"lpips": 0.5}, "lpips", 0.5),
        ({"lpips": 0.5, "perceptual": "lpips", "perceptual_weight": 0.5}, "lpips", 0.5),
    ):
        config = ReconstructionLossConfig(l1=1.0, mse=0.0, **fields)
        assert config.perceptual_term == (name, weight)
        total, parts = ReconstructionLoss(config)(images(0), images(1), perceptual=distance)
        torch.testing.assert_close(parts[name], distance(images(0), images(1)).mean())
        torch.testing.assert_close(total, parts["l1"] + weight * parts[name])
        assert parts.keys() == {"l1", "mse", name}
    assert ReconstructionLossConfig(perceptual_weight=0.5).perceptual_term is None


def test_the_weight_that_is_not_given_contradicts_nothing(monkeypatch):
    """Whatever it is."""
    config = ReconstructionLossConfig(lpips=0.5, perceptual_weight=ReconstructionLossConfig.perceptual_weight)
    assert config.perceptual_term == ("lpips", 0.5)
    monkeypatch.setattr(ReconstructionLossConfig, "perceptual_weight", 0.25)
    assert ReconstructionLossConfig(lpips=0.5, perceptual_weight=0.25).perceptual_term == ("lpips", 0.5)


@pytest.mark.parametrize(
    "fields",
    [
        {"perceptual": "lite0"},
        {"perceptual": "lite0", "perceptual_weight": 2.0},
        {"perceptual": "lpips"},
        {"perceptual": "lpips", "perceptual_weight": 0.5},
        {"perceptual_weight": 0.5},
    ],
)
def test_two_ways_to_say_it_must_not_contradict_each_other(fields):
    with pytest.raises(ValueError, match=r"loss.lpips=2.0 means perceptual=lpips with the weight 2.0, and contradicts"):
        ReconstructionLossConfig(lpips=2.0, **fields)


def test_the_weight_at_the_last_layer_multiplies_the_adversarial_term():
    torch.manual_seed(0)
    config = ReconstructionLossConfig(adversarial=0.5, adaptive="last_layer", discriminator_layers=2)
    last = torch.nn.Conv2d(4, 3, 1)
    decoded = last(torch.rand(2, 4, 16, 16))
    losses = ReconstructionLoss(config)
    total, parts = losses(decoded, images(1), last_layer=last.weight)
    pixels = F.l1_loss(decoded, images(1)) + F.mse_loss(decoded, images(1))
    adversarial = adversarial_loss(losses.discriminator, decoded)
    gradients = [torch.autograd.grad(part, last.weight, retain_graph=True)[0] for part in (pixels, adversarial)]
    weight = gradients[0].norm() / (gradients[1].norm() + 1e-4)
    torch.testing.assert_close(parts["adaptive_weight"], weight)
    torch.testing.assert_close(total, pixels + 0.5 * weight * adversarial + parts["discriminator"])
    used_up = [name for name, part in parts.items() if name != "discriminator" and part.requires_grad]
    assert not used_up, "DDP would go through what the adaptive weight has gone through already"
    whole = torch.autograd.grad(total, last.weight)[0]
    torch.testing.assert_close(whole, gradients[0] + 0.5 * weight * gradients[1])


def test_images_too_small_for_the_discriminator_are_refused():
    config = ReconstructionLossConfig(adversarial=0.5)
    config.check_size(24)
    with pytest.raises(ValueError, match="3 need images of at least 24 pixels a side, given image_size = 16"):
        config.check_size(16)
