"""The published xAR (OliverRensu/xAR) as a worker: its `sample_tokens`, and the step that its training loop takes.

It was written for CUDA. On a CPU `.cuda()` leaves a tensor where it is. Packages that it imports and does not call
here are stood in for by empty ones; SciPy, where that is missing, by the one draw that is made of it. No arithmetic
of the peer's own is touched, and `--device cuda` runs it as it is, under the fp16 autocast of its scripts.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import recipe
import torch
from protocol import Setup, autocast, serve
from torch import Tensor
from xar_case import BETAS, CHANNELS, CLASSES, CLIP, DECAY, EMA_DECAY, ENTITIES, GRID, RATE, Case, own_size


def stand_in(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    return module


stand_in("flash_attn", flash_attn_func=None)
stand_in("cv2")
stand_in("torch_fidelity")
if importlib.util.find_spec("scipy") is None:
    draw = SimpleNamespace(rvs=lambda loc, scale, size: np.random.normal(loc, scale, size))  # noqa: NPY002
    stand_in("scipy", stats=stand_in("scipy.stats", norm=draw, truncnorm=lambda *args, **rest: None))
sys.path.remove(str(Path(recipe.__file__).parent))  # its models.py would hide the peer's folder of that name

import engine_xar  # noqa: E402
from models import xar  # noqa: E402
from util import lr_sched, misc  # noqa: E402


class Peer:
    """The model with drawn weights, and from the first training step on its optimizer, scaler and average."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        device = torch.device(setup.device)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True  # as its scripts have it
            torch.cuda.set_device(device)
        else:
            torch.Tensor.cuda = lambda self, *args, **rest: self
        self.model = build(setup.size)
        self.shapes = {name: list(value.shape) for name, value in self.model.named_parameters()}
        for name, value in self.model.named_parameters():
            value.data.copy_(torch.from_numpy(recipe.weight(name, tuple(value.shape), setup.seed)))
        self.model.to(device)
        self.optimizer: torch.optim.Optimizer | None = None
        self.draws: Mapping[str, Tensor] = {}

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        self.draws = draws

    def prepare(self, case: Case) -> Callable[[], Tensor]:
        device, seed = self.setup.device, self.setup.seed
        self.model.train(case.what == "train")
        labels = torch.from_numpy(recipe.integers("labels", (case.batch,), CLASSES, seed)).to(device)
        if case.what == "sample":
            return partial(self.sample, labels, case)
        latents = torch.from_numpy(recipe.tensor("latents", (case.batch, CHANNELS, GRID, GRID), seed)).to(device)
        if self.optimizer is None:
            groups = misc.add_weight_decay(self.model, DECAY)
            self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)
            self.scaler = misc.NativeScalerWithGradNormCount()  # on a CPU it only hands through
            self.parameters = list(self.model.parameters())
            self.average = deepcopy(self.parameters)
        return partial(self.train, latents, labels, self.optimizer)

    @torch.no_grad()
    def sample(self, labels: Tensor, case: Case) -> Tensor:
        with autocast(self.setup), self.given():
            return self.model.sample_tokens(num_steps=case.steps, cfg=case.guidance, label=labels)

    def train(self, latents: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        """One step of `train_one_epoch`, the first, whose rate is 0: the loss and the norm of the gradient."""
        lr_sched.adjust_learning_rate(optimizer, 0.0, SimpleNamespace(lr=RATE, warmup_epochs=100, min_lr=1e-5))
        with autocast(self.setup), self.given():
            loss = self.model(latents, labels)
        value = loss.item()
        norm = self.scaler(loss, optimizer, clip_grad=CLIP, parameters=self.model.parameters(), update_grad=True)
        optimizer.zero_grad()
        engine_xar.update_ema(self.average, self.parameters, rate=EMA_DECAY)
        return torch.stack([norm.new_tensor(value), norm])

    @contextmanager
    def given(self) -> Iterator[None]:
        """Within the block its draws are ours, in its order. Without any it draws as it always does."""
        if not self.draws:
            yield
            return
        if "noise" in self.draws:  # (entities, steps, B, tokens, C)
            noise = iter(self.draws["noise"].flatten(0, 1))
        else:
            noise = iter(self.draws["train_noise"].chunk(ENTITIES, dim=1))
        times = self.draws.get("times")
        with (
            patch.object(torch, "randn", lambda *args, **rest: next(noise)),
            patch.object(torch, "randn_like", lambda like: next(noise).to(like.dtype)),
            patch.object(torch, "rand", lambda *args, **rest: self.draws["drop"]),
            nullcontext()
            if times is None
            else patch.object(xar.norm, "rvs", lambda **rest: times.double().cpu().numpy()),
        ):
            yield
        if next(noise, None) is not None:
            raise ValueError("the published code drew less often than it was expected to")


def build(size: str) -> Any:
    """B, L or H by their own names, or width x depth with heads of 64 channels."""
    own = own_size(size)
    if own is None:
        return {"B": xar.xar_base, "L": xar.xar_large, "H": xar.xar_huge}[size]()
    width, depth = own
    shape = {"embed_dim": width, "depth": depth, "num_heads": width // 64}
    return xar.xAR(**{f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in shape.items()})


if __name__ == "__main__":
    serve(Peer, Case)
