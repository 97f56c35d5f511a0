"""`imgtok complexity`: how many tokens each image of a data set needs, as a page and as data.

Process p of P measures the images p, p + P, ...; their numbers are put together once at the end, so that nothing
depends on the batch size or the number of processes. One process then writes the page, for which it reads again the few
images that are shown.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tqdm import tqdm

from imgtok import announce
from imgtok.cli import run_job
from imgtok.config import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, check, to_dict
from imgtok.data.images import DataConfig, ImageSource
from imgtok.data.loaders import UnreadableImages, eval_loader
from imgtok.data.trained_on import Chosen, Named
from imgtok.files import name_after, replacing
from imgtok.hub import load, resolve
from imgtok.pictures import to_uint8
from imgtok.runtime import Blocks, on_cpu
from imgtok.sample.complexity import page
from imgtok.sample.complexity.measuring import Measured, Request, measure, request_for
from imgtok.sample.complexity.summary import summarise, text
from imgtok.sample.page import inline_thumbnail, write_html
from imgtok.sample.reconstruct import reconstruct
from imgtok.sample.requests import places_of, protect
from imgtok.sections import Settings
from imgtok.tokenizers.base import Rate, Tokenizer

__all__ = ["Config", "main"]

logger = logging.getLogger(__name__)

POSITIONAL = "model"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Counts how many tokens each image needs, and writes a page on which the images stand from the simplest to the
    most complex.

    Takes a tokenizer that chooses the number of an image's tokens by the error that is allowed.
    """

    job: Literal["complexity"] = "complexity"
    """Which program this file is for."""
    model: str
    """Folder or any other name of a tokenizer."""
    out: Path | None = None
    """Folder of `index.html`, the page, `complexity.json`, its numbers, and `complexity.parquet`, a row an image; null
    takes outputs/complexity/NAME, with the model's name and the step of training at which it was. Those of another
    request, model or data are not replaced."""
    data: DataConfig | None = None
    """Images; null takes those that the model was trained on."""
    held_out: Annotated[float, Range(0.0, 1.0)] | None = None
    """Share of `data` that training kept apart: the part that is used. 1 takes all of it. Null takes what the model's
    training kept apart of its own images, and all of others. A part of its own that `data` has (`val/`, `val_path`) is
    taken whole."""
    num: PositiveInt | None = None
    """Images, from all over `data`, of each class its share; null takes all."""
    eps: tuple[NonNegativeFloat, ...] = ()
    """Errors that may remain, such as 0.03,0.05,0.09: mean absolute differences of pixels in [0, 1]. Empty takes those
    that the tokenizer lists."""
    budget: PositiveInt | None = None
    """The most tokens that an image may have; null takes the largest that the tokenizer lists."""
    counts: tuple[PositiveInt, ...] = ()
    """Fixed numbers of tokens, the same for every image, whose errors are measured too; empty takes an eighth, a
    quarter, a half and all of the budget. The first and the last one tell structure from noise."""
    errors: bool = True
    """Whether to decode and measure errors; false counts tokens alone, which takes a small part of the time."""
    sort_by: NonNegativeFloat | None = None
    """The one of `eps` whose numbers of tokens sort the images; null takes that at which these differ most."""
    shown: PositiveInt = 400
    """Images in the list of the page, evenly from the simplest to the most complex; about 3 kB each."""
    seed: NonNegativeInt = 0
    """Seed of the decoder's noise, where it has any."""
    batch_size: PositiveInt = 64
    """Images that go through the tokenizer at once."""
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
        if self.counts and not self.errors:
            raise ValueError("counts: their errors are what is measured, and errors=false measures none; leave one out")

    def result(self, step: int | None = None) -> Path:
        """Where the page goes, of a model after `step` steps of training if that is known."""
        return self.out or Path("outputs/complexity") / name_after(self.model, step)


def main(config: Config) -> None:
    """Writes `index.html`, `complexity.json` and `complexity.parquet`."""
    from accelerate import Accelerator  # costs seconds to import

    named = resolve(config.model, expect=Tokenizer)
    accelerator = Accelerator(cpu=on_cpu())
    model: Tokenizer = load(named).to(accelerator.device)
    request = request_for(model, config.eps, config.budget, config.counts, config.errors)
    if config.sort_by not in (None, *request.eps):
        raise ValueError(f"sort_by: {config.sort_by} is none of the eps that are measured: {_listed(request.eps)}")
    decoding = config.decoding.over(model.config.decoding, "decoding")
    chosen = Named.of(config.data, named).to_show(model.image_size, config.held_out)
    places = places_of(chosen.source, config.num)
    out = config.result(named.step)
    made_of = {
        "model": named.about(),
        "data": {
            **to_dict(chosen.data),
            "held_out": chosen.held_out,
            "image_size": chosen.source.size,
            "num": len(places),
            "identity": json.loads(chosen.source.identity),
        },
        "request": to_dict(request),
        "sort_by": config.sort_by,
        "shown": config.shown,
        "seed": config.seed,
        "decoding": to_dict(decoding),
    }
    protect(out, files_of(out), RECORD, made_of)
    work = Work(model, chosen.source, config.seed, decoding, Blocks(accelerator.device, config.exact, config.threads))
    main_process = accelerator.is_main_process
    if main_process:
        fewer = len(places) if len(places) < len(chosen.source) else None
        at_eps = f"{_listed(request.eps)}, at most {request.budget} tokens"
        announce.begins(
            "complexity", data=chosen.words, num=fewer, model=named.in_words, eps=at_eps, on=accelerator.device, out=out
        )
    share = range(accelerator.process_index, len(places), accelerator.num_processes)
    unreadable = UnreadableImages(len(chosen.source))
    with tqdm(total=len(share), unit="image", desc="complexity", disable=not main_process) as progress:
        rows = measure(
            model, chosen.source, places, share, request, seed=config.seed, decoding=decoding, blocks=work.blocks,
            batch_size=config.batch_size, unreadable=unreadable, on_images=progress.update,
        )  # fmt: skip
    rows.reduce(accelerator if accelerator.num_processes > 1 else None)
    if main_process:
        found = Measured.of(rows, chosen.source, places, request)
        write(config, found, work, out, made_of, chosen, named.in_words)


@dataclass(frozen=True)
class Work:
    """What images go through."""

    model: Tokenizer
    source: ImageSource
    seed: int
    decoding: Any
    blocks: Blocks


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(map(text, numbers))


# ---------------------------------------------------------------- what is written


PAGE, RECORD, TABLE = "index.html", "complexity.json", "complexity.parquet"


def files_of(out: Path) -> list[Path]:
    """The files that are written in the folder `out`."""
    return [out / PAGE, out / RECORD, out / TABLE]


def write(
    config: Config,
    found: Measured,
    work: Work,
    out: Path,
    made_of: Mapping[str, Any],
    chosen: Chosen,
    model_in_words: str,
) -> None:
    """All three files, and in the log a line an eps. Raises ValueError where no image could be read."""
    if not len(found):
        raise ValueError(f"data: none of the images could be read ({chosen.words})")
    at = found.most_telling if config.sort_by is None else config.sort_by
    summary = summarise(found, at)
    choice = page.choose(found, at, config.shown)
    about = page.About(
        model=model_in_words,
        data=chosen.words,
        notes=notes(found, summary, work.model, made_of["data"]["num"], len(chosen.source)),
        made_of=settings_in_words(found.request, config, made_of, model_in_words, chosen.words),
    )
    body = page.body(found, summary, choice, draw(found, work, at, choice, config.batch_size), about)
    names = {key: [found.names[row] for row in getattr(choice, key)] for key in ("simplest", "most_complex")}
    record = {"format": 1, **made_of, **summary, **names, "notes": about.notes}
    write_table(found, out / TABLE)
    with replacing(out / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_html(out / PAGE, "Complexity of images", body, page.STYLE)
    for eps in found.request.eps:
        told = summary["tokens"][text(eps)]
        error = f", error {summary['error'][text(eps)]:.4f}" if found.request.errors else ""
        logger.info(
            "eps %s: %.1f tokens on average, %d to %d, %.1f %% of the images have all %d%s",
            *(text(eps), told["mean"], told["percentiles"]["0"], told["percentiles"]["100"]),
            *(100 * told["all_of_the_budget"], found.request.budget, error),
        )
    for note in about.notes:
        logger.info("note: %s", note)
    announce.ends(*files_of(out))


def notes(found: Measured, summary: Mapping[str, Any], model: Tokenizer, asked: int, there: int) -> list[str]:
    """What a reader should know first: images that are left out, an eps that the model takes for another one, and one
    that tells little.
    """
    told = []
    if asked < there:
        told.append(f"{asked:,} of {there:,} images, taken from all over them.")
    if len(found) < asked:
        told.append(f"{asked - len(found)} of {asked:,} images could not be read, and are left out.")
    taken = {eps: model.asked(Rate(found.request.budget, eps)).tolerance for eps in found.request.eps}
    if others := [
        f"{text(eps)} is asked for as {text(other)}" for eps, other in taken.items() if other not in (None, eps)
    ]:
        told.append(f"The model cannot be asked for every eps: {', '.join(others)}.")
    beyond: dict[float, float] = {}
    for eps in found.request.eps:
        percentiles = summary["tokens"][text(eps)]["percentiles"]
        by_eps = summary.get("met", {}).get("by_eps", {})
        part = by_eps.get(text(eps), {}).get("out_of_reach") or 0.0
        if part > 0.5:
            beyond[eps] = part
        elif len(found) > 1 and percentiles["0"] == percentiles["100"]:
            count = page.tokens_in_words(percentiles["0"])
            told.append(f"eps = {text(eps)} does not tell images apart: all of them have {count}.")
    if beyond:
        parts = ", ".join(f"eps = {text(eps)} on {page.share(part)} of the images" for eps, part in beyond.items())
        told.append(
            f"The requested error is mostly out of reach: all {found.request.budget} tokens leave an error above "
            f"{parts}. A larger eps tells images apart better."
        )
    return told


def settings_in_words(
    request: Request, config: Config, made_of: Mapping[str, Any], model: str, data: str
) -> dict[str, str]:
    """The rows of the page's last table."""
    words = {"model": f"{model}, fingerprint {made_of['model']['fingerprint']}", "data": data}
    words |= {"eps": _listed(request.eps), "budget": str(request.budget)}
    if request.counts:
        words["counts"] = _listed(request.counts)
    words |= {"errors": str(request.errors).lower(), "seed": str(config.seed)}
    words |= {f"decoding.{name}": str(value) for name, value in made_of["decoding"].items()}
    return words


def write_table(found: Measured, path: Path) -> None:
    """A row an image: `image` (its name), `label` where there are any, `kc_EPS`, `error_EPS`, `error_with_COUNT`, and
    `delta`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"image": list(found.names)}
    if found.labels is not None:
        columns["label"] = list(found.labels)
    columns |= {f"kc_{text(eps)}": tokens for eps, tokens in found.tokens.items()}
    columns |= {f"error_{text(eps)}": errors for eps, errors in found.errors.items()}
    columns |= {f"error_with_{count}": errors for count, errors in found.fixed.items()}
    if (gain := found.gain) is not None:
        columns["delta"] = gain
    with replacing(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def draw(found: Measured, work: Work, at: float, choice: page.Choice, batch_size: int) -> page.Pictures:
    """The pictures of the images that are shown, which are read again, and decoded where errors are measured."""
    request, made = found.request, page.Pictures()
    row_of = {int(found.places[row]): row for row in [*choice.large, *choice.listed]}
    fixed = [Rate(count) for count in sorted({min(request.counts), max(request.counts)})] if request.counts else []
    rates = [Rate(request.budget, at), *fixed] if request.errors else []
    large = {*choice.large}
    for batch in eval_loader(work.source, batch_size, indices=sorted(row_of)):
        rows = [row_of[place] for place in batch.indices]
        for row, image in zip(rows, to_uint8(batch.images), strict=True):
            title = f"{found.names[row]}: {page.tokens_in_words(int(found.tokens[at][row]))}"
            if row in large:
                made.large[row] = inline_thumbnail(image, page.LARGE, title)
            made.small[row] = inline_thumbnail(image, page.SMALL, title)
        decoded = [number for number, row in enumerate(rows) if row in large]
        if not (rates and decoded):
            continue
        places = [batch.indices[number] for number in decoded]
        parts = reconstruct(
            work.model, batch.images[decoded], places, rates, seed=work.seed, decoding=work.decoding, blocks=work.blocks
        )
        for rate, part in parts.items():
            assert rate is not None, "as all rates here"
            for place, image in zip(places, part.images, strict=True):
                made.decoded[row_of[place], rate] = inline_thumbnail(image, page.LARGE)
    return made


if __name__ == "__main__":
    run_job(sys.modules[__name__])
