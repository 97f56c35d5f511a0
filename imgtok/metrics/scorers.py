"""One class for each family of scores. All are fed batches of images by index, and say their scores at the end.

The name of a score holds its protocol (`FID-50k[inception-v3-compat, imagenet256-train]`): how many images, judged by
what, against what. Scores with different names are not comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from imgtok.metrics.accumulate import Histogram, InceptionScore, Moments, Reducer, Rows
from imgtok.metrics.kernel import MOST_IMAGES, kernel_distance
from imgtok.metrics.precision_recall import MOST_REAL_FEATURES, NEIGHBOURS, precision_recall
from imgtok.metrics.reference import FeatureSums, Reference, Statistics
from imgtok.pictures import from_uint8, to_uint8
from imgtok.randomness import spread
from imgtok.shapes.classifier import Recipe, ShapesNet
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.oracle import class_readings
from imgtok.shapes.world import COLOURS, NUM_CLASSES, VERSION, ShapesConfig
from imgtok.tokenizers.base import Tokenizer
from imgtok.tokenizers.tokens import Tokens
from imgtok.vision import lite0
from imgtok.vision.features import FeatureExtractor, Features
from imgtok.vision.inception import INCEPTION_NAME

INCEPTION_SCORE_PARTS = 10


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
    balanced: bool = False
    """Whether the images show all classes in turn, where they have no labels: as many as a score knows."""

    def classes(self, score: str, number: int) -> Tensor:
        """The class of `number` that each image should show, (B,); `score` asks. Raises ValueError without labels."""
        if self.labels is not None:
            return self.labels.cpu()
        if not self.balanced:
            raise ValueError(no_labels(score, number))
        return torch.as_tensor(list(self.indices)) % number


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


def no_labels(score: str, number: int) -> str:
    """The message for images of which nobody knows what they should show."""
    return (
        f"{score} compares with labels, and these images have none; "
        f"labels=balanced takes index modulo {number}, the sampler's order"
    )


def short(count: int) -> str:
    """A number of images as it stands in names: 50000 -> "50k", 256 -> "256"."""
    return f"{count // 1000}k" if count >= 1000 and count % 1000 == 0 else str(count)


# ---------------------------------------------------------------- features of a network


@dataclass(frozen=True, kw_only=True)
class Family:
    """The scores on one network's features by their metrics' names, as `imgtok evaluate` knows them: each belongs to
    one network, and its name says to which.
    """

    network: str
    """What the network's weights are called in a record."""
    extractor: str
    """How the network's name begins in scores and files of statistics."""
    frechet: str
    kernel: str
    precision_recall: str
    others: tuple[str, ...] = ()
    """Scores that no other network has."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.others, self.frechet, self.kernel, self.precision_recall)

    @property
    def with_reference(self) -> tuple[str, ...]:
        """Those that compare with a set of real images."""
        sfid = ("sfid",) if "sfid" in self.others else ()
        return (self.frechet, *sfid, self.kernel, self.precision_recall)

    @property
    def on_single_images(self) -> tuple[str, ...]:
        """Those that statistics are not enough for."""
        return (self.kernel, self.precision_recall)

    def chosen(self, metrics: Collection[str]) -> list[str]:
        """Its own among `metrics`."""
        return [metric for metric in self.metrics if metric in metrics]


INCEPTION = Family(
    network="inception",
    extractor=INCEPTION_NAME,
    frechet="fid",
    kernel="kid",
    precision_recall="precision_recall",
    others=("rfid", "sfid", "is"),
)
LITE0 = Family(
    network="lite0",
    extractor=lite0.NAME,
    frechet="fd_lite0",
    kernel="kd_lite0",
    precision_recall="precision_recall_lite0",
)
FAMILIES = (INCEPTION, LITE0)

_TITLES = {
    "fid": "FID",
    "rfid": "rFID",
    "sfid": "sFID",
    "kid": "KID",
    "fd_lite0": "FD-lite0",
    "kd_lite0": "KD-lite0",
    "psnr": "PSNR",
    "ssim": "SSIM",
    "mae": "MAE",
    "lpips": "LPIPS",
    "dino": "DINO",
    "dino_patches": "DINO_PATCHES",
}
"""How the names of scores begin, where it is not the key with dashes."""


def _titled(key: str) -> str:
    return _TITLES.get(key, key.replace("_", "-"))


class OriginalsReference:
    """Statistics of the originals, taken in the same pass as their reconstructions: what rFID compares with.

    Fed once for each batch, however many reconstructions (token counts) there are of it. Hence both sides are the same
    images, cropped alike, also when some of them could not be read.
    """

    name = "own originals"

    def __init__(self, extractor: FeatureExtractor, num: int, keep: int = 0) -> None:
        """`keep` is how many of the `num` originals' features are held for scores that look at single images."""
        self._extractor = extractor
        self._sums = FeatureSums(num, spatial=False, keep=keep)

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


class FeatureScorer:
    """The scores of a family that are in `metrics`: distances to real images in a network's features, precision and
    recall, and of Inception the Inception score.
    """

    def __init__(
        self,
        family: Family,
        metrics: Collection[str],
        extractor: FeatureExtractor,
        num: int,
        reference: Reference | OriginalsReference | None,
        splits: int = INCEPTION_SCORE_PARTS,
        *,
        originals: OriginalsReference | None = None,
    ) -> None:
        """`reference` may be None for `is` and `rfid`; the latter needs `originals`. Someone else feeds the originals,
        also where they are the reference.
        """
        self._family, self._metrics = family, family.chosen(metrics)
        self._extractor, self._num, self._splits = extractor, num, splits
        self._reference, self._originals = reference, originals
        _check_reference(family, self._metrics, reference)
        if "rfid" in self._metrics and originals is None:
            raise ValueError("rfid compares with originals, and these images have none")
        keep = features_to_keep(family, self._metrics, num)
        self._sums = FeatureSums(num, spatial="sfid" in self._metrics, keep=keep)
        self._inception_score: InceptionScore | None = None

    def update(self, batch: ScoredBatch) -> None:
        features = self._extractor(batch.images)
        self._sums.update(batch.indices, features)
        if "is" in self._metrics:
            assert features.logits is not None, "is is a score of Inception's"
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
        if "rfid" in self._metrics and self._originals is not None:
            scores.append(self._frechet("rfid", found, self._originals.reference(), size))
        if self._reference is not None:
            known = self._reference if isinstance(self._reference, Reference) else self._reference.reference()
            scores += self._against(found, known, size)
        if self._inception_score is not None:
            value = float(self._inception_score.scores().mean())
            scores.append(Score("is", f"IS-{self._splits}-{size}[{self._extractor.name}]", value))
        return scores

    def _against(self, found: Reference, reference: Reference, size: str) -> list[Score]:
        scores, family = [], self._family
        if family.frechet in self._metrics:
            scores.append(self._frechet(family.frechet, found, reference, size))
        if found.spatial and reference.spatial:
            name = f"sFID-{size}[{self._extractor.name}, {reference.name}]"
            scores.append(Score("sfid", name, found.spatial.distance(reference.spatial)))
        ours, real = found.features, reference.features
        if ours is None or real is None:
            return scores
        if family.kernel in self._metrics:
            sides = [_thinned(side, MOST_IMAGES) for side in (ours, real)]
            protocol = f"{self._extractor.name}, {reference.name} {short(len(sides[1]))}, cubic"
            name = f"{_titled(family.kernel)}-{short(len(sides[0]))}[{protocol}]"
            scores.append(Score(family.kernel, name, kernel_distance(*sides)))
        if family.precision_recall in self._metrics:
            pair = precision_recall(ours, real)
            protocol = f"{self._extractor.name}, {reference.name} {short(len(real))}, k={NEIGHBOURS}"
            for part, value in pair._asdict().items():
                key = family.precision_recall.replace("precision_recall", part)
                scores.append(Score(key, f"{_titled(key)}-{size}[{protocol}]", value))
        return scores

    def _frechet(self, key: str, found: Reference, reference: Reference, size: str) -> Score:
        name = f"{_titled(key)}-{size}[{self._extractor.name}, {reference.name}]"
        return Score(key, name, found.pool.distance(reference.pool))


def features_to_keep(family: Family, metrics: Collection[str], num: int, *, real: bool = False) -> int:
    """The number among `num` images of which the scores in `metrics` need the features themselves; `real` ones are at
    most MOST_REAL_FEATURES.
    """
    if family.precision_recall in metrics:
        return min(num, MOST_REAL_FEATURES) if real else num
    return min(num, MOST_IMAGES) if family.kernel in metrics else 0


def _thinned(features: Tensor, most: int) -> Tensor:
    return features if len(features) <= most else features[torch.from_numpy(spread(most, len(features)))]


def _check_reference(
    family: Family, metrics: Collection[str], reference: Reference | OriginalsReference | None
) -> None:
    needed = [metric for metric in family.with_reference if metric in metrics]
    if needed and reference is None:
        raise ValueError(f"{', '.join(needed)} compare with real images: give reference=PATH or a data source")
    if not isinstance(reference, Reference):
        return
    if "sfid" in needed and reference.spatial is None:
        raise ValueError(f"the reference {reference.name} has no spatial statistics (mu_s, sigma_s) for sfid")
    single = [metric for metric in family.on_single_images if metric in needed]
    if single and reference.features is None:
        verb = "needs" if len(single) == 1 else "need"
        raise ValueError(
            f"{', '.join(single)} {verb} the real images themselves; {reference.name} holds only statistics"
        )


class ClassScorer:
    """How often a classifier reads the class that an image should show: as its first answer, or among its first few.

    The classifier is any function of a network's features, so a pass through the network serves all scores on it.
    """

    def __init__(
        self,
        judge: str,
        extractor: FeatureExtractor,
        classify: Callable[[Features], Tensor],
        num_classes: int,
        num: int,
        protocol: str,
        ranks: Sequence[int] = (1,),
        *,
        originals: bool = False,
    ) -> None:
        """`classify` gives logits (B, `num_classes`). The key for each of `ranks`, the numbers of answers among which
        the class may be, is `top1_JUDGE`, say; `protocol` is the classifier as it stands in the names of scores. With
        `originals` it looks at what the images reconstruct, and the key is `top1_JUDGE_originals`.
        """
        self._of_originals = originals
        self._judge, self._protocol, self._num_classes, self._ranks = judge, protocol, num_classes, ranks
        self._extractor, self._classify = extractor, classify
        self._rows = Rows(num, len(self._ranks))

    def update(self, batch: ScoredBatch) -> None:
        """Raises ValueError without labels."""
        truth = batch.classes(f"top1_{self._judge}", self._num_classes)
        images = batch.originals if self._of_originals else batch.images
        assert images is not None, "whoever asks about originals has some"
        answers = self._classify(self._extractor(images)).topk(max(self._ranks), dim=1).indices.cpu()
        right = answers == truth[:, None]
        self._rows.update(batch.indices, torch.stack([right[:, :rank].any(dim=1) for rank in self._ranks], dim=1))

    def reduce(self, reducer: Reducer | None) -> None:
        self._rows.reduce(reducer)

    def scores(self) -> list[Score]:
        rows = self._rows.scored
        found = []
        for rank, value in zip(self._ranks, rows.mean(dim=0).tolist(), strict=True):
            key = f"top{rank}_{self._judge}{'_originals' if self._of_originals else ''}"
            found.append(Score(key, f"{_titled(key)}-{short(len(rows))}[{self._protocol}]", value))
        return found


# ---------------------------------------------------------------- tokens, shapes, pairs


class CodeScorer:
    """What the images cost at a rate: tokens, bits, and how much of the codebook they use.

    `bits` is `Tokenizer.bits`, the mean over the images. `codebook_use` is the share of the ids that occur in the
    scored images, `codebook_perplexity` 2 to the entropy of the ids; neither is given for tokens that are vectors, nor
    for a vocabulary of more than 2^24, of which no set of images uses a share worth knowing.
    """

    KEYS = ("tokens", "bits", "codebook_use", "codebook_perplexity")
    LARGEST = 1 << 24

    def __init__(self, tokenizer: Tokenizer, num: int) -> None:
        self._tokenizer, self._rows = tokenizer, Rows(num, 2)
        coded = tokenizer.vector_width is None and tokenizer.vocab_size <= self.LARGEST
        self._ids = Histogram(tokenizer.vocab_size) if coded else None

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
        width = tokenizer.vector_width
        parts = [f"log2({tokenizer.vocab_size}) a token" if width is None else f"32 x {width} a token"]
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
        truth = batch.classes("the oracle", NUM_CLASSES)
        read = class_readings(batch.images.cpu().float() / 255)
        known, per_shape = read.labels >= 0, len(COLOURS)
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
        return [Score(key, _titled(key) + protocol, float(value)) for key, value in means]
