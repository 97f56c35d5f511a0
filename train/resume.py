"""May a run be continued by a command that differs from the one that started it? A table, and what is kept of it.

Beside config.yaml a run keeps `identity.json`, what tells the data and models it stands on from others, and
`changes.jsonl`, a line for each time that it was continued in another way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from imgtok import config as configuration
from imgtok.cli import JOBS
from imgtok.config import ConfigError
from imgtok.data.sources import differing
from imgtok.runs import IDENTITY, checkpoint_path, complete_steps, read_progress
from imgtok.sections import completed
from imgtok.train.config import TrainingConfig
from imgtok.train.optim import rate_at
from imgtok.train.state import write_identity

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
        "training.validate_every",
        "training.validation_scores",
        "training.num_scored",
        "training.best",
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
        "training.num_validation",
        "training.validation_seed",
        "training.patience",
        "validation",
        "validation_text",
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
        "decoder_only",
        "training.mup_base_width",
        "training.freeze",
        "training.lora",
    ),
}
"""Fields of the training jobs, or sections of which all fields are meant that are not named themselves:

- free: they cannot change the weights, or only their last bits;
- recorded: they change how the run goes on, which the log and `changes.jsonl` say;
- same content: they name data or models, which may lie elsewhere, but must be the same;
- refused: they make another model, or train it on other data.
"""
PARTS = frozenset({"loss.l1", "loss.mse", "loss.adversarial", "repa.weight"})
"""Weights of losses. To or from 0 they take a loss away or bring one, which is refused."""
AT_THE_END = ("half", "model.sampling", "model.decoding")
"""What the finished model is written with: it is written again if they change."""
CONTENTS = {name: name for name in ("data", "vae", "tokenizer")}
CONTENTS |= dict.fromkeys(("tokens", "latents", "text"), "made_from")
"""Field or section -> the part of a run's identity that says whether its content is the same."""


OTHERS = {
    "names": "other names",
    "labels": "other labels or classes",
    "content": "other sizes or bytes of the files",
    "own_held_out": "another division: held out is a part of the data's own, or else a share of the images",
}
"""Part of the identity of data -> what it means that it differs, where its values say nothing to a reader."""


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
    unread: str = ""
    """Why this version cannot read its configuration."""

    @classmethod
    def read(cls, out: Path, resolved: Any) -> Previous | None:
        """None where nothing was started."""
        path = out / "config.yaml"
        if not path.is_file():
            return None
        data: Any = _as_now(configuration.read_yaml(path), resolved)
        known = out / IDENTITY
        identity = _fingerprints(out) | {name: data[name] for name in ("made_from",) if data.get(name)}
        identity |= json.loads(known.read_text(encoding="utf-8")) if known.is_file() else {}
        try:
            earlier = configuration.from_dict(type(resolved), data, str(path))
        except ConfigError as error:  # of another job, or of an earlier version in a way that nothing here knows of
            return cls(dict(flatten(data)), None, identity, str(error))
        values = configuration.to_dict(spelled_out(completed(earlier)))
        return cls(dict(flatten(values)), earlier.training, identity)


def _fingerprints(out: Path) -> dict[str, Any]:
    """The fingerprints in the run's newest `state.json`: all that runs had before there was identity.json."""
    checkpoints = out / "checkpoints"
    for folder in [*(checkpoint_path(checkpoints, step) for step in complete_steps(checkpoints)), out / "final"]:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            return dict(read_progress(folder).parts)
    return {}


def spelled_out(config: Any) -> Any:
    """A job's configuration with those sections spelled out that can say the same in several ways: what their
    `spelled_out` gives.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    ways = {name: value.spelled_out() for name, value in values.items() if hasattr(value, "spelled_out")}
    return dataclasses.replace(config, **ways) if ways else config


def _as_now(data: dict[str, Any], resolved: Any) -> dict[str, Any]:
    """The configuration of a run with the fields of its model where they are in this version: see `FORMER` there."""
    former: Mapping[str, str] = getattr(getattr(resolved, "model", None), "FORMER", {})
    model = data.get("model")
    if not isinstance(model, dict):
        return data
    moved: dict[str, Any] = {}
    for name, value in model.items():
        *sections, last = former.get(name, name).split(".")
        place = moved
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return data | {"model": moved}


def check(out: Path, previous: Previous, resolved: Any, identity: Mapping[str, Any]) -> list[Change]:
    """The recorded changes. Raises ValueError that names the first field in which `resolved` may not differ."""
    now = dict(flatten(configuration.to_dict(resolved)))
    identity = json.loads(json.dumps(dict(identity)))  # tuples have become lists
    data = getattr(resolved, "data", None)
    usual = configuration.defaults(data) if dataclasses.is_dataclass(data) else {}
    changes = list(_changes(previous.values, now))
    for change in changes:
        if change.name == "job":
            raise ValueError(_refusal(out / "config.yaml", change, previous.unread))
    _check_content(out, previous, now, identity, usual)
    recorded = []
    for change in changes:
        policy = policy_of(change.name)
        part = CONTENTS.get(change.name.split(".")[0], "")
        switched = change.name in PARTS and (not change.before or not change.now)
        if policy == "same content" and part in identity and part in previous.identity:
            logger.info("%s: %s, so far %s: the same content", change.name, shown(change.now), shown(change.before))
        elif policy in ("refused", "same content") or switched:
            raise ValueError(_refusal(out / "config.yaml", change, previous.unread))
        elif policy == "recorded":
            recorded.append(change)
    return recorded


def _refusal(path: Path, change: Change, unread: str) -> str:
    command = str(change.before).replace("-", " ") if change.name == "job" else ""
    if (command and command not in JOBS) or (unread and not command):
        unread = f"{path}: job = {change.before} is none of this version's" if command else unread
        return f"{unread}. Another version of imgtok started this run: go on with that one, or choose another `out`"
    remedy = f"go on by `imgtok {command}`" if command else "continue with the old value"
    return (
        f"{path}: this run was started with {change.name} = {shown(change.before)}, and {change.name} = "
        f"{shown(change.now)} is asked for now: choose another `out` for the new configuration, or {remedy}"
    )


def _check_content(
    out: Path, previous: Previous, now: Mapping[str, Any], identity: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    for part, mine in identity.items():
        difference = part in previous.identity and _difference(previous.identity[part], mine, defaults)
        if difference:
            fields = [name for name in now if CONTENTS.get(name.split(".")[0]) == part and now[name] is not None]
            places = [f"{name} = {now[name]}" for name in fields if "." not in name or name.endswith("path")]
            raise ValueError(
                f"{', '.join(places) or part}: not what the run in {out} was started with: {difference}. "
                "Choose another `out` for the new content, or give it the old one, wherever that lies now"
            )


def _difference(before: Any, now: Any, defaults: Mapping[str, Any]) -> str:
    """How two identities of the same part differ; "" if they do not."""
    if isinstance(before, dict) and isinstance(now, dict):
        return "; ".join(
            OTHERS.get(name) or f"{name}: {shown(old)} then, {shown(new)} now"
            for name, old, new in differing(before, now, defaults)
        )
    return "" if before == now else f"{before} then, {now} now"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """The fields that differ; a section that the other side does not have, as null, is one."""
    seen = set()
    for name in [*now, *(name for name in before if name not in now)]:
        parts = name.split(".")
        heads = (".".join(parts[:length]) for length in range(1, len(parts)))
        whole = next((head for head in heads if head in before or head in now), name)
        change = Change(whole, _at(before, whole), _at(now, whole))
        if whole not in seen and change.before != change.now:
            yield change
        seen.add(whole)


ABSENT = "absent"


def _at(values: Mapping[str, Any], name: str) -> Any:
    """A field, or the fields of a section; ABSENT if there is no such field."""
    if name in values:
        return values[name]
    return {key.removeprefix(f"{name}."): values[key] for key in values if key.startswith(f"{name}.")} or ABSENT


def shown(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {shown(item)}" for name, item in value.items()) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of nested mappings."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def record(out: Path, changes: Sequence[Change], step: int, previous: Previous, config: TrainingConfig) -> None:
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
    write_identity(out, identity)


def is_stale(final: Path, resolved: Any) -> bool:
    """Whether the finished model was written with other settings than are asked for now."""
    path = final / "config.yaml"
    if not path.is_file():
        return False
    before, now = dict(flatten(configuration.read_yaml(path))), dict(flatten(configuration.to_dict(resolved)))
    names = [name for name in now if any(name == end or name.startswith(f"{end}.") for end in AT_THE_END)]
    return any(now[name] != before.get(name, now[name]) for name in names)
