"""`imgtok check`: every part of a model on the CPU in float32, and on another device or in another precision."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from imgtok import announce
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveInt, check
from imgtok.files import replacing
from imgtok.generators.conditioning import Condition, ConditionalGenerator
from imgtok.generators.pipeline import DTYPES, Pipeline, default_device, pipeline
from imgtok.hub import Found, load, resolve
from imgtok.sample.parting import Comparison, Row, Stage
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import ShapesConfig
from imgtok.sizes import Size, sides
from imgtok.text.captions import Captions
from imgtok.tokenizers.base import Autoencoder, Tokenizer

logger = logging.getLogger(__name__)

POSITIONAL = "model"
DRAW = "draw"
"""The stage of new tokens or latents."""
TOKENS = 8
"""Tokens that a generator of tokens draws, where it can draw fewer than all."""
SIDE = 32
"""Pixels a side, at least, of the images of an autoencoder, which takes many sizes."""
TF32 = 2.0**-11
"""The largest relative error of rounding to the numbers in which CUDA multiplies unless it is told otherwise."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Runs every part of a model on the CPU in float32 and on another device or in another precision, on the same
    inputs, and says where they part: the exit status is then 1.
    """

    job: Literal["check"] = "check"
    """Which program this file is for."""
    model: str
    """Folder or any other name of a model of any kind; with a generator its decoder is checked, too."""
    tokenizer: str | None = None
    """Of a generator: the tokenizer or autoencoder that decodes what it draws; null takes that in its folder."""
    device: str | None = None
    """Where to compute, such as cuda, cuda:1, mps or cpu; null takes the accelerator that there is, or the CPU."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic there."""
    weights: bool = False
    """Whether the weights get that precision too, as by `imgtok.load(..., dtype=)`; false keeps them in float32 and
    computes in the precision where torch thinks it safe (autocast), as the other commands do."""
    num: PositiveInt = 2
    """Images, of the built-in shapes."""
    seed: NonNegativeInt = 0
    """Seed of images, noise and draws."""
    out: Path | None = None
    """File for the table as JSON; null writes none."""

    def __post_init__(self) -> None:
        check(self)


def main(config: Config) -> None:
    """Logs a table of parts and where they part. Raises SystemExit with status 1 if they do."""
    device = open_device(config.device)
    if device.type == "cpu" and config.precision == "fp32":
        raise ValueError(
            "device: the CPU in fp32 is what others are compared with; say device=cuda or another device, or "
            "precision=bf16"
        )
    found = resolve(config.model)
    where = f"{device} in {config.precision}{' (weights too)' if config.weights else ''}"
    announce.begins("check", model=found.in_words, on=where, out=config.out)
    rows: list[Row] = []
    for prefix, model, stages in subjects(config, found):
        other = Comparison(
            model, copied(model, device, config), lambda: arithmetic(config, device), unit(config, device)
        )
        logger.info("%s", header(prefix, model, config.precision))
        for stage in stages:
            for row in other.rows(stage):
                logger.info("%s", in_words(row))
                rows.append(row)
    parting = next((row for row in rows if row.parts), None)
    logger.info("%s", verdict(parting, config.precision))
    if config.out is not None:
        write(config, found, rows)
        announce.ends(config.out)
    if parting is not None:
        sys.exit(1)


# ---------------------------------------------------------------- what is computed


def subjects(config: Config, found: Found) -> Iterator[tuple[str, nn.Module, list[Stage]]]:
    """The models to compare, each with its stages: a generator comes after its decoder."""
    numbers = range(config.num)
    if not issubclass(found.model_class, ConditionalGenerator):
        if config.tokenizer is not None:
            raise ValueError(f"tokenizer: {found.name} is no generator and has none; leave tokenizer out")
        model = load(found)
        yield "", model, stages_of(model, pictures(size_taken(model), config), config)
        return
    pipe = pipeline(found, tokenizer=config.tokenizer, device="cpu")
    images = pictures(pipe.image_size, config)
    yield "tokenizer", pipe.decoder, stages_of(pipe.decoder, images, config)
    with torch.no_grad():
        content = pipe.decoder.encode(images)
    condition = conditions(pipe, config)
    drawn = [count for count in pipe.generator.rates() if count <= TOKENS]
    options = {"num_tokens": max(drawn)} if drawn else {}

    def train(model: Any) -> Any:
        generator = torch.Generator().manual_seed(config.seed)
        return model(content.to(model.device), condition.to(model.device), generator=generator)

    def draw(model: Any) -> Any:
        return model.generate(condition.to(model.device), seed=config.seed, indices=numbers, **options)

    stages = [Stage("pass", train, draws=1), Stage(DRAW, draw, draws=1, whole=True)]
    if config.weights and not pipe.draws_tokens:  # latents stay in float32 where they are trained on, under autocast
        stages = stages[1:]
    yield "", pipe.generator, stages


def stages_of(model: Any, images: Tensor, config: Config) -> list[Stage]:
    """Encoding images, and decoding what the model on the CPU makes of them."""
    with torch.no_grad():
        encoded = model.encode(images)
    numbers = range(config.num)
    return [
        Stage("encode", lambda model: model.encode(images.to(model.device))),
        Stage("decode", lambda model: model.decode(encoded.to(model.device), seed=config.seed, indices=numbers), 1),
    ]


def pictures(size: Size, config: Config) -> Tensor:
    """Images (num, 3, H, W) of the built-in shapes, which are squares: of another size, their upper left part."""
    last = (config.seed + 1) * config.num
    height, width = sides(size)
    drawn = ShapesDataset(ShapesConfig(num_images=last), max(height, width)).batch(range(last - config.num, last))[0]
    return drawn[:, :, :height, :width].contiguous()


def size_taken(model: Tokenizer | Autoencoder) -> Size:
    """The size that a model takes."""
    if isinstance(model, Tokenizer):
        return model.image_size
    factor: int = model.config.factor
    return max(4 * factor, -(-SIDE // factor) * factor)


def conditions(pipe: Pipeline, config: Config) -> Condition:
    """Classes, or the features of captions of as many lengths, at random but as large as the text encoder's."""
    generator: Any = pipe.generator
    if not pipe.reads_text:
        return torch.arange(config.num) % pipe.num_classes
    how, size = generator.config.condition, float(generator.empty_caption.std()) or 1.0
    random = torch.Generator().manual_seed(config.seed)
    lengths = [1 + number % how.text_length for number in range(config.num)]
    return Captions.pad([size * torch.randn(length, how.text_width, generator=random) for length in lengths])


def open_device(name: str | None) -> torch.device:
    """The device of a name. Raises ValueError for one that is not there."""
    try:
        device = default_device() if name is None else torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = torch.accelerator.current_accelerator(check_available=True)
        known = "cpu" if there is None else f"cpu, {there.type}"
        raise ValueError(
            f"device: given {name!r}, which torch cannot use here ({known} can be used): {error}"
        ) from error
    return device


def copied(model: nn.Module, device: torch.device, config: Config) -> nn.Module:
    """The model once more, on the device."""
    return copy.deepcopy(model).to(device, DTYPES[config.precision] if config.weights else None)


def arithmetic(config: Config, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The context in which the copy computes."""
    halves = config.precision != "fp32" and not config.weights
    return torch.autocast(device.type, DTYPES[config.precision]) if halves else contextlib.nullcontext()


def unit(config: Config, device: torch.device) -> float:
    """The largest relative error of rounding a number there."""
    if config.precision == "fp32" and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return TF32
    return torch.finfo(DTYPES[config.precision]).eps / 2


# ---------------------------------------------------------------- what is written


def header(prefix: str, model: nn.Module, precision: str) -> str:
    """The line over the rows of a model."""
    title = " ".join(filter(None, (prefix, type(model).__name__)))
    return f"\n{title:44}{'largest':>10}{'relative':>10}{precision + ' explains':>15}"


def in_words(row: Row) -> str:
    """A line of the table."""
    name = f"  {row.stage:7} {row.part or 'as a whole'}"
    if row.failed:
        return f"{name:44}cannot be computed: {row.failed}"
    error, explained, mark = row.error, row.explained, "  PARTS" if row.parts else ""
    if error.of_ids:
        share, known = f"{100 * error.relative:.1f} %", f"{100 * explained.relative:.1f} %"
        return f"{name:44}{'ids differ':>10}{share:>10}{known:>15}{mark}"
    return f"{name:44}{error.largest:10.1e}{error.relative:10.1e}{explained.relative:15.1e}{mark}"


def verdict(row: Row | None, precision: str) -> str:
    """Where they part, in words."""
    if row is None:
        return f"\nNo part is further from the CPU than {precision} explains."
    if row.stage == DRAW:
        why = f"earlier than {precision} explains" if row.error.of_ids and not row.failed else reason(row, precision)
        return (
            f"\nThey part in {DRAW}: {why}. What is listed before it agrees: look at the key/value cache and at the "
            "numbers that are drawn with."
        )
    if not row.part:
        return (
            f"\nThey part in {row.stage}, though each module of it agrees on the same inputs: look at what is computed "
            f"between them{': ' + row.failed if row.failed else ''}."
        )
    inside = f", in {row.place}" if row.place and row.place != row.part else ""
    why = reason(row, precision)
    return f"\nThey part first in {row.stage}, in {row.part}{inside}: {why}. What is listed before it agrees."


def reason(row: Row, precision: str) -> str:
    """What is wrong with a part."""
    if row.failed:
        return f"it cannot be computed ({row.failed})"
    return f"relative error {row.error.relative:.1e}, of which {precision} explains {row.explained.relative:.1e}"


def write(config: Config, found: Found, rows: Sequence[Row]) -> None:
    """Writes the table as JSON."""
    assert config.out is not None
    table = [{**asdict(row), "parts": row.parts} for row in rows]
    about = {"model": found.about(), "device": config.device, "precision": config.precision, "weights": config.weights}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(config.out) as temporary:
        temporary.write_text(json.dumps({**about, "rows": table}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_job(sys.modules[__name__])
