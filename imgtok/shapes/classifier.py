"""A small network whose features compare images of the built-in shapes: the ruler of `fd_shapes`.

It learns to name shape and colour on fresh renders, always in the same way (one thread, one seed), takes well under a
minute on a CPU, and is kept in a cache folder afterwards. Its distances are for comparing runs on the built-in shapes
and for nothing else: they are not FID, and differ a little between versions of torch and kinds of CPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.files import cache_folder, replacing
from imgtok.randomness import step_generator
from imgtok.runtime import cpu_threads
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import COLOURS, SHAPES, VERSION, ShapesConfig
from imgtok.weights import read_weights, write_tensors

logger = logging.getLogger(__name__)

SIZE = 32
"""Pixels a side that the network sees; other images are resized to it by area."""
NUM_FEATURES = 64


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the weights; change a value and give it another name."""

    name: str = "shapesnet-1"
    world: str = VERSION
    steps: int = 300
    batch: int = 64
    learning_rate: float = 4e-3
    scales: tuple[float, ...] = (1.0, 1.3)
    """Factors on the radii, batch by batch in turn: the profiles that are in use."""
    noise: float = 0.1
    """Largest deviation of the noise on an image, in units of [-1, 1]."""
    brightness: float = 0.1
    """Largest shift of an image's brightness, likewise."""
    seed: int = 0

    @property
    def label(self) -> str:
        """As it stands in the names of scores."""
        return f"{self.name}@{SIZE}"


class ShapesNet(nn.Module):
    """Convolutions, 64 features, and a linear reading of shape and colour from them."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_stage(3, 16),
            *_stage(16, 32),
            *_stage(32, 48),
            nn.Flatten(),
            nn.Linear(48 * 4 * 4, NUM_FEATURES),
        )
        self.heads = nn.Linear(NUM_FEATURES, len(SHAPES) + len(COLOURS))
        # Features have mean 0 and deviation 1 over renders, which gives distances a scale.
        self.register_buffer("mean", torch.zeros(NUM_FEATURES))
        self.register_buffer("deviation", torch.ones(NUM_FEATURES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 8) of the shape and (B, 8) of the colour; images (B, 3, H, W) in [-1, 1]."""
        logits = self.heads(self.body(resize(images)))
        return logits[:, : len(SHAPES)], logits[:, len(SHAPES) :]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 64) float32, centred and scaled; images (B, 3, H, W) in [-1, 1]."""
        return (self.body(resize(images.float())) - self.mean) / self.deviation


def _stage(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    # Batch normalisation and max-pooling learn outlines in far fewer steps than group normalisation and mean-pooling.
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)


def resize(images: Tensor) -> Tensor:
    """To 32 pixels a side: by area from larger images, bilinear from smaller ones."""
    if tuple(images.shape[-2:]) == (SIZE, SIZE):
        return images
    if min(images.shape[-2:]) >= SIZE:
        return F.interpolate(images, size=(SIZE, SIZE), mode="area")
    return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


# Training


def train(recipe: Recipe | None = None) -> ShapesNet:
    """A network made by the recipe: the same bits each time on one machine, with any number of threads."""
    recipe = recipe or Recipe()
    # Another number of threads would round otherwise and end in other weights.
    with cpu_threads(1), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # the default generator decides initial weights; the fork puts it back
        net = ShapesNet()
        optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.learning_rate, total_steps=recipe.steps)
        sources = [_renders(recipe, scale) for scale in recipe.scales]
        for step in range(recipe.steps):
            images, labels = _batch(sources, step, recipe.batch)
            loss = _loss(net, _disturb(images, step_generator(recipe.seed, step, purpose="shapesnet"), recipe), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        _standardise(net.eval(), sources, recipe)
    return net


def _renders(recipe: Recipe, scale: float) -> ShapesDataset:
    # Twice the training batches' worth: the second half is for the mean and deviation of the features.
    count = 2 * recipe.steps * recipe.batch
    return ShapesDataset(ShapesConfig(split="train", num_images=count, scale=scale), SIZE)


def _batch(sources: list[ShapesDataset], step: int, size: int) -> tuple[Tensor, Tensor]:
    return sources[step % len(sources)].batch(range(step * size, (step + 1) * size))


def _disturb(images: Tensor, generator: torch.Generator, recipe: Recipe) -> Tensor:
    """Noise and brightness of a random strength for each image.

    A network that saw only flawless renders takes noise of four grey levels for a greater change than missing classes.
    """
    strength, shift = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return images + recipe.noise * strength * noise + recipe.brightness * (2 * shift - 1)


def _loss(net: ShapesNet, images: Tensor, labels: Tensor) -> Tensor:
    shapes, colours = net(images)
    per_shape = len(COLOURS)
    return F.cross_entropy(shapes, labels // per_shape) + F.cross_entropy(colours, labels % per_shape)


def _standardise(net: ShapesNet, sources: list[ShapesDataset], recipe: Recipe) -> None:
    steps = range(recipe.steps, recipe.steps + min(recipe.steps, 32))
    features = torch.cat([net.features(_batch(sources, step, recipe.batch)[0]) for step in steps])
    net.mean.copy_(features.mean(dim=0))
    net.deviation.copy_(features.std(dim=0).clamp(min=1e-6))


# Cache


def load_or_train(recipe: Recipe | None = None, folder: Path | None = None) -> ShapesNet:
    """The recipe's network from the cache folder, or trained now and stored there if possible."""
    recipe = recipe or Recipe()
    path = (folder or cache_folder()) / cache_name(recipe)
    net = _read(path)
    if net is not None:
        return net
    logger.info("training %s for fd_shapes, once; it will be kept in %s", recipe.label, path)
    net = train(recipe)
    try:
        with replacing(path) as temporary:
            write_tensors(net.state_dict(), temporary, {"recipe": json.dumps(asdict(recipe))})
    except OSError as error:
        logger.warning("cannot keep %s, it will be trained again next time: %s", path, error)
    return net


def cache_name(recipe: Recipe) -> str:
    """File name with a hash of the recipe and of torch's version, whose kernels round in their own way."""
    text = json.dumps([asdict(recipe), torch.__version__, str(ShapesNet())], sort_keys=True)
    return f"{recipe.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def fingerprint(net: ShapesNet) -> str:
    """First 8 hex digits of the weights' SHA-256."""
    digest = hashlib.sha256()
    for _, tensor in sorted(net.state_dict().items()):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def _read(path: Path) -> ShapesNet | None:
    if not path.exists():
        return None
    net = ShapesNet()
    try:
        net.load_state_dict(read_weights(path))
    except (ValueError, RuntimeError, OSError) as error:
        logger.warning("%s is damaged and will be made again: %s", path, error)
        return None
    return net.eval()
