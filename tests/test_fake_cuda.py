"""Every kind of model on a GPU that is not there: see `tests/fake_cuda.py`, and `tests/kinds.py` for the models."""

from __future__ import annotations

import fake_cuda
import kinds
import pytest
import torch
from fake_cuda import CUDA
from kinds import ENCODING, FIRST_OF_KIND, LINES, Line

from imgtok.generators import decoding
from imgtok.generators.gpt import GPT


@pytest.fixture(
    params=[
        pytest.param(line, id=name, marks=[] if name in FIRST_OF_KIND else [pytest.mark.slow])
        for name, line in LINES.items()
    ]
)
def line(request) -> Line:
    return request.param


def test_the_training_forward_stays_on_the_device(line):
    """And never waits for it: no number of the loss is read."""

    def work(model):
        assert kinds.train(model.train(), kinds.inputs(model, 4, CUDA)).device == CUDA

    assert not fake_cuda.run(lambda: kinds.build(line), work).reads


@pytest.mark.parametrize("line", ENCODING.values(), ids=ENCODING)
def test_encoding_stays_on_the_device(line):
    def work(model):
        assert kinds.encode(model, range(4), CUDA).device == CUDA

    fake_cuda.run(lambda: kinds.build(line), work)


def test_no_step_or_token_of_decoding_waits_for_the_device(line):
    def decode(**settings):
        def work(model):
            assert kinds.decode(model, range(4), CUDA, **settings).device == CUDA

        return work

    looped = fake_cuda.looped(lambda: kinds.build(line), decode(**line.short), decode(**line.long))
    looks = [place for place in looped if "generators/decoding.py" in place and "in has_ended: " in place]
    assert [looped.pop(place) for place in looks] == ([(0, line.looks)] if line.looks else []), "see `Line.looks`"
    assert not looped, show(looped)


def show(looped: dict[str, tuple[int, int]]) -> str:
    return "in a loop: " + "; ".join(f"{place} ({few} times, then {many})" for place, (few, many) in looped.items())


# ------------------------------------------------------------------------------------------------ seeded faults


def test_a_read_in_a_loop_is_found(monkeypatch):
    draw = decoding.draw

    def reading(law, uniforms):
        ids = draw(law, uniforms)
        assert int(ids.max().item()) >= 0
        return ids

    monkeypatch.setattr(decoding, "draw", reading)
    short, long = ({"num_tokens": count} for count in (3, 8))
    looped = fake_cuda.looped(
        lambda: kinds.build(LINES["gpt-ends"]),
        lambda model: kinds.decode(model, range(4), CUDA, **short),
        lambda model: kinds.decode(model, range(4), CUDA, **long),
    )
    ((place, counts),) = looped.items()
    assert place.startswith("read at generators/decoding.py")
    assert counts == (3, 8)


def test_a_copy_in_a_loop_is_found():
    """`to(device)`, a new tensor from a list, and an index that lies on the host."""

    def work(count):
        def copies(model):
            for _ in range(count):
                torch.zeros(2).to(CUDA)
                torch.tensor([1.0, 2.0], device=CUDA)
                model.head.weight[torch.tensor([0, 1])]

        return copies

    looped = fake_cuda.looped(lambda: kinds.build(LINES["gpt"]), work(2), work(5))
    assert sorted(looped.values()) == [(2, 5)] * 3
    assert all(place.startswith("copy at ") for place in looped)


def test_a_tensor_of_the_host_in_a_forward_is_an_error(monkeypatch):
    hidden = GPT.hidden
    monkeypatch.setattr(GPT, "hidden", lambda self, *a, **k: hidden(self, *a, **k) + torch.zeros(self.config.width))
    with pytest.raises(RuntimeError, match=r"same device, but found at least two devices, cuda:0 and cpu") as caught:
        fake_cuda.run(lambda: kinds.build(LINES["gpt"]), lambda model: kinds.train(model, kinds.inputs(model, 4, CUDA)))
    assert any(note.startswith("raised at generators/gpt.py") for note in caught.value.__notes__)


def test_what_lies_on_the_host_is_computed():
    """Counts, lengths and seeds steer a model as they do on a GPU."""

    def work(model):
        assert torch.arange(3).max().item() == 2
        assert not isinstance(torch.arange(3) + 1, torch._subclasses.fake_tensor.FakeTensor)

    assert not fake_cuda.run(lambda: kinds.build(LINES["gpt"]), work).reads
