"""What a run keeps on disk and how it comes back: checkpoints and the finished model.

A checkpoint is written to `.tmp-step_0001000/`, flushed, and renamed to `step_0001000/`: a folder under its
final name is complete, whatever killed the process. It holds what `accelerator.save_state` writes, the EMA,
the resolved configuration, `identity.json`, and `state.json` with the size of every file. Nothing is registered with
`accelerator.register_for_checkpointing`, since Accelerate unpickles such files without `weights_only`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from imgtok import config as configuration
from imgtok.files import replacing
from imgtok.runs import AVERAGED, CONFIG, IDENTITY, STATE, Progress, checkpoint_path, complete_steps, read_progress
from imgtok.train.ema import EMA

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------ checkpoints


class Checkpoints:
    """The folder `checkpoints/` of a run. Every method is called by all processes alike."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, ema: EMA, folder: Path, keep: int) -> None:
        self.accelerator, self.ema, self.folder, self.keep = accelerator, ema, folder, keep

        # The bare model, without the names that DDP puts in front: any number of processes can read it.
        def bare_weights(_: list[nn.Module], weights: list[dict[str, Tensor]], __: str) -> None:
            weights[:] = [model.state_dict()]

        def bare_models(models: list[nn.Module], _: str) -> None:
            models[:] = [model]

        accelerator.register_save_state_pre_hook(bare_weights)
        accelerator.register_load_state_pre_hook(bare_models)

    def save(self, progress: Progress, resolved: Any, identity: Mapping[str, Any]) -> None:
        """Write a checkpoint, then delete those beyond `keep`. A full disk leaves the earlier ones intact."""
        temporary = self.folder / f".tmp-step_{progress.step:07d}"
        target = checkpoint_path(self.folder, progress.step)
        with writing(temporary, self.accelerator):
            self.accelerator.save_state(str(temporary))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                if self.ema.live:
                    self.ema.save(temporary / AVERAGED)
                publish(temporary, target, progress, resolved, identity)
                self._delete_old(progress.step)
        self.accelerator.wait_for_everyone()

    def _delete_old(self, newest: int) -> None:
        steps = [step for step in complete_steps(self.folder) if step <= newest]
        for step in steps[self.keep :]:
            doomed = self.folder / f".tmp-old-step_{step:07d}"  # a half-deleted one must not look complete
            checkpoint_path(self.folder, step).rename(doomed)
            shutil.rmtree(doomed)

    def load(self) -> Progress:
        """Continue from the newest checkpoint that can be read; a fresh `Progress` where there is none.

        A damaged one is passed over with a warning and set aside as `step_0001000.damaged`. Raises
        ValueError if there are checkpoints and none of them can be read.
        """
        damaged: list[str] = []
        for step in complete_steps(self.folder):
            path = checkpoint_path(self.folder, step)
            progress, reason = self._try(path)
            if progress is not None:
                self._set_aside(damaged, step)
                return progress
            damaged.append(f"{path}: {reason}")
        if damaged:
            raise ValueError(
                "no checkpoint of this run can be read; choose another `out` to start afresh:\n" + "\n".join(damaged)
            )
        return Progress(processes=self.accelerator.num_processes)

    def _try(self, path: Path) -> tuple[Progress | None, str]:
        """Read one checkpoint; None, and why, unless every process could."""
        progress, reason = None, "another process could not read it"
        try:
            progress = self._read(path)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the damage makes of safetensors, torch or json
            reason = str(error)
        read = torch.tensor([progress is not None], device=self.accelerator.device)
        return (progress if self.accelerator.gather(read).all() else None), reason

    def _read(self, path: Path) -> Progress:
        progress = read_progress(path)
        self.accelerator.step = 0
        scaler = self.accelerator.scaler
        if not (path / "scaler.pt").exists():  # so far in another precision than fp16
            self.accelerator.scaler = None
        try:
            self.accelerator.load_state(str(path))
        finally:
            self.accelerator.scaler = scaler
        # Accelerate only notes that it could not read the random states, then its own counter stays at 0
        if self.accelerator.step == 0 and progress.processes == self.accelerator.num_processes:
            raise ValueError("the random states cannot be read")
        average = path / AVERAGED
        if not average.exists():  # none was kept so far; that no file is missing, `read_progress` has seen
            self.ema.restart()
        elif self.ema.live:
            self.ema.load(average)
        return progress

    def _set_aside(self, damaged: list[str], good: int) -> None:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        for reason in damaged:
            logger.warning("damaged checkpoint passed over, continuing from step %d: %s", good, reason)
        for step in complete_steps(self.folder):
            if step > good:
                path = checkpoint_path(self.folder, step)
                shutil.rmtree(f"{path}.damaged", ignore_errors=True)
                path.rename(f"{path}.damaged")


# ---------------------------------------------------------------------------------- whole folders, safely


def publish(temporary: Path, target: Path, progress: Progress, resolved: Any, identity: Mapping[str, Any]) -> None:
    """Add config.yaml, state.json and identity.json to `temporary`, flush it to the disk and rename it to
    `target`.

    The identity goes along so that a copy of the folder still tells the images that it was trained on from others.
    """
    configuration.save(resolved, temporary / CONFIG)
    write_identity(temporary, identity)
    files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(temporary).as_posix(): path.stat().st_size for path in files}
    state = temporary / STATE
    state.write_text(json.dumps({**dataclasses.asdict(progress), "files": sizes}, indent=1))
    for path in [*files, state, *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        _flush(path)
    aside = target.parent / f".tmp-old-{target.name}"
    if target.exists():
        target.rename(aside)
    temporary.rename(target)
    _flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write identity.json, or nothing for an empty one; an existing file is replaced in one step."""
    if identity:
        with replacing(folder / IDENTITY) as temporary:
            temporary.write_text(json.dumps(dict(identity), indent=1), encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process left half written in `folder`."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


@contextlib.contextmanager
def writing(temporary: Path, accelerator: Accelerator) -> Iterator[None]:
    """Make the empty folder `temporary` for the block to fill; if the block fails, delete it.

    A full disk is reported as an OSError that names the folder and what to do.
    """
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        yield
    except BaseException as error:
        full = isinstance(error, Exception) and _disk_full(error, temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        if full:
            target = temporary.with_name(temporary.name.removeprefix(".tmp-"))
            message = (
                f"the disk is full: could not write {target}. "
                "What was saved before is intact. Free some space on that disk and start the same command "
                "again (it continues from the newest checkpoint), or keep fewer with training.keep"
            )
            raise OSError(errno.ENOSPC, message) from error
        raise


def _disk_full(error: BaseException | None, folder: Path) -> bool:
    """Only Python's own files raise ENOSPC; safetensors says it in words, torch not at all."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    existing = folder if folder.exists() else folder.parent
    return shutil.disk_usage(existing).free < 2**16


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
