"""Where the tensors of a published checkpoint live in a model of ours, from two tables of names; what files must have.

`names` has pairs ours -> published: how a name begins, or with a dot in front what stands in it. `fused` has a matrix
of ours -> the published ones whose rows it holds, from top to bottom. With them a published tensor is a `Place`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from imgtok.weights import Weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a published parameter lives in our model: one of `parts` equal blocks of rows of a tensor."""

    name: str
    part: int = 0
    parts: int = 1

    def view(self, ours: Mapping[str, Tensor]) -> Tensor:
        """These rows of `ours`, by name: writable, and gradients are looked up the same way."""
        return ours[self.name].chunk(self.parts)[self.part]


def places(ours: Iterable[str], names: Mapping[str, str], fused: Mapping[str, tuple[str, ...]]) -> dict[str, Place]:
    """Published name -> place, for all the tensors of ours that are named."""
    return {published: place for name in ours for published, place in _published_names(name, names, fused)}


def joined(
    known: Mapping[str, Place],
    stored: Mapping[str, Tensor],
    as_ours: Callable[[str, Tensor], Tensor] = lambda _, value: value,
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, by name, from the published ones after `as_ours(name, value)`; those that are published in parts are
    joined.
    """
    parts: dict[str, list[tuple[int, str]]] = {}
    for name, place in known.items():
        parts.setdefault(place.name, []).append((place.part, name))
    for ours, names in parts.items():
        values = [as_ours(name, stored[name]) for _, name in sorted(names)]
        yield ours, values[0] if len(values) == 1 else torch.cat(values)


def _published_names(
    name: str, names: Mapping[str, str], fused: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, Place]]:
    published = name
    for mine, theirs in names.items():
        if mine.startswith("."):
            published = published.replace(mine, theirs)
        elif name.startswith(mine):
            published = theirs + published.removeprefix(mine)
    for mine, parts in fused.items():
        if mine in published:
            for part, theirs in enumerate(parts):
                yield published.replace(mine, theirs), Place(name, part, len(parts))
            return
    yield published, Place(name)


def without(stored: Weights, leftovers: tuple[str, ...]) -> Weights:
    """The tensors but those of their training, whose names begin with one of `leftovers`; how many is logged."""
    dropped = [name for name in stored if name.startswith(leftovers)]
    if dropped:
        logger.info("%s: left out %d tensors of its training (%s*)", stored.path, len(dropped), "*, ".join(leftovers))
    return stored.select({name: name for name in stored if name not in dropped})


def check_telling(stored: Mapping[str, Tensor], telling: Mapping[str, int], model: str, path: Path) -> None:
    """Raises ValueError unless the tensors whose shapes tell the configuration are there, with as many dimensions as
    `telling` says.
    """
    for name, dimensions in telling.items():
        if name not in stored:
            found = ", ".join(list(stored)[:4]) or "nothing"
            raise ValueError(f"{path}: not a published {model}: it lacks {name} (found: {found})")
        if stored[name].ndim != dimensions:
            shape = tuple(stored[name].shape)
            raise ValueError(f"{path}: {name} is {shape}, but has {dimensions} dimensions in a published {model}")


def depth_of(stored: Iterable[str], stack: str) -> int:
    """Blocks of a stack, named `stack.NUMBER.`."""
    blocks = [re.match(rf"{stack}\.(\d+)\.", name) for name in stored]
    return max((int(block[1]) + 1 for block in blocks if block), default=0)
