"""Convolutions of 3x3 on a CPU by Winograd's transform (arXiv 1509.09308), which needs a fifth of the multiplications.

torch computes them one product at a time on x86, and an autoencoder of pictures does little else. NNPACK, which torch
carries with it, transforms tiles of 6 x 6 outputs. Its error is several times that of direct sums of float32 (relative
root mean square 4.5e-6 in place of 0.6e-6 for one layer), still a hundredth of what TF32 does on a GPU; through a whole
autoencoder the two end equally far from float64, to a factor of three. It takes one picture at a time, so that one
picture's numbers never depend on others, and pays from about 64 channels and 16 rows on. Measured in
benchmarks/README.md.

In training an autoencoder's values are direct sums, and its gradients alone are transformed: the losses of its images
have kinks (L1, ReLU), where values that were rounded otherwise change the sign of a gradient. The gradient of a
convolution's input is a convolution too, with the kernel turned round. That of the kernel NNPACK does not have: here
tiles of 4 x 4 gradients are transformed, which leaves a quarter of the multiplications (`_kernel_gradient`).
`norm_silu_conv` keeps its input alone for the backward pass, where plain layers keep three tensors of that size. A
frozen network that judges images is transformed forward and backward (`convolve_frozen`).

Only float32 on a CPU is computed so. Autocast, compiled models and other devices are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

FEWEST_CHANNELS, SMALLEST_SIDE = 64, 16
FEWEST_TILES = 64
"""Tiles of 4 x 4 gradients: with fewer, the gradient of a kernel is quicker summed directly."""


def speed_up(network: nn.Module) -> bool:
    """Lets every convolution of `network` that it pays for be computed so, and in inference its SiLUs in place.

    Parameters and their names stay as they are. For networks whose SiLUs follow a norm, the output of which nothing
    else reads. Returns whether it has such a convolution; `by_picture` is then to be used.
    """
    found = False
    for module in network.modules():
        if type(module) is nn.Conv2d and _pays(module):
            module.__class__ = WinogradConv2d
            found = True
        if type(module) is nn.SiLU:
            module.__class__ = SiLU
    return found


def by_picture(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`network(x)` of pictures (B, C, H, W), one after the other where that lets its convolutions be transformed."""
    if not transforms(x):
        return network(x)
    rows = [network(row) for row in x.split(1)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def through(network: nn.Module, x: Tensor, *, sped_up: bool) -> Tensor:
    """`network(x)` of pictures (B, C, H, W) in the memory format that its convolutions are fastest with: the channels
    of a position side by side, unless they are transformed, as they may be in a network that is `sped_up`.
    """
    if sped_up and transforms(x):
        return by_picture(network, x.contiguous())
    out: Tensor = network(x.contiguous(memory_format=torch.channels_last))
    return out


def channels_last(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h, w, C)."""
    return maps.permute(0, 2, 3, 1)


def channels_first(maps: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, C, h, w)."""
    return maps.permute(0, 3, 1, 2)


def transforms(x: Tensor) -> bool:
    """Whether what is computed of `x` here and now may be computed so, values included."""
    return not torch.is_grad_enabled() and _can_transform(x)


def _can_transform(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and type(x) is Tensor  # no stand-in that follows shapes alone
        and torch.backends.nnpack.is_available()  # which also starts it
    )


class WinogradConv2d(nn.Conv2d):
    """A convolution of 3x3 that is transformed for one picture at a time, where `transforms` allows it; in training
    its gradients are.
    """

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and transforms(x) and _is_large(x):
            return _transformed(x, self.weight, self.bias)
        if torch.is_grad_enabled() and _can_transform(x):
            out: Tensor = _Convolution.apply(x, self.weight, self.bias, None, None, None)
            return out
        return super().forward(x)


class SiLU(nn.SiLU):
    """In place where no gradient needs its input."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


def silu(x: Tensor) -> Tensor:
    """In place where nobody needs `x`, the output of a normalisation, as it was."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def norm_silu_conv(norm: nn.GroupNorm, conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(silu(norm(x)))`. In training on a CPU, of a convolution that is sped up only `x` is kept for the backward
    pass, which computes the norm and the SiLU again.
    """
    if isinstance(conv, WinogradConv2d) and torch.is_grad_enabled() and _can_transform(x):
        out: Tensor = _Convolution.apply(x, conv.weight, conv.bias, norm.weight, norm.bias, (norm.num_groups, norm.eps))
    else:
        out = conv(silu(norm(x)))
    return out


def convolve_frozen(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)` of pictures (B, C, H, W), for a convolution whose parameters are frozen; where gradients are asked for
    transformed forward and backward, if that pays, and nothing is kept but the kernel.
    """
    frozen = torch.is_grad_enabled() and not conv.weight.requires_grad
    if frozen and _pays(conv) and _is_large(x) and _can_transform(x):
        out: Tensor = _Frozen.apply(x, conv.weight, conv.bias)
    else:
        out = conv(x)
    return out


def _pays(conv: nn.Conv2d) -> bool:
    plain = conv.kernel_size == (3, 3) and conv.stride == conv.dilation == conv.padding == (1, 1) and conv.groups == 1
    return plain and conv.padding_mode == "zeros" and min(conv.in_channels, conv.out_channels) >= FEWEST_CHANNELS


def _is_large(x: Tensor) -> bool:
    return min(x.shape[-2:]) >= SMALLEST_SIDE


# ---------------------------------------------------------------- with gradients


class _Frozen(torch.autograd.Function):
    """A convolution of 3x3 that no gradient of its kernel is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _transformed(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _Frozen.apply(gradient, _turned(weight), None), None, None


class _Convolution(torch.autograd.Function):
    """A wide convolution of 3x3 of pictures (B, C, H, W), after a group norm and SiLU if `norm` is (groups, eps).

    Its values are those of the plain layers, bit for bit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        norm: tuple[int, float] | None,
    ) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x, weight, bias, scale, shift)
        return F.conv2d(_read(x, scale, shift, norm), weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad
        x, weight, _, scale, shift = inputs
        with torch.enable_grad():
            read = _read(x, scale, shift, ctx.norm)
        if _is_large(x):
            gradient = gradient.contiguous()  # for both that are transformed
        found: list[Tensor | None] = [None] * len(needs)
        if needs[1]:
            found[1] = _kernel_gradient(read, gradient, weight)
        if needs[2]:
            found[2] = gradient.sum((0, 2, 3))
        below = [index for index in (0, 3, 4) if needs[index]]
        if below:
            of_read = _input_gradient(read, gradient, weight)
            again = torch.is_grad_enabled()  # gradients of these gradients are asked for
            by = torch.autograd.grad(read, [inputs[index] for index in below], of_read, create_graph=again)
            for index, value in zip(below, by, strict=True):
                found[index] = value
        return tuple(found)


def _read(x: Tensor, scale: Tensor | None, shift: Tensor | None, norm: tuple[int, float] | None) -> Tensor:
    """What the convolution reads."""
    return x if norm is None else silu(F.group_norm(x, norm[0], scale, shift, norm[1]))


def _transformed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of pictures (B, C, H, W), one after the other."""
    rows = [torch._nnpack_spatial_convolution(row, weight, bias, [1, 1], [1, 1]) for row in x.contiguous().split(1)]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _turned(weight: Tensor) -> Tensor:
    """The kernel by which gradients are convolved."""
    return weight.transpose(0, 1).flip(2, 3).contiguous()


def _input_gradient(x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient by x, the pictures that are convolved; only their size and order in memory are looked at."""
    if _is_large(x):
        found = _transformed(gradient, _turned(weight), None)
    else:
        found = conv2d_input(x.shape, weight, gradient, padding=1)
    return torch.empty_like(x).copy_(found)


def _kernel_gradient(x: Tensor, gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient by the kernel (K, C, 3, 3), from pictures (B, C, H, W) and the gradient by their convolution.

    In one dimension 4 gradients and the 6 pixels around them add to 3 numbers of the kernel: F(3, 4) in the paper's
    words, with 6 products for 12. Tiles are transformed by a convolution with a stride of 4.
    """
    rows, columns = (-(-side // 4) for side in x.shape[-2:])
    if rows * columns < FEWEST_TILES:
        return conv2d_weight(x, weight.shape, gradient, padding=1)
    border = (0, 4 * columns - x.shape[-1], 0, 4 * rows - x.shape[-2])
    of_pixels, of_gradients, sums = _transforms()
    products = x.new_zeros(36, *weight.shape[:2])
    for picture, above in zip(x.split(1), gradient.split(1), strict=True):
        pixels, gradients = _tiles(picture, border, of_pixels, 1), _tiles(above, border, of_gradients, 0)
        products = products.baddbmm(gradients, pixels.transpose(1, 2))
    return (sums @ products.flatten(1)).view(3, 3, *weight.shape[:2]).permute(2, 3, 0, 1)


def _tiles(maps: Tensor, border: tuple[int, ...], transform: Tensor, padding: int) -> Tensor:
    """A picture (1, C, H, W), with `border` added, as transformed tiles (36, C, tiles)."""
    maps = F.pad(maps, border) if any(border) else maps
    return F.conv2d(maps.transpose(0, 1).contiguous(), transform, stride=4, padding=padding).flatten(2).transpose(0, 1)


@cache
def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """What transforms tiles of pixels, (36, 1, 6, 6), of gradients, (36, 1, 4, 4), and products to a kernel, (9, 36).

    A polynomial of degree 5 is known by its values at 0, 1, -1, 2, -2 and infinity; the matrices of the transposed
    product follow from those of the values.
    """
    points = torch.tensor([0.0, 1, -1, 2, -2], dtype=torch.float64)

    def values(degree: int) -> Tensor:
        finite = points[:, None] ** torch.arange(degree + 1)
        return torch.cat([finite, F.one_hot(torch.tensor([degree])).double()])

    pixels, gradients, sums = values(5).inverse().T, values(3), values(2).T
    twice = [torch.kron(matrix, matrix).float() for matrix in (pixels, gradients, sums)]
    return twice[0].view(36, 1, 6, 6), twice[1].view(36, 1, 4, 4), twice[2]
