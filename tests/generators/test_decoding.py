"""Windows over a filled cache, the law of whole sequences, and sequences that end or pick their slots."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

import imgtok
from imgtok.generators import decoding
from imgtok.generators.conditioning import ClassSlot, Condition, StartPlusClass, TextCrossAttention, TextPrefix
from imgtok.generators.decoding import Uniforms
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.sampling import TokenSampling, law
from imgtok.text.captions import Captions
from imgtok.tokenizers.tokens import Tokens

TINY = GPTConfig(vocab_size=24, num_tokens=16, width=32, depth=2, num_heads=2, mlp_multiple=32)
TEXT = TextCrossAttention(text_width=12, text_length=6, empty_length=2)
PREFIX = TextPrefix(text_width=12, text_length=6)
VARIANTS = {
    "learned": {},
    "llamagen": {"positions": "rotary_2d"},
    "flextok": {"condition": StartPlusClass(num_classes=5), "qk_norm": True},
    "text": {"condition": TEXT},
    "text prefix": {"condition": PREFIX, "positions": "rotary_2d"},
    "digits": {"levels": (4, 3, 2)},
    "slots": {"ends": True, "num_slots": 40},
}
EACH = pytest.mark.parametrize("name", VARIANTS)


def build(**changes) -> GPT:
    """A tiny model whose laws are not flat."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, **changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def some_condition(model: GPT, rows: int = 3) -> Condition:
    if not model.config.reads_text:
        return torch.arange(rows) % model.config.num_classes
    generator = torch.Generator().manual_seed(5)
    return Captions.pad([torch.randn(1 + i % 6, 12, generator=generator) for i in range(rows)])


def some_slots(model: GPT, ids: Tensor) -> Tensor | None:
    """Increasing along each row."""
    if not model.config.num_slots:
        return None
    generator = torch.Generator().manual_seed(6)
    rows = [torch.randperm(model.config.num_slots, generator=generator)[: ids.shape[1]].sort().values for _ in ids]
    return torch.stack(rows)


# ---------------------------------------------------------------- windows


def gathered(values: Tensor, positions: Tensor) -> Tensor:
    """The values (R, L, ...) at the given columns of each row."""
    return torch.stack([row[at] for row, at in zip(values, positions, strict=True)])


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 7])
@EACH
def test_a_window_over_ragged_rows_equals_a_fresh_forward(name, length):
    """Rows hold 10 positions, forget all but 4, 7 and 9 of them, and go on from there: with other tokens first, which
    are then forgotten too.
    """
    model = build(**VARIANTS[name])
    condition, ids = some_condition(model), randint(24, 3, 16)
    slots = some_slots(model, ids)
    whole = model.hidden(condition, ids[:, :15], slots=None if slots is None else slots[:, :15])  # (3, 16, D)
    cache, prefix = model.new_cache(3, 17), model.config.prefix_length
    first = None if slots is None else slots[:, :9]
    model.hidden(condition, ids[:, :9], cache, slots=first)
    assert cache.length == prefix + 9
    tokens_held = torch.tensor([3, 6, 8])
    held = prefix + tokens_held
    for ids_now in ((ids + 5) % 24, ids):
        cache.truncate(held)
        assert torch.equal(cache.lengths, held)
        places = tokens_held[:, None] + torch.arange(length)
        window, window_slots = (None if x is None else gathered(x, places) for x in (ids_now, slots))
        states = model.hidden(None, window, cache, slots=window_slots)
        assert torch.equal(cache.lengths, held + length)
        close = torch.allclose(states, gathered(whole, places + 1), atol=1e-5)
        assert close == (ids_now is ids)
    cache.truncate(held)
    given = model.hidden(None, window, cache, prefix + places, slots=window_slots)
    assert torch.equal(given, states)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 3, 7])
@EACH
def test_a_window_over_equal_rows_equals_a_fresh_forward(name, length):
    model = build(**VARIANTS[name])
    condition, ids = some_condition(model), randint(24, 3, 16)
    slots = some_slots(model, ids)
    whole = model.hidden(condition, ids[:, :15], slots=None if slots is None else slots[:, :15])
    cache, prefix = model.new_cache(3, 16), model.config.prefix_length
    for start, stop in ((0, 6), (6, 6 + length), (4, 4 + length)):
        cache.truncate(prefix + start if start else 0)
        part = None if slots is None else slots[:, start:stop]
        states = model.hidden(condition if start == 0 else None, ids[:, start:stop], cache, slots=part)
        assert cache.length == prefix + stop
        torch.testing.assert_close(states[:, -length:], whole[:, 1 + stop - length : 1 + stop], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_steps_give_the_logits_of_the_training_path():
    model = build()
    condition, ids = some_condition(model), randint(24, 3, 16)
    cache = model.new_cache(3, 16)
    steps = [model.prefill(condition, cache), *(model.step(ids[:, k : k + 1], cache) for k in range(4))]
    steps += [model.step(ids[:, 4:9], cache), model.step(ids[:, 9:15], cache)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model.logits(condition, ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "length"),
    [
        pytest.param("llamagen", 1, marks=pytest.mark.slow),
        pytest.param("text", 3, marks=pytest.mark.slow),
        ("text prefix", 1),
    ],
)
def test_a_step_at_given_positions_compiles_once(name, length):
    model = build(**VARIANTS[name], depth=1)
    condition, ids, prefix = some_condition(model), randint(24, 3, 16), model.config.prefix_length
    expected = model.logits(condition, ids)
    cache = model.new_cache(3, 16)
    model.prefill(condition, cache)
    cache.truncate(torch.full((3,), prefix))  # as after a round of speculation: rows may differ
    torch._dynamo.reset()
    step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    for call in range(3):
        tokens = length * call + torch.arange(length).expand(3, -1)
        logits = step(gathered(ids, tokens), cache, prefix + tokens)
        torch.testing.assert_close(logits, gathered(expected, tokens + 1), atol=1e-5, rtol=1e-5)
        if call == 0:
            torch._dynamo.utils.counters.clear()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    assert cache.lengths.tolist() == [prefix + 3 * length] * 3


def test_one_step_over_a_filled_cache_can_be_differentiated():
    """As a control does: the past without gradients, one call with them."""
    model = build()
    condition, ids = some_condition(model), randint(24, 3, 16)
    cache = model.new_cache(3, 16)
    with torch.no_grad():
        model.prefill(condition, cache)
        expected = model.step(ids[:, :1], cache)
        cache.truncate(1)
    logits = model.step(ids[:, :1], cache)
    torch.testing.assert_close(logits.detach(), expected)
    logits.logsumexp(-1).sum().backward()
    gradients = [block.attention.qkv_proj.weight.grad for block in model.blocks]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@torch.no_grad()
def test_a_cache_is_empty_again_after_ragged_use():
    model = build()
    condition, ids = some_condition(model), randint(24, 3, 16)
    cache = model.new_cache(3, 16)
    expected = model.prefill(condition, cache)
    model.step(ids[:, :4], cache)
    cache.truncate(torch.tensor([2, 4, 3]))
    model.step(ids[:, :2], cache)
    cache.truncate(0)
    assert (cache.length, cache.lengths.tolist()) == (0, [0, 0, 0])
    assert torch.equal(model.prefill(condition, cache), expected)


@torch.no_grad()
def test_a_window_past_the_end_is_refused_and_one_shifted_back_is_right():
    model = build()
    condition, ids = some_condition(model), randint(24, 3, 16)
    cache = model.new_cache(3, 16)  # room for the start and 15 tokens
    expected = model.logits(condition, ids)
    model.prefill(condition, cache)
    model.step(ids[:, :14], cache)
    with pytest.raises(ValueError, match=r"shorter sequence: 16 positions, not 18$"):
        model.step(ids[:, :3], cache)
    held = torch.tensor([15, 12, 14])
    cache.truncate(held)
    with pytest.raises(ValueError, match=r"not 18; a window near the end of a row has to start earlier"):
        model.step(ids[:, :3], cache)
    assert torch.equal(cache.lengths, held)
    positions = held.clamp(max=13)[:, None] + torch.arange(3)
    found = model.step(gathered(ids, positions - 1), cache, positions)
    torch.testing.assert_close(found, gathered(expected, positions), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_steps_with_slots_give_what_the_training_path_gives():
    model = build(**VARIANTS["slots"])
    condition, ids = some_condition(model), randint(24, 3, 16)
    slots = some_slots(model, ids)
    cache = model.new_cache(3, 16)
    steps = [model.prefill(condition, cache)]
    steps += [model.step(ids[:, a:b], cache, slots=slots[:, a:b]) for a, b in ((0, 1), (1, 6), (6, 15))]
    states = torch.cat(steps, dim=1)
    torch.testing.assert_close(model.read_out(states, slots), model.logits(condition, ids, slots), atol=1e-5, rtol=1e-5)
    assert model.slot_logits(states).shape == (3, 16, 41)


# ---------------------------------------------------------------- the law of sequences


def grid(side: int, *, dims: int) -> Tensor:
    """All combinations of the midpoints of `side` equal parts of [0, 1), (side ** dims, dims)."""
    middles = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.cartesian_prod(*[middles] * dims).view(-1, dims)


def counts_of_cells(probabilities: Tensor, side: int) -> list[int]:
    """How many midpoints of [0, 1) fall to each outcome."""
    ends = probabilities.double().cumsum(0)
    middles = (torch.arange(side, dtype=torch.float64) + 0.5) / side * ends[-1]
    below = [int((middles < end).sum()) for end in ends]
    return [here - before for here, before in zip(below, [0, *below[:-1]], strict=True)]


@pytest.mark.parametrize("ends", [False, True], ids=["fixed", "ends"])
@pytest.mark.parametrize(
    "sampling",
    [
        TokenSampling(guidance=1.0),
        TokenSampling(guidance=2.0, temperature=1.3),
        TokenSampling(guidance=1.5, top_k=2),
        TokenSampling(guidance=1.0, top_p=0.8),
        TokenSampling(guidance=1.0, forbidden=(1,)),
    ],
    ids=["plain", "guided", "top_k", "top_p", "forbidden"],
)
def test_sequences_have_exactly_the_probabilities_of_the_forward_pass(sampling, ends):
    """Over a grid of uniforms every sequence must come as often as the laws of its tokens say."""
    model, side = build(vocab_size=3, num_tokens=3, ends=ends), 20
    uniforms = grid(side, dims=3)
    drawn = decoding.cached(model, torch.full((len(uniforms),), 2), Uniforms(uniforms), sampling)
    found = [tuple(row[:n]) for row, n in zip(drawn.ids.tolist(), drawn.lengths.tolist(), strict=True)]
    total = 0
    for length in (1, 2, 3) if ends else (3,):
        for sequence in itertools.product(range(3), repeat=length):
            with torch.no_grad():
                padded = torch.tensor([[*sequence, 0, 0, 0][:3]])
                given, none = (model.logits(torch.tensor([label]), padded)[0] for label in (2, -1))
            expected = side ** max(0, 3 - length - 1)  # uniforms that nobody asks for
            for k, token in enumerate((*sequence, 3)[:3]):  # 3 is the end
                closed = torch.tensor([False] * 3 + [k == 0]) if ends else None
                row = law(given[k], sampling, none[k] if sampling.guidance != 1 else None, closed)
                expected *= counts_of_cells(row, side)[token]
            assert found.count(sequence) == expected, sequence
            total += expected
    assert total == len(uniforms)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", ["learned", "ends", "slots", "text", "text prefix"])
def test_the_loops_draw_the_same(name, guidance):
    model = build(**{"ends": {"ends": True}}.get(name, VARIANTS.get(name, {})))
    options = {"seed": 3, "indices": range(40), "sampling": TokenSampling(guidance=guidance, top_k=20)}
    cached, plain = (model.generate(some_condition(model, 40), cached=c, **options) for c in (True, False))
    assert torch.equal(cached.ids, plain.ids)
    assert torch.equal(cached.lengths, plain.lengths)
    assert (cached.slots is None) == (name != "slots")
    if cached.slots is not None:
        assert torch.equal(cached.slots, plain.slots)


@pytest.mark.parametrize("name", ["learned", "slots"])
def test_the_loops_follow_a_schedule_of_guidance(name):
    """Beginning like, and then unlike, constant guidance of as much."""
    model = build(**VARIANTS.get(name, {}))
    options, condition = {"seed": 3, "indices": range(40)}, some_condition(model, 40)
    how = TokenSampling(guidance=4.0, schedule="linear", interval=(0, 9))
    cached, plain = (model.generate(condition, cached=c, sampling=how, **options) for c in (True, False))
    assert torch.equal(cached.ids, plain.ids)
    started = model.generate(condition, sampling=TokenSampling(guidance=4.0, interval=(0, 4)), **options)
    constant = model.generate(condition, sampling=TokenSampling(guidance=4.0), **options)
    assert torch.equal(started.ids[:, :4], constant.ids[:, :4])
    assert not torch.equal(started.ids, constant.ids)
    assert not torch.equal(cached.ids, constant.ids)


def test_at_temperature_zero_the_most_likely_token_comes():
    model = build()
    greedy = TokenSampling(temperature=0.0, guidance=1.0)
    condition = some_condition(model)
    ids = model.generate(condition, seed=0, indices=range(3), sampling=greedy).ids
    assert torch.equal(ids, model.generate(condition, seed=1, indices=range(3), sampling=greedy).ids)
    with torch.no_grad():
        assert torch.equal(model.logits(condition, ids).argmax(-1), ids)


def test_forbidden_ids_do_not_come():
    model = build()
    sampling = TokenSampling(guidance=2.0, forbidden=tuple(range(20)))
    ids = model.generate(some_condition(model, 50), seed=0, indices=range(50), sampling=sampling).ids
    assert set(ids.unique().tolist()) == {20, 21, 22, 23}
    with pytest.raises(ValueError, match=r"sampling.forbidden: ids lie in 0 to 23"):
        model.generate(some_condition(model), seed=0, indices=range(3), sampling=TokenSampling(forbidden=(24,)))


# ---------------------------------------------------------------- sequences of any length


def some_tokens(lengths: list[int], columns: int, slots: int = 0) -> Tokens:
    ids = randint(24, len(lengths), columns, seed=3)
    picked = torch.stack([torch.randperm(slots)[:columns].sort().values for _ in lengths]) if slots else None
    return Tokens(ids, torch.tensor(lengths), picked)


ALWAYS = ClassSlot(num_classes=5, drop=0.0)


def flat(logits: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    return logits.flatten(0, 1), tokens.ids.flatten()


def loss(model: GPT, tokens: Tokens) -> Tensor:
    labels = torch.arange(len(tokens))
    return model(tokens, labels, generator=torch.Generator().manual_seed(0)).total


@pytest.mark.parametrize("slots", [0, 40])
def test_the_loss_is_that_of_what_is_meant(slots):
    """Whatever stands in the padding, and however much of it there is."""
    model = build(ends=True, num_slots=slots, condition=ALWAYS)
    tokens = some_tokens([5, 16, 1, 9], 16, slots)
    expected = loss(model, tokens)
    other = Tokens(tokens.ids.where(tokens.mask, 7), tokens.lengths, tokens.slots)
    assert torch.equal(loss(model, other), expected)
    shorter = Tokens(tokens.ids[[0, 2, 3]], tokens.lengths[[0, 2, 3]], None if not slots else tokens.slots[[0, 2, 3]])
    narrow = Tokens(shorter.ids[:, :9], shorter.lengths, None if not slots else shorter.slots[:, :9])
    torch.testing.assert_close(loss(model, narrow), loss(model, shorter), atol=1e-6, rtol=1e-6)


def test_padding_counts_for_nothing_without_ends_too():
    model = build(condition=ALWAYS)
    tokens = some_tokens([5, 16, 1, 9], 16)
    with torch.no_grad():
        logits = model.logits(torch.arange(4), tokens.ids)
        rows = torch.nn.functional.cross_entropy(*flat(logits, tokens), reduction="none")
        expected = rows.view(4, 16)[tokens.mask].mean()
        torch.testing.assert_close(loss(model, tokens), expected)
        assert torch.equal(
            loss(model, Tokens.full(tokens.ids)), torch.nn.functional.cross_entropy(*flat(logits, tokens))
        )


def test_the_loss_is_the_probability_of_the_whole_sequence():
    """With ends: the mean over tokens and ends of -log p; enumerated, all sequences make up 1."""
    model = build(vocab_size=2, num_tokens=3, ends=True, condition=ALWAYS)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for length in (1, 2, 3):
            for ids in itertools.product(range(2), repeat=length):
                tokens = Tokens(torch.tensor([ids]), torch.tensor([length]))
                terms = length + (length < 3)
                total += torch.exp(-loss(model, tokens).double() * terms)
    first = model.logits(torch.tensor([0]), torch.zeros(1, 1, dtype=torch.long))[0, 0].softmax(-1)
    assert total.item() == pytest.approx(1 - first[2].item(), abs=1e-5)  # a sequence of none is never drawn


def test_slots_increase_and_sequences_end():
    model = build(ends=True, num_slots=40)
    tokens = model.generate(some_condition(model, 60), seed=0, indices=range(60), sampling=TokenSampling(guidance=1.5))
    assert tokens.ids.shape == tokens.slots.shape == (60, 16)
    assert 1 <= tokens.lengths.min() < tokens.lengths.max() <= 16
    for ids, slots, length in zip(tokens.ids, tokens.slots, tokens.lengths.tolist(), strict=True):
        assert (slots[:length].diff() > 0).all()
        assert slots[:length].max() < 40
        assert not ids[length:].any()
        assert not slots[length:].any()


def test_the_joint_law_of_slots_ids_and_ends():
    """Enumerated over a grid of uniforms, as for ids alone."""
    model, side = build(vocab_size=2, num_tokens=2, ends=True, num_slots=3), 12
    points = grid(side, dims=4)
    uniforms = Uniforms(points[:, :2], points[:, 2:])
    sampling = TokenSampling(guidance=1.0)
    drawn = decoding.cached(model, torch.full((len(points),), 2), uniforms, sampling)
    rows = zip(drawn.ids.tolist(), drawn.slots.tolist(), drawn.lengths.tolist(), strict=True)
    found = [tuple(zip(slots[:n], ids[:n], strict=True)) for ids, slots, n in rows]
    total, label = 0, torch.tensor([2])
    nothing = torch.empty(1, 0, dtype=torch.long)
    with torch.no_grad():
        start = model.hidden(label, nothing, slots=nothing)[0, -1]
        first_slot = model.slot_logits(start).masked_fill(torch.tensor([False] * 3 + [True]), -torch.inf)
        for slot, number in enumerate(counts_of_cells(first_slot.softmax(-1), side)[:3]):
            ids_law = model.read_out(start, torch.tensor(slot)).softmax(-1)
            for id_, times in enumerate(counts_of_cells(ids_law, side)):
                state = model.hidden(label, torch.tensor([[id_]]), slots=torch.tensor([[slot]]))[0, -1]
                open_ = torch.arange(4) > slot
                next_slot = counts_of_cells(model.slot_logits(state).masked_fill(~open_, -torch.inf).softmax(-1), side)
                assert found.count(((slot, id_),)) == number * times * next_slot[3] * side
                total += number * times * next_slot[3] * side
                for second in range(slot + 1, 3):
                    second_law = model.read_out(state, torch.tensor(second)).softmax(-1)
                    for second_id, often in enumerate(counts_of_cells(second_law, side)):
                        expected = number * times * next_slot[second] * often
                        assert found.count(((slot, id_), (second, second_id))) == expected
                        total += expected
    assert total == len(points)


@pytest.mark.parametrize("slots", [0, 70])
def test_a_loop_stops_when_all_have_ended(slots):
    """On a CPU at once; how often it looks on an accelerator, the fake one of `test_fake_cuda` counts."""
    model, steps = build(vocab_size=2, num_tokens=64, ends=True, num_slots=slots), []
    patient = model.generate(some_condition(model), seed=0, indices=range(3), cached=False)
    assert 1 < patient.lengths.max() < 50
    drawn = model.generate(some_condition(model), seed=0, indices=range(3), on_step=steps.append)
    assert len(steps) == int(patient.lengths.max()) + 1  # with the end
    assert torch.equal(patient.ids, drawn.ids)
    assert torch.equal(patient.lengths, drawn.lengths)


@pytest.mark.parametrize("columns", [3, 2])
def test_the_probabilities_of_all_sequences_of_slots_and_ids_make_up_one(columns):
    """Also where a sequence may be shorter than there are slots, and so ends by itself."""
    model = build(vocab_size=2, num_tokens=columns, ends=True, num_slots=3, condition=ALWAYS)
    total, count = 0.0, 0
    for length in range(1, columns + 1):
        for slots in itertools.combinations(range(3), length):
            for ids in itertools.product(range(2), repeat=length):
                tokens = Tokens(torch.tensor([ids]), torch.tensor([length]), torch.tensor([slots]))
                with torch.no_grad():
                    parts = model(tokens, torch.tensor([0]), generator=torch.Generator()).parts
                nats = parts["cross_entropy"] * length + parts["slots"] * (length + (length < columns))
                total += torch.exp(-nats.double()).item()
                count += 1
    assert count == {3: 26, 2: 18}[columns]
    assert total == pytest.approx(1, abs=1e-5)


def test_an_image_is_the_same_in_any_company():
    """Rows that end early or late beside it, and where it stands; a batch of its own too."""
    model = build(ends=True, num_slots=40)
    sampling = TokenSampling(guidance=1.5)
    labels = some_condition(model, 12)
    whole = model.generate(labels, seed=2, indices=range(12), sampling=sampling)
    assert len(whole.lengths.unique()) > 3
    for rows in ([7], [11, 3], [5, 0, 9, 2]):
        alone = model.generate(labels[rows], seed=2, indices=rows, sampling=sampling)
        for name in ("ids", "lengths", "slots"):
            assert torch.equal(getattr(alone, name), getattr(whole, name)[rows]), name


@pytest.mark.parametrize("slots", [0, 20])
def test_lengths_and_slots_are_learned(slots):
    """Four sequences, of 3 to 6 tokens, in slots of their own."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, num_tokens=6, ends=True, num_slots=slots, dropout=0.0)).train()
    tokens, labels = some_tokens([3, 6, 5, 4], 6, slots).padded(), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(100):
        losses = model(tokens, labels, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    greedy = TokenSampling(temperature=0.0, guidance=1.0)
    drawn = model.eval().generate(labels, seed=0, indices=range(4), sampling=greedy)
    assert torch.equal(drawn.lengths, tokens.lengths)
    assert torch.equal(drawn.ids, tokens.ids)
    if slots:
        assert torch.equal(drawn.slots, tokens.slots)


def test_configurations_and_contents_that_cannot_be():
    with pytest.raises(ValueError, match=r"num_slots: 20 slots need ends=true and at most as many tokens"):
        dataclasses.replace(TINY, num_slots=20)
    with pytest.raises(ValueError, match=r"num_slots: 10 slots need"):
        dataclasses.replace(TINY, num_slots=10, ends=True)
    with pytest.raises(ValueError, match="tokens without slots, num_slots is 40"):
        loss(build(ends=True, num_slots=40), some_tokens([3], 16))
    with pytest.raises(ValueError, match="tokens with slots, num_slots is 0"):
        loss(build(), some_tokens([3], 16, 40))


def test_a_model_that_draws_slots_is_saved_and_loaded(tmp_path):
    model = build(ends=True, num_slots=40)
    model.save_pretrained(tmp_path)
    loaded = imgtok.load(tmp_path, expect=GPT)
    a, b = (m.generate(some_condition(model), seed=0, indices=range(3)) for m in (model, loaded))
    assert loaded.config == model.config
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.slots, b.slots)
