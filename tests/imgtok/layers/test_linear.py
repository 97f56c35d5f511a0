"""Packed weights: the same numbers to rounding, only where they suit, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.sampling import TokenSampling
from imgtok.layers import linear
from imgtok.layers.linear import packed_linears

pytestmark = pytest.mark.skipif(
    not linear._has_packed_kernels(), reason="this build of torch lacks oneDNN, without which nothing is packed"
)


@pytest.fixture(autouse=True)
def small_models_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMALLEST_MODEL", 1)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 40), nn.SiLU(), nn.Linear(40, 24, bias=False))


@pytest.mark.parametrize("shape", [(48,), (2, 48), (3, 5, 48), (64, 48), (0, 48)])
@torch.no_grad()
def test_the_numbers_of_plain_layers(shape: tuple[int, ...]) -> None:
    model = two_layers()
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    plain = model(x)
    with packed_linears(model) as packed:
        assert packed
        torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(x), plain)
    assert all("forward" not in vars(module) for module in model.modules())


@torch.no_grad()
def test_packed_kernels_are_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = two_layers(), torch.ones(2, 48)
    with packed_linears(model):
        monkeypatch.setattr(F, "linear", None)
        model(x)
        with torch.enable_grad(), pytest.raises(TypeError):
            model(x)


def test_gradients_inside_are_those_of_the_weights() -> None:
    model, x = two_layers(), torch.ones(2, 48)
    with torch.no_grad(), packed_linears(model) as packed:
        assert packed
        with torch.enable_grad():
            model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_what_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    for unsuited in (
        two_layers().bfloat16(),
        two_layers().to("meta"),
        nn.Sequential(two_layers(), nn.Linear(2, 2).half()),
    ):
        with packed_linears(unsuited) as packed:
            assert not packed
    compiled = two_layers()
    compiled[0].compile(backend="eager")
    with packed_linears(compiled) as packed:
        assert not packed
    with torch.autocast("cpu", torch.bfloat16), packed_linears(two_layers()) as packed:
        assert not packed
    monkeypatch.setattr(linear.psutil, "virtual_memory", lambda: type("Memory", (), {"total": 1000}))
    with packed_linears(two_layers()) as packed:
        assert not packed
    monkeypatch.setattr(linear, "SMALLEST_MODEL", 2**20)
    with packed_linears(two_layers()) as packed:
        assert not packed


@torch.no_grad()
def test_drawings_of_one_model_that_overlap_compute_alike_to_their_ends() -> None:
    model, x = two_layers(), torch.randn(2, 48, generator=torch.Generator().manual_seed(1))
    plain = model(x)
    first, second = packed_linears(model), packed_linears(model)
    first.__enter__()
    alone, kernel = model(x), vars(model[0])["forward"]
    second.__enter__()
    first.__exit__(None, None, None)
    assert vars(model[0])["forward"] is kernel
    assert torch.equal(model(x), alone)
    second.__exit__(None, None, None)
    assert torch.equal(model(x), plain)
    assert all("forward" not in vars(module) for module in model.modules())


@torch.no_grad()
def test_an_error_while_packing_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = two_layers(), []
    pack = linear._Packed.__init__

    def fails_at_the_second(self: linear._Packed, layer: nn.Linear) -> None:
        made.append(layer)
        if len(made) == 2:
            raise MemoryError
        pack(self, layer)

    monkeypatch.setattr(linear._Packed, "__init__", fails_at_the_second)
    with pytest.raises(MemoryError), packed_linears(model):
        raise AssertionError("nothing was refused")
    assert all("forward" not in vars(module) for module in model.modules())


def test_an_error_inside_leaves_nothing() -> None:
    model = two_layers()
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad(), packed_linears(model):
        raise RuntimeError("stop")
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("decoding", ["exact", "jacobi"])
def test_a_gpt_draws_the_same_tokens_packed(decoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=16, num_tokens=9, width=32, depth=2, num_heads=2, mlp_multiple=32)).eval()
    nn.init.normal_(model.head.weight, std=0.5)  # type: ignore[arg-type, union-attr]
    sampling = TokenSampling(guidance=1.5, decoding=decoding, window=3)
    calls = []
    kernel = linear._Packed.__call__
    monkeypatch.setattr(linear._Packed, "__call__", lambda self, x: calls.append(1) or kernel(self, x))
    packed = model.generate(torch.tensor([1, 2]), seed=0, indices=[0, 1], sampling=sampling)
    assert calls
    monkeypatch.setattr(linear, "SMALLEST_MODEL", 2**40)
    plain = copy.deepcopy(model).generate(torch.tensor([1, 2]), seed=0, indices=[0, 1], sampling=sampling)
    assert torch.equal(packed.ids, plain.ids)
