"""LlamaGen's published generators: `c2i_B_256.pt` and its like for classes, `t2i_XL_stage1_256.pt` from text.

Tensors are matched by name, strictly in both directions; the size of the model follows from their shapes. A file holds
the weights alone, or under `model` (DistributedDataParallel), `module` (DeepSpeed) or `state_dict`. No tensor says

- the heads, which are those of the published widths, or 64 channels wide;
- how many tokens an image has, since rotary positions have no weights: as many as the file's own name says (256 pixels
  are 16 x 16, 384 are 24 x 24, 512 are 32 x 32), or else 256;
- the text encoder, which is FLAN-T5-XL, and its features of the empty text.

A rotary table `freqs_cis` that an old file has says both. It is compared with ours before it is left, so that weights
which were trained with other positions are not read as these. Guidance and filters are those of the published figures.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imgtok.generators.conditioning import ClassSlot, TextPrefix
from imgtok.generators.gpt import GPT, LLAMAGEN_SIZES, GPTConfig, LlamaGenSize, llamagen_size
from imgtok.hub import Found
from imgtok.published.names import Place, check_telling, depth_of, joined, places
from imgtok.weights import check_tensors, fill, skeleton

logger = logging.getLogger(__name__)

NAMES: Mapping[str, str] = {
    "class_embedding.": "cls_embedding.embedding_table.",
    "text_proj.0.": "cls_embedding.cap_proj.fc1.",
    "text_proj.2.": "cls_embedding.cap_proj.fc2.",
    "no_caption": "cls_embedding.uncond_embedding",
    "token_embedding.": "tok_embeddings.",
    "blocks.": "layers.",
    "head.": "output.",
    ".attention.qkv_proj.": ".attention.wqkv.",
    ".attention.out_proj.": ".attention.wo.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".mlp_norm.": ".ffn_norm.",
}
FUSED: Mapping[str, tuple[str, ...]] = {".mlp.gate_up_proj.": (".feed_forward.w1.", ".feed_forward.w3.")}
"""Ours -> published; see `imgtok.published.names`."""
OURS_ALONE = ("empty_caption",)
"""What no published file has: by it a text encoder is known again, and of these models it is not known."""

KIND = "gpt"
LOOKS_LIKE = "a LlamaGen like c2i_B_256.pt"
TELLING = {
    "tok_embeddings.weight": 2,
    "layers.0.attention.wqkv.weight": 2,
    "layers.0.feed_forward.w1.weight": 2,
    "output.weight": 2,
}
"""What a file has that is one of these, and the numbers of dimensions; besides one of the next two."""
CLASSES, CAPTIONS = "cls_embedding.embedding_table.weight", "cls_embedding.uncond_embedding"
ROTARY = "freqs_cis"
TEXT_ENCODER = "google/flan-t5-xl"


def recognise(description: Mapping[str, Any], names: Set[str]) -> bool:
    return not description and names >= {*TELLING} and (CLASSES in names or CAPTIONS in names)


def published_places(ours: Iterable[str]) -> dict[str, Place]:
    """Where published tensors are in a model of ours."""
    return places((name for name in ours if name not in OURS_ALONE), NAMES, FUSED)


def configuration(found: Found) -> GPTConfig:
    """The configuration that the tensors and the file's name tell. Raises ValueError where they tell none."""
    return config_of(found.weights().blank, found)


def load(
    found: Found, *, raw: bool = False, map_location: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> GPT:
    """The model in a published file, in evaluation mode.

    Raises ValueError for weights that are damaged, missing, unexpected or misshapen (all are listed), and for a rotary
    table of other positions.
    """
    stored = found.weights(raw=raw)
    config = config_of(stored.blank, found)
    model = skeleton(lambda: GPT(config))
    blank = model.state_dict()
    known = published_places(blank)
    given = {name: value for name, value in stored.blank.items() if name != ROTARY}
    wanted = {name: place.view(blank) for name, place in known.items()}
    check_tensors(given, wanted, found.path, "LlamaGen that this file")
    if ROTARY in stored:
        check_rotary(stored[ROTARY], model, found)
    unknown = [(name, torch.zeros(blank[name].shape)) for name in OURS_ALONE if name in blank]
    return fill(model, [*joined(known, stored), *unknown], map_location=map_location, dtype=dtype)


def config_of(stored: Mapping[str, Tensor], found: Found) -> GPTConfig:
    """The configuration that the shapes of published tensors, their rotary table and their file's name tell."""
    check_telling(stored, TELLING, "LlamaGen", found.path)
    condition_name = CLASSES if CLASSES in stored else CAPTIONS
    check_telling(stored, {condition_name: 2}, "LlamaGen", found.path)
    (vocab_size, width), depth = stored["tok_embeddings.weight"].shape, depth_of(stored, "layers")
    rows, columns = stored[condition_name].shape
    condition = ClassSlot(num_classes=max(1, rows - 1)) if condition_name == CLASSES else None
    size = next((name for name, (wide, *_) in LLAMAGEN_SIZES.items() if wide == width), None)
    slots = 1 if condition is not None else rows
    heads, num_tokens = counts_of(stored, size, width, slots, found)
    hidden = len(stored["layers.0.feed_forward.w1.weight"])
    published = llamagen_size(size or "B", text=condition is None)
    sampling = replace(published.sampling, top_k=min(published.sampling.top_k, vocab_size))
    try:
        config = replace(
            published,
            vocab_size=vocab_size,
            num_tokens=num_tokens,
            width=width,
            depth=depth,
            num_heads=heads,
            sampling=sampling,
            condition=condition or TextPrefix(text_width=columns, text_length=rows, text_encoder=TEXT_ENCODER),
        )
        if config.mlp_hidden != hidden:  # of another rule, or none: then that which gives this width alone
            config = replace(config, mlp_multiple=hidden)
    except ValueError as error:
        raise ValueError(f"{found.path}: a LlamaGen that imgtok cannot stand for: {error}") from error
    return config


def counts_of(
    stored: Mapping[str, Tensor], size: LlamaGenSize | None, width: int, slots: int, found: Found
) -> tuple[int, int]:
    """Heads and tokens: as a rotary table says, or as the sizes and names of the published files."""
    table = stored.get(ROTARY)
    if table is not None and table.ndim == 3 and table.shape[1] and table.shape[0] > slots:
        return width // (2 * table.shape[1]), table.shape[0] - slots
    heads = LLAMAGEN_SIZES[size][2] if size is not None else max(1, width // 64)
    if size is None:
        logger.warning("%s: nothing tells the heads of a LlamaGen %d wide: taken as %d", found.path, width, heads)
    pixels = re.search(r"_(256|384|512)(?!\d)", found.path.stem)
    num_tokens = (int(pixels[1]) // 16) ** 2 if pixels else 256
    said = f"as {pixels[0][1:]} in its name says" if pixels else "since nothing says another number"
    logger.info("%s: %d tokens an image, %s", found.path, num_tokens, said)
    return heads, num_tokens


def check_rotary(stored: Tensor, model: GPT, found: Found) -> None:
    """Raises ValueError for a rotary table that is not ours, to the precision that it is stored in."""
    ours = model.rotary
    assert ours is not None, "a LlamaGen has rotary positions"
    tolerance = 1e-4 + torch.finfo(stored.dtype).eps if stored.is_floating_point() else 0.0
    if stored.shape != ours.shape or not torch.allclose(stored.float(), ours, rtol=0.0, atol=tolerance):
        raise ValueError(
            f"{found.path}: {ROTARY}: another table than that of a raster of {model.config.num_tokens} tokens, so its "
            "weights mean something else; imgtok reads only what the published code writes"
        )
