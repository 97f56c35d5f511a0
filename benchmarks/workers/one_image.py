"""Draws images with small models, of random weights, through the pipeline of whichever imgtok stands on the path.

A command is a line of JSON on standard input, `{"do": "draw", "model": ..., "num": ..., "exact": ...}`; the answer is
one on standard output, with wall and CPU seconds. Both layouts of the package are known: until 55e4d35 the generators
were a package of their own, images were always padded and one thread computed them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

try:
    from imgtok.generators import pipeline as new
except ImportError:
    new = None

Draw = Callable[[int], Any]
GPT = {"vocab_size": 1024, "num_tokens": 16, "width": 128, "depth": 4, "num_heads": 4, "mlp_multiple": 32}
TRUNKS = {"encoder": {"width": 128, "depth": 3, "head_dim": 32}, "decoder": {"width": 128, "depth": 4, "head_dim": 32}}
FLEXTOK = {"image_size": 32, "patch_size": 1, "num_registers": 16, "levels": (4, 4, 4, 4, 4)}
XAR = {"grid": 4, "width": 128, "depth": 2, "num_heads": 4}
HOW = {"steps": (12,), "guidance": (2.0,), "solver": "adams"}
"""The quickstart's generator and tokenizer, and the xAR of configs/generator/xar-shapes.yaml."""


@cache
def drawing(model: str, exact: bool) -> Draw:
    """How `num` images are drawn."""
    torch.manual_seed(0)
    return (todays if new else formers)(model, exact)


def todays(model: str, exact: bool) -> Draw:
    from imgtok.generators import gpt, xar
    from imgtok.generators.conditioning import ClassModulation, ClassSlot
    from imgtok.generators.entities import Cells
    from imgtok.generators.sampling import TokenSampling
    from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig
    from imgtok.tokenizers.vae import load_vae

    vae = load_vae("shapes32")
    if model == "gpt":
        trunks = {name: TrunkConfig(**size) for name, size in TRUNKS.items()}
        decoding = FlexTokDecoding(steps=4, guidance=2.0)
        decoder = FlexTok(FlexTokConfig(**FLEXTOK, **trunks, vae=vae.config, decoding=decoding))
        how = TokenSampling(guidance=2.0, temperature=0.8)
        generator = gpt.GPT(gpt.GPTConfig(**GPT, condition=ClassSlot(num_classes=64), sampling=how))
    else:
        condition, channels = ClassModulation(num_classes=64), vae.config.latent_channels
        cells = Cells(height=2, width=2)
        config = xar.XARConfig(**XAR, latent_channels=channels, condition=condition, entities=cells,
                           sampling=xar.FlowSampling(**HOW))  # fmt: skip
        generator, decoder = xar.XAR(config), vae
    pipe = new.Pipeline(generator, decoder, device="cpu", exact=exact)
    return lambda num: pipe(classes=[3] * num)


def formers(model: str, exact: bool) -> Draw:
    from imgtok.flextok import FlexTok, FlexTokConfig, TrunkConfig
    from imgtok.vae import load_vae
    from sample.pipeline import DecodeSettings, LatentPipeline, TokenPipeline

    from generators import gpt, xar
    from generators.entities import Cells

    vae, device = load_vae("shapes32"), torch.device("cpu")
    if model == "gpt":
        trunks = {name: TrunkConfig(**size) for name, size in TRUNKS.items()}
        decoder = FlexTok(FlexTokConfig(**FLEXTOK, **trunks, vae=vae.config, decode_steps=4, decode_guidance=2.0))
        pipe: Any = TokenPipeline(gpt.GPT(gpt.GPTConfig(**GPT, num_classes=64)), decoder, device)
        how: Any = gpt.SamplingConfig(guidance=2.0, temperature=0.8)
    else:
        cells, channels = Cells(height=2, width=2), vae.config.latent_channels
        config = xar.XARConfig(**XAR, latent_channels=channels, num_classes=64, entities=cells,
                           sampling=xar.FlowSampling(**HOW))  # fmt: skip
        pipe, how = LatentPipeline(xar.XAR(config), vae, device), xar.FlowSampling()
    return lambda num: pipe.images(range(num), [3] * num, seed=0, sampling=how, decode=DecodeSettings())


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        draw = drawing(asked["model"], asked["exact"])
        cpu, wall = time.process_time(), time.perf_counter()
        found = draw(asked["num"])
        answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "num": len(found)}
        print(json.dumps(answer | {"threads": torch.get_num_threads()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
