"""The discriminator learns, and each player's loss reaches that player alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imgtok.losses.adversarial import (
    PatchDiscriminator,
    adversarial_loss,
    balance,
    discriminator_loss,
    join_at_last_layer,
)


def small(layers: int = 2) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(channels=8, layers=layers)


def images(seed: int, count: int = 4, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("layers", "side", "patches", "field"), [(2, 32, 6, 34), (3, 64, 6, 70)])
def test_a_logit_belongs_to_a_patch(layers, side, patches, field):
    discriminator = small(layers)
    assert discriminator(images(1, side=side)).shape == (4, 1, patches, patches)
    for module in discriminator.modules():  # norms look at the whole image: count the convolutions' reach alone
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    side = 2 * field
    x = images(1, count=1, side=side).requires_grad_()
    logits = discriminator(x)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    reached = gradient[0].abs().sum((0, 1)).nonzero()
    assert int(reached.max() - reached.min()) + 1 == field


def test_the_smallest_image_leaves_one_patch():
    for layers in (1, 2, 3):
        side = PatchDiscriminator.smallest(layers)
        assert small(layers)(images(1, side=side)).shape[2:] == (1, 1)
        with pytest.raises(RuntimeError):
            small(layers)(images(1, side=side - 2**layers))


def test_it_learns_to_tell_two_kinds_of_images_apart():
    discriminator = small()
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3)
    real = images(1)
    fake = torch.nn.functional.avg_pool2d(real, 3, stride=1, padding=1)  # blurred
    history = []
    for _ in range(60):
        loss = discriminator_loss(discriminator, real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[0] == pytest.approx(1, abs=0.1)
    assert history[-1] < 0.2
    assert (discriminator(real).mean() > 0.5) & (discriminator(fake).mean() < -0.5)


def test_the_losses_are_those_of_their_formulas():
    discriminator = small()
    real, fake = images(1), images(2)
    on_real, on_fake = discriminator(real), discriminator(fake)
    hinge = ((1 - on_real).clamp(min=0).mean() + (1 + on_fake).clamp(min=0).mean()) / 2
    torch.testing.assert_close(discriminator_loss(discriminator, real, fake), hinge)
    torch.testing.assert_close(adversarial_loss(discriminator, fake), -on_fake.mean())


def test_each_loss_reaches_one_player():
    discriminator = small()
    weights = list(discriminator.parameters())
    fake = images(2).requires_grad_()
    adversarial = torch.autograd.grad(adversarial_loss(discriminator, fake), [fake, *weights], allow_unused=True)
    assert adversarial[0] is not None
    assert adversarial[0].abs().sum() > 0
    assert all(gradient is None for gradient in adversarial[1:])
    judging = torch.autograd.grad(
        discriminator_loss(discriminator, images(1), fake), [fake, *weights], allow_unused=True
    )
    assert judging[0] is None
    *judged, bias = judging[1:]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in judged)
    assert bias is not None  # zero, as long as no logit has reached a margin: real and fake pull equally


def test_one_image_does_not_change_what_is_said_of_another():
    discriminator = small()
    assert not list(discriminator.buffers())
    together = discriminator(torch.cat([images(1), images(2)]))
    torch.testing.assert_close(together[:4], discriminator(images(1)))


# ------------------------------------------------------------------------------------------------ the balance


def gradient_of(weight: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient at the images, and those of the two losses by themselves; the adversarial one is `scale` large."""
    x, direction = images(1).requires_grad_(), images(2)
    reconstruction = torch.autograd.grad(x.square().mean(), x)[0]
    first, second = balance(x, torch.tensor(weight))
    total = first.square().mean() + weight * scale * (second * direction).sum()
    return torch.autograd.grad(total, x)[0], reconstruction, direction


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_the_adversarial_gradient_has_a_share_whatever_its_size(scale):
    found, reconstruction, direction = gradient_of(0.5, scale)
    expected = reconstruction + 0.5 * reconstruction.norm() * direction / direction.norm()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("weight", "scale"), [(0.0, 1.0), (0.5, 0.0)])
def test_a_term_that_does_not_count_or_has_no_gradient_adds_nothing(weight, scale):
    found, reconstruction, _ = gradient_of(weight, scale)
    assert torch.equal(found, reconstruction)


def test_a_gradient_of_next_to_nothing_is_not_blown_up():
    found, reconstruction, direction = gradient_of(0.5, 1e-12)
    torch.testing.assert_close(found, reconstruction + 0.5 * 1e4 * 1e-12 * direction)


# ------------------------------------------------------------------------------------------------ published ways


def test_the_losses_of_the_other_game_are_cross_entropies():
    discriminator = small()
    real, fake = images(1), images(2)
    on_real, on_fake = discriminator(real), discriminator(fake)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    judged = (entropy(on_real, torch.ones_like(on_real)) + entropy(on_fake, torch.zeros_like(on_fake))) / 2
    torch.testing.assert_close(discriminator_loss(discriminator, real, fake, "non_saturating"), judged)
    fooled = entropy(on_fake, torch.ones_like(on_fake))
    torch.testing.assert_close(adversarial_loss(discriminator, fake, "non_saturating"), fooled)


def test_with_batch_norms_real_and_decoded_images_do_not_share_their_statistics():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(channels=8, layers=2, norm="batch")
    real, fake = images(1), images(2) * 0.1
    apart = [discriminator(batch) for batch in (real, fake)]
    hinge = ((1 - apart[0]).clamp(min=0).mean() + (1 + apart[1]).clamp(min=0).mean()) / 2
    torch.testing.assert_close(discriminator_loss(discriminator, real, fake), hinge)
    together = discriminator(torch.cat([real, fake]))
    assert not torch.allclose(together[:4], apart[0], atol=1e-3)


def test_the_weight_at_the_last_layer_is_the_ratio_of_two_gradients():
    last = torch.nn.Conv2d(2, 3, 1)
    decoded = last(torch.rand(2, 2, 4, 4))

    def losses(of: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
        return factor * of.square().mean(), 7 / factor * of.sin().mean()

    norms = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in losses(decoded)]
    seen = decoded.detach().requires_grad_()
    total, found = join_at_last_layer(decoded, seen, *losses(seen), 0.3, last.weight)
    torch.testing.assert_close(found, norms[0] / (norms[1] + 1e-4))
    assert not found.requires_grad
    plainly = losses(decoded)[0] + 0.3 * found * losses(decoded)[1]
    torch.testing.assert_close(total, plainly)
    parameters = list(last.parameters())
    wanted = torch.autograd.grad(2 * plainly, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(2 * total, parameters, retain_graph=True), wanted)
    assert join_at_last_layer(decoded, seen, *losses(seen, 1e9), 0.3, last.weight)[1] == 1e4


def test_the_weight_at_the_last_layer_survives_16_bits():
    """The gradient of a pixel is a millionth of the loss and less, which float16 would round to zero."""
    last = torch.nn.Parameter(torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1))
    exact = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * last

    def losses(of: Tensor) -> tuple[Tensor, Tensor]:
        return 0.01 * of.square().mean(), 0.001 * of.sin().mean()

    wanted = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in losses(exact)]
    decoded = exact.half()
    seen = decoded.detach().float().requires_grad_()
    _, found = join_at_last_layer(decoded, seen, *losses(seen), 0.3, last)
    torch.testing.assert_close(found, wanted[0] / (wanted[1] + 1e-4), rtol=0.02, atol=0.0)
