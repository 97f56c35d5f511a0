"""`imgtok reconstruct`: held-out originals against their reconstructions at a list of token counts."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from imgtok import images as pictures
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveFloat, PositiveInt, Range, check
from imgtok.data.images import DataConfig, ImageSource, open_images
from imgtok.data.loaders import eval_loader
from imgtok.data.shapes import ShapesConfig
from imgtok.files import replacing
from imgtok.flextok import FlexTok, powers_of_two
from imgtok.hub import load
from imgtok.metrics.reconstruction import psnr
from sample.pipeline import best_device, blocks_of, pad_to_rows

logger = logging.getLogger(__name__)

POSITIONAL = "model"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Encodes held-out images, decodes them at several token counts, and writes a picture and each count's PSNR."""

    job: Literal["reconstruct"] = "reconstruct"
    """Which program this file is for."""
    model: str
    """Model folder or Hub name of the tokenizer."""
    out: Path = Path("outputs/reconstructions")
    """Folder of `grid.png` and `psnr.json`."""
    data: DataConfig = ShapesConfig()
    """Images; only those held out from training are used."""
    held_out: Annotated[float, Range(0.0, 0.9)] = 0.1
    """Share of the images that training kept apart."""
    num: PositiveInt = 16
    """Images to reconstruct."""
    num_tokens: tuple[int, ...] = ()
    """Token counts; empty takes the powers of two up to all tokens."""
    seed: NonNegativeInt = 0
    """Seed of the decoder's noise."""
    batch_size: PositiveInt = 64
    """Images reconstructed at once."""
    decode_steps: PositiveInt | None = None
    """Flow steps of the decoder; null takes the tokenizer's own setting."""
    decode_guidance: PositiveFloat | None = None
    """Guidance scale of the decoder; null takes the tokenizer's own setting."""

    def __post_init__(self) -> None:
        check(self)
        if any(count < 1 for count in self.num_tokens):
            raise ValueError(f"num_tokens: every count must be at least 1, given {list(self.num_tokens)}")


def main(config: Config) -> None:
    """Writes `grid.png` (a row a token count, the originals above) and `psnr.json`."""
    tokenizer = load(config.model, expect=FlexTok).to(best_device())
    source = open_images(config.data, tokenizer.image_size, split="held_out", held_out_fraction=config.held_out)
    num = min(config.num, len(source))
    counts = config.num_tokens or tuple(powers_of_two(tokenizer.num_tokens))
    if max(counts) > tokenizer.num_tokens:
        raise ValueError(f"num_tokens: {config.model} has 1 to {tokenizer.num_tokens} tokens, given {list(counts)}")
    originals, rows = [], {count: [] for count in counts}  # type: ignore[var-annotated]
    batches = reconstructions(
        tokenizer,
        source,
        num,
        counts,
        seed=config.seed,
        batch_size=config.batch_size,
        steps=config.decode_steps,
        guidance=config.decode_guidance,
    )
    with tqdm(total=num, unit="image", desc="reconstruct") as progress:
        for images, decoded in batches:
            originals.append(images)
            for count in counts:
                rows[count].append(decoded[count])
            progress.update(len(images))
    write_results(config.out, torch.cat(originals), {count: torch.cat(parts) for count, parts in rows.items()})


def reconstructions(
    tokenizer: FlexTok,
    source: ImageSource,
    num: int,
    counts: Sequence[int],
    *,
    seed: int,
    batch_size: int,
    steps: int | None = None,
    guidance: float | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[tuple[Tensor, dict[int, Tensor]]]:
    """Batches of uint8 originals (B, 3, H, W) and, by token count, their uint8 reconstructions.

    Takes the first `num` images of the source, or the given `indices` of them.
    """
    for batch in eval_loader(source, batch_size, indices=range(num) if indices is None else indices):
        decoded = reconstruct(tokenizer, batch.images, batch.indices, counts, seed=seed, steps=steps, guidance=guidance)
        yield pictures.to_uint8(batch.images), decoded


@torch.no_grad()
def reconstruct(
    tokenizer: FlexTok,
    images: Tensor,
    indices: Sequence[int],
    counts: Sequence[int],
    *,
    seed: int,
    steps: int | None,
    guidance: float | None,
) -> dict[int, Tensor]:
    """By token count, what the tokenizer makes of images (B, 3, H, W), as uint8; noise is that of `indices`."""
    device = next(tokenizer.parameters()).device
    blocks: dict[int, list[Tensor]] = {count: [] for count in counts}
    for rows in blocks_of(len(images), device):
        padded = pad_to_rows(rows)
        tokens = tokenizer.encode(images[padded].to(device))
        noise_of = [indices[row] for row in padded]
        for count in counts:
            decoded = tokenizer.decode(
                tokens.truncate(count), seed=seed, indices=noise_of, steps=steps, guidance=guidance
            )
            blocks[count].append(pictures.to_uint8(decoded[: len(rows)]).cpu())
    return {count: torch.cat(parts) for count, parts in blocks.items()}


def write_results(out: Path, originals: Tensor, rows: dict[int, Tensor]) -> None:
    """The picture (16 images at most) and the mean PSNR at each count."""
    shown = min(16, len(originals))
    grid = pictures.grid_with_titles(
        torch.cat([originals[:shown], *(images[:shown] for images in rows.values())]),
        columns=shown,
        row_titles=["original", *(f"{count} token{'s' if count > 1 else ''}" for count in rows)],
    )
    pictures.save_png(grid, out / "grid.png")
    scores = {count: float(psnr(images, originals).mean()) for count, images in rows.items()}
    with replacing(out / "psnr.json") as temporary:
        temporary.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    for count, score in scores.items():
        logger.info("%4d tokens: %.2f dB", count, score)


if __name__ == "__main__":
    run_job(sys.modules[__name__])
