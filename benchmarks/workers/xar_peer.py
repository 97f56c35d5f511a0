"""The published xAR (OliverRensu/xAR) as a worker: its `sample_tokens`, and the step that its training loop takes.

See `latent_peer.py`. SciPy, where that is missing, is stood in for by the one draw that is made of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from latent_case import own_size
from latent_peer import PublishedGenerator
from protocol import Setup, autocast, serve
from stand_ins import stand_in
from torch import Tensor
from xar_case import ENTITIES, RECIPE, Case

stand_in("flash_attn", flash_attn_func=None)
if importlib.util.find_spec("scipy") is None:
    draw = SimpleNamespace(rvs=lambda loc, scale, size: np.random.normal(loc, scale, size))  # noqa: NPY002
    stand_in("scipy", stats=stand_in("scipy.stats", norm=draw, truncnorm=lambda *args, **rest: None))

import engine_xar  # noqa: E402
from models import xar  # noqa: E402


class Peer(PublishedGenerator):
    recipe = RECIPE
    update_ema = staticmethod(engine_xar.update_ema)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, build)

    @torch.no_grad()
    def sample(self, labels: Tensor, case: Case) -> Tensor:
        with autocast(self.setup), self.given():
            return self.model.sample_tokens(num_steps=case.steps, cfg=case.guidance, label=labels)

    @contextmanager
    def patched(self, draws: Mapping[str, Tensor]) -> Iterator[None]:
        if "noise" in draws:  # (entities, steps, B, tokens, C)
            noise = iter(draws["noise"].flatten(0, 1))
        else:
            noise = iter(draws["train_noise"].chunk(ENTITIES, dim=1))
        times = draws.get("times")
        with (
            patch.object(torch, "randn", lambda *args, **rest: next(noise)),
            patch.object(torch, "randn_like", lambda like: next(noise).to(like.dtype)),
            patch.object(torch, "rand", lambda *args, **rest: draws["drop"]),
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
