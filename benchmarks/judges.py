"""What the scores of EfficientNet-Lite0 say of damaged images: JPEG, blur, and few pixels, beside the clean ones.

    python benchmarks/judges.py --data imagenet-sample-256.tar [--num 1000] [--out outputs/judges]

Writes the clean images and a copy for each damage as .npz with their labels, runs `imgtok evaluate` on each against the
clean ones, in a process of its own, and prints a Markdown table: the scores, the images a second (both sides and all
scores included), the seconds of a processor, which other programs disturb less, and the largest memory. The labels are
to be ImageNet's 1000 classes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from imgtok.data.images import TarConfig, open_images
from imgtok.pictures import to_uint8
from imgtok.randomness import spread

METRICS = ("fd_lite0", "kd_lite0", "precision_recall_lite0", "top1_lite0", "perceptual_lite0")
KEYS = ("fd_lite0", "kd_lite0", "precision_lite0", "recall_lite0", "top1_lite0", "top5_lite0", "perceptual_lite0")


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=10)
    return Image.open(file).convert("RGB")


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(2))


def through(pixels: int) -> Callable[[Image.Image], Image.Image]:
    """Down to so many pixels a side and up again."""

    def damage(image: Image.Image) -> Image.Image:
        small = image.resize((pixels, pixels), Image.Resampling.BICUBIC)
        return small.resize(image.size, Image.Resampling.BICUBIC)

    return damage


DAMAGES: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "clean": lambda image: image,
    "jpeg-10": jpeg,
    "blur-2": blurred,
    "through-64px": through(64),
    "through-32px": through(32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="webdataset of images with their ImageNet classes")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("outputs/judges"))
    parser.add_argument("--metrics", nargs="+", default=METRICS)
    parser.add_argument("--only", nargs="+", default=list(DAMAGES), choices=list(DAMAGES))
    arguments = parser.parse_args()
    write(arguments.data, arguments.size, arguments.num, arguments.out)
    sys.stdout.write(f"| images | {' | '.join(KEYS)} | images/s | CPU s | GB |\n|{'---|' * (len(KEYS) + 4)}\n")
    for name in arguments.only:
        record, cpu, peak = evaluate(arguments.out, name, arguments.metrics)
        values = {score["key"]: score["value"] for score in record["scores"]}
        cells = [f"{values[key]:.4g}" if key in values else "" for key in KEYS]
        speed = record["protocol"]["scored"] / record["seconds"]
        sys.stdout.write(f"| {name} | {' | '.join(cells)} | {speed:.1f} | {cpu:.0f} | {peak:.1f} |\n")
        sys.stdout.flush()


def write(data: Path, size: int, num: int, out: Path) -> None:
    """An .npz for each damage, of images from all over the data."""
    out.mkdir(parents=True, exist_ok=True)
    source = open_images(TarConfig(path=str(data)), size, split="train", held_out_fraction=0.0)
    batch = source.batch(spread(min(num, len(source)), len(source)).tolist())
    pixels = to_uint8(batch.images).permute(0, 2, 3, 1).numpy()
    for name, damage in DAMAGES.items():
        damaged = np.stack([np.asarray(damage(Image.fromarray(image))) for image in pixels])
        np.savez(out / f"{name}.npz", damaged, batch.labels.numpy())


def evaluate(out: Path, name: str, metrics: list[str]) -> tuple[dict, float, float]:
    """The record of an evaluation against the clean images; CPU seconds and the most memory (GB) of its process."""
    record = out / f"{name}.json"
    for suffix in (".json", ".csv"):  # scores of another request would not be replaced
        record.with_suffix(suffix).unlink(missing_ok=True)
    words = [f"images={out / name}.npz", f"originals={out / 'clean.npz'}", f"metrics=[{','.join(metrics)}]"]
    command = [sys.executable, "-m", "imgtok", "evaluate", *words, f"out={record}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = usage.ru_utime + usage.ru_stime
    return json.loads(record.read_text(encoding="utf-8")), seconds, usage.ru_maxrss / 1024**2


if __name__ == "__main__":
    main()
