"""Where the tensors of a published checkpoint live in a model of ours, from two tables of names.

`names` has pairs ours -> published: how a name begins, or with a dot in front what stands in it. `fused` has a matrix
of ours -> the published ones whose rows it holds, from top to bottom. With them a published tensor is a `Place`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor


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
