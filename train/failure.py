"""A loss that is not finite: keep what is needed to look into it, and stop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from imgtok import config as configuration


class NonFiniteLoss(ValueError):  # noqa: N818
    """The loss or its gradient became NaN or infinite; the message names step, values, images and folder."""


def save_failure(
    folder: Path,
    model: nn.Module,
    batches: Sequence[Any],
    names: Sequence[Sequence[str]],
    facts: dict[str, Any],
    resolved: Any,
) -> None:
    """Write the step's micro-batches, the weights that met them, the configuration, and `facts` as JSON."""
    from safetensors.torch import save_file, save_model

    folder.mkdir(parents=True, exist_ok=True)
    for micro, batch in enumerate(batches):
        save_file(tensors_of(batch), folder / f"batch_{micro}.safetensors")
    named = {f"batch_{micro}": list(those) for micro, those in enumerate(names)}
    (folder / "names.json").write_text(json.dumps(named, indent=1))
    (folder / "failure.json").write_text(json.dumps(facts, indent=1))
    configuration.save(resolved, folder / "config.yaml")
    save_model(model, str(folder / "model.safetensors"))


def tensors_of(batch: Any) -> dict[str, Tensor]:
    """The tensors among the fields of a batch and of its parts, on the CPU, by (dotted) field name."""
    if dataclasses.is_dataclass(batch):
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    else:
        fields = vars(batch)
    found = {name: value.detach().cpu().clone() for name, value in fields.items() if isinstance(value, Tensor)}
    for name, value in fields.items():
        if dataclasses.is_dataclass(value):
            found |= {f"{name}.{inner}": tensor for inner, tensor in tensors_of(value).items()}
    return found


def explain(values: dict[str, float], step: int, names: Sequence[str], folder: Path) -> str:
    """The message of `NonFiniteLoss`."""
    numbers = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
    some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (
        f"step {step}: the loss or its gradient is not finite ({numbers}) for the batch of {some}. "
        f"Batch, weights, configuration and seed are in {folder}. Earlier checkpoints are intact; lower "
        "training.learning_rate, set training.clip, or use training.precision=fp32, then start again"
    )
