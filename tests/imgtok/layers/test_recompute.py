"""Norms and activations that are computed again in the backward pass: the same numbers, less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from imgtok.layers.recompute import keep_source
from imgtok.tokenizers.karl_config import TransformerConfig
from imgtok.tokenizers.karl_networks import Block


def block() -> Block:
    torch.manual_seed(0)
    return Block(TransformerConfig(width=32, depth=1, num_heads=2))


@pytest.mark.parametrize("needed", [None, slice(2, 7)])
def test_numbers_and_gradients_are_the_same(needed):
    outs = []
    for keep_less in (False, True):
        part, x = block(), torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = part(x, None, needed, keep_less)
        outs.append([out, *torch.autograd.grad(out.square().sum(), [x, *part.parameters()])])
    assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))


@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_read_is_not_kept(wanted):
    linear, x = nn.Linear(16, 4), torch.randn(8, 16, requires_grad=True)
    storages = []

    def read(made: Tensor) -> Tensor:
        storages.append(StorageWeakRef(made.untyped_storage()))
        return linear(made)

    out = keep_source(F.gelu, x, read, wanted=wanted)
    assert storages[0].expired() == wanted
    assert torch.equal(out, linear(F.gelu(x)))


def test_gradients_of_gradients():
    linear, x = nn.Linear(16, 4).double(), torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    norm = nn.LayerNorm(16).double()
    seconds = []
    for wanted in (False, True):
        out = keep_source(norm, x, linear, wanted=wanted)
        penalty = torch.autograd.grad(out.square().sum(), x, create_graph=True)[0].square().sum()
        seconds.append(torch.autograd.grad(penalty, [x, linear.weight, norm.weight]))
    torch.testing.assert_close(seconds[1], seconds[0])
