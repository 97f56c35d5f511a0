"""`imgtok evaluate`: scores of generated images (files or straight from a model) and of reconstructions.

Process p of P takes the images p, p + P, ...; sums are added once at the end, so the numbers do not depend on the
batch size or the number of processes. What a score lacks (weights, labels, a reference) is said before any sampling.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import imgtok
from generators.gpt import SamplingConfig
from imgtok.cli import run_job
from imgtok.config import NonNegativeInt, PositiveFloat, PositiveInt, Range, check, to_dict
from imgtok.data.images import DataConfig
from imgtok.data.shapes import ShapesConfig
from imgtok.files import replacing
from imgtok.processes import on_cpu
from sample.scoring import RECONSTRUCTION, WITH_REFERENCE, Evaluation, Metric, Row, evaluate


@dataclass(frozen=True, kw_only=True)
class Config:
    """Scores images: give one of `images` (files), `model` (a generator) or `tokenizer` (reconstructions)."""

    job: Literal["evaluate"] = "evaluate"
    """Which program this file is for."""
    images: Path | None = None
    """Folder of images, or .npz with arr_0 (n, H, W, 3) uint8 and perhaps labels arr_1."""
    model: str | None = None
    """Model folder or Hub name of a generator; its samples are scored without being written."""
    tokenizer: str | None = None
    """Model folder or Hub name of a tokenizer: alone, its reconstructions of `data` are scored; with `model`, it
    decodes the samples (null takes the tokenizer inside the generator's folder)."""
    metrics: tuple[Metric, ...] = ()
    """Scores; empty takes what fits: oracle and fd_shapes for shapes, psnr, ssim and mae for reconstructions, else fid
    and is."""
    data: DataConfig | None = None
    """Images to reconstruct, or real images for fid and others; for shapes (data.kind=shapes), the profile."""
    reference: Path | None = None
    """Real images (folder or .npz) or their statistics (.safetensors, or .npz with mu and sigma); takes the place of
    `data` for fid and others."""
    num: PositiveInt | None = None
    """Images scored; null takes all files, all held-out images, or 5000 samples of a model."""
    labels: Literal["recorded", "balanced"] = "recorded"
    """Classes of `images` for the oracle: as saved beside them, or index modulo 64."""
    classes: tuple[int, ...] = ()
    """Classes that `model` draws in turn; empty takes all."""
    seed: NonNegativeInt = 0
    """Seed of samples and of the decoder's noise."""
    batch_size: PositiveInt = 64
    """Images at once in one process; scores do not depend on it."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How `model` draws tokens."""
    num_tokens: tuple[PositiveInt, ...] = ()
    """Token counts: each is scored for a tokenizer (empty: powers of two up to all); for a model one, or all."""
    decode_steps: PositiveInt | None = None
    """Flow steps of the decoder; null takes the tokenizer's own setting."""
    decode_guidance: PositiveFloat | None = None
    """Guidance scale of the decoder; null takes the tokenizer's own setting."""
    held_out: Annotated[float, Range(0.0, 0.9)] = 0.1
    """Share of `data` that training kept apart: the part that is reconstructed."""
    inception_weights: Path | None = None
    """File of torch-fidelity's Inception weights; null looks in torch.hub's cache, then downloads."""
    trust_weights: bool = False
    """Accepts Inception weights with another hash than the published file's; names of scores then carry the hash."""
    assume_extractor: str | None = None
    """Network that made a published .npz of statistics, such as inception-v3-compat."""
    save_reference: Path | None = None
    """Also writes the statistics of the real images to this .safetensors file."""
    out: Path = Path("outputs/evaluate/scores.json")
    """Result file."""
    threads: PositiveInt = 1
    """CPU threads per process for drawing and decoding; their number can show in an image's last bits. The networks
    that judge use torch's choice (OMP_NUM_THREADS)."""

    def __post_init__(self) -> None:
        check(self)
        check_inputs(self)

    @property
    def reconstructs(self) -> bool:
        return self.tokenizer is not None and self.model is None

    @property
    def chosen_metrics(self) -> tuple[Metric, ...]:
        if self.metrics:
            return self.metrics
        shapes: tuple[Metric, ...] = ("oracle", "fd_shapes") if isinstance(self.data, ShapesConfig) else ()
        if self.reconstructs:
            return ("psnr", "ssim", "mae", *shapes)
        return shapes or (("fid", "is") if self.data or self.reference else ("is",))


def check_inputs(config: Config) -> None:
    """Raises ValueError for fields that do not go together, before anything is loaded."""
    if (config.images is None) == (config.model is None and config.tokenizer is None):
        raise ValueError("give one of images=PATH, model=FOLDER (a generator) or tokenizer=FOLDER (reconstructions)")
    if config.reconstructs and config.data is None:
        raise ValueError("data: which images should the tokenizer reconstruct? (data.kind=shapes, for example)")
    if config.model is not None and len(config.num_tokens) > 1:
        raise ValueError(f"num_tokens: a generator draws one number of tokens, given {list(config.num_tokens)}")
    needs_originals = [metric for metric in config.chosen_metrics if metric in RECONSTRUCTION]
    if needs_originals and not config.reconstructs:
        names = ", ".join(needs_originals)
        raise ValueError(f"metrics: {names} compare with originals: they need tokenizer=FOLDER and data.kind=...")
    needs_real = [metric for metric in config.chosen_metrics if metric in WITH_REFERENCE]
    if needs_real and config.reference is None and config.data is None:
        names = ", ".join(needs_real)
        raise ValueError(f"metrics: {names} compare with real images: give reference=PATH or data.kind=...")
    if config.save_reference is not None and not needs_real:
        raise ValueError("save_reference: none of the metrics looks at real images")


def main(config: Config) -> None:
    """Scores, writes the JSON file and prints a table."""
    from accelerate import Accelerator  # costs seconds to import

    accelerator = Accelerator(cpu=on_cpu())
    start = time.perf_counter()
    found = evaluate(config, accelerator)
    if accelerator.is_main_process:
        record = describe_result(config, found, time.perf_counter() - start)
        with replacing(config.out) as temporary:
            temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        sys.stdout.write(table(found.rows) + f"\nwritten to {config.out}\n")


def describe_result(config: Config, found: Evaluation, seconds: float) -> dict[str, Any]:
    """Everything that is needed to repeat the numbers."""
    scores = [{**asdict(row.score), "num_tokens": row.num_tokens} for row in found.rows]
    for score in scores:
        if not math.isfinite(score["value"]):
            score["value"] = None  # JSON has no NaN, and one score without a value must not cost the others
    packages = ("torch", "torch-fidelity", "numpy", "accelerate")
    return {
        "format": 1,
        "scores": scores,
        "seed": config.seed,
        "num": found.num,
        "weights": found.weights,
        "seconds": round(seconds, 1),
        "versions": {
            "imgtok": imgtok.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "config": to_dict(config),
    }


def table(rows: Sequence[Row]) -> str:
    """The scores as text, a line each, under the number of tokens where there are several."""
    width = max(len(row.score.name) for row in rows)
    lines = []
    for row in rows:
        tokens = "" if row.num_tokens is None else f"  {row.num_tokens:4d} tokens"
        lines.append(f"{row.score.name:{width}s}{tokens}  {row.score.value:10.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(sys.modules[__name__])
