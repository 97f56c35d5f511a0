"""Our xAR as a worker, with the peer's weights: drawn under their published names, put where ours has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, cast

import recipe
import torch
from drawn import fill
from protocol import Setup, autocast, serve
from torch import Tensor, nn
from xar_case import BETAS, CHANNELS, CLASSES, CLIP, DECAY, EMA_DECAY, GRID, RATE, Case, own_size

from imgtok.generators.published.xar import NAMES, as_ours
from imgtok.generators.xar import XAR, FlowSampling, XARConfig, xar_size
from imgtok.published.names import places
from imgtok.randomness import step_generator
from imgtok.train.config import TrainingConfig
from imgtok.train.ema import EMA
from imgtok.train.optim import make_optimizer, set_rate


class Ours:
    """The model with drawn weights, without dropout, and from the first training step on its optimizer and average."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.shapes = setup.shapes
        if setup.device != "cpu":
            torch.backends.cuda.matmul.allow_tf32 = True  # as the published scripts have it
        self.model = XAR(replace(configuration(setup.size), dropout=0.0))
        state = self.model.state_dict()
        fill(state, places(state, NAMES, {}), self.shapes, setup.seed, as_ours)
        self.model.to(setup.device)
        self.optimizer: torch.optim.Optimizer | None = None
        if setup.compile:
            for block in self.model.blocks:
                block.compile()

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        if draws:
            raise ValueError("our draws depend on (seed, index) or (seed, step): give them to the peer")

    def prepare(self, case: Case) -> Callable[[], Tensor]:
        device, seed = self.setup.device, self.setup.seed
        self.model.train(case.what == "train")
        labels = torch.from_numpy(recipe.integers("labels", (case.batch,), CLASSES, seed)).to(device)
        if case.what == "sample":
            return partial(self.sample, labels, case)
        latents = torch.from_numpy(recipe.tensor("latents", (case.batch, CHANNELS, GRID, GRID), seed)).to(device)
        if self.optimizer is None:
            config = TrainingConfig(
                steps=1, batch_size=case.batch, learning_rate=RATE, betas=BETAS, weight_decay=DECAY, ema=EMA_DECAY
            )
            self.optimizer = make_optimizer(self.model, config, torch.device(device))
            self.ema = EMA(self.model, config.ema)
        return partial(self.train, latents, labels, self.optimizer)

    def sample(self, labels: Tensor, case: Case) -> Tensor:
        how = FlowSampling(steps=(case.steps,), guidance=(case.guidance,), solver="stochastic")
        with autocast(self.setup):
            return self.model.generate(labels, seed=0, indices=range(case.batch), sampling=how)

    def train(self, latents: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step as in `train/loop.py`: the loss and the norm of the gradient.

        Its rate is the 0 that the published schedule begins with, so that the weights stay those that are compared.
        """
        generator = step_generator(0, 0)
        with autocast(self.setup):
            losses = self.model(latents, labels, generator=generator)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        set_rate(optimizer, 0.0)
        optimizer.step()
        optimizer.zero_grad()
        self.ema.update(0)
        return torch.stack([losses.total.detach(), norm])


def configuration(size: str) -> XARConfig:
    """B, L or H, or width x depth with heads of 64 channels."""
    own = own_size(size)
    if own is None:
        return xar_size(cast(Literal["B", "L", "H"], size))
    width, depth = own
    return XARConfig(width=width, depth=depth, num_heads=width // 64)


if __name__ == "__main__":
    serve(Ours, Case)
