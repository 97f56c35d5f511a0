"""The losses of decoded images against what KARL's published code computed (arXiv 2507.07995; they are VQGAN's):
pixels, LPIPS, hinge losses of a discriminator with batch norms, the adaptive weight at the decoder's last layer.
"""

from __future__ import annotations

import functools

import karl_runs
import pytest
import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

from imgtok.losses.lpips import LPIPS
from imgtok.losses.reconstruction import ReconstructionLoss, ReconstructionLossConfig
from imgtok.tokenizers.base import Losses

CASE = Case.load("karl/adversarial_losses")
PERCEPTUAL, DISCRIMINATOR = "loss.perceptual_loss.", "loss.discriminator.main."


@functools.cache
def weights() -> dict[str, Tensor]:
    return CASE.weights()


@functools.cache
def perceptual() -> LPIPS:
    return karl_runs.lpips(weights(), PERCEPTUAL)


def judged(adversarial: float, **changes) -> tuple[ReconstructionLoss, Losses, Tensor, Tensor]:
    """The losses of the case's reconstruction; the images are fed as they are, in [0, 1]."""
    settings = {
        "l1": 1.0, "mse": 0.0, "lpips": 1.0, "adversarial": adversarial,
        "adaptive": "last_layer", "discriminator_norm": "batch",
    }  # fmt: skip
    loss = ReconstructionLoss(ReconstructionLossConfig(**settings | changes))
    assert loss.discriminator is not None
    numbers = karl_runs.discriminator_weights(weights(), DISCRIMINATOR)
    missing = loss.discriminator.load_state_dict(numbers, strict=False)
    assert not missing.unexpected_keys
    assert all("running" in name or "tracked" in name for name in missing.missing_keys)
    last = weights()["last.weight"].clone().requires_grad_()
    decoded = torch.sigmoid(F.conv2d(CASE.input("feature"), last, weights()["last.bias"], padding=1))
    losses = loss(decoded, CASE.input("image"), perceptual=perceptual(), last_layer=last)
    return loss, losses, last, decoded


def outputs(run: str, adversarial: float, **changes) -> dict[str, Tensor]:
    _, (total, parts), last, decoded = judged(adversarial, **changes)
    own = total - parts["discriminator"]
    return {
        f"{run}_loss": own,
        f"{run}_nll_loss": parts["l1"] + parts["lpips"],
        f"{run}_p_loss": parts["lpips"],
        f"{run}_error": (decoded - CASE.input("image")).abs().mean(dim=(1, 2, 3)),
        f"{run}_g_loss": parts["adversarial"],
        f"{run}_d_weight": adversarial * parts["adaptive_weight"],
        f"{run}_grad_last": torch.autograd.grad(own, last)[0],
    }


def worst(ours: dict[str, Tensor]) -> float:
    return max(CASE.errors(ours).values())


@pytest.mark.parametrize(("run", "adversarial"), [("generator", 0.2), ("late", 0.8)])
def test_the_losses_of_the_maker(run, adversarial):
    assert worst(outputs(run, adversarial)) <= 1


def test_before_the_discriminator_counts():
    loss, (_, parts), last, _ = judged(0.2)
    loss.start = 1
    assert loss.seen == 1
    loss.seen.zero_()
    decoded = torch.sigmoid(F.conv2d(CASE.input("feature"), last, weights()["last.bias"], padding=1))
    total, parts = loss(decoded, CASE.input("image"), perceptual=perceptual(), last_layer=last)
    own = total - parts["discriminator"]
    gradient = torch.autograd.grad(own, last)[0]
    assert (
        worst({"warmup_loss": own, "warmup_grad_last": gradient, "lpips": perceptual()(decoded, CASE.input("image"))})
        <= 1
    )


def test_the_loss_of_the_judge():
    loss, (_, parts), _, decoded = judged(0.2)
    assert loss.discriminator is not None
    first = loss.discriminator.layers[0].weight
    fresh = {
        "discriminator_loss": parts["discriminator"],
        "discriminator_disc_loss": parts["discriminator"],
        "discriminator_logits_real": loss.discriminator(CASE.input("image")).mean(),
        "discriminator_logits_fake": loss.discriminator(decoded).mean(),
        "discriminator_grad_disc_first": torch.autograd.grad(parts["discriminator"], first, retain_graph=True)[0],
    }
    assert worst(fresh) <= 1


@pytest.mark.parametrize(
    "changes", [{"discriminator_norm": "group"}, {"game": "non_saturating"}, {"mse": 0.1}, {"lpips": 0.9}]
)
def test_other_losses_are_told_apart(changes):
    assert worst(outputs("generator", 0.2, **changes)) > 1
