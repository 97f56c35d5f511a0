"""The processes of a launch, the CPU threads of one of them, and the memory that it has needed."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")


def on_cpu() -> bool:
    """Whether this launch computes on CPUs: there is no accelerator, or ACCELERATE_USE_CPU is set.

    Accelerate has to be told (`cpu=`): otherwise each process of a launch without accelerators takes itself for the
    only one.
    """
    from accelerate.utils import parse_flag_from_env  # costs seconds to import

    return not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")


def process_state() -> PartialState:
    """The device of this process and its place among the processes of the launch."""
    from accelerate import PartialState

    return PartialState(cpu=on_cpu())


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Within the block torch computes with `count` CPU threads; sums are split by thread, which shows in last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Blocks:
    """Which rows of a batch are computed together, and by how many threads of a CPU.

    On a CPU the last bits of a row vary with the number of rows (other kernels) and of threads (other partial sums).
    Where that must not show (`exact`) every block there has `rows` rows, the last one padded, and one thread computes
    unless another number is given. Otherwise it is no more rows than there are, and torch's own number of threads.
    """

    device: torch.device
    exact: bool = False
    threads: int | None = None
    rows: int = 16
    """Rows that a CPU computes at once: more do not make it faster."""

    @property
    def fixed(self) -> bool:
        """Whether all blocks have the same size."""
        return self.exact and self.device.type == "cpu"

    def of(self, count: int, batch_size: int | None = None) -> Iterator[Sequence[int]]:
        """The rows of `count` that are computed together; `batch_size` at most, unless blocks have a fixed size."""
        size = max(1, count) if batch_size is None else batch_size
        if self.device.type == "cpu":
            size = self.rows if self.exact else min(size, self.rows)
        for start in range(0, count, size):
            yield range(start, min(count, start + size))

    def padded(self, values: Sequence[T]) -> list[T]:
        """The values of a block; where its size is fixed, the last one repeated up to it."""
        return [*values, *[values[-1]] * (self.rows - len(values))] if self.fixed else list(values)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Within the block torch computes with the number of threads that is asked for."""
        with cpu_threads(self.threads or (1 if self.exact else torch.get_num_threads())):
            yield


def check_doc_strings(library: str) -> None:
    """Raise ValueError where Python drops doc strings (`-OO`), which a library checks when it is imported."""
    if sys.flags.optimize > 1:
        raise ValueError(
            f"python -OO (PYTHONOPTIMIZE=2) drops doc strings, and {library} checks its own when it is imported: start "
            "Python with -O at most; the imgtok command does so by itself"
        )


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(usage.ru_maxrss * bytes_per_unit / 2**20, 1)
