"""A patch discriminator and the losses of the game that a decoder plays against it.

Plain distances prefer the mean of all images that fit, which is blurred. A small convolutional network that learns to
tell reconstructions from images, patch by patch, prefers one of them (PatchGAN, arXiv 1611.07004; as a loss of
autoencoders VQGAN, arXiv 2012.09841, and with it the VAEs of latent diffusion).

Both players' losses are of one forward pass and one backward pass: the discriminator's sees reconstructions without
their gradient, and the decoder's goes through a discriminator whose weights count as constants. So each loss reaches
one player only, and one optimizer, one checkpoint and one resume serve both.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Norm = Literal["group", "batch"]
Game = Literal["hinge", "non_saturating"]


class PatchDiscriminator(nn.Module):
    """Images (B, 3, H, W) -> logits (B, 1, h, w), one for each overlapping patch: 70 pixels a side with 3 layers.

    By default norms are over groups of channels of one image. The lineage has batch norms, whose statistics differ
    between processes, and move with every pass, also with those that only ask for a gradient; real and decoded images
    must then go through it in separate batches, as the losses below send them.
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: Norm = "group") -> None:
        """`channels` of the first layer, doubled by each up to eightfold; `layers` that halve the image."""
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, layers + 1):
            stride, width = 2 if index < layers else 1, widths[index]
            conv = nn.Conv2d(widths[index - 1], width, 4, stride=stride, padding=1, bias=False)
            normalise = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(math.gcd(32, width), width)
            blocks += [conv, normalise, nn.LeakyReLU(0.2)]
        blocks.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*blocks)
        self.norm = norm
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):  # as the lineage starts
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits.float()  # (B, 1, h, w)

    @staticmethod
    def smallest(layers: int) -> int:
        """Pixels a side of the smallest image that leaves one patch."""
        return 3 * 2**layers


def discriminator_loss(discriminator: PatchDiscriminator, real: Tensor, fake: Tensor, game: Game = "hinge") -> Tensor:
    """What the discriminator minimises; `fake` gets no gradient.

    "hinge": logits above 1 for real images, below -1 for others. "non_saturating": the two cross-entropies of a
    classifier. The mean over both kinds of images.
    """
    fake = fake.detach().to(real)
    if discriminator.norm == "batch":
        on_real, on_fake = discriminator(real), discriminator(fake)
    else:  # one pass over both is quicker, and the same where no image sees another
        on_real, on_fake = discriminator(torch.cat([real, fake])).chunk(2)
    if game == "hinge":
        return (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean()) / 2
    return (F.softplus(-on_real).mean() + F.softplus(on_fake).mean()) / 2


def adversarial_loss(discriminator: PatchDiscriminator, fake: Tensor, game: Game = "hinge") -> Tensor:
    """What the maker of `fake` minimises. The discriminator's weights get no gradient.

    "hinge": minus the mean logit. "non_saturating": the cross-entropy of being taken for real.
    """
    constants = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    logits: Tensor = functional_call(discriminator, constants, (fake,))
    return -logits.mean() if game == "hinge" else F.softplus(-logits).mean()


# ---------------------------------------------------------------- adaptive weights


def join_at_last_layer(
    decoded: Tensor,
    seen: Tensor,
    reconstruction: Tensor,
    adversarial: Tensor,
    weight: float | Tensor,
    last_layer: Tensor,
) -> tuple[Tensor, Tensor]:
    """The sum of two losses, the second times `weight` and times VQGAN's adaptive weight, and that weight: scalars.

    The adaptive weight (arXiv 2012.09841, equation 7) is the norm of the reconstruction loss's gradient over that of
    the adversarial loss's, both at the weight of the decoder's last layer; it has no gradient. The losses are of
    `seen`, which is `decoded` detached, in float32. So the perceptual network and the discriminator are gone through
    backward once, here, and what they keep for it is freed; the sum knows its gradient by `decoded` already.
    """
    gradients = [torch.autograd.grad(loss, seen)[0] for loss in (reconstruction, adversarial)]
    # In 16 bits: so large that the gradient of a pixel is not rounded to zero, and their sum no infinity.
    scale = 2.0 ** round(math.log2(decoded.numel()) / 2)
    norms = [
        torch.autograd.grad(decoded, last_layer, (scale * by).to(decoded.dtype), retain_graph=True)[0].float().norm()
        / scale
        for by in gradients
    ]
    ratio = (norms[0] / (norms[1] + 1e-4)).clamp(0.0, _LARGEST_RATIO)
    share = weight * ratio
    value = reconstruction.detach() + share * adversarial.detach()
    total: Tensor = _Known.apply(decoded, value, gradients[0] + share * gradients[1])
    return total, ratio


class _Known(torch.autograd.Function):
    """A scalar of x with its gradient by x, both known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (above * gradient).to(ctx.dtype), None, None  # in 16 bits only once a scaler's factor is in it


def balance(images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`images` twice: for reconstruction losses, and for an adversarial term that is multiplied by `weight`, a scalar.

    Forward nothing happens. On the way back the adversarial gradient is scaled until its norm is `weight` times that
    of the reconstruction's: VQGAN's adaptive weight, but measured where the two gradients meet, on the decoded images,
    and not on the last layer's weights, which would take a second backward pass. Each process measures its own.
    """
    reconstructed, judged = _Balance.apply(images, weight)
    return reconstructed, judged


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        return images.clone(), images.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        reconstruction, adversarial = gradients  # the second has been multiplied by `weight` already
        tiny = torch.finfo(adversarial.dtype).tiny
        ratio = weight * reconstruction.norm() / adversarial.norm().clamp_min(tiny)
        return reconstruction + ratio.clamp(max=_LARGEST_RATIO) * adversarial, None


_LARGEST_RATIO = 1e4  # VQGAN's: a discriminator without an opinion has a gradient of noise, not to be blown up at will
