"""One class for each family of scores. All are fed batches of images by index, and say their scores at the end.

The name of a score holds its protocol (`FID-50k[inception-v3-compat, imagenet256-train]`): how many images, judged by
what, against what. Scores with different names are not comparable.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from imgtok.metrics.accumulate import Histogram, InceptionScore, Moments, Reducer, Rows
from imgtok.metrics.precision_recall import NEIGHBOURS, precision_recall
from imgtok.metrics.reference import FeatureSums, Reference, Statistics
from imgtok.pictures import from_uint8, to_uint8
from imgtok.shapes.classifier import Recipe, ShapesNet
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.oracle import class_readings
from imgtok.shapes.world import COLOURS, VERSION, ShapesConfig
from imgtok.tokenizers.base import Tokenizer
from imgtok.tokenizers.tokens import Tokens
from imgtok.vision.inception import FeatureExtractor

logger = logging.getLogger(__name__)

INCEPTION_SCORE_PARTS = 10
NO_LABELS = (
    "the oracle compares with labels, and these images have none; "
    "labels=balanced takes index modulo 64, the sampler's order"
)


@dataclass(frozen=True)
class ScoredBatch:
    """Images to score; uint8, on the CPU."""

    indices: Sequence[int]
    images: Tensor
    """(B, 3, H, W)."""
    labels: Tensor | None = None
    """Class that each image should show, (B,)."""
    originals: Tensor | None = None
    """What the images reconstruct."""
    tokens: Tokens | None = None
    """What the images were decoded from, where a tokenizer did it."""


@dataclass(frozen=True)
class Score:
    """One number: a short key for programs, a name with the protocol for people."""

    key: str
    name: str
    value: float


class PairJudge(Protocol):
    """Numbers for each pair of an image and its original."""

    @property
    def keys(self) -> tuple[str, ...]:
        """What the numbers are."""

    @property
    def protocol(self) -> str:
        """How they are found, for the names of scores."""

    @property
    def smallest(self) -> Mapping[str, int]:
        """Pixels a side that images must have, for the keys that set a limit."""

    def __call__(self, images: Tensor, originals: Tensor) -> Tensor:
        """(B, len(keys)) of uint8 images and originals (B, 3, H, W)."""


class Scorer(Protocol):
    """Fed by every process with its share of the indices; `scores` is asked after `reduce`."""

    def update(self, batch: ScoredBatch) -> None: ...
    def reduce(self, reducer: Reducer | None) -> None: ...
    def scores(self) -> list[Score]: ...


def short(count: int) -> str:
    """A number of images as it stands in names: 50000 -> "50k", 256 -> "256"."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


class OriginalsReference:
    """Statistics of the originals, taken in the same pass as their reconstructions: what rFID compares with.

    Fed once for each batch, however many reconstructions (token counts) there are of it. Hence both sides are the same
    images, cropped alike, also when some of them could not be read.
    """

    name = "own originals"

    def __init__(self, extractor: FeatureExtractor, num: int) -> None:
        self._extractor = extractor
        self._sums = FeatureSums(num, spatial=False, keep=0)

    def update(self, batch: ScoredBatch) -> None:
        """Raises ValueError without originals."""
        if batch.originals is None:
            raise ValueError("rfid compares with originals, and these images have none")
        self._sums.update(batch.indices, self._extractor(batch.originals))

    def reduce(self, reducer: Reducer | None) -> None:
        self._sums.reduce(reducer)

    def reference(self) -> Reference:
        """What was measured; to be asked for after `reduce`."""
        return self._sums.reference(self.name, self._extractor.name)


class InceptionScorer:
    """rfid, fid, sfid, is, precision and recall, whichever of them are in `metrics`."""

    def __init__(
        self,
        metrics: Collection[str],
        extractor: FeatureExtractor,
        num: int,
        reference: Reference | None,
        splits: int = INCEPTION_SCORE_PARTS,
        *,
        originals: OriginalsReference | None = None,
    ) -> None:
        """`reference` may be None for `is` and `rfid`; the latter needs `originals`, which someone else feeds."""
        self._metrics, self._extractor, self._num, self._splits = set(metrics), extractor, num, splits
        self._reference, self._originals = reference, originals
        _check_reference(self._metrics, reference)
        if "rfid" in self._metrics and originals is None:
            raise ValueError("rfid compares with originals, and these images have none")
        self._sums = FeatureSums(num, spatial="sfid" in metrics, keep=num if "precision_recall" in metrics else 0)
        self._inception_score: InceptionScore | None = None

    def update(self, batch: ScoredBatch) -> None:
        features = self._extractor(batch.images)
        self._sums.update(batch.indices, features)
        if "is" in self._metrics:
            if self._inception_score is None:
                self._inception_score = InceptionScore(features.logits.shape[1], self._num, self._splits)
            self._inception_score.update(batch.indices, features.logits)

    def reduce(self, reducer: Reducer | None) -> None:
        self._sums.reduce(reducer)
        if self._inception_score is not None:
            self._inception_score.reduce(reducer)

    def scores(self) -> list[Score]:
        found = self._sums.reference("", self._extractor.name)
        size = short(found.pool.count)
        scores = []
        if {"fid", "rfid"} & self._metrics and found.pool.count <= len(found.pool.mean):
            counts = (found.pool.count, len(found.pool.mean))
            logger.warning("FID of %d images in %d dimensions: the covariance is rank-deficient", *counts)
        if "rfid" in self._metrics and self._originals is not None:
            name = f"rFID-{size}[{self._extractor.name}, {self._originals.name}]"
            scores.append(Score("rfid", name, found.pool.distance(self._originals.reference().pool)))
        if self._reference is not None:
            scores += self._against(found, self._reference, size)
        if self._inception_score is not None:
            value = float(self._inception_score.scores().mean())
            scores.append(Score("is", f"IS-{self._splits}-{size}[{self._extractor.name}]", value))
        return scores

    def _against(self, found: Reference, reference: Reference, size: str) -> list[Score]:
        scores, protocol = [], f"[{self._extractor.name}, {reference.name}]"
        if "fid" in self._metrics:
            scores.append(Score("fid", f"FID-{size}{protocol}", found.pool.distance(reference.pool)))
        if found.spatial and reference.spatial:
            scores.append(Score("sfid", f"sFID-{size}{protocol}", found.spatial.distance(reference.spatial)))
        if found.features is not None and reference.features is not None:
            pair = precision_recall(found.features, reference.features)
            protocol = f"{protocol[:-1]} {short(len(reference.features))}, k={NEIGHBOURS}]"
            scores.append(Score("precision", f"precision-{size}{protocol}", pair.precision))
            scores.append(Score("recall", f"recall-{size}{protocol}", pair.recall))
        return scores


def _check_reference(metrics: Collection[str], reference: Reference | None) -> None:
    needed = [metric for metric in ("fid", "sfid", "precision_recall") if metric in metrics]
    if needed and reference is None:
        raise ValueError(f"{', '.join(needed)} compare with real images: give reference=PATH or a data source")
    if reference is not None and "sfid" in needed and reference.spatial is None:
        raise ValueError(f"the reference {reference.name} has no spatial statistics (mu_s, sigma_s) for sfid")
    if reference is not None and "precision_recall" in needed and reference.features is None:
        raise ValueError(f"precision_recall needs the real images themselves; {reference.name} holds only statistics")


class CodeScorer:
    """What the images cost at a rate: tokens, bits, and how much of the codebook they use.

    `bits` is `Tokenizer.bits`, the mean over the images. `codebook_use` is the share of the ids that occur in the
    scored images, `codebook_perplexity` 2 to the entropy of the ids; neither is given for a vocabulary of more than
    2^24, of which no set of images uses a share worth knowing.
    """

    KEYS = ("tokens", "bits", "codebook_use", "codebook_perplexity")
    LARGEST = 1 << 24

    def __init__(self, tokenizer: Tokenizer, num: int) -> None:
        self._tokenizer, self._rows = tokenizer, Rows(num, 2)
        self._ids = Histogram(tokenizer.vocab_size) if tokenizer.vocab_size <= self.LARGEST else None

    def update(self, batch: ScoredBatch) -> None:
        """Raises ValueError without tokens."""
        if batch.tokens is None:
            raise ValueError("these images were not decoded from tokens, whose number is asked for")
        tokens = batch.tokens.to("cpu")
        self._rows.update(batch.indices, torch.stack([tokens.lengths.double(), self._tokenizer.bits(tokens)], dim=1))
        if self._ids is not None:
            self._ids.update(tokens.ids[tokens.mask])

    def reduce(self, reducer: Reducer | None) -> None:
        self._rows.reduce(reducer)
        if self._ids is not None:
            self._ids.reduce(reducer)

    def scores(self) -> list[Score]:
        rows = self._rows.scored
        size, ids = short(len(rows)), self._tokenizer.vocab_size
        tokens, bits = rows.mean(dim=0).tolist()
        scores = [
            Score("tokens", f"tokens-{size}[mean an image]", tokens),
            Score("bits", f"bits-{size}[mean an image, {self._formula()}]", bits),
        ]
        if self._ids is not None:
            scores.append(Score("codebook_use", f"codebook_use-{size}[share of {ids} ids]", self._ids.use))
            name = f"codebook_perplexity-{size}[2^entropy of the ids]"
            scores.append(Score("codebook_perplexity", name, self._ids.perplexity))
        return scores

    def _formula(self) -> str:
        """How bits are counted, see `Tokenizer.bits`."""
        tokenizer = self._tokenizer
        parts = [f"log2({tokenizer.vocab_size}) a token"]
        if not tokenizer.fixed_length:
            parts.append(f"log2({tokenizer.num_tokens}) for their number")
        if tokenizer.num_slots is not None:
            parts.append(f"log2({tokenizer.num_slots} over it) for their slots")
        return " + ".join(parts)


class ShapesDistance:
    """fd_shapes: Frechet distance to fresh renders of the same profile in the features of the small shapes network.

    Beside it stands `fd_shapes_clean`, the same number for as many other renders: what a perfect model would get.
    """

    # Scenes far from those that data sets use; a multiple of 64, so the classes stay in step with the index.
    FIRST_SCENE = 1 << 30

    def __init__(
        self, net: ShapesNet, profile: ShapesConfig, num: int, device: torch.device, label: str | None = None
    ) -> None:
        """`num` is the number of images in the whole evaluation, and of renders in each set of them."""
        self._net, self._device, self._label = net.to(device), device, label or Recipe().label
        split = "val" if profile.split == "train" else profile.split
        self._profile = replace(profile, split=split, num_images=self.FIRST_SCENE + 2 * num)
        self._num = num
        dimension = len(net.mean)
        self._found, self._real, self._clean = (Moments(dimension) for _ in range(3))
        self._renders: ShapesDataset | None = None

    def update(self, batch: ScoredBatch) -> None:
        """Renders the references of the same indices along with the images."""
        self._found.update(self._features(batch.images))
        size = min(batch.images.shape[-2:])
        if self._renders is None:
            self._renders = ShapesDataset(self._profile, size)
        for moments, offset in ((self._real, 0), (self._clean, self._num)):
            scenes = [self.FIRST_SCENE + offset + index for index in batch.indices]
            moments.update(self._features(to_uint8(self._renders.batch(scenes)[0])))

    def _features(self, images: Tensor) -> Tensor:
        return self._net.features(from_uint8(images.to(self._device)))

    def reduce(self, reducer: Reducer | None) -> None:
        for moments in (self._found, self._real, self._clean):
            moments.reduce(reducer)

    def scores(self) -> list[Score]:
        found, real, clean = (Statistics.of(moments) for moments in (self._found, self._real, self._clean))
        name = f"fd_shapes-{short(found.count)}[{self._label}]"
        return [
            Score("fd_shapes", name, found.distance(real)),
            Score("fd_shapes_clean", f"{name} of other real renders", clean.distance(real)),
        ]


class OracleScorer:
    """What the exact oracle of the built-in shapes reads, against the label 8 * shape + colour of each image.

    `oracle_top1` asks for exactly one object, of the right shape and colour. The others look at the largest object:
    its shape, its colour; objects beyond one on average; images in which none can be read.
    """

    KEYS = ("oracle_top1", "oracle_shape", "oracle_colour", "oracle_extra", "oracle_unread")

    def __init__(self, num: int) -> None:
        self._rows = Rows(num, len(self.KEYS))

    def update(self, batch: ScoredBatch) -> None:
        """Raises ValueError without labels."""
        if batch.labels is None:
            raise ValueError(NO_LABELS)
        read = class_readings(batch.images.cpu().float() / 255)
        known, truth, per_shape = read.labels >= 0, batch.labels.cpu(), len(COLOURS)
        columns = (
            (read.labels == truth) & (read.counts == 1),
            known & (read.labels // per_shape == truth // per_shape),
            known & (read.labels % per_shape == truth % per_shape),
            (read.counts - 1).clamp(min=0),
            ~known,
        )
        self._rows.update(batch.indices, torch.stack([column.double() for column in columns], dim=1))

    def reduce(self, reducer: Reducer | None) -> None:
        self._rows.reduce(reducer)

    def scores(self) -> list[Score]:
        rows = self._rows.scored
        protocol = f"-{short(len(rows))}[{VERSION}]"
        means = zip(self.KEYS, rows.mean(dim=0), strict=True)
        return [Score(key, key + protocol, float(value)) for key, value in means]


class ReconstructionScorer:
    """What a judge says of each reconstruction beside its original: means of the images' own scores."""

    def __init__(self, judge: PairJudge, num: int) -> None:
        self._judge = judge
        self._rows = Rows(num, len(judge.keys))

    def update(self, batch: ScoredBatch) -> None:
        """Raises ValueError without originals."""
        if batch.originals is None:
            raise ValueError(f"{', '.join(self._judge.keys)} compare with originals, and these images have none")
        self._rows.update(batch.indices, self._judge(batch.images, batch.originals))

    def reduce(self, reducer: Reducer | None) -> None:
        self._rows.reduce(reducer)

    def scores(self) -> list[Score]:
        rows = self._rows.scored
        protocol = f"-{short(len(rows))}[{self._judge.protocol}]"
        means = zip(self._judge.keys, rows.mean(dim=0), strict=True)
        return [Score(key, key.upper() + protocol, float(value)) for key, value in means]
