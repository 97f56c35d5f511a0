"""Scores of a validation besides the loss: what the weights are worth when they reconstruct or draw images.

They cost more than the loss, so that they are measured when they are asked for (`training.validation_scores`), on
`training.num_scored` images, by the main process alone. The same images and noise serve each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from imgtok.metrics.reconstruction import psnr
from imgtok.metrics.reference import FeatureSums, Reference
from imgtok.metrics.scorers import OracleScorer, ScoredBatch
from imgtok.pictures import to_uint8
from imgtok.shapes.world import CLASS_NAMES, NUM_CLASSES
from imgtok.sizes import Size, in_pixels, sides, square
from imgtok.tokenizers.base import Autoencoder, Tokenizer
from imgtok.vision import lite0
from imgtok.vision.lite0 import Lite0Extractor

FIELD = "training.validation_scores"


def refuse_others(wanted: Sequence[str], known: Sequence[str], what: str) -> None:
    """Raise ValueError for a score that `what` cannot have."""
    for name in wanted:
        if name not in known:
            raise ValueError(f"{FIELD}: {name} cannot be measured of {what}; what can: {', '.join(known)}")


# ---------------------------------------------------------------- reconstructions


def psnr_by_rate(model: Tokenizer | Autoencoder, batches: Iterable[tuple[Sequence[int], Tensor]]) -> dict[str, float]:
    """Mean PSNR in dB of reconstructed images; of a tokenizer for each of its rates, `psnr@16`, and as `psnr` that of
    the last one, which is of all tokens. `batches` are places of images, by which the noise goes, and the images.
    """
    sums: dict[str, float] = {}
    count = 0
    device = next(model.parameters()).device
    for places, images in batches:
        originals, count = images.to(device), count + len(images)
        for name, decoded in reconstructions(model, originals, places).items():
            values = psnr(to_uint8(decoded.clamp(-1, 1)), to_uint8(originals))
            sums[name] = sums.get(name, 0.0) + values.sum().item()
    if not count:
        raise ValueError("training.validation_scores: none of the held-out images that psnr looks at can be read")
    means = {name: value / count for name, value in sums.items()}
    return {"psnr": [*means.values()][-1], **means}


def reconstructions(model: Tokenizer | Autoencoder, images: Tensor, places: Sequence[int]) -> dict[str, Tensor]:
    """What is left of images at each rate."""
    if isinstance(model, Autoencoder):
        return {"psnr": model.reconstruct(images, seed=0, indices=places)}
    rates = model.rates()
    tokens = model.encode_at(images, rates)
    return {
        f"psnr@{rate}": model.decode(each, seed=0, indices=places) for rate, each in zip(rates, tokens, strict=True)
    }


# ---------------------------------------------------------------- drawn images


class DrawnScores:
    """The share of drawn shapes that an exact oracle reads as their class, and the distance of drawn images from those
    that are held out, in the features of EfficientNet-Lite0.
    """

    KNOWN = ("oracle", "fd_lite0")

    def __init__(
        self,
        wanted: Sequence[str],
        num: int,
        size: Size,
        class_names: Sequence[str],
        draw: Callable[[nn.Module, range], Tensor],
        real: Callable[[], Iterable[Tensor]],
    ) -> None:
        """`draw` gives images of numbers, of the classes in turn, `real` batches of held-out images as the decoder
        gives them back; all in [-1, 1]. Raises ValueError or FileNotFoundError for what cannot be measured.
        """
        refuse_others(wanted, self.KNOWN, "drawn images")
        if "oracle" in wanted and tuple(class_names) != CLASS_NAMES:
            raise ValueError(
                f"{FIELD}: the oracle reads the {NUM_CLASSES} classes of the built-in shapes, and these images have "
                f"other classes or captions; fd_lite0 can be measured of any"
            )
        if "oracle" in wanted:
            square(size, f"{FIELD}: the oracle reads squares: leave it out")
        if "fd_lite0" in wanted and min(sides(size)) < lite0.SMALLEST:
            given = in_pixels(size)
            raise ValueError(f"{FIELD}: fd_lite0 needs images of at least {lite0.SMALLEST} pixels a side, got {given}")
        self.wanted, self.num, self.draw, self.real = wanted, num, draw, real
        self.weights = lite0.find_weights(f"{FIELD}=fd_lite0", None) if "fd_lite0" in wanted else None
        self._extractor: Lite0Extractor | None = None
        self._reference: Reference | None = None

    def __call__(self, model: nn.Module) -> dict[str, float]:
        images = to_uint8(self.draw(model, range(self.num)).clamp(-1, 1)).cpu()
        found: dict[str, float] = {}
        if "oracle" in self.wanted:
            scorer = OracleScorer(self.num)
            scorer.update(ScoredBatch(range(self.num), images, torch.arange(self.num) % NUM_CLASSES))
            scorer.reduce(None)
            found["oracle"] = scorer.scores()[0].value
        if "fd_lite0" in self.wanted:
            extractor = self._network(next(model.parameters()).device)
            if self._reference is None:
                self._reference = statistics(extractor, (to_uint8(batch.clamp(-1, 1)).cpu() for batch in self.real()))
            found["fd_lite0"] = statistics(extractor, images.split(64)).pool.distance(self._reference.pool)
        return found

    def _network(self, device: torch.device) -> Any:
        if self._extractor is None:
            assert self.weights is not None, "looked for when it was asked for"
            self._extractor = Lite0Extractor(lite0.load(self.weights), device)
        return self._extractor


def statistics(extractor: Any, batches: Iterable[Tensor]) -> Reference:
    """Mean and covariance of the features of uint8 images."""
    kept = list(batches)
    sums, first = FeatureSums(sum(map(len, kept)), spatial=False, keep=0), 0
    for batch in kept:
        sums.update(range(first, first + len(batch)), extractor(batch))
        first += len(batch)
    sums.reduce(None)
    return sums.reference("held out", extractor.name)
