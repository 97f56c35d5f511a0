"""The configuration of a FlexTok (`flextok.py`): its sizes, what training draws, how it decodes, and `ShortRuns`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from imgtok.config import (
    FROM_DATA,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    check,
)
from imgtok.sizes import ImageSize, check_multiple, sides, size_of
from imgtok.tokenizers.vae import VAEConfig


@dataclass(frozen=True, kw_only=True)
class TrunkConfig:
    """Size of one transformer; the published rule is width = 64 x depth."""

    width: PositiveInt = 768
    """Channels; a multiple of head_dim and of 4."""
    depth: PositiveInt = 12
    """Blocks."""
    head_dim: PositiveInt = 64
    """Channels of one attention head."""

    def __post_init__(self) -> None:
        check(self)
        if self.width % self.head_dim or self.width % 4:
            raise ValueError(f"width: {self.width} must be a multiple of head_dim = {self.head_dim} and of 4")

    @property
    def mlp_hidden(self) -> int:
        return 2 * (4 * self.width) // 3


@dataclass(frozen=True, kw_only=True)
class FlexTokDecoding:
    """How the flow decoder turns tokens into an image."""

    steps: PositiveInt = 25
    """Steps of the flow, one call of the decoder each (two under guidance)."""
    guidance: PositiveFloat = 1.0
    """Guidance scale; 1 is none."""
    solver: Literal["euler", "adams"] = "euler"
    """Euler as published, or two-step Adams-Bashforth."""
    projected_guidance: bool = True
    """Guide by adaptive projected guidance rather than plain classifier-free guidance."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ShortRuns:
    """What lets a FlexTok learn in minutes on small images (docs/quickstart.md). The defaults are as published."""

    keep_all: Fraction = 0.0
    """Share of training samples that keep all tokens whatever `nested_dropout` draws."""
    noise_fraction: Fraction = 0.0
    """Share of training samples at t = 1, where the tokens alone must explain the image."""
    prediction: Literal["velocity", "data"] = "velocity"
    """What the decoder's network outputs; "data" turns its estimate of the latents into a velocity."""
    spread_weight: NonNegativeFloat = 0.0
    """Weight of a hinge that keeps the deviation of each pre-quantizer number over the batch at 1."""
    positions: Literal["sincos", "learned"] = "sincos"
    """Positions of patches: the published fixed table, or learned vectors. On a small grid the table's cells are
    nearly parallel (most of its frequencies turn by less than a hundredth from edge to edge)."""
    initialisation: Literal["published", "aligned"] = "published"
    """"aligned" lets information flow from the first step: each register starts out looking at one patch, that patch
    at it, gates are open, codes use their levels. It needs learned positions."""

    def __post_init__(self) -> None:
        check(self)
        if self.initialisation == "aligned" and self.positions != "learned":
            raise ValueError("initialisation: aligned needs positions: learned")


@dataclass(frozen=True, kw_only=True)
class FlexTokConfig:
    """A FlexTok; the defaults are the published d12-d12, as far as it is known (docs/flextok.md, Training)."""

    FORMER: ClassVar[Mapping[str, str]] = {
        **{f"decode_{name}": f"decoding.{name}" for name in ("steps", "guidance", "solver")},
        "projected_guidance": "decoding.projected_guidance",
        **{
            name: f"short_runs.{name}"
            for name in ("keep_all", "noise_fraction", "prediction", "spread_weight", "positions", "initialisation")
        },
    }
    """Where fields are now that runs of earlier versions have elsewhere."""

    kind: Literal["flextok"] = "flextok"
    image_size: ImageSize = 256
    """Pixels a side of the training images, or [height, width], such as [96, 128], for images that are not square:
    each is scaled until it covers that and its centre is kept. Both sides are multiples of the pixels of a patch, those
    of a latent cell times `patch_size`."""
    vae: Annotated[VAEConfig | None, FROM_DATA] = None
    """The frozen autoencoder below; null works in pixels. Training fills this in from its own `vae` field."""
    patch_size: PositiveInt = 2
    """Latent cells (or pixels) a side of one patch."""
    num_registers: PositiveInt = 256
    """Registers, i.e. the most tokens an image can have."""
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    """FSQ levels; their product is the vocabulary."""
    encoder: TrunkConfig = TrunkConfig()
    """Size of the encoder."""
    decoder: TrunkConfig = TrunkConfig()
    """Size of the flow decoder."""
    max_timestep: PositiveFloat = 1000.0
    """Time features are scaled by 1000 / this."""
    nested_dropout: Literal["uniform", "pow2", "uniform_pow2"] = "pow2"
    """How many tokens a training sample keeps: any number, a power of two, or any rounded up to one."""
    null_dropout: Fraction = 0.1
    """Share of training samples whose condition is the null vector."""
    cross_length: bool = False
    """Train on every image twice, with all tokens and with the prefix that nested dropout draws, under the same noise
    and time; the two losses are added (NesTok, docs/flextok.md). The decoder works on twice as many images."""
    align_weight: NonNegativeFloat = 0.0
    """Weight of a loss that draws the decoder's features of the prefix to those of all tokens; needs cross_length."""
    align_block: NonNegativeInt = 0
    """The block of the decoder whose features these are, from 0; the last one computes none of registers."""
    times: Literal["mode", "logit_normal", "stratified_logit_normal"] = "mode"
    """Distribution of training times; "stratified" spreads a batch evenly over the distribution."""
    mode_scale: Annotated[float, Range(-1.0, 1.75)] = 0.25
    """Shape of the mode distribution; 0 is uniform."""
    posterior: Literal["mean", "sample"] = "mean"
    """Latents to train on: the mean of the autoencoder's posterior, or a fresh sample of it (the published wrapper's
    default). `encode` takes the mean unless it is given a seed, so that an image always has the same tokens."""
    short_runs: ShortRuns = ShortRuns()
    """What is not as published, for runs of minutes on small images."""
    decoding: FlexTokDecoding = FlexTokDecoding()
    """How `decode` works unless it is told otherwise."""

    def __post_init__(self) -> None:
        check(self)
        object.__setattr__(self, "image_size", size_of(*sides(self.image_size)))  # [96, 96] is the square 96
        check_multiple(self.image_size, self.cell, "the pixels a side of one patch")
        if not self.levels or min(self.levels) < 2:
            raise ValueError(f"levels: every FSQ dimension needs at least 2 levels, given {self.levels}")
        if self.align_weight and not self.cross_length:
            raise ValueError("align_weight: it compares two lengths; say cross_length=true, or leave it at 0")
        if self.align_weight and self.align_block >= self.decoder.depth - 1:
            raise ValueError(
                f"align_block: {self.align_block}, and a decoder of depth {self.decoder.depth} has features of "
                f"registers after its first {self.decoder.depth - 1} blocks, counted from 0: name one of these, or a "
                "deeper decoder"
            )

    @property
    def latent_channels(self) -> int:
        return self.vae.latent_channels if self.vae else 3

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = sides(self.image_size)
        return height // self.cell, width // self.cell

    @property
    def factor(self) -> int:
        """Pixels a side of one latent cell; 1 in pixels."""
        return self.vae.factor if self.vae else 1

    @property
    def cell(self) -> int:
        """Pixels a side of one patch."""
        return self.patch_size * self.factor
