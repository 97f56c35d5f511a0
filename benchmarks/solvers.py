"""How far a decoded image is from the flow's limit after N calls: Euler against two-step Adams-Bashforth.

    python benchmarks/solvers.py outputs/quickstart/tokenizer/final [--data shapes|FILE.parquet] [--guidance 1 2 7.5]

For each solver and number of calls: the RMS distance of the pixels (range 2) to a walk of 256 second-order steps from
the same noise, and the PSNR to the original. Both solvers cost one call a step (two under guidance), so the table
compares them at equal calls. A Markdown table goes to standard output.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import imgtok
from imgtok.data.images import DataConfig, ParquetConfig, open_images
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.flextok import FlexTok

LIMIT_STEPS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="model folder of a trained FlexTok")
    parser.add_argument("--data", default="shapes", help="shapes, or a Parquet file of images")
    parser.add_argument("--num", type=int, default=64, help="held-out images")
    parser.add_argument("--tokens", type=int, default=None, help="tokens kept; all by default")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 25, 50])
    arguments = parser.parse_args()
    model = imgtok.load(arguments.tokenizer, expect=FlexTok)
    data: DataConfig = ShapesConfig(textures=("solid",), sizes=("medium", "large"), scale=1.3)
    if arguments.data != "shapes":
        data = ParquetConfig(path=arguments.data)
    source = open_images(data, model.image_size, split="held_out", held_out_fraction=0.1)
    originals = source.batch(range(arguments.num)).images
    tokens = model.encode(originals, num_tokens=arguments.tokens)
    print("| guidance | calls | euler: RMS to the limit | adams: RMS to the limit | euler PSNR | adams PSNR |")
    print("|---|---|---|---|---|---|")
    for guidance in arguments.guidance:
        own = replace(model.config.decoding, guidance=guidance)
        limit = model.decode(tokens, decoding=replace(own, steps=LIMIT_STEPS, solver="adams"))
        for steps in arguments.steps:
            euler = model.decode(tokens, decoding=replace(own, steps=steps, solver="euler"))
            adams = model.decode(tokens, decoding=replace(own, steps=steps, solver="adams"))
            distances = " | ".join(f"{(found - limit).square().mean().sqrt():.4f}" for found in (euler, adams))
            psnrs = " | ".join(f"{psnr(found, originals):.2f}" for found in (euler, adams))
            print(f"| {guidance:g} | {steps} | {distances} | {psnrs} |", flush=True)


def psnr(images: torch.Tensor, originals: torch.Tensor) -> float:
    """Mean over images of the PSNR in dB; the range is 2."""
    errors = (images - originals).square().flatten(1).mean(dim=1)
    return float((10 * torch.log10(4 / errors)).mean())


if __name__ == "__main__":
    main()
