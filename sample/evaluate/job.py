"""`imgtok evaluate`: scores of generated images (files or straight from a model) and of reconstructions.

A model is scored at several rates in one pass over the images. At each rate stand what an image costs (tokens, bits,
use of the codebook) and what it gives (the scores). Process p of P takes the images p, p + P, ...; sums are added once
at the end, so the numbers do not depend on the batch size or the number of processes. What a score lacks (weights,
labels, a reference) is said before any sampling. Written are the scores with all that is needed to repeat them (JSON),
one row a rate (CSV), and, at several rates, their curves over the mean number of tokens (PNG).
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import platform
import sys
import time
from dataclasses import asdict
from typing import Any

import imgtok
from imgtok.cli import run_job
from imgtok.config import to_dict
from imgtok.files import replacing
from imgtok.runtime import on_cpu
from imgtok.sample.evaluate.config import Config
from imgtok.sample.evaluate.results import Evaluation, draw, panels, table, write_csv
from imgtok.sample.evaluate.scoring import evaluate, with_data

__all__ = ["Config", "describe_result", "main"]

logger = logging.getLogger(__name__)


def main(config: Config) -> None:
    """Scores, writes the files and prints a table."""
    from accelerate import Accelerator  # costs seconds to import

    accelerator = Accelerator(cpu=on_cpu())
    start = time.perf_counter()
    config, named = with_data(config)
    found = evaluate(config, accelerator, named)
    if accelerator.is_main_process:
        record = describe_result(config, found, time.perf_counter() - start)
        with replacing(config.out) as temporary:
            temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        written = [config.out, config.out.with_suffix(".csv")]
        write_csv(found.rows, written[1])
        if shown := panels(found.rows):
            written.append(config.out.with_suffix(".png"))
            draw(shown, written[2], f"{found.scored} {found.procedure.images}")
        sys.stdout.write(table(found.rows) + f"\nwritten to {', '.join(map(str, written))}\n")


def describe_result(config: Config, found: Evaluation, seconds: float) -> dict[str, Any]:
    """Everything that is needed to repeat the numbers."""
    scores = [{**asdict(row.score), "rate": None if row.rate is None else str(row.rate)} for row in found.rows]
    for score in scores:
        if not math.isfinite(score["value"]):
            score["value"] = None  # JSON has no NaN, and one score without a value must not cost the others
    packages = ("torch", "torch-fidelity", "numpy", "accelerate")
    height, width = found.size
    return {
        "format": 2,
        "scores": scores,
        "seed": config.seed,
        "num": found.num,
        "protocol": {
            **to_dict(found.procedure),
            "size": f"{width}x{height}",
            "rounding": "clamped to [-1, 1], rounded to the nearest of 256 levels; the same for originals",
            "scored": found.scored,
            "device": found.device,
        },
        "weights": found.weights,
        "seconds": round(seconds, 1),
        "versions": {
            "imgtok": imgtok.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "config": to_dict(config),
    }


if __name__ == "__main__":
    run_job(sys.modules[__name__])
