"""The published KARL (ShivamDuggal4/karl) as a worker: its `encode`, which decodes too, one image a call, and the
generator's step of its second stage's training loop.

It was written for CUDA. On a CPU `.cuda()` leaves a tensor where it is, and `get_device()` gives the tensor's own
device in place of -1. Packages that it imports for its training are stood in for by empty ones, and where OmegaConf is
missing, by a reader of the flat YAML files that it has. VGG16 comes without weights, since all are drawn. No arithmetic
of the peer's own is touched, but the dropout of its LPIPS, which draws, is turned off, and where fewer tokens are to be
kept its threshold is moved.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import recipe
import torch
import torchvision
import yaml
from karl_case import (
    BETAS,
    BUDGET,
    CLIP,
    DECAY,
    EMA_DECAY,
    JUDGES,
    RATE,
    SIZES,
    SLOTS,
    TOLERANCE,
    WEIGHT,
    Case,
    image_size,
    levels,
    parse_size,
    patch_size,
    training,
)  # fmt: skip
from protocol import Setup, autocast, serve
from stand_ins import stand_in, use
from torch import Tensor


class Section(dict):
    """A mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        return Section(self[name]) if isinstance(self[name], dict) else self[name]


if importlib.util.find_spec("omegaconf") is None:
    read = SimpleNamespace(load=lambda path: Section(yaml.safe_load(Path(path).read_text(encoding="utf-8"))))
    stand_in("omegaconf", OmegaConf=read)
if importlib.util.find_spec("pytorch_lightning") is None:
    stand_in("pytorch_lightning", LightningModule=torch.nn.Module)

for name in ("wandb", "requests"):
    if importlib.util.find_spec(name) is None:
        stand_in(name)
vgg16 = torchvision.models.vgg16
torchvision.models.vgg16 = lambda weights: vgg16(weights=None)
ROOT = Path(importlib.util.find_spec("kolmogorov_tokenizers").submodule_search_locations[0]).parent  # type: ignore
os.chdir(ROOT)  # it opens files by relative paths when it is imported
sys.path.insert(0, str(ROOT / "base_tokenizers"))

import kolmogorov_tokenizers as published  # noqa: E402
from base_tokenizers.taming.models import vqgan  # noqa: E402
from engines.utils import update_ema  # noqa: E402
from utils.misc import add_weight_decay  # noqa: E402


class Peer:
    """The model with drawn weights."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        device = torch.device(setup.device)
        use(device)
        if device.type == "cpu":
            torch.Tensor.get_device = lambda self: self.device
        self.model = build(setup.size).to(device).eval()
        self.shapes = {name: list(value.shape) for name, value in self.model.named_parameters()}
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(torch.from_numpy(recipe.weight(name, tuple(value.shape), setup.seed)))
        self.draws: Mapping[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}
        self.thresholds: dict[int, float] = {}
        self.model.halting_mlp.register_forward_hook(self.watch("probabilities", torch.sigmoid))
        self.model.pre_quantizer_mlp.register_forward_hook(self.watch("tokens"))
        if self.model.quantize_latent:
            ids = self.watch("tokens", lambda out: out[1]["min_encoding_indices"])
            self.model.quantize.register_forward_hook(ids)
        if training(setup.size):
            self.model.train()
            self.model.all_token_counts = torch.tensor([SLOTS])
            self.model.logged_min_loss_values_prob = torch.nn.functional.one_hot(torch.tensor(0), 19).float()
            for module in self.model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            self.average = deepcopy(self.model)
            groups = add_weight_decay(self.model, DECAY)
            self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS)

    def watch(self, name: str, of: Callable[[Any], Tensor] = lambda out: out) -> Callable[..., None]:
        """A hook that keeps what a module gives."""

        def hook(module: torch.nn.Module, inputs: Any, out: Any) -> None:
            self.seen[name] = of(out).detach()

        return hook

    def start_from(self, draws: Mapping[str, Tensor]) -> None:
        self.draws = draws

    def prepare(self, case: Case) -> Callable[[], Tensor]:
        side = image_size(self.setup.size)
        pixels = recipe.uniform("images", (case.batch, 3, side, side), self.setup.seed)
        images = torch.from_numpy(pixels).to(self.setup.device)
        if case.what == "train":
            return partial(self.step, images)
        vars(self.model).pop("prepare_decoder_latents", None)
        if case.kept is not None:
            threshold = self.thresholds.get(case.kept)
            if threshold is None:
                self.call(images[:1], case)
                threshold = float(self.seen["probabilities"].flatten().sort().values[case.kept - 1])
                self.thresholds[case.kept] = threshold
            self.model.prepare_decoder_latents = partial(self.model.prepare_decoder_latents, halting_prob=threshold)
        return partial(self.call, images, case)

    @torch.no_grad()
    def call(self, images: Tensor, case: Case) -> Tensor:
        """The images that it decodes, which it does whatever is asked for; if that is tokens, those of the last one."""
        with autocast(self.setup), self.given():
            found = [self.model.encode(image[None], [BUDGET], TOLERANCE)[1][0] for image in images]
        return torch.cat(found).clamp(0, 1) if case.what == "both" else self.seen["tokens"]

    def step(self, images: Tensor) -> Tensor:
        """What its loop does with a batch, at rate 0 as its schedule begins: the loss and the norm of the gradient."""
        with autocast(self.setup):
            loss, _ = self.model(images, epoch=50, gan_optimizer_idx=0, gan_loss_weight=WEIGHT)
        loss.backward()
        trained = [value for name, value in self.model.named_parameters() if JUDGES not in name]
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_ema(self.average, self.model, EMA_DECAY)
        return torch.stack([loss.detach(), norm])

    @contextmanager
    def given(self) -> Iterator[None]:
        """Within the block the noise of the autoencoder is ours, where it was given."""
        if not self.draws:
            yield
            return
        with patch.object(torch, "randn", lambda *args, **rest: self.draws["noise"]):
            yield


def reshaped(part: Any, widths: tuple[int, ...], **settings: Any) -> Any:
    """The VQGAN's encoder or decoder with other levels than its file says."""
    return part(**{**settings, "ch_mult": widths})


def build(size: str) -> Any:
    name, base, quantized = parse_size(size)
    width, depth, heads = SIZES[name]
    encoder, decoder = vqgan.Encoder, vqgan.Decoder
    vqgan.Encoder, vqgan.Decoder = (partial(reshaped, part, levels(size)) for part in (encoder, decoder))
    autoencoder = published.base_tokenizers[base](
        id=base,
        pretrained_ckpt_path=None,
        embed_dim={"vqgan": 256}.get(base, 16),
        is_requires_grad=training(size),
    )
    shape = {"width": width, "num_layers": depth, "num_heads": heads}
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in shape.items()}
    stage = "full_finetuning" if training(size) else "latent_distillation_pretrain"
    settings = {
        **published.kolmogorov_tokenizer_args[base],
        "quantize_latent": quantized,
        "patch_size": patch_size(size),
    }
    return published.kolmogorov_tokenizers[base](base_tokenizer=autoencoder, **sizes, **settings, train_stage=stage)


if __name__ == "__main__":
    serve(Peer, Case)
