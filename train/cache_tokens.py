"""`imgtok cache`: runs a trained tokenizer over a data set once and keeps the tokens for generator training."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveInt, Range, check, to_dict
from imgtok.data.images import DataConfig, ImageSource, open_images
from imgtok.data.loaders import UnreadableImages, eval_loader
from imgtok.data.shapes import ShapesConfig
from imgtok.data.tokens import TokenCacheInfo, TokenShardWriter, fingerprint
from imgtok.hub import find_folder, load
from imgtok.processes import process_state
from imgtok.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

POSITIONAL = "tokenizer"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes the tokens of every training image as safetensors shards; an interrupted run goes on at the next shard."""

    job: Literal["cache"] = "cache"
    """Which program this file is for."""
    tokenizer: str
    """Model folder or Hub name of the tokenizer."""
    out: Path
    """Folder of the shards."""
    data: DataConfig = ShapesConfig()
    """Images to tokenize."""
    split: Literal["train", "held_out"] = "train"
    """Which part of the data, as tokenizer training divided it."""
    held_out: Annotated[float, Range(0.0, 0.9)] = 0.1
    """Share of the images that tokenizer training kept apart."""
    mirrored: bool = False
    """Tokenize each image a second time, mirrored; not for shapes."""
    batch_size: PositiveInt = 64
    """Images encoded at once."""
    shard_size: PositiveInt = 8192
    """Images in one shard."""
    num_workers: NonNegativeInt = 0
    """Processes that decode images."""
    threads: PositiveInt | None = None
    """CPU threads; null leaves torch's choice."""

    def __post_init__(self) -> None:
        check(self)
        if self.mirrored and isinstance(self.data, ShapesConfig):
            raise ValueError(
                "mirrored: not possible with data.kind=shapes, whose generator draws no mirrored crescents: leave it "
                "out, and raise data.num_images for more variety"
            )


def main(config: Config) -> None:
    """Encodes the shards that are still missing; under several processes each writes its own."""
    if config.threads:
        torch.set_num_threads(config.threads)
    state = process_state()
    folder = find_folder(config.tokenizer)
    tokenizer = load(folder, expect=Tokenizer).to(state.device)
    source = open_images(config.data, tokenizer.image_size, split=config.split, held_out_fraction=config.held_out)
    info = TokenCacheInfo(
        fingerprint=fingerprint(folder),
        dataset=json.dumps(to_dict(config.data), sort_keys=True),
        split=config.split,
        image_size=tokenizer.image_size,
        vocab_size=tokenizer.vocab_size,
        num_tokens=tokenizer.num_tokens,
        num_classes=source.num_classes,
        num_images=len(source),
        shard_size=config.shard_size,
        mirrored=config.mirrored,
    )
    writer = TokenShardWriter(config.out, info, rank=state.process_index, world=state.num_processes)
    shards = list(writer.pending())
    logger.info("%d shards to write in this process, one of %d", len(shards), state.num_processes)
    unreadable = UnreadableImages(len(source))
    images = sum(len(info.shard_indices(shard)) for shard in shards)
    with tqdm(total=images, unit="image", desc="cache", disable=not state.is_main_process) as progress:
        for shard in shards:
            write_shard(config, tokenizer, source, writer, shard, unreadable, progress)
    state.wait_for_everyone()
    logger.info("tokens of %d images in %s", len(source), config.out)


def write_shard(
    config: Config,
    tokenizer: Tokenizer,
    source: ImageSource,
    writer: TokenShardWriter,
    shard: int,
    unreadable: UnreadableImages,
    progress: tqdm,
) -> None:
    """Encodes one shard's images, and their mirror images if asked for, and writes it, if need be without any."""
    ids: list[Tensor] = [torch.empty(0, writer.info.num_tokens, dtype=torch.int64)]
    labels: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    indices: list[int] = []
    wanted = writer.info.shard_indices(shard)
    for batch in eval_loader(
        source, config.batch_size, indices=wanted, num_workers=config.num_workers, unreadable=unreadable
    ):
        images = batch.images.to(next(tokenizer.parameters()).device)
        for view in (images, images.flip(-1)) if config.mirrored else (images,):
            ids.append(tokenizer.encode(view).ids.cpu())
            labels.append(batch.labels)
            indices.extend(batch.indices)
        progress.update(len(images))
    writer.write(shard, torch.cat(ids), torch.cat(labels), indices)


if __name__ == "__main__":
    run_job(sys.modules[__name__])
