"""When a run stops or saves although its steps do not say so: one answer in all of its processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

LOOK_EVERY = 4
"""Steps from one look at the others' wishes to the next, on accelerators."""


class Agreement:
    """What the processes of a run agree on after a step: the signal by which to stop, and whether to save.

    One process answers itself. Several on CPUs add up their wishes after each step; they wait for each other there
    anyhow. On an accelerator waiting would empty its queue, so wishes are added up each LOOK_EVERY steps and read
    LOOK_EVERY steps later, when the answer has long been there: a signal stops such a run within twice as many steps.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.device = accelerator.device
        self.alone = accelerator.num_processes == 1
        self._asked: tuple[Tensor, torch.Event | None] | None = None

    def after(self, done: int, stop: int, save: bool) -> tuple[int, bool]:
        """Called by all processes after step `done`, with the signal that this one has met, or 0, and whether it finds
        that it is time to save.
        """
        if self.alone:
            return stop, save
        if self.device.type == "cpu":
            return self._answer(self._ask(stop, save))
        if done % LOOK_EVERY:
            return 0, False
        answer = (0, False) if self._asked is None else self._answer(self._asked)
        self._asked = self._ask(stop, save and not answer[1])
        return answer

    def now(self, stop: int) -> int:
        """The signal by which to stop, where all processes wait for each other."""
        return stop if self.alone else self._answer(self._ask(stop, False))[0]

    def _ask(self, stop: int, save: bool) -> tuple[Tensor, torch.Event | None]:
        wishes = torch.zeros(2, dtype=torch.int32, device=self.device)
        if stop:
            wishes[0].fill_(stop)
        if save:
            wishes[1].fill_(1)
        torch.distributed.all_reduce(wishes, op=torch.distributed.ReduceOp.MAX)
        if self.device.type == "cpu":
            return wishes, None
        answer = torch.empty(2, dtype=torch.int32, pin_memory=True)
        answer.copy_(wishes, non_blocking=True)
        there = torch.Event(device=self.device)
        there.record()
        return answer, there

    def _answer(self, asked: tuple[Tensor, torch.Event | None]) -> tuple[int, bool]:
        answer, there = asked
        if there is not None:
            there.synchronize()
        stop, save = answer.tolist()
        return stop, bool(save)
