"""Validation: the loss on held-out images while a model is trained, always of the same images with the same noise.

Batch b of a validation has the random numbers of (`training.validation_seed`, b), at every step, in a run that was
resumed and for any number of processes, so that two figures differ by the weights alone. Nothing of the training is
touched: neither its random state nor what its modules count. A run ends with the same weights with and without it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from imgtok.randomness import spread, step_generator
from imgtok.signals import Requests, Stopped
from imgtok.tokenizers.base import Losses
from imgtok.train.config import TrainingConfig
from imgtok.train.stopping import Agreement

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Measure = Callable[[nn.Module], Mapping[str, float]]
"""Scores of a model by their names."""


@dataclass(frozen=True)
class HeldOut:
    """What a job keeps from training, to validate on."""

    count: int
    """Images, or rows of a cache."""
    batch: Callable[[Sequence[int], int], Any]
    """Places in [0, count) and a seed, for what is drawn with the batch -> a batch as training has them, of those of
    the images that can be read."""
    words: str
    """What they are, such as "held-out images of cifar10.parquet"."""
    check: Callable[[Sequence[int]], None] = lambda places: None
    """Raises ValueError if images at these places are trained on as well."""


def check_validation(given: object, training: TrainingConfig) -> None:
    """Raise ValueError for data to validate on, and no rhythm."""
    if given is not None and training.validate_every is None:
        raise ValueError(
            "validation: nothing looks at this data: say after how many steps, such as training.validate_every=500, or "
            "leave validation out"
        )


class Measured(Protocol):
    """The part of a job that validation needs; see `imgtok.train.loop.Job`."""

    def loss(self, model: nn.Module, batch: Any, generator: torch.Generator) -> Losses: ...
    def names(self, batch: Any) -> Sequence[str]: ...
    def scores(self, wanted: Sequence[str], held_out: HeldOut, num: int) -> Measure: ...


class Validation:
    """The validations of one run, over all of its processes."""

    def __init__(
        self, held_out: HeldOut | None, config: TrainingConfig, accelerator: Accelerator, job: Measured
    ) -> None:
        """Raises ValueError where there is nothing to validate on, or for a score that cannot be measured."""
        if held_out is None or not held_out.count:
            what = "this job keeps no images from training" if held_out is None else f"there are no {held_out.words}"
            raise ValueError(f"training.validate_every: {what}; training.validate_every=null trains without validation")
        self.held_out, self.config, self.accelerator, self.job = held_out, config, accelerator, job
        chosen = spread(min(config.num_validation, held_out.count), held_out.count).tolist()
        held_out.check(chosen)
        self.scores: Measure | None = None
        if config.validation_scores and accelerator.is_main_process:
            self.scores = job.scores(config.validation_scores, held_out, config.num_scored)
        size = config.batch_size
        self.batches = [chosen[start : start + size] for start in range(0, len(chosen), size)]
        if accelerator.is_main_process:
            which = f"{len(chosen)} of {held_out.count}" if len(chosen) < held_out.count else f"all {len(chosen)}"
            logger.info("validation on %s %s every %d steps", which, held_out.words, config.validate_every)

    def measure(self, model: nn.Module, requests: Requests, agreement: Agreement) -> dict[str, float] | None:
        """The means over all images of the loss and of its parts, and how many images and seconds that took; `model` is
        the bare one, with the weights to be judged, in eval mode. Every process gets the same figures, or None if a
        signal came in one of them: it is looked for before each batch, and interrupts the scores.
        """
        from accelerate.utils import broadcast_object_list, gather_object

        begun = time.perf_counter()
        sums: dict[str, tuple[float, int]] = {}
        # losses may look at gradients (an adaptive weight); none reaches a parameter, since nothing goes backward
        with untouched_randomness(self.accelerator.device, self.config.validation_seed), torch.enable_grad():
            for number, counts in self._mine():
                if agreement.now(requests.number):
                    return None
                batch = self.held_out.batch(self.batches[number], self.config.validation_seed)
                if images := len(self.job.names(batch)):
                    generator = step_generator(self.config.validation_seed, number, purpose="validation")
                    found = figures(self.job.loss(model, batch.to(self.accelerator.device), generator))
                    add(sums, found, images if counts else 0)
        total: dict[str, tuple[float, int]] = {}
        for mine in gather_object([sums]):
            for name, (value, count) in mine.items():
                before = total.get(name, (0.0, 0))
                total[name] = before[0] + value, before[1] + count
        if not any(count for _, count in total.values()):
            raise ValueError(f"validation: none of the {self.held_out.words} can be read")
        means = {name: value / count for name, (value, count) in total.items() if count}
        images = max(count for _, count in total.values())
        if self.config.validation_scores:
            scores: list[Any] = [None]
            if self.scores is not None:
                untouched = untouched_randomness(self.accelerator.device, self.config.validation_seed)
                with contextlib.suppress(Stopped), untouched, requests.interrupting():
                    scores = [dict(self.scores(model))]
            if self.accelerator.num_processes > 1:
                broadcast_object_list(scores)
            if scores[0] is None:
                return None
            means |= scores[0]
        return means | {"images": images, "seconds": round(time.perf_counter() - begun, 3)}

    def _mine(self) -> Iterator[tuple[int, bool]]:
        """The batches of this process, and whether they count: all processes have equally many, since a loss may wait
        for that of the others; the last batch fills the last round.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for first in range(0, len(self.batches), world):
            yield min(first + rank, len(self.batches) - 1), first + rank < len(self.batches)


def figures(losses: Losses) -> dict[str, float]:
    """The loss and its parts; waits for the device."""
    found: Mapping[str, Tensor] = {
        "loss": losses.total,
        **{f"loss/{name}": part for name, part in losses.parts.items()},
    }
    values = torch.stack([value.detach().float() for value in found.values()]).tolist()
    return dict(zip(found, values, strict=True))


def add(sums: dict[str, tuple[float, int]], found: Mapping[str, float], images: int) -> None:
    """Take in the means over so many images."""
    for name, value in found.items():
        before = sums.get(name, (0.0, 0))
        sums[name] = (before[0] + (value * images if images else 0.0), before[1] + images)


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """After the block the modules have the attributes and buffers of before, such as a configuration in which saving
    has put what it measured.
    """
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    try:
        yield
    finally:
        for module, own, buffers in before:
            module.__dict__.update(own)
            module._buffers.update(buffers)


@contextlib.contextmanager
def untouched_randomness(device: torch.device, seed: int) -> Iterator[None]:
    """Within the block torch's global generators begin at `seed`; after it they are as they were before."""
    devices = [device] if device.type not in ("cpu", "mps") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield
