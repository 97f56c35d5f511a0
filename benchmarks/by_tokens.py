"""Quality against the mean number of tokens, of several tokenizers in one figure.

    imgtok evaluate tokenizer=KARL/final rates=4,8,16,32,32@0.12,32@0.1 metrics=psnr,fd_lite0,top1_probe out=karl.json
    imgtok evaluate tokenizer=FLEXTOK/final rates=4,8,16,32 metrics=psnr,fd_lite0,top1_probe out=flextok.json
    python benchmarks/by_tokens.py KARL=karl.csv FlexTok=flextok.csv --out by-tokens.png

Reads the tables that `imgtok evaluate` writes beside its results. Rates with a tolerance, where each image has a number
of tokens of its own, and rates with a fixed number are two lines. Prints both as Markdown.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

SCORES = {
    "psnr": "PSNR, dB (higher is better)",
    "fd_lite0": "Fréchet distance in EfficientNet-Lite0 (lower is better)",
    "top1_probe": "class read by the probe (higher is better)",
}
Rows = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="NAME=CSV", help="tables of the same images")
    parser.add_argument("--out", type=Path, default=Path("by-tokens.png"))
    arguments = parser.parse_args()
    lines: dict[str, Rows] = {}
    for given in arguments.tables:
        name, _, path = given.partition("=")
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        lines[f"{name}, fixed number"] = [row for row in rows if "@" not in row["rate"]]
        lines[f"{name}, number by error"] = [row for row in rows if "@" in row["rate"]]
    lines = {name: sorted(rows, key=lambda row: float(row["tokens"])) for name, rows in lines.items() if rows}
    draw(lines, arguments.out)
    keys = ["rate", "tokens", *SCORES]
    sys.stdout.write(f"| tokenizer | {' | '.join(keys)} |\n|{'---|' * (len(keys) + 1)}\n")
    for name, rows in lines.items():
        for row in rows:
            sys.stdout.write(f"| {name} | {' | '.join(row.get(key, '') for key in keys)} |\n")


def draw(lines: dict[str, Rows], out: Path) -> None:
    figure, panels = plt.subplots(1, len(SCORES), figsize=(4.2 * len(SCORES), 3.4), layout="constrained")
    for axes, (key, title) in zip(panels, SCORES.items(), strict=True):
        for name, rows in lines.items():
            found = [(float(row["tokens"]), float(row[key])) for row in rows if row.get(key)]
            style = "o--" if name.endswith("by error") else "o-"
            axes.plot(*zip(*found, strict=True), style, label=name, markersize=4)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("tokens an image, mean")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
