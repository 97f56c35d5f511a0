"""A tiny job for the tests of the loop, and a program that trains it and dies as it is told (see `main`)."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from imgtok.signals import Stopped
from imgtok.tokenizers.base import Losses
from imgtok.train.ema import EMA
from imgtok.train.loop import Job, NonFiniteLoss, TrainingConfig, fit
from imgtok.train.validation import HeldOut

DEFAULTS: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "learning_rate": 0.01,
    "warmup": 2,
    "log_every": 2,
    "preview_every": 3,
    "save_every": 2,
    "ema": 0.9,
    "trackers": (),
}


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    training: TrainingConfig
    width: int = 8
    data: Path | None = None


@dataclass(frozen=True)
class ToyBatch:
    x: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def to(self, device: torch.device) -> ToyBatch:
        return dataclasses.replace(self, x=self.x.to(device), labels=self.labels.to(device))


class ToyModel(nn.Module):
    """Has all that the loop must keep: a norm, a running buffer, a counter, a frozen part, dropout, noise."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, width).requires_grad_(False)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor, *, generator: torch.Generator) -> Losses:
        noisy = x + 0.1 * torch.randn(x.shape, generator=generator).to(x)
        error = (self.out(self.drop(self.norm(self.frozen(noisy)))) - x).float()
        return Losses(error.square().mean(), {"absolute": error.abs().mean()})


class ToyJob(Job):
    """`bad` is the (optimizer step, process) whose first micro-batch makes the loss NaN."""

    def __init__(self, config: ToyConfig, bad: tuple[int, int] | None = None) -> None:
        torch.manual_seed(0)
        self.config = config
        self.model: nn.Module = ToyModel(config.width)
        self.bad = bad
        self.seen: list[tuple[str, ...]] = []
        self.previews: list[str] = []

    def batches(self, *, start_step: int, rank: int, world: int) -> Iterator[ToyBatch]:
        training = self.config.training
        micro = start_step * training.accumulate
        while True:
            seed = micro * world + rank
            x = torch.randn(training.batch_size, 3, generator=torch.Generator().manual_seed(seed))
            if self.bad == (micro / training.accumulate, rank):
                x[0, 0] = float("nan")
            names = tuple(f"image_{rank}_{micro}_{i}.png" for i in range(len(x)))
            yield ToyBatch(x, torch.arange(len(x)), names)
            micro += 1

    def loss(self, model: nn.Module, batch: ToyBatch, generator: torch.Generator) -> Losses:
        self.seen.append(batch.names)
        return model(batch.x, generator=generator)

    def names(self, batch: ToyBatch) -> Sequence[str]:
        return batch.names

    def held_out(self) -> HeldOut:
        """Ten images that no batch of the training has."""
        x = torch.randn(10, 3, generator=torch.Generator().manual_seed(12345))

        def batch(places: Sequence[int], seed: int) -> ToyBatch:
            names = tuple(f"held_out_{place}.png" for place in places)
            return ToyBatch(x[list(places)], torch.tensor(places), names)

        return HeldOut(len(x), batch, "held-out images of the toy")

    def preview(self, model: nn.Module, path: Path) -> None:
        assert not model.training
        assert not torch.is_grad_enabled()
        self.previews.append(path.name)
        Image.new("RGB", (4, 4)).save(path)

    def save(self, model: nn.Module, folder: Path) -> None:
        save_file({k: v.clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")


def toy_config(**changes: Any) -> ToyConfig:
    own = {name: changes.pop(name) for name in ("width", "data") if name in changes}
    return ToyConfig(training=TrainingConfig(**{**DEFAULTS, **changes}), **own)


def train(out: Path, *, bad: tuple[int, int] | None = None, **changes: Any) -> ToyJob:
    config = toy_config(**changes)
    job = ToyJob(config, bad)
    fit(job, config.training, out, config)
    return job


def final(out: Path) -> dict[str, Tensor]:
    return load_file(out / "final" / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kill_self(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_step(job: ToyJob, step: int) -> None:
    """SIGKILL in the backward pass of optimizer step `step`."""
    loss = job.loss

    def dying_loss(model: nn.Module, batch: ToyBatch, generator: torch.Generator) -> Losses:
        losses = loss(model, batch, generator)
        if len(job.seen) > step * job.config.training.accumulate:
            losses.total.register_hook(kill_self)
        return losses

    job.loss = dying_loss  # type: ignore[method-assign]


def die_in_save(step: int) -> None:
    """SIGKILL when most of the checkpoint of `step` is written and one of its files is half written."""
    save = EMA.save

    def dying_save(self: EMA, path: Path) -> None:
        save(self, path)
        if path.parent.name == f".tmp-step_{step:07d}":
            path.write_bytes(path.read_bytes()[:100])
            kill_self()

    EMA.save = dying_save  # type: ignore[method-assign]


def two_processes(out: Path) -> None:
    """Under torchrun: a whole run, one that is interrupted and resumed, a NaN on the second process."""
    rates: list[float] = []
    register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    job = train(out / "whole")
    rank = torch.distributed.get_rank()
    assert torch.distributed.get_world_size() == 2
    assert all(name.startswith(f"image_{rank}_") for names in job.seen for name in names)
    facts: dict[str, Any] = {"rates": rates[:]}

    class InterruptedJob(ToyJob):
        def loss(self, model: nn.Module, batch: ToyBatch, generator: torch.Generator) -> Losses:
            if len(self.seen) == 5:
                raise KeyboardInterrupt
            return super().loss(model, batch, generator)

    config = toy_config()
    with contextlib.suppress(KeyboardInterrupt):
        fit(InterruptedJob(config), config.training, out / "resumed", config)
    facts["seen_after_resume"] = len(train(out / "resumed").seen)

    class SignalledJob(ToyJob):
        """SIGTERM to the second process alone, in the fourth step."""

        def loss(self, model: nn.Module, batch: ToyBatch, generator: torch.Generator) -> Losses:
            losses = super().loss(model, batch, generator)
            if rank == 1 and len(self.seen) == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return losses

    config = toy_config(save_every=100)
    try:
        fit(SignalledJob(config), config.training, out / "stopped", config)
    except Stopped as stop:
        facts["stopped"] = str(stop)
    facts["seen_after_stop"] = len(train(out / "stopped").seen)

    class ValidatedJob(ToyJob):
        """SIGTERM to the second process alone, in the first of the two batches of the validation after three steps."""

        def loss(self, model: nn.Module, batch: ToyBatch, generator: torch.Generator) -> Losses:
            losses = super().loss(model, batch, generator)
            if rank == 1 and len(self.seen) == 2 + 3 + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return losses

    config = toy_config(save_every=100, validate_every=3)
    validated = ValidatedJob(config)
    try:
        fit(validated, config.training, out / "validated", config)
    except Stopped as stop:
        facts["stopped_in_validation"] = [str(stop), len(validated.seen)]
    train(out / "validated", validate_every=3)
    train(out / "minutes", save_every=100, save_minutes=1e-9, keep=9, validate_every=4)
    lines = [json.loads(line) for line in (out / "minutes/log.jsonl").read_text().splitlines()]
    facts["validations"] = [line for line in lines if "validation/loss" in line]
    try:
        train(out / "broken", bad=(3, 1))
    except NonFiniteLoss as error:
        facts["error"] = str(error)
    (out / f"facts_{rank}.json").write_text(json.dumps(facts))


def main(arguments: Sequence[str]) -> None:
    """`OUT whole|two_processes|die_in_step=N|die_in_save=N|bad=N`."""
    out, action = Path(arguments[0]), arguments[1]
    if action == "two_processes":
        two_processes(out)
        return
    config = toy_config()
    name, _, step = action.partition("=")
    job = ToyJob(config, (int(step), 0) if name == "bad" else None)
    if name == "die_in_step":
        die_in_step(job, int(step))
    if name == "die_in_save":
        die_in_save(int(step))
    fit(job, config.training, out, config)


if __name__ == "__main__":
    main(sys.argv[1:])
