"""What the jobs that train on images share: the images, in the loop's batches, and held-out ones to show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from imgtok.data.images import DataConfig, ImageSource, open_images
from imgtok.data.loaders import Batch, train_loader
from imgtok.train.config import TrainingConfig


class ImageJob:
    """Batches of training images and the names in them."""

    def __init__(self, source: ImageSource, shown: ImageSource, training: TrainingConfig) -> None:
        self.source = source
        self.shown = shown
        self.training = training

    def batches(self, *, start_step: int, rank: int, world: int) -> Iterator[Batch]:
        """Micro-batches of one process, without end, from optimizer step `start_step` on."""
        training = self.training
        return train_loader(
            self.source,
            training.batch_size,
            seed=training.seed,
            start_step=start_step * training.accumulate,
            rank=rank,
            world=world,
            num_workers=training.num_workers,
        )

    def names(self, batch: Batch) -> Sequence[str]:
        """Which images these are, for messages."""
        return batch.names


def open_split(
    data: DataConfig, size: int, *, flip: bool, crop: Literal["center", "random"], held_out: float
) -> tuple[ImageSource, ImageSource]:
    """Images of `size` pixels a side to train on, and the share `held_out` to show; without one, training images."""
    source = open_images(data, size, flip=flip, crop=crop, held_out_fraction=held_out)
    return source, open_images(data, size, split="held_out" if held_out else "train", held_out_fraction=held_out)
