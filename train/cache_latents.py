"""`imgtok cache latents`: runs a frozen autoencoder over a data set once and keeps the posteriors for training."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from imgtok import announce
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveFloat, PositiveInt, Range, check
from imgtok.data.images import DataConfig, ImageSource, require_labels
from imgtok.data.latents import LatentCacheInfo, LatentShardWriter
from imgtok.data.loaders import UnreadableImages, eval_loader
from imgtok.data.shards import as_begun
from imgtok.data.trained_on import Named
from imgtok.hub import load, resolve
from imgtok.runtime import process_state
from imgtok.shapes.world import ShapesConfig
from imgtok.sizes import SquareSize
from imgtok.tokenizers.base import Autoencoder
from imgtok.train.shards import Rows, say_what_is_there, write_missing

logger = logging.getLogger(__name__)

POSITIONAL = "vae"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes the moments of every image as safetensors shards; an interrupted run goes on where it stopped."""

    job: Literal["cache-latents"] = "cache-latents"
    """Which program this file is for."""
    vae: str
    """The autoencoder: a folder or a Hub name, of imgtok's or of a diffusers AutoencoderKL, a file in the layout of
    `kl16.ckpt`, or one that ships with imgtok (`shapes32`)."""
    vae_scaling_factor: PositiveFloat | None = None
    """Factor on its latents, kept in the description; null takes its own. Moments are stored without it."""
    out: Path
    """Folder of the shards."""
    data: DataConfig | None = None
    """Images to encode; null takes those that the autoencoder was trained on."""
    image_size: SquareSize
    """Pixels a side, a multiple of the autoencoder's factor; each image is cropped in the centre."""
    split: Literal["train", "held_out"] = "train"
    """Which part of the data."""
    held_out: Annotated[float, Range(0.0, 0.9)] | None = None
    """Share of the images that is kept apart; null takes that of the autoencoder's training if it was on these images,
    else 0.1."""
    mirrored: bool = False
    """Encode each image a second time, mirrored; training then takes either. Not for shapes."""
    dtype: Literal["float32", "float16"] = "float32"
    """How moments are stored; float16 takes half the space (its error: docs/xar.md)."""
    batch_size: PositiveInt = 32
    """Images encoded at once."""
    shard_size: PositiveInt = 4096
    """Images in one shard."""
    num_workers: NonNegativeInt = 0
    """Processes that decode images."""
    threads: PositiveInt | None = None
    """CPU threads; null leaves torch's choice."""

    def __post_init__(self) -> None:
        check(self)
        if isinstance(self.data, ShapesConfig) and self.mirrored:
            raise ValueError(
                "mirrored: not possible with data.kind=shapes, whose generator draws no mirrored crescents: leave it "
                "out, and raise data.num_images for more variety"
            )


def main(config: Config) -> None:
    """Encodes the shards that are still missing; under several processes each writes its own."""
    if config.threads:
        torch.set_num_threads(config.threads)
    state = process_state()
    found = resolve(config.vae, expect=Autoencoder).scaled(config.vae_scaling_factor)
    vae: Autoencoder = load(found)
    if config.image_size % vae.config.factor:
        raise ValueError(
            f"image_size: {config.image_size} pixels are no multiple of the {vae.config.factor} of one latent cell of "
            f"vae={config.vae}"
        )
    images = Named.of(config.data, found).to_encode(config.image_size, config.split, config.held_out)
    config, source = replace(config, data=images.data), images.source
    require_labels(source, "a cache of latents")
    info = LatentCacheInfo(
        fingerprint=vae.fingerprint(),
        dataset=source.identity,
        split=config.split,
        num_images=len(source),
        shard_size=config.shard_size,
        image_size=config.image_size,
        crop="center",
        latent_channels=vae.config.latent_channels,
        grid=config.image_size // vae.config.factor,
        scaling_factor=vae.config.scaling_factor,
        num_classes=source.num_classes,
        class_names=source.class_names,
        mirrored=config.mirrored,
        dtype=config.dtype,
    )
    vae.to(state.device)
    info = as_begun(config.out, info, images.data)
    announce.begins("cache latents", data=images.words, vae=found.in_words, on=state.device, out=config.out)
    writer = LatentShardWriter(config.out, info, rank=state.process_index, world=state.num_processes)
    encode = functools.partial(encode_rows, config, vae, source, UnreadableImages(len(source)))
    write_missing(writer, state, encode, functools.partial(write_shard, writer), command="cache latents")
    say_what_is_there(config.out, info, state)


@torch.no_grad()
def encode_rows(
    config: Config, vae: Autoencoder, source: ImageSource, unreadable: UnreadableImages, wanted: Sequence[int]
) -> Iterator[Rows]:
    """Encodes the wanted images, and their mirror images where these are kept too, `batch_size` at once."""
    for batch in eval_loader(
        source, config.batch_size, indices=wanted, num_workers=config.num_workers, unreadable=unreadable
    ):
        images = batch.images.to(next(vae.parameters()).device)
        rows = {"moments": vae.moments(images).cpu()}
        if config.mirrored:
            rows["moments_flip"] = vae.moments(images.flip(-1)).cpu()
        yield rows | {"labels": batch.labels, "indices": torch.tensor(batch.indices)}


def write_shard(writer: LatentShardWriter, shard: int, rows: Rows) -> None:
    """Writes one shard, if need be without any rows."""
    moments = {name: rows.get(name, torch.empty(0, *writer.info.shape)) for name in writer.info.arrays}
    labels, indices = (rows.get(name, torch.empty(0, dtype=torch.int64)) for name in ("labels", "indices"))
    writer.write(shard, moments["moments"], moments.get("moments_flip"), labels, indices.tolist())


if __name__ == "__main__":
    run_job(sys.modules[__name__])
