"""Groups of parameters that are trained in one way each: what a module declares (`groups()`), and training reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn


def always(step: int) -> bool:
    """The rhythm of a group that is updated after each step."""
    return True


def each(count: int) -> Callable[[int], bool]:
    """The rhythm of a group that is updated after the `count`-th step and each `count`-th from there on."""
    return lambda step: (step + 1) % count == 0


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that are trained in one way. What is None is as the section `training` says."""

    name: str
    """For messages."""
    parameters: Sequence[nn.Parameter]
    """Those of them that do not require a gradient are ignored."""
    rate: float = 1.0
    """Factor on the learning rate of the step."""
    betas: tuple[float, float] | None = None
    """AdamW's decay rates."""
    weight_decay: float | None = None
    """AdamW's decay, on tensors of two or more dimensions."""
    clip: float | None = None
    """Largest norm of this group's gradient; 0 never clips."""
    due: Callable[[int], bool] = always
    """Whether the group is updated after an optimizer step, counted from 0; if not, its gradient is thrown away."""
    averaged: bool = True
    """Whether the averaged weights contain it."""

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that require a gradient."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]
