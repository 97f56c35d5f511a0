"""What this machine's GPU does with models of published sizes: training steps, sampling, encoding, memory.

    python benchmarks/gpu.py --out outputs/gpu
    python benchmarks/gpu.py --device cpu --tiny --out /tmp/gpu     # tries the program out

Writes `gpu.json` and `gpu.csv`, anew after every row, so that a run that is cut short leaves what it has. Weights are
random: times do not depend on them. A row that fails says so and the next one follows.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imgtok.generators.dimension_head import StackConfig
from imgtok.generators.gpt import GPT, flextok_size
from imgtok.generators.tokenbridge import RevealSampling, TokenBridge, TokenBridgeConfig, tokenbridge_size
from imgtok.generators.xar import XAR, FlowSampling, XARConfig, xar_size
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig
from imgtok.tokenizers.karl import KARL, KARLConfig, TransformerConfig
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from imgtok.tokenizers.tokens import Tokens
from imgtok.train.loop import compile_forward


@dataclass(frozen=True)
class Row:
    """One thing to time: `make` builds the model and gives the call."""

    model: str
    what: str
    batch: int
    make: Callable[[], Callable[[], Any]]


@dataclass(frozen=True)
class Setup:
    """Where and how large."""

    device: torch.device
    tiny: bool
    repeats: int


def training(setup: Setup, build: Callable[[], Any], inputs: Callable[[], tuple[Any, ...]], compiled: bool) -> Any:
    """One optimizer step in bf16 autocast."""
    model = build().to(setup.device).train()
    if compiled:
        compile_forward(model, backend="inductor" if setup.device.type == "cuda" else "aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=setup.device.type == "cuda")
    arguments, generator = inputs(), torch.Generator().manual_seed(0)

    def step() -> None:
        with torch.autocast(setup.device.type, dtype=torch.bfloat16):
            loss = model(*arguments, generator=generator).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling(setup: Setup, build: Callable[[], Any], call: Callable[[Any], Any]) -> Any:
    """A call in bf16 autocast, as `imgtok sample precision=bf16` makes it."""
    model = build().to(setup.device).eval()

    def run() -> None:
        with torch.autocast(setup.device.type, dtype=torch.bfloat16), torch.no_grad():
            call(model)

    return run


def karl(tiny: bool) -> KARLConfig:
    """The published small one on the VQGAN of MaskGIT; its pictures are as large as FlexTok's."""
    if not tiny:
        return KARLConfig(base=MaskGITVQGANConfig())
    base = MaskGITVQGANConfig(
        latent_channels=8, vocab_size=16, block_channels=(8, 16), layers_per_block=1, norm_groups=4
    )
    trunk = TransformerConfig(width=64, depth=2, num_heads=2)
    return KARLConfig(image_size=32, base=base, encoder=trunk, decoder=trunk, max_tokens=32, budget=16)


class Models:
    """The models of all rows, and their inputs."""

    def __init__(self, setup: Setup) -> None:
        self.setup, tiny = setup, setup.tiny
        trunk = TrunkConfig(width=64, depth=2) if tiny else TrunkConfig(width=64 * 18, depth=18)
        self.gpt = replace(flextok_size(2), num_tokens=16, vocab_size=1000) if tiny else flextok_size(12)
        self.xar = XARConfig(width=64, depth=1, num_heads=2) if tiny else xar_size("B")
        self.flextok = FlexTokConfig(image_size=32 if tiny else 256, patch_size=8, encoder=trunk, decoder=trunk)
        self.karl = karl(tiny)
        self.steps = 2 if tiny else 25
        stack = StackConfig(width=64, depth=1, num_heads=2)
        self.tokenbridge = (
            TokenBridgeConfig(encoder=stack, decoder=stack, head=stack, head_share=0.05)
            if tiny
            else tokenbridge_size("L")
        )
        self.reveal = RevealSampling(iterations=2 if tiny else 64)
        self.flow = FlowSampling(steps=(2 if tiny else 40,), guidance=(2.7,))

    def labels(self, count: int) -> Tensor:
        return torch.arange(count, device=self.setup.device) % 1000

    def ids(self, count: int, columns: int) -> Tokens:
        return Tokens.full(torch.randint(self.gpt.vocab_size, (count, columns), device=self.setup.device))

    def pictures(self, count: int) -> Tensor:
        side = self.flextok.image_size
        return torch.randn(count, 3, side, side, device=self.setup.device).clamp(-1, 1)

    def latents(self, count: int) -> Tensor:
        return torch.randn(count, 16, 16, 16, device=self.setup.device)

    def sampling(self, batch: int) -> Iterator[Row]:
        """Drawing, decoding and encoding at one batch size."""
        labels, indices = self.labels(batch), range(batch)
        few, pictures = self.ids(batch, 16), self.pictures(batch)
        slots = torch.arange(min(32, self.karl.budget), device=self.setup.device).expand(batch, -1)
        lengths = torch.full((batch,), slots.shape[1], device=self.setup.device)
        kept = Tokens(torch.zeros_like(slots), lengths, slots)
        decoding = FlexTokDecoding(steps=self.steps, guidance=7.5)
        calls = {
            ("gpt", f"sample {self.gpt.num_tokens} ids"): lambda m: m.generate(labels, seed=0, indices=indices),
            ("xar", "sample"): lambda m: m.generate(labels, seed=0, indices=indices, sampling=self.flow),
            ("tokenbridge", f"sample, {self.reveal.iterations} iterations"): lambda m: m.generate(
                labels, seed=0, indices=indices, sampling=self.reveal
            ),
            ("flextok", f"decode 16 ids, {self.steps} steps"): lambda m: m.decode(few, decoding=decoding),
            ("flextok", "encode"): lambda m: m.encode(pictures),
            ("karl", f"encode, budget {self.karl.budget}"): lambda m: m.encode(pictures),
            ("karl", f"decode {slots.shape[1]} tokens"): lambda m: m.decode(kept),
        }
        for (name, what), call in calls.items():
            yield Row(name, what, batch, partial(sampling, self.setup, self.builder(name), call))

    def training(self, batch: int, *, compiled: bool) -> Iterator[Row]:
        """A training step of each."""
        inputs = {
            "gpt": lambda: (self.ids(batch, self.gpt.num_tokens), self.labels(batch)),
            "xar": lambda: (self.latents(batch), self.labels(batch)),
            "tokenbridge": lambda: (self.latents(batch), self.labels(batch)),
            "flextok": lambda: (self.pictures(batch),),
        }
        for name, make in inputs.items():
            what = "compiled training step" if compiled else "training step"
            yield Row(name, what, batch, partial(training, self.setup, self.builder(name), make, compiled))

    def builder(self, name: str) -> Callable[[], Any]:
        makers: dict[str, Callable[[], Any]] = {
            "gpt": lambda: GPT(self.gpt),
            "xar": lambda: XAR(self.xar),
            "tokenbridge": lambda: TokenBridge(self.tokenbridge),
            "flextok": lambda: FlexTok(self.flextok),
            "karl": lambda: KARL(self.karl),
        }
        return makers[name]


def rows(setup: Setup) -> Iterator[Row]:
    """The cheapest first, so that a short lease has something of everything."""
    models = Models(setup)
    for batch in (1, 4) if setup.tiny else (1, 64):
        yield from models.sampling(batch)
    for compiled in (False, True):
        yield from models.training(4 if setup.tiny else 64, compiled=compiled)


def measure(row: Row, setup: Setup) -> dict[str, Any]:
    """Median seconds of `repeats` calls after two to warm up, and the peak of memory."""
    on_gpu = setup.device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    call = row.make()
    begun = time.perf_counter()
    call()
    wait()
    first = time.perf_counter() - begun
    call()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(setup.repeats):
        wait()
        begun = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - begun)
    median = statistics.median(seconds)
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    found = {"seconds": median, "images_per_second": row.batch / median, "first_seconds": first, "peak_mib": peak}
    return found | {"least": min(seconds), "most": max(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights, to try the program out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=300.0, help="no row is begun after so many")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"))
    options = parser.parse_args()
    setup = Setup(torch.device(options.device), options.tiny, options.repeats)
    options.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if setup.device.type == "cuda" else "cpu"
    head = {"device": name, "torch": torch.__version__, "tiny": setup.tiny}
    begun, table = time.monotonic(), []
    for row in rows(setup):
        facts: dict[str, Any] = {"model": row.model, "what": row.what, "batch": row.batch}
        if time.monotonic() - begun > options.seconds:
            facts["error"] = "no time left"
        else:
            try:
                facts |= measure(row, setup)
            except Exception as error:
                facts["error"] = f"{type(error).__name__}: {str(error)[:200]}"
                traceback.print_exc()
        print(facts, flush=True)
        table.append(facts)
        write(options.out, head, table)
        gc.collect()
        torch.compiler.reset()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()


def write(folder: Path, head: dict[str, Any], table: list[dict[str, Any]]) -> None:
    """The table so far, as JSON and CSV."""
    (folder / "gpu.json").write_text(json.dumps(head | {"rows": table}, indent=1) + "\n")
    columns = list(dict.fromkeys(key for facts in table for key in facts))
    with (folder / "gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
