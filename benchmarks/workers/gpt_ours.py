"""Our GPT as a worker, with the peer's weights: drawn under their published names, put where ours has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import recipe
import torch
from drawn import fill
from gpt_case import CLASSES, VOCABULARY, Case, Shape
from protocol import Setup, serve
from torch import Tensor

from imgtok.generators.conditioning import ClassSlot
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.published.llamagen import published_places
from imgtok.generators.sampling import TokenSampling


class Ours:
    """The model; weights of 16 bits where that is asked for, as LlamaGen's own program has them."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.shapes = setup, setup.shapes
        if setup.device != "cpu":
            torch.backends.cuda.matmul.allow_tf32 = True  # as the published program has it
        self.model = GPT(configuration(setup.size)).eval()
        state = self.model.state_dict()
        fill(state, published_places(state), setup.shapes, setup.seed, lambda name, value: value)
        self.model.to(setup.device, torch.bfloat16 if setup.dtype == "bf16" else torch.float32)
        if setup.compile:
            for block in self.model.blocks:
                block.compile()

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        if draws:
            raise ValueError("our draws depend on (seed, index) alone")

    def prepare(self, case: Case) -> Callable[[], Tensor]:
        labels = torch.from_numpy(recipe.integers("labels", (case.batch,), CLASSES, self.setup.seed))
        return partial(self.sample, labels.to(self.setup.device), case)

    def sample(self, labels: Tensor, case: Case) -> Tensor:
        how = TokenSampling(guidance=case.guidance, temperature=0.0 if case.greedy else 1.0)
        drawn = self.model.generate(labels, seed=0, indices=range(case.batch), sampling=how, num_tokens=case.tokens)
        return drawn.ids


def configuration(size: str) -> GPTConfig:
    shape = Shape.of(size)
    return GPTConfig(
        vocab_size=VOCABULARY,
        num_tokens=shape.tokens,
        width=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        positions="rotary_2d",
        condition=ClassSlot(num_classes=CLASSES),
    )


if __name__ == "__main__":
    serve(Ours, Case)
