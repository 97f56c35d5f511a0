"""The training loop, one for every model, on Accelerate.

A job brings the model, the batches and the loss; `fit` does the rest: accumulation, clipping, schedule,
precision, EMA, log, previews, checkpoints, resume. Batches and noise depend on (seed, step, process) alone,
so a run that was killed and started again ends, on a CPU, with the weights of one that was not.

Run folder: config.yaml, log.jsonl, tracker files, checkpoints/step_0001000/, samples/step_0001000.png,
final/ (the finished model), failure/ after a non-finite loss.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from imgtok.randomness import step_generator
from imgtok.runs import Progress
from imgtok.tokenizers.base import Losses
from imgtok.train.config import TrainingConfig
from imgtok.train.ema import EMA
from imgtok.train.failure import NonFiniteLoss, explain, save_failure
from imgtok.train.log import Log, describe_run
from imgtok.train.optim import ParameterGroup, make_optimizer, rate_at, set_rate, whole_model
from imgtok.train.start import finished_steps, make_accelerator, prepare_folder
from imgtok.train.state import Checkpoints, publish, writing

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

    def groups(self) -> Sequence[ParameterGroup]:
        """The trainable parameters in groups that have their own rate, clip, rhythm; one group by default."""
        return whole_model(self.model)

    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Losses:
        """Loss of one micro-batch. Call `model`, not `self.model`: it may be wrapped for DDP."""

    def batches(self, *, start_step: int, rank: int, world: int) -> Iterator[Any]:
        """Endless micro-batches, `accumulate` per optimizer step, from optimizer step `start_step` on."""

    def preview(self, model: nn.Module, path: Path) -> None:
        """Draw a picture with the bare model (averaged weights, eval mode, no gradients)."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the bare model with averaged weights as a model folder; `folder` exists and is empty."""

    def names(self, batch: Any) -> Sequence[str]:
        """Names of the images in a batch, for error messages."""

    def parts(self) -> Mapping[str, str]:
        """Models that the trained one is used with and that the configuration names: field -> fingerprint."""
        return {}


def fit(job: Job, config: TrainingConfig, out: Path, resolved: Any) -> Path:
    """Train `job.model` and return the folder of the finished model, `out/final`.

    `resolved` is the job's whole configuration, of which `config` is the section `training`. Continues from
    the newest checkpoint in `out`; returns at once if the run is complete. Raises ValueError if `out` holds
    a run, finished or not, with another configuration, NonFiniteLoss, and OSError when the disk is full.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(config, out)
    prepare_folder(accelerator, config, out, resolved)
    if finished_steps(out / "final") == config.steps:
        logger.info("the run in %s is complete (%d steps): nothing to do", out, config.steps)
        return out / "final"
    trainer = Trainer(accelerator, job, config, out, resolved)
    try:
        trainer.run()
    finally:
        trainer.log.close()
    return trainer.finish()


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
        describe_run(accelerator, config, job.model, out)
        self.start = self.resume()
        self.log = Log(accelerator, config, out, resolved, self.start)
        self.on_cpu = accelerator.device.type == "cpu"
        self.skips_broken = self.adamw.defaults["fused"] is True

    def resume(self) -> Progress:
        """Load the newest checkpoint, if any."""
        start = self.checkpoints.load()
        if start.step > self.config.steps:
            raise ValueError(
                f"{self.out} already has {start.step} steps, training.steps asks for {self.config.steps}: "
                "ask for at least as many or choose another `out`"
            )
        if start.step:
            logger.info("continuing from step %d of %s", start.step, self.out)
        if start.processes != self.accelerator.num_processes:
            logger.warning(
                "trained by %d process(es) so far, now by %d: the batches differ from an uninterrupted run's",
                start.processes, self.accelerator.num_processes,
            )  # fmt: skip
        return start

    def run(self) -> None:
        """Train from where the run stands to the last step."""
        config, begin = self.config, self.start.step
        self.job.model.train()
        if begin == 0:
            self.preview(0)
        batches = self.stream(begin)
        for step in range(begin, config.steps):
            self.step(step, batches)
            done = step + 1
            last = done == config.steps
            logs, saves = last or done % config.log_every == 0, last or done % config.save_every == 0
            if self.on_cpu or logs or saves or step == 0:
                self.stop_if_broken()
            if step == 0:
                self.log.write(0, 1, rate_at(0, config))
            if logs:
                self.log.write(done, done, rate_at(step, config))
                self.log.window.reset()
            self.log.bar.update()
            if saves:  # before the picture, whose failure then costs no step
                self.save(done)
            if last or (config.preview_every and done % config.preview_every == 0):
                self.preview(done)

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

    def preview(self, done: int) -> None:
        """Draw samples/step_*.png."""
        if self.accelerator.is_main_process:
            path = self.out / "samples" / f"step_{done:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            with self.log.paused(), self.averaged() as model:
                self.job.preview(model, path)
        self.accelerator.wait_for_everyone()

    def save(self, done: int) -> None:
        """Write a checkpoint."""
        with self.log.paused():
            self.checkpoints.save(self.progress(done), self.resolved)

    def progress(self, done: int) -> Progress:
        """What `state.json` says after `done` steps."""
        processes = self.accelerator.num_processes
        return Progress(step=done, seconds=self.log.seconds, processes=processes, parts=self.job.parts())

    def finish(self) -> Path:
        """Write final/: the model folder with averaged weights, the configuration, the state."""
        final, temporary = self.out / "final", self.out / ".tmp-final"
        with writing(temporary, self.accelerator):
            if self.accelerator.is_main_process:
                with self.averaged() as model:
                    self.job.save(model, temporary)
                publish(temporary, final, self.progress(self.config.steps), self.resolved)
        self.accelerator.wait_for_everyone()
        logger.info("finished: %s", final)
        return final
