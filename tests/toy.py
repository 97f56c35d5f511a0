"""Methods for tests that no program knows: a tokenizer with lengths and slots of its own, and an autoencoder.

`enter(monkeypatch)` puts them into the hub's tables, which is all that a new method needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from imgtok import hub
from imgtok.config import PositiveFloat, PositiveInt, check
from imgtok.flow import OnStep
from imgtok.layers.patches import patchify, unpatchify
from imgtok.quantizers.fsq import FSQ
from imgtok.tokenizers.base import Autoencoder, Losses, NoDecoding, Rate, Reconstruction, Tokenizer
from imgtok.tokenizers.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class ToyDecoding:
    """A setting of its own."""

    contrast: PositiveFloat = 1.0
    """What images are multiplied by."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ToyTokConfig:
    """A slot for each patch; patches near the background, the median of all, are left out."""

    kind: Literal["toytok"] = "toytok"
    image_size: PositiveInt = 16
    """Pixels a side."""
    patch_size: PositiveInt = 4
    """Pixels a side of a patch."""
    levels: tuple[int, ...] = (4, 4)
    """FSQ levels of the ids."""
    tolerances: tuple[float, ...] = (0.05, 0.4)
    """Mean absolute differences from the background below which a patch may be left out; the first is the default."""
    decoding: ToyDecoding = ToyDecoding()
    """How `decode` works unless it is told otherwise."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class ToyTok(Tokenizer):
    """Each patch is a linear map to two numbers, rounded, and back; patches without a token are a learned one."""

    config_class: ClassVar[type] = ToyTokConfig
    decoding_class: ClassVar[type] = ToyDecoding

    def __init__(self, config: ToyTokConfig) -> None:
        super().__init__()
        self.config = config
        pixels = 3 * config.patch_size**2
        self.encoder = nn.Linear(pixels, len(config.levels))
        self.quantizer = FSQ(config.levels)
        self.decoder = nn.Linear(len(config.levels), pixels)
        self.blank = nn.Parameter(torch.zeros(pixels))

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_tokens(self) -> int:
        return self.config.num_patches

    @property
    def vocab_size(self) -> int:
        return self.quantizer.vocab_size

    @property
    def num_slots(self) -> int:
        return self.config.num_patches

    @property
    def fixed_length(self) -> bool:
        return False

    def rates(self) -> list[Rate]:
        """Budgets of a quarter and of all patches, at each tolerance."""
        budgets = (max(1, self.num_tokens // 4), self.num_tokens)
        return [Rate(budget, tolerance) for budget in budgets for tolerance in self.config.tolerances]

    @property
    def default_rate(self) -> Rate:
        return Rate(self.num_tokens, self.config.tolerances[0])

    def forward(self, images: Tensor, *, generator: torch.Generator) -> Losses:
        """Squared error of patches and of the blank ones; which are blank is drawn."""
        patches = patchify(images, self.config.patch_size)
        blank = torch.rand(patches.shape[:2], generator=generator, device=generator.device) < 0.3
        decoded = self.decoder(self.quantizer(self.encoder(patches)))
        error = (torch.where(blank.to(images.device)[..., None], self.blank, decoded) - patches).square().mean()
        return Losses(error, {"error": error})

    @torch.no_grad()
    def encode(self, images: Tensor, *, rate: Rate | None = None) -> Tokens:
        rate = rate or self.default_rate
        self.check_rate(rate)
        assert rate.tolerance is not None, "as all rates here"
        patches = patchify(images, self.config.patch_size)
        contrast = (patches - patches.median(dim=1, keepdim=True).values).abs().mean(dim=-1)  # (B, N)
        worth = contrast.masked_fill(contrast <= rate.tolerance, 0)
        chosen = worth.topk(rate.num_tokens, dim=1)
        lengths = (chosen.values > 0).sum(dim=1).clamp(min=1)
        unused = torch.arange(rate.num_tokens, device=images.device) >= lengths[:, None]
        slots = chosen.indices.masked_fill(unused, self.num_slots).sort(dim=1).values
        slots = slots.masked_fill(unused, 0)
        ids = self.quantizer.codes_to_ids(self.quantizer(self.encoder(patches)))
        return Tokens(ids.gather(1, slots), lengths, slots).padded()

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
        settings = decoding or self.config.decoding
        assert isinstance(settings, ToyDecoding)
        assert tokens.slots is not None, "this tokenizer's tokens say their slots"
        tokens = tokens.padded().to(self.blank.device)
        assert tokens.slots is not None
        decoded = self.decoder(self.quantizer.ids_to_codes(tokens.ids))
        slots = tokens.slots.masked_fill(~tokens.mask, self.num_slots)[..., None].expand_as(decoded)
        canvas = self.blank.expand(len(tokens), self.num_slots + 1, -1).clone()  # and a place for padding
        side = self.config.image_size // self.config.patch_size
        images = unpatchify(canvas.scatter(1, slots, decoded)[:, :-1], self.config.patch_size, side, side)
        return (images * settings.contrast).clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class ToyAEConfig:
    """Halves the image."""

    kind: Literal["toyae"] = "toyae"
    latent_channels: PositiveInt = 4
    """Channels of the latent."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies latents after encoding."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def factor(self) -> int:
        return 2

    @property
    def decoding(self) -> NoDecoding:
        return NoDecoding()


class ToyAE(Autoencoder):
    """A convolution there and one back."""

    config_class: ClassVar[type] = ToyAEConfig

    def __init__(self, config: ToyAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = nn.Conv2d(3, config.latent_channels, 2, stride=2)
        self.decoder = nn.ConvTranspose2d(config.latent_channels, 3, 2, stride=2)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.weight

    def forward(self, images: Tensor, *, generator: torch.Generator) -> Reconstruction:
        latents = self.encoder(images)
        noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(images.device)
        size = latents.square().mean()
        return Reconstruction(self.decoder(latents + 0.01 * noise), Losses(1e-3 * size, {"size": size}))

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        with torch.no_grad():
            deviation = torch.cat([self.encoder(images) for images in batches]).std()
        self.config = replace(self.config, scaling_factor=float(1 / deviation))

    def moments(self, images: Tensor) -> Tensor:
        mean = self.encoder(images)
        return torch.cat([mean, torch.full_like(mean, -30.0)], dim=1)

    def decode(
        self,
        latents: Tensor,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        return self.decoder(latents / self.config.scaling_factor)


def enter(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, in this test, the programs know the toys."""
    for name, entry in {"TOKENIZERS": ("toytok", "ToyTok"), "AUTOENCODERS": ("toyae", "ToyAE")}.items():
        kind, cls = entry
        place = f"{__name__}:{cls}"
        monkeypatch.setitem(getattr(hub, name), kind, place)
