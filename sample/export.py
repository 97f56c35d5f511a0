"""`imgtok export`: a model from its published layout into ours, from ours into the published one, and as ONNX files."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from imgtok import announce, runs
from imgtok.cli import run_job
from imgtok.config import PositiveFloat, check
from imgtok.files import replacing
from imgtok.generators.conditioning import ConditionalGenerator
from imgtok.generators.pipeline import write_cards
from imgtok.hub import KINDS, Found, load, resolve, writers
from imgtok.sample import onnx_files
from imgtok.sample.folder_files import write_files
from imgtok.tokenizers.base import Autoencoder

logger = logging.getLogger(__name__)

POSITIONAL = "model"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes a model, of either layout, in the layout that is asked for; its numbers stay as they are."""

    job: Literal["export"] = "export"
    """Which program this file is for."""
    model: str
    """Any name of a model: a folder, Hub name, or single file of published weights."""
    out: Path
    """Folder of the new config.json and weights, or of the ONNX files; for a model that is published as a single file,
    that file (.pth or .safetensors). Those of the same model are replaced, those of another are not."""
    layout: Literal["imgtok", "published", "onnx"] = "published"
    """Whose: "imgtok" as every program here reads it, "published" as the code that the model was published with, "onnx"
    as onnxruntime and others read it: a file for each part of a tokenizer or an autoencoder."""
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
        if self.vae is not None and self.layout != "imgtok":
            raise ValueError(f"vae: the {self.layout} layout has no place for an autoencoder; leave it out")


def main(config: Config) -> None:
    """Writes the folder or file `out`."""
    found = resolve(config.model, revision=config.revision)
    announce.begins("export", model=found.in_words, layout=config.layout, out=config.out)
    model = load(found, raw=config.raw)
    if config.layout == "onnx":
        onnx_files.write(model, found, config.out)
    elif config.layout == "published":
        writer = writer_of(model)
        protect({config.out: model})
        writer.save(model, config.out)
    else:
        decoder = find_decoder(config, found, model)
        write_ours(config.out, found, model, decoder)
        write_files(config.out, draws=decoder is not None)
    announce.ends(config.out)


def write_ours(out: Path, found: Found, model: Any, decoder: Any) -> None:
    """Writes a model into the folder `out`, a generator with its decoder if it has one, and beside them what the record
    of the model that was `found` says of its training. Raises as `protect`.
    """
    protect({out: model, out / "tokenizer": decoder})
    if decoder is not None:
        write_cards(out, str(out), model.config, decoder.config)
    model.save_pretrained(out)
    if decoder is not None:
        decoder.save_pretrained(out / "tokenizer")
    for record in (found.path / runs.CONFIG, runs.identity_path(found.path)):
        if record is not None and record.is_file():
            with replacing(out / record.name) as temporary:
                shutil.copyfile(record, temporary)


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


def protect(models: Mapping[Path, Any]) -> None:
    """Raises ValueError where one of the folders or files holds a model with other weights than the one that is to be
    written there.
    """
    others = [place for place, model in models.items() if model is not None and _is_another(place, model)]
    if others:
        raise ValueError(
            f"out: {' and '.join(map(str, others))} holds another model; choose another place with out=PATH, or delete "
            "it"
        )


def _is_another(place: Path, model: Any) -> bool:
    if not place.exists():
        return False
    try:
        before = load(str(place.absolute()))  # no name on the Hub
    except FileNotFoundError:
        return False  # a folder without a model
    except ValueError as error:
        raise ValueError(f"out: {place} cannot be replaced: {error}; choose another place with out=PATH") from error
    old, new = before.state_dict(), model.state_dict()
    return old.keys() != new.keys() or not all(torch.equal(old[name], new[name]) for name in new)


def find_decoder(config: Config, found: Found, model: Any) -> Any:
    """What decodes that which a generator draws: the autoencoder `vae`, or what its folder or its run has. None for
    other models, and where there is none, which the log says.

    Raises ValueError for an autoencoder that does not fit, or that is given to a model which takes none.
    """
    if not isinstance(model, ConditionalGenerator):
        if config.vae is not None:
            raise ValueError(f"vae: a {type(model).__name__} is given no autoencoder; leave vae out")
        return None
    if config.vae is not None:
        decoder = load(resolve(config.vae, expect=Autoencoder).scaled(config.vae_scaling_factor))
        model.check_decoder(decoder)
        return decoder
    return own_decoder(found, model, config.out)


def own_decoder(found: Found, model: Any, out: Path) -> Any:
    """The decoder that the folder or the run of a generator has. None for other models, and where there is none, which
    the log says of the folder `out` to be written. Raises ValueError for one that does not fit.
    """
    if not isinstance(model, ConditionalGenerator):
        return None
    try:
        there = found.part()
    except (FileNotFoundError, ValueError) as error:
        logger.warning(
            "%s: without a decoder (%s); name one to sample from it, `imgtok sample %s tokenizer=MODEL`",
            *(out, error, out),
        )
        return None
    decoder = load(there)
    model.check_decoder(decoder)
    return decoder


if __name__ == "__main__":
    run_job(sys.modules[__name__])
