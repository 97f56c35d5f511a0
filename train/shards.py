"""What the jobs that write caches share: the shards that are still missing, one after the other, in every process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tqdm import tqdm

from imgtok.data.shards import CacheInfo, images_in

if TYPE_CHECKING:
    from accelerate import PartialState

logger = logging.getLogger(__name__)


class ShardWriter(Protocol):
    """What is asked of a cache's own writer."""

    @property
    def info(self) -> CacheInfo: ...

    def pending(self) -> Iterator[int]:
        """The shards that this process has still to write."""


def write_missing(
    writer: ShardWriter, state: PartialState, write: Callable[[int, tqdm], None], *, command: str, unit: str = "image"
) -> None:
    """Calls `write(shard, progress)` for each shard that this process has to write, and waits for the others.

    `write` moves the bar on by the images that it has done.
    """
    shards = list(writer.pending())
    logger.info("%d shards to write in this process, one of %d", len(shards), state.num_processes)
    total = sum(len(writer.info.shard_indices(shard)) for shard in shards)
    with tqdm(total=total, unit=unit, desc=command, disable=not state.is_main_process) as progress:
        for shard in shards:
            write(shard, progress)
    state.wait_for_everyone()


def say_what_is_there(folder: Path, info: CacheInfo, state: PartialState, what: str = "") -> None:
    """One line in the log: of how many images the cache is, and how many could not be read."""
    if not state.is_main_process:
        return
    count = images_in(folder, info)
    lost = info.num_images - count
    skipped = f" ({lost} of {info.num_images} could not be read)" if lost else ""
    logger.info("%ss of %d images%s%s, in %s", info.PREFIX, count, skipped, f", {what}" if what else "", folder)
