"""LlamaGen's own GPT (FoundationVision/LlamaGen) as a worker: its `generate`, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import recipe
import torch
from gpt_case import CLASSES, VOCABULARY, Case, Shape
from protocol import Setup, serve
from torch import Tensor

from autoregressive.models import generate as published  # isort: skip
from autoregressive.models.gpt import ModelArgs, Transformer  # isort: skip


class Peer:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        shape = Shape.of(setup.size)
        if setup.device != "cpu":
            torch.backends.cuda.matmul.allow_tf32 = True
        arguments = ModelArgs(
            dim=shape.width,
            n_layer=shape.depth,
            n_head=shape.heads,
            vocab_size=VOCABULARY,
            num_classes=CLASSES,
            block_size=shape.tokens,
        )
        self.model = Transformer(arguments).eval()
        self.shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        if self.shapes != shape.parameters():
            raise ValueError("this checkout of LlamaGen has other parameters than the commit that is asked for")
        state = self.model.state_dict()
        for name, sizes in self.shapes.items():
            state[name].copy_(torch.from_numpy(recipe.weight(name, tuple(sizes), setup.seed)))
        self.model.to(setup.device, torch.bfloat16 if setup.dtype == "bf16" else torch.float32)

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        if draws:
            raise ValueError("LlamaGen draws by torch.multinomial")

    def prepare(self, case: Case) -> Callable[[], Tensor]:
        labels = torch.from_numpy(recipe.integers("labels", (case.batch,), CLASSES, self.setup.seed))
        torch.manual_seed(0)
        return partial(
            published.generate,
            self.model,
            labels.to(self.setup.device),
            case.tokens,
            cfg_scale=case.guidance,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            sample_logits=not case.greedy,
        )


if __name__ == "__main__":
    serve(Peer, Case)
