"""Sums over images, streamed in float64 and added over processes, so that nothing depends on batches or processes.

Every class takes the images' indices with their features. A process feeds the indices p, p + P, p + 2P, ... of P
processes; `reduce` then gives all of them the sums over everything. `reduce(None)` is for one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Reducer(Protocol):
    """What is needed of accelerate's `Accelerator`."""

    @property
    def num_processes(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def reduce(self, tensor: Tensor, reduction: str = "sum") -> Tensor: ...


class Moments:
    """Number, mean and covariance of (B, D) features."""

    def __init__(self, dimension: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(dimension, dtype=torch.float64)
        self.outer = torch.zeros(dimension, dimension, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        rows = features.detach().cpu().double()
        self.count += len(rows)
        self.sum += rows.sum(dim=0)
        self.outer += rows.T @ rows

    def reduce(self, reducer: Reducer | None) -> None:
        self.count, self.sum, self.outer = (_add_up(x, reducer) for x in (self.count, self.sum, self.outer))

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (D, D). Raises ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {int(self.count)}")
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


class InceptionScore:
    """Inception score of `num` images from their logits, as the mean over `splits` fixed parts of the indices.

    The parts come from a permutation of the index (torch-fidelity's, of its seed 2020), not from the order of arrival:
    samples that were saved class by class score as if they were shuffled.
    """

    def __init__(self, classes: int, num: int, splits: int = 10) -> None:
        if num < splits:
            raise ValueError(f"an Inception score of {splits} parts needs at least {splits} images, got {num}")
        order = np.random.RandomState(2020).permutation(num)  # the stream that published scores use
        bounds = [split * num // splits for split in range(splits + 1)]
        self._part = np.empty(num, dtype=np.int64)
        for split in range(splits):
            self._part[order[bounds[split] : bounds[split + 1]]] = split
        self.count = torch.zeros(splits, dtype=torch.float64)
        self.probability = torch.zeros(splits, classes, dtype=torch.float64)
        self.negative_entropy = torch.zeros(splits, dtype=torch.float64)

    def update(self, indices: Sequence[int], logits: Tensor) -> None:
        part = torch.from_numpy(self._part[np.asarray(indices)])
        log_p = logits.detach().cpu().double().log_softmax(dim=1)
        p = log_p.exp()
        self.count.index_add_(0, part, torch.ones(len(p), dtype=torch.float64))
        self.probability.index_add_(0, part, p)
        self.negative_entropy.index_add_(0, part, (p * log_p).sum(dim=1))

    def reduce(self, reducer: Reducer | None) -> None:
        self.count, self.probability, self.negative_entropy = (
            _add_up(x, reducer) for x in (self.count, self.probability, self.negative_entropy)
        )

    def scores(self) -> Tensor:
        """The score of each part, (splits,): exp of the mean KL divergence from the part's mean distribution."""
        marginal = self.probability / self.count[:, None]
        entropy = -torch.xlogy(marginal, marginal).sum(dim=1)
        return (self.negative_entropy / self.count + entropy).exp()


class Rows:
    """A row of numbers for each of `num` images, by index: features kept whole, or scores of single images."""

    def __init__(self, num: int, columns: int, dtype: torch.dtype = torch.float64) -> None:
        self.values = torch.zeros(num, columns, dtype=dtype)
        self.filled = torch.zeros(num, dtype=torch.int32)

    def update(self, indices: Sequence[int], rows: Tensor) -> None:
        where = torch.as_tensor(list(indices), dtype=torch.long)
        self.values[where] = rows.detach().cpu().to(self.values.dtype)
        self.filled[where] += 1

    def reduce(self, reducer: Reducer | None) -> None:
        """Raises RuntimeError when an image was given twice."""
        self.values, self.filled = _add_up(self.values, reducer), _add_up(self.filled, reducer)
        if bool((self.filled > 1).any()):
            raise RuntimeError(f"image {int(self.filled.argmax())} was scored more than once")

    @property
    def scored(self) -> Tensor:
        """The rows of the images that were given, in order of index; an unreadable image never comes."""
        return self.values[self.filled > 0]


class Histogram:
    """How often each whole number in [0, size) was seen."""

    def __init__(self, size: int) -> None:
        self.counts = torch.zeros(size, dtype=torch.int64)

    @classmethod
    def of(cls, counts: Tensor) -> Histogram:
        """The one that has these counts (size,)."""
        histogram = cls(0)
        histogram.counts = counts.cpu()
        return histogram

    def update(self, values: Tensor) -> None:
        self.counts += torch.bincount(values.detach().cpu().flatten(), minlength=len(self.counts))

    def reduce(self, reducer: Reducer | None) -> None:
        self.counts = _add_up(self.counts, reducer)

    @property
    def use(self) -> float:
        """Share of the numbers that were seen at all."""
        return float((self.counts > 0).double().mean())

    @property
    def perplexity(self) -> float:
        """2 to the entropy in bits: of how many equally likely numbers the draws are as hard to guess."""
        shares = self.counts.double() / self.counts.sum()
        return float((-torch.xlogy(shares, shares).sum()).exp())


def _add_up(tensor: Tensor, reducer: Reducer | None) -> Tensor:
    if reducer is None or reducer.num_processes == 1:
        return tensor
    return reducer.reduce(tensor.to(reducer.device), reduction="sum").cpu()
