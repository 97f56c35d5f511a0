"""The configuration of a KARL (`karl.py`): its sizes, what it is asked for by default, and what training draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from imgtok.config import FROM_DATA, Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, Range, check
from imgtok.sizes import SquareSize
from imgtok.tokenizers.base import NoDecoding
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from imgtok.tokenizers.vae import VAEConfig

TOLERANCES = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.09, 0.10,
    0.12, 0.14, 0.16, 0.18, 0.20, 0.24, 0.28, 0.32, 0.38,
)  # fmt: skip
"""The errors that the published models can be asked for."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One of the two transformers has this size."""

    width: PositiveInt = 1024
    """Channels; a multiple of num_heads."""
    depth: PositiveInt = 8
    """Blocks."""
    num_heads: PositiveInt = 8
    """Attention heads."""

    def __post_init__(self) -> None:
        check(self)
        if self.width % self.num_heads:
            raise ValueError(f"width: {self.width} must be a multiple of num_heads = {self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class KARLTraining:
    """What a training step draws, and what it minimises (section 4 of arXiv 2507.07995)."""

    stage: Literal["distill", "finetune"] = "distill"
    """"distill" predicts the latents or codes of the autoencoder, which stays as it is; "finetune" judges the decoded
    images, and trains the autoencoder too."""
    slot_counts: tuple[int, ...] = ()
    """How many slots the first run may have, one of which is drawn for each batch; empty means each sixteenth of the
    budget. The last published code goes up to 368 of a budget of 256."""
    augment: Fraction = 0.0
    """Share of the steps at the largest and at the smallest number of slots in which the second run is asked for a
    stricter or a looser error than the first run had; the paper's stage 2 has 0.45."""
    curriculum_from: NonNegativeFloat = 0.04
    """At first the first run is asked for each error up to this one equally often, and for no other."""
    curriculum_decay: Annotated[float, Range(low=0.0, high=1.0, exclusive_low=True)] = 0.99
    """Factor, at each optimizer step, on how often errors are asked for that every image of the batch stays above."""
    halting_weight: NonNegativeFloat = 1.0
    """Weight of the cross-entropies of the halting head."""
    quantizer_weight: NonNegativeFloat = 1.0
    """Weight of the quantizer's loss."""
    spread_weight: NonNegativeFloat = 0.0
    """Weight of a loss for short runs from fresh weights: the directions of quantized tokens have to differ between
    images (`isotropy_loss`). Published ones have none."""
    rounded_from: NonNegativeInt = 0
    """Optimizer step from which tokens are rounded, for short runs from fresh weights. Before it the decoder reads
    their directions, of which the table takes over the newest; so all its rows are used at once. Published ones have
    0."""
    discriminators: PositiveInt = 1
    """Discriminators in stage "finetune": with several, each judges images of about so many slots; published are 8."""
    late_weight: NonNegativeFloat | None = None
    """Weight of the adversarial term from `late_start` on, in place of loss.adversarial; null changes nothing."""
    late_start: PositiveInt = 1
    """Optimizer step from which `late_weight` counts."""

    def __post_init__(self) -> None:
        check(self)
        if self.slot_counts and min(self.slot_counts) < 1:
            raise ValueError(f"slot_counts: a run has at least 1 slot, given {min(self.slot_counts)}")


@dataclass(frozen=True, kw_only=True)
class KARLConfig:
    """A KARL; the defaults are the published "small" one with quantized tokens."""

    kind: Literal["karl"] = "karl"
    image_size: SquareSize = 256
    """Pixels a side of the images."""
    base: Annotated[VAEConfig | MaskGITVQGANConfig | None, FROM_DATA] = None
    """The autoencoder that it stands on; training fills this in from its own `vae` field."""
    base_use: Literal["suite", "published"] = "suite"
    """How a KL autoencoder is used: as it was trained, or as the published KARLs do, which give it pixels in [0, 1] and
    do not divide by its scaling factor before decoding."""
    posterior: Literal["sample", "mean"] = "sample"
    """Latents of a KL autoencoder: samples of its posterior, as published, or its mean. `encode` gives every image the
    same noise, so that an image always has the same tokens."""
    quantized: bool = True
    """Whether tokens are rows of a table, or vectors as they are."""
    vocab_size: PositiveInt = 4096
    """Rows of that table."""
    token_width: PositiveInt = 12
    """Numbers of a token."""
    commitment_weight: NonNegativeFloat = 0.25
    """Weight, in the quantizer's loss, of what pulls vectors to their rows."""
    encoder: TransformerConfig = TransformerConfig()
    """Size of the encoder; its width is larger than the autoencoder's number of latent channels."""
    decoder: TransformerConfig = TransformerConfig()
    """Size of the decoder."""
    max_tokens: PositiveInt = 512
    """Learned slots, and so the largest budget."""
    position_grid: PositiveInt = 64
    """Rows and columns of the learned tables of positions, of which a smaller grid takes every so many."""
    halting_width: PositiveInt = 512
    """Hidden numbers of the halting head."""
    tolerances: tuple[float, ...] = TOLERANCES
    """The errors that can be asked for, ascending; another one means the next larger. Errors are mean absolute ones of
    pixels in [0, 1]."""
    initialisation: Literal["published", "normal_conditions", "aligned"] = "published"
    """What fresh weights are. In "published" the learned vector of each error is constant, and the norm after it makes
    it zero, so that a fresh model does not see which error it is asked for. "normal_conditions" has random vectors
    there. "aligned", for short runs, has them too, and lets information flow from the first step: each slot starts out
    looking at one cell, that cell at it, and tokens differ between images."""
    budget: PositiveInt = 256
    """Slots that an image may use unless another budget is asked for; the second run of a training step has as many."""
    tolerance: NonNegativeFloat = 0.05
    """Error that an image may have unless another one is asked for."""
    threshold: Fraction = 0.75
    """Slots that are not needed with a probability above this are dropped."""
    training: KARLTraining = KARLTraining()
    """What training draws and minimises."""

    def __post_init__(self) -> None:
        check(self)
        if self.training.rounded_from and self.training.stage == "finetune":
            raise ValueError(
                f"training.rounded_from: {self.training.rounded_from} is for fresh weights in stage=distill; "
                "the second stage begins with a table that is to be kept: rounded_from=0"
            )
        if not self.quantized and (self.training.spread_weight or self.training.rounded_from):
            raise ValueError("training: spread_weight and rounded_from are for quantized tokens; leave them out")
        if self.budget > self.max_tokens:
            raise ValueError(f"budget: {self.budget} is more than max_tokens = {self.max_tokens}, the slots there are")
        if any(count > self.max_tokens for count in self.training.slot_counts):
            raise ValueError(
                f"training.slot_counts: {max(self.training.slot_counts)} is more than max_tokens = {self.max_tokens}"
            )
        if not self.tolerances or list(self.tolerances) != sorted(set(self.tolerances)) or self.tolerances[0] < 0:
            raise ValueError(f"tolerances: must be ascending numbers from 0 on, at least one, given {self.tolerances}")
        if self.training.curriculum_from < self.tolerances[0]:
            raise ValueError(
                f"training.curriculum_from: {self.training.curriculum_from} is below tolerances[0] = "
                f"{self.tolerances[0]}, the strictest that can be asked for"
            )
        if self.base is not None:
            self._check_base(self.base)

    def _check_base(self, base: VAEConfig | MaskGITVQGANConfig) -> None:
        if self.encoder.width <= base.latent_channels:
            raise ValueError(
                f"encoder.width: {self.encoder.width} leaves no channel for pixels beside the {base.latent_channels} "
                "latent channels of the autoencoder; it must be larger, or the autoencoder another one"
            )
        if self.image_size % base.factor or self.image_size // base.factor > self.position_grid:
            raise ValueError(
                f"image_size: {self.image_size} must be a multiple of {base.factor}, the pixels a side of a latent "
                f"cell, and at most {base.factor * self.position_grid}, which position_grid = {self.position_grid} "
                "covers"
            )

    @property
    def decoding(self) -> NoDecoding:
        """Settings of the decoder, which has none."""
        return NoDecoding()

    @property
    def slot_counts(self) -> tuple[int, ...]:
        """The numbers of slots that the first run of a training step may have."""
        sixteenths = {max(1, self.budget * part // 16) for part in range(1, 17)}
        return self.training.slot_counts or tuple(sorted(sixteenths))

    @property
    def grid(self) -> int:
        """Latent cells a side."""
        return self.image_size // self.required_base.factor

    @property
    def required_base(self) -> VAEConfig | MaskGITVQGANConfig:
        """The autoencoder. Raises ValueError where none is named."""
        if self.base is None:
            raise ValueError("base: a KARL stands on an autoencoder; name one, such as vae=FOLDER in training")
        return self.base

    @property
    def outputs(self) -> int:
        """Numbers that the decoder gives for a cell: logits of the autoencoder's codes, or latent channels."""
        base = self.required_base
        return base.vocab_size if isinstance(base, MaskGITVQGANConfig) else base.latent_channels
