"""`imgtok reconstruct`: held-out originals against their reconstructions at a list of token counts."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from imgtok import pictures
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveInt, Range, Settings, check
from imgtok.data.images import DataConfig, open_images
from imgtok.data.loaders import eval_loader
from imgtok.files import replacing
from imgtok.hub import load
from imgtok.metrics.reconstruction import psnr
from imgtok.runtime import Blocks, process_state
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.base import Tokenizer, powers_of_two

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
    decoding: Settings = Settings()
    """Settings of the decoder; what is left out is as the model's configuration says (`imgtok info MODEL`)."""
    exact: bool = False
    """On a CPU, results that are equal to the last bit whatever the batch size: images are computed in blocks of one
    size, the last one padded, with a fixed number of threads. Several times slower."""
    threads: PositiveInt | None = None
    """CPU threads; null takes torch's own number (OMP_NUM_THREADS, or all cores), or 1 with exact=true, where another
    number can show in an image's last bits."""

    def __post_init__(self) -> None:
        check(self)
        if any(count < 1 for count in self.num_tokens):
            raise ValueError(f"num_tokens: every count must be at least 1, given {list(self.num_tokens)}")


def main(config: Config) -> None:
    """Writes `grid.png` (a row a token count, the originals above) and `psnr.json`."""
    state = process_state()
    if not state.is_main_process:
        return  # a picture is too little work to share
    tokenizer = load(config.model, expect=Tokenizer).to(state.device)
    source = open_images(config.data, tokenizer.image_size, split="held_out", held_out_fraction=config.held_out)
    counts = token_counts(config.num_tokens, tokenizer.num_tokens)
    decoding = config.decoding.over(tokenizer.config.decoding, "decoding")
    blocks = Blocks(state.device, config.exact, config.threads)
    chosen = spread_indices(len(source), config.num)
    originals: list[Tensor] = []
    rows: dict[int, list[Tensor]] = {count: [] for count in counts}
    with tqdm(total=len(chosen), unit="image", desc="reconstruct") as progress:
        for batch in eval_loader(source, config.batch_size, indices=chosen):
            originals.append(pictures.to_uint8(batch.images))
            decoded = reconstruct(
                tokenizer,
                batch.images,
                batch.indices,
                counts,
                seed=config.seed,
                decoding=decoding,
                blocks=blocks,
            )
            for count, images in decoded.items():
                rows[count].append(images)
            progress.update(len(batch.images))
    write_results(config.out, torch.cat(originals), {count: torch.cat(parts) for count, parts in rows.items()})


def token_counts(asked: Sequence[int], available: int) -> tuple[int, ...]:
    """The counts asked for, or the powers of two up to all. Raises ValueError for one that the tokenizer cannot do."""
    if any(not 1 <= count <= available for count in asked):
        raise ValueError(f"num_tokens: the tokenizer has 1 to {available} tokens, given {list(asked)}")
    return tuple(asked) or tuple(powers_of_two(available))


def spread_indices(length: int, num: int) -> range:
    """At most `num` indices in equal steps over the whole source: the first ones may all be of one class."""
    step = max(1, length // num)
    return range(0, length, step)[:num]


@torch.no_grad()
def reconstruct(
    tokenizer: Tokenizer,
    images: Tensor,
    indices: Sequence[int],
    counts: Sequence[int],
    *,
    seed: int,
    decoding: Any,
    blocks: Blocks,
) -> dict[int, Tensor]:
    """By token count, what the tokenizer makes of images (B, 3, H, W), as uint8; noise is that of `indices`."""
    found: dict[int, list[Tensor]] = {count: [] for count in counts}
    with blocks.computing():
        for rows in blocks.of(len(images)):
            padded = blocks.padded(rows)
            tokens = tokenizer.encode(images[padded].to(blocks.device))
            noise_of = [indices[row] for row in padded]
            for count in counts:
                decoded = tokenizer.decode(tokens.truncate(count), seed=seed, indices=noise_of, decoding=decoding)
                found[count].append(pictures.to_uint8(decoded[: len(rows)]).cpu())
    return {count: torch.cat(parts) for count, parts in found.items()}


def write_results(out: Path, originals: Tensor, rows: dict[int, Tensor]) -> None:
    """The picture (16 images at most) and the mean PSNR at each count."""
    shown = min(16, len(originals))
    grid = pictures.grid_with_titles(
        torch.cat([originals[:shown], *(images[:shown] for images in rows.values())]),
        columns=shown,
        enlarge=max(1, 64 // originals.shape[-1]),
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
