"""The published KARL (ShivamDuggal4/karl) as a worker: its `encode`, which decodes too, one image a call.

It was written for CUDA. On a CPU `.cuda()` leaves a tensor where it is, and `get_device()` gives the tensor's own
device in place of -1. Packages that it imports for its training are stood in for by empty ones, and where OmegaConf is
missing, by a reader of the flat YAML files that it has. No arithmetic of the peer's own is touched.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import recipe
import torch
import yaml
from karl_case import BUDGET, IMAGE_SIZE, SIZES, TOLERANCE, Case, parse_size
from protocol import Setup, autocast, serve
from torch import Tensor


def stand_in(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module
    return module


class Section(dict):
    """A mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return Section(self[name]) if isinstance(self[name], dict) else self[name]


if importlib.util.find_spec("omegaconf") is None:
    read = SimpleNamespace(load=lambda path: Section(yaml.safe_load(Path(path).read_text(encoding="utf-8"))))
    stand_in("omegaconf", OmegaConf=read)
if importlib.util.find_spec("pytorch_lightning") is None:
    stand_in("pytorch_lightning", LightningModule=torch.nn.Module)

ROOT = Path(importlib.util.find_spec("kolmogorov_tokenizers").submodule_search_locations[0]).parent  # type: ignore
os.chdir(ROOT)  # it opens files by relative paths when it is imported
sys.path.insert(0, str(ROOT / "base_tokenizers"))

import kolmogorov_tokenizers as published  # noqa: E402


class Peer:
    """The model with drawn weights."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        device = torch.device(setup.device)
        if device.type == "cpu":
            torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **rest: self
            torch.Tensor.get_device = lambda self: self.device
        else:
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.cuda.set_device(device)
        self.model = build(setup.size).to(device).eval()
        self.shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(torch.from_numpy(recipe.weight(name, tuple(value.shape), setup.seed)))
        self.draws: Mapping[str, Tensor] = {}

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        self.draws = draws

    def prepare(self, case: Case) -> Callable[[], Tensor]:
        pixels = recipe.uniform("images", (case.batch, 3, IMAGE_SIZE, IMAGE_SIZE), self.setup.seed)
        return partial(self.call, torch.from_numpy(pixels).to(self.setup.device))

    @torch.no_grad()
    def call(self, images: Tensor) -> Tensor:
        """The images that it decodes, which it does whatever is asked for."""
        with autocast(self.setup), self.given():
            found = [self.model.encode(image[None], [BUDGET], TOLERANCE)[1][0] for image in images]
        return torch.cat(found).clamp(0, 1)

    @contextmanager
    def given(self) -> Iterator[None]:
        """Within the block the noise of the autoencoder is ours, where it was given."""
        if not self.draws:
            yield
            return
        with patch.object(torch, "randn", lambda *args, **rest: self.draws["noise"]):
            yield


def build(size: str) -> Any:
    name, base, quantized = parse_size(size)
    width, depth, heads = SIZES[name]
    autoencoder = published.base_tokenizers[base](
        id=base, pretrained_ckpt_path=None, embed_dim={"vqgan": 256}.get(base, 16)
    )
    shape = {"width": width, "num_layers": depth, "num_heads": heads}
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in shape.items()}
    settings = {**published.kolmogorov_tokenizer_args[base], "quantize_latent": quantized}
    return published.kolmogorov_tokenizers[base](base_tokenizer=autoencoder, **sizes, **settings)


if __name__ == "__main__":
    serve(Peer, Case)
