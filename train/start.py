"""What happens before the first step: the accelerator, and whether the run folder may be used."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imgtok.runs import complete_steps, step_of
from imgtok.runtime import on_cpu
from imgtok.train import resume
from imgtok.train.config import TrainingConfig
from imgtok.train.log import check_trackers
from imgtok.train.state import remove_leftovers

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def make_accelerator(config: TrainingConfig, out: Path, *, rests: bool = False) -> Accelerator:
    """Accelerate as `config` wants it; the environment chooses only the processes and their devices.

    With `rests` processes do not wait for the gradients of parameters that a step does not use.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

    check_trackers(config)
    if config.precision == "fp16" and on_cpu():
        raise ValueError("training.precision=fp16 needs a GPU, and there is none: choose fp32 or bf16")
    # A process may train several models (the quickstart does); the precision of the first is kept otherwise.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=on_cpu(),
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        gradient_accumulation_steps=config.accumulate,
        log_with=list(config.trackers) or None,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)] if rests else None,
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard")),
    )


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a run starts or goes on, before anything of that is written."""

    done: bool
    """Whether the run is complete, with nothing left to do."""
    out: Path
    config: TrainingConfig
    resolved: Any
    identity: Mapping[str, Any]
    previous: resume.Previous | None
    recorded: Sequence[resume.Change]

    def write(self, step: int) -> None:
        """Log what is changed after `step` steps; write it, config.yaml and identity.json. Called once the checkpoint
        has been read: a start that fails leaves no trace.
        """
        if self.recorded and self.previous is not None:
            resume.record(self.out, self.recorded, step, self.previous, self.config)
        resume.write(self.out, self.resolved, self.identity)


def prepare_folder(
    accelerator: Accelerator, config: TrainingConfig, out: Path, resolved: Any, identity: Mapping[str, Any]
) -> Start:
    """Check that a run in `out` is this one; clear what a killed process left.

    Raises ValueError for a run that may not be continued in this way, by imgtok.train.resume.
    """
    checkpoints, final = out / "checkpoints", out / "final"
    steps, finished = complete_steps(checkpoints), step_of(final)
    recorded, previous = list[resume.Change](), None
    if steps or final.exists():
        if not config.resume:
            found = "checkpoints" if steps else "the finished model"
            raise ValueError(
                f"{out} holds {found} of an earlier run and training.resume is false: choose "
                "another `out`, continue it with training.resume=true, or delete that folder yourself"
            )
        check_steps(out, max([*steps[:1], finished or 0]), config.steps)
        previous = resume.Previous.read(out, resolved)
        recorded = [] if previous is None else resume.check(out, previous, resolved, identity)
        check_end(out, config, finished, recorded)
        if not steps and finished and (finished < config.steps or resume.is_stale(final, resolved)):
            raise ValueError(
                f"{final} was trained for {finished} steps, and there is no checkpoint in {checkpoints} to go on from: "
                f"choose another `out`; init={final} starts from its weights"
            )
    done = finished == config.steps and not resume.is_stale(final, resolved)
    start = Start(
        done=done,
        out=out,
        config=config,
        resolved=resolved,
        identity=identity,
        previous=previous,
        recorded=recorded,
    )
    accelerator.wait_for_everyone()  # no process may read config.yaml after the main process wrote it
    if accelerator.is_main_process:
        checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        remove_leftovers(checkpoints)
        if done:
            start.write(config.steps)
    accelerator.wait_for_everyone()
    return start


def check_steps(out: Path, reached: int, asked: int) -> None:
    """Raise ValueError for a run that has gone further already."""
    if reached > asked:
        raise ValueError(
            f"{out} already has {reached} steps, training.steps asks for {asked}: ask for at least as many or choose "
            "another `out`"
        )


def check_end(out: Path, config: TrainingConfig, finished: int | None, recorded: Sequence[resume.Change]) -> None:
    """Raise ValueError for changes that come too late: the run is complete."""
    if finished != config.steps or not recorded:
        return
    name, before, now = recorded[0]
    raise ValueError(
        f"{out}: this run is complete ({finished} steps) with {name} = {before}; {name} = {now} would change nothing: "
        "choose another `out` for a new run, or a larger training.steps to go on with this one"
    )
