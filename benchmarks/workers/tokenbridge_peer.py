"""The published TokenBridge (YuqingWang1029/TokenBridge) as a worker: its `sample_tokens`, and the step that its
training loop takes.

See `latent_peer.py`. It needs SciPy, for the table of its quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from latent_case import own_size
from latent_peer import PublishedGenerator
from protocol import Setup, autocast, serve
from tokenbridge_case import LEAST_HIDDEN, LEVELS, POSITIONS, RECIPE, TEMPERATURE, Case
from torch import Tensor

import engine_tokenbridge  # isort: skip
from models import tokenbridge  # isort: skip


class Peer(PublishedGenerator):
    recipe = RECIPE
    update_ema = staticmethod(engine_tokenbridge.update_ema)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, build)

    @torch.no_grad()
    def sample(self, labels: Tensor, case: Case) -> Tensor:
        with autocast(self.setup), self.given():
            return self.model.sample_tokens(
                bsz=case.batch,
                num_iter=case.iterations,
                cfg=case.guidance,
                cfg_schedule="linear",
                labels=labels,
                temperature=TEMPERATURE,
            )

    @contextmanager
    def patched(self, draws: Mapping[str, Tensor]) -> Iterator[None]:
        orders = patch.object(self.model, "sample_orders", lambda bsz: draws["order"])
        if "share" in draws:
            rate = SimpleNamespace(rvs=lambda count: draws["share"].cpu().numpy())
            with (
                orders,
                patch.object(self.model, "mask_ratio_generator", rate),
                patch.object(torch, "rand", lambda *args, **rest: draws["drop"].cpu()),
            ):
                yield
            return
        uniforms = Uniforms(draws["order"], draws["uniforms"], self.model._sample_channel_ar)
        with (
            orders,
            patch.object(self.model, "_sample_channel_ar", uniforms.head),
            patch.object(torch, "multinomial", uniforms.multinomial),
        ):
            yield
        if uniforms.left:
            raise ValueError(f"the published code left {uniforms.left} positions of an image")


class Uniforms:
    """Draws the peer's ids by given uniforms (B, L, C), with C in the order of its head's steps."""

    def __init__(self, order: Tensor, uniforms: Tensor, head: Callable[..., Tensor]) -> None:
        self.order, self.uniforms, self.original = order, uniforms, head
        self.left = POSITIONS
        self.steps: Iterator[Tensor] = iter(())

    def head(self, features: Tensor, temperature: float) -> Tensor:
        """Its head, for the positions that the end of the order has, in rising order within an image."""
        count = len(features) // len(self.order)
        places = self.order[:, self.left - count : self.left].sort(dim=1).values
        self.left -= count
        rows = self.uniforms.gather(1, places[..., None].expand(-1, -1, self.uniforms.shape[2])).flatten(0, 1)
        self.steps = iter(rows.unbind(dim=1))
        return self.original(features, temperature)

    def multinomial(self, probabilities: Tensor, num_samples: int) -> Tensor:
        """By the inverse of the distribution function."""
        cumulative = probabilities.double().cumsum(dim=-1)
        thresholds = next(self.steps)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, thresholds, right=True)


def build(size: str) -> Any:
    """B, L or H by their own names, or width x depth with heads of 64 channels and a head of as many blocks."""
    settings = {
        "quant_levels": LEVELS,
        "mask_ratio_min": LEAST_HIDDEN,
        "attn_dropout": 0.0,
        "proj_dropout": 0.0,
    }
    own = own_size(size)
    if own is None:
        names = {"B": "base", "L": "large", "H": "huge"}
        return getattr(tokenbridge, f"tokenbridge_{names[size]}")(**settings)
    width, depth = own
    shape = {"embed_dim": width, "depth": depth, "num_heads": width // 64}
    stacks = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in shape.items()}
    head = {"channel_embed_dim": width, "channel_depth": depth, "channel_heads": width // 64}
    return tokenbridge.TokenBridge(**stacks, **head, **settings, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))


if __name__ == "__main__":
    serve(Peer, Case)
