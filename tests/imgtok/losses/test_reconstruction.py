"""Which of the losses of a reconstruction reach it, and with which weights (the whole job: test_autoencoder.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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


def test_the_weight_at_the_last_layer_multiplies_the_adversarial_term():
    torch.manual_seed(0)
    config = ReconstructionLossConfig(adversarial=0.5, adaptive="last_layer", discriminator_layers=2)
    last = torch.nn.Conv2d(4, 3, 1)
    decoded = last(torch.rand(2, 4, 16, 16))
    total, parts = ReconstructionLoss(config)(decoded, images(1), last_layer=last.weight)
    pixels = parts["l1"] + parts["mse"]
    gradients = [
        torch.autograd.grad(part, last.weight, retain_graph=True)[0] for part in (pixels, parts["adversarial"])
    ]
    weight = gradients[0].norm() / (gradients[1].norm() + 1e-4)
    torch.testing.assert_close(parts["adaptive_weight"], weight)
    torch.testing.assert_close(total, pixels + 0.5 * weight * parts["adversarial"] + parts["discriminator"])
    whole = torch.autograd.grad(total, last.weight)[0]
    torch.testing.assert_close(whole, gradients[0] + 0.5 * weight * gradients[1])


def test_images_too_small_for_the_discriminator_are_refused():
    config = ReconstructionLossConfig(adversarial=0.5)
    config.check_size(24)
    with pytest.raises(ValueError, match="3 need images of at least 24 pixels a side, given image_size = 16"):
        config.check_size(16)
