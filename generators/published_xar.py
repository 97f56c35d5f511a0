"""Published xAR checkpoints: `xAR-B.pth` and its like, or a training checkpoint of the published code.

Read with `weights_only=True`, so that nothing in the file runs. Tensors are matched by name, strictly in both
directions; the size of the model follows from their shapes. A file holds either the weights, or a training run's
`model` and `model_ema`, of which the average is taken. What no file says is as in the published code: four cells
of half the grid's side, and heads 64 channels wide unless a rotary table shows another width.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from generators.entities import Cells
from generators.xar import XAR, XAR_SIZES, XARConfig, xar_size
from imgtok.hub import check_tensors, damaged
from imgtok.published import places

NAMES: Mapping[str, str] = {
    "class_embedding.": "class_emb.",
    "time_mlp.": "time_embed.mlp.",
    "input_proj.": "z_proj.",
    "input_norm.": "z_proj_ln.",
    "first_positions": "encoder_pos_embed_learned",
    "second_positions": "decoder_pos_embed_learned",
    "first_norm.": "encoder_norm.",
    "second_norm.": "decoder_norm.",
    "middle_proj.": "decoder_embed.",
    "readout.": "pred.",
    "first_blocks.": "encoder_blocks.",
    "second_blocks.": "decoder_blocks.",
    ".attention.qkv_proj.": ".attn.qkv.",
    ".attention.out_proj.": ".attn.proj.",
    ".mlp.down_proj.": ".mlp.fc2.",
    ".modulation.": ".ada_lin.1.",
}
"""As imgtok.published.NAMES: ours -> published."""
FUSED: Mapping[str, tuple[str, ...]] = {".mlp.gate_up_proj.": (".mlp.fc1_g.", ".mlp.fc1_x.")}
POSITIONS = ("encoder_pos_embed_learned", "decoder_pos_embed_learned")
"""Published with a batch axis in front."""
BUFFERS = re.compile(r"mask|(en|de)coder_blocks\.\d+\.attn\.rope\.freqs(_cos|_sin)?")
"""What a published file holds beside weights: tables that are computed here."""


def load(path: Path, *, raw: bool = False) -> XAR:
    """The model in a published file (.pth, or .safetensors with the same names), in evaluation mode.

    Of a training checkpoint the averaged weights are taken, or with `raw` the plain ones. Raises FileNotFoundError, and
    ValueError for a file that would run code or is damaged, or whose tensors do not fit (all of them are listed).
    """
    stored = read_tensors(path, raw=raw)
    found = {name: value for name, value in stored.items() if not BUFFERS.fullmatch(name)}
    with torch.random.fork_rng(devices=[]):  # the first weights are overwritten: leave the caller's RNG alone
        model = XAR(config_of(stored, path))
    state = model.state_dict()
    known = places(state, NAMES, FUSED)
    check_tensors(found, {name: as_published(name, place.view(state)) for name, place in known.items()}, path, MODEL)
    for name, place in known.items():
        place.view(state).copy_(as_ours(name, found[name]))
    return model.eval()


MODEL = "xAR that their own shapes"


def read_tensors(path: Path, *, raw: bool = False) -> Mapping[str, Tensor]:
    """Published name -> tensor, buffers included; see `load`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the published ones are xAR-B.pth, xAR-L.pth and xAR-H.pth")
    try:
        if path.suffix == ".safetensors":
            stored: Any = load_file(path)
        else:
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise damaged(path, error) from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path}: cut short, or holds more than tensors ({str(error).splitlines()[0]}). Nothing that could run is "
            "read: copy or download it again, or keep only its entries model and model_ema"
        ) from error
    if isinstance(stored, Mapping) and "model" in stored:
        stored = stored["model" if raw or "model_ema" not in stored else "model_ema"]
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(f"{path}: must hold tensors by name, or entries model and model_ema that do")
    return stored


def config_of(stored: Mapping[str, Tensor], path: Path) -> XARConfig:
    """The configuration that the shapes of published tensors tell. Raises ValueError where they tell none."""
    try:
        width, channels = stored["z_proj.weight"].shape
        length = stored[POSITIONS[0]].shape[1]
        classes = len(stored["class_emb.weight"]) - 1
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a published xAR: it lacks z_proj, class_emb or {POSITIONS[0]}") from error
    depth = len({name.split(".")[1] for name in stored if name.startswith("encoder_blocks.")})
    grid = round(length**0.5)
    if grid**2 != length or grid % 2 or not depth:
        raise ValueError(f"{path}: {length} positions and {depth} blocks are no xAR's; four cells make an even square")
    tables = [value for name, value in stored.items() if name.endswith("attn.rope.freqs_cos")]
    sized = {size[0]: name for name, size in XAR_SIZES.items()}
    base = xar_size(sized[width]) if width in sized else XARConfig(width=width, num_heads=1)  # type: ignore[arg-type]
    heads = width // tables[0].shape[1] if tables else (base.num_heads if width in sized else max(1, width // 64))
    cell = Cells(height=grid // 2, width=grid // 2)
    return replace(
        base, latent_channels=channels, grid=grid, num_classes=classes, entities=cell, depth=depth, num_heads=heads
    )


def as_ours(published: str, value: Tensor) -> Tensor:
    """Positions are published with a batch axis in front."""
    return value[0] if published in POSITIONS else value


def as_published(published: str, value: Tensor) -> Tensor:
    """The other way round."""
    return value[None] if published in POSITIONS else value
