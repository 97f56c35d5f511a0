"""The body of a loop as a CUDA graph: a GPU launches all its kernels at once, and need not wait for the host to launch
them one by one, which at small batches takes longer than to compute them.

A body is a function without arguments that changes tensors in place, always the same ones, and reads nothing of the
device: what it does then depends on the contents of tensors alone. Its first calls run as they are, as everything does
on other devices. So a graph belongs to one loop, and nothing is kept from one drawing to the next.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

WARM_UP = 2
"""Calls before the graph is made, in which libraries set themselves up."""
CAPTURING = threading.Lock()
"""torch makes one graph at a time in a process."""


class Replayed:
    """Calls of `body`; on a GPU, replays of its graph. Where no graph can be made, a warning says so, and the body goes
    on as it is.
    """

    def __init__(self, body: Callable[[], None], device: torch.device) -> None:
        self.body, self.device, self.done = body, device, 0
        self.wanted = device.type == "cuda" and torch.cuda.is_available()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.wanted and self.graph is None and self.done >= WARM_UP:
            self._capture()
        if self.graph is None:
            self.body()
        else:
            self.graph.replay()
        self.done += 1

    def _capture(self) -> None:
        """Kernels are noted and not run, so that tensors are afterwards what they were."""
        try:
            # the device of the tensors, which need not be the current one: what is captured is what its stream is given
            with CAPTURING, torch.cuda.device(self.device):
                graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
                # "thread_local": what other threads ask of the GPU meanwhile, as those that load data do, is not in the
                # way. The outer context gives the current stream back also where the inner one raises at either end
                with (
                    torch.cuda.stream(stream),
                    torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
                ):
                    self.body()
        except RuntimeError as error:
            logger.warning("no CUDA graph could be made, so kernels are launched one by one: %s", error)
            self.wanted = False
        else:
            self.graph = graph
