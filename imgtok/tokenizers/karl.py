"""KARL (arXiv 2507.07995): an image says in one pass how many tokens it needs for an error that is allowed.

A transformer reads [condition | cells of the autoencoder's latent grid | T learned slots]; the condition is a learned
vector of the mean absolute pixel error that may remain. Each slot becomes a short vector, rounded to the nearest of a
table, and a probability that it is *not* needed: slots above a threshold are dropped, the others are the tokens
(`Encoder`). A second transformer reads [a query for each cell | the tokens], and predicts the latents or codes of the
autoencoder, which decodes them to pixels (`Decoder`).

What teaches it to stop is that a training step runs the network twice (`KARL.forward_drawn`): first with a random
number of slots, whatever error e that leaves; then with all slots and the condition e, when the slots beyond the first
run's number are to be halted. What the first run achieved is what the second is asked for.

`encode_plainly` and `decode_plainly` say the algorithm as it is published, with dropped slots behind a mask. What is
used is `encode`, and `decode`, which sees only the tokens that are kept: the same, since nothing sees a dropped slot.
The transformers are in `karl_networks.py`, what training puts around the model in `karl_training.py`.

Shapes: B batch, N grid cells, T slots, K kept tokens, W and D widths of encoder and decoder, n numbers of a token, E
tolerances, the errors that a model can be asked for.
Errors are those of pixels in [0, 1]; images lie in [-1, 1] as everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import index
from typing import TYPE_CHECKING, ClassVar, NamedTuple, SupportsFloat, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok import randomness
from imgtok.flow import OnStep
from imgtok.layers.convolution import by_picture, speed_up
from imgtok.quantizers.vq import VectorQuantizer, isotropy_loss
from imgtok.tokenizers.base import (
    CodedLosses,
    Losses,
    Rate,
    Tokenizer,
    latents_of_moments,
    powers_of_two,
    rebuilt,
)
from imgtok.tokenizers.checks import check_images, check_side, check_tokens
from imgtok.tokenizers.karl_config import KARLConfig, KARLTraining, TransformerConfig
from imgtok.tokenizers.karl_networks import Decoder, Encoder
from imgtok.tokenizers.karl_start import initialise
from imgtok.tokenizers.karl_tokens import KARLTokens, keep
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGAN
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vae import VAE, VAEConfig

if TYPE_CHECKING:
    from imgtok.losses.reconstruction import ReconstructionLossConfig

__all__ = ["KARL", "KARLConfig", "KARLTokens", "KARLTraining", "TransformerConfig"]

PASSES = 3
"""How often `encode` may encode an image to meet the error that is allowed."""

# ---------------------------------------------------------------- what is given and returned


class Draws(NamedTuple):
    """The random numbers of a training step of B images."""

    posterior: Tensor | None
    """The noise (B, C, h, w) of the autoencoder's posterior; None where there is none or its mean is taken."""
    num_slots: int
    """How many slots the first run has."""
    bins: Tensor
    """The numbers (B,) of the tolerances that the first run is asked for."""
    augmented: Tensor
    """A scalar, bool, that says whether `augment` changes the tolerances of the second run."""
    changes: Tensor
    """How much it changes them, (B,) in [0, 1)."""
    rounded: bool = True
    """Whether tokens that are quantized are rounded."""


class Runs(NamedTuple):
    """What the two runs of a training step give together."""

    losses: Losses | CodedLosses
    """The sum of both runs' losses, and its parts; with quantized tokens also the ids that the second run keeps."""
    images: tuple[Tensor, ...]
    """In stage "finetune" the images that the two runs decoded, (B, 3, H, W) in about [-1, 1], not clamped."""
    errors: Tensor
    """The mean absolute errors (B,) that the first run leaves."""
    vectors: Tensor
    """The vectors (B, T, n) of the second run, before they are quantized."""


class Run(NamedTuple):
    """What one run of the network gives, from images to the decoder's prediction."""

    logits: Tensor
    """The logits (B, T) of the halting head, of a slot's not being needed."""
    kept: Tensor | None
    """Which slots the decoder sees, (B, T) bool; None where it sees all of them."""
    vectors: Tensor
    """The vectors (B, T, n) of the slots, before they are quantized."""
    ids: Tensor | None
    """The ids (B, T) of quantized tokens; None where they are vectors, or are not yet rounded."""
    quantizer: Tensor | None
    """The loss of the quantizer, a scalar; None where `ids` are."""
    out: Tensor
    """What the decoder predicts, (B, N, outputs): latents, or logits of the autoencoder's codes."""


class Seen(NamedTuple):
    """What the autoencoder makes of images."""

    features: Tensor
    """What the encoder reads beside the pixels, (B, C, h, w)."""
    targets: Tensor | None
    """What the decoder is to predict: ids of codes (B, N), or latents (B, N, C); None where nobody asks."""


# ---------------------------------------------------------------- the tokenizer


class KARL(Tokenizer):
    """The whole tokenizer. Calling it gives the training losses; see `encode`, `count` and `decode` for its use."""

    config_class: ClassVar[type] = KARLConfig
    stands_on = "base"
    only_decodes: ClassVar[tuple[str, ...]] = (
        "decoder.*",
        "base.decoder.*",  # and of the other kind of autoencoder:
        "base.autoencoder.decoder.*",
        "base.autoencoder.post_quant_conv.*",
    )
    decodes_by: ClassVar[tuple[str, ...]] = ("decoder", "training", "commitment_weight")
    card_example = """images = imgtok.preprocess(["photo.jpg"], model.image_size)  # (1, 3, H, W) in [-1, 1]
tokens = model.encode(images, eps=0.05)
print(tokens.lengths)  # how many tokens the image needs for a mean absolute error of 0.05
pictures = imgtok.to_pil(model.decode(tokens))
"""
    tolerance_bits: Tensor

    def __init__(self, config: KARLConfig) -> None:
        super().__init__()
        self.config = config
        base = config.required_base
        self.base = VAE(base) if isinstance(base, VAEConfig) else MaskGITVQGAN(base)
        speed_up(self.base)
        self.base.requires_grad_(config.training.stage == "finetune")
        if isinstance(self.base, MaskGITVQGAN):  # whose codes are what decoded images are mixed of, in no stage trained
            self.base.quantizer.requires_grad_(False)
        self.encoder = Encoder(config)
        self.quantizer = (
            VectorQuantizer(config.vocab_size, config.token_width, unit_length=True) if config.quantized else None
        )
        self.decoder = Decoder(config)
        # As whole numbers, which a change of precision leaves alone: 0.05 in bfloat16 would be another bin.
        tolerances = torch.tensor(config.tolerances, dtype=torch.float32)
        self.register_buffer("tolerance_bits", tolerances.view(torch.int32), persistent=False)
        initialise(self)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def num_tokens(self) -> int:
        return self.config.max_tokens

    @property
    def vocab_size(self) -> int:
        """1 for tokens that are vectors, whose ids say nothing."""
        return self.quantizer.vocab_size if self.quantizer is not None else 1

    @property
    def vector_width(self) -> int | None:
        return self.config.token_width if self.quantizer is None else None

    @property
    def num_slots(self) -> int:
        return self.config.max_tokens

    @property
    def fixed_length(self) -> bool:
        return False

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight of the autoencoder that gives the decoded images."""
        return self.base.last_layer

    @property
    def scales_latents(self) -> bool:
        """Not those of a quantized autoencoder, which are features and codes as they are."""
        return isinstance(self.base, VAE)

    def rates(self) -> list[Rate]:
        """Fixed numbers of tokens, the powers of two from an eighth of the budget on, then the budget under up to three
        of the configuration's tolerances: those nearest to 1.8, 1 and 0.6 times the default one, which are 0.09, 0.05
        and 0.03 of the published models. Any other number will do as well, and any other error as `asked` says.
        """
        budget, known = self.config.budget, self.config.tolerances
        fixed = [Rate(count) for count in powers_of_two(budget) if count * 8 >= budget]
        wanted = [factor * self.config.tolerance for factor in (1.8, 1, 0.6)]
        nearest = [min(known, key=lambda tolerance: abs(tolerance - error)) for error in wanted]
        return fixed + [Rate(budget, tolerance) for tolerance in dict.fromkeys(nearest)]

    @property
    def default_rate(self) -> Rate:
        """The configuration's budget, and the error that an image may have."""
        return Rate(self.config.budget, self.config.tolerance)

    def check_rate(self, rate: Rate) -> None:
        """Raises ValueError for more tokens than there are slots, and an error above 1, the largest of pixels."""
        if rate.num_tokens > self.num_tokens:
            raise ValueError(f"rates: this tokenizer has 1 to {self.num_tokens} tokens an image, given {rate}")
        if rate.tolerance is not None and rate.tolerance > 1:
            raise ValueError(f"rates: an error of pixels in [0, 1] is at most 1, given {rate}")

    def asked(self, rate: Rate) -> Rate:
        """With the next larger of the configuration's tolerances, or the largest, in place of an error between them."""
        if rate.tolerance is None:
            return rate
        number = self.bin_of(torch.tensor(rate.tolerance, device=self.tolerance_bits.device))
        return replace(rate, tolerance=self.config.tolerances[int(number)])

    # ------------------------------------------------ training

    def recompute_activations(self) -> None:
        """From now on compute both transformers' activations again in the backward pass."""
        self.encoder.recompute = self.decoder.recompute = True

    def for_training(self, loss: ReconstructionLossConfig | None, accumulate: int) -> nn.Module:
        """A module that has the curriculum, and in stage "finetune" the losses of decoded images."""
        from imgtok.tokenizers.karl_training import TrainableKARL  # which knows this class

        return TrainableKARL(self, loss, accumulate)

    def forward(self, images: Tensor, *, generator: torch.Generator) -> Losses | CodedLosses:
        """The losses of both runs for images (B, 3, H, W) in [-1, 1], with the curriculum as it is at the start; in
        stage "finetune" decoded images have one loss alone, their mean absolute error.

        Training calls a module around this one, which has the curriculum and more losses (`karl_training.py`).
        """
        runs = self.forward_drawn(images, self.draw(images, generator))
        total, parts = runs.losses.total, runs.losses.parts
        for name, decoded in zip(("first", "second"), runs.images, strict=False):
            parts[f"{name}_l1"] = (decoded - images).abs().mean() / 2
            total = total + parts[f"{name}_l1"]
        return rebuilt(total, parts, runs.losses)

    def draw(self, images: Tensor, generator: torch.Generator, curriculum: Tensor | None = None) -> Draws:
        """All random numbers of a training step. `curriculum` says how often each tolerance is asked for in the first
        run, (E,); by default as at the start.
        """
        batch, device, counts = len(images), images.device, self.config.slot_counts
        count = counts[int(torch.randint(len(counts), (), generator=generator))]
        upto = (self.start_of_curriculum() if curriculum is None else curriculum).double().cumsum(0)
        uniform = torch.rand(3, batch, generator=generator, device=generator.device).to(device)
        bins = torch.searchsorted(upto, uniform[0] * upto[-1], right=True)  # of the sum, which is only nearly 1
        augmented = uniform[1, 0] < self.config.training.augment
        return Draws(self._draw_posterior(images, generator), count, bins, augmented, uniform[2])

    def start_of_curriculum(self) -> Tensor:
        """(E,): equally often each tolerance that is small enough, and no other."""
        asked = self.tolerances <= self.config.training.curriculum_from
        return asked.float() / asked.sum()

    def _draw_posterior(self, images: Tensor, generator: torch.Generator) -> Tensor | None:
        if isinstance(self.base, MaskGITVQGAN) or self.config.posterior == "mean":
            return None
        shape = (len(images), self.base.config.latent_channels, self.config.grid, self.config.grid)
        return torch.randn(shape, generator=generator, device=generator.device).to(images.device)

    def forward_drawn(self, images: Tensor, draws: Draws) -> Runs:
        """Both runs with their random numbers given: a function of tensors, which `training.compile` makes one graph.

        Section 3 of the paper: the error that the first run leaves is what the second is asked for, and all its slots
        beyond the first run's are to be halted.
        """
        budget = self.config.budget
        seen = self.look(images, draws.posterior, targets=self.config.training.stage != "finetune")
        cells = self.encoder.cells((images + 1) / 2, seen.features)
        first = self.run(cells, draws.bins, draws.num_slots, rounded=draws.rounded)
        decoded, terms = self._reconstruct(first, seen)
        parts = self._parts("first", first, draws.num_slots, terms)
        with torch.no_grad():
            estimate = self.to_images(self.to_latents(first.out)) if decoded is None else decoded
            errors = (estimate.float() - images).abs().mean(dim=(1, 2, 3)) / 2
        bins = self.augment(self.bin_of(errors), draws)
        second = self.run(cells, bins, budget, masked=True, rounded=draws.rounded)
        decoded_again, terms = self._reconstruct(second, seen)
        parts |= self._parts("second", second, min(draws.num_slots, budget), terms)
        total = torch.stack(list(parts.values())).sum()
        images_of_both = () if decoded is None or decoded_again is None else (decoded, decoded_again)
        assert second.kept is not None
        parts |= {"error": errors.mean(), "kept": second.kept.sum(dim=1).float().mean()}  # for the log
        losses: Losses | CodedLosses = Losses(total, parts)
        if second.ids is not None:
            losses = CodedLosses(total, parts, second.ids.masked_fill(~second.kept, -1), self.vocab_size)
        return Runs(losses, images_of_both, errors, second.vectors)

    def run(self, cells: Tensor, bins: Tensor, count: int, *, masked: bool = False, rounded: bool = True) -> Run:
        """Encodes with `count` slots and decodes; `masked` hides from the decoder the slots that are not needed."""
        hidden = self.encoder(cells, bins, count)
        logits, vectors = self.encoder.halting(hidden), self.encoder.vectors(hidden)
        kept = logits.sigmoid() <= self.config.threshold if masked else None
        if self.quantizer is None:
            return Run(logits, kept, vectors, None, None, self.decoder(vectors, None, kept))
        if not rounded:
            return Run(logits, kept, vectors, None, None, self.decoder(self.quantizer.compared(vectors), None, kept))
        codes, ids, commitment, codebook = self.quantizer(vectors)
        loss = self.config.commitment_weight * commitment + codebook
        return Run(logits, kept, vectors, ids, loss, self.decoder(codes, None, kept))

    def augment(self, bins: Tensor, draws: Draws) -> Tensor:
        """The second run's tolerances (B,), changed in some steps: at the largest number of slots to stricter ones, at
        the smallest to looser ones. So it learns of errors that it cannot keep within, or could have.
        """
        counts, last = self.config.slot_counts, len(self.config.tolerances) - 1
        if draws.num_slots >= self.config.budget:
            changed = (1 + (draws.changes * bins).floor().long()).clamp(max=last)  # where there is one tolerance alone
        elif draws.num_slots == min(counts):
            changed = (bins + draws.changes * (last - bins)).floor().long()
        else:
            return bins
        return torch.where(draws.augmented, changed, bins)

    def _parts(self, name: str, run: Run, needed: int, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses of a run, by name: of its halting head, when the first slots are `needed`, and the others."""
        config, parts = self.config.training, {}
        head = run.logits
        parts["keep"] = config.halting_weight * F.softplus(head[:, :needed]).mean()
        if needed < head.shape[1]:
            parts["drop"] = config.halting_weight * F.softplus(-head[:, needed:]).mean()
        if run.quantizer is not None:
            parts["quantizer"] = config.quantizer_weight * run.quantizer
        if self.quantizer is not None and config.spread_weight:
            parts["spread"] = config.spread_weight * isotropy_loss(self.quantizer.compared(run.vectors.float()))
        return {f"{name}_{part}": value for part, value in (parts | terms).items()}

    def _reconstruct(self, run: Run, seen: Seen) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The decoded images in stage "finetune"; else how far the prediction is from the autoencoder's own."""
        if self.config.training.stage == "finetune":
            return self.to_images(self.to_latents(run.out)), {}
        out = run.out.float()
        assert seen.targets is not None
        if isinstance(self.base, MaskGITVQGAN):
            wanted = F.embedding(seen.targets, self.base.quantizer.rows().detach())
            codes = self.expected_codes(out)
            token = F.cross_entropy(out.flatten(0, 1), seen.targets.flatten())
            return None, {"token": token, "code": (codes - wanted).square().mean()}
        return None, {"latent": (out - seen.targets.float()).square().mean()}

    # ------------------------------------------------ images <-> latents

    def look(self, images: Tensor, noise: Tensor | None, *, targets: bool = False) -> Seen:
        """What the autoencoder makes of images in [-1, 1]; `noise` (B, C, h, w) samples a posterior. Without `targets`
        no code is looked for.
        """
        if isinstance(self.base, MaskGITVQGAN):
            features = self.base.features(images)
            cells = features.detach().flatten(2).transpose(1, 2)
            return Seen(features, self.base.quantizer.nearest(cells) if targets else None)
        given = (images + 1) / 2 if self.config.base_use == "published" else images
        moments = by_picture(self.base.moments, given)
        latents = latents_of_moments(moments, noise, self.base.config.scaling_factor)
        return Seen(latents, latents.flatten(2).transpose(1, 2) if targets else None)

    def to_latents(self, out: Tensor) -> Tensor:
        """What the decoder gives (B, N, outputs) as latents (B, C, h, w): of logits the mean of the codes."""
        cells = self.expected_codes(out) if isinstance(self.base, MaskGITVQGAN) else out
        return cells.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))

    def expected_codes(self, logits: Tensor) -> Tensor:
        """The mean (B, N, C), float32, of the autoencoder's codes under logits (B, N, V) of them."""
        assert isinstance(self.base, MaskGITVQGAN)
        with torch.autocast(logits.device.type, enabled=False):
            return logits.float().softmax(dim=-1) @ self.base.quantizer.rows().detach()

    def to_images(self, guess: Tensor) -> Tensor:
        """Images in about [-1, 1], not clamped, of latents (B, C, h, w)."""
        if isinstance(self.base, MaskGITVQGAN):
            return self.base.to_pixels(guess)
        if self.config.base_use == "published":  # pixels in [0, 1], and latents as large as they are
            guess = guess * self.base.config.scaling_factor
            return by_picture(self.base.decode, guess) * 2 - 1
        return by_picture(self.base.decode, guess)

    @property
    def tolerances(self) -> Tensor:
        """(E,) float32, ascending."""
        return self.tolerance_bits.view(torch.float32)

    def bin_of(self, errors: Tensor) -> Tensor:
        """The number of the smallest tolerance that is not below each error; of the last one where all are."""
        return torch.searchsorted(self.tolerances, errors.float()).clamp(max=len(self.config.tolerances) - 1)

    # ------------------------------------------------ the algorithm, plainly

    @torch.no_grad()
    def encode_plainly(self, images: Tensor, budget: int, eps: float, noise: Tensor | None = None) -> KARLTokens:
        """All `budget` slots of images in [-1, 1], kept or not; `encode` gives the kept ones."""
        cells = self.encoder.cells((images + 1) / 2, self.look(images, noise).features)
        bins = self.bin_of(torch.full((len(images),), eps, device=images.device))
        hidden = self.encoder(cells, bins, budget)
        probabilities = self.encoder.halting(hidden).sigmoid()
        ids, vectors = self._tokens(hidden)
        counts = torch.full_like(bins, budget)
        kept = probabilities <= self.config.threshold
        return KARLTokens(ids, counts, None, vectors, probabilities=probabilities, kept=kept, bins=bins)

    @torch.no_grad()
    def decode_plainly(self, tokens: KARLTokens) -> Tensor:
        """Images of what `encode_plainly` gave: every slot goes through the decoder, dropped ones behind a mask."""
        assert tokens.kept is not None
        out = self.decoder.plainly(self._codes(tokens), tokens.kept)
        return self.to_images(self.to_latents(out)).clamp(-1, 1)

    # ------------------------------------------------ tokens

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        budget: int | None = None,
        eps: float | Sequence[float] | Tensor | None = None,
        *,
        rate: Rate | str | None = None,
        fixed: bool = False,
        threshold: float | None = None,
        verify: bool = False,
        posterior_seed: int = 0,
    ) -> KARLTokens:
        """Images (B, 3, H, W) in [-1, 1] -> the tokens that they need; nothing is decoded.

        `budget` is the most tokens of an image, in 1..max_tokens; `eps` the mean absolute error that may remain, one
        for all images or one each, which is a request and no promise. What is asked for is the smallest of the
        configuration's `tolerances` that is not below it, or the largest (`asked`): 0.11 is 0.12 to the published
        models. Both have defaults in the configuration. `fixed` keeps exactly `budget` tokens of every image, and asks
        for the smallest error. A `rate` says both: with a tolerance it is a budget and an eps, without one a fixed
        number of tokens; text will do, "8@0.05". `threshold` replaces the configuration's. `verify` decodes and
        measures: images whose error is larger than allowed are encoded again, at the next stricter tolerance, three
        times in all at the most; of passes that all fail the best one is kept.

        Images get the noise of (`posterior_seed`, 0) for the posterior of the autoencoder, where it is sampled. Raises
        ValueError for images that the model does not take, a budget outside 1..max_tokens, an eps outside 0..1, and for
        an eps or a threshold beside `fixed`, which heeds neither.
        """
        if rate is not None:
            rate = rate if isinstance(rate, Rate) else Rate.parse(rate)
            if budget is not None or eps is not None or fixed:
                raise ValueError("rate: says how many tokens and which error; leave budget, eps and fixed out")
            self.check_rate(rate)
            budget, eps, fixed = rate.num_tokens, rate.tolerance, rate.tolerance is None
        if fixed and verify:
            raise ValueError("verify: a fixed number of tokens is not chosen by the error; leave one of the two out")
        for name, value in (("eps", eps), ("threshold", threshold)):
            if fixed and value is not None:
                raise ValueError(f"{name}: a fixed number of tokens does not depend on it; leave one of the two out")
        budget = self._budget(budget)
        threshold = self._threshold(threshold)
        cells = self._cells(images, posterior_seed)
        allowed = self._tolerated(0.0 if fixed else eps, images)
        tokens = self._encode(cells, self.bin_of(allowed), budget, threshold, fixed)
        return self._verified(images, cells, allowed, tokens, budget, threshold) if verify else tokens

    def encode_at(self, images: Tensor, rates: Sequence[Rate]) -> list[Tokens]:
        """Encodes at each rate what the autoencoder gives once."""
        for rate in rates:
            self.check_rate(rate)
        found: list[Tokens] = []
        with torch.no_grad():
            cells = self._cells(images, 0)
            for rate in rates:
                bins = self.bin_of(self._tolerated(rate.tolerance or 0.0, images))
                fixed = rate.tolerance is None
                found.append(self._encode(cells, bins, rate.num_tokens, self.config.threshold, fixed))
        return found

    @torch.no_grad()
    def count(
        self,
        images: Tensor,
        eps: float | Sequence[float] | Tensor | None = None,
        *,
        budget: int | None = None,
        threshold: float | None = None,
        posterior_seed: int = 0,
    ) -> Tensor:
        """How many tokens images need, (B,) int64: their complexity. The arguments are those of `encode`, of which this
        does what is needed for the lengths.
        """
        budget, threshold = self._budget(budget), self._threshold(threshold)
        cells = self._cells(images, posterior_seed)
        hidden = self.encoder(cells, self.bin_of(self._tolerated(eps, images)), budget)
        return keep(self.encoder.halting(hidden).sigmoid(), threshold).sum(dim=1)

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
        """Images (B, 3, H, W) in [-1, 1] of tokens, rows of any length, with their slots; without them slot k has
        token k. Nothing is drawn, and there are no settings. Raises ValueError for settings, for ids and slots that
        there are not, and for a slot twice.
        """
        if decoding is not None and not isinstance(decoding, self.decoding_class):
            raise ValueError("decoding: this tokenizer's decoder has no settings; leave it out")
        ids = None if self.quantizer is None else self.vocab_size
        fewest, most = check_tokens(tokens, indices, self.num_tokens, num_slots=self.num_slots, vocab_size=ids)
        tokens = tokens.to(self.decoder.query.device).padded().truncate(most)
        out = self.decoder(self._codes(tokens), tokens.slots, tokens.mask if fewest < most else None)
        return self.to_images(self.to_latents(out)).clamp(-1, 1)

    def _cells(self, images: Tensor, posterior_seed: int) -> Tensor:
        """What the encoder reads of images, (B, N, W). Raises ValueError for images that it does not take."""
        check_images(images, self.image_size)
        check_side(images, self.image_size)
        noise = None
        if isinstance(self.base, VAE) and self.config.posterior == "sample":
            shape = (self.base.config.latent_channels, self.config.grid, self.config.grid)
            noise = randomness.normal(posterior_seed, [0], shape, "posterior").to(images.device)
        # Weights of 16 bits see pixels rounded in [0, 1], where dark ones are told apart more finely than near -1.
        images = images.to(torch.promote_types(images.dtype, self.decoder.query.dtype))
        return self.encoder.cells((images + 1) / 2, self.look(images, noise).features)

    def _encode(self, cells: Tensor, bins: Tensor, budget: int, threshold: float, fixed: bool) -> KARLTokens:
        hidden = self.encoder(cells, bins, budget)
        probabilities = self.encoder.halting(hidden).sigmoid()
        kept = torch.ones_like(probabilities, dtype=torch.bool) if fixed else keep(probabilities, threshold)
        lengths = kept.sum(dim=1)
        slots = kept.byte().argsort(dim=1, descending=True, stable=True)  # kept ones first, in order
        ids, vectors = self._tokens(hidden.gather(1, slots[..., None].expand_as(hidden)))
        packed = Tokens(ids, lengths, slots, vectors).padded()
        return KARLTokens(
            packed.ids, lengths, packed.slots, packed.vectors, probabilities=probabilities, kept=kept, bins=bins
        )

    def _tokens(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ids (B, T) of what slots say, or zeros and the vectors (B, T, n)."""
        vectors = self.encoder.vectors(hidden)
        if self.quantizer is not None:
            return self.quantizer.nearest(vectors), None
        return torch.zeros(vectors.shape[:-1], dtype=torch.long, device=vectors.device), vectors

    def _codes(self, tokens: Tokens) -> Tensor:
        """What the decoder reads, (B, K, n); ids are not checked. Raises ValueError for tokens of the other kind."""
        if self.quantizer is not None and tokens.vectors is None:
            return F.embedding(tokens.ids, self.quantizer.rows())  # as `ids_to_codes`, which waits for the device
        if self.quantizer is None and tokens.vectors is not None:
            return tokens.vectors
        kinds = ("ids", "vectors") if self.quantizer is not None else ("vectors", "ids")
        raise ValueError(f"tokens: this tokenizer decodes {kinds[0]}, and these are {kinds[1]}")

    def _verified(
        self, images: Tensor, cells: Tensor, allowed: Tensor, tokens: KARLTokens, budget: int, threshold: float
    ) -> KARLTokens:
        """Those tokens, or for images that miss the error `allowed` (B,) those of a stricter tolerance."""
        errors, bins = self._errors(images, tokens), tokens.bins
        assert bins is not None
        best = replace(tokens, errors=errors)
        for _ in range(PASSES - 1):
            rows = ((errors > allowed) & (bins > 0)).nonzero().squeeze(1)
            if not len(rows):
                break
            bins = bins.index_add(0, rows, torch.full_like(rows, -1))
            again = self._encode(cells[rows], bins[rows], budget, threshold, False)
            found = self._errors(images[rows], again)
            better = found < errors[rows]
            best = best.updated(rows[better], replace(again, errors=found), better)
            errors = errors.index_copy(0, rows[better], found[better])
        return best

    def _errors(self, images: Tensor, tokens: Tokens) -> Tensor:
        """Mean absolute errors (B,) of the decoded images."""
        return (self.decode(tokens).float() - images.float().clamp(-1, 1)).abs().mean(dim=(1, 2, 3)) / 2

    def _budget(self, budget: object) -> int:
        if budget is None:
            return self.config.budget
        if isinstance(budget, bool) or not isinstance(budget, SupportsIndex):
            remedy = f"; a rate is given as rate={str(budget)!r}" if isinstance(budget, Rate) else ""
            raise ValueError(f"budget: a whole number of tokens such as {self.config.budget}, given {budget!r}{remedy}")
        budget = index(budget)
        if not 1 <= budget <= self.num_tokens:
            raise ValueError(f"budget: this tokenizer has 1 to {self.num_tokens} tokens an image, given {budget}")
        return budget

    def _threshold(self, threshold: float | None) -> float:
        if threshold is None:
            return self.config.threshold
        if isinstance(threshold, bool | str) or not isinstance(threshold, SupportsFloat) or not 0 <= threshold <= 1:
            raise ValueError(f"threshold: a probability between 0 and 1, given {threshold!r}")
        return threshold

    def _tolerated(self, eps: float | Sequence[float] | Tensor | None, images: Tensor) -> Tensor:
        """The errors (B,) that are allowed, float32 on the images' device. Raises ValueError for others."""
        try:
            given = torch.as_tensor(self.config.tolerance if eps is None else eps, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"eps: a number, or one for each of the {len(images)} images; given {eps!r}, which is neither"
            ) from error
        if given.ndim > 1 or (given.ndim and len(given) != len(images)):
            raise ValueError(f"eps: a number, or one for each of the {len(images)} images; given {tuple(given.shape)}")
        if not bool((given >= 0).all()):
            raise ValueError(f"eps: an error that is allowed is a number from 0 on, given {eps}")
        if not bool((given <= 1).all()):
            raise ValueError(
                f"eps: an error of pixels in [0, 1] is at most 1, given {eps}; that of 12 grey levels is eps=12/255"
            )
        return given.to(images.device).expand(len(images)).contiguous()
