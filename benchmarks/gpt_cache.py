"""Sampling with the key/value cache against recomputing the prefix (the peer), interleaved.

    python benchmarks/gpt_cache.py [--tokens 64] [--batch 16] [--rounds 5]

Prints seconds of each and the ratio, pair by pair; the ids of both are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from imgtok.generators.gpt import GPT, GPTConfig, SamplingConfig


def seconds(model: GPT, batch: int, cached: bool) -> tuple[float, torch.Tensor]:
    """Wall time of one call of `generate`, and its ids."""
    labels = torch.arange(batch) % model.config.num_classes
    started = time.perf_counter()
    ids = model.generate(labels, seed=0, indices=range(batch), sampling=SamplingConfig(guidance=1.5), cached=cached)
    return time.perf_counter() - started, ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=1024, num_tokens=arguments.tokens, width=256, depth=6, num_heads=8)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.05)  # a head of zeros would draw the same ids whatever comes before
    ratios = []
    for round_number in range(arguments.rounds + 1):
        with_cache, ids = seconds(model, arguments.batch, cached=True)
        without, same = seconds(model, arguments.batch, cached=False)
        if round_number:  # the first round warms up
            ratios.append(without / with_cache)
            print(f"cached {with_cache:6.3f} s  recomputed {without:6.3f} s  ratio {ratios[-1]:.2f}")
        assert torch.equal(ids, same), "the cache changed the ids"
    print(f"median ratio {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})")


if __name__ == "__main__":
    main()
