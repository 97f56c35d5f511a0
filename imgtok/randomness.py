"""Random numbers that depend on (seed, index) alone.

Image i of seed s gets the same numbers whatever the batch size, the number of processes or the device: they
come from NumPy's Philox, a counter-based generator, with the 128-bit key (seed, index). The purpose selects
a block of the counter, so that a new kind of draw never shifts the numbers of another. Nothing here reads
or writes global state.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WORD = 1 << 64


def normal(seed: int, indices: Sequence[int], shape: tuple[int, ...], purpose: str = "noise") -> Tensor:
    """Normal numbers, (len(indices), *shape) float32; row j depends on (seed, indices[j], purpose) alone."""
    out = np.empty((len(indices), *shape), dtype=np.float32)
    for row, index in zip(out, indices, strict=True):
        generator = np.random.Generator(_philox(seed, index, purpose))
        row[...] = generator.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(out)


def uniform(seed: int, indices: Sequence[int], shape: tuple[int, ...], purpose: str = "tokens") -> Tensor:
    """Numbers in [0, 1), (len(indices), *shape) float64; row j depends on (seed, indices[j], purpose) only."""
    bits = np.empty((len(indices), math.prod(shape)), dtype=np.uint64)
    for row, index in zip(bits, indices, strict=True):
        row[:] = _philox(seed, index, purpose).random_raw(len(row))
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53).reshape(len(indices), *shape)


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Order of n items in an epoch, (n,) int64.

    Sorting raw 64-bit draws keeps the order the same under every NumPy version; `Generator.permutation`
    promises that for one version only.
    """
    if n < 0:
        raise ValueError(f"cannot permute {n} items; n must be 0 or more")
    bits = _philox(seed, epoch, "permutation").random_raw(n)
    return np.argsort(bits, kind="stable")


def spread(count: int, n: int) -> np.ndarray:
    """Which `count` of n items stand for all of them, (count,) ascending: always the same ones, from everywhere.

    Every k-th item would not do: where classes take turns, it could be of a single class.
    """
    return np.sort(permutation(0, 0, n)[:count])


def step_generator(seed: int, step: int, rank: int = 0, purpose: str = "train") -> torch.Generator:
    """CPU generator for one training step of one process.

    A step's draws do not depend on the steps before it, so a resumed run needs no saved random state.
    torch's CPU generator takes only 32 bits of its seed, hence the hash: two of a run's steps may share a
    stream (once in 4 billion pairs), but neighbouring seeds, steps and ranks do not.
    """
    text = f"{purpose}\n{_word('seed', seed)}\n{_word('step', step)}\n{_word('rank', rank)}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _philox(seed: int, index: int, purpose: str) -> np.random.Philox:
    key = np.array([_word("seed", seed), _word("index", index)], dtype=np.uint64)
    counter = np.array([0, 0, 0, zlib.crc32(purpose.encode())], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def _word(name: str, value: int) -> int:
    if not 0 <= value < _WORD:
        raise ValueError(f"{name} is {value}; it must lie in [0, 2**64)")
    return int(value)
