"""Convolutions of 3x3 on a CPU by Winograd's transform (arXiv 1509.09308), which needs a fifth of the multiplications.

torch computes them one product at a time on x86, and an autoencoder of pictures does little else. NNPACK, which torch
carries with it, transforms tiles of 6 x 6 outputs. Its error is several times that of direct sums of float32 (relative
root mean square 4.5e-6 in place of 0.6e-6 for one layer), still a hundredth of what TF32 does on a GPU; through a whole
autoencoder the two end equally far from float64, to a factor of three. It takes one picture at a time, so that one
picture's numbers never depend on others, and pays from about 64 channels and 16 rows on. Measured in
benchmarks/README.md.

Only inference in float32 is computed so. Training, autocast, compiled models and other devices are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_CHANNELS, SMALLEST_SIDE = 64, 16


def speed_up(network: nn.Module) -> bool:
    """Lets every convolution of `network` that it pays for be computed so in inference, and its SiLUs in place.

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


def transforms(x: Tensor) -> bool:
    """Whether what is computed of `x` here and now may be computed so."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and type(x) is Tensor  # no stand-in that follows shapes alone
        and torch.backends.nnpack.is_available()  # which also starts it
    )


class WinogradConv2d(nn.Conv2d):
    """A convolution of 3x3 that is transformed for one picture at a time, where `transforms` allows it."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 1 and min(x.shape[-2:]) >= SMALLEST_SIDE and transforms(x):
            return torch._nnpack_spatial_convolution(x, self.weight, self.bias, [1, 1], [1, 1])  # padding, stride
        return super().forward(x)


class SiLU(nn.SiLU):
    """In place where no gradient needs its input."""

    def forward(self, x: Tensor) -> Tensor:
        return silu(x)


def silu(x: Tensor) -> Tensor:
    """In place where nobody needs `x`, the output of a normalisation, as it was."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _pays(conv: nn.Conv2d) -> bool:
    plain = conv.kernel_size == (3, 3) and conv.stride == conv.dilation == conv.padding == (1, 1) and conv.groups == 1
    return plain and conv.padding_mode == "zeros" and min(conv.in_channels, conv.out_channels) >= FEWEST_CHANNELS
