"""Where the images that `imgtok evaluate` scores come from: files, a generator, or a tokenizer's reconstructions.

Each source has `num` images of `size` pixels and yields, for the indices that a process was given, the batches to
score, by token count (None where there is only one version of each image).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from generators.gpt import SamplingConfig
from imgtok.data.images import ImageSource
from imgtok.data.loaders import UnreadableImages, eval_loader
from imgtok.images import to_uint8
from imgtok.metrics.saved_images import SavedImages
from imgtok.metrics.scorers import ScoredBatch
from imgtok.processes import cpu_threads
from imgtok.tokenizer import Tokenizer
from sample.pipeline import DecodeSettings, Pipeline, batches_of, labels_in_turn
from sample.reconstruct import reconstruct, token_counts

Versions = Mapping[int | None, ScoredBatch]


class Source(Protocol):
    """Images to score."""

    num: int
    size: tuple[int, int]
    labelled: bool
    """Whether it is known which class each image should show."""
    token_counts: tuple[int | None, ...]

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Versions]: ...


class FileSource:
    """Images of a folder or an .npz, the first `num` of them."""

    token_counts: tuple[int | None, ...] = (None,)

    def __init__(self, path: Path, num: int | None, labels: Literal["recorded", "balanced"], num_classes: int) -> None:
        self._images = SavedImages(path)
        self.num, self.size = check_num(num, len(self._images), str(path)), self._images.size
        self._labels = torch.arange(self.num) % num_classes if labels == "balanced" else self._images.labels
        self.labelled = self._labels is not None

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Versions]:
        for chunk in batches_of(indices, batch_size):
            labels = None if self._labels is None else self._labels[list(chunk)]
            yield {None: ScoredBatch(chunk, self._images.batch(chunk), labels)}


class GeneratorSource:
    """New images, drawn as `imgtok sample` draws them and never written."""

    labelled = True
    token_counts: tuple[int | None, ...] = (None,)

    def __init__(
        self,
        pipeline: Pipeline,
        num: int,
        classes: Sequence[int],
        *,
        seed: int,
        sampling: SamplingConfig,
        decode: DecodeSettings,
    ) -> None:
        self._pipeline, self._seed, self._sampling, self._decode = pipeline, seed, sampling, decode
        self._labels = labels_in_turn(classes, num, pipeline.num_classes)
        self.num, self.size = num, (pipeline.tokenizer.image_size,) * 2

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Versions]:
        for chunk in batches_of(indices, batch_size):
            labels = [self._labels[index] for index in chunk]
            images = self._pipeline.images(chunk, labels, seed=self._seed, sampling=self._sampling, decode=self._decode)
            yield {None: ScoredBatch(chunk, images, torch.tensor(labels))}


class ReconstructionSource:
    """Images of a data source and what a tokenizer makes of them with each number of tokens."""

    labelled = True

    def __init__(
        self,
        tokenizer: Tokenizer,
        images: ImageSource,
        num: int | None,
        counts: Sequence[int],
        *,
        seed: int,
        decode: DecodeSettings,
        threads: int,
    ) -> None:
        self._tokenizer, self._images, self._seed, self._decode = tokenizer, images, seed, decode
        self._threads = threads
        self.num, self.size = check_num(num, len(images), "the data source"), (tokenizer.image_size,) * 2
        self._counts = token_counts(counts, tokenizer.num_tokens)
        self.token_counts: tuple[int | None, ...] = self._counts

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Versions]:
        for batch in eval_loader(self._images, batch_size, indices=indices):
            with cpu_threads(self._threads):
                decoded = reconstruct(
                    self._tokenizer, batch.images, batch.indices, self._counts, seed=self._seed, decode=self._decode
                )
            originals = to_uint8(batch.images)
            yield {
                count: ScoredBatch(batch.indices, images, batch.labels, originals) for count, images in decoded.items()
            }


def image_batches(
    images: ImageSource | SavedImages, indices: Sequence[int], batch_size: int
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Indices and uint8 images of a reference."""
    if isinstance(images, SavedImages):
        yield from ((chunk, images.batch(chunk)) for chunk in batches_of(indices, batch_size))
        return
    for batch in eval_loader(images, batch_size, indices=indices, unreadable=UnreadableImages(len(images))):
        yield batch.indices, to_uint8(batch.images)


def check_num(num: int | None, available: int, where: str) -> int:
    """`num`, or everything for None. Raises ValueError for more than there is."""
    if num is not None and num > available:
        raise ValueError(f"num is {num}, but {where} holds {available} images")
    return num or available
