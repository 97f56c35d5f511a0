"""What the controls of prompts cost: calls of the network, time and memory for an image, against plain drawing.

    python benchmarks/controls.py [--rounds 3] [--steps 50] [--only sdxl,gpt,xar]

Three generators of random weights, an image a call: a tiny SDXL of diffusers (8 x 8 latents), a GPT with
cross-attention (64 tokens, width 256) and an xAR with text (16 x 16 latents, width 256). Plain, each control and ToMe
with FRAP, by default and by the cheaper settings below, take turns, in the other order every second round; ratios are
of the CPU seconds of one round, and their median is printed.
Calls count evaluations of a row, so that a guided step is two; a pass with gradients costs about three. The peak is
what the process has more during a call than before it, on Linux. Prompts have two objects with a colour each; ToMe's
passes that stop early cost less with trained weights.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from protocol import peak_bytes, reset_peak

from imgtok.generators.conditioning import ConditionalGenerator, TextCrossAttention
from imgtok.generators.controls.frap import AdaptiveWeightsConfig
from imgtok.generators.controls.own import OwnScene
from imgtok.generators.controls.tome import SemanticMergeConfig
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.xar import XAR, FlowSampling, XARConfig
from imgtok.hub import controls_of
from imgtok.text.captions import Captions
from imgtok.text.parsing import parse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

PROMPT = "a red cat and a blue dog"
Controls = list[Any]
TOME = SemanticMergeConfig(binding_updates=1, entropy_passes=1, look=0.25)
FRAP = AdaptiveWeightsConfig(updates=3, look=0.25)
VARIANTS: dict[str, Controls] = {
    "plain": [], "uncontextualised": ["uncontextualised"],
    "tome": ["tome"], "frap": ["frap"], "tome,frap": ["tome", "frap"],
    "tome, cheaper": [TOME], "frap, cheaper": [FRAP], "tome,frap, cheaper": [TOME, FRAP],
}  # fmt: skip
WIDTH = 64
Draw = Callable[[Controls], Any]


def sdxl(steps: int) -> tuple[torch.nn.Module, Draw]:
    """The pipeline of the tests."""
    import tiny_diffusion

    from imgtok.generators.controls.diffusers import draw

    pipe = tiny_diffusion.sdxl()

    def drawn(controls: Controls) -> Any:
        options = {"num_inference_steps": steps, "output_type": "latent"}
        options["generator"] = torch.Generator().manual_seed(0)
        return draw(pipe, PROMPT, controls=controls, **options) if controls else pipe(PROMPT, **options)

    return pipe.unet.conv_in, drawn


def encode(prompts: Any) -> list[Captions]:
    """A random feature for each word."""
    found = []
    for prompt in prompts:
        words = [*re.finditer(r"\w+", prompt)]
        seeds = [zlib.crc32(word.group().encode()) for word in words] + [0]
        rows = torch.stack([torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        found.append(Captions.pad([rows], [torch.tensor([[*word.span()] for word in words] + [[0, 0]])]))
    return found


def ours(model: ConditionalGenerator) -> tuple[torch.nn.Module, Draw]:
    """A generator of ours; its first block stands for the network."""
    model.set_empty_caption(encode([""])[0].features[0])
    model.eval()

    def drawn(controls: Controls) -> Any:
        captions = encode([PROMPT])[0]
        if not controls:
            return model.generate(captions, seed=0, indices=[0])
        scene = OwnScene(model, [parse(PROMPT)], captions, encode, seed=0, indices=[0])
        return scene.draw(controls_of(controls))

    blocks: Any = model.blocks
    return blocks[0], drawn


def gpt(steps: int) -> tuple[torch.nn.Module, Draw]:
    """64 tokens, guided."""
    torch.manual_seed(0)
    condition = TextCrossAttention(text_width=WIDTH, text_length=16)
    sizes = {"vocab_size": 512, "num_tokens": 64, "width": 256, "depth": 4, "num_heads": 4}
    return ours(GPT(GPTConfig(**sizes, condition=condition)))  # type: ignore[arg-type]


def xar(steps: int) -> tuple[torch.nn.Module, Draw]:
    """Four cells, of as many steps of the flow."""
    torch.manual_seed(0)
    condition = TextCrossAttention(text_width=WIDTH, text_length=16)
    sampling = FlowSampling(steps=(steps,), guidance=(2.0,))
    sizes = {"latent_channels": 4, "grid": 16, "width": 256, "depth": 2, "num_heads": 4}
    return ours(XAR(XARConfig(**sizes, condition=condition, sampling=sampling)))  # type: ignore[arg-type]


GENERATORS = {"sdxl": sdxl, "gpt": gpt, "xar": xar}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="steps of the SDXL, and of each cell of the xAR")
    parser.add_argument("--only", default=",".join(GENERATORS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.stdout.write("| generator | controls | rows through the network | CPU s an image | ratio | more memory |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    for name in arguments.only.split(","):
        network, draw = GENERATORS[name](arguments.steps)
        for row in measured(network, draw, arguments.rounds):
            sys.stdout.write(f"| {name} | {row} |\n")
            sys.stdout.flush()


def measured(network: torch.nn.Module, draw: Draw, rounds: int) -> list[str]:
    """A row of the table for each variant."""
    rows, calls = dict.fromkeys(VARIANTS, 0), 0

    def count(module: torch.nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal calls
        calls += len(given[0])

    hook = network.register_forward_pre_hook(count, with_kwargs=True)
    memory = dict.fromkeys(VARIANTS, 0)
    for name, controls in VARIANTS.items():  # once to warm up, and to count
        calls = 0
        gc.collect()
        cpu = torch.device("cpu")
        before = peak_bytes(cpu) if reset_peak(cpu) else 0
        draw(controls)
        rows[name], memory[name] = calls, peak_bytes(cpu) - before
    hook.remove()
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(rounds):
        for name in list(VARIANTS) if number % 2 == 0 else list(VARIANTS)[::-1]:
            start = time.process_time()
            draw(VARIANTS[name])
            seconds[name].append(time.process_time() - start)
    found = []
    for name, own_seconds in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(own_seconds, seconds["plain"], strict=True))
        took = statistics.median(own_seconds)
        found.append(f"{name} | {rows[name]} | {took:.2f} | {ratio:.2f} | {memory[name] / 2**20:.0f} MiB")
    return found


if __name__ == "__main__":
    main()
