"""The cases notice mistakes in TokenBridge that run without an error: each is made on purpose, and must fail.

P1, P3 and P4 are of section 9 of our specification, the others of its formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import tokenbridge_runs
import torch
import torch.nn.functional as F
from cases import Case
from models import tokenbridge
from torch import Tensor

from imgtok.generators import dimension_head, tokenbridge_fast
from imgtok.generators import tokenbridge as module
from imgtok.generators.dimension_head import DimensionHead, HeadBlock
from imgtok.generators.tokenbridge import Reveal, TokenBridge
from imgtok.layers.attention import NormedAttention
from imgtok.layers.feed_forward import MLP
from imgtok.quantizers import normal
from imgtok.quantizers.normal import NormalQuantizer

QUANTIZER, HEAD, FORWARD, SAMPLE, MASKS = (
    Case.load(f"tokenbridge/{name}") for name in ("quantizer", "head", "forward", "sample", "masks")
)
TOLERANCE = 1e-5


def worst(case: Case, ours: tokenbridge_runs.Outputs) -> float:
    return max(case.errors(ours, TOLERANCE).values())


def head_error(change: Callable[[TokenBridge], object] = lambda model: None) -> float:
    model = tokenbridge(HEAD)
    change(model)
    return worst(HEAD, tokenbridge_runs.head(model, HEAD))


def sample_error(name: str, change: Callable[[TokenBridge], object] = lambda model: None) -> float:
    """The error of what is drawn, alone."""
    model = tokenbridge(SAMPLE)
    change(model)
    ours = tokenbridge_runs.sampling(model, SAMPLE, name)
    return worst(SAMPLE, {key: value for key, value in ours.items() if key == f"{name}.tokens"})


def forward_error() -> float:
    return worst(FORWARD, tokenbridge_runs.forward(FORWARD))


def test_the_right_code_passes():
    assert forward_error() <= 1
    assert head_error() <= 1
    assert sample_error("linear") <= 1


# ---------------------------------------------------------------- quantizer


def test_cells_of_equal_probability_in_place_of_the_nearest_level(monkeypatch):
    def cells(config: normal.NormalConfig, levels: Tensor, x: Tensor) -> Tensor:
        low, high = config.range
        y = ((x - low) / (high - low) * (2 * config.cut) - config.cut).contiguous()
        ends = normal.normal_boundaries(config.levels, config.cut).float()[1:-1]
        return torch.bucketize(y, ends, right=True)

    monkeypatch.setattr(normal, "_nearest", cells)
    ours = tokenbridge_runs.quantizer(QUANTIZER, plainly=True)
    assert worst(QUANTIZER, {"b64.indices": ours["b64.indices"]}) > 1


def test_ties_to_the_upper_level(monkeypatch):
    original = normal._nearest
    monkeypatch.setattr(
        normal, "_nearest", lambda config, levels, x: config.levels - 1 - original(config, levels.flip(0), x)
    )
    ours = tokenbridge_runs.quantizer(QUANTIZER, plainly=True)
    assert worst(QUANTIZER, {"b64.edge_indices": ours["b64.edge_indices"]}) > 1


def test_a_range_that_is_not_scaled(monkeypatch):
    """y = x, and not 0.6 x: the latents' own deviation would be the table's."""
    made = NormalQuantizer(normal.NormalConfig())
    monkeypatch.setattr(normal, "_nearest", lambda config, levels, x: (x[..., None] - levels).abs().argmin(dim=-1))
    assert worst(QUANTIZER, {"b64.indices": made.encode_plainly(QUANTIZER.input("x"))}) > 1


# ---------------------------------------------------------------- the training pass


def test_the_end_of_the_order_hidden(monkeypatch):
    hide = TokenBridge.hide
    monkeypatch.setattr(TokenBridge, "hide", lambda self, order, share: hide(self, order.flip(1), share))
    assert forward_error() > 1


def test_the_positions_of_another_image_hidden(monkeypatch):
    hide = TokenBridge.hide
    monkeypatch.setattr(TokenBridge, "hide", lambda self, order, share: hide(self, order.roll(1, 0), share))
    assert forward_error() > 1


# ---------------------------------------------------------------- schedules


def test_ceil_for_floor(monkeypatch):
    class Up:
        def __getattr__(self, name: str) -> object:
            return math.ceil if name == "floor" else getattr(math, name)

    monkeypatch.setattr(module, "math", Up())
    assert worst(MASKS, tokenbridge_runs.masks(MASKS)) > 1


def test_guidance_by_step(monkeypatch):
    """P3 in another form: guidance grows with the positions that are revealed, not with the iterations."""
    original = module.plan_reveals

    def by_step(how, hidden, positions):
        plan = original(how, hidden, positions)
        scales = [1 + (how.guidance - 1) * (step + 1) / len(plan) for step in range(len(plan))]
        return [Reveal(reveal.count, reveal.left, scale) for reveal, scale in zip(plan, scales, strict=True)]

    monkeypatch.setattr(module, "plan_reveals", by_step)
    assert sample_error("linear") > 1


# ---------------------------------------------------------------- the head


def test_the_first_step_alike_in_training_and_sampling():
    """P1."""
    assert head_error(lambda model: setattr(model.head, "first_step", "corrected")) > 1

    def without(model: TokenBridge) -> None:  # as training does it, while sampling
        model.head.draw = lambda features, choose: from_training(model.head, features, choose)  # type: ignore[method-assign]

    def from_training(head: DimensionHead, features: Tensor, choose: dimension_head.Choose) -> Tensor:
        ids = torch.zeros(len(features), head.num_steps, dtype=torch.long)
        for step in range(head.num_steps):
            ids[:, step] = choose(step, head(features, ids)[:, step])
        return ids

    assert head_error(without) > 1


def test_scale_and_shift_exchanged_after_the_blocks(monkeypatch):
    original = DimensionHead.final
    monkeypatch.setattr(
        DimensionHead, "final", lambda self, x, m: original(self, x, torch.cat(m.chunk(2, -1)[::-1], -1))
    )
    assert head_error() > 1


def test_scale_and_shift_exchanged_in_the_blocks(monkeypatch):
    original = HeadBlock.forward

    def exchanged(self, x, modulation, cache=None):
        a, b, c, d, e, f = modulation.chunk(6, dim=-1)
        return original(self, x, torch.cat([b, a, c, e, d, f], dim=-1), cache)

    monkeypatch.setattr(HeadBlock, "forward", exchanged)
    assert head_error() > 1


def test_one_norm_after_the_blocks(monkeypatch):
    monkeypatch.setattr(dimension_head, "layer_norm", lambda x, eps: x)
    assert head_error() > 1


def test_queries_and_keys_without_norms(monkeypatch):
    monkeypatch.setattr(NormedAttention, "normed", lambda self, qk: qk)
    assert head_error() > 1


def test_tanh_gelu(monkeypatch):
    def forward(self: MLP, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))

    monkeypatch.setattr(MLP, "forward", forward)
    assert head_error() > 1


# ---------------------------------------------------------------- order, network, guidance


def test_ids_left_in_the_order_of_the_steps():
    assert sample_error("one", lambda model: setattr(model, "inverse", torch.arange(16))) > 1


def test_channels_in_their_own_order():
    def natural(model: TokenBridge) -> None:
        model.order = model.inverse = torch.arange(16)

    assert sample_error("one", natural) > 1


def test_positions_revealed_from_the_start_of_the_order(monkeypatch):
    original = TokenBridge._start

    def turned(self, *given):
        start = original(self, *given)
        start.order = start.order.flip(1)
        return start

    monkeypatch.setattr(TokenBridge, "_start", turned)
    assert sample_error("plain") > 1


def test_guidance_of_nothing_but_the_conditional_stream(monkeypatch):
    monkeypatch.setattr(tokenbridge_fast, "guide", lambda conditional, unconditional, scale: conditional)
    assert sample_error("one") > 1


def test_one_slot_of_the_class_in_place_of_all(monkeypatch):
    original = TokenBridge.read

    def one(self, condition):
        reading = original(self, condition)
        keep = torch.arange(self.num_slots)[:, None] == 0
        return dimension_head_reading(reading, keep)

    def dimension_head_reading(reading, keep):
        return type(reading)(prefix=reading.prefix * keep)

    monkeypatch.setattr(TokenBridge, "read", one)
    assert sample_error("one") > 1


@pytest.mark.parametrize("part", ["output_positions", "mask_token", "decoder_positions"])
def test_a_table_left_out(part):
    assert sample_error("one", lambda model: getattr(model, part).data.zero_()) > 1


def test_another_epsilon(monkeypatch):
    def change(model: TokenBridge) -> None:
        for layer in model.modules():
            if isinstance(layer, torch.nn.LayerNorm):
                layer.eps = 1e-5

    assert head_error(change) > 1
