"""What a control of prompts needs: holes and weights of columns, maps of attention, gradients through a call."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from imgtok.generators.conditioning import (
    ClassModulation,
    ConditionalGenerator,
    Reading,
    StartPlusClass,
    TextCrossAttention,
    TextPrefix,
)
from imgtok.generators.entities import Cells
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.sampling import TokenSampling
from imgtok.generators.xar import XAR, FlowSampling, XARConfig
from imgtok.layers import record
from imgtok.layers.record import AttentionRecord
from imgtok.text.captions import Captions
from imgtok.tokenizers.tokens import Tokens

WIDTH, LONGEST, DEPTH = 12, 6, 2
ACROSS = TextCrossAttention(text_width=WIDTH, text_length=LONGEST)
BEFORE = TextPrefix(text_width=WIDTH, text_length=LONGEST)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def awake(model: ConditionalGenerator) -> ConditionalGenerator:
    """No weight so small that nothing depends on it."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.3)
    model.set_empty_caption(torch.randn(1, WIDTH))
    return model.eval()


def gpt(condition=ACROSS, **changes) -> GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "num_tokens": 9, "width": 32, "depth": DEPTH, "num_heads": 2, "mlp_multiple": 1}
    return awake(GPT(GPTConfig(**sizes | changes, condition=condition)))


def xar() -> XAR:
    torch.manual_seed(0)
    cells = Cells(height=2, width=2)
    sizes = {"latent_channels": 3, "grid": 4, "entities": cells, "width": 32, "depth": 1, "num_heads": 2}
    return awake(XAR(XARConfig(**sizes, condition=ACROSS)))


ROWS = [torch.randn(length, WIDTH, generator=generator(length)) for length in (3, 6, 2)]
CAPTIONS = Captions.pad(ROWS)
IDS = torch.randint(24, (3, 9), generator=generator(7))
LATENTS = torch.randn(3, 3, 4, 4, generator=generator(9))


def outputs(model: ConditionalGenerator, condition: Captions | Reading) -> torch.Tensor:
    """Logits of a teacher-forced pass, or velocities."""
    if isinstance(model, GPT):
        return model.logits(condition, IDS)
    return model.velocity(model.entities.cut(LATENTS), torch.full((3, 4), 0.5), condition)


MODELS = [
    pytest.param(gpt, id="gpt"),
    pytest.param(xar, id="xar"),
    pytest.param(lambda: gpt(BEFORE), id="prefix"),
    pytest.param(lambda: gpt(BEFORE, positions="rotary_2d", qk_norm=True), id="llamagen"),
]

# ---------------------------------------------------------------- holes and weights


@pytest.mark.parametrize("build", MODELS[:2])
def test_a_hole_is_a_caption_without_the_column(build):
    model, mask = build(), CAPTIONS.mask.clone()
    mask[0, 1] = mask[1, 0] = mask[1, 4] = False
    kept = [ROWS[0][[0, 2]], ROWS[1][[1, 2, 3, 5]], ROWS[2]]
    holed = dataclasses.replace(CAPTIONS, mask=mask)
    with torch.no_grad():
        torch.testing.assert_close(outputs(model, holed), outputs(model, Captions.pad(kept)), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(outputs(model, holed), outputs(model, CAPTIONS), atol=1e-3)


@pytest.mark.parametrize("build", MODELS)
def test_what_stands_in_a_hole_leaves_no_trace(build):
    model, mask = build(), CAPTIONS.mask.clone()
    mask[0, 1] = False
    dirty = torch.where(mask[..., None], CAPTIONS.features, 1e4)
    with torch.no_grad():
        clean = outputs(model, dataclasses.replace(CAPTIONS, mask=mask))
        assert torch.equal(outputs(model, dataclasses.replace(CAPTIONS, features=dirty, mask=mask)), clean)


@pytest.mark.parametrize("build", MODELS)
def test_weights_of_zero_change_no_bit(build):
    model = build()
    weighted = dataclasses.replace(CAPTIONS, log_weights=torch.zeros(CAPTIONS.mask.shape))
    with torch.no_grad():
        assert torch.equal(outputs(model, weighted), outputs(model, CAPTIONS))


@pytest.mark.parametrize("build", MODELS)
def test_no_weight_is_a_hole(build):
    model, weights, mask = build(), torch.zeros(CAPTIONS.mask.shape), CAPTIONS.mask.clone()
    weights[0, 1], mask[0, 1] = -torch.inf, False
    with torch.no_grad():
        without = outputs(model, dataclasses.replace(CAPTIONS, log_weights=weights))
        assert torch.equal(without, outputs(model, dataclasses.replace(CAPTIONS, mask=mask)))


@pytest.mark.parametrize("build", MODELS[:2])
def test_a_weight_of_two_is_the_column_twice(build):
    model, weights = build(), torch.zeros(CAPTIONS.mask.shape)
    weights[2, 0] = torch.tensor(2.0).log()
    twice = Captions.pad([*ROWS[:2], ROWS[2][[0, 0, 1]]])
    with torch.no_grad():
        heavier = outputs(model, dataclasses.replace(CAPTIONS, log_weights=weights))
        torch.testing.assert_close(heavier, outputs(model, twice), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("condition", [ACROSS, BEFORE])
def test_weights_reach_the_steps_of_a_cache(condition):
    model, weights = gpt(condition), torch.randn(CAPTIONS.mask.shape, generator=generator(3))
    captions = dataclasses.replace(CAPTIONS, log_weights=weights)
    cache = model.new_cache(3, 9)
    with torch.no_grad():
        found = [model.prefill(captions, cache), model.step(IDS[:, :5], cache), model.step(IDS[:, 5:6], cache)]
        expected = model.logits(captions, IDS)[:, :7]
        assert not torch.allclose(expected, model.logits(CAPTIONS, IDS)[:, :7], atol=1e-3)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- maps


def record_of(model: ConditionalGenerator, captions: Captions, **options) -> tuple[AttentionRecord, torch.Tensor]:
    """The record of one call, and what the call gave."""
    asked = AttentionRecord(**options)
    return asked, outputs(model, model.read(captions).recorded(asked))


@pytest.mark.parametrize(("build", "positions"), [(gpt, 9), (xar, 16)])
def test_maps_are_distributions_and_change_nothing(build, positions):
    model = build()
    asked, found = record_of(model, CAPTIONS)
    assert torch.equal(found, outputs(model, CAPTIONS))
    assert sorted(asked.maps) == [0, 1]
    for maps in asked.maps.values():
        assert [tuple(one.shape) for one in maps] == [(3, 2, positions, 6)]  # images, heads, positions, columns
        torch.testing.assert_close(maps[0].sum(-1), torch.ones(3, 2, positions))
        assert not maps[0].masked_select(~CAPTIONS.mask[:, None, None]).any()


def test_a_map_is_what_attention_multiplies_values_with():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    seen = torch.tensor([True, True, False, True, True]).expand(2, 1, 1, 5)
    for mask in (None, seen, torch.randn(2, 1, 1, 5)):
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(record.attention_map(q, k, mask) @ v, expected)


def test_only_the_layers_that_are_asked_for_are_recorded():
    asked, _ = record_of(gpt(), CAPTIONS, layers={1})
    assert sorted(asked.maps) == [1]
    asked.clear()
    assert not asked.maps


def test_no_map_is_computed_unless_asked_for(monkeypatch):
    def refuse(*args):
        raise AssertionError("a map was computed")

    monkeypatch.setattr(record, "attention_map", refuse)
    for build in (gpt, xar, lambda: gpt(BEFORE)):
        outputs(build(), CAPTIONS)
    for condition in (ACROSS, BEFORE):
        gpt(condition).generate(CAPTIONS, seed=0, indices=range(3))
        with pytest.raises(AssertionError, match="a map was computed"):
            record_of(gpt(condition), CAPTIONS)


@pytest.mark.parametrize("condition", [ACROSS, BEFORE])
def test_steps_of_a_cache_are_recorded_until_the_record_is_taken_away(condition):
    model, asked = gpt(condition), AttentionRecord(layers=[0])
    cache = model.new_cache(3, 9)
    with torch.no_grad():
        model.prefill(model.read(CAPTIONS).recorded(asked), cache)
        model.step(IDS[:, :4], cache)
        cache.memory = None if cache.memory is None else cache.memory.recorded(None)
        cache.prefix_record = None
        model.step(IDS[:, 4:5], cache)
        whole, _ = record_of(model, CAPTIONS)
    slots = model.config.prefix_length
    assert [one.shape[2] for one in asked.maps[0]] == [slots, 4]
    found, expected = torch.cat(asked.maps[0], dim=2), whole.maps[0][0][:, :, : slots + 4]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_maps_of_a_prefix_are_what_its_slots_have_of_the_attention():
    model = gpt(BEFORE)
    asked, logits = record_of(model, CAPTIONS)
    assert torch.equal(logits, model.logits(CAPTIONS, IDS))
    closed = ~model.read(CAPTIONS).prefix_mask[:, None, None]
    for (shares,) in asked.maps.values():
        assert shares.shape == (3, 2, LONGEST + 8, LONGEST)
        last, tokens = shares[:, :, LONGEST - 1], shares[:, :, LONGEST:]
        torch.testing.assert_close(last.sum(-1), torch.ones(3, 2))  # sees the caption alone
        assert (tokens.sum(-1) < 1).all()
        assert not tokens.masked_select(closed).any()


# ---------------------------------------------------------------- gradients


def of_features(captions: Captions) -> tuple[Captions, torch.Tensor]:
    """The captions with features to differentiate with respect to."""
    features = captions.features.clone().requires_grad_()
    return dataclasses.replace(captions, features=features), features


@pytest.mark.parametrize(
    ("condition", "call"),
    [(ACROSS, "hidden"), (ACROSS, "prefill"), (ACROSS, "step"), (BEFORE, "hidden"), (BEFORE, "prefill")],
)
def test_a_map_of_a_gpt_has_gradients_by_features(condition, call):
    model, asked = gpt(condition).requires_grad_(False), AttentionRecord()
    captions, features = of_features(CAPTIONS)
    reading = model.read(captions).recorded(asked)
    if call == "hidden":
        model.hidden(reading, IDS[:, :-1])
    else:
        cache = model.new_cache(3, 9)
        model.prefill(reading, cache)
        if call == "step":
            asked.clear()
            model.step(IDS[:, :4], cache)
    for layer in range(DEPTH):
        seen = asked.maps[layer][0][:, :, -1].square().sum()
        (gradient,) = torch.autograd.grad(seen, features, retain_graph=True)
        assert gradient[CAPTIONS.mask].any(dim=-1).all(), "of every column that is seen"
        assert not gradient[~CAPTIONS.mask].any()


@pytest.mark.parametrize("build", MODELS)
def test_outputs_have_gradients_by_features_and_weights(build):
    model = build().requires_grad_(False)
    captions, features = of_features(CAPTIONS)
    weights = torch.zeros(CAPTIONS.mask.shape, requires_grad=True)
    captions = dataclasses.replace(captions, log_weights=weights)
    result = outputs(model, captions)[:2].square().sum()
    by_features, by_weights = torch.autograd.grad(result, [features, weights])
    seen = CAPTIONS.mask[:2]
    assert by_features[:2][seen].any(dim=-1).all()
    assert by_weights[:2][seen].all()
    assert not by_weights[2].any()
    step = 1e-2 * by_weights / by_weights.abs().max()
    with torch.no_grad():
        moved = [outputs(model, dataclasses.replace(CAPTIONS, log_weights=sign * step))[:2] for sign in (1, -1)]
    slope = (moved[0].square().sum() - moved[1].square().sum()) / 2
    assert slope.item() == pytest.approx((step * by_weights).sum().item(), rel=0.02)


def test_a_map_of_an_xar_has_gradients_by_features():
    model, (captions, features) = xar().requires_grad_(False), of_features(CAPTIONS)
    asked, _ = record_of(model, captions)
    for layer in range(DEPTH):
        (gradient,) = torch.autograd.grad(asked.maps[layer][0][:, :, :, 0].sum(), features, retain_graph=True)
        assert gradient[CAPTIONS.mask].any(dim=-1).all()


# ---------------------------------------------------------------- captions as a prefix

PREFIXED = [pytest.param({}, id="learned"), pytest.param({"positions": "rotary_2d"}, id="llamagen")]


def test_captions_move_to_the_last_columns_with_their_holes():
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    features = torch.arange(1.0, 9.0).view(2, 4, 1)
    captions = Captions(features, mask, features[..., 0], torch.arange(16).view(2, 4, 2))
    moved = captions.aligned_right(5)
    assert moved.mask.int().tolist() == [[0, 0, 1, 0, 1], [0, 0, 1, 1, 1]]
    assert moved.features[..., 0].tolist() == [[0, 0, 1, 2, 3], [0, 5, 6, 7, 8]]
    assert moved.log_weights.tolist() == moved.features[..., 0].tolist()
    assert moved.spans[0].tolist() == [[0, 0], [0, 0], [0, 1], [2, 3], [4, 5]]
    assert moved.columns(0, 0, 5) == [2, 4], "not the hole"
    again = moved.aligned_right(5)
    assert torch.equal(again.features, moved.features)
    assert captions.aligned_right(3).mask.int().tolist() == [[1, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("variant", PREFIXED)
def test_ragged_captions_equal_one_by_one(variant):
    model = gpt(BEFORE, **variant)
    with torch.no_grad():
        together = model.logits(CAPTIONS, IDS)
        alone = [model.logits(Captions.pad([row]), IDS[i : i + 1]) for i, row in enumerate(ROWS)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model.logits(CAPTIONS[[1, 1, 1]], IDS), together, atol=1e-2)


@pytest.mark.parametrize("variant", PREFIXED)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_sample_depends_on_its_caption_alone(variant, guidance):
    model = gpt(BEFORE, **variant)
    sampling = dataclasses.replace(model.config.sampling, guidance=guidance)
    options = {"seed": 9, "sampling": sampling}
    batch = model.generate(CAPTIONS, indices=[10, 11, 12], **options).ids
    assert torch.equal(model.generate(CAPTIONS, indices=[10, 11, 12], cached=False, **options).ids, batch)
    alone = [model.generate(Captions.pad([row]), indices=[10 + i], **options).ids for i, row in enumerate(ROWS)]
    assert torch.equal(torch.cat(alone), batch)


def test_windows_after_a_ragged_prefix_equal_a_fresh_forward():
    model = gpt(BEFORE)
    cache = model.new_cache(3, 9)
    with torch.no_grad():
        expected = model.logits(CAPTIONS, IDS)
        model.prefill(CAPTIONS, cache)
        model.step(IDS[:, :5], cache)
        cache.truncate(LONGEST + torch.tensor([1, 3, 2]))  # rows of different lengths
        rows = torch.arange(3)[:, None]
        columns = torch.tensor([1, 3, 2])[:, None] + torch.arange(3)
        found = model.step(IDS[rows, columns], cache)
    torch.testing.assert_close(found, expected[rows, columns + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("condition", [ACROSS, BEFORE])
def test_weights_leave_the_unconditional_rows_alone(condition):
    model, weights = gpt(condition), torch.randn(CAPTIONS.mask.shape, generator=generator(3))
    both = model.with_unconditional(dataclasses.replace(CAPTIONS, log_weights=weights))
    assert both.log_weights[:3].any(dim=1).all()
    assert not both.log_weights[3:].any()
    with torch.no_grad():
        expected = model.logits(model.unconditional(CAPTIONS), IDS)
        torch.testing.assert_close(model.logits(both, IDS.repeat(2, 1))[3:], expected, atol=1e-5, rtol=1e-5)


def test_no_caption_is_seen_where_the_caption_is():
    model = gpt(BEFORE)
    none = model.unconditional(CAPTIONS)
    assert none.mask.sum(1).tolist() == [3, 6, 2]
    assert none.mask[:, -1].all()
    assert torch.equal(none.features[1], model.no_caption)
    both = model.with_unconditional(CAPTIONS)
    with torch.no_grad():
        twice = model.logits(both, IDS.repeat(2, 1))
        torch.testing.assert_close(twice[:3], model.logits(CAPTIONS, IDS))
        torch.testing.assert_close(twice[3:], model.logits(none, IDS))


def test_dropped_captions_are_none_of_their_length():
    model = gpt(dataclasses.replace(BEFORE, drop=1.0), dropout=0.0)
    with torch.no_grad():
        logits = model.logits(model.unconditional(CAPTIONS), IDS)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten())
    found = model(Tokens.full(IDS), CAPTIONS, generator=generator()).total
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("variant", PREFIXED)
def test_a_model_with_a_prefix_is_trained_but_for_none(variant):
    model = gpt(dataclasses.replace(BEFORE, drop=0.5), **variant).train()
    model(Tokens.full(IDS), CAPTIONS, generator=generator(2)).total.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    assert "no_caption" in model.state_dict()
    assert not any("cross" in name or "start" in name for name in model.state_dict())


def test_a_reading_says_what_the_network_sees():
    across, before = gpt().read(CAPTIONS), gpt(BEFORE).read(CAPTIONS)
    assert across.prefix.shape == (3, 1, 32)
    assert across.prefix_mask is None
    assert len(across.memory.layers) == DEPTH
    assert before.prefix.shape == (3, LONGEST, 32)
    assert before.prefix_mask.tolist() == [[False] * 3 + [True] * 3, [True] * 6, [False] * 4 + [True] * 2]
    assert before.memory is None
    assert before.recorded(AttentionRecord()).prefix_record is not None
    assert across.recorded(AttentionRecord()).prefix_record is None
    classes = gpt(StartPlusClass(num_classes=5)).read(torch.tensor([0, 4]))
    assert isinstance(classes, Reading)
    assert classes.prefix.shape == (2, 1, 32)
    assert xar().read(CAPTIONS).prefix is None


# ---------------------------------------------------------------- readings and controls in a drawing


def drawn(model: ConditionalGenerator, condition: Captions | Reading | torch.Tensor, **options) -> torch.Tensor:
    """Ids or latents, guided unless the options say otherwise."""
    if isinstance(model, XAR):
        options = {"sampling": FlowSampling(steps=(3,), guidance=(2.0,) * 4), **options}
    found = model.generate(condition, seed=0, indices=range(3), **options)
    return found.ids if isinstance(found, Tokens) else found


def heavier(reading: Reading) -> Reading:
    """The same with the last column of each caption weighed down."""

    def weighed(seen: torch.Tensor) -> torch.Tensor:
        weights = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        weights[..., -1] -= 3
        weights[..., 0] += 3
        return weights

    if reading.memory is None:
        return dataclasses.replace(reading, prefix_mask=weighed(reading.prefix_mask))
    return dataclasses.replace(reading, memory=dataclasses.replace(reading.memory, mask=weighed(reading.memory.mask)))


@pytest.mark.parametrize("build", MODELS)
def test_a_recorded_reading_draws_the_same(build):
    model, asked = build(), AttentionRecord(layers=[0])
    expected = drawn(model, CAPTIONS)
    with torch.no_grad():
        reading = model.reading(CAPTIONS)
    assert len(reading) == 6
    assert torch.equal(drawn(model, reading), expected)
    assert torch.equal(drawn(model, reading.recorded(asked)), expected)
    rows = {one.shape[0] for one in asked.maps[0]}
    assert rows == {6}
    calls = 9 if isinstance(model, GPT) else 12
    assert len(asked.maps[0]) == calls
    with pytest.raises(
        ValueError, match=r"3 images need a reading of 6 rows \(of both streams: see `reading`\), not of 3"
    ):
        drawn(model, reading.rows(slice(3)))


@pytest.mark.parametrize("build", MODELS)
def test_a_reading_draws_unguided_with_its_first_half(build):
    model = build()
    sampling = FlowSampling(steps=(3,), guidance=(1.0,)) if isinstance(model, XAR) else TokenSampling(guidance=1.0)
    expected = drawn(model, CAPTIONS, sampling=sampling)
    assert torch.equal(drawn(model, model.reading(CAPTIONS, guided=False), sampling=sampling), expected)
    torch.testing.assert_close(drawn(model, model.reading(CAPTIONS), sampling=sampling), expected)


@pytest.mark.parametrize("cached", [True, False])
def test_classes_can_be_read_before_they_are_drawn(cached):
    labels = torch.tensor([0, 4, -1])
    model = gpt(StartPlusClass(num_classes=5))
    assert torch.equal(drawn(model, model.reading(labels), cached=cached), drawn(model, labels, cached=cached))
    classes = {"kind": "class", "num_classes": 5}
    model = awake(XAR(dataclasses.replace(xar().config, condition=ClassModulation(**classes))))
    assert torch.equal(drawn(model, model.reading(labels)), drawn(model, labels))


@pytest.mark.parametrize("options", [{}, {"cached": False}], ids=["cached", "plain"])
@pytest.mark.parametrize("build", MODELS)
def test_a_control_changes_what_follows_its_step(build, options):
    model, seen = build(), []
    options = {} if isinstance(model, XAR) else options  # which draws one way
    last = 9 if isinstance(model, GPT) else 12
    at = 4 if isinstance(model, GPT) else 6  # the third entity

    def control(step: int, reading: Reading) -> Reading | None:
        assert torch.is_grad_enabled()
        seen.append(step)
        return heavier(reading) if step == at else None

    expected, found = drawn(model, CAPTIONS, **options), drawn(model, CAPTIONS, control=control, **options)
    assert seen == list(range(last))
    assert not found.requires_grad
    if isinstance(model, XAR):
        expected, found, at = model.entities.cut(expected), model.entities.cut(found), 8
    assert torch.equal(found[:, :at], expected[:, :at])
    assert not torch.equal(found[:, at:], expected[:, at:])


def test_a_control_from_the_start_is_another_reading():
    for build in (gpt, xar, lambda: gpt(BEFORE)):
        model = build()
        edited = heavier(model.reading(CAPTIONS))
        found = drawn(model, CAPTIONS, control=lambda step, reading: heavier(reading) if step == 0 else None)
        assert torch.equal(found, drawn(model, edited))


def test_another_prefix_is_read_with_the_tokens_so_far():
    """As by recomputing everything at each step."""
    model, other = gpt(BEFORE), gpt(BEFORE).reading(CAPTIONS[[1, 2, 0]])
    ids = [
        drawn(model, CAPTIONS, control=lambda step, reading: other if step == 4 else None, cached=cached)
        for cached in (True, False)
    ]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], drawn(model, CAPTIONS))


def test_a_control_keeps_the_rows():
    for model in (gpt(), xar()):
        with pytest.raises(ValueError, match="control: a reading has to keep its rows and labels"):
            drawn(model, CAPTIONS, control=lambda step, reading: reading.rows(slice(2)))
