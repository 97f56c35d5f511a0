"""Batches for training and evaluation.

The order of training is a function: batch k of process r of w processes depends on (seed, k, r, w) alone,
never on what was drawn before or on global random state, so a run resumes at any step. Worker processes
only decode.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from imgtok import signals
from imgtok.data.blocks import Blocks
from imgtok.data.captions import CaptionDataset
from imgtok.data.images import (
    Batch,
    DataError,
    ImageSource,
    Position,
    Views,
    max_unreadable,
    too_many_unreadable,
)
from imgtok.data.latents import LatentBatch, Latents
from imgtok.data.tokens import TokenBatch, TokenDataset
from imgtok.randomness import permutation

__all__ = [
    "Batch",
    "BatchSampler",
    "LatentBatch",
    "TokenBatch",
    "UnreadableImages",
    "eval_loader",
    "latent_loader",
    "token_loader",
    "train_loader",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
B = TypeVar("B", Batch, LatentBatch)
G = TypeVar("G", TokenBatch, LatentBatch)


class BatchSampler(Sampler[list[Position]]):
    """The endless order of training: epoch after epoch, each in its own random order, cut into batches.

    Step k of all processes together takes the places k * B * world to (k + 1) * B * world of that order, of
    which process `rank` takes the rank-th part. No image is dropped at an epoch's end; a batch may hold
    images of two epochs. Images that are stored in blocks come in the order that `blocks` says.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        blocks: Blocks | None = None,
    ) -> None:
        if length < 1 or batch_size < 1 or start_step < 0 or not 0 <= rank < world:
            given = f"{length} images, batch_size {batch_size}, start_step {start_step}, rank {rank} of {world}"
            raise ValueError(f"no batches from {given}")
        self._length = length
        self._batch_size = batch_size
        self._start_step = start_step
        self._rank, self._world = rank, world
        order = functools.partial(permutation, n=length) if blocks is None else blocks.order
        self._epoch_order = functools.lru_cache(maxsize=2)(functools.partial(order, seed))

    def batch(self, step: int) -> list[Position]:
        """The images of one step."""
        start = (step * self._world + self._rank) * self._batch_size
        places = (divmod(place, self._length) for place in range(start, start + self._batch_size))
        return [Position(epoch, int(self._epoch_order(epoch)[place])) for epoch, place in places]

    def __iter__(self) -> Iterator[list[Position]]:
        return map(self.batch, count(self._start_step))


class UnreadableImages:
    """Counts unreadable images, each once; logs them, and raises DataError when there are more than 1 %."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.messages: dict[str, None] = {}

    def add(self, messages: Sequence[str]) -> None:
        """Count the unreadable images of a batch."""
        for message in messages:
            if message not in self.messages:
                self.messages[message] = None
                logger.warning("skipped unreadable image %d: %s", len(self.messages), message)
        if len(self.messages) > max_unreadable(self._length):
            raise too_many_unreadable(list(self.messages), self._length)


def train_loader(
    source: ImageSource,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Augmented batches of `batch_size` images for one process, without end, from `start_step` on."""
    blocks = source.blocks()
    order = BatchSampler(
        len(source), batch_size, seed=seed, start_step=start_step, rank=rank, world=world, blocks=blocks
    )
    load = functools.partial(source.training_batch, seed=seed)
    yield from _checked(_load_batches(load, order, num_workers), UnreadableImages(len(source)))


def eval_loader(
    source: ImageSource,
    batch_size: int,
    *,
    indices: Sequence[int] | None = None,
    num_workers: int = 0,
    unreadable: UnreadableImages | None = None,
    views: Views | None = None,
) -> Iterator[Batch]:
    """Every image once, in order, not augmented; `indices` chooses some (`range(rank, len(source), world)`,
    say).

    Unreadable images are left out; `Batch.indices` tells which images are there. Pass one `unreadable` to
    several calls to count them together. With `views`, all views of `batch_size` images make a batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    chosen = range(len(source)) if indices is None else indices
    order = [chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size)]
    load = source.batch if views is None else functools.partial(source.views, views=views)
    batches = _load_batches(load, order, num_workers)
    checked = _checked(batches, unreadable or UnreadableImages(len(source)))
    yield from (batch for batch in checked if len(batch.names))


def token_loader(
    tokens: TokenDataset,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    captions: CaptionDataset | None = None,
    among: Sequence[int] | None = None,
) -> Iterator[TokenBatch]:
    """Batches of cached tokens for one process, without end, in the same kind of order as `train_loader`.

    With `captions`, each row carries the features of its image's caption. `among` are the rows that are used.
    """
    among = range(len(tokens)) if among is None else among
    order = BatchSampler(len(among), batch_size, seed=seed, start_step=start_step, rank=rank, world=world)
    for positions in order:
        rows = [among[position.index] for position in positions]
        yield _with_captions(tokens.batch(rows), tokens.indices[rows], captions)


def latent_loader(
    latents: Latents,
    batch_size: int,
    *,
    seed: int,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    captions: CaptionDataset | None = None,
    among: Sequence[int] | None = None,
) -> Iterator[LatentBatch]:
    """Batches of cached latents for one process, without end, in the same order as `train_loader`.

    With `captions`, each row carries the features of its image's caption. `among` are the rows that are used.
    """
    among = range(len(latents)) if among is None else among
    order = BatchSampler(len(among), batch_size, seed=seed, start_step=start_step, rank=rank, world=world)
    load = functools.partial(_latent_batch, latents=latents, captions=captions, among=among, seed=seed)
    yield from _load_batches(load, order, num_workers)


def _latent_batch(
    positions: Sequence[Position],
    *,
    latents: Latents,
    captions: CaptionDataset | None,
    among: Sequence[int],
    seed: int,
) -> LatentBatch:
    positions = [Position(position.epoch, among[position.index]) for position in positions]
    rows = [position.index for position in positions]
    return _with_captions(latents.training_batch(positions, seed), latents.indices[rows], captions)


def token_rows(tokens: TokenDataset, rows: Sequence[int], captions: CaptionDataset | None = None) -> TokenBatch:
    """Some rows of cached tokens, with the captions of their images if there are any."""
    return _with_captions(tokens.batch(rows), tokens.indices[list(rows)], captions)


def latent_rows(
    latents: Latents, rows: Sequence[int], seed: int, captions: CaptionDataset | None = None
) -> LatentBatch:
    """Some rows of cached latents as the first epoch of a training with this seed has them: drawn from their
    distributions, half of them mirrored where the cache has that.
    """
    return _latent_batch(
        [Position(0, row) for row in range(len(rows))], latents=latents, captions=captions, among=rows, seed=seed
    )


def _with_captions(batch: G, images: Tensor, captions: CaptionDataset | None) -> G:
    """The batch with the captions of its images (B,), if there are any."""
    return batch if captions is None else dataclasses.replace(batch, captions=captions.batch(images.tolist()))


def _checked(batches: Iterator[Batch], unreadable: UnreadableImages) -> Iterator[Batch]:
    for batch in batches:
        unreadable.add(batch.unreadable)
        yield batch


class _Batches(Dataset[Any]):
    """What a worker runs. A DataError travels as a value: raised there, its message would be buried in a
    traceback.
    """

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._load(key)
        except DataError as error:
            return error


def _load_batches(load: Callable[[T], B], order: Sequence[T] | Sampler[T], num_workers: int) -> Iterator[B]:
    loader = DataLoader(
        _Batches(load),
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),  # without it Batch.to waits for each copy
        generator=torch.Generator(),  # otherwise starting the workers draws from the global one
        worker_init_fn=signals.leave_to_parent,
    )
    with signals.held_back():
        loaded = iter(loader)
    for batch in loaded:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _as_it_is(batch: T) -> T:
    return batch
