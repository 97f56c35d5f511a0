"""Our FlexTok as a worker, with the peer's weights: drawn under their published names, put where ours has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import recipe
import torch
from models import FLEXTOK_NAMES, as_ours, place
from protocol import Case, Setup, autocast, serve
from torch import Tensor

from imgtok.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokens import Tokens
from imgtok.vae import VAEConfig

CHANNELS, SIDE = 16, 32


class Ours:
    """The model with drawn weights. Its VAE is a blank one that is never called: both sides work on latents."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.shapes = setup.shapes
        encoder, decoder = (TrunkConfig(width=64 * depth, depth=depth) for depth in setup.depths)
        blank = VAEConfig(latent_channels=CHANNELS, block_channels=(8,), layers_per_block=1, norm_groups=8)
        self.model = FlexTok(FlexTokConfig(image_size=SIDE, vae=blank, encoder=encoder, decoder=decoder)).eval()
        self.fill()
        self.model.to(setup.device)
        if setup.compile:
            self.model.encoder.compile()
            self.model.decoder.compile()

    @torch.no_grad()
    def fill(self) -> None:
        """One parameter at a time, so that the weights are in memory once."""
        state = {name: value for name, value in self.model.state_dict().items() if not name.startswith("vae.")}
        for value in state.values():
            value.fill_(torch.nan)
        for name, shape in self.setup.shapes.items():
            drawn = torch.from_numpy(recipe.weight(name, tuple(shape), self.setup.seed))
            place(name, FLEXTOK_NAMES).view(state).copy_(as_ours(name, drawn))
        missing = [name for name, value in state.items() if value.isnan().any()]
        if missing:
            raise ValueError(f"the peer has no weights for {missing}")

    def start_from(self, noise: Tensor | None) -> None:
        if noise is not None:
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
        with autocast(self.setup):
            return self.model.decode_latents(tokens, seed=0, steps=case.steps, guidance=case.guidance)


if __name__ == "__main__":
    serve(Ours)
