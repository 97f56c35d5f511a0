"""What training puts around a KARL: the curriculum, and in the second stage the losses of decoded images.

Both stages take the two runs of `KARL.forward_drawn`. The curriculum, which tolerances the first run is asked for, is
a buffer, and so a part of every checkpoint; it changes once an optimizer step, by the errors of all its micro-batches
and all processes. In stage "finetune" the images that both runs decode have the losses of the job's section `loss`
(imgtok/losses/reconstruction.py), and from `loss.adversarial_start` on that of a discriminator, or of one of several:
for each eighth of the budget that the first run's slots fill there is another, as far as they go.

With `loss.discriminator_every` above 1 model and discriminators are trained in turn: one step in so many trains the
discriminators alone, and the model then only gives images, without a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imgtok.groups import ParameterGroup, each
from imgtok.losses.adversarial import (
    PatchDiscriminator,
    adversarial_loss,
    balance,
    discriminator_loss,
    join_at_last_layer,
)
from imgtok.losses.reconstruction import Perceptual, ReconstructionLossConfig, distances
from imgtok.quantizers.vq import VectorQuantizer
from imgtok.tokenizers.base import CodedLosses, Losses, rebuilt
from imgtok.tokenizers.karl import KARL, Draws, Runs


class Curriculum(nn.Module):
    """It says how often the first run is asked for each tolerance: at first for all strict ones equally often."""

    probabilities: Tensor
    """(E,), of E tolerances; they sum to 1."""

    def __init__(self, model: KARL) -> None:
        super().__init__()
        self.decay = model.config.training.curriculum_decay
        self.register_buffer("probabilities", model.start_of_curriculum())

    @torch.no_grad()
    def update(self, tolerances: Tensor, errors: Tensor) -> None:
        """Ask less often for the tolerances (E,) that all images' errors (B,) keep within; those of all processes."""
        smallest = errors.min()
        if has_processes():
            torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        weights = torch.where(tolerances >= smallest, self.decay * self.probabilities, self.probabilities)
        self.probabilities.copy_(weights / weights.sum())


def has_processes() -> bool:
    """Whether training runs in processes that can talk to each other, of which there may be only one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def shared(draws: Draws) -> Draws:
    """The same with the number of slots and the coin of the first process, which is what all of them use in a step: a
    process with fewer slots would wait for those with more. What is drawn for each image stays its own.
    """
    if not has_processes():
        return draws
    device = draws.augmented.device
    common = torch.stack([torch.tensor(draws.num_slots, device=device), draws.augmented.long()])
    torch.distributed.broadcast(common, 0)
    return draws._replace(num_slots=int(common[0]), augmented=common[1].bool())


class TrainableKARL(nn.Module):
    """A KARL with its curriculum and discriminators: what is trained and checkpointed. Calling it gives the losses of
    the model and of the discriminators.
    """

    seen: Tensor
    """Micro-batches so far."""

    def __init__(self, model: KARL, loss: ReconstructionLossConfig | None, accumulate: int) -> None:
        """It is called `accumulate` times an optimizer step. Raises ValueError for a `loss` in stage "distill"."""
        super().__init__()
        self.model = model
        self.curriculum = Curriculum(model)
        self.accumulate = accumulate
        self.finetunes = model.config.training.stage == "finetune"
        if loss is not None and not self.finetunes:
            raise ValueError(
                "loss: in model.training.stage=distill a KARL is trained by what its autoencoder gives, and no image "
                "is judged; leave loss out, or choose model.training.stage=finetune"
            )
        self.loss = loss or ReconstructionLossConfig()
        count = model.config.training.discriminators if self.loss.adversarial and self.finetunes else 0
        self.discriminators = nn.ModuleList(
            PatchDiscriminator(
                self.loss.discriminator_channels, self.loss.discriminator_layers, self.loss.discriminator_norm
            )
            for _ in range(count)
        )
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._calls: int | None = None
        self._smallest: Tensor | None = None  # error of the step at work; checkpoints are only written between steps

    def forward(
        self, images: Tensor, *, generator: torch.Generator, perceptual: Perceptual | None = None
    ) -> Losses | CodedLosses:
        """The losses for images (B, 3, H, W) in [-1, 1]."""
        if self._calls is None:
            self._calls = int(self.seen)  # once, after a checkpoint was loaded; from here on both count
        step = self._calls // self.accumulate
        if self.training:
            self._calls += 1
            self.seen += 1
        rounded = step >= self.model.config.training.rounded_from or self.keeps_table
        draws = shared(self.model.draw(images, generator, self.curriculum.probabilities))._replace(rounded=rounded)
        if not self.finetunes:
            runs = self.model.forward_drawn(images, draws)
            losses = runs.losses
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_discriminator_turn(step)):
                runs = self.model.forward_drawn(images, draws)
            losses = self.with_image_losses(images, draws, runs, step, perceptual)
        if self.training:  # a validation is no step
            self.learn_from(runs.errors)
            if not rounded and self.model.quantizer is not None:
                self.fill_table(self.model.quantizer, runs.vectors.detach().flatten(0, 1))
        return losses

    @property
    def keeps_table(self) -> bool:
        """Whether the rows of the quantizer are frozen, so that no new ones may be written either."""
        quantizer = self.model.quantizer
        return quantizer is not None and not quantizer.table.requires_grad

    def learn_from(self, errors: Tensor) -> None:
        """Take in the errors (B,) of a micro-batch; after the last one of an optimizer step the curriculum changes."""
        errors = errors.detach() if self._smallest is None else torch.cat([self._smallest, errors.detach()])
        self._smallest = errors.min()[None]
        assert self._calls is not None
        if self._calls % self.accumulate == 0:
            self.curriculum.update(self.model.tolerances, self._smallest)
            self._smallest = None

    def fill_table(self, quantizer: VectorQuantizer, vectors: Tensor) -> None:
        """The quantizer's oldest rows become newer vectors (N, n), those of the first process."""
        vectors = vectors[: quantizer.vocab_size].contiguous()
        if has_processes():
            torch.distributed.broadcast(vectors, 0)
        assert self._calls is not None
        quantizer.write(vectors, self._calls * len(vectors))

    @property
    def rests_parameters(self) -> bool:
        """Whether there are steps that use only some of the parameters: those of the model alone, or of one
        discriminator, or all but the quantizer's.
        """
        return bool(self.discriminators) or self.model.config.training.rounded_from > 0

    def resumed(self, calls: int) -> None:
        """Go on after so many micro-batches."""
        self.seen.fill_(calls)
        self._calls, self._smallest = calls, None

    def plays(self, step: int) -> bool:
        """Whether the adversarial game is on at an optimizer step."""
        return bool(self.discriminators) and step >= self.loss.adversarial_start

    def is_discriminator_turn(self, step: int) -> bool:
        """Whether the discriminators alone learn at a step."""
        every = self.loss.discriminator_every
        return self.plays(step) and every > 1 and each(every)(step)

    def groups(self) -> list[ParameterGroup]:
        """The model, and the discriminators if there are any, with their own rate, decay, clip and rhythm."""
        model = ParameterGroup(
            name="model",
            parameters=list(self.model.parameters()),
            due=lambda step: not self.is_discriminator_turn(step),
        )
        if not self.discriminators:
            return [model]
        its_turn = each(self.loss.discriminator_every)
        discriminators = ParameterGroup(
            name="discriminators",
            parameters=list(self.discriminators.parameters()),
            rate=self.loss.discriminator_rate,
            weight_decay=self.loss.discriminator_decay,
            due=lambda step: self.plays(step) and its_turn(step),
            averaged=False,
        )
        return [model, discriminators]

    # ------------------------------------------------ stage "finetune"

    def with_image_losses(
        self, images: Tensor, draws: Draws, runs: Runs, step: int, perceptual: Perceptual | None = None
    ) -> Losses | CodedLosses:
        """The losses of the runs together with those of the images that they decoded."""
        total, parts = runs.losses.total, runs.losses.parts
        for name, decoded in zip(("first", "second"), runs.images, strict=True):
            losses = self.image_losses(decoded, images, draws.num_slots, step, perceptual)
            total = total + losses.total
            parts |= {f"{name}_{part}": value for part, value in losses.parts.items()}
        return rebuilt(total, parts, runs.losses)

    def image_losses(
        self, decoded: Tensor, images: Tensor, num_slots: int, step: int, perceptual: Perceptual | None = None
    ) -> Losses:
        """The losses of the images (B, 3, H, W) that one run decoded, for what is trained at this step."""
        weight = self.adversarial_weight(step)
        alone, plays = self.is_discriminator_turn(step), self.plays(step)
        discriminator = self.discriminator(num_slots) if plays else None
        decoded = reconstructed = for_discriminator = decoded.float()
        adaptive = self.loss.adaptive if discriminator is not None and not alone else None
        if adaptive == "images":
            reconstructed, for_discriminator = balance(decoded, torch.as_tensor(weight, device=images.device))
        elif adaptive == "last_layer":
            reconstructed = for_discriminator = decoded.detach().requires_grad_()
        total, parts = distances(self.loss, reconstructed, images, perceptual)
        if discriminator is not None and not alone:
            adversarial = adversarial_loss(discriminator, for_discriminator, self.loss.game)
            parts["adversarial"] = adversarial.detach()
            if adaptive == "last_layer":
                total, parts["adaptive_weight"] = join_at_last_layer(
                    decoded, for_discriminator, total, adversarial, weight, self.model.last_layer
                )
            else:
                total = total + weight * adversarial
        if discriminator is not None and (alone or self.loss.discriminator_every == 1):
            parts["discriminator"] = discriminator_loss(discriminator, images, decoded, self.loss.game)
            total = parts["discriminator"] if alone else total + parts["discriminator"]
        return Losses(total, parts)

    def adversarial_weight(self, step: int) -> float:
        """The factor on the adversarial term at an optimizer step."""
        training = self.model.config.training
        if training.late_weight is not None and step >= training.late_start:
            return training.late_weight
        return self.loss.adversarial

    def discriminator(self, num_slots: int) -> PatchDiscriminator:
        """The discriminator of both runs of a step whose first run had so many slots."""
        budget, count = self.model.config.budget, len(self.discriminators)
        eighths = 8 * min(num_slots, budget) // budget
        chosen: PatchDiscriminator = self.discriminators[max(0, min(count, eighths) - 1)]
        return chosen
