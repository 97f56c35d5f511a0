"""What a training run leaves on disk, as far as reading it goes: the run as a model, its checkpoints, how far it was.

`imgtok.train.state` writes these folders. Nothing here needs torch, so that a wrong path is refused at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FINAL, CHECKPOINTS, BEST = "final", "checkpoints", "best"
"""Folders of a run: the finished model; the checkpoints, `step_0001000` and so on; and with `training.best` the model
that did best in a validation."""
CONFIG, STATE = "config.yaml", "state.json"
"""In each checkpoint and in `final`: the whole configuration of the run, and `Progress` with the size of every file."""
MORE_IS_BETTER = ("psnr", "oracle", "codebook")
"""How the names of a run's figures begin of which more is better; of losses and distances less is."""
IDENTITY = "identity.json"
"""In a run's folder, in each checkpoint and in `final`: what tells the run's data and the models that it stands on from
others."""
ENCODES_AS = "encodes_as"
"""Entry of an identity: the fingerprints of other models whose tokens, or latents, are also this one's, since only its
decoder was trained after them (`decoder_only`)."""
TRAINED_WHOLE = "trained_whole"
"""Entry of an identity: the names of the parameters that are trained as they are, beside adapters (`training.lora`)."""
WEIGHTS, AVERAGED = "model.safetensors", "ema.safetensors"
"""In each checkpoint: all tensors of what is trained, which may be more than the model; and the averaged ones of these,
where the run keeps an average."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run had come when a folder was written."""

    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Training time so far, over all restarts."""
    processes: int = 1
    """Number of processes that trained."""
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What the run stands on, such as a generator's tokenizer: the field of the configuration that names it -> its
    fingerprint."""


def complete_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, newest first."""
    paths = folder.glob("step_*") if folder.is_dir() else []
    return sorted((int(path.name[5:]) for path in paths if path.name[5:].isdigit()), reverse=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    """The checkpoint of a step in the folder `checkpoints`."""
    return folder / f"step_{step:07d}"


def read_progress(folder: Path) -> Progress:
    """`state.json` of a checkpoint or of `final/`; raises ValueError if a file there has lost bytes."""
    state = json.loads((folder / STATE).read_text())
    for name, size in state.pop("files").items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ValueError(f"{name} should have {size} bytes and has {'none' if found is None else found}")
    return Progress(**state)


def identity_path(folder: Path) -> Path | None:
    """The identity of the run that a model comes from; None where none was kept with it.

    A model has its own. Runs of earlier versions kept one alone, in the folder of the run: it counts for the models in
    the places of such a run, not for others that lie there.
    """
    places = [folder]
    if folder.name == FINAL:
        places.append(folder.parent)
    if folder.name.startswith("step_") and folder.parent.name == CHECKPOINTS:
        places.append(folder.parent.parent)
    return next((place / IDENTITY for place in places if (place / IDENTITY).is_file()), None)


def identity_in(path: Path | None) -> dict[str, Any]:
    """What an identity.json says; nothing where there is none, or a file that cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        told = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
        return told if isinstance(told, dict) else {}
    return {}


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, and not a model that stands for itself, as `final` is."""
    return all((folder / name).is_file() for name in (CONFIG, STATE)) and not (folder / "config.json").exists()


def follow(folder: Path) -> Path:
    """The folder of one model that `folder` leads to.

    Of a run that is its `final/`, or else the newest checkpoint that is whole; of the folder `checkpoints` the newest
    one; any other folder itself. Raises FileNotFoundError for a run that has no checkpoint yet, ValueError if none of
    its checkpoints is whole.
    """
    if (folder / "config.json").exists() or is_checkpoint(folder):
        return folder
    inside = folder / CHECKPOINTS
    if (folder / FINAL / "config.json").is_file() and (inside.is_dir() or (folder / CONFIG).is_file()):
        steps = complete_steps(inside)
        if steps and steps[0] > (step_of(folder / FINAL) or steps[0]):
            logger.info("%s: took the finished model; it has a newer checkpoint, step %d", folder, steps[0])
        return folder / FINAL
    if complete_steps(folder):
        return newest(folder)
    if inside.is_dir():
        if complete_steps(inside):
            return newest(inside)
        raise FileNotFoundError(
            f"{folder} is a training run that has no checkpoint yet; wait for the first (training.save_every)"
        )
    return folder


def newest(folder: Path) -> Path:
    """The newest checkpoint in `folder` that is whole. Raises ValueError, with what is wrong, if none is."""
    damaged = []
    for step in complete_steps(folder):
        path = checkpoint_path(folder, step)
        try:
            read_progress(path)
        except (OSError, ValueError, LookupError, TypeError) as error:
            damaged.append(f"{path}: {error}")
            continue
        for reason in damaged:
            logger.warning("damaged checkpoint passed over, taking step %d: %s", step, reason)
        return path
    raise ValueError("no checkpoint of this run can be read:\n  " + "\n  ".join(damaged))


def step_of(folder: Path) -> int | None:
    """The training steps after which a checkpoint or a finished model was written; None where that is not known, or a
    file there has lost bytes.
    """
    try:
        return read_progress(folder).step
    except (OSError, ValueError, LookupError, TypeError):
        return None
