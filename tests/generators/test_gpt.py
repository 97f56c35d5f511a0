"""Behaviour of a tiny GPT; its numbers are compared with the published code in tests/parity."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from toy import ToyTok, ToyTokConfig

import imgtok
from imgtok.generators import decoding
from imgtok.generators.conditioning import ClassSlot, StartPlusClass, TextPrefix
from imgtok.generators.gpt import (
    FLEXTOK_CLASS_DEPTHS,
    FLEXTOK_TEXT_DEPTHS,
    GPT,
    GPTConfig,
    flextok_size,
)
from imgtok.generators.sampling import TokenSampling, law
from imgtok.layers.cache import KVCache
from imgtok.text.captions import Captions
from imgtok.tokenizers.tokens import Tokens

TINY = GPTConfig(
    vocab_size=24, num_tokens=9, width=32, depth=2, num_heads=2, mlp_multiple=32, condition=ClassSlot(num_classes=5)
)
LLAMAGEN = {"positions": "rotary_2d"}
IN_A_ROW = {"positions": "rotary_1d", "rotary_base": 500.0, "zero_prefix": False}
FLEXTOK = {"condition": StartPlusClass(num_classes=5), "mlp_multiple": 1, "qk_norm": True}
VARIANTS = [
    pytest.param({}, id="learned"),
    pytest.param(LLAMAGEN, id="llamagen"),
    pytest.param(FLEXTOK, id="flextok"),
    pytest.param(IN_A_ROW, id="in a row"),
]


def build(*, awake: bool = True, drop: float = 0.1, **changes) -> GPT:
    """A tiny model; `awake` replaces the zero head and the small weights, so that its laws are not flat."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, **changes).with_condition(drop=drop)).eval()
    if awake:
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def ids_of(model: GPT, *args, **options) -> torch.Tensor:
    """The ids that the model draws."""
    return model.generate(*args, **options).ids


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LABELS = torch.tensor([0, 3, 4])


def test_published_sizes_have_the_published_parameter_counts():
    """LlamaGen-B, class-conditional (arXiv 2406.06525, table 1: 111M), to the last parameter of the released code."""
    with torch.device("meta"):
        model = GPT(GPTConfig(positions="rotary_2d"))
    assert sum(p.numel() for p in model.parameters()) == 110_888_448


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2816), (1280, 3584), (1536, 4096), (3200, 8704)])
def test_published_feed_forward_widths(width, hidden):
    assert GPTConfig(width=width, num_heads=4).mlp_hidden == hidden


CLASS_SIZES = {10: 49, 12: 85, 16: 201, 20: 393, 24: 679, 30: 1330}
TEXT_SIZES = {12: 113, 18: 382, 26: 1150, 36: 3060}


@pytest.mark.parametrize(
    ("depth", "text", "millions"),
    [
        (depth, text, size)
        for text, sizes in ((False, CLASS_SIZES), (True, TEXT_SIZES))
        for depth, size in sizes.items()
    ],
)
def test_flextoks_sizes_have_the_published_parameter_counts(depth, text, millions):
    """Published to three digits, without embeddings: 12 (16 with text) x depth x width^2."""
    assert depth in (FLEXTOK_TEXT_DEPTHS if text else FLEXTOK_CLASS_DEPTHS)
    config = flextok_size(depth, text=text)
    with torch.device("meta"):
        model = GPT(config)
    assert (config.width, config.depth, config.num_heads, config.head_dim) == (64 * depth, depth, depth, 64)
    assert config.mlp_hidden == int(2 * int(4 * config.width) / 3)
    count = sum(p.numel() for p in model.blocks.parameters())
    assert abs(count / 1e6 - millions) <= (5 if millions > 1000 else 0.6)
    assert count == pytest.approx((16 if text else 12) * depth * config.width**2, rel=1e-3)
    assert model.head.weight.shape == (64000, config.width)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]


def test_the_defaults_are_those_of_models_saved_before_flextoks(tmp_path):
    model = build(positions="rotary_2d")
    model.save_pretrained(tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    new = ["qk_norm", "attention_dropout", "rotary_base", "zero_prefix"]
    for field in new:
        del old[field]
    (tmp_path / "config.json").write_text(json.dumps(old))
    loaded = imgtok.load(tmp_path, expect=GPT)
    assert loaded.config == model.config
    assert {name.partition(".")[0] for name in model.state_dict()} == {
        "class_embedding", "token_embedding", "blocks", "norm", "head",
    }  # fmt: skip
    assert {name.partition(".")[2] for name in model.blocks.state_dict()} == {
        "attention_norm.weight", "attention.qkv_proj.weight", "attention.out_proj.weight",
        "mlp_norm.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight",
    }  # fmt: skip


def test_an_untrained_model_is_uniform():
    model = build(awake=False)
    ids = torch.randint(24, (3, 9), generator=generator())
    assert model(Tokens.full(ids), LABELS, generator=generator()).total.item() == pytest.approx(
        torch.tensor(24.0).log().item()
    )


# ---------------------------------------------------------------- one path, causal, cached


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_sees_the_class_and_the_tokens_before_it(variant):
    model = build(**variant)
    ids = torch.randint(24, (1, 9), generator=generator())
    with torch.no_grad():
        logits = model.logits(LABELS[:1], ids)
        assert logits.shape == (1, 9, 24)
        assert not torch.allclose(model.logits(LABELS[1:2], ids)[:, 0], logits[:, 0])
        for position in range(9):
            changed = ids.clone()
            changed[0, position] = (changed[0, position] + 1) % 24
            differs = (model.logits(LABELS[:1], changed) != logits).any(dim=-1)[0]
            assert not differs[: position + 1].any()
            assert differs[position + 1 :].any() == (position < 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_states_equal_recomputed_ones(variant):
    model = build(**variant)
    ids = torch.randint(24, (3, 8), generator=generator())
    with torch.no_grad():
        whole = model.hidden(LABELS, ids)
        cache = model.new_cache(3, 9)
        parts = [model.hidden(LABELS, ids[:, :0], cache)]
        parts += [model.hidden(None, ids[:, i : i + 1], cache) for i in range(8)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
        long_prefill = model.new_cache(3, 9)
        model.hidden(LABELS, ids[:, :5], long_prefill)
        last = model.hidden(None, ids[:, 5:6], long_prefill)
        torch.testing.assert_close(last, whole[:, 6:7], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_cache_changes_no_token(monkeypatch, variant, guidance):
    model = build(**variant)
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    ids = {}
    for cached in (True, False):

        def record(logits, *args, kind=cached, **rest):
            seen[kind].append(logits)
            return law(logits, *args, **rest)

        monkeypatch.setattr(decoding, "law", record)
        sampling = TokenSampling(guidance=guidance, top_k=12, top_p=0.95, temperature=1.1)
        ids[cached] = ids_of(model, LABELS, seed=1, indices=[5, 6, 7], sampling=sampling, cached=cached)
    assert torch.equal(ids[True], ids[False])
    assert len(seen[True]) == 9
    for with_cache, without in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(with_cache, without, atol=1e-5, rtol=1e-5)


def test_generated_tokens_follow_the_training_path():
    """Greedy generation must be the arg-max of `logits`, which training uses, at every position."""
    model = build()
    ids = ids_of(model, LABELS, seed=0, indices=range(3), sampling=TokenSampling(guidance=1.0, top_k=1))
    with torch.no_grad():
        assert torch.equal(model.logits(LABELS, ids).argmax(dim=-1), ids)


# ---------------------------------------------------------------- FlexTok's class condition


def test_flextoks_slot_is_a_start_vector_plus_the_class():
    model = build(**FLEXTOK)
    assert model.class_embedding.weight.shape == (5, 32)  # and no row for no class
    slots = model.slot(torch.tensor([3, model.null_class, -1]))
    assert torch.equal(slots[0], model.start + model.class_embedding.weight[3])
    assert torch.equal(slots[1], model.start)
    assert torch.equal(slots[2], model.start)
    assert model.start.norm() > 0


def test_no_class_knows_nothing_of_the_classes():
    model = build(**FLEXTOK)
    ids = torch.randint(24, (1, 9), generator=generator())
    with torch.no_grad():
        before, classed = model.logits(torch.tensor([-1]), ids), model.logits(LABELS[:1], ids)
        model.class_embedding.weight += 1
        assert torch.equal(model.logits(torch.tensor([-1]), ids), before)
        assert not torch.allclose(model.logits(LABELS[:1], ids), classed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_minus_one_is_no_class(variant):
    model, options = build(**variant), {"seed": 0, "indices": range(3), "sampling": TokenSampling(guidance=1.0)}
    none = ids_of(model, torch.full((3,), -1), **options)
    assert torch.equal(none, ids_of(model, torch.full((3,), model.null_class), **options))
    assert not torch.equal(none, ids_of(model, LABELS, **options))


def test_everything_of_flextoks_model_is_trained():
    model = build(**FLEXTOK, drop=0.5)
    model(
        Tokens.full(torch.randint(24, (3, 9), generator=generator())), LABELS, generator=generator(2)
    ).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_attention_weights_are_dropped_in_training_only():
    model = build(dropout=0.0, attention_dropout=0.5)
    ids = torch.randint(24, (3, 9), generator=generator())
    with torch.no_grad():
        asleep = [model.logits(LABELS, ids) for _ in range(2)]
        model.train()
        torch.manual_seed(0)
        awake = [model.logits(LABELS, ids) for _ in range(2)]
    assert torch.equal(*asleep)
    assert not torch.allclose(*awake)
    assert not torch.allclose(asleep[0], awake[0])


# ---------------------------------------------------------------- guidance


def test_guidance_of_one_runs_one_stream(monkeypatch):
    model = build()
    widths = []
    hidden = GPT.hidden
    monkeypatch.setattr(
        GPT,
        "hidden",
        lambda self, c, ids, *rest, **more: widths.append(len(ids)) or hidden(self, c, ids, *rest, **more),
    )
    for guidance in (1.0, 2.0):
        ids_of(model, LABELS, seed=0, indices=range(3), sampling=TokenSampling(guidance=guidance), num_tokens=2)
    assert widths == [3, 3, 6, 6]


def test_guidance_of_zero_is_the_null_class():
    model = build()
    ignored = ids_of(model, LABELS, seed=0, indices=range(3), sampling=TokenSampling(guidance=0.0))
    null = torch.full((3,), model.null_class)
    unlabelled = ids_of(model, null, seed=0, indices=range(3), sampling=TokenSampling(guidance=1.0))
    assert torch.equal(ignored, unlabelled)


# ---------------------------------------------------------------- randomness


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_depends_on_seed_and_index_alone(variant):
    model = build(**variant)
    options = {"sampling": TokenSampling(guidance=2.0)}
    batch = ids_of(model, LABELS, seed=9, indices=[10, 11, 12], **options)
    alone = [ids_of(model, LABELS[i : i + 1], seed=9, indices=[10 + i], **options) for i in range(3)]
    assert torch.equal(batch, torch.cat(alone))
    backwards = ids_of(model, LABELS.flip(0), seed=9, indices=[12, 11, 10], **options)
    assert torch.equal(batch, backwards.flip(0))
    assert not torch.equal(batch, ids_of(model, LABELS, seed=8, indices=[10, 11, 12], **options))
    assert not torch.equal(batch, ids_of(model, LABELS, seed=9, indices=[0, 1, 2], **options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fewer_tokens_are_the_beginning_of_more(variant):
    model = build(**variant)
    whole = ids_of(model, LABELS, seed=0, indices=range(3))
    assert whole.shape == (3, 9)
    for count in range(1, 9):
        assert torch.equal(ids_of(model, LABELS, seed=0, indices=range(3), num_tokens=count), whole[:, :count])


def test_generate_leaves_the_global_generator_alone_and_reports_progress():
    state, steps = torch.get_rng_state(), []
    build_state = build()
    torch.set_rng_state(state)
    ids_of(build_state, LABELS, seed=0, indices=range(3), on_step=steps.append)
    assert steps == list(range(1, 10))
    assert torch.equal(state, torch.get_rng_state())


def test_samples_have_the_distribution_of_the_logits():
    """First tokens of 4000 images of one class: chi-square at 0.1 %, 23 degrees of freedom: 49.7."""
    model = build(vocab_size=24)
    labels = torch.full((4000,), 2)
    sampling = TokenSampling(guidance=1.0, temperature=1.5)
    first = ids_of(model, labels, seed=0, indices=range(4000), sampling=sampling, num_tokens=1)
    with torch.no_grad():
        law = (model.logits(labels[:1], first[:1])[0, 0] / 1.5).double().softmax(0)
    counts = torch.bincount(first[:, 0], minlength=24)
    assert ((counts - 4000 * law) ** 2 / (4000 * law)).sum() < 49.7


# ---------------------------------------------------------------- training


def test_dropped_classes_show_the_null_class():
    ids = torch.randint(24, (3, 9), generator=generator())
    model = build(drop=1.0)
    with torch.no_grad():
        null_logits = model.logits(torch.full((3,), model.null_class), ids)
    expected = F.cross_entropy(null_logits.flatten(0, 1), ids.flatten())
    assert model(Tokens.full(ids), LABELS, generator=generator()).total.item() == pytest.approx(
        expected.item(), rel=1e-6
    )
    losses = {model_loss(drop=0.5, seed=seed) for seed in (0, 0, 1, 2, 3)}
    assert 1 < len(losses) <= 4


def model_loss(drop: float, seed: int) -> float:
    ids = torch.randint(24, (3, 9), generator=generator())
    return build(drop=drop)(Tokens.full(ids), LABELS, generator=generator(seed)).total.item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_activations_change_no_gradient(variant):
    ids, found = torch.randint(24, (3, 9), generator=generator()), []
    for recompute in (False, True):
        model = build(**variant).train()
        if recompute:
            model.recompute_activations()
        torch.manual_seed(7)  # of dropout
        losses = model(Tokens.full(ids), LABELS, generator=generator(2))
        losses.total.backward()
        found.append([losses.total.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_overfits_four_sequences_and_samples_them_by_class(variant):
    model = build(awake=False, **variant, dropout=0.0, drop=0.0).train()
    ids = torch.randint(24, (4, 9), generator=generator(1))
    labels = torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        loss = model(Tokens.full(ids), labels, generator=generator(step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    drawn = ids_of(model.eval(), labels, seed=0, indices=range(4), sampling=TokenSampling(guidance=1.0, top_k=1))
    assert torch.equal(drawn, ids)


# ---------------------------------------------------------------- errors, files


@pytest.mark.parametrize("bad", [-2, 6])
def test_labels_outside_the_table(bad):
    with pytest.raises(ValueError, match=r"labels must lie in 0 to 4 \(or -1 or 5 for no class\)"):
        ids_of(build(), torch.tensor([0, bad]), seed=0, indices=[0, 1])


@pytest.mark.parametrize("count", [-1, 0, 10])
def test_more_tokens_than_the_model_knows(count):
    with pytest.raises(ValueError, match=f"1 to 9 tokens, asked for {count}"):
        ids_of(build(), LABELS, seed=0, indices=range(3), num_tokens=count)


def test_more_tokens_than_positions():
    too_many = Tokens.full(torch.zeros(2, 10, dtype=torch.long))
    for variant in ({}, LLAMAGEN):
        with pytest.raises(ValueError, match="10 tokens an image, but this model has positions for num_tokens = 9"):
            build(**variant)(too_many, LABELS[:2], generator=generator())


def test_a_prefix_longer_than_the_cache():
    model = build(condition=TextPrefix(text_width=6, text_length=5))
    captions = Captions.pad([torch.ones(3, 6)])
    cache = KVCache(TINY.depth, 1, TINY.num_heads, 4, TINY.head_dim, model.norm.weight)
    with pytest.raises(ValueError, match="the cache was made for a shorter sequence: 4 positions, not 5"):
        model.prefill(model.reading(captions, guided=False), cache)


def test_positions_of_several_kinds_are_told_apart():
    """By where the slots of the condition are: unturned, in the row, or nowhere."""
    ids = torch.randint(24, (3, 9), generator=generator())
    kinds = [{"positions": kind, "zero_prefix": zero} for kind in ("rotary_1d", "rotary_2d") for zero in (True, False)]
    found = [build(**kind).logits(LABELS, ids) for kind in [*kinds, kinds[0] | {"rotary_base": 100.0}]]
    for number, one in enumerate(found):
        assert all(not torch.allclose(one, other, atol=1e-3) for other in found[:number])
    assert torch.equal(build(**kinds[0]).rotary[0], torch.zeros(8, 2))
    assert torch.equal(build(**kinds[3]).rotary[0], torch.tensor([1.0, 0.0]).expand(8, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positions": "rotary_2d", "num_heads": 16}, "heads of 2 channels cannot be turned by .* a multiple of 4"),
        ({"positions": "rotary_1d", "num_heads": 32}, "heads of 1 channels cannot be turned by .* a multiple of 2"),
        ({"width": 33}, "width"),
        ({"positions": "rotary_2d", "num_tokens": 8}, "square"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    "options",
    [{"temperature": -0.1}, {"forbidden": (-1,)}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"guidance": -1.0}],
)
def test_sampling_that_cannot_be(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        TokenSampling(**options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_and_loading(tmp_path, variant):
    model = build(**variant)
    model.save_pretrained(tmp_path)
    loaded = imgtok.load(tmp_path, expect=GPT)
    assert loaded.config == model.config
    assert torch.equal(
        ids_of(loaded, LABELS, seed=0, indices=range(3)), ids_of(model, LABELS, seed=0, indices=range(3))
    )


def test_a_decoder_takes_sequences_that_end_where_the_model_s_do():
    tokenizer = ToyTok(ToyTokConfig())  # 16 slots, and as many tokens as an image needs
    sizes = {"vocab_size": 16, "num_tokens": 16}
    GPT(dataclasses.replace(TINY, **sizes, ends=True, num_slots=16)).check_decoder(tokenizer)
    with pytest.raises(
        ValueError, match=r"draws as many tokens for every image, but the tokenizer takes sequences that"
    ):
        GPT(dataclasses.replace(TINY, **sizes)).check_decoder(tokenizer)
    fixed = type("Fixed", (ToyTok,), {"fixed_length": True})(ToyTokConfig())
    with pytest.raises(ValueError, match=r"draws sequences that end, but the tokenizer takes as many tokens for every"):
        GPT(dataclasses.replace(TINY, **sizes, ends=True, num_slots=16)).check_decoder(fixed)
