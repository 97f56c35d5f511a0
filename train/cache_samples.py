"""`imgtok cache samples`: keeps the tokens or latents that a generator draws, so that a copy of it can learn from them.

Nothing is decoded and encoded again. The cache is one like those of `imgtok cache` and `imgtok cache latents`, with the
generator's own classes in turn as labels, so `imgtok train generator init=MODEL` takes it as it takes those.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from imgtok import announce
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveInt, check, to_dict
from imgtok.data.latents import LatentCacheInfo, LatentShardWriter
from imgtok.data.tokens import TokenCacheInfo, TokenShardWriter
from imgtok.generators.pipeline import Pipeline, batches_of, pipeline
from imgtok.runtime import process_state
from imgtok.sections import Settings
from imgtok.train import cache_latents, cache_tokens
from imgtok.train.shards import Rows, say_what_is_there, write_missing

POSITIONAL = "model"
CERTAIN = -30.0
"""The log-variance of a latent that was drawn, the smallest there is: samples of such a posterior are its mean."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes what a generator of classes draws as safetensors shards, its tokens or its latents; an interrupted run
    goes on where it stopped.
    """

    job: Literal["cache-samples"] = "cache-samples"
    """Which program this file is for."""
    model: str
    """Any name of the generator."""
    tokenizer: str | None = None
    """Any name of what decodes its tokens or latents; null takes what is inside its folder."""
    out: Path
    """Folder of the shards."""
    num: PositiveInt
    """Samples to draw; sample i is of class i % number of classes."""
    seed: NonNegativeInt = 0
    """Sample i of a seed is drawn with the same noise whatever the batch size or number of processes."""
    sampling: Settings = Settings()
    """How they are drawn: settings of the generator; what is left out is as its configuration says."""
    batch_size: PositiveInt = 64
    """Samples drawn at once by one process."""
    shard_size: PositiveInt = 4096
    """Samples in one shard."""
    threads: PositiveInt | None = None
    """CPU threads per process; null leaves torch's choice."""

    def __post_init__(self) -> None:
        check(self)


def main(config: Config) -> None:
    """Draws the shards that are still missing; under several processes each writes its own."""
    state = process_state()
    pipe = pipeline(config.model, tokenizer=config.tokenizer, device=state.device, threads=config.threads)
    assert pipe.found is not None, "it was loaded by its name"
    model, decoder = pipe.found
    if pipe.reads_text:
        raise ValueError(
            f"model: {config.model} draws from text, and a cache of its samples would need the features of prompts "
            "beside them, which is not built; name a generator of classes"
        )
    sampling = config.sampling.over(pipe.sampling, "sampling")
    drawn = {"kind": "drawn", "model": model.fingerprint(), "seed": config.seed, "sampling": to_dict(sampling)}
    shared: dict[str, Any] = {
        "dataset": json.dumps(drawn, sort_keys=True),
        "split": "train",
        "image_size": pipe.image_size,
        "num_classes": pipe.num_classes,
        "class_names": pipe.class_names,
        "num_images": config.num,
        "shard_size": config.shard_size,
    }
    writer: TokenShardWriter | LatentShardWriter
    place = {"rank": state.process_index, "world": state.num_processes}
    if pipe.draws_tokens:
        info = TokenCacheInfo(**shared, **token_fields(pipe), fingerprint=decoder.fingerprint())
        writer = TokenShardWriter(config.out, info, **place)
        finish: Any = functools.partial(cache_tokens.write_shard, writer)
    else:
        writer = LatentShardWriter(config.out, LatentCacheInfo(**shared, **latent_fields(pipe)), **place)
        finish = functools.partial(cache_latents.write_shard, writer)
    announce.begins(
        "cache samples",
        model=model.in_words,
        samples=f"{config.num} of {pipe.num_classes} classes, seed {config.seed}",
        on=pipe.device,
        out=config.out,
    )
    write_missing(writer, state, functools.partial(rows_of, config, pipe), finish, command="cache samples")
    say_what_is_there(config.out, writer.info, state)


def token_fields(pipe: Pipeline) -> dict[str, Any]:
    """What the description of a cache of tokens says of those that a generator draws."""
    config: Any = pipe.generator.config
    return {
        "vocab_size": pipe.decoder.vocab_size,
        "num_tokens": config.num_tokens,
        "fixed_length": pipe.decoder.fixed_length,
        "num_slots": pipe.decoder.num_slots,
    }


def latent_fields(pipe: Pipeline) -> dict[str, Any]:
    """What the description of a cache of latents says of those that a generator draws."""
    config: Any = pipe.generator.config
    return {
        "fingerprint": pipe.decoder.fingerprint(),
        "crop": "center",
        "latent_channels": pipe.decoder.config.latent_channels,
        "grid": config.grid,
        "scaling_factor": pipe.decoder.config.scaling_factor,
        "mirrored": False,
        "dtype": "float32",
    }


def rows_of(config: Config, pipe: Pipeline, wanted: Sequence[int]) -> Iterator[Rows]:
    """Draws the wanted samples, `batch_size` at once."""
    for indices in batches_of(wanted, config.batch_size):
        labels = [index % pipe.num_classes for index in indices]
        options: dict[str, Any] = {"seed": config.seed, "indices": indices, "progress": False, **dict(config.sampling)}
        rows = {"labels": torch.tensor(labels), "indices": torch.tensor(list(indices))}
        if pipe.draws_tokens:
            tokens = pipe.tokens(labels, **options).to("cpu")
            packed = {name: torch.from_numpy(array.astype(np.int64)) for name, array in tokens.packed().items()}
            yield rows | packed | {"lengths": tokens.lengths, "views": torch.zeros(len(indices), dtype=torch.int64)}
        else:
            means = pipe.latents(labels, **options).float().cpu() / pipe.decoder.config.scaling_factor
            yield rows | {"moments": torch.cat([means, torch.full_like(means, CERTAIN)], dim=1)}


if __name__ == "__main__":
    run_job(sys.modules[__name__])
