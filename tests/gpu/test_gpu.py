"""Every kind of model on a real GPU: what the CPU says, and compiled. `IMGTOK_GPU=cpu` tries the tests out without one.

python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Iterator

import kinds
import pytest
import torch
from kinds import ENCODING, LINES, TRAINED, Line
from torch import Tensor

from imgtok.generators import speculative, speculative_gpt
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.replay import Replayed
from imgtok.generators.sampling import TokenSampling
from imgtok.train.loop import compile_forward

pytestmark = pytest.mark.gpu

DEVICE = torch.device(os.environ.get("IMGTOK_GPU", "cuda"))
BACKEND = "inductor" if DEVICE.type == "cuda" else "aot_eager"
CLOSE = {"atol": 2e-3, "rtol": 2e-3}
"""For float32 without TF32: sums in another order, through a few blocks and solver steps."""

LONG = GPTConfig(**kinds.GPT | {"num_tokens": 36})
"""Of more than a few rounds."""


@pytest.fixture(params=LINES.values(), ids=LINES)
def line(request) -> Line:
    return request.param


@pytest.fixture(autouse=True)
def exact_and_fresh() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.compiler.reset()
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def gradients(model) -> dict[str, Tensor]:
    return {name: tensor.grad.cpu() for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize("line", TRAINED.values(), ids=TRAINED)
def test_training_is_that_of_the_cpu(line):
    results = []
    for device in (torch.device("cpu"), DEVICE):
        model = kinds.build(line).to(device)
        loss = kinds.train(model, kinds.inputs(model, 4, device))
        loss.backward()
        results.append((loss.detach().cpu(), gradients(model)))
    (loss, slopes), (other, others) = results
    torch.testing.assert_close(other, loss, **CLOSE)
    assert slopes.keys() == others.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(others[name], slope, atol=2e-3 * float(slope.abs().max()) + 1e-6, rtol=1e-2)


@pytest.mark.parametrize("line", TRAINED.values(), ids=TRAINED)
def test_bfloat16_trains(line):
    model = kinds.build(line).to(DEVICE).train()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = kinds.train(model, kinds.inputs(model, 4, DEVICE))
    loss.backward()
    assert all(bool(slope.isfinite().all()) for slope in gradients(model).values())


def agree(found: Tensor, expected: Tensor) -> None:
    """Numbers nearly; of ids, which a last bit may tip over a boundary, nearly all."""
    if expected.dtype.is_floating_point:
        torch.testing.assert_close(found.cpu(), expected, **CLOSE)
    else:
        assert float((found.cpu() == expected).double().mean()) > 0.9


def test_decoding_is_that_of_the_cpu(line):
    expected = kinds.decode(kinds.build(line), range(4), **line.long)
    agree(kinds.decode(kinds.build(line).to(DEVICE), range(4), DEVICE, **line.long), expected)


@pytest.mark.parametrize("line", ENCODING.values(), ids=ENCODING)
def test_encoding_is_that_of_the_cpu(line):
    expected = kinds.encode(kinds.build(line), range(4))
    agree(kinds.encode(kinds.build(line).to(DEVICE), range(4), DEVICE), expected)


@pytest.mark.parametrize("line", TRAINED.values(), ids=TRAINED)
def test_compiled_training_is_that_of_plain_training(line):
    plain, compiled = (kinds.build(line).to(DEVICE) for _ in range(2))
    arguments = kinds.inputs(plain, 4, DEVICE)
    compile_forward(compiled, backend=BACKEND)
    losses = [kinds.train(model, arguments) for model in (plain, compiled)]
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    losses[1].backward()
    assert all(bool(slope.isfinite().all()) for slope in gradients(compiled).values())


@torch.no_grad()
def test_the_decoder_s_step_compiles(line):
    model = kinds.build(line).to(DEVICE)
    step, arguments = line.step(model, DEVICE)
    compiled = torch.compile(step, fullgraph=True, backend=BACKEND)(*arguments)
    step, arguments = line.step(model, DEVICE)
    torch.testing.assert_close(compiled, step(*arguments), **CLOSE)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("way", [{}, {"decoding": "jacobi"}, {"decoding": "coupled", "window": 4}], ids=str)
def test_a_graph_draws_what_single_kernels_draw(way, temperature, monkeypatch, caplog):
    """And what `decoding.cached` draws, where that draws the same tokens."""
    graphs = []

    class Noted(Replayed):
        def __init__(self, body, device):
            super().__init__(body, device)
            graphs.append(self)

    if "check_input_liveness" in inspect.signature(torch.cuda.graph).parameters:
        monkeypatch.setattr(torch.cuda, "graph", functools.partial(torch.cuda.graph, check_input_liveness=True))
    monkeypatch.setattr(speculative, "Replayed", Noted)
    model = sharpened(kinds.build(dataclasses.replace(LINES["gpt"], config=LONG)))
    model.to(DEVICE)

    def drawn(**settings):
        sampling = TokenSampling(guidance=2.0, temperature=temperature, **settings)
        return kinds.decode(model, range(4), DEVICE, sampling=sampling).cpu()

    found = []
    for fewest in (1, LONG.num_tokens):
        monkeypatch.setattr(speculative, "FEWEST_REPLAYS", fewest)
        found.append(drawn(**way))
    assert torch.equal(*found)
    assert "no CUDA graph could be made" not in caplog.text
    if DEVICE.type == "cuda":
        assert [one.graph is not None for one in graphs] == [True]
    model.replays = False
    if not way or temperature == 0:
        monkeypatch.setattr(speculative_gpt, "exact", None)  # never asked for
        agree(found[0], drawn())


def sharpened(model: GPT) -> GPT:
    """Its head begins at zero, and so do its laws, flat."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(kinds.random(*parameter.shape, seed=number), alpha=0.3)
    return model
