from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy_job import DEFAULTS, ToyBatch, ToyConfig, ToyJob, ToyModel, final, same, toy_config, train

from imgtok import config as configuration
from imgtok.groups import each
from imgtok.tokenizers.base import CodedLosses, Losses
from imgtok.train import loop
from imgtok.train.config import TrainingConfig
from imgtok.train.ema import EMA
from imgtok.train.log import Log, Window, check_trackers
from imgtok.train.loop import Job, NonFiniteLoss, ParameterGroup, Trainer, fit
from imgtok.train.optim import check_groups, parameter_groups
from imgtok.train.start import make_accelerator
from imgtok.train.state import complete_steps

if TYPE_CHECKING:
    from accelerate import Accelerator


def log_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------- the run folder


def test_run_folder(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        job = train(tmp_path)
    assert job.previews == ["step_0000000.png", "step_0000003.png", "step_0000006.png"]
    assert complete_steps(tmp_path / "checkpoints") == [6, 4]
    for folder in (tmp_path, tmp_path / "final", tmp_path / "checkpoints/step_0000006"):
        assert configuration.load(type(job.config), folder / "config.yaml") == job.config
    assert "effective batch 4 = 4 per process x 1 accumulated x 1 process(es)" in caplog.text
    assert "parameters of model: 43 trainable, 32 frozen" in caplog.text
    lines = re.findall(r"step (\d)/6  loss [\d.]+  lr [\d.]+  norm [\d.]+  img/s \d+  (\S+) left", caplog.text)
    assert [step for step, _ in lines] == ["0", "2", "4", "6"]
    assert lines[-1][1] == "0:00:00"
    assert job.model.training


def test_the_time_that_is_left_is_that_of_the_last_steps():
    config = toy_config(steps=7204).training
    log = Log.__new__(Log)
    log.config, log.images_per_step, log.speed = config, 4, 2.0
    assert [log.time_left(done) for done in (0, 7200, 7204)] == ["4:00:08", "0:00:08", "0:00:00"]
    log.speed = 0.0  # of the first step
    assert log.time_left(0) == "0:00:00"


def test_log_lines(tmp_path):
    train(tmp_path)
    train(tmp_path.with_name("each"), log_every=1)
    lines, each = log_of(tmp_path), log_of(tmp_path.with_name("each"))
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    keys = {"step", "loss", "loss/absolute", "grad_norm", "lr"}
    keys |= {"images_per_second", "seconds", "peak_rss_mib"}
    assert all(set(line) == keys for line in lines)
    assert lines[0]["loss"] == each[0]["loss"] == each[1]["loss"]
    for line, first, second in zip(lines[1:], each[1::2], each[2::2], strict=True):
        assert line["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
        assert line["grad_norm"] == second["grad_norm"]
        assert line["images_per_second"] > 0
    assert lines[1]["lr"] == pytest.approx(0.01 * 2 / 3)


def test_the_use_of_the_codebook_is_that_of_all_batches_since_the_last_line(tmp_path):
    class Coded(ToyJob):
        def loss(self, model, batch, generator):
            ids = torch.tensor([[1, 1], [2, 3]]) if len(self.seen) % 2 else torch.tensor([[0, 0], [0, 0]])
            return CodedLosses(*super().loss(model, batch, generator), ids, 8)

    job = Coded(ToyConfig(training=TrainingConfig(**DEFAULTS)))
    fit(job, job.config.training, tmp_path, job.config)
    lines = log_of(tmp_path)
    assert [line["codebook_use"] for line in lines] == [1 / 8, 4 / 8, 4 / 8, 4 / 8]
    assert lines[0]["codebook_perplexity"] == 1
    entropy = -(0.5 * math.log(0.5) + 0.25 * math.log(0.25) + 2 * 0.125 * math.log(0.125))
    assert lines[3]["codebook_perplexity"] == pytest.approx(math.exp(entropy), abs=1e-3)


def counted(window: Window, ids: torch.Tensor, size: int) -> list[int] | None:
    window.add(CodedLosses(torch.zeros(()), {}, ids, size), 0)
    return None if window.codes is None else window.codes.tolist()


def test_codes_of_nothing_finite_and_of_huge_codebooks_do_no_harm():
    broken = torch.full((2, 3), float("nan")).long()
    counts = counted(Window(torch.device("cpu")), broken, 4)
    assert counts is not None
    assert sum(counts) == 0  # and the loop goes on to find the loss that is not finite
    assert counted(Window(torch.device("cpu")), broken, 1 << 25) is None


def test_a_part_that_some_steps_do_not_have_is_the_mean_of_the_others():
    accelerator = make_accelerator(TrainingConfig(steps=1, batch_size=1, learning_rate=1.0, trackers=()), Path())
    window = Window(torch.device("cpu"))
    for step, parts in enumerate([{"a": 1.0}, {"b": 5.0, "a": 3.0}, {"a": 2.0}]):
        losses = Losses(torch.tensor(float(step)), {name: torch.tensor(value) for name, value in parts.items()})
        window.add(losses, step)
    assert window.means(accelerator) == {"loss": 1.0, "loss/a": 2.0, "loss/b": 5.0, "grad_norm": 0.0}
    window.reset()
    window.add(Losses(torch.tensor(7.0), {"a": torch.tensor(4.0)}), 3)
    assert window.means(accelerator) == {"loss": 7.0, "loss/a": 4.0, "grad_norm": 0.0}


def test_codes_are_counted_in_one_place():
    """A tensor as long as the codebook for each micro-batch would cost more than all the rest of the log."""
    window = Window(torch.device("cpu"))
    assert counted(window, torch.tensor([[0, 1], [1, 1]]), 3) == [1, 3, 0]
    assert window.codes is not None
    place = window.codes.data_ptr()
    assert counted(window, torch.tensor([2, -1, -1]), 3) == [1, 3, 1]  # tokens that were not kept
    window.reset()
    assert counted(window, torch.tensor([2, 2]), 3) == [0, 0, 2]
    assert window.codes.data_ptr() == place


def test_tensorboard_gets_the_same_numbers(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, trackers=("tensorboard",))
    read = events.EventAccumulator(str(tmp_path / "tensorboard/imgtok"))
    read.Reload()
    expected = [(line["step"], pytest.approx(line["loss"])) for line in log_of(tmp_path)]
    assert [(event.step, event.value) for event in read.Scalars("loss")] == expected
    assert [event.step for event in read.Images("preview")] == [0, 3, 6]


def test_previews_go_to_every_tracker(tmp_path, monkeypatch):
    """Accelerate hands pictures to tensorboard and wandb, and only numbers to trackio."""
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "preview.png")
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda pixels: ("image", pixels.shape)))
    seen: list[Any] = []
    trackio = SimpleNamespace(name="trackio", tracker=SimpleNamespace(log=lambda *a, **more: seen.append((*a, more))))
    wandb = SimpleNamespace(name="wandb", log_images=lambda *a, **more: seen.append((a[0]["preview"].shape, more)))
    log = Log.__new__(Log)
    log.accelerator = cast("Accelerator", SimpleNamespace(trackers=[trackio, wandb]))
    log.picture(tmp_path / "preview.png", 7)
    assert seen == [({"preview": ("image", (4, 4, 3))}, {"step": 7}), ((1, 4, 4, 3), {"step": 7})]


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(ValueError, match=r"wandb, which is not installed.*\(training.trackers=tensorboard\)"):
        check_trackers(toy_config(trackers=("tensorboard", "wandb")).training)


def test_no_previews_in_between(tmp_path):
    assert train(tmp_path, preview_every=0).previews == ["step_0000000.png", "step_0000006.png"]


# ------------------------------------------------------------------------------------------------ arithmetic


@dataclasses.dataclass
class Slices(Job):
    """A linear model on slices of fixed data: what a step does to it can be computed by hand."""

    size: int
    model: nn.Module = dataclasses.field(default_factory=lambda: nn.Linear(3, 1, bias=False))

    def __post_init__(self):
        self.data = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
        nn.init.constant_(self.model.weight, 0.5)

    def batches(self, *, start_step, rank, world):
        for start in range(0, 24, self.size):
            x = self.data[start : start + self.size]
            yield ToyBatch(x, torch.zeros(len(x)), ("?",) * len(x))

    def loss(self, model, batch, generator):
        total = model(batch.x).square().mean()
        return Losses(total, {})

    def names(self, batch):
        return batch.names

    def preview(self, model, path):
        pass

    def save(self, model, folder):
        self.saved = model.weight.detach().clone()


def run_slices(out: Path, size: int, **changes) -> Slices:
    config, job = toy_config(batch_size=size, steps=2, warmup=0, log_every=1, **changes), Slices(size)
    fit(job, config.training, out, config)
    return job


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    whole = run_slices(tmp_path / "whole", 12)
    parts = run_slices(tmp_path / "parts", 4, accumulate=3)
    torch.testing.assert_close(whole.model.weight, parts.model.weight)
    a, b = log_of(tmp_path / "whole"), log_of(tmp_path / "parts")
    for first, second in zip(a, b, strict=True):
        assert first["loss"] == pytest.approx(second["loss"])
        assert first["grad_norm"] == pytest.approx(second["grad_norm"])


def test_the_logged_norm_is_the_gradient_before_clipping(tmp_path):
    job = Slices(12)
    weight = job.model.weight.detach().clone().requires_grad_()
    (job.data[:12] @ weight.T).square().mean().backward()
    for clip in (0.0, 0.01):
        run_slices(tmp_path / str(clip), 12, clip=clip)
        assert log_of(tmp_path / str(clip))[0]["grad_norm"] == pytest.approx(weight.grad.norm().item())


def test_clipping_bounds_the_gradient(tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments, **named):
        (parameter,) = self.param_groups[0]["params"]
        norms.append(parameter.grad.norm().item())
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    run_slices(tmp_path, 12, clip=0.01)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_final_holds_the_averaged_weights(tmp_path):
    averaged = run_slices(tmp_path / "averaged", 12, ema=0.9)
    live = run_slices(tmp_path / "live", 12, ema=0.0)
    assert torch.equal(averaged.model.weight, live.model.weight)
    assert torch.equal(live.saved, live.model.weight)
    first = run_one_step_weight()
    start = torch.full((1, 3), 0.5)
    expected = start.lerp(first, 1 - 1 / 10)  # decay warmed up: 1/10, then 2/11
    expected = expected.lerp(live.model.weight.detach(), 1 - 2 / 11)
    torch.testing.assert_close(averaged.saved, expected)


def run_one_step_weight() -> Tensor:
    job = Slices(12)
    optimizer = torch.optim.AdamW(job.model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.05)
    model_loss = job.model(job.data[:12]).square().mean()
    model_loss.backward()
    nn.utils.clip_grad_norm_(job.model.parameters(), 1.0)
    optimizer.step()
    return job.model.weight.detach().clone()


def test_bf16_and_fp32_in_one_process(tmp_path):
    train(tmp_path / "a", precision="bf16")
    train(tmp_path / "b")
    train(tmp_path / "c", precision="bf16")
    assert same(final(tmp_path / "a"), final(tmp_path / "c"))
    assert not same(final(tmp_path / "a"), final(tmp_path / "b"))


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 is possible here")
def test_fp16_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        train(tmp_path, precision="fp16")


def test_compile_compiles_the_model_and_changes_nothing_else(tmp_path, monkeypatch):
    calls = []

    def fake_compile(function, *_, **__):
        def compiled(*arguments, **named):
            calls.append(function)
            return function(*arguments, **named)

        return compiled

    train(tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", fake_compile)
    train(tmp_path / "compiled", compile=True)
    assert len(calls) == 6
    assert same(final(tmp_path / "plain"), final(tmp_path / "compiled"))


def test_dropout_and_noise_draw_different_bits(tmp_path):
    class Draws(ToyJob):
        def loss(self, model, batch, generator):
            pairs.append((torch.rand(4), torch.rand(4, generator=generator)))
            return super().loss(model, batch, generator)

    pairs: list[tuple[Tensor, Tensor]] = []
    for out in (tmp_path / "a", tmp_path / "b"):
        config = toy_config(steps=3, accumulate=2)
        fit(Draws(config), config.training, out, config)
    assert not any(torch.equal(dropout, noise) for dropout, noise in pairs)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(pairs[:6], pairs[6:], strict=True))
    assert len({tuple(dropout.tolist()) for dropout, _ in pairs}) == 6  # every micro-batch its own


def test_threads(tmp_path):
    before = torch.get_num_threads()
    try:
        train(tmp_path, threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------- groups of parameters


class TwoPlayers(nn.Module):
    """Two parts whose gradients are those of their own terms; the second has a norm with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor, *, generator: torch.Generator) -> Losses:
        return Losses((self.one(x) - x).square().mean() + 9 * (self.other(x) - 1).square().mean(), {})


class GroupedJob(ToyJob):
    def __init__(self, config, **of_the_other):
        super().__init__(config)
        torch.manual_seed(1)
        self.model = TwoPlayers()
        self.of_the_other = of_the_other
        self.weights: list[list[Tensor]] = []

    def groups(self):
        one = ParameterGroup(name="one", parameters=list(self.model.one.parameters()))
        other = ParameterGroup(name="other", parameters=list(self.model.other.parameters()), **self.of_the_other)
        return [one, other]

    def loss(self, model, batch, generator):
        self.weights.append([part.weight.detach().clone() for part in (self.model.one, self.model.other[0])])
        return super().loss(model, batch, generator)


def grouped(out: Path, changes=None, **of_the_other) -> GroupedJob:
    config = toy_config(**(changes or {}))
    job = GroupedJob(config, **of_the_other)
    fit(job, config.training, out, config)
    return job


def moved(job: GroupedJob, part: int) -> list[bool]:
    return [not torch.equal(a[part], b[part]) for a, b in zip(job.weights, job.weights[1:], strict=False)]


def test_a_group_has_a_rhythm_of_its_own(tmp_path):
    job = grouped(tmp_path, due=each(3))
    assert moved(job, 0) == [True] * 5
    assert moved(job, 1) == [False, False, True, False, False]  # after the third and the sixth step
    states = job.model.other[0].weight
    checkpoint = torch.load(tmp_path / "checkpoints/step_0000006/optimizer.bin", weights_only=True)
    assert sorted({int(state["step"]) for state in checkpoint["state"].values()}) == [2, 6]
    assert states.grad is None


def test_a_group_has_a_rate_betas_and_a_decay_of_its_own(tmp_path, monkeypatch):
    found = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments, **named):
        found.append([(g["lr"], g["betas"], g["weight_decay"]) for g in self.param_groups])
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    grouped(tmp_path, {"warmup": 0}, rate=0.5, betas=(0.5, 0.9), weight_decay=0.25)
    assert found[0] == [
        (0.01, (0.9, 0.95), 0.05),
        (0.01, (0.9, 0.95), 0.0),
        (0.005, (0.5, 0.9), 0.25),
        (0.005, (0.5, 0.9), 0.0),
    ]


def test_a_group_is_clipped_by_its_own_norm(tmp_path, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments, **named):
        gradients = [torch.cat([p.grad.flatten() for g in part for p in g["params"]]) for part in
                     (self.param_groups[:2], self.param_groups[2:])]  # fmt: skip
        norms.append([gradient.norm().item() for gradient in gradients])
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    grouped(tmp_path / "a", {"clip": 0.01})
    assert norms[0] == pytest.approx([0.01, 0.01], rel=1e-3)
    grouped(tmp_path / "b", {"clip": 0.01}, clip=0.02)
    assert norms[-1] == pytest.approx([0.01, 0.02], rel=1e-3)
    whole = [line["grad_norm"] for line in log_of(tmp_path / "a")]
    grouped(tmp_path / "c", {"clip": 0.0})
    assert whole[0] == pytest.approx(math.hypot(*norms[-6]), rel=1e-6), "the logged norm is of both, before clipping"


def test_the_average_leaves_a_group_and_its_buffers_out(tmp_path):
    grouped(tmp_path, averaged=False)
    averaged = load_file(tmp_path / "checkpoints/step_0000006/ema.safetensors")
    assert averaged.keys() == {"one.weight", "one.bias"}


def test_a_grouped_run_that_was_interrupted_ends_with_the_same_weights(tmp_path):
    class Interrupted(GroupedJob):
        def loss(self, model, batch, generator):
            if len(self.weights) == 5:
                raise KeyboardInterrupt
            return super().loss(model, batch, generator)

    options = {"due": each(2), "averaged": False, "rate": 2.0}
    grouped(tmp_path / "whole", **options)
    config = toy_config()
    with pytest.raises(KeyboardInterrupt):
        fit(Interrupted(config, **options), config.training, tmp_path / "resumed", config)
    grouped(tmp_path / "resumed", **options)
    assert same(final(tmp_path / "whole"), final(tmp_path / "resumed"))


def test_a_parameter_in_no_group_or_in_two_is_named(tmp_path):
    class Forgetful(GroupedJob):
        def groups(self):
            return super().groups()[: self.count]

    for count, message in ((1, r"other\.0\.weight \(0\)"), (2, None)):
        job = Forgetful(toy_config())
        job.count = count
        if message:
            with pytest.raises(ValueError, match=message):
                fit(job, job.config.training, tmp_path / str(count), job.config)
    model = TwoPlayers()
    twice = [ParameterGroup(name=name, parameters=list(model.parameters())) for name in "ab"]
    with pytest.raises(ValueError, match=r"one\.weight \(2\)"):
        check_groups(model, twice)
    with pytest.raises(ValueError, match=r"group c: a parameter of shape \(7, 3\) is not the model's"):
        check_groups(model, [ParameterGroup(name="c", parameters=list(nn.Linear(3, 7).parameters()))])


# --------------------------------------------------------------------------------------------------- EMA


def test_without_a_warm_up_the_decay_holds_from_the_first_step(tmp_path):
    averaged = run_slices(tmp_path / "averaged", 12, ema=0.9, ema_warmup=False)
    first, start = run_one_step_weight(), torch.full((1, 3), 0.5)
    live = run_slices(tmp_path / "live", 12, ema=0.0).model.weight.detach()
    torch.testing.assert_close(averaged.saved, start.lerp(first, 0.1).lerp(live, 0.1))


def test_ema_agrees_with_torch_and_leaves_out_what_is_frozen():
    model = ToyModel(8)
    ema = EMA(model, 0.5)
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    oracle.update_parameters(model)  # torch's first update copies
    for step in range(10, 13):  # 0.5 is below the warm-up here
        model(torch.randn(4, 3), generator=torch.Generator())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        ema.update(step)
        oracle.update_parameters(model)
    for name, average in ema.average.items():
        if average.is_floating_point():
            torch.testing.assert_close(average, oracle.module.state_dict()[name])
    assert ema.average["norm.num_batches_tracked"] == model.norm.num_batches_tracked == 3
    assert not any(name.startswith("frozen") for name in ema.average)


def test_swapped_gives_the_weights_back_after_an_error():
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    live = model.weight.detach().clone()
    ema.average["weight"].zero_()
    with pytest.raises(ZeroDivisionError), ema.swapped():
        1 / model.weight.abs().sum().int().item()
    assert torch.equal(model.weight, live)
    assert not ema.average["weight"].any()


def test_ema_of_another_model_is_refused(tmp_path):
    EMA(nn.Linear(2, 2), 0.9).save(tmp_path / "ema.safetensors")
    with pytest.raises(ValueError, match="averaged weights of another model"):
        EMA(nn.Linear(2, 2, bias=False), 0.9).load(tmp_path / "ema.safetensors")


# ----------------------------------------------------------------------------------------- non-finite losses


def check_failure(out: Path, message: str, step: int) -> None:
    folder = out / f"failure/step_{step:07d}"
    assert f"step {step}: the loss or its gradient is not finite" in message
    assert "loss nan" in message
    assert "loss/absolute nan" in message
    assert f"image_0_{step}_0.png" in message
    assert str(folder) in message
    assert load_file(folder / "batch_0.safetensors")["x"].isnan().any()
    assert json.loads((folder / "names.json").read_text())["batch_0"][0] == f"image_0_{step}_0.png"
    facts = json.loads((folder / "failure.json").read_text())
    assert (facts["seed"], facts["step"], facts["position"], facts["rank"]) == (0, step, step, 0)
    assert (folder / "config.yaml").is_file()
    # the weights that met the batch, as a run without it has them after `step` steps
    train(out.with_name("healthy"), steps=6, save_every=step)
    healthy = load_file(out.with_name("healthy") / f"checkpoints/step_{step:07d}/model.safetensors")
    kept = load_file(folder / "model.safetensors")
    parameters = {name for name, _ in ToyModel(8).named_parameters()}
    assert all(torch.equal(kept[name], healthy[name]) for name in parameters)


def test_a_nan_stops_the_run_and_is_kept(tmp_path):
    with pytest.raises(NonFiniteLoss) as caught:
        train(tmp_path / "run", bad=(3, 0))
    assert isinstance(caught.value, ValueError)
    check_failure(tmp_path / "run", str(caught.value), 3)
    assert complete_steps(tmp_path / "run/checkpoints") == [2]
    assert not (tmp_path / "run/final").exists()


def test_on_a_gpu_the_step_is_found_later_and_exactly(tmp_path, monkeypatch):
    """As on a GPU, where the loss is looked at once per log line: the update must be skipped meanwhile."""
    prepare = Trainer.__init__

    def unwatched(self, *arguments):
        prepare(self, *arguments)
        self.on_cpu = False

    monkeypatch.setattr(loop.Trainer, "__init__", unwatched)
    with pytest.raises(NonFiniteLoss) as caught:
        train(tmp_path / "run", bad=(3, 0), log_every=6, save_every=6)
    monkeypatch.undo()
    check_failure(tmp_path / "run", str(caught.value), 3)
    assert complete_steps(tmp_path / "run/checkpoints") == []


def test_an_optimizer_that_cannot_skip_waits_before_the_weights_change(tmp_path, monkeypatch):
    """As on Apple's GPUs, where AdamW is not fused."""
    prepare = Trainer.__init__

    def unwatched(self, *arguments):
        prepare(self, *arguments)
        self.on_cpu = False

    def unfused(model, config, device, groups):
        return torch.optim.AdamW(parameter_groups(model.parameters(), config.weight_decay), lr=0.01, betas=config.betas)

    monkeypatch.setattr(loop.Trainer, "__init__", unwatched)
    monkeypatch.setattr(loop, "make_optimizer", unfused)
    with pytest.raises(NonFiniteLoss) as caught:
        train(tmp_path / "run", bad=(3, 0), log_every=6, save_every=6)
    check_failure(tmp_path / "run", str(caught.value), 3)


class InfiniteGradient(ToyJob):
    """The square root of 0 is 0, its slope is not."""

    def loss(self, model, batch, generator):
        losses = super().loss(model, batch, generator)
        return Losses(losses.total + (model.out.weight * 0).sum().sqrt(), losses.parts)


def test_a_finite_loss_with_a_broken_gradient_stops_too(tmp_path):
    config = toy_config()
    with pytest.raises(NonFiniteLoss, match=r"step 0: .*grad_norm (nan|inf)"):
        fit(InfiniteGradient(config), config.training, tmp_path, config)


def test_the_bad_micro_batch_is_named(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"step 2: .*image_0_6_0.png"):
        train(tmp_path, bad=(2, 0), accumulate=3)
    facts = json.loads((tmp_path / "failure/step_0000002/failure.json").read_text())
    assert (facts["position"], facts["micro"]) == (6, 0)
    assert len(list((tmp_path / "failure/step_0000002").glob("batch_*"))) == 3
