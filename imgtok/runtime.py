"""The processes of a launch, the CPU threads of one of them, and the memory that it has needed."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState


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


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, in MiB."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return round(usage.ru_maxrss * bytes_per_unit / 2**20, 1)
