"""`imgtok reconstruct`: held-out originals against what a tokenizer makes of them at a list of rates.

An autoencoder has no tokens and no rates: it has one row, what is left after encoding and decoding.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from imgtok import announce, pictures
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveInt, Range, check, to_dict
from imgtok.data.images import DataConfig, all_over
from imgtok.data.loaders import eval_loader
from imgtok.data.trained_on import Named, Training
from imgtok.files import name_after, replacing
from imgtok.hub import Found, load, resolve
from imgtok.metrics.reconstruction import PixelScores
from imgtok.metrics.scorers import CodeScorer, ReconstructionScorer, ScoredBatch, Scorer
from imgtok.runtime import Blocks, process_state
from imgtok.sections import Settings
from imgtok.sizes import ImageSize, Size, in_pixels, sides
from imgtok.tokenizers.base import Autoencoder, Rate, Tokenizer
from imgtok.tokenizers.tokens import Tokens

logger = logging.getLogger(__name__)

POSITIONAL = "model"
SHOWN = 16
"""Images in the picture."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Encodes held-out images, decodes them at several rates, and writes a picture and what each rate costs and gives.

    Takes a tokenizer, or an autoencoder, which has no rates.
    """

    job: Literal["reconstruct"] = "reconstruct"
    """Which program this file is for."""
    model: str
    """Folder or any other name of a tokenizer or an autoencoder, such as shapes32."""
    out: Path | None = None
    """Folder of `grid.png` and `rates.json`, which says what the model and the data were; null takes
    outputs/reconstructions/NAME, with the model's name and the step of training at which it was. Those of another
    request, or of another model, are not replaced."""
    data: DataConfig | None = None
    """Images; null takes those that the model was trained on."""
    image_size: ImageSize | None = None
    """Pixels a side of the images, or [height, width]; null takes the tokenizer's, or those that the autoencoder was
    trained at."""
    held_out: Annotated[float, Range(0.0, 1.0)] | None = None
    """Share of `data` that training kept apart: the part that is used. 1 takes all of it. Null takes what the model's
    training kept apart of its own images, and all of others. A part of its own that `data` has (`val/`, `val_path`) is
    taken whole."""
    num: PositiveInt = 16
    """Images to reconstruct, from all over `data`, of each class its share."""
    rates: tuple[int | str, ...] = ()
    """Numbers of tokens such as 16 or, for a tokenizer that chooses the number by the error, 256@0.05; empty takes the
    tokenizer's own list, such as the powers of two up to all tokens."""
    seed: NonNegativeInt = 0
    """Seed of the decoder's noise."""
    batch_size: PositiveInt = 64
    """Images reconstructed at once."""
    decoding: Settings = Settings()
    """Settings of the decoder; those that are not given are as in the model (`imgtok info MODEL`)."""
    exact: bool = False
    """On a CPU, results that are equal to the last bit whatever the batch size: images are computed in blocks of one
    size, the last one padded, with a fixed number of threads. Several times slower."""
    threads: PositiveInt | None = None
    """CPU threads; null takes torch's own number (OMP_NUM_THREADS, or all cores), or 1 with exact=true, where another
    number can show in an image's last bits."""

    def __post_init__(self) -> None:
        check(self)
        for rate in self.rates:
            Rate.parse(rate)

    def result(self, step: int | None = None) -> Path:
        """Where the picture and the scores go, of a model after `step` steps of training if that is known."""
        return self.out or Path("outputs/reconstructions") / name_after(self.model, step)


def main(config: Config) -> None:
    """Writes `grid.png` (a row a rate, the originals above) and `rates.json`."""
    state = process_state()
    if not state.is_main_process:
        return  # a picture is too little work to share
    named = resolve(config.model)
    model = open_model(named).to(state.device)
    size = size_for(model, config.image_size, named)
    rates = rates_of(model, config.rates)
    decoding = config.decoding.over(model.config.decoding, "decoding")
    chosen = Named.of(config.data, named).to_show(size, config.held_out)
    source = chosen.source
    blocks = Blocks(state.device, config.exact, config.threads)
    places = all_over(source, min(config.num, len(source)))
    number = {place: number for number, place in enumerate(places)}
    fewer = len(places) if len(places) < len(source) else None
    data = {**to_dict(chosen.data), "held_out": chosen.held_out, "image_size": source.size, "num": len(places)}
    made_of = {"model": named.about(), "data": data, "seed": config.seed, "decoding": to_dict(decoding)}
    out = config.result(named.step)
    protect(out, made_of, [name_of(rate) for rate in rates])
    announce.begins("reconstruct", data=chosen.words, num=fewer, model=named.in_words, on=state.device, out=out)
    scorers = {rate: open_scorers(model, rate, len(places)) for rate in rates}
    rows: list[dict[Rate | None, Tensor]] = []
    originals: list[Tensor] = []
    with tqdm(total=len(places), unit="image", desc="reconstruct") as progress:
        for batch in eval_loader(source, config.batch_size, indices=places):
            pixels = pictures.to_uint8(batch.images)
            found = reconstruct(
                model, batch.images, batch.indices, rates, seed=config.seed, decoding=decoding, blocks=blocks
            )
            indices = [number[place] for place in batch.indices]
            for rate, (images, tokens) in found.items():
                for scorer in scorers[rate]:
                    scorer.update(ScoredBatch(indices, images, originals=pixels, tokens=tokens))
            if sum(map(len, originals)) < SHOWN:
                originals.append(pixels)
                rows.append({rate: images for rate, (images, _) in found.items()})
            progress.update(len(batch.images))
    shown = {rate: torch.cat([part[rate] for part in rows])[:SHOWN] for rate in rates}
    scores = {rate: read_scores(family) for rate, family in scorers.items()}
    write_results(out, torch.cat(originals)[:SHOWN], shown, scores, made_of)


# ---------------------------------------------------------------- models and rates


def open_model(found: Found) -> Tokenizer | Autoencoder:
    """What a name led to, in evaluation mode. Raises ValueError for a model of another kind."""
    if not issubclass(found.model_class, Tokenizer | Autoencoder):
        found.check(Tokenizer)  # which says what it is
    model: Tokenizer | Autoencoder = load(found)
    return model


def size_for(model: Tokenizer | Autoencoder, asked: Size | None, found: Found) -> Size:
    """The size of the images that a model is given: for None the tokenizer's, or that which the autoencoder was trained
    at, by its record. Raises ValueError for a size that it does not take.
    """
    if isinstance(model, Tokenizer):
        if asked is not None and sides(asked) != sides(model.image_size):
            own = in_pixels(model.image_size)
            raise ValueError(f"image_size: this tokenizer takes images of {own} pixels, given {in_pixels(asked)}")
        return model.image_size
    factor: int = model.config.factor
    if asked is None and (training := Training.of(found)) is not None:
        asked = training.image_size
    if asked is None or any(side % factor for side in sides(asked)):
        given = f"none is given, nor in a record of {found.name}" if asked is None else f"given {in_pixels(asked)}"
        raise ValueError(f"image_size: an autoencoder takes images of any multiple of its {factor} pixels, {given}")
    return asked


def rates_of(model: Tokenizer | Autoencoder, asked: Sequence[int | str]) -> tuple[Rate | None, ...]:
    """The rates asked for, or all that the tokenizer lists; None alone for an autoencoder.

    Raises ValueError for a rate that the model does not have.
    """
    if isinstance(model, Autoencoder):
        if asked:
            raise ValueError(f"rates: an autoencoder has no tokens and no rates, given {', '.join(map(str, asked))}")
        return (None,)
    rates = [Rate.parse(text) for text in asked] or model.rates()
    for rate in rates:
        model.check_rate(rate)
    return tuple(dict.fromkeys(rates))


# ---------------------------------------------------------------- the work


class Reconstruction(NamedTuple):
    """What a model makes of a batch at one rate."""

    images: Tensor
    """(B, 3, H, W) uint8, on the CPU."""
    tokens: Tokens | None
    """What they were decoded from; None for an autoencoder."""


@torch.no_grad()
def reconstruct(
    model: Tokenizer | Autoencoder,
    images: Tensor,
    indices: Sequence[int],
    rates: Sequence[Rate | None],
    *,
    seed: int,
    decoding: Any,
    blocks: Blocks,
) -> dict[Rate | None, Reconstruction]:
    """By rate, what the model makes of images (B, 3, H, W); noise is that of `indices`."""
    parts: dict[Rate | None, list[Reconstruction]] = {rate: [] for rate in rates}
    with blocks.computing():
        for rows in blocks.of(len(images)):
            padded = blocks.padded(rows)
            given, noise_of = images[padded].to(blocks.device), [indices[row] for row in padded]
            for rate, code in zip(rates, encode_at(model, given, rates), strict=True):
                decoder: Any = model  # which takes what its own encoder gave
                decoded = decoder.decode(code, seed=seed, indices=noise_of, decoding=decoding)
                tokens = code[: len(rows)].to("cpu") if isinstance(code, Tokens) else None
                parts[rate].append(Reconstruction(pictures.to_uint8(decoded[: len(rows)]).cpu(), tokens))
    return {rate: join(part) for rate, part in parts.items()}


def encode_at(
    model: Tokenizer | Autoencoder, images: Tensor, rates: Sequence[Rate | None]
) -> Sequence[Tokens | Tensor]:
    """Tokens at each rate, or the latents of an autoencoder once."""
    if isinstance(model, Autoencoder):
        return [model.encode(images)]
    return model.encode_at(images, [rate for rate in rates if rate is not None])


def join(parts: Sequence[Reconstruction]) -> Reconstruction:
    """The batches of one rate, one after the other."""
    tokens = [part.tokens for part in parts if part.tokens is not None]
    return Reconstruction(torch.cat([part.images for part in parts]), Tokens.cat(tokens) if tokens else None)


# ---------------------------------------------------------------- what is written


PICTURE, RECORD = "grid.png", "rates.json"


def files_of(out: Path) -> list[Path]:
    """The files that are written in the folder `out`."""
    return [out / PICTURE, out / RECORD]


def name_of(rate: Rate | None) -> str:
    """The name of a row in rates.json."""
    return "latents" if rate is None else str(rate)


def protect(out: Path, made_of: Mapping[str, Any], rows: Sequence[str]) -> None:
    """Raises ValueError where `out` holds the result of another request or model, or pictures of unknown origin."""
    there = [path for path in files_of(out) if path.exists()]
    if not there:
        return
    asked = {**json.loads(json.dumps(made_of)), "rates": list(rows), "model": made_of["model"]["fingerprint"]}
    try:
        before: Any = json.loads((out / RECORD).read_text(encoding="utf-8"))
        before |= {"rates": list(before["rates"]), "model": before["model"]["fingerprint"]}  # not where it lies
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    if changed := [name for name, value in asked.items() if before.get(name) != value]:
        raise ValueError(
            f"out: {out} holds reconstructions of another request (different: {', '.join(changed)}); choose another "
            f"folder with out=FOLDER, or delete {' and '.join(map(str, there))}"
        )


def open_scorers(model: Tokenizer | Autoencoder, rate: Rate | None, num: int) -> list[Scorer]:
    """What each rate is judged by here: its cost, where there are tokens, and PSNR."""
    codes: list[Scorer] = [CodeScorer(model, num)] if isinstance(model, Tokenizer) and rate is not None else []
    return [*codes, ReconstructionScorer(PixelScores(("psnr",), torch.device("cpu")), num)]


def read_scores(scorers: Sequence[Scorer]) -> dict[str, float]:
    """By key."""
    for scorer in scorers:
        scorer.reduce(None)
    return {score.key: score.value for scorer in scorers for score in scorer.scores()}


def row_title(rate: Rate | None, scores: Mapping[str, float]) -> str:
    """A rate in words; with the mean number of tokens where that is not what the rate says."""
    if rate is None:
        return "reconstruction"
    if scores["tokens"] != rate.num_tokens:
        return f"{rate}: {scores['tokens']:.1f} tokens"
    return f"{rate} token{'s' if rate.num_tokens > 1 else ''}"


def write_results(
    out: Path,
    originals: Tensor,
    rows: Mapping[Rate | None, Tensor],
    scores: Mapping[Rate | None, Mapping[str, float]],
    made_of: Mapping[str, Any],
) -> None:
    """The picture, and what it was made of with the scores by rate ("latents" for those of an autoencoder)."""
    grid = pictures.grid_with_titles(
        torch.cat([originals, *rows.values()]),
        columns=len(originals),
        enlarge=max(1, -(-64 // originals.shape[-1])),  # less than elsewhere: the rows are long
        row_titles=["original", *(row_title(rate, scores[rate]) for rate in rows)],
    )
    pictures.save_png(grid, out / PICTURE)
    record = {name_of(rate): dict(found) for rate, found in scores.items()}
    with replacing(out / RECORD) as temporary:
        temporary.write_text(json.dumps({**made_of, "rates": record}, indent=2) + "\n", encoding="utf-8")
    for name, found in record.items():
        cost = f"{found['tokens']:.1f} tokens, {found['bits']:.0f} bits, " if "tokens" in found else ""
        logger.info("%8s: %s%.2f dB", name, cost, found["psnr"])
    announce.ends(*files_of(out))


if __name__ == "__main__":
    run_job(sys.modules[__name__])
