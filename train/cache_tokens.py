"""`imgtok cache`: runs a trained tokenizer over a data set once and keeps the tokens for generator training."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from imgtok import announce
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveInt, Range, check
from imgtok.data.images import DataConfig, ImageSource, Views, require_labels
from imgtok.data.loaders import UnreadableImages, eval_loader
from imgtok.data.shards import as_begun
from imgtok.data.tokens import TokenCacheInfo, TokenShardWriter, lengths_of
from imgtok.data.trained_on import Named
from imgtok.hub import load, resolve
from imgtok.runtime import process_state
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.base import Rate, Tokenizer
from imgtok.tokenizers.tokens import Tokens
from imgtok.train.shards import Rows, say_what_is_there, write_missing

logger = logging.getLogger(__name__)

POSITIONAL = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes the tokens of every training image as safetensors shards; an interrupted run goes on where it stopped."""

    job: Literal["cache"] = "cache"
    """Which program this file is for."""
    tokenizer: str
    """Model folder or Hub name of the tokenizer."""
    out: Path
    """Folder of the shards."""
    data: DataConfig | None = None
    """Images to tokenize; null takes those that the tokenizer was trained on."""
    split: Literal["train", "held_out"] = "train"
    """Which part of the data, as tokenizer training divided it."""
    held_out: Annotated[float, Range(0.0, 0.9)] | None = None
    """Share of the images that is kept apart; null takes that of the tokenizer's training if it was on these images,
    else 0.1."""
    crops: Literal["center", "five", "random"] = "center"
    """The centre; the four corners and the centre of the image at `zoom` (LlamaGen's ten-crop, if mirrored); or
    `num_crops` random ones (ten, mirrored, in arXiv 2502.13967). Each crop is a training sample; not for shapes."""
    num_crops: PositiveInt = 1
    """Random crops of each image, for crops=random."""
    zoom: Annotated[float, Range(1.0, 4.0)] = 1.1
    """What the image covers before cropping, over the tokenizer's size: at most (random), exactly (five)."""
    mirrored: bool = False
    """Tokenize each crop a second time, mirrored; not for shapes."""
    crop_seed: NonNegativeInt = 0
    """Seed of random crops; a crop depends on it, on the image's index and on the crop's number alone."""
    rate: int | str | None = None
    """How much an image may cost: a number of tokens, such as 64, or for tokenizers that choose it by the error,
    256@0.05; null takes the tokenizer's default."""
    batch_size: PositiveInt = 64
    """Crops encoded at once."""
    shard_size: PositiveInt = 8192
    """Images in one shard."""
    num_workers: NonNegativeInt = 0
    """Processes that decode images."""
    threads: PositiveInt | None = None
    """CPU threads; null leaves torch's choice."""

    def __post_init__(self) -> None:
        check(self)
        if self.rate is not None:
            Rate.parse(self.rate)
        wanted = "mirrored" if self.mirrored else "crops"
        if isinstance(self.data, ShapesConfig) and (self.mirrored or self.crops != "center"):
            raise ValueError(
                f"{wanted}: not possible with data.kind=shapes, whose generator draws no mirrored crescents: leave it "
                "out, and raise data.num_images for more variety"
            )
        if self.num_crops != 1 and self.crops != "random":
            raise ValueError(f"num_crops: {self.num_crops} is for crops=random; crops={self.crops} has its own number")

    @property
    def views(self) -> Views:
        """Which crops of each image; what plays no part is left at its default, so that it cannot differ."""
        return Views(
            crops=self.crops,
            num_crops=self.num_crops,
            zoom=self.zoom if self.crops != "center" else 1.0,
            mirrored=self.mirrored,
            seed=self.crop_seed if self.crops == "random" else 0,
        )


def main(config: Config) -> None:
    """Encodes the shards that are still missing; under several processes each writes its own."""
    if config.threads:
        torch.set_num_threads(config.threads)
    state = process_state()
    found = resolve(config.tokenizer, expect=Tokenizer)
    tokenizer = load(found).to(state.device)
    if tokenizer.vector_width is not None:
        raise ValueError(
            f"tokenizer: the tokens of {config.tokenizer} are vectors, and a cache of tokens holds ids, which a "
            "generator of tokens draws: name a tokenizer that rounds its tokens to the entries of a table"
        )
    images = Named.of(config.data, found).to_encode(tokenizer.image_size, config.split, config.held_out)
    config, source = replace(config, data=images.data), images.source
    require_labels(source, "a cache of tokens")
    views = config.views
    rate = None if config.rate is None else Rate.parse(config.rate)
    if rate is not None:
        tokenizer.check_rate(rate)
    used = rate or tokenizer.default_rate
    info = TokenCacheInfo(
        fingerprint=found.fingerprint(),
        dataset=source.identity,
        split=config.split,
        image_size=tokenizer.image_size,
        vocab_size=tokenizer.vocab_size,
        num_tokens=used.num_tokens,
        fixed_length=tokenizer.fixed_length,
        num_slots=tokenizer.num_slots,
        rate=None if rate is None else str(rate),
        num_classes=source.num_classes,
        class_names=source.class_names,
        num_images=len(source),
        shard_size=config.shard_size,
        crops=views.crops,
        num_crops=views.num_crops,
        zoom=views.zoom,
        mirrored=views.mirrored,
        crop_seed=views.seed,
    )
    info = as_begun(config.out, info, images.data)
    announced = rate if tokenizer.fixed_length else used
    announce.begins(
        "cache", data=images.words, tokenizer=found.in_words, rate=announced, on=state.device, out=config.out
    )
    writer = TokenShardWriter(config.out, info, rank=state.process_index, world=state.num_processes)
    encode = functools.partial(encode_rows, config, tokenizer, rate, source, UnreadableImages(len(source)))
    write_missing(writer, state, encode, functools.partial(write_shard, writer), command="cache")
    what = f"{views.count} crop(s) each"
    if tokenizer.fixed_length:
        what += f" of {tokenizer.cost(used.num_tokens)}"
    if state.is_main_process and not tokenizer.fixed_length:
        lengths = lengths_of(config.out)
        what += f", {announce.counts_in_words(lengths)}" if lengths else ""
    say_what_is_there(config.out, info, state, what)


def encode_rows(
    config: Config,
    tokenizer: Tokenizer,
    rate: Rate | None,
    source: ImageSource,
    unreadable: UnreadableImages,
    wanted: Sequence[int],
) -> Iterator[Rows]:
    """Encodes every view of the wanted images, `batch_size` at once."""
    views = config.views
    images_at_once = max(1, config.batch_size // views.count)
    for batch in eval_loader(
        source, images_at_once, indices=wanted, num_workers=config.num_workers, unreadable=unreadable, views=views
    ):
        images = batch.images.to(next(tokenizer.parameters()).device)
        parts = [tokenizer.encode(part, rate=rate).to("cpu") for part in images.split(config.batch_size)]
        tokens = Tokens.cat(parts)
        packed = {name: torch.from_numpy(array.astype(np.int64)) for name, array in tokens.packed().items()}
        yield packed | {
            "lengths": tokens.lengths,
            "labels": batch.labels,
            "indices": torch.tensor(batch.indices),
            "views": torch.arange(views.count).repeat(len(images) // views.count),
        }


def write_shard(writer: TokenShardWriter, shard: int, rows: Rows) -> None:
    """Writes one shard, if need be without any rows."""
    nothing = torch.empty(0, dtype=torch.int64)
    arrays = {name: rows.get(name, nothing) for name in ("ids", "lengths", "labels", "indices", "views")}
    slots = None if writer.info.num_slots is None else rows.get("slots", nothing).numpy()
    tokens = Tokens.unpacked(arrays["ids"].numpy(), arrays["lengths"].numpy(), slots)
    writer.write(shard, tokens, arrays["labels"], arrays["indices"].tolist(), arrays["views"].tolist())


if __name__ == "__main__":
    run_job(sys.modules[__name__])
