"""`imgtok calibrate`: what the latents of an autoencoder need to be rounded number by number, as a YAML and a page.

First the images are encoded: how their latents are distributed says the scale, the range and the order of the
channels. Then some of them are decoded from rounded latents. Process p of P takes the images p, p + P, ...; numbers are
put together once, so that nothing depends on the batch size or the number of processes.
"""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from imgtok import announce
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveFloat, PositiveInt, Range, check, to_dict
from imgtok.data.images import DataConfig, ImageSource
from imgtok.data.loaders import UnreadableImages
from imgtok.data.trained_on import Chosen, Named
from imgtok.files import name_after, replacing
from imgtok.hub import load, resolve
from imgtok.losses.lite0 import Lite0Distance
from imgtok.metrics.perceptual import Lite0Perceptual
from imgtok.metrics.reconstruction import PixelScores
from imgtok.metrics.scorers import (
    LITE0,
    FeatureScorer,
    OriginalsReference,
    PairJudge,
    ReconstructionScorer,
    Scorer,
)
from imgtok.quantizers.normal import MOST_LEVELS, NormalConfig
from imgtok.runtime import Blocks, on_cpu
from imgtok.sample.calibrate import page
from imgtok.sample.calibrate.measuring import Latents, decode, encode
from imgtok.sample.calibrate.results import Decoded, Found, Wishes, measure
from imgtok.sample.page import write_html
from imgtok.sample.reconstruct import size_for
from imgtok.sample.requests import places_of, protect
from imgtok.sizes import SquareSize, sides
from imgtok.tokenizers.base import Autoencoder
from imgtok.vision import lite0

__all__ = ["Config", "main"]

logger = logging.getLogger(__name__)

POSITIONAL = "vae"
Metric = Literal["ssim", "mae", "perceptual_lite0", "fd_lite0"]
ON_LITE0: tuple[Metric, ...] = ("perceptual_lite0", "fd_lite0")
FAR_FROM_ONE = 1.15
"""Deviation of scaled latents from which, or from one over which, a note says that the scale is not theirs."""
FEW_POSITIONS = 8
"""Positions a side of which fewer tell frequencies badly apart."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measures how the latents of an autoencoder are distributed and what images lose when each of their numbers is
    rounded to few levels, and writes the settings that fit, and a page.

    Takes any autoencoder.
    """

    job: Literal["calibrate"] = "calibrate"
    """Which program this file is for."""
    vae: str
    """The autoencoder: a folder or a Hub name, of imgtok's or of diffusers', a file in the layout of `kl16.ckpt`, or
    one that ships with imgtok (`shapes32`)."""
    vae_scaling_factor: PositiveFloat | Literal["measured"] | None = None
    """Factor on its latents; null takes its own, `measured` one over the deviation that is found here."""
    out: Path | None = None
    """Folder of `index.html`, the page, `calibration.json`, its numbers, and `calibration.yaml`, the settings; null
    takes outputs/calibration/NAME, with the model's name and the step of training at which it was. Those of another
    request, model or data are not replaced."""
    data: DataConfig | None = None
    """Images; null takes those that the autoencoder was trained on."""
    image_size: SquareSize | None = None
    """Pixels a side of the images; null takes those that the autoencoder was trained at."""
    held_out: Annotated[float, Range(0.0, 1.0)] | None = None
    """Share of `data` that training kept apart: the part that is used. 1 takes all of it. Null takes what the model's
    training kept apart of its own images, and all of others. A part of its own that `data` has (`val/`, `val_path`) is
    taken whole."""
    num: PositiveInt = 2000
    """Images that are encoded, from all over `data`, of each class its share, or all if there are fewer."""
    num_decoded: PositiveInt = 256
    """How many of them are decoded at every setting, or all if there are fewer."""
    levels: tuple[PositiveInt, ...] = (8, 16, 32, 64)
    """Numbers of levels that are compared, from 2 on; the largest is the one that the range is chosen for."""
    range: PositiveFloat | None = None
    """Scaled latents beyond +- this are moved to its ends; null takes the range that is measured."""
    ranges: tuple[PositiveFloat, ...] = ()
    """Ranges that are compared at the largest number of levels; empty takes 0.4, 0.6, 0.8, 1, 1.2 and 1.4 times the one
    that is chosen."""
    cut: PositiveFloat = 3.0
    """Deviations of the normal, whose means of cells are the levels, at which the outermost cells end."""
    per_channel: bool = False
    """Whether each channel is brought to mean 0 and deviation 1 before it is rounded; the range is then of that."""
    metrics: tuple[Metric, ...] = ()
    """Scores of what is decoded besides PSNR; fd_lite0 compares with the originals."""
    seed: NonNegativeInt = 0
    """Seed of the samples of the latents' distributions, and of the decoder's noise where it has any."""
    batch_size: PositiveInt = 64
    """Images that go through the autoencoder at once."""
    exact: bool = False
    """On a CPU, results that are equal to the last bit whatever the batch size: images are computed in blocks of one
    size, the last one padded, with a fixed number of threads. Several times slower."""
    threads: PositiveInt | None = None
    """CPU threads; null takes torch's own number (OMP_NUM_THREADS, or all cores), or 1 with exact=true, where another
    number can show in an image's last bits."""

    def __post_init__(self) -> None:
        check(self)
        if not self.levels or min(self.levels) < 2 or max(self.levels) > MOST_LEVELS:
            given = ",".join(map(str, self.levels)) or "none"
            raise ValueError(f"levels: given {given}; name one or several numbers from 2 to {MOST_LEVELS}, such as 64")
        NormalConfig(levels=max(self.levels), cut=self.cut)  # which fit into the cut

    def result(self, step: int | None = None) -> Path:
        """Where the page goes, of a model after `step` steps of training if that is known."""
        return self.out or Path("outputs/calibration") / name_after(self.vae, step)


def main(config: Config) -> None:
    """Writes `index.html`, `calibration.json` and `calibration.yaml`."""
    from accelerate import Accelerator  # costs seconds to import

    named = resolve(config.vae, expect=Autoencoder)
    given = config.vae_scaling_factor
    measured = given == "measured"
    accelerator = Accelerator(cpu=on_cpu())
    device, main_process = accelerator.device, accelerator.is_main_process
    vae: Autoencoder = load(named.scaled(1.0 if given == "measured" else given)).to(device)
    judges = open_judges(config.metrics, device)
    chosen = Named.of(config.data, named).to_show(size_for(vae, config.image_size, named), config.held_out)
    places = places_of(chosen.source, min(config.num, len(chosen.source)))
    check_metrics(config.metrics, judges, min(sides(chosen.source.size)), min(config.num_decoded, len(places)))
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
        "request": {name: value for name, value in to_dict(config).items() if name in REQUEST},
    }
    protect(out, files_of(out), RECORD, made_of)
    if main_process:
        announce.begins(
            "calibrate", data=chosen.words, num=len(places) if len(places) < len(chosen.source) else None,
            vae=named.in_words, on=device, out=out,
        )  # fmt: skip
    work = Work(vae, chosen.source, Blocks(device, config.exact, config.threads), config.batch_size, config.seed)
    mine = range(accelerator.process_index, len(places), accelerator.num_processes)
    unreadable = UnreadableImages(len(chosen.source))
    with tqdm(total=len(mine), unit="image", desc="encode", disable=not main_process) as progress:
        rows = encode(
            vae, work.source, places, mine, blocks=work.blocks, batch_size=work.batch_size, unreadable=unreadable,
            on_images=progress.update,
        )  # fmt: skip
    reducer = accelerator if accelerator.num_processes > 1 else None
    rows.reduce(reducer)
    latents = Latents.of(rows, places, vae.config.latent_channels)
    if not len(latents):
        raise ValueError(f"data: none of the images could be read ({chosen.words})")
    deviation = float(latents.sampled(config.seed).std())
    if not deviation > 0:
        raise ValueError("vae: the latents of these images are all the same: is the autoencoder whole?")
    factor = 1 / deviation if measured else vae.config.scaling_factor
    vae.config = replace(vae.config, scaling_factor=factor)
    wishes = Wishes(config.levels, config.range, config.ranges, config.cut, config.per_channel)
    found = measure(latents, factor, config.seed, wishes)
    shown = places_of_decoded(latents, config.num_decoded)
    decoded = score(work, latents, factor, found.settings, shown, judges, accelerator)
    if main_process:
        write(config, found, decoded, len(shown), out, made_of, chosen, named.in_words)


REQUEST = (
    "vae_scaling_factor", "num_decoded", "levels", "range", "ranges", "cut", "per_channel", "metrics", "seed",
)  # fmt: skip
"""Fields on which the results depend besides model and data."""


@dataclass(frozen=True)
class Work:
    """What images go through."""

    vae: Autoencoder
    source: ImageSource
    blocks: Blocks
    batch_size: int
    seed: int


# ---------------------------------------------------------------- images


@dataclass(frozen=True)
class Judges:
    """What scores images."""

    pairs: list[PairJudge]
    features: lite0.Lite0Extractor | None


def open_judges(metrics: Sequence[Metric], device: torch.device) -> Judges:
    """Raises FileNotFoundError for weights that a score lacks."""
    pairs: list[PairJudge] = [PixelScores(("psnr", *metrics), device)]
    needed = [metric for metric in metrics if metric in ON_LITE0]
    if not needed:
        return Judges(pairs, None)
    net = lite0.load(lite0.find_weights(", ".join(needed), None, trust=False, otherwise=""))
    if "perceptual_lite0" in metrics:
        pairs.append(Lite0Perceptual(Lite0Distance(net), device))
    return Judges(pairs, lite0.Lite0Extractor(net, device) if "fd_lite0" in metrics else None)


def check_metrics(metrics: Sequence[Metric], judges: Judges, size: int, num: int) -> None:
    """Raises ValueError for a score that `num` images of `size` pixels cannot have."""
    smallest: dict[str, int] = {metric: lite0.SMALLEST for metric in metrics if metric in ON_LITE0}
    for judge in judges.pairs:
        smallest |= {metric: pixels for metric, pixels in judge.smallest.items() if metric in metrics}
    for metric, pixels in smallest.items():
        if size < pixels:
            raise ValueError(f"metrics: {metric} needs images of at least {pixels} pixels a side, got {size}")
    if "fd_lite0" in metrics and num < 2:
        raise ValueError(f"metrics: fd_lite0 needs at least 2 images, and {num} is decoded")


def places_of_decoded(latents: Latents, num: int) -> list[int]:
    """Rows of the latents that are decoded, evenly from all of them."""
    count = min(num, len(latents))
    return [row * len(latents) // count for row in range(count)]


def score(
    work: Work,
    latents: Latents,
    factor: float,
    settings: Sequence[NormalConfig | None],
    rows: Sequence[int],
    judges: Judges,
    accelerator: Any,
) -> Decoded:
    """Decodes the means of some latents at each setting."""
    scorers: dict[NormalConfig | None, list[Scorer]] = {}
    originals = None if judges.features is None else OriginalsReference(judges.features, len(rows))
    for setting in settings:
        scorers[setting] = [ReconstructionScorer(judge, len(rows)) for judge in judges.pairs]
        if judges.features is not None:
            scorers[setting].append(
                FeatureScorer(LITE0, ("fd_lite0",), judges.features, len(rows), originals, originals=originals)
            )
    x = latents.mean[rows] * factor
    places = [latents.places[row] for row in rows]
    share = range(accelerator.process_index, len(rows), accelerator.num_processes)
    pictures: dict[NormalConfig | None, list[Tensor]] = {setting: [] for setting in settings}
    shown: list[Tensor] = []
    with tqdm(total=len(share), unit="image", desc="decode", disable=not accelerator.is_main_process) as progress:
        for batch in decode(
            work.vae, work.source, x, places, share, settings,
            seed=work.seed, blocks=work.blocks, batch_size=work.batch_size,
        ):  # fmt: skip
            first = batch[settings[0]]
            assert first.originals is not None
            if originals is not None:
                originals.update(first)
            for setting, made in batch.items():
                for scorer in scorers[setting]:
                    scorer.update(made)
            if sum(map(len, shown)) < page.SHOWN:
                shown.append(first.originals[: page.SHOWN])
                for setting, made in batch.items():
                    pictures[setting].append(made.images[: page.SHOWN])
            progress.update(len(first.indices))
    reducer = accelerator if accelerator.num_processes > 1 else None
    if originals is not None:
        originals.reduce(reducer)
    scores: dict[NormalConfig | None, dict[str, float]] = {}
    names: dict[str, None] = {}
    for setting, family in scorers.items():
        for scorer in family:
            scorer.reduce(reducer)
        if accelerator.is_main_process:
            told = [score for scorer in family for score in scorer.scores()]
            scores[setting] = {score.key: score.value for score in told}
            names |= dict.fromkeys(score.name for score in told)
    return Decoded(
        scores,
        {setting: _joined(part) for setting, part in pictures.items()},
        _joined(shown),
        tuple(names),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The first few; none of a process that had no images."""
    return torch.cat([*parts])[: page.SHOWN] if parts else torch.empty(0)


# ---------------------------------------------------------------- what is written


PAGE, RECORD, SETTINGS = "index.html", "calibration.json", "calibration.yaml"


def files_of(out: Path) -> list[Path]:
    """The files that are written in the folder `out`."""
    return [out / PAGE, out / RECORD, out / SETTINGS]


def write(
    config: Config,
    found: Found,
    decoded: Decoded,
    num_decoded: int,
    out: Path,
    made_of: Mapping[str, Any],
    chosen: Chosen,
    model: str,
) -> None:
    """All three files, and in the log what was found."""
    told = notes(found, config, made_of["data"]["num"], len(chosen.source), num_decoded)
    lines = settings_yaml(found, config, model, chosen.words, out / SETTINGS)
    words = {"autoencoder": f"{model}, fingerprint {made_of['model']['fingerprint']}", "data": chosen.words}
    words |= {name: _text(value) for name, value in made_of["request"].items()}
    about = page.About(model, chosen.words, told, words, lines, num_decoded)
    record = {
        "format": 1,
        **made_of,
        "scaling_factor": found.factor,
        "deviation": found.deviation,
        "extremes": [found.least, found.largest],
        "shape": list(found.shape),
        "channels": [asdict(channel) for channel in found.channels],
        "channel_order": list(found.order),
        "quantizer": to_dict(found.chosen),
        "curves": {str(count): {"ranges": c.ranges, "errors": c.errors} for count, c in found.curves.items()},
        "decoded": num_decoded,
        "scores": list(decoded.names),
        "continuous": dict(decoded.scores[None]),
        "settings": [
            {"quantizer": _short(setting), **asdict(rounding), **decoded.scores[setting]}
            for setting, rounding in found.roundings.items()
        ],
        "notes": told,
    }
    with replacing(out / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with replacing(out / SETTINGS) as temporary:
        temporary.write_text(lines, encoding="utf-8")
    write_html(out / PAGE, "Calibration", page.body(found, decoded, about), page.STYLE)
    continuous = decoded.scores[None]["psnr"]
    logger.info(
        "scaling factor %.4f: deviation %.3f, from %.2f to %.2f; range +-%g",
        *(found.factor, found.deviation, found.least, found.largest, found.chosen.range[1]),
    )
    logger.info("continuous: %.2f dB", continuous)
    for setting in found.by_levels:
        psnr = decoded.scores[setting]["psnr"]
        logger.info("%4d levels: %.2f dB, %.3f dB less", setting.levels, psnr, continuous - psnr)
    for note in told:
        logger.info("note: %s", note)
    announce.ends(*files_of(out))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_text, value)) or "empty"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short(config: NormalConfig) -> dict[str, Any]:
    """A quantizer without statistics of channels, which are the same everywhere."""
    return {name: value for name, value in to_dict(config).items() if name not in ("means", "deviations")}


def settings_yaml(found: Found, config: Config, model: str, data: str, path: Path) -> str:
    """The settings as a configuration that is laid over another one, with comments on where they come from."""
    quantizer = {"levels": found.chosen.levels, "range": [*found.chosen.range], "cut": found.chosen.cut}
    if config.per_channel:
        quantizer |= {"means": [*found.chosen.means], "deviations": [*found.chosen.deviations]}
    told = {"vae_scaling_factor": found.factor, "model": {"quantizer": quantizer, "channel_order": [*found.order]}}
    text = yaml.safe_dump(told, sort_keys=False, default_flow_style=None, width=100)
    about = textwrap.fill(f"Written by `imgtok calibrate` for the latents of {model}, measured on {data}.", 92)
    return f"""{textwrap.indent(about, "# ")}
# To be combined with the configuration of a tokenizer that rounds latents, or of a generator that
# does, whose cache was made with the same factor:
#
#   imgtok train tokenizer CONFIG.yaml {path} vae={config.vae}
#
#   imgtok cache latents {config.vae} vae_scaling_factor={found.factor!r} ...
#   imgtok train generator CONFIG.yaml {path}
{text}"""


def notes(found: Found, config: Config, asked: int, there: int, num_decoded: int) -> list[str]:
    """What a reader should know first."""
    told = []
    if asked < there:
        told.append(f"{asked:,} of {there:,} images, taken from all over them.")
    if found.images < asked:
        told.append(f"{asked - found.images} of {asked:,} images could not be read, and are left out.")
    if not 1 / FAR_FROM_ONE < found.deviation < FAR_FROM_ONE:
        told.append(
            f"The factor {found.factor:g} gives latents a deviation of {found.deviation:.3g}, not of about 1: with "
            f"vae_scaling_factor={found.factor / found.deviation:.5g} (or measured) it would be 1."
        )
    deviations = [channel.deviation for channel in found.channels]
    if max(deviations) > 2 * min(deviations) and not config.per_channel:
        told.append(
            f"Channels differ: their deviations are {min(deviations):.2f} to {max(deviations):.2f}. Levels suit the "
            "wide ones; per_channel=true gives each a scale of its own."
        )
    if min(found.shape[1:]) < FEW_POSITIONS:
        told.append(
            f"Latents have {found.shape[1]} x {found.shape[2]} positions, too few to distinguish frequencies well: "
            "take the order of the channels as a hint, or measure with a larger image_size."
        )
    tried = found.curves[found.chosen.levels]
    if config.range is None and found.chosen.range[1] == tried.ranges[-1]:
        told.append("The range is the widest that was tried: the latents have long tails.")
    return told


if __name__ == "__main__":
    run_job(sys.modules[__name__])
