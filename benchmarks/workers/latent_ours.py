"""One of our generators of latents as a worker: how it is given the peer's weights, and a training step of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import recipe
import torch
from drawn import fill
from latent_case import CHANNELS, CLASSES, GRID, Recipe
from protocol import Setup, autocast
from torch import Tensor, nn

from imgtok.published.names import Place
from imgtok.randomness import step_generator
from imgtok.train.config import TrainingConfig
from imgtok.train.ema import EMA
from imgtok.train.optim import make_optimizer, set_rate


class OurGenerator(ABC):
    """The model with drawn weights, and from the first training step on its optimizer and average."""

    recipe: Recipe

    def __init__(
        self, setup: Setup, model: Any, known: Mapping[str, Place], as_ours: Callable[[str, Tensor], Tensor]
    ) -> None:
        """`model` is without dropout, `known` says where the peer's parameters are in its state."""
        self.setup = setup
        self.shapes = setup.shapes
        if setup.device != "cpu":
            torch.backends.cuda.matmul.allow_tf32 = True  # as the published scripts have it
        self.model = model
        fill(model.state_dict(), known, self.shapes, setup.seed, as_ours)
        self.model.to(setup.device)
        self.optimizer: torch.optim.Optimizer | None = None

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        if draws:
            raise ValueError("our draws depend on (seed, index) or (seed, step): give them to the peer")

    def prepare(self, case: Any) -> Callable[[], Tensor]:
        device, seed = self.setup.device, self.setup.seed
        self.model.train(case.what == "train")
        labels = torch.from_numpy(recipe.integers("labels", (case.batch,), CLASSES, seed)).to(device)
        if case.what == "sample":
            return partial(self.sample, labels, case)
        latents = torch.from_numpy(recipe.tensor("latents", (case.batch, CHANNELS, GRID, GRID), seed)).to(device)
        if self.optimizer is None:
            given = self.recipe
            config = TrainingConfig(
                steps=1,
                batch_size=case.batch,
                learning_rate=given.rate,
                betas=given.betas,
                weight_decay=given.decay,
                ema=given.ema,
            )
            self.optimizer = make_optimizer(self.model, config, torch.device(device))
            self.ema = EMA(self.model, config.ema)
        return partial(self.train, latents, labels, self.optimizer)

    @abstractmethod
    def sample(self, labels: Tensor, case: Any) -> Tensor:
        """Latents of the seed 0."""

    def train(self, latents: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step as in `train/loop.py`: the loss and the norm of the gradient.

        Its rate is the 0 that the published schedule begins with, so that the weights stay those that are compared.
        """
        generator = step_generator(0, 0)
        with autocast(self.setup):
            losses = self.model(latents, labels, generator=generator)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        set_rate(optimizer, 0.0)
        optimizer.step()
        optimizer.zero_grad()
        self.ema.update(0)
        return torch.stack([losses.total.detach(), norm])
