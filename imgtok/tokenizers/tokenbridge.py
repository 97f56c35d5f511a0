"""TokenBridge (arXiv 2503.16430) as a tokenizer: the latents of an autoencoder as a sequence of symbols, untrained.

Every number of a latent, scaled to about unit deviation, is rounded on its own to one of B levels
(`quantizers/normal.py`). An image is a symbol for each number, position by position, row by row; within a position
channel by channel, those first that have the most of their energy in low frequencies. So it is G G C symbols of a
vocabulary of B, neighbouring symbols are neighbouring numbers, and any generator of tokens draws the latents of
an AutoencoderKL or a DC-AE. The generator that was made for this is `generators/tokenbridge.py`, which needs no tokens.

Shapes: B images (or levels), C channels, G positions a side, K = G G C symbols.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from imgtok.config import FROM_DATA, NonNegativeInt, check
from imgtok.flow import OnStep
from imgtok.hub import model_class
from imgtok.quantizers.channels import low_frequency_shares
from imgtok.quantizers.normal import NormalConfig, NormalQuantizer, check_channels
from imgtok.sizes import SquareSize
from imgtok.tokenizers.base import Autoencoder, Losses, NoDecoding, Rate, Tokenizer, latents_of_moments
from imgtok.tokenizers.checks import check_side, check_whole
from imgtok.tokenizers.dcae import DCAEConfig
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vae import VAEConfig

logger = logging.getLogger(__name__)

SATURATED = 1e-3
"""The share of numbers beyond the outermost level from which on a warning says so; of a unit normal it is 5e-5."""
Continuous = VAEConfig | DCAEConfig
"""The configurations of the autoencoders that it may stand on: those whose latents are no entries of a table."""


@dataclass(frozen=True, kw_only=True)
class TokenBridgeTokenizerConfig:
    """Symbols of an autoencoder's latents; the defaults are those of the published TokenBridge."""

    kind: Literal["tokenbridge_tokenizer"] = "tokenbridge_tokenizer"
    image_size: SquareSize = 256
    """Pixels a side of the images."""
    vae: Annotated[Continuous | None, FROM_DATA] = None
    """The autoencoder; training fills this in from its own `vae` field."""
    quantizer: NormalConfig = NormalConfig()
    """How the numbers of a latent, scaled to about unit deviation, are rounded to symbols."""
    channel_order: tuple[NonNegativeInt, ...] = ()
    """The channels of a position in the order of their symbols. Empty: those first that have the most of their energy
    in low frequencies, as `imgtok train tokenizer` measures it on held-out images when it is done."""

    def __post_init__(self) -> None:
        check(self)
        if self.vae is None:
            return
        check_channels(self.channel_order, self.quantizer, self.vae.latent_channels)
        if self.image_size % self.vae.factor:
            raise ValueError(
                f"image_size: {self.image_size} must be a multiple of {self.vae.factor}, the pixels a side of a latent "
                "position"
            )

    @property
    def decoding(self) -> NoDecoding:
        """Settings of the decoder, which has none."""
        return NoDecoding()

    @property
    def required_vae(self) -> Continuous:
        """The autoencoder. Raises ValueError where none is named."""
        if self.vae is None:
            raise ValueError("vae: these symbols are of an autoencoder's latents; name one, such as vae=FOLDER")
        return self.vae

    @property
    def grid(self) -> int:
        """Latent positions a side."""
        return self.image_size // self.required_vae.factor


class TokenBridgeTokenizer(Tokenizer):
    """An autoencoder and the table of levels; no parameter of it is trained."""

    config_class: ClassVar[type] = TokenBridgeTokenizerConfig
    stands_on = "vae"
    measured_at_end: ClassVar[tuple[str, ...]] = ("channel_order",)
    config: TokenBridgeTokenizerConfig
    order: Tensor
    inverse: Tensor

    def __init__(self, config: TokenBridgeTokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.vae: Autoencoder = model_class(config.required_vae.kind)(config.required_vae).requires_grad_(False)
        self.quantizer = NormalQuantizer(config.quantizer)
        order = torch.tensor(config.channel_order or range(config.required_vae.latent_channels))
        self.register_buffer("order", order, persistent=False)  # the channel of each of a position's symbols
        self.register_buffer("inverse", order.argsort(), persistent=False)  # the symbol of each channel

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_tokens(self) -> int:
        return self.config.grid**2 * self.config.required_vae.latent_channels

    @property
    def vocab_size(self) -> int:
        return self.config.quantizer.levels

    # ------------------------------------------------ making

    def forward(self, images: Tensor, *, generator: torch.Generator) -> Losses:
        """The mean squared error of rounding the latents of images (B, 3, H, W) in [-1, 1]: a figure for the log, of
        which nothing is learnt.
        """
        latents = latents_of_moments(self.vae.moments(images), None, self.vae.config.scaling_factor).float()
        error = (self.quantizer(latents)[0] - latents).square().mean()
        return Losses(error, {"rounding": error})

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure the order of the channels, unless the configuration says one; and warn of numbers that no level is
        near.
        """
        with torch.no_grad():
            latents = torch.cat([self.vae.encode(images).float() for images in batches])
        self._warn_of_saturation(latents)
        if self.config.channel_order:
            return
        shares = low_frequency_shares(latents)
        self.order = shares.argsort(descending=True, stable=True).to(self.order.device)
        self.inverse = self.order.argsort()
        self.config = replace(self.config, channel_order=tuple(self.order.tolist()))
        listed = ", ".join(f"{channel} ({shares[channel]:.2f})" for channel in self.config.channel_order)
        logger.info("channel_order: by the share of their energy in low frequencies: %s", listed)

    def _warn_of_saturation(self, latents: Tensor) -> None:
        beyond = self.quantizer.beyond(latents).double().mean().item()
        if beyond > SATURATED:
            logger.warning(
                "model.quantizer.range: %s: %.2f %% of the numbers lie beyond the outermost level and come back "
                "smaller, and the largest is %.1f: a wider range keeps them, and `imgtok calibrate` measures which",
                *(list(self.config.quantizer.range), 100 * beyond, latents.abs().max().item()),
            )

    # ------------------------------------------------ tokens

    @torch.no_grad()
    def encode(self, images: Tensor, *, rate: Rate | None = None) -> Tokens:
        """All symbols of images (B, 3, S, S) in [-1, 1], by the means of the autoencoder's posteriors.

        Raises ValueError for images that the model does not take, and where the autoencoder gives numbers that are not
        finite.
        """
        if rate is not None:
            self.check_rate(rate)
        latents = self.vae.encode(images)
        check_side(images, self.image_size)
        return Tokens.full(self.in_sequence(self.quantizer.encode(latents)))

    def in_sequence(self, ids: Tensor) -> Tensor:
        """Ids of levels (B, C, G, G) -> symbols (B, K)."""
        return ids[:, self.order].flatten(2).transpose(1, 2).flatten(1)

    def in_place(self, symbols: Tensor) -> Tensor:
        """Symbols (B, K) -> ids of levels (B, C, G, G)."""
        by_position = symbols.unflatten(1, (-1, len(self.order)))[..., self.inverse]
        return by_position.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] of all their symbols. Nothing is drawn, and there are no settings.

        Raises ValueError for settings, for ids that there are not, and for images that lack symbols.
        """
        if decoding is not None and not isinstance(decoding, self.decoding_class):
            raise ValueError("decoding: this tokenizer's decoder has no settings; leave it out")
        check_whole(tokens, indices, self.num_tokens, self.vocab_size)
        ids = self.in_place(tokens.ids.to(self.order.device))
        return self.vae.decode(self.quantizer.decode(ids)).clamp(-1, 1)
