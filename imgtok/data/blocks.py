"""An order of training for images that are stored in compressed blocks, of which any one image needs the whole.

In an order that knows nothing of blocks, every image of a set larger than memory costs the reading of its block: of
ImageNet in the Parquet files of old, 9 MB for 100 kB. Here blocks come in random order, and a few that lie together in
memory are mixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from imgtok.randomness import permutation


@dataclass(frozen=True)
class Blocks:
    """Which block each image is in, and how many blocks can be held at once."""

    numbers: np.ndarray
    """(N,) block of each image."""
    together: int
    """Blocks among which images are mixed, at least 1."""

    def of(self, indices: np.ndarray) -> Blocks:
        """The blocks of some of the images."""
        return Blocks(self.numbers[indices], self.together)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """All images in the order of an epoch, (N,): a function of the seed, the epoch and the blocks.

        Each image comes at a random time after its block does, by at most `together` blocks: so any stretch of the
        order lies in few of them, and each of them is read once.
        """
        length, blocks = len(self.numbers), int(self.numbers.max(initial=-1)) + 1
        place = np.empty(length + blocks, np.int64)
        place[permutation(seed, epoch, length + blocks)] = np.arange(length + blocks)
        turn = np.argsort(np.argsort(place[length:]))  # of each block
        return np.argsort(turn[self.numbers] + self.together * place[:length] / (length + blocks), kind="stable")
