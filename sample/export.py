"""`imgtok export`: a model from its published layout into ours, and from ours into the published one."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from imgtok.cli import run_job
from imgtok.config import PositiveFloat, check
from imgtok.generators.conditioning import ConditionalGenerator
from imgtok.hub import KINDS, load, resolve, writers
from imgtok.tokenizers.base import Autoencoder

logger = logging.getLogger(__name__)

POSITIONAL = "model"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes a model, of either layout, in the layout that is asked for; its numbers stay as they are."""

    job: Literal["export"] = "export"
    """Which program this file is for."""
    model: str
    """Any name of a model: a folder, Hub name, or lone file of published weights."""
    out: Path
    """Folder of the new config.json and weights, which are replaced; for a model that is published as a lone file, that
    file (.pth or .safetensors)."""
    layout: Literal["imgtok", "published"] = "published"
    """Whose: "imgtok" as every program here reads it, "published" as the code that the model was published with."""
    vae: str | None = None
    """Autoencoder that goes into the folder of a generator of latents as `tokenizer/`, where `imgtok sample` finds
    it: a folder, Hub name or file such as kl16.ckpt."""
    vae_scaling_factor: PositiveFloat | None = None
    """Factor on the autoencoder's latents; null takes its own."""
    raw: bool = False
    """Takes the trained weights and not the averaged ones of a training checkpoint."""
    revision: str | None = None
    """Commit, branch or tag of a Hub repository; null takes the newest."""

    def __post_init__(self) -> None:
        check(self)
        if self.vae is not None and self.layout == "published":
            raise ValueError("vae: the published layout has no place for an autoencoder; leave it out")


def main(config: Config) -> None:
    """Writes the folder or file `out`."""
    model = load(config.model, revision=config.revision, raw=config.raw)
    if config.vae is not None:
        add_autoencoder(model, open_autoencoder(config.vae, config.vae_scaling_factor), config.out / "tokenizer")
    if config.layout == "imgtok":
        model.save_pretrained(config.out)
    else:
        writer_of(model).save(model, config.out)
    logger.info("wrote %s in the layout %s", config.out, config.layout)


def writer_of(model: Any) -> Any:
    """The module that writes such a model for the code that its like was published with. Raises ValueError."""
    found = writers(model.config.kind)
    if not found:
        known = ", ".join(kind for kind in KINDS if writers(kind))
        raise ValueError(
            f"a {type(model).__name__} (kind {model.config.kind!r}) cannot be written in a published layout; that is "
            f"known for models of kind {known}"
        )
    return next(iter(found.values()))


def open_autoencoder(name: str, scaling_factor: float | None) -> Autoencoder:
    """By any of its names. Raises ValueError for anything else."""
    model: Autoencoder = load(resolve(name, expect=Autoencoder).scaled(scaling_factor))
    return model


def add_autoencoder(model: Any, autoencoder: Autoencoder, folder: Path) -> None:
    """Raises ValueError for a model that is given none, or another one."""
    if not isinstance(model, ConditionalGenerator):
        raise ValueError(f"vae: a {type(model).__name__} is given no autoencoder; leave vae out")
    model.check_decoder(autoencoder)
    autoencoder.save_pretrained(folder)


if __name__ == "__main__":
    run_job(sys.modules[__name__])
