"""Caches in shards: what the folders of cached tokens and of cached text features have in common.

A folder of `PREFIX-00000-of-00008.safetensors`, each with a JSON description of the whole cache in its header. Shard s
holds images s * shard_size to (s + 1) * shard_size; a shard is there whole or not at all, so an interrupted run
continues with the missing ones (and what it has of the next, in `.parts/`), and several processes write different ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from safetensors import SafetensorError, safe_open

from imgtok.config import defaults, to_dict
from imgtok.data.sources import NOT_TOLD, DataError, differing

SINCE = {"class_names", "controls"}
"""Fields, all of them tuples, that older caches do not have; where they are empty, digests are those of such caches."""


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What a cache was made from; equal in all its shards."""

    PREFIX: ClassVar[str]
    """How the shards' names begin; "PREFIXs" are what is in them."""
    COMMAND: ClassVar[str]
    """The command that writes such a cache."""
    FORMAT: ClassVar[int]
    """Version of the layout."""

    fingerprint: str
    """The fingerprint of the model that made it."""
    dataset: str
    """The data set, as `ImageSource.identity` has it; in older caches its configuration as text."""
    split: str
    """Part of the data set."""
    num_images: int
    """Images of the data set."""
    shard_size: int
    """Images of one shard."""

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that change with the model, the data set or any other field."""
        told = {name: value for name, value in asdict(self).items() if name not in SINCE or value}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def num_shards(self) -> int:
        """Files of the whole cache; the last may hold fewer images."""
        return -(-self.num_images // self.shard_size)

    def shard_path(self, folder: Path, shard: int) -> Path:
        """The file of one shard."""
        return folder / f"{self.PREFIX}s-{shard:05d}-of-{self.num_shards:05d}.safetensors"

    def shard_indices(self, shard: int) -> range:
        """The images of one shard, as indices of the source."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.num_images))

    @property
    def header(self) -> dict[str, str]:
        """The metadata of every shard."""
        return {"imgtok": json.dumps(asdict(self), sort_keys=True)}

    @classmethod
    def read(cls, path: Path) -> Self:
        """The description in a shard; DataError when the file is damaged or of another format."""
        try:
            with safe_open(path, framework="np") as file:
                data = json.loads((file.metadata() or {})["imgtok"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise cls.damaged(path, error) from error
        known = {field.name for field in fields(cls)}
        if data.get("format") != cls.FORMAT or set(data) - known or known - set(data) - SINCE:
            version = f"{cls.PREFIX} cache of format {data.get('format')}, this version reads format {cls.FORMAT}"
            raise DataError(f"{path}: {version}")
        told: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**told)

    @classmethod
    def damaged(cls, path: Path, error: Exception) -> DataError:
        """The error to raise for a shard that cannot be read, with what to do; `error` is what came of reading it."""
        what = f"not a whole {cls.PREFIX} shard ({error})"
        return DataError(f"{path}: {what}; delete it and run `{cls.COMMAND}` again")


Info = TypeVar("Info", bound=CacheInfo)


def open_cache(folder: Path, kind: type[CacheInfo]) -> tuple[Any, list[Path]]:
    """The description and the shards of a complete cache.

    Raises FileNotFoundError when there is none or shards are missing, DataError when they do not belong together.
    """
    paths = sorted(folder.glob(f"{kind.PREFIX}s-*.safetensors"))
    if not paths:
        what = f"no {kind.PREFIX} cache ({kind.PREFIX}s-*.safetensors)"
        raise FileNotFoundError(f"{folder}: {what}; `{kind.COMMAND}` writes one")
    info = kind.read(paths[0])
    for path in paths[1:]:
        refuse_other(path, kind.read(path), info)
    expected = [info.shard_path(folder, shard) for shard in range(info.num_shards)]
    missing = [path.name for path in expected if not path.exists()]
    if missing:
        listed = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        remedy = f"run the same `{kind.COMMAND}` command again, it writes only these"
        raise FileNotFoundError(f"{folder}: {len(missing)} of {len(expected)} shards missing ({listed}); {remedy}")
    return info, paths


def as_begun(folder: Path, info: Info, config: Any) -> Info:
    """The description that a cache of this data is continued with: an older one has the text of the data's
    configuration, `config`, and no names of classes; or what it has lacks what is told since.
    """
    first = next(iter(sorted(folder.glob(f"{info.PREFIX}s-*.safetensors"))), None)
    if first is None:
        return info
    begun = info.read(first)
    try:
        told = json.loads(begun.dataset)
    except ValueError:
        return info
    if not isinstance(told, dict):
        return info
    by_content = "images" in told and "images" in (mine := json.loads(info.dataset))
    now, usual = (mine, NOT_TOLD) if by_content else (to_dict(config), defaults(config))
    if not told.keys() <= now.keys() or any(differing(told, now, usual)):
        return info
    names = {"class_names": begun.class_names} if hasattr(begun, "class_names") else {}
    return replace(info, dataset=begun.dataset, **names)


def same_images(first: str, second: str) -> bool:
    """Whether two caches' `dataset` are of the same images; labels may differ, and an older text tells too little."""
    if first == second:
        return True
    try:
        one, two = json.loads(first), json.loads(second)
    except ValueError:
        return False
    if not isinstance(one, dict) or not isinstance(two, dict):
        return False
    if ("images" in one) != ("images" in two):
        return one.get("kind") == two.get("kind")
    return "images" in one and not any(differing({**one, "labels": ""}, {**two, "labels": ""}, NOT_TOLD))


def images_in(folder: Path, info: CacheInfo) -> int:
    """The number of images in a cache; those that could not be read are not in it. Reads the shards' indices alone."""
    count = 0
    for shard in range(info.num_shards):
        path = info.shard_path(folder, shard)
        try:
            with safe_open(path, framework="np") as file:
                count += len(set(file.get_tensor("indices").tolist()))
        except SafetensorError as error:
            raise info.damaged(path, error) from error
    return count


class PendingShards:
    """The shards of a cache that one process writes: rank, rank + world, and so on.

    Raises DataError when the folder holds shards of another cache.
    """

    def __init__(self, folder: Path, info: CacheInfo, *, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}; it must lie in 0 to {world - 1}")
        self._folder, self._info, self._rank, self._world = folder, info, rank, world
        for path in sorted(folder.glob(f"{info.PREFIX}s-*.safetensors")):
            refuse_other(path, info.read(path), info)

    def __iter__(self) -> Iterator[int]:
        for shard in range(self._rank, self._info.num_shards, self._world):
            if not self._info.shard_path(self._folder, shard).exists():
                yield shard


def refuse_other(path: Path, found: CacheInfo, expected: CacheInfo) -> None:
    """Raises DataError, with what differs, for a file of another cache."""
    differences = [
        f"{name} {_short(value)} instead of {_short(getattr(expected, name))}"
        for name, value in vars(found).items()
        if value != getattr(expected, name)
    ]
    if differences:
        remedy = "choose another folder, or delete the old shards"
        raise DataError(f"{path}: of another {found.PREFIX} cache ({'; '.join(differences)}); {remedy}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 240 else f"{text[:240]}..."
