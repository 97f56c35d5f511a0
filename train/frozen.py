"""What is frozen while a model is trained: what `training.freeze` names, and with `decoder_only` all that encodes.

A frozen parameter needs no gradient. So it has none, AdamW keeps no moments for it, and the averaged weights
have it as it is (`imgtok.groups`, `imgtok.train.ema`).

With `decoder_only` the tokens (or latents) of every image stay what they were, to the bit. Which parameters only decode
the model's class says (`only_decodes`), and which fields of its configuration (`decodes_by`). A run that keeps to that
writes the fingerprints of the models that encode as it does into its identity, by which caches that were made with them
are still accepted.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from imgtok.config import did_you_mean
from imgtok.hub import Found, load
from imgtok.losses.reconstruction import ReconstructionLossConfig
from imgtok.runs import ENCODES_AS, IDENTITY, identity_in
from imgtok.tokenizers.base import Autoencoder, ImageModel
from imgtok.train.config import TrainingConfig
from imgtok.train.initialise import Init
from imgtok.train.resume import flatten

logger = logging.getLogger(__name__)


def freeze(model: nn.Module, training: TrainingConfig, loss: ReconstructionLossConfig | None = None) -> None:
    """Freeze the parameters that fit a pattern of `training.freeze`, and say how many these are.

    Raises ValueError for a pattern that fits no parameter, where nothing is left to train, and where `loss` measures
    gradients at a frozen layer.
    """
    if not training.freeze:
        return
    parameters = dict(model.named_parameters())
    for pattern in training.freeze:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            close = did_you_mean(pattern, [*parameters, *(f"{name}.*" for name, _ in model.named_modules() if name)])
            known = ", ".join(dict.fromkeys(f"{name.split('.')[0]}.*" if "." in name else name for name in parameters))
            raise ValueError(
                f"training.freeze: {pattern!r} fits no parameter of the model{close or '.'} Its parts are {known}"
            )
        for name in found:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(
            f"training.freeze: {', '.join(training.freeze)} leaves nothing to train: all {len(parameters)} tensors of "
            "the model would be frozen; name fewer of them"
        )
    measured = loss is not None and loss.adversarial and loss.adaptive == "last_layer"
    if measured and not getattr(_last_layer(model), "requires_grad", True):
        raise ValueError(
            "loss.adaptive: last_layer measures gradients at the layer that gives the images, which training.freeze "
            "holds still; choose loss.adaptive=images, or let that layer train"
        )
    say_what_trains(model, f"training.freeze={','.join(training.freeze)}")


def _last_layer(model: nn.Module) -> Any:
    """The weight that gives the images; None of a model that decodes none while it is trained."""
    with contextlib.suppress(NotImplementedError):
        return getattr(model, "last_layer", None)
    return None


def say_what_trains(model: nn.Module, setting: str) -> None:
    """One line in the log: how many parameters a setting lets train, and how many are frozen."""
    counts = {True: [0, 0], False: [0, 0]}
    for parameter in model.parameters():
        counts[parameter.requires_grad][0] += parameter.numel()
        counts[parameter.requires_grad][1] += 1
    (trains, tensors), (still, others) = counts[True], counts[False]
    logger.info(
        "%s: %s parameters train (%s tensors), %s are frozen (%s tensors)",
        setting, f"{trains:,}", f"{tensors:,}", f"{still:,}", f"{others:,}",
    )  # fmt: skip


# ---------------------------------------------------------------- decoder-only fine-tuning


def check_decoder_only(config: Any) -> None:
    """Raise ValueError for settings of a job that do not go with `decoder_only`."""
    if not config.decoder_only:
        return
    if config.init is None:
        raise ValueError("decoder_only: there is no encoder to keep; name the model to start from with init=MODEL")
    if config.half:
        raise ValueError(
            "half: float16 would round the weights that encode, and decoder_only keeps them to the bit; leave one out"
        )
    for name in ("vae", "vae_scaling_factor"):
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"{name}: with decoder_only the model keeps the autoencoder that it encodes with; leave {name} out"
            )


def train_decoder_only(model: ImageModel, init: Init | None, fresh: Iterable[str]) -> None:
    """Freeze all of a model but what only decodes.

    `fresh` are the names of the tensors that do not come from `init`. Raises ValueError for a model in which nothing
    only decodes, and for what would change its tokens: another configuration than that of `init`, a fresh tensor.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decodes = {name for name in parameters if not model.encodes_with(name)}
    if not decodes:
        below = getattr(model, "stands_on", None)
        remedy = f"; train that of its autoencoder: `imgtok train autoencoder init={below} decoder_only=true`"
        raise ValueError(
            f"decoder_only: a {type(model).__name__} has no decoder of its own that is trained{remedy if below else ''}"
        )
    if init is not None and init.weights is not None:  # of a run with checkpoints, `imgtok.train.resume` compares
        _check_same_encoding(model, init.config, init.weights)
    moved = [name for name in fresh if model.encodes_with(name)]
    if moved:
        raise ValueError(
            f"decoder_only: {moved[0]} has a part in encoding, and would start afresh; let init_new name what only "
            f"decodes: {', '.join(model.only_decodes)}"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in decodes)
    say_what_trains(model, "decoder_only=true")


def _check_same_encoding(model: ImageModel, start: Any, found: Found) -> None:
    """Raise ValueError for a field of the configuration that has a part in encoding, and another value than there."""
    before, now = (dict(flatten(model.encoding_fields(config))) for config in (start, model.config))
    for name in dict.fromkeys([*now, *before]):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"decoder_only: model.{name} has a part in encoding: it is {before.get(name)} in {found.path} and "
                f"{now.get(name)} here; leave model.{name} out, or decoder_only"
            )


def encodes_as(init: Init | None, out: Path) -> list[str]:
    """For the identity of a `decoder_only` run: the fingerprints, as caches have them, of the model that it starts from
    and of those that this one encodes as. A run that goes on has them already.
    """
    found = None if init is None else init.weights
    return (
        list(identity_in(out / IDENTITY).get(ENCODES_AS, []))
        if found is None
        else [cached_by(found), *found.encodes_as]
    )


def cached_by(found: Found) -> str:
    """The fingerprint that a cache of a model's tokens or latents carries."""
    if issubclass(found.model_class, Autoencoder):
        autoencoder: Autoencoder = load(found)
        return autoencoder.fingerprint()
    return found.fingerprint()
