"""The training loop, one for every model, on Accelerate.

A job brings the model, the batches and the loss; `fit` does the rest: accumulation, clipping, schedule,
precision, EMA, log, previews, checkpoints, resume. Batches and noise depend on (seed, step, process) alone,
so a run that was killed and started again ends, on a CPU, with the weights of one that was not.

With `validate_every` it also measures the loss of held-out images (imgtok/train/validation.py).

Run folder: config.yaml, log.jsonl, tracker files, checkpoints/step_0001000/, samples/step_0001000.png,
final/ (the finished model), best/ with `training.best`, failure/ after a non-finite loss.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from imgtok import announce, signals
from imgtok.randomness import step_generator
from imgtok.runs import BEST, Progress, step_of
from imgtok.signals import Requests
from imgtok.tokenizers.base import Losses
from imgtok.train.best import Record, best_of
from imgtok.train.config import TrainingConfig
from imgtok.train.ema import EMA
from imgtok.train.failure import NonFiniteLoss, explain, save_failure
from imgtok.train.log import Log, describe_run
from imgtok.train.optim import ParameterGroup, make_optimizer, rate_at, restore_settings, set_rate, whole_model
from imgtok.train.resume import spelled_out
from imgtok.train.start import make_accelerator, prepare_folder
from imgtok.train.state import Checkpoints, publish, writing
from imgtok.train.stopping import Agreement
from imgtok.train.validation import HeldOut, Measure, Validation, as_it_was

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Job", "NonFiniteLoss", "ParameterGroup", "TrainingConfig", "fit"]
logger = logging.getLogger(__name__)


class Job(Protocol):
    """What a training program hands to the loop; derive from it. Batches are dataclasses with tensors and
    `.to(device)`.
    """

    model: nn.Module
    """All that is trained."""
    identity: Mapping[str, Any] = MappingProxyType({})
    """What tells data and frozen models from others, by the names in `imgtok.train.resume.CONTENTS`, as JSON takes it:
    a run goes on only with the same. Fingerprints stand in `state.json`, too, so that a checkpoint is used with the
    models that it was trained with."""

    def groups(self) -> Sequence[ParameterGroup]:
        """The trainable parameters in groups that have their own rate, clip, rhythm; one group by default."""
        return whole_model(self.model)

    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Losses:
        """Loss of one micro-batch. Call `model`, not `self.model`: it may be wrapped for DDP."""

    def batches(self, *, start_step: int, rank: int, world: int) -> Iterator[Any]:
        """Endless micro-batches, `accumulate` per optimizer step, from optimizer step `start_step` on."""

    def held_out(self) -> HeldOut | None:
        """What is kept from training, for `training.validate_every`; None, as by default, where nothing can be.

        Raises ValueError, with what to give, where nothing was kept this time. The loss of these batches is that of
        `loss`, in eval mode: a module that counts its calls, or learns without gradients, does so in train mode alone.
        """
        return None

    def scores(self, wanted: Sequence[str], held_out: HeldOut, num: int) -> Measure:
        """What measures `training.validation_scores`, in `wanted`, of the bare model (averaged weights, eval mode, no
        gradients) on `num` images; called by the main process alone. Raises ValueError for what cannot be measured.
        """
        raise ValueError(f"training.validation_scores: this job measures nothing but the loss; leave {wanted[0]} out")

    def preview(self, model: nn.Module, path: Path) -> None:
        """Draw a picture with the bare model (averaged weights, eval mode, no gradients)."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the bare model with averaged weights as a model folder; `folder` exists and is empty."""

    def resumed(self, step: int) -> None:
        """Called when a checkpoint after `step` steps has been loaded; `training` may have been another so far."""
        return

    def names(self, batch: Any) -> Sequence[str]:
        """Names of the images in a batch, for error messages."""


def fit(job: Job, config: TrainingConfig, out: Path, resolved: Any) -> Path:
    """Train `job.model` and return the folder of the finished model, `out/final`.

    `resolved` is the job's whole configuration, of which `config` is the section `training`. Continues from
    the newest checkpoint in `out`; returns at once if the run is complete. Raises ValueError if `out` holds
    a run that may not be continued in this way (imgtok.train.resume), NonFiniteLoss, and OSError when the disk is full.
    SIGINT, SIGTERM and SIGUSR1 end the run after the step at work, with a checkpoint, by `imgtok.signals.Stopped`.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    resolved = spelled_out(resolved)
    accelerator = make_accelerator(config, out, rests=getattr(job.model, "rests_parameters", False))
    start = prepare_folder(accelerator, config, out, resolved, job.identity)
    if start.done:
        logger.info("the run in %s is complete (%d steps): nothing to do", out, config.steps)
        return out / "final"
    # also around the reading of a checkpoint: an interrupted one would pass for a damaged one
    with signals.deferred() as requests:
        trainer = Trainer(accelerator, job, config, out, resolved)
        if accelerator.is_main_process:
            start.write(trainer.start.step)
        try:
            trainer.run(requests)
        finally:
            trainer.log.close()
        final = trainer.finish()
        if requests.number:
            raise signals.Stopped(requests.number, f"{signals.name_of(requests.number)}: the run is complete: {final}")
    return final


def compile_forward(model: nn.Module, **options: Any) -> None:
    """Compile what training calls, without a break in the graph; `options` are torch.compile's.

    Dynamo cannot follow a torch.Generator. A model therefore draws its random numbers first and hands them to its
    `forward_drawn`, a function of tensors: that is compiled, in each module that has one. A model without any is
    compiled whole, with whatever breaks it has.
    """
    parts: list[Any] = [module for module in model.modules() if hasattr(module, "forward_drawn")]
    for part in parts:
        part.forward_drawn = torch.compile(part.forward_drawn, fullgraph=True, **options)
    if not parts:
        model.compile(**options)


class Trainer:
    """One run. `run` trains, `finish` writes the finished model."""

    def __init__(self, accelerator: Accelerator, job: Job, config: TrainingConfig, out: Path, resolved: Any) -> None:
        self.accelerator, self.job, self.config = accelerator, job, config
        self.out, self.resolved = out, resolved
        self.groups = [group for group in job.groups() if group.trainable]
        self.adamw = make_optimizer(job.model, config, accelerator.device, self.groups)
        self.model, optimizer = accelerator.prepare(job.model, self.adamw)
        # Accelerate's wrapper searches the disk for an optional package at each step; only fp16 needs it
        self.optimizer = self.adamw if accelerator.scaler is None else optimizer
        if config.compile:
            compile_forward(job.model)
        without = [parameter for group in self.groups if not group.averaged for parameter in group.parameters]
        self.ema = EMA(job.model, config.ema, warmup=config.ema_warmup, without=without)
        self.checkpoints = Checkpoints(accelerator, job.model, self.ema, out / "checkpoints", config.keep)
        describe_run(accelerator, config, job.model)
        self.validation: Validation | None = None
        if config.validate_every is not None:
            self.validation = Validation(job.held_out(), config, accelerator, job)
        self.start = self.resume()
        self.reached = self.saved = self.start.step
        self.logged = 0
        self.log = Log(accelerator, config, out, resolved, self.start)
        self.agreement = Agreement(accelerator)
        self.saved_at = time.monotonic()
        self.on_cpu = accelerator.device.type == "cpu"
        self.skips_broken = self.adamw.defaults["fused"] is True

    def resume(self) -> Progress:
        """Load the newest checkpoint, if any."""
        settings = [
            {key: value for key, value in group.items() if key != "params"} for group in self.adamw.param_groups
        ]
        start = self.checkpoints.load()
        restore_settings(self.adamw, settings)  # torch has put those of the checkpoint there, which may differ
        self.accelerator.step = start.step * self.config.accumulate  # by which Accelerate finds the end of a step
        if start.step:
            logger.info("continuing from step %d of %s", start.step, self.out)
            self.job.resumed(start.step)
        if start.processes != self.accelerator.num_processes:
            logger.warning(
                "trained by %d process(es) so far, now by %d: the batches differ from an uninterrupted run's",
                start.processes, self.accelerator.num_processes,
            )  # fmt: skip
        return start

    def run(self, requests: Requests) -> None:
        """Train from where the run stands to the last step, or until a signal; raises `Stopped` then."""
        config, begin = self.config, self.start.step
        self.job.model.train()
        self.stop(self.agreement.now(requests.number), begin)
        if begin == 0 or self.shows(begin):
            self.preview(begin, requests, again=begin == 0)
            self.stop(self.agreement.now(requests.number), begin)
        if self.validates(begin) and not self.log.has_validation(begin):  # the run may have ended before or in it
            self.stop(self.validate(begin, requests), begin)
        self.mend_best(begin)
        if self.gives_up(begin):
            return
        batches = self.stream(begin)
        for step in range(begin, config.steps):
            self.step(step, batches)
            done = step + 1
            last = done == config.steps
            stop, due = self.agreement.after(done, requests.number, self.save_is_due())
            logs = bool(last or stop or done % config.log_every == 0)
            saves = bool(last or stop or due or done % config.save_every == 0)
            waits = logs or saves or self.validates(done) or self.shows(done)
            if self.on_cpu or waits or step == 0:
                self.stop_if_broken()
            if step == 0:
                self.log.write(0, 1, rate_at(0, config))
            if logs:
                self.write_log(done)
            self.log.bar.update()
            if saves:  # before all that can take minutes, so that whatever ends the run in there costs no step
                self.save(done)
            if self.validates(done) and not stop:
                stop = self.validate(done, requests)
                last = last or (not stop and self.gives_up(done))
            self.reached = done
            if stop or last:
                self.settle(stop, done)
            if last or self.shows(done):
                self.preview(done, requests)
                if stop := self.agreement.now(requests.number):
                    self.settle(stop, done)
            if last:
                return

    def shows(self, done: int) -> bool:
        """Whether a picture is drawn after so many steps."""
        every = self.config.preview_every
        return done == self.config.steps or bool(every and done % every == 0)

    def validates(self, done: int) -> bool:
        """Whether the held-out images are looked at after so many steps."""
        every = self.config.validate_every
        return every is not None and (done == self.config.steps or done % every == 0)

    def validate(self, done: int, requests: Requests) -> int:
        """The loss of the held-out images with the averaged weights, into the log, and if it is the best, the model
        into best/. Returns the signal that is to end the run, or 0. One that came while images were looked at has ended
        that; then nothing is written, and the run that goes on does it again.
        """
        assert self.validation is not None, "`validates` has asked for it"
        with self.log.paused(), self.averaged() as model:
            found = self.validation.measure(model, requests, self.agreement)
        if found is not None:
            best = best_of(self.log.validations | {done: found}, self.figure)
            is_best = self.config.best is not None and best is not None and best.step == done
            if is_best:  # first the checkpoint: a run cannot go on from before the model that best/ has
                self.save(done)
            self.log.validation(done, found)
            if is_best:
                self.keep_best(done)
        return self.agreement.now(requests.number)

    @property
    def figure(self) -> str:
        """Which figure of a validation says how good the model is."""
        return self.config.best or "loss"

    def record(self) -> Record | None:
        """The best validation so far; None before the first, or where the newest is from before its figure was asked
        for.
        """
        newest = [*self.log.validations.values()][-1:]
        return best_of(self.log.validations, self.figure) if any(self.figure in one for one in newest) else None

    def keep_best(self, done: int) -> None:
        """Write the model into best/."""
        with self.log.paused(), self.averaged() as model:
            self.write_model(model, BEST, done)

    def mend_best(self, begin: int) -> None:
        """Where a run goes on, best/ is compared with the validations: it may have ended between the two, or
        `training.best` is another than so far.
        """
        best = None if self.config.best is None else self.record()
        held = step_of(self.out / BEST)
        if best is None or best.step == held:
            return
        if best.step == begin:
            self.keep_best(begin)
        elif self.accelerator.is_main_process:
            there = "is missing" if held is None else f"is that of step {held}"
            logger.warning(
                "training.best: %s was best after step %d (%.4g), and the model of that step was not kept; until it is "
                "better, best/ %s",
                self.figure, best.step, best.value, there,
            )  # fmt: skip

    def gives_up(self, done: int) -> bool:
        """Whether `patience` is at its end after so many steps."""
        best = None if self.config.patience is None else self.record()
        if self.config.patience is None or best is None or best.since < self.config.patience:
            return False
        if self.accelerator.is_main_process:
            logger.info(
                "training.patience: ended after step %d of %d: %s was no better in %d validations than %.4g after "
                "step %d", done, self.config.steps, self.figure, best.since, best.value, best.step,
            )  # fmt: skip
        return True

    def save_is_due(self) -> bool:
        """Whether `save_minutes` have passed; by the main process's clock."""
        minutes = self.config.save_minutes
        if minutes is None or not self.accelerator.is_main_process:
            return False
        return time.monotonic() - self.saved_at >= 60 * minutes

    def write_log(self, done: int) -> None:
        """The log line after so many steps, unless it is there; the next one begins a new mean."""
        if self.logged == done:
            return
        self.log.write(done, done, rate_at(done - 1, self.config))
        self.log.window.reset()
        self.logged = done

    def settle(self, signal: int, done: int) -> None:
        """Before the run ends after so many steps: its log line and its checkpoint; raises `Stopped` if there is a
        signal.
        """
        self.write_log(done)
        self.save(done)
        self.stop(signal, done)

    def stop(self, signal: int, done: int) -> None:
        """Raise `Stopped` if there is a signal; what is to be saved is saved."""
        if not signal:
            return
        where = f"{signals.name_of(signal)}: stopped after step {done} of {self.config.steps}"
        kept = f"the checkpoint is {self.out / 'checkpoints' / f'step_{done:07d}'}" if done else "nothing is lost"
        raise signals.Stopped(signal, f"{where}; {kept}; start the same command again to go on")

    def stream(self, step: int) -> Iterator[Any]:
        """The micro-batches of this process from optimizer step `step` on."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return self.job.batches(start_step=step, rank=rank, world=world)

    def step(self, step: int, batches: Iterator[Any]) -> None:
        """One optimizer step: forward and backward of every micro-batch, clip, update, average."""
        accelerator, config, window = self.accelerator, self.config, self.log.window
        for micro in range(config.accumulate):
            position = step * config.accumulate + micro
            generator = step_generator(config.seed, position, accelerator.process_index)
            batch = next(batches).to(accelerator.device)
            dropout = step_generator(config.seed, position, accelerator.process_index, purpose="dropout")
            torch.manual_seed(dropout.initial_seed())  # nn.Dropout knows only the global generator
            with accelerator.accumulate(self.model):
                losses = self.job.loss(self.model, batch, generator)
                window.add(losses, position)
                accelerator.backward(losses.total)
        assert accelerator.sync_gradients, "Accelerate and this loop disagree about where a step ends"
        window.add_norm(self.clip(step), position, must_be_finite=config.precision != "fp16")
        if self.skips_broken:  # keeps the weights that met the broken batch, without waiting for the device
            self.adamw.found_inf = window.broken  # type: ignore[attr-defined]
        elif config.precision != "fp16":  # no such switch (MPS): look before the weights change
            self.stop_if_broken()
        set_rate(self.adamw, rate_at(step, config))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(step)

    def clip(self, step: int) -> Tensor:
        """Limit the gradient's norm in each group that is due at this step, and throw away that of the others.

        Returns the norm of all that is left, before it was limited.
        """
        self.accelerator.unscale_gradients()
        norms = []
        for group in self.groups:
            if group.due(step):
                limit = (self.config.clip if group.clip is None else group.clip) or float("inf")
                norms.append(nn.utils.clip_grad_norm_(group.trainable, limit))
            else:  # AdamW passes over a parameter without a gradient: its moments stay too
                for parameter in group.trainable:
                    parameter.grad = None
        return functools.reduce(torch.hypot, norms) if norms else torch.zeros((), device=self.accelerator.device)

    def stop_if_broken(self) -> None:
        """Save what is needed and raise NonFiniteLoss if any process met a non-finite loss or gradient."""
        position = self.log.window.first_bad(self.accelerator)
        if position is None:
            return
        step, micro = divmod(position, self.config.accumulate)
        rank = self.accelerator.process_index
        stream = self.stream(step)  # drawn again: the batches depend on the step alone
        batches = [next(stream) for _ in range(self.config.accumulate)]
        names = [list(self.job.names(batch)) for batch in batches]
        values = self.log.window.latest()
        facts: dict[str, Any] = {"seed": self.config.seed, "step": step, "micro": micro, "position": position}
        facts |= {"rank": rank, "values": {name: str(value) for name, value in values.items()}}
        folder = self.out / "failure" / (f"step_{step:07d}" + (f"_process_{rank}" if rank else ""))
        save_failure(folder, self.job.model, batches, names, facts, self.resolved)
        self.accelerator.wait_for_everyone()  # who leaves first has the others killed while they write
        raise NonFiniteLoss(explain(values, step, names[micro], folder))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The bare model with averaged weights, in eval mode, without gradients."""
        self.job.model.eval()
        with self.ema.swapped(), torch.no_grad():
            yield self.job.model
        self.job.model.train()

    def preview(self, done: int, requests: Requests, *, again: bool = True) -> None:
        """Draw samples/step_*.png; a signal ends that. Unless `again`, one that is there already stays."""
        path = self.out / "samples" / f"step_{done:07d}.png"
        if self.accelerator.is_main_process and (again or not path.exists()):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.log.paused(), self.averaged() as model, contextlib.suppress(signals.Stopped):
                with requests.interrupting():
                    self.job.preview(model, path)
                self.log.picture(path, done)
        self.accelerator.wait_for_everyone()

    def save(self, done: int) -> None:
        """Write a checkpoint, unless that of this step is there."""
        if self.saved == done:
            return
        with self.log.paused():
            self.checkpoints.save(self.progress(done), self.resolved, self.job.identity)
        self.saved, self.saved_at = done, time.monotonic()

    def progress(self, done: int) -> Progress:
        """What `state.json` says after `done` steps."""
        processes = self.accelerator.num_processes
        parts = {name: told for name, told in self.job.identity.items() if isinstance(told, str)}
        return Progress(step=done, seconds=self.log.seconds, processes=processes, parts=parts)

    def write_model(self, model: nn.Module, name: str, done: int) -> Path:
        """Write a model folder into the run, whole or not at all; what is measured while it is saved is forgotten."""
        target, temporary = self.out / name, self.out / f".tmp-{name}"
        with writing(temporary, self.accelerator):
            if self.accelerator.is_main_process:
                with as_it_was(model):
                    self.job.save(model, temporary)
                publish(temporary, target, self.progress(done), self.resolved, self.job.identity)
        self.accelerator.wait_for_everyone()
        return target

    def finish(self) -> Path:
        """Write final/: the model folder with averaged weights, the configuration, the state."""
        with self.averaged() as model:
            final = self.write_model(model, "final", self.reached)
        if self.accelerator.is_main_process:
            announce.ends(final)
        return final
