"""The world of shapes as a data set: scene `i` of a split as an image, a class and a caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imgtok.shapes.captions import Caption, caption
from imgtok.shapes.render import render
from imgtok.shapes.world import CLASS_NAMES, NUM_CLASSES, SceneTable, ShapesConfig, sample_scenes


@dataclass(frozen=True)
class ShapesSample:
    """One image (3, H, W) float32 in [-1, 1] with its label, name and caption."""

    image: Tensor
    label: int
    name: str
    text: str


_BLOCK = 4096


class ShapesDataset:
    """Scenes drawn on request; map-style, no files. Scene tables are kept in blocks, images are not kept."""

    def __init__(self, config: ShapesConfig, size: int) -> None:
        if size < 8:
            raise ValueError(f"size is {size}; shapes need at least 8 pixels (32 or more to be told apart)")
        self.config = config
        self.size = size
        self._blocks: dict[int, SceneTable] = {}

    def __len__(self) -> int:
        return self.config.num_images

    @property
    def num_classes(self) -> int:
        """64 in mode "class", whichever of them occur; 1 in mode "text"."""
        return NUM_CLASSES if self.config.mode == "class" else 1

    @property
    def class_names(self) -> tuple[str, ...]:
        return CLASS_NAMES if self.config.mode == "class" else ("shapes",)

    def scenes(self, indices: Sequence[int] | np.ndarray | Tensor) -> SceneTable:
        """The scenes of the given indices."""
        numbers = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(self)):
            wrong = numbers[(numbers < 0) | (numbers >= len(self))][0]
            raise IndexError(f"index {int(wrong)} is outside 0 to {len(self) - 1}")
        parts = [
            self._block(number).take(numbers[numbers // _BLOCK == number] % _BLOCK)
            for number in np.unique(numbers // _BLOCK)
        ]
        if not parts:
            return self._block(0).take(numbers)
        order = np.argsort(np.argsort(numbers // _BLOCK, kind="stable"), kind="stable")
        columns = max(part.shape.shape[1] for part in parts)
        padded = {
            name: np.concatenate([_pad(getattr(part, name), columns) for part in parts])[order]
            for name in vars(parts[0])
        }
        return SceneTable(**padded)

    def _block(self, number: int) -> SceneTable:
        if number not in self._blocks:
            stop = min(len(self), (number + 1) * _BLOCK)
            self._blocks[number] = sample_scenes(self.config, np.arange(number * _BLOCK, stop))
        return self._blocks[number]

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [-1, 1] and labels (B,) int64, drawn together: the fast way to train from scenes."""
        table = self.scenes(indices)
        return render(table, self.size).mul_(2.0).sub_(1.0), torch.from_numpy(self._labels(table))

    def labels(self, indices: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        """(B,) int64, without drawing the images."""
        return self._labels(self.scenes(indices))

    def name(self, index: int) -> str:
        """As it stands in messages and records."""
        return f"shapes/{self.config.split}/{index}"

    def _labels(self, table: SceneTable) -> np.ndarray:
        return table.labels if self.config.mode == "class" else np.zeros(len(table), np.int64)

    def __getitem__(self, index: int) -> ShapesSample:
        images, labels = self.batch([index])
        return ShapesSample(images[0], int(labels[0]), self.name(index), self.caption(index).text)

    def caption(self, index: int) -> Caption:
        """The caption of one scene, with roles and facts."""
        return caption(self.scenes([index])[0], self.config.split, index)


def _pad(array: np.ndarray, columns: int) -> np.ndarray:
    if array.ndim == 1 or array.shape[1] == columns:
        return array
    return np.pad(array, ((0, 0), (0, columns - array.shape[1])))
