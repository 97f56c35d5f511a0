"""`imgtok merge`: a model moved away from a copy of it that was trained on its own samples (Neon, arXiv:2510.03597).

Training on what a model draws with its usual sampler makes it worse, in about the direction opposite to the one that
would make it better, if the sampler prefers what the model finds likely (guidance, top-k, a low temperature, few
steps). So the weights go the other way; neither real data nor another sampler is needed. docs/neon.md has the steps.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import imgtok
from imgtok import announce
from imgtok.cli import run_job
from imgtok.config import check, to_dict
from imgtok.files import replacing
from imgtok.hub import Found, load, resolve
from imgtok.runs import ENCODES_AS, IDENTITY, TRAINED_WHOLE, identity_in
from imgtok.sample.export import own_decoder, write_ours

logger = logging.getLogger(__name__)

POSITIONAL = "base"
RECORD = "merged.json"
"""Beside the model: of which two models it was made, and how."""
FREE = ("sampling", "decoding")
"""Sections of a configuration that say nothing of the weights."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes the model with the weights base + w (base - tuned), as the averaged ones of both, and a generator with the
    decoder of `base`; `merged.json` and the model card say of what it was made.
    """

    job: Literal["merge"] = "merge"
    """Which program this file is for."""
    base: str
    """Any name of the model to make better, a generator or a tokenizer: a run, a folder, a Hub name, or a file of
    published weights. Of a training checkpoint the averaged weights are taken."""
    tuned: str
    """Any name of the same model after a short training that started from `base` and saw only what it draws."""
    w: tuple[float, ...] = (1.0,)
    """How far to go, in units of the way from `tuned` to `base`: 0 gives base, -1 gives tuned. Of several, `w=0.5,1`,
    each has a folder of its own in `out`, `w0.5` and `w1`."""
    out: Path
    """Folder of the new model. One that holds the same model is replaced, one with another is not."""

    def __post_init__(self) -> None:
        check(self)
        if not self.w:
            raise ValueError("w: none given, must be one or more numbers, such as 1 or 0.5,1,1.5")


def main(config: Config) -> None:
    """Writes the folder `out`, or one inside it for each of several `w`."""
    base, tuned = resolve(config.base), resolve(config.tuned)
    announce.begins("merge", base=base.in_words, tuned=tuned.in_words, w=in_words(config.w), out=config.out)
    model, other = load(base), load(tuned)
    refuse_others(base, tuned, model, other)
    assert isinstance(model, nn.Module), "every model is one"
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    way = displacement(start, other)
    logger.info("%s lies %.3g of the norm of its weights away from %s", tuned.name, way, base.name)
    decoder = own_decoder(base, model, config.out)
    folders = folders_of(config)
    for w, folder in folders.items():
        move(model, start, other, w)
        write_ours(folder, base, model, decoder)
        forget_encoding(folder)
        write_record(folder, base, tuned, w, way)
    announce.ends(*folders.values())


def extrapolated(base: Tensor, tuned: Tensor, w: float) -> Tensor:
    """Weights base + w (base - tuned), of two tensors of floating-point numbers, in the type of `base`.

    What did not move stays to the bit. The sum is taken in float64, so that w = -1 gives `tuned` and nothing near it.
    """
    start = base.double()
    return (start + w * (start - tuned.double())).to(base.dtype)


@torch.no_grad()
def move(model: nn.Module, start: Mapping[str, Tensor], tuned: nn.Module, w: float) -> None:
    """Give the parameters of `model`, which were `start`, the weights that w leads to. Its buffers stay: tables such as
    a mask of attention hold infinities, of which a difference is no number.
    """
    others = dict(tuned.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.copy_(extrapolated(start[name], others[name], w))


@torch.no_grad()
def displacement(start: Mapping[str, Tensor], tuned: nn.Module) -> float:
    """The norm of what training changed, over the norm of the weights that it could change."""
    others = dict(tuned.named_parameters())
    moved = sum(float((value.double() - others[name].double()).square().sum()) for name, value in start.items())
    size = sum(float(value.double().square().sum()) for name, value in start.items() if others[name].requires_grad)
    return math.sqrt(moved / size) if size else 0.0


def refuse_others(base: Found, tuned: Found, model: Any, other: Any) -> None:
    """Raises ValueError unless the second of two models can have come from the first by training: it names each tensor
    that is missing, too many or of another shape, that is not trained and differs, or that is no number.
    """
    if base.kind != tuned.kind:
        raise ValueError(
            f"tuned: {tuned.path} holds a model of kind {tuned.kind!r}, and base one of kind {base.kind!r}; name a "
            "copy of base that was trained further, with init=MODEL"
        )
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    problems = [f"missing: {name} {tuple(ours[name].shape)}" for name in ours if name not in theirs]
    problems += [f"too many: {name} {tuple(theirs[name].shape)}" for name in theirs if name not in ours]
    for name in (name for name in ours if name in theirs):
        mine, its = ours[name], theirs[name]
        if mine.shape != its.shape:
            problems.append(f"another shape: {name} is {tuple(its.shape)} there and {tuple(mine.shape)} in base")
        elif not (mine.isfinite().all() and its.isfinite().all()):
            problems.append(f"not all are finite numbers: {name}")
        elif not mine.requires_grad and not torch.equal(mine, its):
            problems.append(f"not trained, and yet different: {name}")
    if problems:
        title = f"tuned: {tuned.path} is no copy of {base.path} that was trained further:"
        raise ValueError("\n  ".join([title, *problems]))
    if all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise ValueError(
            f"tuned: {tuned.path} has the weights of {base.path}, so there is no direction to go in; train a copy of "
            "base on what it draws, as docs/neon.md says"
        )
    different = [name for name, value in settings(model).items() if settings(other).get(name) != value]
    if different:
        logger.warning("%s and %s differ in %s; those of base are kept", base.name, tuned.name, ", ".join(different))


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model, less what says how it is sampled."""
    return {name: value for name, value in to_dict(model.config).items() if name not in FREE}


def in_words(values: tuple[float, ...]) -> str:
    """`0.5, 1`."""
    return ", ".join(f"{value:g}" for value in values)


def folders_of(config: Config) -> dict[float, Path]:
    """The folder of each w."""
    if len(config.w) == 1:
        return {config.w[0]: config.out}
    return {w: config.out / f"w{w:g}" for w in config.w}


def forget_encoding(folder: Path) -> None:
    """Takes out of a folder's record what base alone could say of itself: which tokenizers give the same tokens."""
    path = folder / IDENTITY
    told = identity_in(path)
    kept = {name: value for name, value in told.items() if name not in (ENCODES_AS, TRAINED_WHOLE)}
    if kept != told:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def write_record(folder: Path, base: Found, tuned: Found, w: float, way: float) -> None:
    """Writes of what the model in a folder was made, for programs and, in the model card, for people."""
    record = {
        "w": w,
        "displacement": way,
        "base": base.about(),
        "tuned": tuned.about(),
        "imgtok_version": imgtok.__version__,
    }
    with replacing(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    card = folder / "README.md"
    said = (
        f"\nMerged by `imgtok merge` (Neon, arXiv:2510.03597): base + {w:g} (base - tuned), base {base.name} "
        f"({base.fingerprint()}), tuned {tuned.name} ({tuned.fingerprint()}); see `{RECORD}`.\n"
    )
    text = card.read_text(encoding="utf-8")
    if said not in text:
        with replacing(card) as temporary:
            temporary.write_text(text.rstrip("\n") + "\n" + said, encoding="utf-8")


if __name__ == "__main__":
    run_job(sys.modules[__name__])
