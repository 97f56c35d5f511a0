"""What the jobs that train on images share: the images, in the loop's batches, held-out ones to show, and the losses of
what a model decodes while it is trained.

What the loop trains is the model, or a module around it: `Judged`, which has the losses of reconstructions, or one that
the model brings itself (`for_training`). Such a module is called with images, `generator=` and `perceptual=`, gives
`Losses`, and declares its groups of parameters by `groups()`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from imgtok.data.images import DataConfig, DataError, ImageSource, Opened, all_over, in_words
from imgtok.data.loaders import Batch, eval_loader, train_loader
from imgtok.data.overlap import refuse_shared
from imgtok.data.parts import parts_of
from imgtok.groups import ParameterGroup, each
from imgtok.losses.reconstruction import Perceptual, PerceptualNetwork, ReconstructionLoss, ReconstructionLossConfig
from imgtok.randomness import spread
from imgtok.shapes.world import ShapesConfig
from imgtok.sizes import Size
from imgtok.tokenizers.base import Autoencoder, CodedLosses, Losses, Tokenizer, rebuilt
from imgtok.train.config import TrainingConfig
from imgtok.train.loop import Job
from imgtok.train.optim import whole_model
from imgtok.train.validation import HeldOut, Measure


class ImageJob(Job):
    """Batches of training images and the names in them, the losses and the groups of what is trained on them."""

    def __init__(
        self,
        trained: nn.Module,
        source: ImageSource,
        shown: ImageSource,
        training: TrainingConfig,
        *,
        judges: bool,
        perceptual: PerceptualNetwork | None = None,
    ) -> None:
        """`judges` says that `trained` takes `perceptual`."""
        self.model: nn.Module = trained
        self.judges = judges
        self.perceptual = perceptual
        self.source = source
        self.shown = shown
        self.training = training
        self.identity: dict[str, Any] = {"data": json.loads(source.identity)}

    def batches(self, *, start_step: int, rank: int, world: int) -> Iterator[Batch]:
        """Micro-batches of one process, without end, from optimizer step `start_step` on."""
        training = self.training
        return train_loader(
            self.source,
            training.batch_size,
            seed=training.seed,
            start_step=start_step * training.accumulate,
            rank=rank,
            world=world,
            num_workers=training.num_workers,
        )

    def groups(self) -> Sequence[ParameterGroup]:
        """Those that what is trained declares, or one of all parameters."""
        own: Any = getattr(self.model, "groups", None)
        groups: Sequence[ParameterGroup] = whole_model(self.model) if own is None else own()
        return groups

    def loss(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Losses:
        """The losses of one micro-batch, with the perceptual distance where reconstructions are judged."""
        if self.perceptual is not None:
            self.perceptual.to(batch.images.device)
        judge = {"perceptual": self.perceptual} if self.judges else {}
        losses: Losses = model(batch.images, generator=generator, **judge)
        return losses

    def resumed(self, step: int) -> None:
        """Let what is trained count its micro-batches in steps of the size that they have now."""
        own: Any = getattr(self.model, "resumed", None)
        if own is not None:
            own(step * self.training.accumulate)

    def preview_images(self, num: int) -> Tensor:
        """Images (B, 3, H, W) to show in previews, always the same ones: `num` from all over those that are shown, of
        each class its share, or all where there are fewer. Those that cannot be read are left out.
        """
        return self.shown.batch(all_over(self.shown, min(num, len(self.shown)))).images

    def calibrate(self, model: Tokenizer | Autoencoder) -> None:
        """Let a model that is finished measure what it measures on held-out images."""
        device = next(model.parameters()).device
        chosen = range(0, len(self.shown), -(-len(self.shown) // 256))  # not the first: those may all be of one class
        batches = eval_loader(self.shown, self.training.batch_size, indices=chosen)
        model.calibrate(batch.images.to(device) for batch in batches)

    def measure(self, model: Tokenizer | Autoencoder, wanted: Sequence[str], held_out: HeldOut, num: int) -> Measure:
        """`scores` of a job whose `model` reconstructs images."""
        from imgtok.train import scores  # which brings the networks that judge

        scores.refuse_others(wanted, ("psnr",), "reconstructions")
        chosen = spread(min(num, held_out.count), held_out.count).tolist()
        size = self.training.batch_size
        parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]

        def psnr(_: nn.Module) -> Mapping[str, float]:
            batches: Iterator[Batch] = (held_out.batch(part, 0) for part in parts)
            return scores.psnr_by_rate(model, ((batch.indices, batch.images) for batch in batches if batch.names))

        return psnr

    def names(self, batch: Batch) -> Sequence[str]:
        """Which images these are, for messages."""
        return batch.names


class Divides(Protocol):
    """What the configuration of a job on images says of those that are kept from training."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def held_out(self) -> float: ...

    @property
    def validation(self) -> DataConfig | None: ...


def held_out_images(source: ImageSource, shown: ImageSource, config: Divides) -> HeldOut:
    """The images to validate on: those that `validation` names, or those that are `shown` where they are held out.

    Raises DataError where none are held out, and for what `validation` names and cannot be used.
    """
    if config.validation is not None:
        try:
            chosen = named_for_validation(config.validation, source.size)
        except DataError as error:
            raise DataError(f"validation: {error}") from error
        check, words = refuse(source, chosen, "validation"), f"images of {in_words(config.validation)}"
    else:
        chosen, words = shown, f"held-out images of {in_words(config.data)}"
        apart = not isinstance(config.data, ShapesConfig) and parts_of(config.data).held_out is not None
        if not apart and not config.held_out:
            raise DataError(
                "training.validate_every: no images are held out (held_out=0): keep a share of them with held_out=0.1, "
                "or name others, such as validation.kind=folder validation.path=FOLDER"
            )
        check = refuse(source, chosen, "data" if apart else "held_out")  # a share may hold copies of what is trained on
    return HeldOut(len(chosen), lambda places, _: chosen.batch(places), words, check)


def refuse(source: ImageSource, chosen: ImageSource, field: str) -> Callable[[Sequence[int]], None]:
    """What raises DataError if `chosen` images at some places are trained on, too."""
    return lambda places: refuse_shared(source, chosen, places, field)


def named_for_validation(config: DataConfig, size: Size) -> ImageSource:
    """All images of a data set, or of the part that it keeps apart itself."""
    opened = Opened(config)
    if opened.has_held_out or (isinstance(config, ShapesConfig) and config.split == "train"):
        return opened.images(size, "held_out", 1.0)
    return opened.images(size, "train", 0.0)


def to_train(model: Tokenizer | Autoencoder, loss: ReconstructionLossConfig | None, accumulate: int) -> nn.Module:
    """What the loop trains: what `model` brings itself, or `Judged` where it `reconstructs`, or `model`.

    Raises ValueError for a `loss` that a model without reconstructions is given.
    """
    own = model.for_training(loss, accumulate)
    if own is not None:
        return own
    if model.reconstructs:
        loss = loss or ReconstructionLossConfig()
        return Judged(model, loss, start=loss.adversarial_start * accumulate)
    if loss is not None:
        raise ValueError(f"loss: a {type(model).__name__} has losses of its own alone; leave loss out")
    return model


class Judged(nn.Module):
    """A model that decodes images while it is trained, and the losses of these: what is trained and checkpointed.

    Calling `model` with images and a generator gives a `Reconstruction`; its `last_layer` is the weight that gave the
    images.
    """

    def __init__(self, model: Any, config: ReconstructionLossConfig, *, start: int = 0) -> None:
        """`start` is the micro-batch from which the adversarial term counts."""
        super().__init__()
        self.model = model
        self.judge = ReconstructionLoss(config, start=start)

    def forward(
        self, images: Tensor, *, generator: torch.Generator, perceptual: Perceptual | None = None
    ) -> Losses | CodedLosses:
        """The sum of both players' losses for images (B, 3, H, W) in [-1, 1], and of the model's own."""
        decoded, own = self.model(images, generator=generator)
        judged = self.judge(decoded, images, perceptual=perceptual, last_layer=self.model.last_layer)
        return rebuilt(judged.total + own.total, {**judged.parts, **own.parts}, own)

    def resumed(self, calls: int) -> None:
        """Let the adversarial term go on after so many micro-batches."""
        if self.judge.discriminator is not None:
            self.judge.seen.fill_(calls)

    def groups(self) -> list[ParameterGroup]:
        """The model, and the discriminator if there is one, with its own rate, decay, clip and rhythm."""
        groups = [ParameterGroup(name="model", parameters=list(self.model.parameters()))]
        if self.judge.discriminator is not None:
            config = self.judge.config
            discriminator = ParameterGroup(
                name="discriminator",
                parameters=list(self.judge.discriminator.parameters()),
                rate=config.discriminator_rate,
                weight_decay=config.discriminator_decay,
                due=each(config.discriminator_every),
                averaged=False,
            )
            groups.append(discriminator)
        return groups
