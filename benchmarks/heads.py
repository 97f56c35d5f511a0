"""Four ways from the state of a GPT to an id, trained on the same cached tokens for as many seconds of CPU.

    python benchmarks/heads.py TOKENS [--seconds 30]

TOKENS is a folder of `imgtok cache`, full sequences of a FlexTok with four levels of 8 (`flextok-cifar10.yaml`),
of 10 classes. A row each for one row an id, shared digits, and the head over two and over four digits:
parameters, steps, nats a token of the last 2,000 images, unseen in training, and CPU seconds for 16 guided images.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from imgtok.generators.conditioning import ClassSlot
from imgtok.generators.digits import DigitsConfig
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.tokenizers.tokens import Tokens

HELD_OUT, BATCH, RATE = 2000, 32, 2e-3
LEVELS = (8, 8, 8, 8)


def variants(num_tokens: int) -> dict[str, GPTConfig]:
    """The same GPT with each of the four."""

    def head(*digits: int) -> DigitsConfig:
        return DigitsConfig(digits=digits, width=96, depth=2, num_heads=4)

    plain = GPTConfig(
        vocab_size=4096, num_tokens=num_tokens, width=128, depth=3, num_heads=4, condition=ClassSlot(num_classes=10)
    )
    return {
        "one row an id": plain,
        "shared digits": dataclasses.replace(plain, levels=LEVELS),
        "head, 2 digits of 64": dataclasses.replace(plain, head=head(64, 64)),
        "head, 4 digits of 8": dataclasses.replace(plain, head=head(*LEVELS)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path, help="folder of imgtok cache")
    parser.add_argument("--seconds", type=float, default=30, help="CPU time of each training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shards = [load_file(path) for path in sorted(arguments.tokens.glob("*.safetensors"))]
    labels = torch.cat([shard["labels"].long() for shard in shards])
    ids = torch.cat([shard["ids"].long() for shard in shards]).view(len(labels), -1)
    sys.stdout.write(
        "| | parameters | steps | nats a token, held out | CPU s for 16 guided images |\n|---|---|---|---|---|\n"
    )
    for name, config in variants(ids.shape[1]).items():
        torch.manual_seed(0)
        model = GPT(config)
        steps = train(model, ids[:-HELD_OUT], labels[:-HELD_OUT], arguments.seconds)
        nats = held_out(model.eval(), ids[-HELD_OUT:], labels[-HELD_OUT:])
        start = time.process_time()
        model.generate(torch.arange(16) % 10, seed=0, indices=range(16))
        spent, size = time.process_time() - start, sum(each.numel() for each in model.parameters())
        sys.stdout.write(f"| {name} | {size / 1e6:.2f} M | {steps} | {nats:.2f} | {spent:.2f} |\n")
        sys.stdout.flush()


def train(model: GPT, ids: Tensor, labels: Tensor, seconds: float) -> int:
    """The number of steps that fit; the learning rate falls to 0 with the time that is left."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    generator, steps, start = torch.Generator().manual_seed(1), 0, time.process_time()
    while (share := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (steps + 1) / 50) * min(1, (1 - share) / 0.7)
        rows = torch.randint(0, len(ids), (BATCH,), generator=generator)
        model(Tokens.full(ids[rows]), labels[rows], generator=generator).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


@torch.no_grad()
def held_out(model: GPT, ids: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy of a token in nats."""
    parts = zip(ids.split(250), labels.split(250), strict=True)
    return sum(float(model.forward_drawn(Tokens.full(i), c).parts["cross_entropy"]) * len(c) for i, c in parts) / len(
        ids
    )


if __name__ == "__main__":
    main()
