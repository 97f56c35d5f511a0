"""`imgtok quickstart`: the whole suite in one command on built-in data, and a page that shows what came out.

Each stage is a command of its own, run as a user would type it and printed before it starts; the page
lists them. An untrained tokenizer and an untrained generator go through the same scoring.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from imgtok import announce, shipped, signals
from imgtok.cli import main as main_of_imgtok
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveInt, check, read_yaml
from imgtok.files import replacing
from imgtok.runtime import peak_rss_mib
from imgtok.sample import reconstruct
from imgtok.sample.evaluate import results
from imgtok.sample.report import Run, write_page

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a tokenizer and a generator on the built-in shapes, samples, scores, and writes index.html."""

    job: Literal["quickstart"] = "quickstart"
    """Which program this file is for."""
    out: Path = Path("outputs/quickstart")
    """Folder of everything that is written; an interrupted quickstart goes on where it stopped."""
    configs: Path | None = None
    """Folder of tokenizer.yaml, cache.yaml and generator.yaml; null takes those that ship with imgtok."""
    seed: NonNegativeInt = 0
    """Seed of training and sampling."""
    num: PositiveInt = 256
    """Images sampled, and held-out images reconstructed, for the scores."""
    overrides: tuple[str, ...] = ()
    """Settings for the two trainings, such as tokenizer.training.steps=100 or generator.model.width=64."""

    def __post_init__(self) -> None:
        check(self)


def main(config: Config) -> None:
    """Runs all stages; the page is `out/index.html`, the figures `out/report.json`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the quickstart starts its own programs: run it once, without torchrun or accelerate launch")
    plan = Plan.make(config)
    data = describe_data(plan.data)
    announce.begins("quickstart", data=data, configs=plan.configs, seed=config.seed, out=config.out)
    run = Run(seed=config.seed, data=data)
    peaks: list[float] = []
    for title, arguments in plan.stages():
        with set_aside(results_of(arguments)):
            seconds, peak = run_stage(title, arguments, config.out / "stages.json")
        peaks.append(peak)
        run.stages.append((title, shlex.join(["imgtok", *arguments]), seconds))
    run.figures = {
        **figures_of(config.out, ""),
        "untrained": figures_of(config.out, "-untrained"),
        "seed": config.seed,
        "seconds": round(sum(seconds for *_, seconds in run.stages), 1),
        "peak_rss_mib": max(peaks),
    }
    page = write_page(run, config.out)
    logger.info("%s", json.dumps(run.figures, indent=2))
    announce.ends(page, config.out / "report.json")


SHIPPED = Path("configs/quickstart")
"""Names of configurations, which every program takes from a checkout or else from the package."""


@dataclass(frozen=True)
class Plan:
    """What the stages share: the configuration files and what they say about images."""

    config: Config
    configs: Path
    data: dict[str, Any]
    """The `data` section of tokenizer.yaml, which every stage is handed."""

    @classmethod
    def make(cls, config: Config) -> Plan:
        """Raises FileNotFoundError without configuration files, ValueError for an override of no training."""
        configs = config.configs or SHIPPED
        folder = shipped.folder() / "quickstart" if config.configs is None and not SHIPPED.is_dir() else configs
        for name in ("tokenizer.yaml", "cache.yaml", "generator.yaml"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"configs: {configs} has no {name}; leave configs out to take those that ship with imgtok, "
                    "which `imgtok config quickstart/tokenizer` and the like print"
                )
        for text in config.overrides:
            if not text.startswith(
                ("tokenizer.model.", "tokenizer.training.", "generator.model.", "generator.training.")
            ):
                raise ValueError(
                    f"overrides: {text!r} must begin with tokenizer. or generator., then model. or training.; "
                    "images are set in the files of configs=FOLDER, for all stages"
                )
        data = read_yaml(folder / "tokenizer.yaml")["data"]
        return cls(config, configs, data)

    def stages(self) -> list[tuple[str, list[str]]]:
        """(title, arguments of imgtok) of every stage, in order."""
        plan = [*self.training("", []), *self.training("-untrained", ["training.steps=0"])]
        for suffix in ("", "-untrained"):
            plan += self.scoring(suffix)
        return plan

    def training(self, suffix: str, extra: list[str]) -> list[tuple[str, list[str]]]:
        """Tokenizer, tokens and generator; the untrained generator stands on the trained tokenizer."""
        out, seed = self.config.out, f"training.seed={self.config.seed}"
        tokens = [f"tokens={out}/tokens", f"tokenizer={out}/tokenizer/final"]
        settings = {
            part: [text.removeprefix(f"{part}.") for text in self.config.overrides if text.startswith(f"{part}.")]
            for part in ("tokenizer", "generator")
        }
        tokenizer = ["train", "tokenizer", f"{self.configs}/tokenizer.yaml", f"out={out}/tokenizer{suffix}", seed]
        generator = [
            "train",
            "generator",
            f"{self.configs}/generator.yaml",
            *tokens,
            f"out={out}/generator{suffix}",
            seed,
        ]
        cache = ["cache", f"{self.configs}/cache.yaml", tokens[1], f"out={out}/tokens", *self.source("num_images")]
        return [
            (f"train the tokenizer{suffix}", [*tokenizer, *settings["tokenizer"], *extra]),
            *([] if suffix else [("tokenize the images", cache)]),
            (f"train the generator{suffix}", [*generator, *settings["generator"], *extra]),
        ]

    def scoring(self, suffix: str) -> list[tuple[str, list[str]]]:
        """Pictures and figures of the trained models, or of the untrained ones."""
        out, num, source = self.config.out, f"num={self.config.num}", self.source()
        tokenizer, samples = f"{out}/tokenizer{suffix}/final", f"{out}/samples{suffix}"
        exact = "exact=true"  # so that another machine finds the same figures to the last digit
        drawing = [f"{out}/generator{suffix}/final", num, f"seed={self.config.seed}", exact]
        reconstructed = ["metrics=psnr,oracle", num, exact, f"out={out}/reconstruction{suffix}.json"]
        generated = ["metrics=oracle,fd_shapes", f"out={out}/generation{suffix}.json"]
        return [
            (f"reconstruct{suffix}", ["reconstruct", tokenizer, exact, f"out={out}/reconstructions{suffix}", *source]),
            (f"score reconstructions{suffix}", ["evaluate", f"tokenizer={tokenizer}", *reconstructed, *source]),
            (f"sample{suffix}", ["sample", *drawing, f"out={samples}"]),
            (f"score samples{suffix}", ["evaluate", f"images={samples}", *generated, *source]),
        ]

    def source(self, *without: str) -> list[str]:
        """The images, as overrides."""
        return [f"data.{key}={as_override(value)}" for key, value in self.data.items() if key not in without]


def as_override(value: Any) -> str:
    """A YAML value as the right-hand side of `key=value`; lists as people write them in a shell, `a,b`."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def describe_data(data: dict[str, Any]) -> str:
    """The images in words, as the page's first line has them."""
    textures = " or ".join(data.get("textures", ("any texture",)))
    sizes = ", ".join(data.get("sizes", ("small", "medium", "large")))
    return (
        f"Built-in shapes at 32 pixels: one object ({textures}) of 8 shapes x 8 colours, that is 64 classes, "
        f"in sizes {sizes}, enlarged {data.get('scale', 1.0)} times, anywhere on the canvas"
    )


def run_stage(title: str, arguments: Sequence[str], times: Path) -> tuple[float, float]:
    """Runs one imgtok command in a process of its own; returns its seconds and its peak memory in MiB.

    `times` keeps the longest run of each stage: one that finds its work done by an earlier quickstart must not
    count as quick. Raises ValueError if the command fails.
    """
    logger.info("--- %s: %s", title, shlex.join(["imgtok", *arguments]))
    known: dict[str, float] = json.loads(times.read_text(encoding="utf-8")) if times.exists() else {}
    # torch and diffusers take ten seconds to import on two cores: here once, in the process that the stages fork from
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: ForkServerContext | SpawnContext = (
        multiprocessing.get_context("forkserver") if forks else multiprocessing.get_context("spawn")
    )
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    started = time.perf_counter()
    process = context.Process(target=_stage, args=(list(arguments), sender), name=title)
    process.start()
    sender.close()
    try:
        process.join()
    except signals.Stopped as stop:  # that of Ctrl-C has reached the stage, too
        os.kill(int(process.pid or 0), stop.number)
        process.join()
        raise
    if process.exitcode:
        raise ValueError(f"the stage {title!r} failed with exit status {process.exitcode}; its message stands above")
    known[title] = max(time.perf_counter() - started, known.get(title, 0.0))
    with replacing(times) as temporary:
        temporary.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return known[title], receiver.recv()


PRELOADED = [
    "accelerate",
    "diffusers.models.autoencoders.autoencoder_kl",
    "imgtok.tokenizers.flextok",  # the kinds of the two models, which the jobs import once they are chosen
    "imgtok.generators.gpt",
    *(f"imgtok.train.{program}" for program in ("tokenizer", "cache_tokens", "generator")),
    *(f"imgtok.sample.{program}" for program in ("images", "reconstruct", "evaluate")),
]


def _stage(arguments: list[str], sender: Connection) -> None:
    status = main_of_imgtok(arguments)
    sender.send(peak_rss_mib())
    sys.exit(status)


def results_of(arguments: Sequence[str]) -> list[Path]:
    """The files of a stage whose command does not replace those of another request or another model; else none."""
    out = next(Path(word.removeprefix("out=")) for word in arguments if word.startswith("out="))
    commands = {"evaluate": results.files_of, "reconstruct": reconstruct.files_of}
    return commands[arguments[0]](out) if arguments[0] in commands else []


@contextlib.contextmanager
def set_aside(files: Sequence[Path]) -> Iterator[None]:
    """While a stage makes new files, those of an earlier quickstart are called otherwise. They are deleted once it has,
    and put back if it fails.
    """
    aside = {file: file.with_name(f".{file.name}.before") for file in files}
    for file, old in aside.items():
        if file.exists():
            file.replace(old)
    try:
        yield
    except BaseException:  # Ctrl-C, too
        for file, old in aside.items():
            if old.exists():
                old.replace(file)
        raise
    for old in aside.values():
        old.unlink(missing_ok=True)


def figures_of(out: Path, suffix: str) -> dict[str, Any]:
    """Figures from what `imgtok evaluate` wrote; suffix "-untrained" for the models at step 0."""
    generation = read_scores(out / f"generation{suffix}.json")
    reconstruction = read_scores(out / f"reconstruction{suffix}.json")
    by_tokens = {rate: value for (key, rate), value in reconstruction.items() if key == "psnr"}
    full = list(by_tokens)[-1]  # all tokens
    return {
        "oracle_top1": generation["oracle_top1", None],
        "oracle_reconstruction": reconstruction["oracle_top1", full],
        "oracle_by_tokens": {rate: value for (key, rate), value in reconstruction.items() if key == "oracle_top1"},
        "psnr_by_tokens": by_tokens,
        "fd_shapes": generation["fd_shapes", None],
        "fd_shapes_clean": generation["fd_shapes_clean", None],
    }


def read_scores(path: Path) -> dict[tuple[str, str | None], float]:
    """(key, rate or None) -> value, from a result file of `imgtok evaluate`, from the lowest rate to the highest."""
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    return {(score["key"], score["rate"]): score["value"] for score in scores}


if __name__ == "__main__":
    run_job(sys.modules[__name__])
