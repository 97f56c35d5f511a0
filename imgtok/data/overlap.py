"""Which images of one source are in another as well, such as held-out images that are trained on; and which rows of a
cache are there a second time.

An image is known by its bytes, wherever it lies and whatever it is called. Sizes are compared first, so that of a
folder or of tars only a few files are read. Parquet and Arrow files do not tell sizes: of a large set a part is looked
at, from all over it, which finds a set that is contained in the other, but perhaps not a single image.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from imgtok.data.images import DataError, FileImages, ImageSource, ShapesImages
from imgtok.data.latents import Latents
from imgtok.data.shards import CacheInfo, same_images
from imgtok.data.sources import Records
from imgtok.data.tokens import TokenDataset
from imgtok.pictures import UnreadableImage
from imgtok.randomness import spread

logger = logging.getLogger(__name__)

RUN = 256
"""Images that are read one after the other, where sizes are not known."""
RUNS = 64
"""Such runs, at most."""


def refuse_shared(trained: ImageSource, held_out: ImageSource, chosen: Sequence[int], field: str) -> None:
    """Raise DataError, with their names, if `chosen` images of `held_out` are in `trained`, too; for less than 1 %, as
    published data sets have them, this is a warning.
    """
    shared = list(shared_images(trained, held_out, chosen))
    if shared:
        message = f"{field}: {len(shared)} of {len(chosen)} held-out images are trained on, too: {_listed(shared)}"
        if 100 * len(shared) >= len(chosen):
            raise DataError(f"{message}; name images that are not, or leave them out of the training")
        logger.warning("%s", message)


def _listed(shared: Sequence[tuple[str, str]], verb: str = "it is") -> str:
    """The first of them: names of held-out images, and of those that are trained on."""
    listed = ", ".join(held if held == name else f"{held} ({verb} {name})" for held, name in shared[:3])
    return listed + (f" and {len(shared) - 3} more" if len(shared) > 3 else "")


def shared_images(trained: ImageSource, held_out: ImageSource, chosen: Sequence[int]) -> Iterator[tuple[str, str]]:
    """The names of the `chosen` images of `held_out` that are in `trained` as well: theirs, and those there."""
    if isinstance(trained, ShapesImages) and isinstance(held_out, ShapesImages):
        number = held_out.config.num_images
        if replace(trained.config, num_images=number) == held_out.config:
            yield from ((held_out.name(index),) * 2 for index in chosen if index < len(trained))
    elif isinstance(trained, FileImages) and isinstance(held_out, FileImages):
        names = {}
        for index in chosen:
            place = int(held_out.places[index])
            if (digest := digest_of(held_out.records, place)) is not None:
                names[digest] = held_out.name(index)
        for place in to_look_at(trained, held_out, chosen):
            digest = digest_of(trained.records, place)
            if digest in names:
                yield names.pop(digest), trained.records.name(place)


def to_look_at(trained: FileImages, held_out: FileImages, chosen: Sequence[int]) -> Iterator[int]:
    """The places in the records of `trained` where one of the chosen images may be."""
    sizes, of_chosen = (getattr(source.records, "sizes", None) for source in (trained, held_out))
    if sizes is not None and of_chosen is not None:
        alike = np.isin(sizes[trained.places], of_chosen[held_out.places[list(chosen)]])
        yield from trained.places[alike].tolist()
        return
    yield from _from_all_over(trained.places.tolist())


def _from_all_over(places: Sequence[int]) -> Iterator[int]:
    """All places, or `RUNS` runs of them where there are more."""
    runs = -(-len(places) // RUN)
    for run in spread(min(runs, RUNS), runs).tolist():
        yield from places[run * RUN : (run + 1) * RUN]


def digest_of(records: Records, place: int) -> bytes | None:
    """What an image is known by; None where it cannot be read."""
    try:
        return hashlib.sha256(records[place].data).digest()
    except UnreadableImage:
        return None


# ------------------------------------------------------------------------------------------------------ caches


def refuse_shared_rows(trained: TokenDataset | Latents, held_out: TokenDataset | Latents, field: str) -> None:
    """Raise DataError, with their names, if images of one cache are in another as well.

    Images are known by the data set, its part and their numbers in it. MAR's folders, which do not tell these, are only
    compared as a whole.
    """
    one: CacheInfo | None = getattr(trained, "info", None)
    two: CacheInfo | None = getattr(held_out, "info", None)
    if one is None or two is None:
        if one is two and getattr(trained, "digest", "") == getattr(held_out, "digest", None):
            raise DataError(
                f"{field}: the same latents as are trained on; name others, or leave a share out: held_out=0.1"
            )
        return
    if not _of_the_same(one, two):
        return
    if one.split != two.split:
        total = _total(one)
        if total is not None and one.num_images + two.num_images > total:
            raise DataError(
                f"{field}: {two.num_images} images are held out of {total} and {one.num_images} are trained on, so "
                "that some are in both caches; make both with the same held_out"
            )
        return
    shared = sorted(set(trained.indices.tolist()) & set(held_out.indices.tolist()))
    if shared:
        named = ", ".join(f"{one.split}[{index}]" for index in shared[:3])
        raise DataError(
            f"{field}: {len(shared)} of its images are trained on, too: {named}{', ...' * (len(shared) > 3)}; "
            f"`{one.COMMAND} split=held_out` makes a cache of others, or leave validation out and give held_out=0.1"
        )


def refuse_copies(
    cache: TokenDataset | Latents, trained: Sequence[int], held_out: Sequence[int], chosen: Sequence[int]
) -> None:
    """Raise DataError, with their names, if latents that are `held_out` from a cache are those of rows that are
    `trained` on, bit for bit. For less than 1 %, and for tokens, this is a warning: a tokenizer that uses few of its
    codes gives different images the same tokens.

    Of latents, which are read from the disk, a part of a large cache is looked at: the `chosen` of the held-out rows,
    and rows from all over those that are trained on. Arithmetic depends on the batch, so a copy that was encoded in
    another one may differ in its last bits, and is not found.
    """
    if isinstance(cache, Latents) and len(cache) > RUN * RUNS:
        trained, held_out = list(_from_all_over(trained)), chosen
    known: dict[bytes, list[int]] = {}
    for row, content in zip(held_out, cache.known_by(held_out), strict=True):
        known.setdefault(content, []).append(row)
    pairs: dict[int, int] = {}  # held-out row -> the first row with the same content that is trained on
    for row, content in zip(trained, cache.known_by(trained), strict=True):
        if content in known:
            pairs.update(dict.fromkeys(known.pop(content), row))
    if not pairs:
        return
    shared = [(cache.name(held), cache.name(pairs[held])) for held in sorted(pairs)]
    of_tokens = isinstance(cache, TokenDataset)
    what = "tokens" if of_tokens else "latents"
    message = (
        f"held_out: {len(pairs)} of {len(held_out)} held-out rows have the {what} of rows that are trained on: "
        f"{_listed(shared, 'as')}; remove copies from the data and make the cache again, or validate on a cache of "
        "other images: validation=FOLDER"
    )
    if of_tokens:
        message += ". If they are of different images, the tokenizer uses too few of its codes"
    elif 100 * len(pairs) >= len(held_out):
        raise DataError(f"{message}; a run that has begun goes on without validation: training.validate_every=null")
    logger.warning("%s", message)


def _of_the_same(one: CacheInfo, two: CacheInfo) -> bool:
    """Whether two caches are of the same data set, of shapes: of scenes of the same kind, however many."""
    first, second = _told(one), _told(two)
    if first.get("kind") == second.get("kind") == "shapes":
        return {**first, "num_images": 0} == {**second, "num_images": 0}
    return same_images(one.dataset, two.dataset)


def _total(info: CacheInfo) -> int | None:
    """The images of a data set of which a share is held out; None where another part is, or it is not known."""
    told = _told(info)
    if "images" not in told or told.get("own_held_out"):
        return None
    return min(told["images"], told.get("num") or told["images"])


def _told(info: CacheInfo) -> dict[str, Any]:
    try:
        told = json.loads(info.dataset)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
