"""`imgtok quickstart`: the whole suite in one command on built-in data, and a page that shows what came out.

Each stage is a command of its own, run as a user would type it and printed before it starts; the page
lists them. An untrained tokenizer and an untrained generator go through the same scoring.
"""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveInt, check, read_yaml
from sample.report import Run, write_page

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Trains a tokenizer and a generator on the built-in shapes, samples, scores, and writes index.html."""

    job: Literal["quickstart"] = "quickstart"
    """Which program this file is for."""
    out: Path = Path("outputs/quickstart")
    """Folder of everything that is written; an interrupted quickstart goes on where it stopped."""
    configs: Path | None = None
    """Folder of tokenizer.yaml and generator.yaml; null takes configs/quickstart of the checkout."""
    seed: NonNegativeInt = 0
    """Seed of training and sampling."""
    num: PositiveInt = 256
    """Images sampled, and held-out images reconstructed, for the scores."""
    overrides: tuple[str, ...] = ()
    """`tokenizer.KEY=VALUE` and `generator.KEY=VALUE` settings handed to the two trainings."""

    def __post_init__(self) -> None:
        check(self)


def main(config: Config) -> None:
    """Runs all stages; the page is `out/index.html`, the figures `out/report.json`."""
    configs = config.configs or Path(__file__).parents[1] / "configs" / "quickstart"
    if not (configs / "tokenizer.yaml").is_file():
        raise FileNotFoundError(
            f"{configs} has no tokenizer.yaml: run from a checkout of imgtok, or give the folder with configs=FOLDER"
        )
    data = read_yaml(configs / "tokenizer.yaml")["data"]
    run = Run(seed=config.seed, data=describe_data(data))
    started = time.perf_counter()
    for title, arguments in stages(config, configs, data):
        seconds = run_stage(title, arguments)
        run.stages.append((title, "imgtok " + " ".join(arguments), seconds))
    run.figures = collect_figures(config.out)
    run.figures["seed"] = config.seed
    run.figures["seconds"] = round(time.perf_counter() - started, 1)
    run.figures["peak_rss_mib"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1)
    page = write_page(run, config.out)
    logger.info("%s", json.dumps(run.figures, indent=2))
    logger.info("open %s", page)


def stages(config: Config, configs: Path, data: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(title, arguments of imgtok) of every stage, in order."""
    out, seed = config.out, f"training.seed={config.seed}"
    tokenizer, generator = ["train", "tokenizer", f"{configs}/tokenizer.yaml"], ["train", "generator"]
    source = [f"data.{key}={as_override(value)}" for key, value in data.items()]
    tokens = [f"tokens={out}/tokens", f"tokenizer={out}/tokenizer/final"]
    generator = [*generator, f"{configs}/generator.yaml", *tokens]
    for_tokenizer, for_generator = (
        [text.removeprefix(f"{part}.") for text in config.overrides if text.startswith(f"{part}.")]
        for part in ("tokenizer", "generator")
    )
    untrained = ["training.steps=0"]
    sampling = read_yaml(configs / "generator.yaml").get("sampling", {})
    drawing = [f"sampling.{key}={value}" for key, value in sampling.items()]
    plan = [
        ("train the tokenizer", [*tokenizer, f"out={out}/tokenizer", seed, *for_tokenizer]),
        ("tokenizer, step 0", [*tokenizer, f"out={out}/tokenizer-untrained", seed, *for_tokenizer, *untrained]),
        ("tokenize the images", ["cache", f"{configs}/cache.yaml", *tokens[1:], f"out={out}/tokens"]),
        ("train the generator", [*generator, f"out={out}/generator", seed, *for_generator]),
        ("generator, step 0", [*generator, f"out={out}/generator-untrained", seed, *for_generator, *untrained]),
    ]
    for suffix in ("", "-untrained"):
        plan += [
            (f"reconstruct{suffix}", ["reconstruct", f"{out}/tokenizer{suffix}/final",
                                      f"out={out}/reconstructions{suffix}", *source]),
            (f"score reconstructions{suffix}", ["evaluate", f"tokenizer={out}/tokenizer{suffix}/final",
                "metrics=[psnr, oracle]", f"num={config.num}", f"out={out}/reconstruction{suffix}.json", *source]),
            (f"sample{suffix}", ["sample", f"{out}/generator{suffix}/final", f"num={config.num}",
                                 f"seed={config.seed}", *drawing, f"out={out}/samples{suffix}"]),
            (f"score samples{suffix}", ["evaluate", f"images={out}/samples{suffix}", "metrics=[oracle, fd_shapes]",
                                        f"out={out}/generation{suffix}.json", *source]),
        ]  # fmt: skip
    return plan


def as_override(value: Any) -> str:
    """A YAML value as the right-hand side of `key=value`."""
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def describe_data(data: dict[str, Any]) -> str:
    """The images in words, as the page's first line has them."""
    textures = " or ".join(data.get("textures", ("any texture",)))
    sizes = ", ".join(data.get("sizes", ("small", "medium", "large")))
    return (
        f"Built-in shapes at 32 pixels: one object ({textures}) of 8 shapes x 8 colours, that is 64 classes, "
        f"in sizes {sizes}, enlarged {data.get('scale', 1.0)} times, anywhere on the canvas"
    )


def run_stage(title: str, arguments: Sequence[str]) -> float:
    """Runs one imgtok command in a process of its own; returns its seconds. Raises ValueError if it fails."""
    logger.info("--- %s: imgtok %s", title, " ".join(arguments))
    started = time.perf_counter()
    finished = subprocess.run([sys.executable, "-m", "imgtok", *arguments], check=False)
    if finished.returncode:
        raise ValueError(f"the stage {title!r} failed with exit status {finished.returncode}; its message stands above")
    return time.perf_counter() - started


def collect_figures(out: Path) -> dict[str, Any]:
    """The figures of the trained models, and of the untrained ones under `untrained`."""
    return {**figures_of(out, ""), "untrained": figures_of(out, "-untrained")}


def figures_of(out: Path, suffix: str) -> dict[str, Any]:
    """Reads what `imgtok evaluate` wrote; suffix "-untrained" for the models at step 0."""
    generation = read_scores(out / f"generation{suffix}.json")
    reconstruction = read_scores(out / f"reconstruction{suffix}.json")
    by_tokens = {count: value for (key, count), value in reconstruction.items() if key == "psnr"}
    full = max(count for count in by_tokens if count is not None)
    return {
        "oracle_top1": generation["oracle_top1", None],
        "oracle_reconstruction": reconstruction["oracle_top1", full],
        "oracle_by_tokens": {
            str(count): value for (key, count), value in reconstruction.items() if key == "oracle_top1"
        },
        "psnr_by_tokens": {str(count): value for count, value in by_tokens.items()},
        "fd_shapes": generation["fd_shapes", None],
        "fd_shapes_clean": generation["fd_shapes_clean", None],
    }


def read_scores(path: Path) -> dict[tuple[str, int | None], float]:
    """(key, token count or None) -> value, from a result file of `imgtok evaluate`."""
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    return {(score["key"], score["num_tokens"]): score["value"] for score in scores}


if __name__ == "__main__":
    run_job(sys.modules[__name__])
