"""Our KARL as a worker, with the peer's weights: drawn under their published names, put where ours has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import recipe
import torch
from drawn import fill
from karl_case import (
    BETAS,
    BUDGET,
    CLIP,
    DECAY,
    EMA_DECAY,
    JUDGE,
    JUDGES,
    RATE,
    SIZES,
    SLOTS,
    TOLERANCE,
    WEIGHT,
    Case,
    image_size,
    levels,
    parse_size,
    training,
)  # fmt: skip
from protocol import Setup, autocast, serve
from torch import Tensor, nn

from imgtok.losses.lpips import LPIPS
from imgtok.losses.reconstruction import ReconstructionLossConfig
from imgtok.published.karl import names_of
from imgtok.published.kl16 import KL16
from imgtok.published.names import Place
from imgtok.tokenizers.karl import KARL, Draws, KARLConfig, KARLTraining, TransformerConfig
from imgtok.tokenizers.karl_training import TrainableKARL
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from imgtok.train.config import TrainingConfig
from imgtok.train.ema import EMA
from imgtok.train.optim import make_optimizer, set_rate


class Ours:
    """The model with drawn weights."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.shapes = setup.shapes
        self.thresholds: dict[int, float] = {}
        if setup.device != "cpu":
            torch.backends.cuda.matmul.allow_tf32 = True
        self.model = KARL(configuration(setup.size)).eval()
        state = self.model.state_dict()
        known = {theirs: Place(ours) for ours, theirs in names_of(self.model).items()}
        fill(
            state,
            known,
            {name: shape for name, shape in self.shapes.items() if not name.startswith(JUDGES)},
            setup.seed,
            lambda name, value: value.reshape(state[known[name].name].shape),
        )
        self.model.to(setup.device)
        self.lesson = Lesson(self.model, setup) if training(setup.size) else None
        if setup.compile:
            for block in (*self.model.encoder.blocks, *self.model.decoder.blocks):
                block.compile()

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        if draws:
            raise ValueError("our noise is that of (seed, 0): give it to the peer")

    @torch.no_grad()
    def prepare(self, case: Case) -> Callable[[], Tensor]:
        side = image_size(self.setup.size)
        pixels = recipe.uniform("images", (case.batch, 3, side, side), self.setup.seed)
        images = torch.from_numpy(pixels).to(self.setup.device) * 2 - 1
        if case.what == "train":
            assert self.lesson is not None, f"{self.setup.size} has no judges"
            return partial(self.lesson.step, images)
        return partial(self.call, images, self.threshold_for(images, case.kept), case)

    def threshold_for(self, images: Tensor, kept: int | None) -> float | None:
        """With which the first image keeps so many tokens, and the others about as many."""
        if kept is None:
            return None
        if kept not in self.thresholds:
            probabilities = self.model.encode(images[:1], BUDGET, TOLERANCE).probabilities
            assert probabilities is not None
            self.thresholds[kept] = float(probabilities[0].sort().values[kept - 1])
        return self.thresholds[kept]

    @torch.no_grad()
    def call(self, images: Tensor, threshold: float | None, case: Case) -> Tensor:
        with autocast(self.setup):
            tokens = self.model.encode(images, BUDGET, TOLERANCE, threshold=threshold)
            if case.what == "both":
                return self.model.decode(tokens).add(1).div(2)
        return tokens.ids if tokens.vectors is None else tokens.vectors


class Lesson:
    """A training step of stage 2 that leaves the weights, with the judges that the published step takes."""

    def __init__(self, model: KARL, setup: Setup) -> None:
        loss = ReconstructionLossConfig(
            l1=0.5,  # of errors on the scale [-1, 1]
            mse=0.0,
            lpips=1.0,
            adversarial=WEIGHT,
            adaptive="last_layer",
            discriminator_norm="batch",
            discriminator_every=9,
        )
        taught = model.for_training(loss, 1)
        assert isinstance(taught, TrainableKARL)
        self.setup, self.taught = setup, taught.to(setup.device).train()
        shapes = {name: shape for name, shape in setup.shapes.items() if name.startswith(JUDGE)}
        numbers = {
            name.removeprefix(JUDGE): torch.from_numpy(recipe.weight(name, tuple(shape), setup.seed))
            for name, shape in shapes.items()
        }
        discriminator = taught.discriminators[0]
        mine = {name.replace("discriminator.main", "layers"): value for name, value in numbers.items()}
        discriminator.load_state_dict({**discriminator.state_dict(), **only(mine, "layers.")})
        discriminator.register_forward_pre_hook(lambda module, inputs: (unit(inputs[0]),))  # as published
        self.lpips = lpips(numbers).to(setup.device)
        config = TrainingConfig(
            steps=1, batch_size=1, learning_rate=RATE, betas=BETAS, weight_decay=DECAY, ema=EMA_DECAY
        )
        self.optimizer = make_optimizer(taught, config, torch.device(setup.device), taught.groups())
        self.ema = EMA(taught, config.ema, without=taught.discriminators.parameters())

    def step(self, images: Tensor) -> Tensor:
        """A generator step as in `train/loop.py`, at rate 0: the loss and the norm of the gradient."""
        model, batch = self.taught.model, len(images)
        nothing = images.new_zeros(batch)
        draws = Draws(None, SLOTS, nothing.long(), torch.zeros((), dtype=torch.bool, device=images.device), nothing)
        with torch.enable_grad():
            with autocast(self.setup):
                runs = model.forward_drawn(images, draws)
                losses = self.taught.with_image_losses(
                    images, draws, runs, 0, lambda a, b: self.lpips(unit(a), unit(b))
                )
            losses.total.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        set_rate(self.optimizer, 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(0)
        return torch.stack([losses.total.detach(), norm])


def lpips(numbers: Mapping[str, Tensor]) -> LPIPS:
    """The one of a published discriminator; its drawn heads have both signs, which ours refuses of a file."""
    own = {name.removeprefix("perceptual_loss."): value for name, value in numbers.items()}
    backbone = {f"features.{name.split('.', 2)[2]}": value for name, value in only(own, "net.").items()}
    heads = only(own, "lin")
    found = LPIPS("vgg", backbone, {name: value.abs() for name, value in heads.items()})
    for index, head in enumerate(found.heads):
        head.data = heads[f"lin{index}.model.1.weight"].view_as(head)
    return found


def only(numbers: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: value for name, value in numbers.items() if name.startswith(prefix)}


def unit(images: Tensor) -> Tensor:
    """In [0, 1], as the published judges see them."""
    return (images + 1) / 2


def configuration(size: str) -> KARLConfig:
    """One such as small/vqgan or tiny/vqgan/train, as the published code has it."""
    name, base, quantized = parse_size(size)
    width, depth, num_heads = SIZES[name]
    transformer = TransformerConfig(width=width, depth=depth, num_heads=num_heads)
    vqgan = MaskGITVQGANConfig(block_channels=tuple(128 * width for width in levels(size)))
    return KARLConfig(
        image_size=image_size(size),
        base=vqgan if base == "vqgan" else KL16,
        base_use="published",
        quantized=quantized,
        encoder=transformer,
        decoder=transformer,
        training=KARLTraining(stage="finetune" if training(size) else "distill"),
    )


if __name__ == "__main__":
    serve(Ours, Case)
