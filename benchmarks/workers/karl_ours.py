"""Our KARL as a worker, with the peer's weights: drawn under their published names, put where ours has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import recipe
import torch
from drawn import fill
from karl_case import BUDGET, IMAGE_SIZE, SIZES, TOLERANCE, Case, parse_size
from protocol import Setup, autocast, serve
from torch import Tensor

from imgtok.published.karl import names_of
from imgtok.published.kl16 import KL16
from imgtok.published.names import Place
from imgtok.tokenizers.karl import KARL, KARLConfig, TransformerConfig
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGANConfig


class Ours:
    """The model with drawn weights."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.shapes = setup.shapes
        if setup.device != "cpu":
            torch.backends.cuda.matmul.allow_tf32 = True
        self.model = KARL(configuration(setup.size)).eval()
        state = self.model.state_dict()
        known = {theirs: Place(ours) for ours, theirs in names_of(self.model).items()}
        fill(
            state,
            known,
            self.shapes,
            setup.seed,
            lambda name, value: value.reshape(state[known[name].name].shape),
        )
        self.model.to(setup.device)
        if setup.compile:
            for block in (*self.model.encoder.blocks, *self.model.decoder.blocks):
                block.compile()

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        if draws:
            raise ValueError("our noise is that of (seed, 0): give it to the peer")

    @torch.no_grad()
    def prepare(self, case: Case) -> Callable[[], Tensor]:
        pixels = recipe.uniform("images", (case.batch, 3, IMAGE_SIZE, IMAGE_SIZE), self.setup.seed)
        images = torch.from_numpy(pixels).to(self.setup.device) * 2 - 1
        return partial(self.call, images, self.threshold_for(images, case.kept), case)

    def threshold_for(self, images: Tensor, kept: int | None) -> float | None:
        """With which the first image keeps so many tokens, and the others about as many."""
        if kept is None:
            return None
        probabilities = self.model.encode(images[:1], BUDGET, TOLERANCE).probabilities
        assert probabilities is not None
        return float(probabilities[0].sort().values[kept - 1])

    @torch.no_grad()
    def call(self, images: Tensor, threshold: float | None, case: Case) -> Tensor:
        with autocast(self.setup):
            tokens = self.model.encode(images, BUDGET, TOLERANCE, threshold=threshold)
            if case.what == "both":
                return self.model.decode(tokens).add(1).div(2)
        return tokens.lengths


def configuration(size: str) -> KARLConfig:
    """One such as small/vqgan, as the published code has it."""
    name, base, quantized = parse_size(size)
    width, depth, num_heads = SIZES[name]
    transformer = TransformerConfig(width=width, depth=depth, num_heads=num_heads)
    return KARLConfig(
        image_size=IMAGE_SIZE,
        base=MaskGITVQGANConfig() if base == "vqgan" else KL16,
        base_use="published",
        quantized=quantized,
        encoder=transformer,
        decoder=transformer,
    )


if __name__ == "__main__":
    serve(Ours, Case)
