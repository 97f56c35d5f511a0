"""Where the images that `imgtok evaluate` scores come from: files, a generator, or a tokenizer's reconstructions.

Each source has `num` images of `size` pixels and yields, for the indices that a process was given, the batches to
score, by rate (None where images have no tokens, or as many as the generator draws). Its `procedure` says how the
images came to be, for the record.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from imgtok.data.images import ImageSource
from imgtok.data.loaders import UnreadableImages, eval_loader
from imgtok.data.sources import places_all_over
from imgtok.generators.pipeline import Pipeline, batches_of
from imgtok.metrics.arrays import Values
from imgtok.metrics.saved_images import SavedImages, partners
from imgtok.metrics.scorers import ScoredBatch, no_labels
from imgtok.pictures import to_uint8
from imgtok.randomness import spread
from imgtok.runtime import Blocks
from imgtok.sample.labels import labels_in_turn, num_labels
from imgtok.sample.reconstruct import reconstruct
from imgtok.sizes import Size, as_given, sides
from imgtok.tokenizers.base import Autoencoder, Rate, Tokenizer
from imgtok.tokenizers.tokens import Tokens

logger = logging.getLogger(__name__)

Versions = Mapping[Rate | None, ScoredBatch]

CROP = "shorter side to the size (halved by box filter while twice as large, then bicubic), central square (ADM)"
COVER = "scaled until it covers the size (halved by box filter while twice as large, then bicubic), centre"
NO_CROP = "none: rendered at this size"


def crop_in_words(size: Size) -> str:
    """How an image is brought to a size."""
    height, width = sides(size)
    return CROP if height == width else COVER


@dataclass(frozen=True, kw_only=True)
class Procedure:
    """How the scored images came to be; null where a step was not ours."""

    images: str
    """What they are, in words."""
    originals: str | None = None
    """What they are compared with one by one."""
    tokens: str | None = None
    """How many tokens each has."""
    crop: str | None = None
    """How originals are brought to the size that is scored."""
    decoding: Any = None
    """The settings of the decoder."""
    sampling: Any = None
    """How tokens or latents were drawn."""
    precision: str | None = None
    """Arithmetic of generator and decoder."""
    tokenizer: Any = None
    """The tokenizer's configuration."""
    generator: Any = None
    """The generator's configuration."""


class Source(Protocol):
    """Images to score."""

    num: int
    size: tuple[int, int]
    rates: tuple[Rate | None, ...]
    tokenizer: Tokenizer | None
    """What decoded the images, if their batches hold the tokens."""
    procedure: Procedure

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Versions]: ...

    def check_classes(self, score: str, number: int, names: Sequence[str] = ()) -> None:
        """Raises ValueError where it is not known which of `number` classes, in the order in which `score` knows them,
        each image should show. `names` are those of the classes, where `score` knows them.
        """


class FileSource:
    """Images of a path (`SavedImages`); with their originals, if a second path holds them.

    Fewer images than there are (`num`) are taken from all over them, from all classes alike where their labels are
    known. `balanced` says that the classes come in turn: then the first ones are of all classes.
    """

    rates: tuple[Rate | None, ...] = (None,)
    tokenizer: Tokenizer | None = None

    def __init__(
        self,
        path: Path,
        num: int | None,
        labels: Literal["recorded", "balanced"],
        originals: Path | None = None,
        *,
        resize: Size | None = None,
        values: Values | None = None,
    ) -> None:
        """`resize` and `values` are those of `SavedImages`."""
        open_saved = functools.partial(SavedImages, resize=resize, values=values)
        self._images = open_saved(path)
        self.num, self.size = check_num(num, len(self._images), str(path)), self._images.size
        self._balanced = labels == "balanced"
        self._labels = None if self._balanced else self._images.labels
        self._places, how = self._choose()
        self._originals = open_saved(originals) if originals is not None else None
        self._partners = partners(self._images, self._originals, self._places) if self._originals else []
        alike = "the files of the same names" if self._images.named else "the images at the same places"
        beside = f"{alike} in {originals}" if originals is not None else None
        crop = f"resize={as_given(resize)}: {crop_in_words(resize)}" if resize else None
        self.procedure = Procedure(images=f"files of {path}{how}", originals=beside, crop=crop)

    def _choose(self) -> tuple[Sequence[int], str]:
        """The places of the images that are scored, and in words which they are."""
        count = len(self._images)
        if self.num == count:
            return range(count), ""
        part = f", {self.num} of {count}"
        if self._balanced:
            return range(self.num), f"{part}: the first"
        labels = None if self._labels is None else self._labels.numpy()
        how = "one of each of as many equal stretches" if labels is None else "from all classes alike"
        return places_all_over(count, self.num, labels).tolist(), f"{part}: {how}"

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Versions]:
        unreadable = UnreadableImages(self.num)
        for chunk in batches_of(indices, batch_size):
            rows, images, problems = self._images.readable([self._places[index] for index in chunk])
            unreadable.add(problems)
            chunk = [chunk[row] for row in rows]
            originals = None
            if self._originals is not None:
                rows, originals, problems = self._originals.readable([self._partners[index] for index in chunk])
                unreadable.add(problems)
                chunk, images = [chunk[row] for row in rows], images[rows]
            labels = None if self._labels is None else self._labels[[self._places[index] for index in chunk]]
            if chunk:
                yield {None: ScoredBatch(chunk, images, labels, originals, balanced=self._balanced)}

    def check_classes(self, score: str, number: int, names: Sequence[str] = ()) -> None:
        if self._balanced:
            return
        path, own = self._images.path, self._images.class_names
        if self._labels is None:
            why = self._images.labels_missing
            raise ValueError(no_labels(score, number) + (f" ({why})" if why else ""))
        if not _are_classes_of(own, tuple(names), number):
            ours, theirs = (", ".join(some[:4]) + (", ..." if len(some) > 4 else "") for some in (own, names))
            known = f" ({theirs})" if theirs else ""
            raise ValueError(
                f"{score} knows {number} classes{known}, and {path} has {len(own)} by name ({ours}); it is not known "
                "which of those they are: name them alike, or save numbers as arr_1 of an .npz or in dataset.json"
            )
        highest = int(self._labels[list(self._places)].max())
        if highest >= number:
            raise ValueError(f"{score} knows the classes 0 to {number - 1}, and {path} has label {highest}")


def _are_classes_of(own: tuple[str, ...], names: tuple[str, ...], number: int) -> bool:
    """Whether classes called `own`, in this order, are the first of those that a score knows: `number` of them, called
    `names` if they have any. Names that are numbers stand for these, but are sorted as text: 10 comes before 2.
    """
    if not own or own == names:
        return True
    if all(name.isdecimal() for name in own):
        ambiguous = bool(names) and all(name.isdecimal() for name in names)
        return not ambiguous and [int(name) for name in own] == list(range(len(own)))
    return not names and len(own) == number


class GeneratorSource:
    """New images, drawn as `imgtok sample` draws them and never written; at each of `rates`, if given."""

    def __init__(
        self,
        pipe: Pipeline,
        num: int,
        classes: Sequence[int],
        rates: Sequence[Rate] = (),
        *,
        seed: int,
        sampling: Any = None,
        decoding: Any = None,
    ) -> None:
        """Raises ValueError for a class or a rate that the generator does not have."""
        self._pipe, self._seed, self._sampling, self._decoding = pipe, seed, sampling, decoding
        self._num_classes = num_labels(pipe)
        self._labels = labels_in_turn(classes, num, self._num_classes)
        self.num, self.size = num, sides(pipe.image_size)
        for rate in rates:
            if rate.tolerance is not None:
                raise ValueError(f"rates: a generator draws numbers of tokens and has no tolerance, given {rate}")
        rates = list(dict.fromkeys(rates))
        counts = [rate.num_tokens for rate in rates]
        pipe.check_counts(counts)
        self.rates: tuple[Rate | None, ...] = tuple(rates) or (None,)
        self.tokenizer = pipe.decoder if isinstance(pipe.decoder, Tokenizer) else None
        known = pipe.generator.rates()
        self.procedure = Procedure(
            images=f"samples of a generator, classes in turn{self._first_classes(classes)}",
            tokens=_counts_in_words(counts or [max(known)]) if known else None,
            decoding=decoding or pipe.decoding,
            sampling=sampling or pipe.sampling,
            precision=pipe.precision,
            tokenizer=pipe.decoder.config,
            generator=pipe.generator.config,
        )

    def _first_classes(self, classes: Sequence[int]) -> str:
        """Which classes are drawn, where it is not all of those that could be."""
        could = len(classes) or self._num_classes
        if self.num >= could:
            return ""
        logger.warning(
            "num=%d of %d classes: only the first %d are drawn; num=%d draws all, classes=A,B others",
            *(self.num, could, self.num, could),
        )
        return f": the first {self.num} of {could}"

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Versions]:
        for chunk in batches_of(indices, batch_size):
            labels = [self._labels[index] for index in chunk]
            counts = [None if rate is None else rate.num_tokens for rate in self.rates]
            made = self._pipe.images_at(
                counts, labels, chunk, seed=self._seed, sampling=self._sampling, decoding=self._decoding
            )
            truth = torch.tensor(labels)
            versions: dict[Rate | None, ScoredBatch] = {}
            for rate, count in zip(self.rates, counts, strict=True):
                images, drawn = made[count]
                tokens = drawn if isinstance(drawn, Tokens) else None
                versions[rate] = ScoredBatch(chunk, images, truth, tokens=tokens)
            yield versions

    def check_classes(self, score: str, number: int, names: Sequence[str] = ()) -> None:
        if self._num_classes != number:
            raise ValueError(f"{score} knows {number} classes, and the generator draws {self._num_classes}")


class ReconstructionSource:
    """Images of a data source and what a tokenizer makes of them at each rate, or an autoencoder.

    Fewer images than there are (`num`) are drawn from all over the source, which may hold one class after the other.
    """

    def __init__(
        self,
        model: Tokenizer | Autoencoder,
        images: ImageSource,
        num: int | None,
        rates: Sequence[Rate | None],
        *,
        seed: int,
        decoding: Any,
        blocks: Blocks,
        what: str = "images",
        rendered: bool = False,
    ) -> None:
        """`what` is the images in words, for the record. `rendered` ones need no crop and are all classes in turn."""
        self._model, self._images, self._seed, self._decoding = model, images, seed, decoding
        self._blocks = blocks
        self.num, self.size = check_num(num, len(images), "the data source"), sides(images.size)
        self._places = range(self.num) if rendered else spread(self.num, len(images)).tolist()
        self.rates: tuple[Rate | None, ...] = tuple(rates)
        self.tokenizer = model if isinstance(model, Tokenizer) else None
        which = "the first, of all classes in turn" if rendered else "drawn from all over them"
        part = "" if self.num == len(images) else f", {self.num} of {len(images)}: {which}"
        self.procedure = Procedure(
            images=f"reconstructions of {what}{part}",
            originals="the same images, cropped",
            tokens=_rates_in_words([rate for rate in rates if rate is not None]),
            crop=NO_CROP if rendered else crop_in_words(images.size),
            decoding=decoding,
            tokenizer=model.config,
        )

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[Versions]:
        index_of = {self._places[index]: index for index in indices}
        for batch in eval_loader(self._images, batch_size, indices=list(index_of)):
            # Noise goes by the place in the source: an image is reconstructed alike whatever `num` is.
            found = reconstruct(
                self._model,
                batch.images,
                batch.indices,
                self.rates,
                seed=self._seed,
                decoding=self._decoding,
                blocks=self._blocks,
            )
            chunk = [index_of[place] for place in batch.indices]
            originals = to_uint8(batch.images)
            yield {
                rate: ScoredBatch(chunk, images, batch.labels, originals, tokens)
                for rate, (images, tokens) in found.items()
            }

    def check_classes(self, score: str, number: int, names: Sequence[str] = ()) -> None:
        if self._images.num_classes == 0:
            raise ValueError(f"{score} compares with labels, and the data has none")
        if self._images.num_classes != number:
            raise ValueError(
                f"{score} knows {number} classes, and the data has {self._images.num_classes}; if only the highest "
                f"ones are missing in it, set data.num_classes={number}"
            )


def image_batches(
    images: ImageSource | SavedImages, indices: Sequence[int], batch_size: int
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Indices and uint8 images of a reference."""
    if isinstance(images, SavedImages):
        unreadable = UnreadableImages(len(images))
        for chunk in batches_of(indices, batch_size):
            rows, pixels, problems = images.readable(chunk)
            unreadable.add(problems)
            if rows:
                yield [chunk[row] for row in rows], pixels
        return
    for batch in eval_loader(images, batch_size, indices=indices, unreadable=UnreadableImages(len(images))):
        yield batch.indices, to_uint8(batch.images)


def check_num(num: int | None, available: int, where: str, field: str = "num") -> int:
    """`num`, or everything for None. Raises ValueError for more than there is."""
    if num is not None and num > available:
        raise ValueError(
            f"{field}: {num} images are asked for, and {where} holds {available}; {field}={available} takes all"
        )
    return num or available


def _counts_in_words(counts: Sequence[int]) -> str:
    if len(counts) == 1:
        return f"{counts[0]} tokens an image"
    return f"the first {', '.join(map(str, counts))} tokens of the same sequence of each image"


def _rates_in_words(rates: Sequence[Rate]) -> str | None:
    if not rates:
        return None
    each = "each of the rates " if len(rates) > 1 else ""
    return f"encoded at {each}{', '.join(map(str, rates))} (tokens an image, at most, and the tolerance after an @)"
