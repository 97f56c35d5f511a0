"""What happens before the first step: the accelerator, and whether the run folder may be used."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from imgtok import config as configuration
from imgtok.runs import complete_steps, read_progress
from imgtok.runtime import on_cpu
from imgtok.train.config import TrainingConfig
from imgtok.train.log import check_trackers
from imgtok.train.state import remove_leftovers

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
MAY_CHANGE = {"out", "checkpoint_activations"} | {
    "training." + name
    for name in (
        "steps",
        "log_every",
        "preview_every",
        "save_every",
        "keep",
        "resume",
        "trackers",
        "threads",
        "num_workers",
    )
}
"""Fields in which a run may be continued although it was started with others."""


def make_accelerator(config: TrainingConfig, out: Path) -> Accelerator:
    """Accelerate as `config` wants it; the environment chooses only the processes and their devices."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

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
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "tensorboard")),
    )


def prepare_folder(accelerator: Accelerator, config: TrainingConfig, out: Path, resolved: Any) -> None:
    """Check that a run in `out` is this one; clear what a killed process left; write config.yaml."""
    checkpoints, final = out / "checkpoints", out / "final"
    if complete_steps(checkpoints) or final.exists():
        if not config.resume:
            found = "checkpoints" if complete_steps(checkpoints) else "the finished model"
            raise ValueError(
                f"{out} holds {found} of an earlier run and training.resume is false: choose "
                "another `out`, continue it with training.resume=true, or delete that folder yourself"
            )
        refuse_other_run(out / "config.yaml", resolved)
    accelerator.wait_for_everyone()  # no process may read config.yaml after the main process wrote it
    if accelerator.is_main_process:
        checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        remove_leftovers(checkpoints)
        configuration.save(resolved, out / "config.yaml")
    accelerator.wait_for_everyone()


def refuse_other_run(path: Path, resolved: Any) -> None:
    """Raise ValueError naming the first field in which the run's configuration differs from `resolved`."""
    if not path.is_file():
        return
    before = dict(flatten(configuration.read_yaml(path)))
    now = dict(flatten(yaml.safe_load(configuration.to_yaml(resolved))))
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name, "absent"), now.get(name, "absent")
        if old != new and name not in MAY_CHANGE:
            raise ValueError(
                f"{path}: this run was started with {name} = {old}, and {name} = {new} is asked for now: "
                "choose another `out` for the new configuration, or continue with the old value"
            )


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested mappings."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def finished_steps(final: Path) -> int | None:
    """The number of steps after which the complete model in `final` was written; None without one."""
    try:
        return read_progress(final).step
    except (OSError, ValueError, KeyError, TypeError):
        return None
