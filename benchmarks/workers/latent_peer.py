"""What published generators of latents have in common as workers: they descend from MAR's code, and share its training
loop's helpers.

It was written for CUDA. On a CPU `.cuda()` leaves a tensor where it is. Packages that it imports and does not call
here are stood in for by empty ones. No arithmetic of the peer's own is touched, and `--device cuda` runs it as it is,
under the fp16 autocast of its scripts. Import this before the peer's modules.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import recipe
import torch
from latent_case import CHANNELS, CLASSES, GRID, Recipe
from protocol import Setup, autocast
from stand_ins import stand_in, use
from torch import Tensor

stand_in("cv2")
stand_in("torch_fidelity")
sys.path.remove(str(Path(recipe.__file__).parent))  # its models.py would hide the peer's folder of that name


class PublishedGenerator(ABC):
    """The model with drawn weights, and from the first training step on its optimizer, scaler and average."""

    recipe: Recipe
    update_ema: Callable[..., None]
    """The peer's own."""

    def __init__(self, setup: Setup, build: Callable[[str], Any]) -> None:
        self.setup = setup
        device = torch.device(setup.device)
        use(device)
        self.model = build(setup.size)
        self.shapes = {name: list(value.shape) for name, value in self.model.named_parameters()}
        for name, value in self.model.named_parameters():
            value.data.copy_(torch.from_numpy(recipe.weight(name, tuple(value.shape), setup.seed)))
        self.model.to(device)
        self.optimizer: torch.optim.Optimizer | None = None
        self.draws: Mapping[str, Tensor] = {}

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        self.draws = draws

    def prepare(self, case: Any) -> Callable[[], Tensor]:
        from util import misc

        device, seed = self.setup.device, self.setup.seed
        self.model.train(case.what == "train")
        labels = torch.from_numpy(recipe.integers("labels", (case.batch,), CLASSES, seed)).to(device)
        if case.what == "sample":
            return partial(self.sample, labels, case)
        latents = torch.from_numpy(recipe.tensor("latents", (case.batch, CHANNELS, GRID, GRID), seed)).to(device)
        if self.optimizer is None:
            given = self.recipe
            groups = misc.add_weight_decay(self.model, given.decay)
            self.optimizer = torch.optim.AdamW(groups, lr=given.rate, betas=given.betas)
            self.scaler = misc.NativeScalerWithGradNormCount()  # on a CPU it only hands through
            self.parameters = list(self.model.parameters())
            self.average = deepcopy(self.parameters)
        return partial(self.train, latents, labels, self.optimizer)

    @abstractmethod
    def sample(self, labels: Tensor, case: Any) -> Tensor:
        """Latents, from the draws that were given or from its own."""

    def train(self, latents: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step of `train_one_epoch`, the first, whose rate is 0: the loss and the norm of the gradient."""
        from util import lr_sched

        given = self.recipe
        schedule = SimpleNamespace(lr=given.rate, warmup_epochs=100, min_lr=0.0, lr_schedule="cosine")
        lr_sched.adjust_learning_rate(optimizer, 0.0, schedule)
        with autocast(self.setup), self.given():
            loss = self.model(latents, labels)
        value = loss.item()
        norm = self.scaler(loss, optimizer, clip_grad=given.clip, parameters=self.model.parameters(), update_grad=True)
        optimizer.zero_grad()
        type(self).update_ema(self.average, self.parameters, rate=given.ema)
        return torch.stack([norm.new_tensor(value), norm])

    @contextmanager
    def given(self) -> Iterator[None]:
        """Within the block its draws are ours, in its order. Without any it draws as it always does."""
        if not self.draws:
            yield
            return
        with self.patched(self.draws):
            yield

    @abstractmethod
    def patched(self, draws: Mapping[str, Tensor]) -> Any:
        """A context in which the peer draws these."""
