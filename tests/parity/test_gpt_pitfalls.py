"""The recorded cases of LlamaGen's GPT notice the mistakes that run without an error: each is made on purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import runs
import torch
from cases import Case
from models import gpt
from torch import Tensor, nn

from imgtok.generators import sampling
from imgtok.generators.conditioning import ConditionalGenerator
from imgtok.generators.gpt import GPT
from imgtok.layers.norms import RMSNorm
from imgtok.layers.positions import rotary_1d
from imgtok.text.captions import Captions

CASE, TEXT = Case.load("gpt/c2i_tiny"), Case.load("gpt/t2i_tiny")


def worst(case: Case, ours: runs.Outputs) -> float:
    return max(case.errors(ours).values())


def logits_error(model: GPT, case: Case = CASE) -> float:
    with torch.no_grad():
        found = model.logits(runs.gpt_condition(model, case), case.input("tokens"))
    return worst(case, {"train_logits": found})


def test_the_right_code_passes():
    assert logits_error(gpt(CASE)) <= 1
    assert logits_error(gpt(TEXT), TEXT) <= 1


# ---------------------------------------------------------------- positions


def columns_first(model: GPT) -> None:
    raster = model.rotary[1:].unflatten(0, (4, 4))
    model.rotary[1:] = raster.transpose(0, 1).flatten(0, 1).clone()


def in_a_row(model: GPT) -> None:
    model.rotary = rotary_1d(model.config.head_dim, 16, 1)


def one_slot_later(model: GPT) -> None:
    model.rotary = model.rotary.roll(1, 0)


def all_frequencies_for_both(model: GPT) -> None:
    """As if each half of the pairs were a head of its own with the frequencies of the whole."""
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2) / 16)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).float()
    angles = (places[..., None] * frequencies).flatten(1)
    model.rotary[1:] = torch.stack([angles.cos(), angles.sin()], dim=-1)


def prefix_unturned(model: GPT) -> None:
    model.rotary[:1, :, 0] = 1.0


@pytest.mark.parametrize(
    "wrong",
    [columns_first, in_a_row, one_slot_later, all_frequencies_for_both, prefix_unturned],
    ids=lambda f: f.__name__,
)
def test_other_positions(wrong):
    model = gpt(CASE)
    wrong(model)
    assert logits_error(model) > 1


# ---------------------------------------------------------------- the network


def swapped(*order: int) -> Callable[[GPT], None]:
    def swap(model: GPT) -> None:
        for block in model.blocks:
            weight = block.attention.qkv_proj.weight
            weight.data = torch.cat([weight.data.chunk(3)[part] for part in order])

    return swap


def gate_and_up_exchanged(model: GPT) -> None:
    for block in model.blocks:
        block.mlp.gate_up_proj.weight.data = block.mlp.gate_up_proj.weight.data.roll(
            block.mlp.gate_up_proj.out_features // 2, 0
        )


def scale_of_the_width(model: GPT) -> None:
    for block in model.blocks:
        block.attention.scale = model.config.width**-0.5


def queries_normed(model: GPT) -> None:
    for block in model.blocks:
        block.attention.qk_norm = True


def head_tied(model: GPT) -> None:
    model.head.weight.data = model.token_embedding.weight.data


NETWORKS = {
    "keys first": swapped(1, 0, 2),
    "values first": swapped(2, 1, 0),
    "gate and up exchanged": gate_and_up_exchanged,
    "scale of the width": scale_of_the_width,
    "queries normed": queries_normed,
    "head tied": head_tied,
}


@pytest.mark.parametrize("wrong", NETWORKS.values(), ids=NETWORKS)
def test_another_network(wrong):
    model = gpt(CASE)
    wrong(model)
    assert logits_error(model) > 1


def test_another_epsilon(monkeypatch):
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, 1e-3)

    monkeypatch.setattr(RMSNorm, "forward", forward)
    assert logits_error(gpt(CASE)) > 1


def test_no_class_is_the_last_row(monkeypatch):
    monkeypatch.setattr(ConditionalGenerator, "null_class", property(lambda self: 0))
    found = runs.gpt_training(gpt(CASE), CASE)
    assert worst(CASE, {"null_logits": found["null_logits"]}) > 1


# ---------------------------------------------------------------- text


def spoilt(change: Callable[[Captions], Captions]) -> float:
    """Of the training logits where captions are read otherwise."""
    model = gpt(TEXT)
    with torch.no_grad():
        captions = change(runs.gpt_condition(model, TEXT))
        found = model.logits(captions, TEXT.input("tokens"))
    return worst(TEXT, {"train_logits": found})


def test_padded_slots_are_closed():
    assert spoilt(lambda captions: captions) <= 1
    assert spoilt(lambda captions: dataclasses.replace(captions, mask=torch.ones_like(captions.mask))) > 1


def test_captions_stand_in_the_last_slots(monkeypatch):
    def from_the_first_column(captions: Captions) -> Captions:
        return Captions.pad([row[seen] for row, seen in zip(captions.features, captions.mask, strict=True)])

    assert spoilt(from_the_first_column) <= 1
    monkeypatch.setattr(Captions, "aligned_right", Captions.widen)
    assert spoilt(from_the_first_column) > 1


def test_the_gelu_is_that_of_tanh():
    model = gpt(TEXT)
    model.text_proj[1] = nn.GELU()
    reading = model.read(runs.gpt_condition(model, TEXT))
    assert worst(TEXT, {"prefix_tail": reading.prefix[:, -4:].detach()}) > 1


def test_no_text_is_seen_where_the_caption_is(monkeypatch):
    original = GPT.unconditional

    def all_slots(self: GPT, condition: Captions) -> Captions:
        none = original(self, condition)
        return dataclasses.replace(none, mask=torch.ones_like(none.mask))

    monkeypatch.setattr(GPT, "unconditional", all_slots)
    assert worst(TEXT, runs.gpt_generation(gpt(TEXT), TEXT, "cfg3")) > 1


def test_the_loss_is_of_valid_rows_alone():
    model = gpt(TEXT)
    found = runs.gpt_training(model, TEXT)["train_loss"]
    assert worst(TEXT, {"train_loss": found}) <= 1
    share = TEXT.input("valid").float().mean()
    assert share < 1
    assert worst(TEXT, {"train_loss": found * share}) > 1


# ---------------------------------------------------------------- sampling


def test_rotation_of_halves_instead_of_pairs(monkeypatch):
    def halves(x, table):
        a, b = x.chunk(2, dim=-1)
        cos, sin = table.unbind(-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    monkeypatch.setattr("imgtok.generators.gpt.rotate", halves)
    assert worst(CASE, runs.gpt_training(gpt(CASE), CASE)) > 1


def test_guidance_around_the_conditional(monkeypatch):
    monkeypatch.setattr("imgtok.generators.sampling.guide", lambda cond, uncond, scale: cond + scale * (cond - uncond))
    assert worst(CASE, runs.gpt_generation(gpt(CASE), CASE, "cfg2")) > 1


def test_nucleus_without_the_token_that_crosses():
    filters, logits = CASE.about["filters"][2], CASE.input("filter_logits")
    kept = sampling.filter_logits(logits, **filters)
    lowest = kept.masked_fill(kept == -torch.inf, torch.inf).argmin(dim=-1, keepdim=True)
    without = kept.scatter(-1, lowest, -torch.inf)
    assert worst(CASE, {"probs_2": kept.softmax(dim=-1)}) <= 1
    assert worst(CASE, {"probs_2": without.softmax(dim=-1)}) > 1
