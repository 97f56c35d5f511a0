"""The real images that scores compare with: statistics that a file holds, or images that are looked at now.

A file may hold both, as ADM's reference batches do: then its statistics serve the Frechet distances, and its images
what statistics are not enough for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from imgtok.data.images import ImageSource, open_images
from imgtok.metrics import reference as references
from imgtok.metrics.reference import FeatureSums, Reference
from imgtok.metrics.saved_images import SavedImages, holds_images, resize_remedy
from imgtok.metrics.scorers import FAMILIES, Family, features_to_keep, short
from imgtok.randomness import spread
from imgtok.sample.evaluate.config import FEWEST, Config
from imgtok.sample.evaluate.sources import check_num, image_batches
from imgtok.sizes import size_of
from imgtok.vision.features import FeatureExtractor

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Looking = Sequence[tuple[Family, Sequence[str]]]
"""Families, each with its scores that are asked for."""


@dataclass(frozen=True)
class RealFile:
    """What `reference` names, opened before weights are looked for."""

    path: Path
    contents: references.Contents | None
    """None where it holds no statistics."""
    images: SavedImages | None
    """None where it holds none, or none are needed."""

    def serves(self, family: Family) -> bool:
        """Whether its statistics are, as far as one knows, of the family's network."""
        return self.contents is not None and references.may_be_of(self.contents.extractor, family.extractor)


def open_real_file(config: Config) -> RealFile | None:
    """Raises FileNotFoundError for a file that is not there, ValueError for one that lacks what the metrics need."""
    if config.reference is None or not config.against_others:
        return None
    path = config.reference.expanduser()
    contents = references.look_into(path)
    if contents is not None and contents.extractor is None:
        contents = replace(contents, extractor=config.assume_extractor)
    found = RealFile(path, contents, None)
    lacking = _lacking(config, found)
    if contents is not None and contents.extractor is None:
        for family in FAMILIES:
            if {*family.chosen(config.with_reference)} - {*lacking}:
                raise references.unknown_network(path, family.extractor)
    if contents is not None and not lacking:
        return found
    if contents is not None and not (path.suffix == ".npz" and holds_images(path)):
        if config.real is not None:
            raise ValueError(f"real: {path} holds the statistics of all its images, of which none can be left out")
        rest = [metric for metric in config.chosen_metrics if metric not in lacking]
        without = f", or leave them out: metrics={','.join(rest)}" if rest else ""
        raise ValueError(
            f"{path}: holds only statistics ({', '.join(contents.arrays)}{_of(contents.extractor)}), and "
            f"{', '.join(lacking)} need{'s'[: len(lacking) == 1]} the real images themselves: give these as "
            f"reference=PATH{without}"
        )
    return replace(found, images=SavedImages(path, resize=config.resize, values=config.array_values))


def _of(extractor: str | None) -> str:
    return "" if extractor is None else f" of {extractor}"


def _lacking(config: Config, file: RealFile) -> list[str]:
    """The scores that the statistics of the file are not enough for."""
    asked = config.with_reference
    if file.contents is None or config.real is not None:
        return list(asked)
    lacking = []
    for family in FAMILIES:
        single = () if file.serves(family) else family.with_reference
        spatial = () if "mu_s" in file.contents.arrays else ("sfid",)
        lacking += [m for m in family.chosen(asked) if m in (*single, *spatial, *family.on_single_images)]
    return lacking


def open_references(
    config: Config,
    file: RealFile | None,
    size: tuple[int, int],
    looking: Looking,
    extractors: Mapping[str, FeatureExtractor],
    accelerator: Accelerator,
) -> tuple[dict[str, Reference], str]:
    """What each network says of the real images, which are to be compared with images of `size`; and in words, which
    they are. Raises ValueError for too few of them, or for another size.
    """
    known: dict[str, Reference] = {}
    wanted: list[tuple[Family, list[str]]] = []
    lacking = {*config.with_reference} if file is None else {*_lacking(config, file)}
    for family, metrics in looking:
        asked = [metric for metric in metrics if metric in family.with_reference]
        if file is not None and not lacking.issuperset(asked):
            name = extractors[family.network].name
            known[family.network] = references.load(file.path, name, config.assume_extractor)
        if rest := [metric for metric in asked if metric in lacking]:
            wanted.append((family, rest))
    words = [f"statistics in {file.path}"] if file is not None and known else []
    if wanted:
        images, place, name = _images(config, file, size)
        num = check_num(config.real, len(images), place, "real")
        for metric in config.with_reference:
            if num < FEWEST[metric]:
                raise ValueError(f"metrics: {metric} needs at least {FEWEST[metric]} real images, and there are {num}")
        part = "all" if num == len(images) else f"{num} of"
        drawn = "" if num == len(images) else ", drawn from all over them"
        words.append(f"{part} {len(images)} images of {place}{drawn}")
        if num < len(images):
            name = f"{short(num)} of {name}"
        places = spread(num, len(images)).tolist()
        for network, seen in _measure(images, places, name, config, wanted, extractors, accelerator).items():
            stats = known.get(network)
            if stats is not None:
                seen = replace(stats, spatial=stats.spatial or seen.spatial, features=seen.features)
            known[network] = seen
    if config.save_reference is not None and accelerator.is_main_process:
        (only,) = known.values()  # the configuration allows one network
        references.save(only, config.save_reference)
    return known, "; ".join(words)


def _images(config: Config, file: RealFile | None, size: tuple[int, int]) -> tuple[ImageSource | SavedImages, str, str]:
    """The images, where they are, and what they are called in the names of scores."""
    if file is None:
        assert config.data is not None
        images = open_images(config.data, size_of(*size), split="train", held_out_fraction=0.0)
        return images, f"data ({config.data.kind})", f"{config.data.kind}-train"
    saved = file.images
    assert saved is not None
    if saved.size != size:
        theirs, ours = (f"{width}x{height}" for height, width in (saved.size, size))
        raise ValueError(
            f"{file.path}: images of {theirs}, but those to score are {ours}; {resize_remedy(size_of(*size))}"
        )
    return saved, str(file.path), file.path.stem


def _measure(
    images: ImageSource | SavedImages,
    places: Sequence[int],
    name: str,
    config: Config,
    looking: Looking,
    extractors: Mapping[str, FeatureExtractor],
    accelerator: Accelerator,
) -> dict[str, Reference]:
    """Statistics of the images at `places` over all processes, for all networks in one pass."""
    num = len(places)
    sums = {
        family.network: FeatureSums(
            num, spatial="sfid" in metrics, keep=features_to_keep(family, metrics, num, real=True)
        )
        for family, metrics in looking
    }
    row_of = {places[row]: row for row in range(accelerator.process_index, num, accelerator.num_processes)}
    for chunk, pixels in image_batches(images, list(row_of), config.batch_size):
        for network, summed in sums.items():
            summed.update([row_of[place] for place in chunk], extractors[network](pixels))
    found = {}
    for network, summed in sums.items():
        summed.reduce(accelerator)
        found[network] = summed.reference(name, extractors[network].name)
    return found
