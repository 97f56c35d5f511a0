"""What every kind of model keeps, whatever its method: the promises that the programs build on.

Each test runs for each line of `tests/kinds.py`; a kind in the hub's tables without a line fails the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from kinds import ENCODING, FIRST_OF_KIND, LINES, TRAINED, Line
from safetensors.torch import load_file
from torch import Tensor, nn

import imgtok
from imgtok import hub
from imgtok.tokenizers.base import Losses
from imgtok.train.config import TrainingConfig
from imgtok.train.loop import Job, compile_forward, fit
from imgtok.train.optim import ParameterGroup, whole_model
from imgtok.train.validation import HeldOut

TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}
"""For floats that are computed in another order."""


def test_every_kind_has_a_line():
    without = set(hub.KINDS) - {line.config.kind for line in LINES.values()}
    assert not without, (
        f"no line in tests/kinds.py for {', '.join(sorted(without))}: add one, and the contract is tested"
    )


@pytest.fixture(params=LINES.values(), ids=LINES)
def line(request) -> Line:
    return request.param


# ------------------------------------------------------------------------------------------------ weights


def test_a_folder_gives_the_same_model_back(line, tmp_path):
    model = kinds.build(line)
    model.save_pretrained(tmp_path)
    loaded = imgtok.load(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert not loaded.training
    for name in ("parameters", "buffers"):  # buffers that are not saved, too
        mine, its = (dict(getattr(each, f"named_{name}")()) for each in (model, loaded))
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[key], its[key]) for key in mine)
    assert torch.equal(kinds.decode(loaded, range(2), **line.short), kinds.decode(model, range(2), **line.short))


def test_it_is_built_on_meta_without_memory(line):
    with torch.device("meta"):
        shapes = kinds.class_of(line.config.kind)(line.config).state_dict()
    assert all(tensor.is_meta for tensor in shapes.values())
    assert {name: tensor.shape for name, tensor in shapes.items()} == {
        name: tensor.shape for name, tensor in kinds.build(line).state_dict().items()
    }


def test_it_computes_in_the_kind_of_number_that_it_is_brought_to(line):
    model = kinds.build(line).to(torch.bfloat16)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)
    if line.config.kind not in hub.GENERATORS:
        encoded = kinds.encode(model, range(2))  # of images in float32
        assert encoded.dtype in (torch.int64, torch.bfloat16)
    decoded = kinds.decode(model, range(2), **line.short)
    assert not decoded.dtype.is_floating_point or bool(decoded.isfinite().all())


# ------------------------------------------------------------------------------------------------ images

WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "uint8": (lambda x: ((x + 1) * 127.5).to(torch.uint8), r"not torch.uint8; .* images / 127.5 - 1"),
    "0..255": (lambda x: (x + 1) * 127.5, r"as in 0..255: give images / 127.5 - 1"),
    "[0, 1]": (lambda x: (x + 1) / 2, r"as in \[0, 1\]: give images \* 2 - 1, or use imgtok.preprocess\(pictures, "),
    "standardised": (lambda x: x * 2.3, r"these lie in \[-2.3, 2.3\]"),
    "infinite": (lambda x: torch.where(x > 0.9, torch.inf, x), r"image 0 has pixels that are not finite"),
    "one image": (lambda x: x[0], r"not \(3, 16, 16\); one image is a batch of one, images\[None\]"),
    "grey": (lambda x: x[:, :1], r"grey images are images.expand\(-1, 3, -1, -1\)"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), r"channels come first, images.permute\(0, 3, 1, 2\)"),
    "transparent": (lambda x: x[:, [0, 1, 2, 0]], r"there is no transparency, images\[:, :3\]"),
    "none": (lambda x: x[:0], r"at least one|0 numbers|nothing|empty"),
    "arrays": (lambda x: x.numpy(), r"not a ndarray.*imgtok.preprocess\(pictures, .*Pillow images, uint8 arrays and"),
    "pictures": (lambda x: imgtok.to_pil(x), r"not a list of Image; imgtok.preprocess"),
    "a picture": (lambda x: imgtok.to_pil(x)[0], r"not a Image; imgtok.preprocess"),
}


@pytest.mark.parametrize("line", ENCODING.values(), ids=ENCODING)
def test_images_that_are_none_of_its_kind_are_refused(line):
    model = kinds.build(line)
    images = kinds.images(model, 2)
    images[0, 0, 0, :3] = torch.tensor([-1.0, -1.0, 1.0])
    for spoil, message in WRONG.values():
        given = spoil(images)
        with pytest.raises(ValueError, match=message):
            model.encode(given)
    with pytest.warns(UserWarning, match=r"these lie in \[0.2, 1\]: if they are meant in \[0, 1\], give images \* 2"):
        model.encode(images * 0.4 + 0.6)
    bright = images * 0.4 + 0.6
    bright[0, 0, 0, 3] = 0.001
    with pytest.warns(UserWarning, match=r"these lie in \[0.001, 1\]"):
        model.encode(bright)  # as a decoder may paint it
    bright[0, 0, 0, :4] = torch.tensor([0.001, 0.001, 1.2, 1.2])
    with pytest.warns(UserWarning, match=r"these lie in \[0.001, 1.2\]"):
        model.encode(bright)
    model.encode(torch.zeros_like(images))  # one grey
    model.encode((images * 1.3).half())  # resizing overshoots


# ------------------------------------------------------------------------------------------------ batches


def same(some: Tensor, of_all: Tensor) -> None:
    """Ids are equal, numbers nearly so."""
    if some.dtype.is_floating_point:
        torch.testing.assert_close(some, of_all, **TOLERANCE)
    else:
        assert torch.equal(some, of_all)


def test_decoding_does_not_depend_on_the_batch(line):
    model = kinds.build(line)
    together = kinds.decode(model, range(4), **line.long)
    assert len(together) == 4
    assert together.dtype == torch.long or bool(together.isfinite().all())
    same(kinds.decode(model, [1], **line.long), together[[1]])
    same(kinds.decode(model, [3, 0], **line.long), together[[3, 0]])


@pytest.mark.parametrize("line", ENCODING.values(), ids=ENCODING)
def test_encoding_does_not_depend_on_the_batch(line):
    model = kinds.build(line)
    together = kinds.encode(model, range(4))
    same(kinds.encode(model, [1]), together[[1]])
    same(kinds.encode(model, [3, 0]), together[[3, 0]])


# ------------------------------------------------------------------------------------------------ training


def untouched(model: nn.Module) -> list[str]:
    """Trainable parameters without a gradient, or with one that is zero everywhere."""
    trainable = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    return [name for name, tensor in trainable.items() if tensor.grad is None or not tensor.grad.any()]


def check_gradients(model: Any, allowed: dict[str, str]) -> None:
    model.train()
    for seed in range(4):  # so that whatever is dropped at random is dropped once
        kinds.train(model, kinds.inputs(model, 16), seed=seed).backward()
    missing = set(untouched(model))
    assert missing <= set(allowed), f"the loss does not reach {', '.join(sorted(missing - set(allowed)))}"
    assert missing == set(allowed), f"take off the line, it is reached: {sorted(set(allowed) - missing)}"


@pytest.mark.parametrize("line", TRAINED.values(), ids=TRAINED)
def test_every_trainable_parameter_gets_a_gradient(line):
    check_gradients(kinds.build(line), line.without_gradient)


def test_a_parameter_that_the_loss_forgets_is_named():
    model = kinds.build(LINES["gpt"])
    model.forgotten = nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="the loss does not reach forgotten"):
        check_gradients(model, {})


def test_the_same_draws_give_the_same_loss(line):
    model = kinds.build(line)
    arguments = kinds.inputs(model, 4)
    first, again, other = (kinds.train(model, arguments, seed=seed) for seed in (4, 4, 6))
    assert torch.equal(first, again)
    assert torch.equal(first, other) != line.draws


@pytest.mark.parametrize("line", TRAINED.values(), ids=TRAINED)
def test_bfloat16_autocast_gives_a_finite_loss_and_gradients(line):
    model = kinds.build(line).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = kinds.train(model, kinds.inputs(model, 4))
    loss.backward()
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite())
    assert all(bool(tensor.grad.isfinite().all()) for tensor in model.parameters() if tensor.grad is not None)


@dataclass(frozen=True)
class Batch:
    arguments: tuple[Any, ...]

    def to(self, device: torch.device) -> Batch:
        return Batch(tuple(argument.to(device) for argument in self.arguments))


class LineJob(Job):
    """A line's model on one batch again and again; `stop_after` steps it dies."""

    def __init__(self, line: Line, stop_after: int | None = None) -> None:
        self.model: nn.Module = kinds.build(line)
        self.stop_after = stop_after

    def batches(self, *, start_step: int, rank: int, world: int) -> Iterator[Batch]:
        step = start_step
        while step != self.stop_after:
            yield Batch(kinds.inputs(self.model, 2))
            step += 1
        raise KeyboardInterrupt

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Losses:
        loss = kinds.train(model, batch.arguments, seed=generator.initial_seed() % 2**32)
        return Losses(loss, {"loss": loss})

    def groups(self) -> Sequence[ParameterGroup]:
        return whole_model(self.model)

    def held_out(self) -> HeldOut:
        return HeldOut(2, lambda places, seed: Batch(kinds.inputs(self.model, 2)), "inputs")

    def names(self, batch: Batch) -> Sequence[str]:
        return ["image"] * 2

    def preview(self, model: nn.Module, path: Path) -> None:
        pass

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A job's whole configuration."""

    training: TrainingConfig


def fitted(job: LineJob, out: Path, **training: Any) -> dict[str, Tensor]:
    quiet = {"trackers": (), "preview_every": 0, "log_every": 1, "save_every": 1, "warmup": 0, "batch_size": 2}
    config = TrainingConfig(steps=2, learning_rate=1e-3, **quiet | training)
    return load_file(fit(job, config, out, Whole(training=config)) / "model.safetensors")


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, id=name, marks=[] if name in FIRST_OF_KIND else [pytest.mark.slow])
        for name, line in TRAINED.items()
    ],
)
def test_a_run_that_validates_and_is_resumed_ends_with_the_same_weights(line, tmp_path):
    whole = fitted(LineJob(line), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(LineJob(line, stop_after=1), tmp_path / "parts", validate_every=1)
    resumed = fitted(LineJob(line), tmp_path / "parts", validate_every=1)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    before = kinds.build(line).state_dict()
    assert any(not torch.equal(whole[name], before[name]) for name in whole)


# ------------------------------------------------------------------------------------------------ compilation


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


COMPILED = [
    *(pytest.param(LINES[name], "eager", id=name) for name in ("dcae", "gpt")),
    *(pytest.param(line, "aot_eager", id=f"{name}-aot", marks=pytest.mark.slow) for name, line in LINES.items()),
]
"""A generator and an autoencoder are captured whole. All lines, traced through autograd as well, take minutes more, and
are left to the slow tests."""


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("line", "backend"), [given for given in COMPILED if given.values[0] in TRAINED.values()])
def test_training_compiles_without_a_break(line, backend):
    plain, compiled = kinds.build(line), kinds.build(line)  # in evaluation mode: dropout draws otherwise when compiled
    arguments = kinds.inputs(plain, 2)
    compile_forward(compiled, backend=backend)
    losses = [kinds.train(model, arguments) for model in (plain, compiled)]
    counted = torch._dynamo.utils.counters
    assert not counted["graph_break"]
    assert counted["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(losses[1], losses[0], **TOLERANCE)
    for loss in losses:
        loss.backward()
    assert untouched(compiled) == untouched(plain)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("line", "backend"), COMPILED)
def test_the_decoder_s_step_compiles_without_a_break(line, backend):
    model = kinds.build(line)
    with torch.no_grad():
        step, arguments = line.step(model, torch.device("cpu"))
        compiled = torch.compile(step, fullgraph=True, backend=backend)(*arguments)
        step, arguments = line.step(model, torch.device("cpu"))
        torch.testing.assert_close(compiled, step(*arguments), **TOLERANCE)
