"""`imgtok evaluate shapes`: do the objects that a caption names appear, and with their own attributes?

Captions of the built-in world are given to a generator that reads text, or a folder has images with such captions, or a
tokenizer reconstructs the scenes; the oracle reads the images back and what it reads is compared with what the caption
asserts (docs/shapes-benchmark.md). Process p of P draws the images p, p + P, ...; each finished image is a file, so an
interrupted job goes on where it stopped. One process then reads them and writes the result: `report.json` (rates with
intervals), `readings.jsonl` (a line an image) and `index.html` (a page with pictures).
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from imgtok import announce, pictures
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveInt, check, to_dict
from imgtok.data.trained_on import Training
from imgtok.files import file_sha256, name_after, replacing
from imgtok.generators.conditioning import ConditionalGenerator
from imgtok.generators.pipeline import Pipeline, Precision, batches_of, pipeline
from imgtok.hub import Found, controls_of, resolve
from imgtok.runtime import Blocks, cpu_threads, process_state
from imgtok.sample.benchmark import page
from imgtok.sample.benchmark.items import METADATA, Item, folders_in, items_in, items_of, profile_of
from imgtok.sample.benchmark.results import (
    READINGS,
    REPORT,
    Answer,
    Row,
    Seconds,
    answers_of,
    key_of,
    read_scores,
    read_seconds,
    record_of,
    row_of,
    table,
    write_readings,
)
from imgtok.sample.images import image_path, note_controls, read_image
from imgtok.sample.reconstruct import open_model, rates_of, reconstruct, size_for
from imgtok.sections import Settings
from imgtok.shapes.oracle import Score
from imgtok.shapes.render import render
from imgtok.shapes.world import ShapesConfig
from imgtok.sizes import SquareSize, square
from imgtok.text.parsing import Parse, Parser
from imgtok.tokenizers.base import Rate

__all__ = ["Config", "main"]

logger = logging.getLogger(__name__)

POSITIONAL = "model"
Split = Literal["val", "novel", "same_shape", "swap", "crowd", "relation", "holding"]
EVERY_SPLIT: tuple[Split, ...] = get_args(Split)
SPLITS: tuple[Split, ...] = EVERY_SPLIT[:-1]
"""Those that are measured unless others are named: no generator draws what objects hold unless it was trained to."""
PARSES = "parses.jsonl"
SAID = 3
"""Captions of a split of which it is said what the controls understand."""
SAMPLES, TRUE, OTHERS = "samples", *page.REFERENCES


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures on the built-in shapes whether the objects of a caption appear (presence) with their own attributes
    (binding) and not with those of others (leakage): give one of `model`, `images` or `tokenizer`.
    """

    job: Literal["evaluate-shapes"] = "evaluate-shapes"
    """Which program this file is for."""
    model: str | None = None
    """Model folder or Hub name of a generator that reads text; images are drawn for the captions."""
    images: Path | None = None
    """Folder of images with captions about shapes: `metadata.jsonl` (file_name, text), the record of `imgtok sample`,
    or NAME.txt beside each image; or a folder with such folders called as the splits."""
    tokenizer: str | None = None
    """Model folder or Hub name of the tokenizer that decodes what `model` draws, for null that inside its folder; or
    alone, of a tokenizer or an autoencoder that reconstructs the scenes, of which everything is asked."""
    splits: tuple[Split, ...] = SPLITS
    """val (no pair of colour and shape that training never showed), novel (at least one such pair), same_shape (two
    objects of one shape), swap (pairs of captions with exchanged colours), crowd (four objects), relation (relations
    that training never stated); and where it is named, holding (two objects that hold a smaller one each)."""
    num: PositiveInt = 500
    """Captions of each split; of a folder of images, the most that are taken."""
    data: ShapesConfig | None = None
    """Textures, sizes, scale and most objects of the scenes; null takes those that the tokenizer was trained on, or the
    whole world at its own scale. Splits that need more objects have more."""
    image_size: SquareSize | None = None
    """Pixels a side of what an autoencoder reconstructs; null takes those that it was trained at."""
    rates: tuple[int | str, ...] = ()
    """Numbers of tokens at which a tokenizer reconstructs; empty takes those that it lists."""
    text_encoder: str | None = None
    """Folder or Hub name of the text encoder, or minilm; null takes the one that the generator names."""
    controls: tuple[str, ...] = ()
    """What is done to captions while `model` draws: one or more of the controls that docs/controls.md lists."""
    control_settings: Settings = Settings()
    """Their settings, by control: control_settings.NAME.strength=0.5, say."""
    parser: Parser = "grammar"
    """Who tells controls what captions name: the grammar that is built in, or textblob or spacy where these are
    installed."""
    baseline: Path | None = None
    """Folder of another result for the same captions: differences from it are paired, caption by caption."""
    references: bool = True
    """Whether to add what the true images and those of other scenes get: the ceiling and the floor."""
    out: Path | None = None
    """Folder of `report.json`, `readings.jsonl`, `index.html` and the images; null takes outputs/benchmark/NAME, with
    the model's name and the step of training at which it was. That of another request is not replaced."""
    seed: NonNegativeInt = 0
    """Image i of a split has the noise and draws of (seed, i), whatever else is asked for; the two of a swap pair have
    the same."""
    batch_size: PositiveInt = 64
    """Images at once in one process."""
    sampling: Settings = Settings()
    """How `model` draws: its own settings; those that are not given are as in the model (`imgtok info MODEL`)."""
    decoding: Settings = Settings()
    """Settings of the decoder, likewise."""
    shown: NonNegativeInt = 24
    """Pictures of each split on the page."""
    precision: Precision = "fp32"
    """Arithmetic of generator and decoder."""
    exact: bool = False
    """On a CPU, images that are equal to the last bit whatever the batch size or the number of processes."""
    threads: PositiveInt | None = None
    """CPU threads for drawing; null takes torch's own number. The oracle uses one."""

    def __post_init__(self) -> None:
        check(self)
        if (self.images is None) == (self.model is None and self.tokenizer is None):
            raise ValueError("give one of model=NAME, images=FOLDER or tokenizer=NAME")
        if len(set(self.splits)) < len(self.splits) or not self.splits:
            raise ValueError(
                f"splits: given {','.join(self.splits) or 'none'}; name each once, of {','.join(EVERY_SPLIT)}"
            )
        if self.rates and (self.model is not None or self.tokenizer is None):
            raise ValueError("rates: these belong to tokenizer=NAME alone, which reconstructs at them")
        if self.controls and self.model is None:
            raise ValueError("controls: these act while a generator draws; they belong to model=NAME")
        if self.parser != "grammar" and not self.controls:
            raise ValueError("parser: this is for controls, and there are none; say controls=..., or leave parser out")
        if self.data is not None and self.data.mode != "text":
            raise ValueError("data.mode: captions are of scenes, data.mode=text; class is for `imgtok evaluate`")
        if self.images is None and "swap" in self.splits and self.num % 2:
            raise ValueError(f"num: {self.num} is odd, and the captions of split swap come in pairs")

    def result(self, step: int | None = None) -> Path:
        """Where the result goes, of a model after `step` steps of training if that is known."""
        name = name_after(str(self.images or self.model or self.tokenizer), step)
        return self.out or Path("outputs/benchmark") / name


class Series(NamedTuple):
    """Images of one split of one kind, with their captions."""

    split: str
    what: str
    items: Sequence[Item]
    folder: Path | None
    """Where image i is, numbered; None of files, which say it themselves."""

    def images(self) -> Tensor:
        """(N, 3, H, W) uint8."""
        paths = [item.path or image_path(self.folder or Path(), item.index) for item in self.items]
        return torch.stack([read_image(path) for path in paths])


def main(config: Config) -> None:
    """Draws what is missing, reads everything, writes the result and prints a table."""
    state = process_state()
    work: Drawing | Reconstructing | Reading
    if config.images is not None:
        work = Reading(config)
    elif config.model is not None:
        work = Drawing(config, state.device)
    else:
        work = Reconstructing(config, state.device)
    out = config.result(work.step)
    all_series = work.series(out)
    baseline = None if config.baseline is None else read_scores(config.baseline)
    for series in all_series:
        _paired(baseline, series)  # one that does not fit is said before anything is drawn
    request = request_of(config, work)
    if state.is_main_process:
        claim(out, request)
        announce.begins("evaluate shapes", **work.in_words, captions=_captions_in_words(config, all_series), out=out)
    state.wait_for_everyone()
    seconds: Seconds = {}
    for series in all_series:
        start = time.perf_counter()
        if drawn := work.draw(series, state.process_index, state.num_processes):
            seconds[series.split, series.what] = (time.perf_counter() - start) / drawn
    state.wait_for_everyone()
    if state.is_main_process:
        with cpu_threads(1):  # the oracle's tensors are small
            finish(config, work, out, baseline, seconds)


def _captions_in_words(config: Config, series: Sequence[Series]) -> str:
    by_split = {one.split: len(one.items) for one in series}
    return ", ".join(f"{count} of {split}" for split, count in by_split.items()) + f", seed {config.seed}"


# ---------------------------------------------------------------- where images come from


class Drawing:
    """Images that a generator draws for captions."""

    def __init__(self, config: Config, device: torch.device) -> None:
        assert config.model is not None
        self.config = config
        found = resolve(config.model, expect=ConditionalGenerator)
        inside = found.part() if config.tokenizer is None else resolve(config.tokenizer)
        self.step, self.models = found.step, {"model": found, "tokenizer": inside}
        self.data = data_of(config.data, inside)
        self.pipe: Pipeline = pipeline(
            found,
            tokenizer=inside,
            device=device,
            dtype=config.precision,
            text_encoder=config.text_encoder,
            exact=config.exact,
            threads=config.threads,
            controls=controls_of(config.controls, config.control_settings),
        )
        if not self.pipe.reads_text:
            raise ValueError(
                f"model: {config.model} draws classes, and captions are asked for; see `imgtok evaluate model=...`"
            )
        self.pipe.encoder()  # a missing one is said before anything is drawn
        self.size = square(self.pipe.image_size, "model: the scenes of the benchmark are squares")
        self.sampling = config.sampling.over(self.pipe.sampling, "sampling")
        self.decoding = config.decoding.over(self.pipe.decoding, "decoding")
        self.in_words = {"model": found.in_words, "decoder": inside.in_words}
        if config.controls:
            self.in_words["controls"] = ",".join(config.controls)
        self.settings = {"sampling": to_dict(self.sampling), "decoding": to_dict(self.decoding)}

    def series(self, out: Path) -> list[Series]:
        config = self.config
        return [
            Series(split, SAMPLES, items_of(self.data, split, config.num), out / "images" / split)
            for split in config.splits
        ]

    def draw(self, series: Series, rank: int, world: int) -> int:
        """Draws and writes what this process has to of a series; the number of images."""
        assert series.folder is not None
        missing = _missing(series, rank, world)
        if self.pipe.controls and rank == 0:
            self._keep_parses(series)
        with tqdm(total=len(missing), unit="image", desc=f"draw {series.split}", disable=rank > 0) as progress:
            for chunk in batches_of(missing, self.config.batch_size):
                items = [series.items[index] for index in chunk]
                notes: list[dict[str, Any]] = []
                made = self.pipe.images_at(
                    (None,),
                    [item.text for item in items],
                    [item.noise for item in items],
                    seed=self.config.seed,
                    sampling=self.sampling,
                    decoding=self.decoding,
                    parses=self._parses(items),
                    notes=notes,
                )[None]
                for item, image in zip(items, made.images, strict=True):
                    pictures.save_png(image, image_path(series.folder, item.index))
                note_controls(series.folder, notes)
                progress.update(len(chunk))
        return len(missing)

    def _parses(self, items: Sequence[Item]) -> list[Parse] | None:
        """What controls understand of captions; None without controls."""
        if not self.pipe.controls:
            return None
        return self.pipe.read_prompts([item.text for item in items], parser=self.config.parser)

    def _keep_parses(self, series: Series) -> None:
        """Says what the controls understand of the first captions, and writes beside the images what of each."""
        assert series.folder is not None
        parses = self._parses(series.items) or []
        for one in parses[:SAID]:
            logger.info("%s: %r names %s", series.split, one.prompt, "; ".join(one.lines()))
        with replacing(series.folder / PARSES) as temporary:
            temporary.write_text("".join(json.dumps(one.as_json()) + "\n" for one in parses), encoding="utf-8")


class Reconstructing:
    """Scenes as a tokenizer or an autoencoder reconstructs them, of which everything is asked."""

    def __init__(self, config: Config, device: torch.device) -> None:
        assert config.tokenizer is not None
        self.config = config
        found = resolve(config.tokenizer)
        self.step, self.models = found.step, {"tokenizer": found}
        self.data = data_of(config.data, found)
        self.model = open_model(found).to(device)
        size = size_for(self.model, config.image_size, found)
        self.size = square(size, "tokenizer: the scenes of the benchmark are squares")
        self.rates = rates_of(self.model, config.rates)
        self.decoding = config.decoding.over(self.model.config.decoding, "decoding")
        self.blocks = Blocks(device, config.exact, config.threads)
        self.in_words = {"tokenizer": found.in_words}
        self.settings = {"decoding": to_dict(self.decoding), "rates": [str(rate) for rate in self.rates]}

    def series(self, out: Path) -> list[Series]:
        found = []
        for split in self.config.splits:
            items = items_of(self.data, split, self.config.num, everything=True)
            for rate in self.rates:
                what, folder = _rate_in_words(rate), out / "images" / f"{split}{'' if rate is None else f'-{rate}'}"
                found.append(Series(split, what, items, folder))
        return found

    def draw(self, series: Series, rank: int, world: int) -> int:
        assert series.folder is not None
        missing = _missing(series, rank, world)
        (rate,) = [rate for rate in self.rates if _rate_in_words(rate) == series.what]
        for chunk in batches_of(missing, self.config.batch_size):
            items = [series.items[index] for index in chunk]
            images = true_images(items, self.size).mul_(2.0).sub_(1.0)
            noise = [item.noise for item in items]
            made = reconstruct(
                self.model, images, noise, [rate], seed=self.config.seed, decoding=self.decoding, blocks=self.blocks
            )
            for item, image in zip(items, made[rate].images, strict=True):
                pictures.save_png(image, image_path(series.folder, item.index))
        return len(missing)


class Reading:
    """Images of files with captions."""

    step: int | None = None
    models: Mapping[str, Found] = {}

    def __init__(self, config: Config) -> None:
        assert config.images is not None
        self.config = config
        self.data = config.data or ShapesConfig(mode="text")
        self.folders = folders_in(config.images, EVERY_SPLIT if config.splits == SPLITS else config.splits)
        self.items = {split: items_in(folder, config.num) for split, folder in self.folders.items()}
        if len(self.items.get("swap", ())) % 2:
            raise ValueError(
                f"images: an odd number of captions, {len(self.items['swap'])}, is taken of {self.folders['swap']}, "
                "and those of split swap come in pairs; give an even num=... and both images of each pair"
            )
        paths = [item.path for items in self.items.values() for item in items if item.path is not None]
        sizes = {pictures.decode_image(path.read_bytes(), str(path)).size for path in paths}
        if len(sizes) > 1 or any(width != height for width, height in sizes):
            found = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
            raise ValueError(
                f"images: {config.images} holds images of {found} pixels; they must be squares, all of one size"
            )
        ((self.size, _),) = sizes
        self.in_words = {"images": str(config.images)}
        digests = {
            split: [file_sha256(item.path)[:16] for item in items if item.path is not None]
            for split, items in self.items.items()
        }
        self.settings = {"files": digests}

    def series(self, out: Path) -> list[Series]:
        return [Series(split, SAMPLES, items, None) for split, items in self.items.items()]

    def draw(self, series: Series, rank: int, world: int) -> int:
        return 0


def data_of(given: ShapesConfig | None, found: Found) -> ShapesConfig:
    """The world of the scenes: as given, or as a tokenizer's training had it, or the whole."""
    if given is not None:
        return given
    training = Training.of(found)
    if training is not None and isinstance(training.data, ShapesConfig):
        return replace(training.data, mode="text", split="train")
    return ShapesConfig(mode="text")


def _rate_in_words(rate: Rate | None) -> str:
    return "reconstructions" if rate is None else f"at {rate} tokens"


def _missing(series: Series, rank: int, world: int) -> list[int]:
    """Places of the images that this process has to draw. Writes the captions beside the images."""
    assert series.folder is not None
    series.folder.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        lines = [
            json.dumps({"file_name": f"{item.index:06d}.png", "text": item.text, "split": series.split})
            for item in series.items
        ]
        with replacing(series.folder / METADATA) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    mine = range(rank, len(series.items), world)
    return [place for place in mine if not image_path(series.folder, series.items[place].index).is_file()]


def true_images(items: Sequence[Item], size: int) -> Tensor:
    """The scenes that captions are of, (N, 3, S, S) in [0, 1]."""
    return render([item.scene for item in items if item.scene is not None], size)


# ---------------------------------------------------------------- the result

REQUEST, PAGE = "request.json", "index.html"
FREE = ("out", "batch_size", "threads", "shown", "baseline", "references")
"""Fields on which images and scores do not depend."""


def request_of(config: Config, work: Drawing | Reconstructing | Reading) -> dict[str, Any]:
    """All that images and scores depend on; models by their fingerprints."""
    left_out = FREE if config.controls else (*FREE, "parser")
    told = {name: value for name, value in to_dict(config).items() if name not in left_out}
    models = {name: found.fingerprint() for name, found in work.models.items()}
    return json.loads(json.dumps(told | {"data": work.data.identity, "models": models} | work.settings))


def claim(out: Path, request: Mapping[str, Any]) -> None:
    """Writes the request into the folder. Raises ValueError where another one is there, or files without one."""
    path = out / REQUEST
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in {**before, **request} if before.get(name) != request.get(name)]:
            raise ValueError(
                f"out: {out} holds a result of another request (different: {', '.join(changed)}); choose another "
                "folder with out=FOLDER, or delete it"
            )
        return
    if any((out / name).exists() for name in (REPORT, READINGS, PAGE, "images")):
        raise ValueError(f"out: {out} holds files, and no {REQUEST} says whose; choose another folder with out=FOLDER")
    out.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")


def finish(
    config: Config,
    work: Drawing | Reconstructing | Reading,
    out: Path,
    baseline: Mapping[tuple[str, str], Mapping[str, Score]] | None,
    seconds: Seconds,
) -> None:
    """Reads all images, writes the files and prints the table. `seconds` are of an image that was drawn now, by split
    and kind; where none was, those of an earlier run stay.
    """
    seconds = {**read_seconds(out), **seconds}
    theirs = {} if config.baseline is None else read_seconds(config.baseline)
    rows: list[Row] = []
    shown: list[page.Shown] = []
    answers: dict[tuple[str, str], list[Answer]] = {}
    judged: set[str] = set()
    all_series = work.series(out)
    with tqdm(total=sum(len(series.items) for series in all_series), unit="image", desc="read") as progress:
        for series in all_series:
            images = series.images()
            found = answers_of(series.items, images, work.data.scale)
            answers[series.split, series.what] = found
            key = series.split, series.what
            row = row_of(*key, found, _paired(baseline, series), seed=config.seed)
            rows.append(replace(row, seconds=seconds.get(key), seconds_of_baseline=theirs.get(key)))
            some = slice(config.shown)
            shown.append(page.Shown(f"{series.split}: {series.what}", found[some], images[some]))
            if config.references and series.split not in judged and series.items[0].scene is not None:
                rows += references(series, work.size, work.data.scale, config.seed)
                judged.add(series.split)
            progress.update(len(series.items))
    write_readings(out / READINGS, answers)
    told = notes(config, work)
    timed = [(row.seconds * row.images, row.images) for row in rows if row.seconds is not None]
    mean = sum(took for took, _ in timed) / sum(count for _, count in timed) if timed else None
    record = {
        "format": 1,
        "request": request_of(config, work),
        "rows": [record_of(row) for row in rows],
        "seconds_an_image": None if mean is None else round(mean, 4),
        "notes": told,
    }
    with replacing(out / REPORT) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    lead = "; ".join(f"{name}: {words}" for name, words in work.in_words.items())
    made_of = {name: json.dumps(value) for name, value in record["request"].items() if name != "files"}  # type: ignore[attr-defined]
    if mean is not None:
        made_of["seconds an image"] = f"{mean:.3f}, drawing and decoding, of one process"
    page.write(out / PAGE, "Shapes benchmark", lead, rows, shown, told, made_of, f"{REPORT}, {READINGS}, images")
    sys.stdout.write(table(rows) + "\n")
    for note in told:
        sys.stdout.write(f"note: {note}\n")
    announce.ends(out / PAGE, out / REPORT, out / READINGS)


def _paired(baseline: Mapping[tuple[str, str], Mapping[str, Score]] | None, series: Series) -> list[Score] | None:
    """The baseline's scores of the same captions. Raises ValueError where it has not all of them."""
    if baseline is None:
        return None
    known = baseline.get((series.split, series.what), {})
    keys = [key_of(item.index, item.text) for item in series.items]
    if lacking := [key for key in keys if key not in known]:
        raise ValueError(
            f"baseline: has no answer for {len(lacking)} of the {len(keys)} captions of {series.split}, the first is "
            f"{lacking[0]!r}; a baseline is a result for the same captions"
        )
    return [known[key] for key in keys]


def references(series: Series, size: int, scale: float, seed: int) -> list[Row]:
    """What the true images of a split get, and those of other scenes: the image of item i + 2 for item i. Of one or two
    items that is no other scene, and of the pair of a swap it would be nearly the same, so there the second is missing.
    """
    images = pictures.to_uint8(true_images(series.items, size).mul(2.0).sub(1.0))
    shown = [(TRUE, images)] + ([(OTHERS, images.roll(-2, dims=0))] if len(images) > 2 else [])
    return [row_of(series.split, what, answers_of(series.items, some, scale), seed=seed) for what, some in shown]


def notes(config: Config, work: Drawing | Reconstructing | Reading) -> list[str]:
    """What a reader should know first."""
    told = []
    few = min(len(series.items) for series in work.series(Path()))
    if few < 500:
        told.append(f"Of {few} captions a rate is known to within some {196 * (0.25 / few) ** 0.5:.0f} per cent.")
    if work.size < 64 and len(work.data.textures) > 1:
        told.append("Below 64 pixels textures are at the limit of the oracle: see the row of the true images.")
    more = [
        split
        for split in config.splits
        if config.images is None and profile_of(work.data, split).max_objects > work.data.max_objects
    ]
    if more:
        most = work.data.max_objects
        told.append(f"{', '.join(more)}: more objects than the {most} that the training scenes had at most.")
    return told


if __name__ == "__main__":
    run_job(sys.modules[__name__])
