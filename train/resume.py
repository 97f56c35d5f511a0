"""May a run be continued by a command that differs from the one that started it? A table, and what is kept of it.

Beside config.yaml a run keeps `identity.json`, what tells the data and models it stands on from others, and
`changes.jsonl`, a line for each time that it was continued in another way.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from imgtok import config as configuration
from imgtok.config import ConfigError
from imgtok.files import replacing
from imgtok.sections import Section
from imgtok.train.config import TrainingConfig
from imgtok.train.optim import rate_at

logger = logging.getLogger(__name__)

Policy = Literal["free", "recorded", "same content", "refused"]
POLICIES: dict[Policy, tuple[str, ...]] = {
    "free": (
        "out",
        "half",
        "num_preview",
        "checkpoint_activations",
        "sampling",
        "decoding",
        "model.sampling",
        "model.decoding",
        "loss.lpips_backbone",
        "loss.lpips_heads",
        "loss.lite0_weights",
        "repa.weights",
        "training.threads",
        "training.num_workers",
        "training.log_every",
        "training.preview_every",
        "training.save_every",
        "training.save_minutes",
        "training.keep",
        "training.resume",
        "training.trackers",
    ),
    "recorded": (
        "training.steps",
        "training.batch_size",
        "training.accumulate",
        "training.learning_rate",
        "training.warmup",
        "training.schedule",
        "training.final_rate",
        "training.decay_from",
        "training.betas",
        "training.weight_decay",
        "training.clip",
        "training.precision",
        "training.compile",
        "training.ema",
        "training.ema_warmup",
        "training.seed",
        "loss.l1",
        "loss.mse",
        "loss.lpips",
        "loss.perceptual_weight",
        "loss.adversarial",
        "loss.adversarial_start",
        "loss.discriminator_rate",
        "loss.discriminator_decay",
        "loss.discriminator_every",
        "repa.weight",
    ),
    "same content": ("data", "vae", "tokens", "latents", "text", "tokenizer", "made_from"),
    "refused": (
        "job",
        "model",
        "init",
        "init_new",
        "init_drop",
        "image_size",
        "flip",
        "crop",
        "held_out",
        "vae_scaling_factor",
        "share_digits",
        "loss",
        "repa",
        "training.mup_base_width",
    ),
}
"""Fields of the training jobs, or sections of which all fields are meant that are not named themselves:

- free: they cannot change the weights, or only their last bits;
- recorded: they change how the run goes on, which the log and `changes.jsonl` say;
- same content: they name data or models, which may lie elsewhere, but must be the same;
- refused: they make another model, or train it on other data.
"""
PARTS = frozenset({"loss.l1", "loss.mse", "loss.lpips", "loss.adversarial", "repa.weight"})
"""Weights of losses. To or from 0 they take a loss away or bring one, which is refused."""
AT_THE_END = ("half", "model.sampling", "model.decoding")
"""What the finished model is written with: it is written again if they change."""
CONTENTS = {"data": "data", "vae": "vae"} | dict.fromkeys(("tokens", "latents", "text", "tokenizer"), "made_from")
"""Field or section -> the part of a run's identity that says whether its content is the same."""


def policy_of(name: str) -> Policy:
    """What holds for a field, by its dotted name: the longest entry of POLICIES that it is or lies in, or refused."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for policy, names in POLICIES.items():
            if ".".join(parts[:length]) in names:
                return policy
    return "refused"


class Change(NamedTuple):
    """A field that differs from that of the run so far."""

    name: str
    before: Any
    now: Any


class Previous(NamedTuple):
    """What a run folder says about the run in it."""

    values: dict[str, Any]
    """Fields of its configuration, by dotted names, as YAML has them; those that its version lacked at their
    defaults."""
    training: TrainingConfig | None
    identity: dict[str, Any]
    """Part -> what tells it from others; a run of an earlier version has none."""

    @classmethod
    def read(cls, out: Path, resolved: Any) -> Previous | None:
        """None where nothing was started."""
        path = out / "config.yaml"
        if not path.is_file():
            return None
        data: Any = configuration.read_yaml(path)
        defaults, training = dict[str, Any](), None
        try:
            defaults, training = _completed(type(resolved), data)
        except ConfigError:  # written by an earlier version
            logger.debug("%s cannot be completed", path, exc_info=True)
        known = out / "identity.json"
        identity = {name: data[name] for name in ("made_from",) if data.get(name)}
        identity |= json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
        return cls(dict(flatten(defaults)) | dict(flatten(data)), training, identity)


def _completed(kind: Any, data: dict[str, Any]) -> tuple[dict[str, Any], TrainingConfig]:
    """A configuration with all its defaults, in plain data."""
    config = configuration.from_dict(kind, data)
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    sections = {name: value.complete() for name, value in values.items() if isinstance(value, Section)}
    return configuration.to_dict(dataclasses.replace(config, **sections)), config.training


def check(out: Path, previous: Previous, resolved: Any, identity: Mapping[str, Any]) -> list[Change]:
    """The recorded changes. Raises ValueError that names the first field in which `resolved` may not differ."""
    now = dict(flatten(configuration.to_dict(resolved)))
    identity = json.loads(json.dumps(dict(identity)))  # tuples have become lists
    _check_content(out, previous, now, identity)
    recorded = []
    for change in _changes(previous.values, now):
        policy = policy_of(change.name)
        part = CONTENTS.get(change.name.split(".")[0])
        switched = change.name in PARTS and (not change.before or not change.now)
        if policy == "same content" and part in identity and part in previous.identity:
            logger.info("%s: %s, so far %s: the same content", *_shown(change))
        elif policy in ("refused", "same content") or switched:
            raise ValueError(
                f"{out / 'config.yaml'}: this run was started with {change.name} = {change.before}, and {change.name} "
                f"= {change.now} is asked for now: choose another `out` for the new configuration, or continue with "
                "the old value"
            )
        elif policy == "recorded":
            recorded.append(change)
    return recorded


def _check_content(out: Path, previous: Previous, now: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    for part, mine in identity.items():
        if (known := previous.identity.get(part, mine)) != mine:
            fields = [name for name in now if CONTENTS.get(name.split(".")[0]) == part and now[name] is not None]
            places = [f"{name} = {now[name]}" for name in fields if "." not in name or name.endswith("path")]
            difference = _difference(known, mine)
            raise ValueError(
                f"{', '.join(places) or part}: not what the run in {out} was started with: {difference}. "
                "Choose another `out` for the new content, or give it the old one, wherever that lies now"
            )


def _difference(before: Any, now: Any) -> str:
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return f"{before} then, {now} now"
    names = [name for name in before | now if before.get(name) != now.get(name)]
    return "; ".join(f"{name}: {before.get(name, 'absent')} then, {now.get(name, 'absent')} now" for name in names)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    for name in [*now, *(name for name in before if name not in now)]:
        change = Change(name, before.get(name, "absent"), now.get(name, "absent"))
        if change.before != change.now:
            yield change


def _shown(change: Change) -> tuple[Any, Any, Any]:
    return change.name, change.now, change.before


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested mappings."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def record(out: Path, changes: list[Change], step: int, previous: Previous, config: TrainingConfig) -> None:
    """Log how the run goes on after `step` steps, and add a line to changes.jsonl."""
    for change in changes:
        logger.warning("%s: %s from step %d on, so far %s", change.name, change.now, step, change.before)
    line: dict[str, Any] = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    line["changes"] = {change.name: [change.before, change.now] for change in changes}
    if previous.training is not None and 0 < step < config.steps:
        old, new = previous.training, rate_at(step, config)
        line["learning_rate"] = rate_at(step - 1, old), new
        if new != rate_at(min(step, old.steps - 1), old):
            logger.warning(
                "the learning rate was %.3g in the last step and is %.3g in the next", *line["learning_rate"]
            )
        if previous.training.steps != config.steps and config.schedule != "constant":
            logger.warning(
                "the schedule is that of a run of %d steps; training.schedule=constant training.learning_rate=RATE "
                "goes on with one rate", config.steps,
            )  # fmt: skip
    with (out / "changes.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def write(out: Path, resolved: Any, identity: Mapping[str, Any]) -> None:
    """Write config.yaml and identity.json."""
    configuration.save(resolved, out / "config.yaml")
    if identity:
        with replacing(out / "identity.json") as temporary:
            temporary.write_text(json.dumps(dict(identity), indent=1), encoding="utf-8")


def is_stale(final: Path, resolved: Any) -> bool:
    """Whether the finished model was written with other settings than are asked for now."""
    path = final / "config.yaml"
    if not path.is_file():
        return False
    before, now = dict(flatten(configuration.read_yaml(path))), dict(flatten(configuration.to_dict(resolved)))
    names = [name for name in now if any(name == end or name.startswith(f"{end}.") for end in AT_THE_END)]
    return any(now[name] != before.get(name, now[name]) for name in names)
