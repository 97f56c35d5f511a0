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
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import imgtok
from imgtok.cli import run_job
from imgtok.config import to_dict
from imgtok.files import replacing
from imgtok.hub import Found
from imgtok.metrics.saved_images import RECORD as SAMPLES
from imgtok.runtime import on_cpu
from imgtok.sample.evaluate.config import Config
from imgtok.sample.evaluate.results import Evaluation, draw, files_of, panels, table, write_csv
from imgtok.sample.evaluate.scoring import evaluate, models_of, with_data
from imgtok.tokenizers.calls import summary

__all__ = ["Config", "describe_result", "main"]

logger = logging.getLogger(__name__)


def main(config: Config) -> None:
    """Scores, writes the files and prints a table."""
    from accelerate import Accelerator  # costs seconds to import

    config, named = with_data(config)
    models = models_of(config, named)
    step = next((found.step for found in models.values()), None)
    config = replace(config, out=config.result(step))
    protect(config, models)
    accelerator = Accelerator(cpu=on_cpu())
    start = time.perf_counter()
    found = evaluate(config, accelerator, models, named)
    if accelerator.is_main_process:
        written = write(config, found, time.perf_counter() - start)
        notes = "".join(f"note: {note}\n" for note in found.notes)
        sys.stdout.write(table(found.rows) + f"\n{notes}written to {', '.join(map(str, written))}\n")


def write(config: Config, found: Evaluation, seconds: float) -> list[Path]:
    """The result's files, without any that an earlier run of the same request left and this one does not make."""
    written = files_of(config.result())
    out = written[0]
    record = describe_result(config, found, seconds)
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_csv(found.rows, written[1])
    if shown := panels(found.rows):
        draw(shown, written[2], f"{found.scored} {found.procedure.images}")
    else:
        written.pop().unlink(missing_ok=True)
    return written


# ---------------------------------------------------------------- what is there already


FREE = ("out", "batch_size", "threads")
"""Fields on which scores do not depend."""
PATHS = ("images", "originals", "reference", "model", "tokenizer")


def protect(config: Config, models: Mapping[str, Found]) -> None:
    """Raises ValueError where the result's files are those of another request, of another model or other samples, or of
    unknown origin.
    """
    out = config.result()
    beside = [path for path in files_of(out) if path.exists()]
    same = False
    if out.exists():
        previous = _request_of(out)
        if previous is None:
            raise ValueError(f"out: {out} is no result of imgtok evaluate; choose another file with out=FILE.json")
        request = _request(to_dict(config), Path.cwd()) | _origin(
            {name: found.weights_sha256() for name, found in models.items()}, samples_of(config)
        )
        if changed := [name for name in request if previous.get(name, request[name]) != request[name]]:
            raise ValueError(
                f"out: {out} holds scores of another request (different: {', '.join(changed)}); choose another file "
                f"with out=FILE.json, or delete {' and '.join(map(str, beside))}"
            )
        same = True
    elif beside:
        raise ValueError(
            f"out: {beside[0]} would be written beside {out.name}, and is there without it, so it is not known whose "
            "it is; choose another file with out=FILE.json, or delete it"
        )
    if config.save_reference is not None and config.save_reference.exists() and not same:
        raise ValueError(f"save_reference: {config.save_reference} is there already; choose another file, or delete it")


def _request_of(path: Path) -> dict[str, Any] | None:
    """What the scores in a file were asked for by; None where that is none of ours."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        folder = Path(record.get("folder") or Path.cwd())  # older files do not say it
        request = _request(record["config"], folder) if record["config"]["job"] == "evaluate" else None
        return request and request | _origin(record.get("weights", {}), record.get("samples"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _request(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields that matter, with paths that do not depend on the folder in which the command was given."""
    request = {name: value for name, value in config.items() if name not in FREE}
    for name in PATHS:
        given = request.get(name)
        if given is not None and (name not in ("model", "tokenizer") or (folder / given).exists()):
            request[name] = os.path.normpath(folder / Path(given).expanduser())
    if isinstance(data := request.get("data"), dict) and data.get("path"):
        request["data"] = {**data, "path": os.path.normpath(folder / Path(data["path"]).expanduser())}
    return request


def _origin(weights: Mapping[str, str], samples: Mapping[str, Any] | None) -> dict[str, Any]:
    """What tells the images that are scored from others of the same name: the same folder may hold a model that was
    trained further, or new samples. By the words of the message for it; what is not known is left out.
    """
    origin: dict[str, Any] = {f"weights of the {name}": digest for name, digest in weights.items()}
    return origin if samples is None else {**origin, "what the samples were drawn by": samples}


def samples_of(config: Config) -> dict[str, Any] | None:
    """By folder, what the images of a path were drawn by, where `imgtok sample` drew them; None for those of a model.

    A sample folder may be one class of a larger one.
    """
    if config.images is None:
        return None
    folder = config.images.expanduser()
    folder = folder.parent if folder.name == "samples.npz" else folder
    drawn = {}
    for path in (folder / SAMPLES, *sorted(folder.glob(f"*/{SAMPLES}"))):
        try:
            drawn[str(path.parent.relative_to(folder))] = json.loads(path.read_text(encoding="utf-8"))["request"]
        except (OSError, ValueError, TypeError, KeyError):
            continue  # none of ours
    return drawn


# ---------------------------------------------------------------- the record


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
            "real": found.real,
            "size": f"{width}x{height}",
            "rounding": "clamped to [-1, 1], rounded to the nearest of 256 levels; the same for originals",
            "scored": found.scored,
            "device": found.device,
        },
        "notes": list(found.notes),
        "weights": found.weights,
        "samples": samples_of(config),
        "seconds": round(seconds, 1),
        "drawing": None if found.drawing is None else summary(found.drawing),
        "versions": {
            "imgtok": imgtok.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "config": to_dict(config),
        "folder": str(Path.cwd()),
    }


if __name__ == "__main__":
    run_job(sys.modules[__name__])
