"""What the jobs that write caches share: the shards that are still missing, one after the other, in every process.

A shard appears when all of its images are done. What a shard that takes longer than PIECE_SECONDS has so far is kept
in `.parts/`, and so is what it has when a signal ends the job: the next start goes on behind it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from imgtok import announce, signals
from imgtok.data.shards import CacheInfo, images_in, refuse_other
from imgtok.files import replacing
from imgtok.signals import Requests
from imgtok.weights import write_tensors

if TYPE_CHECKING:
    from accelerate import PartialState

PARTS = ".parts"
PIECE_SECONDS = 60.0

Rows = dict[str, Tensor]
"""Arrays of a shard that batches add to, by name. `indices` (n,) are the images of the rows, ascending."""


class ShardWriter(Protocol):
    """What is asked of a cache's own writer."""

    folder: Path

    @property
    def info(self) -> CacheInfo: ...

    def pending(self) -> Iterator[int]:
        """The shards that this process has still to write."""


def write_missing(
    writer: ShardWriter,
    state: PartialState,
    encode: Callable[[Sequence[int]], Iterator[Rows]],
    finish: Callable[[int, Rows], object],
    *,
    command: str,
    unit: str = "image",
) -> None:
    """Writes each shard that this process has to write, and waits for the others.

    `encode(indices)` yields the rows of these images batch by batch, in order; images that cannot be read have none.
    `finish(shard, rows)` writes a shard; `rows` are empty if none of its images has any. SIGINT, SIGTERM and SIGUSR1
    end the job after the batch at work, by `imgtok.signals.Stopped`; nothing that was encoded is lost.
    """
    shards = list(writer.pending())
    announce.share(len(shards), "shard", "write", state.num_processes)
    pieces = [Pieces(writer.folder, writer.info, shard) for shard in shards]
    total = sum(len(writer.info.shard_indices(shard)) for shard in shards)
    with (
        signals.deferred() as requests,
        tqdm(total=total, unit=unit, desc=command, disable=not state.is_main_process) as progress,
    ):
        for shard, kept in zip(shards, pieces, strict=True):
            _stop(requests, writer.folder)
            _write(shard, kept, encode, finish, requests, progress)
        _stop(requests, writer.folder)
    state.wait_for_everyone()
    if state.is_main_process:  # with what a process that was killed between a shard and its pieces has left
        shutil.rmtree(writer.folder / PARTS, ignore_errors=True)


def say_what_is_there(folder: Path, info: CacheInfo, state: PartialState, what: str = "") -> None:
    """The line that the job ends with: of how many images the cache is, and how many could not be read."""
    if not state.is_main_process:
        return
    count = images_in(folder, info)
    lost = info.num_images - count
    skipped = f" ({lost} of {info.num_images} could not be read)" if lost else ""
    announce.ends(f"{folder}: {info.PREFIX}s of {count} images{skipped}{f', {what}' if what else ''}")


def _write(
    shard: int,
    kept: Pieces,
    encode: Callable[[Sequence[int]], Iterator[Rows]],
    finish: Callable[[int, Rows], object],
    requests: Requests,
    progress: tqdm,
) -> None:
    """One shard, from where it stands."""
    wanted = kept.info.shard_indices(shard)
    done, mark, fresh = kept.done, time.monotonic(), list[Rows]()
    progress.update(done)
    for rows in encode(wanted[done:]):
        fresh.append(rows)
        before, done = done, int(rows["indices"][-1]) + 1 - wanted.start
        progress.update(done - before)
        if requests.number or time.monotonic() - mark >= PIECE_SECONDS:
            kept.add(fresh, done)
            mark, fresh = time.monotonic(), []
            _stop(requests, kept.folder)
    progress.update(len(wanted) - done)
    finish(shard, cat([*kept.read(), *fresh]))
    kept.delete()


def _stop(requests: Requests, folder: Path) -> None:
    if requests.number:
        name = signals.name_of(requests.number)
        message = f"{name}: stopped; what is encoded is in {folder}; start the same command again to go on"
        raise signals.Stopped(requests.number, message)


def cat(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts; those without any have no names."""
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in (parts[0] if parts else ())}


class Pieces:
    """What there is of a shard that is not complete: files of rows, each of the images from one place to another.

    Raises DataError for pieces of another cache, and for damaged ones.
    """

    def __init__(self, folder: Path, info: CacheInfo, shard: int) -> None:
        self.folder, self.info = folder, info
        self._parts, self._stem = folder / PARTS, info.shard_path(folder, shard).stem
        self.done = 0
        """Images of the shard, from its first one on, that are in the pieces or cannot be read."""
        self._paths: list[Path] = []
        for path in sorted(self._parts.glob(f"{self._stem}.*.safetensors")):
            refuse_other(path, info.read(path), info)
            first, last = map(int, path.name.split(".")[-2].split("-"))
            if first == self.done:
                self._paths.append(path)
                self.done = last

    def add(self, rows: Sequence[Rows], done: int) -> None:
        """Keep what was encoded since the last piece, up to the first `done` images of the shard."""
        path = self._parts / f"{self._stem}.{self.done:08d}-{done:08d}.safetensors"
        with replacing(path) as temporary:
            write_tensors(cat(rows), temporary, self.info.header)
        self._paths.append(path)
        self.done = done

    def read(self) -> Iterator[Rows]:
        """The rows of each piece."""
        for path in self._paths:
            try:
                with safe_open(path, framework="pt") as file:
                    yield {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            except SafetensorError as error:
                raise self.info.damaged(path, error) from error

    def delete(self) -> None:
        """The shard is there. The folder stays: another process may be about to write into it."""
        for path in self._parts.glob(f"{self._stem}.*"):
            path.unlink()
