"""Our xAR as a worker, with the peer's weights: drawn under their published names, put where ours has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

from latent_case import own_size
from latent_ours import OurGenerator
from protocol import Setup, autocast, serve
from torch import Tensor
from xar_case import RECIPE, Case

from imgtok.generators.published.xar import NAMES, as_ours
from imgtok.generators.xar import XAR, FlowSampling, XARConfig, xar_size
from imgtok.published.names import places


class Ours(OurGenerator):
    recipe = RECIPE

    def __init__(self, setup: Setup) -> None:
        model = XAR(replace(configuration(setup.size), dropout=0.0))
        super().__init__(setup, model, places(model.state_dict(), NAMES, {}), as_ours)
        if setup.compile:
            for block in model.blocks:
                block.compile()

    def sample(self, labels: Tensor, case: Case) -> Tensor:
        how = FlowSampling(steps=(case.steps,), guidance=(case.guidance,), solver="stochastic")
        with autocast(self.setup):
            latents: Tensor = self.model.generate(labels, seed=0, indices=range(case.batch), sampling=how)
        return latents


def configuration(size: str) -> XARConfig:
    """B, L or H, or width x depth with heads of 64 channels."""
    own = own_size(size)
    if own is None:
        return xar_size(cast(Literal["B", "L", "H"], size))
    width, depth = own
    return XARConfig(width=width, depth=depth, num_heads=width // 64)


if __name__ == "__main__":
    serve(Ours, Case)
