"""One line for each kind of model: what the suites that hold for every kind need to know of it.

`tests/contract`, `tests/test_fake_cuda.py` and `tests/gpu` run each line. A new method adds its line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok import hub
from imgtok.generators import tokenbridge_fast
from imgtok.generators.conditioning import (
    ClassBuffer,
    ConditionalGenerator,
    StartPlusClass,
    TextCrossAttention,
    TextPrefix,
)
from imgtok.generators.decoding import LOOK_EVERY
from imgtok.generators.digits import DigitsConfig
from imgtok.generators.dimension_head import Choice, StackConfig
from imgtok.generators.entities import Cells
from imgtok.generators.gpt import GPTConfig
from imgtok.generators.sampling import TokenSampling
from imgtok.generators.tokenbridge import RevealSampling, TokenBridgeConfig
from imgtok.generators.xar import FlowSampling, XARConfig, plan_entities
from imgtok.generators.xar_fast import SamplingNetwork
from imgtok.quantizers.binary import BinaryConfig
from imgtok.quantizers.normal import NormalConfig
from imgtok.quantizers.vq import TableConfig
from imgtok.text.captions import Captions
from imgtok.tokenizers.base import Autoencoder, Tokenizer
from imgtok.tokenizers.dcae import DCAEConfig, DCAESide
from imgtok.tokenizers.flextok import FlexTokConfig, FlexTokDecoding, TrunkConfig
from imgtok.tokenizers.flextok_fast import GuidedDecoder
from imgtok.tokenizers.karl import KARLConfig, KARLTraining, TransformerConfig
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from imgtok.tokenizers.tokenbridge import TokenBridgeTokenizerConfig
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vae import VAEConfig
from imgtok.tokenizers.vq import VQConfig

Step = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Line:
    """A small model of one kind."""

    config: Any
    step: Callable[[Any, torch.device], Step]
    """What decoding does over and over, given the model and its device: a function of tensors, and arguments for it."""
    short: dict[str, Any] = field(default_factory=dict)
    """Arguments of `generate` or `decode` for a few steps or tokens."""
    long: dict[str, Any] = field(default_factory=dict)
    """The same for more of them; the two must not differ where there is no loop."""
    looks: int = 0
    """Reads of the device that the longer decoding may add: a GPT whose sequences end looks once every `LOOK_EVERY`
    tokens whether all of them have."""
    without_gradient: dict[str, str] = field(default_factory=dict)
    """Trainable parameters that the loss does not reach, each with the reason."""
    draws: bool = True
    """Whether training draws random numbers."""
    trained: bool = True
    """Whether it has anything to train."""


def gpt_step(model: Any, device: torch.device) -> Step:
    cache = model.new_cache(2, 4)
    with torch.no_grad():
        model.prefill(conditions(model, range(2), device), cache)
    return lambda ids: model.step(ids, cache), (torch.zeros(2, 1, dtype=torch.long, device=device),)


def gpt_slots_step(model: Any, device: torch.device) -> Step:
    """The state that the next slot is drawn from."""
    cache = model.new_cache(2, 4)
    with torch.no_grad():
        model.prefill(conditions(model, range(2), device), cache)
    ones = torch.ones(2, 1, dtype=torch.long, device=device)
    return lambda ids, slots: model.slot_logits(model.step(ids, cache, slots=slots)), (ones, ones)


def gpt_digits_step(model: Any, device: torch.device) -> Step:
    """The state that the digits of the next id are drawn from, and those."""
    cache = model.new_cache(2, 4)
    with torch.no_grad():
        model.prefill(conditions(model, range(2), device), cache)
    choice = Choice(1.0, torch.full((2, len(model.config.digits)), 0.4, dtype=torch.float64, device=device))

    def step(ids: Tensor) -> Tensor:
        states = model.step(ids, cache)[:, -1]
        return model.digits.join(model.head.draw(states, choice))

    return step, (torch.zeros(2, 1, dtype=torch.long, device=device),)


def flextok_step(model: Any, device: torch.device) -> Step:
    """Guided, for prefixes of two lengths."""
    side, times = model.config.image_size // model.config.factor, (1.0, 0.5)
    x = torch.ones(2, model.config.latent_channels, side, side, device=device)
    codes = model.quantizer.ids_to_codes(tokens(model, 2).ids.to(device))
    with torch.no_grad():
        keep = torch.tensor([1, 3], device=device)
        network = GuidedDecoder(model, codes, keep, times, guidance=2.0, projected=False)
    return lambda x: network.velocity(x, 1, times[1]), (x,)


def xar_step(model: Any, device: torch.device) -> Step:
    """The second entity, guided, after a step that took the first one into the cache."""
    plans = plan_entities(FlowSampling(steps=(2,), guidance=(2.0,) * len(model.entities)), len(model.entities))
    x = torch.ones(2, model.entities.sizes[1], model.config.latent_channels, device=device)
    with torch.no_grad():
        network = SamplingNetwork(model, model.reading(conditions(model, range(2), device)), plans)
        network.finished.append(torch.ones(2, model.entities.sizes[0], model.config.latent_channels, device=device))
        network.velocity(x, 0, plans[1].times[0])
    return lambda x: network.velocity(x, 1, plans[1].times[1]), (x,)


def tokenbridge_step(model: Any, device: torch.device) -> Step:
    """Three positions of two images, guided, when five are there."""
    order = torch.arange(model.length, device=device).repeat(2, 1)
    reading = model.reading(conditions(model, range(2), device))
    uniforms = torch.full((6, model.config.latent_channels), 0.4, dtype=torch.float64, device=device)
    choice = Choice(1.0, uniforms)

    def step(values: Tensor) -> Tensor:
        found = tokenbridge_fast.features(model, values, order[:, -5:], order[:, -8:-5], reading, 2)
        ids = model.head.draw(found.chunk(2)[0].flatten(0, 1), choice)
        return model.quantizer.decode(ids)

    return step, (torch.ones(2, model.length, model.config.latent_channels, device=device),)


def karl_step(model: Any, device: torch.device) -> Step:
    """Pixels of tokens of two numbers, kept ones before padding."""
    given = tokens(model, 2).to(device)
    codes, mask = model._codes(given), given.mask
    return lambda codes: model.to_images(model.to_latents(model.decoder(codes, given.slots, mask))), (codes,)


def vq_step(model: Any, device: torch.device) -> Step:
    """Pixels of codes, a raster of them."""
    ids = tokens(model, 2).ids.to(device).unflatten(1, (model.config.grid, model.config.grid))
    return lambda ids: model.to_pixels(model.quantizer.codes_of(ids)), (ids,)


def symbols_step(model: Any, device: torch.device) -> Step:
    """Pixels of symbols."""
    symbols = tokens(model, 2).ids.to(device)
    return lambda symbols: model.vae.decode(model.quantizer.decode(model.in_place(symbols))), (symbols,)


TRUNK = TrunkConfig(width=32, depth=2, head_dim=16)
SMALL_VAE = VAEConfig(latent_channels=4, block_channels=(8, 8), layers_per_block=1, norm_groups=4)
FLEXTOK: dict[str, Any] = {"image_size": 16, "num_registers": 8, "encoder": TRUNK, "decoder": TRUNK}
SMALL_VQGAN = MaskGITVQGANConfig(
    latent_channels=4, vocab_size=16, block_channels=(8, 16), layers_per_block=1, norm_groups=4
)
DCAE_SIDE = DCAESide(channels=(16, 16), layers=(1, 1), blocks=("ResBlock",) * 2, kernels=(0, 0))
SMALL_DCAE = DCAEConfig(
    latent_channels=4, encoder=DCAE_SIDE, decoder=DCAE_SIDE, head_dim=8, norms=("rms_norm",) * 2,
    activations=("silu",) * 2,
)  # fmt: skip
TRANSFORMER, SHORTER = (TransformerConfig(width=32, depth=depth, num_heads=2) for depth in (2, 1))
KARL: dict[str, Any] = {
    "image_size": 16, "encoder": TRANSFORMER, "decoder": SHORTER, "vocab_size": 32, "token_width": 4,
    "max_tokens": 12, "budget": 8, "position_grid": 8, "halting_width": 16,
}  # fmt: skip
GPT: dict[str, Any] = {"vocab_size": 60, "num_tokens": 9, "width": 32, "depth": 2, "num_heads": 2, "mlp_multiple": 16}
XAR: dict[str, Any] = {"latent_channels": 4, "grid": 4, "width": 32, "depth": 1, "num_heads": 2}
BLOCK, BLOCKS = (StackConfig(width=32, depth=depth, num_heads=2) for depth in (1, 2))
TOKENBRIDGE: dict[str, Any] = {
    "latent_channels": 2, "grid": 4, "encoder": BLOCK, "decoder": BLOCKS, "head": BLOCK,
    "quantizer": NormalConfig(levels=8),
}  # fmt: skip
TEXT = TextCrossAttention(text_width=12, text_length=5)
FEW_IDS, MORE_IDS = {"num_tokens": 3}, {"num_tokens": 8}
ENDS: dict[str, Any] = GPT | {"ends": True, "num_tokens": 2 * LOOK_EVERY + 2}  # long enough for two looks
ALL_IDS = {"num_tokens": ENDS["num_tokens"]}
FEW_STEPS, MORE_STEPS = {"decoding": FlexTokDecoding(steps=2)}, {"decoding": FlexTokDecoding(steps=3, guidance=2.0)}
FEW_CALLS, MORE_CALLS = ({"sampling": FlowSampling(steps=steps)} for steps in ((2,), (2, 3, 2, 2)))

LINES: dict[str, Line] = {
    "vae": Line(config=SMALL_VAE, step=lambda model, device: (model.decode, (latents(model, 2).to(device),))),
    "flextok": Line(config=FlexTokConfig(**FLEXTOK, patch_size=4), step=flextok_step, short=FEW_STEPS, long=MORE_STEPS),
    "flextok-vae": Line(
        config=FlexTokConfig(**FLEXTOK, patch_size=2, vae=SMALL_VAE),
        step=flextok_step,
        short=FEW_STEPS,
        long=MORE_STEPS,
    ),
    "maskgit_vqgan": Line(
        config=SMALL_VQGAN, step=lambda model, device: (model.decode, (latents(model, 2).to(device),)), draws=False
    ),
    "dcae": Line(
        config=SMALL_DCAE, step=lambda model, device: (model.decode, (latents(model, 2).to(device),)), draws=False
    ),
    "karl": Line(config=KARLConfig(**KARL, base=SMALL_VQGAN), step=karl_step),
    "karl-vectors": Line(
        config=KARLConfig(**KARL, base=SMALL_VAE, quantized=False, training=KARLTraining(stage="finetune")),
        step=karl_step,
    ),
    "tokenbridge_tokenizer": Line(
        config=TokenBridgeTokenizerConfig(
            image_size=16, vae=SMALL_VAE, quantizer=NormalConfig(levels=8), channel_order=(2, 0, 3, 1)
        ),
        step=symbols_step,
        draws=False,
        trained=False,
    ),
    "vq": Line(
        config=VQConfig(
            image_size=16,
            quantizer=TableConfig(vocab_size=16, width=4, entropy_weight=0.1),
            block_channels=(8, 16),
            layers_per_block=1,
            hidden_channels=8,
            norm_groups=4,
        ),
        step=vq_step,
        draws=False,
    ),
    "vq-binary": Line(
        config=VQConfig(
            image_size=16,
            quantizer=BinaryConfig(bits=5, variance_weight=0.1),
            block_channels=(8, 16),
            layers_per_block=1,
            hidden_channels=8,
            norm_groups=4,
        ),
        step=vq_step,
    ),
    "gpt": Line(config=GPTConfig(**GPT), step=gpt_step, short=FEW_IDS, long=MORE_IDS),
    "gpt-prefix": Line(
        config=GPTConfig(**GPT, positions="rotary_2d", condition=TextPrefix(text_width=12, text_length=5)),
        step=gpt_step,
        short=FEW_IDS,
        long=MORE_IDS,
    ),
    "gpt-digits": Line(
        config=GPTConfig(**GPT, levels=(3, 4, 5), condition=StartPlusClass()),
        step=gpt_step,
        short=FEW_IDS,
        long=MORE_IDS | {"sampling": TokenSampling(guidance=2.0, top_k=5, top_p=0.9)},
    ),
    "gpt-head": Line(
        config=GPTConfig(**GPT, ends=True, head=DigitsConfig(digits=(12, 5), width=16, depth=1, num_heads=2)),
        step=gpt_digits_step,
        short=FEW_IDS,
        long=MORE_IDS | {"sampling": TokenSampling(guidance=2.0, top_k=5, top_p=0.9)},
    ),
    "gpt-independent": Line(
        config=GPTConfig(**GPT, ends=True, head=DigitsConfig(digits=(12, 5))),
        step=gpt_digits_step,
        short=FEW_IDS,
        long=MORE_IDS | {"sampling": TokenSampling(guidance=2.0, schedule="linear", top_k=5)},
    ),
    "gpt-text": Line(config=GPTConfig(**GPT, condition=TEXT), step=gpt_step, short=FEW_IDS, long=MORE_IDS),
    "gpt-ends": Line(config=GPTConfig(**ENDS), step=gpt_step, short=FEW_IDS, long=ALL_IDS, looks=2),
    "gpt-slots": Line(
        config=GPTConfig(**ENDS, num_slots=40), step=gpt_slots_step, short=FEW_IDS, long=ALL_IDS, looks=2
    ),
    "xar": Line(
        config=XARConfig(**XAR, entities=Cells(height=2, width=2)), step=xar_step, short=FEW_CALLS, long=MORE_CALLS
    ),
    "xar-text": Line(
        config=XARConfig(**XAR, entities=Cells(height=2, width=2), condition=TEXT),
        step=xar_step,
        short=FEW_CALLS,
        long=MORE_CALLS,
    ),
}

LINES |= {
    "tokenbridge": Line(
        config=TokenBridgeConfig(**TOKENBRIDGE, condition=ClassBuffer(num_slots=3)),
        step=tokenbridge_step,
        short={"sampling": RevealSampling(iterations=1)},
        long={"sampling": RevealSampling(iterations=3)},
    ),
    "tokenbridge-confidence": Line(
        config=TokenBridgeConfig(
            **TOKENBRIDGE | {"decoder": StackConfig(width=48, depth=1, num_heads=2)},
            condition=ClassBuffer(num_slots=1),
            channel_order=(1, 0),
            first_step="corrected",
        ),
        step=tokenbridge_step,
        short={"sampling": RevealSampling(iterations=1, order="confidence", guidance=1.0)},
        long={"sampling": RevealSampling(iterations=3, order="confidence")},
    ),
}

TRAINED = {name: line for name, line in LINES.items() if line.trained}
"""Those of models with anything to train."""
FIRST_OF_KIND = frozenset({line.config.kind: name for name, line in reversed(LINES.items())}.values())
"""One line of each kind. What is dear is done with these in the fast tests, with their variants in the slow ones."""
ENCODING = {name: line for name, line in LINES.items() if line.config.kind not in hub.GENERATORS}
"""Those of models that encode images, which generators do not."""


# ------------------------------------------------------------------------------------------------ models


def class_of(kind: str) -> Any:
    module, name = hub.KINDS[kind].split(":")
    return getattr(importlib.import_module(module), name)


def build(line: Line) -> Any:
    """The model, the same each time, in evaluation mode; weights that start at zero are random here."""
    torch.manual_seed(0)
    model: nn.Module = class_of(line.config.kind)(line.config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
    return model.eval()


# ------------------------------------------------------------------------------------------------ inputs


def random(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(model: Any, count: int) -> Tensor:
    side = getattr(model.config, "image_size", 16)
    return random(count, 3, side, side).clamp(-1, 1)


def latents(model: Any, count: int) -> Tensor:
    side = getattr(model.config, "grid", 8)
    return random(count, model.config.latent_channels, side, side)


def tokens(model: Any, count: int) -> Tokens:
    """Tokens of a tokenizer, or for a generator: of different lengths and with slots where the model has them."""
    is_tokenizer = isinstance(model, Tokenizer)
    columns, vocabulary = (
        (model.num_tokens, model.vocab_size) if is_tokenizer else (model.config.num_tokens, model.config.vocab_size)
    )
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(vocabulary, (count, columns), generator=generator)
    num_slots = model.num_slots if is_tokenizer else model.config.num_slots
    slots = (
        torch.rand(count, num_slots, generator=generator).argsort()[:, :columns].sort().values if num_slots else None
    )
    ragged = len(model.rates()) > 1 if is_tokenizer else model.config.ends
    lengths = columns - torch.arange(count) * 2 % columns if ragged else torch.full((count,), columns)
    if is_tokenizer and vocabulary == 1:  # tokens that are vectors
        return Tokens(ids, lengths, slots, random(count, columns, model.config.token_width)).padded()
    return Tokens(ids, lengths, slots).padded()


def table(tokens: Tokens, columns: int) -> Tensor:
    """All that tokens say, (B, ...) int64."""
    tokens = tokens.padded()
    parts = [tokens.ids] if tokens.slots is None else [tokens.ids, tokens.slots]
    return torch.cat([tokens.lengths[:, None], *(F.pad(part, (0, columns - part.shape[1])) for part in parts)], dim=1)


def conditions(model: Any, rows: Sequence[int], device: torch.device | str = "cpu") -> Any:
    """A label or a caption, of its own length, for each of the rows."""
    if not model.config.reads_text:
        return torch.tensor(list(rows), device=device) % model.config.num_classes
    width, most = model.config.condition.text_width, model.config.condition.text_length
    return Captions.pad([random(1 + row % most, width, seed=row) for row in rows]).to(device)


def content(model: Any, count: int) -> Any:
    """What training calls the model with, before the condition of a generator."""
    if not isinstance(model, ConditionalGenerator):
        return images(model, count)
    return tokens(model, count) if model.learns_from == "tokens" else latents(model, count)


def inputs(model: Any, count: int, device: torch.device | str = "cpu") -> tuple[Any, ...]:
    """The arguments of the training forward."""
    first = content(model, count).to(device)
    return (first, conditions(model, range(count), device)) if isinstance(model, ConditionalGenerator) else (first,)


def train(model: Any, arguments: Sequence[Any], seed: int = 4) -> Tensor:
    """The loss of a batch: of a model that only decodes, as an autoencoder, that of its reconstruction."""
    given = model(*arguments, generator=torch.Generator().manual_seed(seed))
    if hasattr(given, "images"):
        return (given.images - arguments[0]).float().square().mean() + given.losses.total
    loss: Tensor = given.total
    return loss


def decode(model: Any, rows: Sequence[int], device: torch.device | str = "cpu", **settings: Any) -> Tensor:
    """`generate` or `decode` of some of 4 rows: images, latents, or a table of tokens."""
    chosen = list(rows)
    if isinstance(model, ConditionalGenerator):
        drawn = model.generate(conditions(model, chosen, device), seed=5, indices=chosen, **settings)
        return table(drawn, model.config.num_tokens) if isinstance(drawn, Tokens) else drawn
    made = latents(model, 4) if isinstance(model, Autoencoder) else tokens(model, 4)
    decoded: Tensor = model.decode(made[chosen].to(device), seed=5, indices=chosen, **settings)
    return decoded


def encode(model: Any, rows: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """`encode` of some of 4 images: latents, or a table of tokens. For the lines of `ENCODING`."""
    encoded = model.encode(images(model, 4)[list(rows)].to(device))
    return table(encoded, model.num_tokens) if isinstance(encoded, Tokens) else encoded
