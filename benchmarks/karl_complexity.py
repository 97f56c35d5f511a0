"""Does the number of tokens that an image takes follow what there is to see? Shapes with 1 to 4 objects, and noise.

    python benchmarks/karl_complexity.py MODEL [--num 1000] [--eps 0.015,0.02] [--scenes '{"sizes": ["large"]}']

For each tolerance: the mean number of tokens of held-out scenes by their number of objects, Spearman's rank correlation
of both, the share of the scenes whose error is above the tolerance by more than 0, 0.01 and 0.02 (of all, and of those
that dropped tokens), and the number of tokens of images of uniform and of normal noise, which can spare none.
The scenes are those of the split `val`, which no training shows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import imgtok
from imgtok.config import from_dict
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.base import Rate, Tokenizer

BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a tokenizer that chooses its number of tokens by an error")
    parser.add_argument("--num", type=int, default=1000, help="scenes")
    parser.add_argument("--eps", default="0.015,0.02,0.03", help="tolerances")
    parser.add_argument("--scenes", type=json.loads, default={"textures": ["solid"]}, help="profile of the shapes")
    arguments = parser.parse_args()
    model: Tokenizer = imgtok.load(arguments.model)
    tolerances = [float(text) for text in arguments.eps.split(",")]
    profile = {"kind": "shapes", "mode": "text", **arguments.scenes, "split": "val", "num_images": arguments.num}
    shapes = ShapesDataset(from_dict(ShapesConfig, profile), model.image_size)
    objects = shapes.scenes(range(arguments.num)).count
    scenes = [shapes.batch(range(i, min(i + BATCH, arguments.num)))[0] for i in range(0, arguments.num, BATCH)]
    rows = [rates(model, scenes, tolerance) for tolerance in tolerances]
    heads = ["eps", *(f"{n} object{'s'[: n > 1]}" for n in range(1, 5)), "all", "rank correlation", "> eps", "+0.01"]
    heads += ["+0.02", "dropped, +0.02", "noise"]
    sys.stdout.write(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
    noise = [each.clamp(-1, 1) for each in noises(model.image_size)]
    for tolerance, (counts, errors) in zip(tolerances, rows, strict=True):
        means = [counts[objects == n].mean() for n in range(1, 5)]
        over = [float((errors > tolerance + margin).mean()) for margin in (0, 0.01, 0.02)]
        some = counts < budget(model)
        missed = float((errors[some] > tolerance + 0.02).mean()) if some.any() else float("nan")
        noisy, _ = rates(model, noise, tolerance)
        cells = [f"{tolerance:g}", *(f"{mean:.1f}" for mean in means), f"{counts.mean():.1f}"]
        cells += [f"{spearman(counts, objects):.2f}", *(f"{share:.1%}" for share in [*over, missed])]
        sys.stdout.write(f"| {' | '.join(cells)} | {noisy.min():.0f} to {noisy.max():.0f} |\n")


def rates(model: Tokenizer, batches: list[Tensor], tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of tokens and mean absolute errors of pixels in [0, 1], one each an image."""
    counts, errors = [], []
    for images in batches:
        tokens = model.encode(images, rate=Rate(budget(model), tolerance))
        counts.append(tokens.lengths)
        errors.append((model.decode(tokens) - images).abs().mean(dim=(1, 2, 3)) / 2)
    return torch.cat(counts).numpy(), torch.cat(errors).numpy()


def budget(model: Tokenizer) -> int:
    """The most tokens of an image in the rates that the model shows."""
    return model.rates()[-1].num_tokens


def noises(size: int) -> Iterator[Tensor]:
    """A batch of each kind of noise."""
    generator = torch.Generator().manual_seed(0)
    yield torch.rand(BATCH, 3, size, size, generator=generator) * 2 - 1
    yield torch.randn(BATCH, 3, size, size, generator=generator) * 0.5


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The rank correlation; equal values share the mean of their ranks."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


if __name__ == "__main__":
    main()
