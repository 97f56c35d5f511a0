"""Our FlexTok as a worker, with the peer's weights: drawn under their published names, put where ours has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import recipe
import torch
from drawn import fill
from flextok_case import Case
from protocol import Setup, autocast, serve
from torch import Tensor

from imgtok.published.flextok import as_ours, flextok_places, sized_config
from imgtok.tokenizers.flextok import FlexTok
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vae import VAEConfig

CHANNELS, SIDE = 16, 32


class Ours:
    """The model with drawn weights. Its VAE is a blank one that is never called: both sides work on latents."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.shapes = setup.shapes
        blank = VAEConfig(latent_channels=CHANNELS, block_channels=(8,), layers_per_block=1, norm_groups=8)
        self.model = FlexTok(replace(sized_config(setup.size, blank), image_size=SIDE)).eval()
        state = {name: value for name, value in self.model.state_dict().items() if not name.startswith("vae.")}
        fill(state, flextok_places(state), self.shapes, setup.seed, as_ours)
        self.model.to(setup.device)
        if setup.compile:
            for block in (*self.model.encoder.blocks, *self.model.decoder.blocks):
                block.compile()

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        if draws:
            raise ValueError("our noise depends on (seed, index): give it to the peer")

    def prepare(self, case: Case) -> Callable[[], Tensor]:
        device, seed = self.setup.device, self.setup.seed
        if case.what == "encode":
            latents = torch.from_numpy(recipe.tensor("latents", (case.batch, CHANNELS, SIDE, SIDE), seed)).to(device)
            return partial(self.encode, latents, case.tokens)
        ids = torch.from_numpy(recipe.integers("ids", (case.batch, 256), 64000, seed)).to(device)
        return partial(self.decode, Tokens.full(ids[:, : case.tokens]), case)

    def encode(self, latents: Tensor, tokens: int) -> Tensor:
        with autocast(self.setup):
            return self.model.encode_latents(latents, num_tokens=tokens).ids

    def decode(self, tokens: Tokens, case: Case) -> Tensor:
        how = replace(self.model.config.decoding, steps=case.steps, guidance=case.guidance)
        with autocast(self.setup):
            return self.model.decode_latents(tokens, seed=0, decoding=how)


if __name__ == "__main__":
    serve(Ours, Case)
