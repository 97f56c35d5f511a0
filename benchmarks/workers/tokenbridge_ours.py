"""Our TokenBridge as a worker, with the peer's weights: drawn under their published names, put where ours has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, cast

from latent_case import CHANNELS, CLASSES, own_size
from latent_ours import OurGenerator
from protocol import Setup, autocast, serve
from tokenbridge_case import RECIPE, TEMPERATURE, Case
from torch import Tensor

from imgtok.generators.conditioning import ClassBuffer
from imgtok.generators.dimension_head import StackConfig
from imgtok.generators.published.tokenbridge import as_ours, published_places
from imgtok.generators.tokenbridge import (
    PUBLISHED_ORDER,
    RevealSampling,
    TokenBridge,
    TokenBridgeConfig,
    tokenbridge_size,
)


class Ours(OurGenerator):
    recipe = RECIPE

    def __init__(self, setup: Setup) -> None:
        model = TokenBridge(replace(configuration(setup.size), dropout=0.0))
        super().__init__(setup, model, published_places(model.state_dict(), CHANNELS), as_ours)
        if setup.compile:
            for block in (*model.encoder_blocks, *model.decoder_blocks, *model.head.blocks):
                block.compile()

    def prepare(self, case: Case) -> Callable[[], Tensor]:
        self.model.config = replace(self.model.config, head_share=case.head_share)
        return super().prepare(case)

    def sample(self, labels: Tensor, case: Case) -> Tensor:
        how = RevealSampling(iterations=case.iterations, guidance=case.guidance, temperature=TEMPERATURE)
        with autocast(self.setup):
            latents: Tensor = self.model.generate(labels, seed=0, indices=range(case.batch), sampling=how)
        return latents


def configuration(size: str) -> TokenBridgeConfig:
    """B, L or H, or width x depth with heads of 64 channels and a head of as many blocks."""
    own = own_size(size)
    if own is None:
        return tokenbridge_size(cast(Literal["B", "L", "H"], size))
    width, depth = own
    stack = StackConfig(width=width, depth=depth, num_heads=width // 64)
    return TokenBridgeConfig(
        encoder=stack,
        decoder=stack,
        head=stack,
        channel_order=PUBLISHED_ORDER,
        condition=ClassBuffer(num_classes=CLASSES),
    )


if __name__ == "__main__":
    serve(Ours, Case)
