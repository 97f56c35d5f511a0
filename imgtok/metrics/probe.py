"""A judge of any labelled images: a linear reading of their classes from the features of a frozen network.

It learns once, from some thousand real images of the training part of a data set, how often it reads held-out real
images right is measured and stands in its name, and it is kept in a cache folder afterwards. So the class-conditional
samples of a generator, and reconstructions, are read by a judge that was made for their classes.

Shapes: N images, D features, C classes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from imgtok.data.images import ImageSource
from imgtok.data.loaders import UnreadableImages, eval_loader
from imgtok.data.sources import DataError
from imgtok.files import cache_folder, replacing
from imgtok.pictures import to_uint8
from imgtok.randomness import permutation
from imgtok.vision.features import FeatureExtractor
from imgtok.weights import read_weights, write_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything besides images and network that decides a probe; change a value and give it another name."""

    name: str = "probe-1"
    train_images: int = 5000
    """Images that it learns from, as many of each class as possible."""
    held_out_images: int = 1000
    """Images that its accuracy is measured on, likewise; all if there are fewer."""
    penalty: float = 0.1
    """Weight of half the sum of the squared weights beside the mean cross-entropy."""
    iterations: int = 500
    """Steps of L-BFGS, at most."""
    tolerance: float = 1e-6
    """Largest element of the gradient at which it ends."""
    block: int = 32
    """Images that the network looks at together; their number shows in the last bits of features."""
    compared: int = 16
    """Images of either part whose pixels tell this data from other data of the same names."""


@dataclass(frozen=True)
class Probe:
    """The classes of images as a linear function of their standardised features."""

    recipe: str
    """Name of the recipe."""
    network: str
    """Name of the network whose features it reads."""
    fingerprint: str
    """64 hexadecimal digits that stand for the recipe, the network and the images, which decide everything else."""
    mean: Tensor
    """(D,) of the features of the images that it learned from; float64, as all of these tensors."""
    deviation: Tensor
    """(D,), likewise."""
    weight: Tensor
    """(D, C)."""
    bias: Tensor
    """(C,)."""
    right: int
    """Held-out images that it reads right."""
    held_out: int
    """Held-out images that it reads."""

    @property
    def num_classes(self) -> int:
        return len(self.bias)

    @property
    def accuracy(self) -> float:
        """Share of held-out real images that are read right: what perfect images would get."""
        return self.right / self.held_out

    @property
    def label(self) -> str:
        """As it stands in the names of scores."""
        measured = f"{100 * self.accuracy:.1f} % of {self.held_out} held-out real images"
        name = f"{self.recipe}:{self.fingerprint[:8]} on {self.network}"
        return f"{name}, {self.num_classes} classes; {measured}"

    def logits(self, features: Tensor) -> Tensor:
        """(N, C) float64, on the CPU, of features (N, D)."""
        return _logits(features, self.mean, self.deviation, self.weight, self.bias)


def _logits(features: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _standardised(features, mean, deviation) @ weight + bias


def _standardised(features: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return (features.cpu().double() - mean) / deviation


# ---------------------------------------------------------------- training


def fit(features: Tensor, labels: Tensor, num_classes: int, recipe: Recipe) -> dict[str, Tensor]:
    """`mean`, `deviation`, `weight` and `bias` of a `Probe`: the minimum of the penalised mean cross-entropy, which is
    unique, by L-BFGS over all of the features (N, D) at once.
    """
    features = features.cpu().double()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    deviation = torch.where(deviation < 1e-6, 1.0, deviation)  # a feature that never varies says nothing, and may later
    rows = _standardised(features, mean, deviation)
    weight = torch.zeros(rows.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=recipe.iterations,
        max_eval=2 * recipe.iterations,
        history_size=20,
        tolerance_grad=recipe.tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(rows @ weight + bias, labels) + recipe.penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return {"mean": mean, "deviation": deviation, "weight": weight.detach(), "bias": bias.detach()}


def choose(labels: np.ndarray, num: int) -> list[int]:
    """Places of `num` images from all over a part, ascending, as many of each class as possible; all if there are
    fewer. Which ones of a class is drawn: every tenth image could be of the same kind.
    """
    order = permutation(0, 0, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.arange(len(labels)) - starts  # 0 for the first image of each class, 1 for the second, ...
    chosen = by_class[np.argsort(turn, kind="stable")][:num]
    return np.sort(chosen).tolist()


@dataclass(frozen=True)
class _Part:
    """The chosen images of a source."""

    source: ImageSource
    places: list[int]

    @staticmethod
    def of(source: ImageSource, num: int) -> _Part:
        return _Part(source, choose(source.labels, num))

    def identity(self, compared: int) -> list[object]:
        """Names, labels and some pixels. Where the data lies is left out: it may be moved."""
        names = [self.source.name(place) for place in self.places]
        start = len(os.path.commonprefix(names))  # noqa: RUF071 - names of rows are no paths
        some = [
            self.places[i] for i in np.linspace(0, len(self.places) - 1, min(compared, len(self.places)), dtype=int)
        ]
        pixels = to_uint8(self.source.batch(some).images)
        return [
            [name[start:] for name in names],
            self.source.labels[self.places].tolist(),
            hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
        ]

    def features(self, extractor: FeatureExtractor, block: int, progress: tqdm) -> tuple[Tensor, Tensor]:
        """(N, D) and the labels (N,), without unreadable images."""
        features, labels = [], []
        unreadable = UnreadableImages(len(self.places))
        for batch in eval_loader(self.source, block, indices=self.places, unreadable=unreadable):
            features.append(extractor(to_uint8(batch.images)).pool.cpu())
            labels.append(batch.labels)
            progress.update(len(batch.labels))
        return torch.cat(features), torch.cat(labels)


# ---------------------------------------------------------------- cache


def load_or_train(
    extractor: FeatureExtractor,
    training: ImageSource,
    held_out: ImageSource,
    *,
    recipe: Recipe | None = None,
    folder: Path | None = None,
    quiet: bool = False,
) -> Probe:
    """The probe for this data from the cache folder, or trained now and stored there if possible.

    `training` and `held_out` are two parts of one data set, at the size of the images that will be judged. `quiet`
    shows no progress. Raises DataError for images without at least two classes, or a class without training images.
    """
    recipe = recipe or Recipe()
    check_classes(training, recipe)
    parts = _Part.of(training, recipe.train_images), _Part.of(held_out, recipe.held_out_images)
    fingerprint = _fingerprint(recipe, extractor.name, parts)
    path = (folder or cache_folder()) / f"{recipe.name}-{fingerprint[:12]}.safetensors"
    found = _read(path, training.num_classes)
    if found is None:
        logger.info("training %s for top1_probe, once; it will be kept in %s", recipe.name, path)
        total = sum(len(part.places) for part in parts)
        with tqdm(total=total, unit="image", desc="probe", disable=quiet) as progress:
            found = _train(extractor, *parts, recipe, progress)
        _write(found, path, recipe)
    right, number = found.pop("held_out").tolist()
    return Probe(recipe.name, extractor.name, fingerprint, **found, right=right, held_out=number)


def check_classes(training: ImageSource, recipe: Recipe | None = None) -> None:
    """Raises DataError for images that no probe can learn from."""
    recipe = recipe or Recipe()
    num_classes = training.num_classes
    if num_classes < 2:
        has = "has only one class" if num_classes else "has no labels"
        raise DataError(f"top1_probe reads classes, and its data {has}; choose images of at least 2 classes")
    if num_classes > recipe.train_images:
        raise DataError(
            f"top1_probe: {recipe.name} learns from {recipe.train_images} images, too few for {num_classes} classes"
        )
    empty = np.flatnonzero(np.bincount(training.labels, minlength=num_classes) == 0).tolist()
    if empty:
        names = [training.class_names[label] if label < len(training.class_names) else label for label in empty]
        shown = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
        raise DataError(
            f"top1_probe: {len(empty)} of the {num_classes} classes have no image in the training part of the data "
            f"({shown}); add some, or state the number of classes that there are (num_classes)"
        )


def _train(
    extractor: FeatureExtractor, training: _Part, held_out: _Part, recipe: Recipe, progress: tqdm
) -> dict[str, Tensor]:
    """The tensors of a probe by the names of its fields; `held_out` is how many are read right, and of how many."""
    found = fit(*training.features(extractor, recipe.block, progress), training.source.num_classes, recipe)
    features, labels = held_out.features(extractor, recipe.block, progress)
    read = _logits(features, **found).argmax(dim=1)
    return {**found, "held_out": torch.tensor([int((read == labels).sum()), len(labels)])}


def _fingerprint(recipe: Recipe, network: str, parts: tuple[_Part, _Part]) -> str:
    """SHA-256 of everything that decides the probe."""
    source = parts[0].source
    facts = [
        asdict(recipe),
        network,
        source.num_classes,
        source.size,
        *(part.identity(recipe.compared) for part in parts),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _write(found: Mapping[str, Tensor], path: Path, recipe: Recipe) -> None:
    try:
        with replacing(path) as temporary:
            write_tensors(found, temporary, {"recipe": json.dumps(asdict(recipe))})
    except OSError as error:
        logger.warning("cannot keep %s, it will be trained again next time: %s", path, error)


def _read(path: Path, num_classes: int) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    try:
        found = read_weights(path)
        width = len(found["mean"])
        wanted = {"mean": (width,), "deviation": (width,), "weight": (width, num_classes), "bias": (num_classes,)}
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        if shapes != {**wanted, "held_out": (2,)}:
            raise ValueError(f"holds {shapes}")
    except (ValueError, KeyError, OSError) as error:
        logger.warning("%s is damaged and will be made again: %s", path, error)
        return None
    return found
