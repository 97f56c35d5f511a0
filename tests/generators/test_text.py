"""A tiny GPT that reads captions through cross-attention (FlexTok from text)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import imgtok
from imgtok.generators import decoding
from imgtok.generators.conditioning import StartPlusClass, TextCrossAttention
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.sampling import TokenSampling, law
from imgtok.layers.attention import CrossAttention
from imgtok.layers.cache import MemoryLayer
from imgtok.text.captions import Captions
from imgtok.tokenizers.tokens import Tokens

TINY = GPTConfig(
    vocab_size=24, num_tokens=9, width=32, depth=2, num_heads=2, mlp_multiple=1,
    condition=TextCrossAttention(text_width=12, text_length=6),
)  # fmt: skip


def build(*, awake: bool = True, drop: float = 0.1, **changes) -> GPT:
    """A tiny model with an empty caption; `awake` replaces small weights, so that its laws are not flat."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, **changes).with_condition(drop=drop)).eval()
    model.set_empty_caption(torch.randn(1, 12))
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


def features(*lengths: int) -> list[torch.Tensor]:
    return [torch.randn(length, 12, generator=generator(number)) for number, length in enumerate(lengths)]


ROWS = features(3, 6, 1)
CAPTIONS = Captions.pad(ROWS)
IDS = torch.randint(24, (3, 9), generator=generator(7))


# ---------------------------------------------------------------- captions in a batch


def test_captions_are_padded_with_zeros():
    assert CAPTIONS.features.shape == (3, 6, 12)
    assert CAPTIONS.mask.sum(1).tolist() == CAPTIONS.lengths.tolist() == [3, 6, 1]
    assert torch.equal(CAPTIONS.features[0, :3], ROWS[0])
    assert not CAPTIONS.features[0, 3:].any()
    swapped = CAPTIONS.replaced(torch.tensor([False, True, False]), Captions.pad(ROWS[:1]).repeat(3))
    assert swapped.lengths.tolist() == [3, 3, 1]
    assert torch.equal(swapped.features[1], CAPTIONS.features[0])
    assert Captions.cat([Captions.pad(ROWS[:1]), Captions.pad(ROWS[2:])]).features.shape == (2, 3, 12)
    with pytest.raises(ValueError, match="caption 1 has no features"):
        Captions.pad([ROWS[0], torch.empty(0, 12)])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_padding_leaves_no_trace(qk_norm):
    model = build(qk_norm=qk_norm)
    wider = CAPTIONS.widen(9)
    dirty = torch.where(wider.mask[..., None], wider.features, 1e4)
    with torch.no_grad():
        expected = model.logits(CAPTIONS, IDS)
        alone = torch.cat([model.logits(Captions.pad([row]), IDS[i : i + 1]) for i, row in enumerate(ROWS)])
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.logits(wider, IDS), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(model.logits(Captions(dirty, wider.mask), IDS), model.logits(wider, IDS))


def test_cross_attention_is_the_textbook_formula():
    torch.manual_seed(0)
    attention = CrossAttention(8, 2)
    x, context = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    mask = torch.tensor([True, True, False, True, False])
    q = attention.q_proj(x)[0]
    k, v = attention.kv_proj(context)[0].chunk(2, dim=-1)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = (q[:, part] @ k[:, part].T / 4**0.5).masked_fill(~mask, -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, part])
    expected = attention.out_proj(torch.cat(heads, dim=-1))
    found = attention(x, MemoryLayer(*attention.keys_values(context), mask[None, None, None]))
    torch.testing.assert_close(found[0], expected)


def test_every_token_and_block_sees_the_caption():
    model = build()
    with torch.no_grad():
        differs = (model.logits(CAPTIONS, IDS[:1].expand(3, -1)).diff(dim=0).abs() > 1e-4).any(-1)
        assert differs.all()
        for block in model.blocks:
            silenced, weight = model.logits(CAPTIONS, IDS), block.cross_attention.out_proj.weight
            kept = weight.clone()
            weight.zero_()
            assert not torch.allclose(model.logits(CAPTIONS, IDS), silenced)
            weight.copy_(kept)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_cache_changes_no_token(monkeypatch, guidance):
    model = build()
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    ids = {}
    for cached in (True, False):

        def record(logits, *args, kind=cached, **rest):
            seen[kind].append(logits)
            return law(logits, *args, **rest)

        monkeypatch.setattr(decoding, "law", record)
        sampling = TokenSampling(guidance=guidance)
        ids[cached] = ids_of(model, CAPTIONS, seed=1, indices=[5, 6, 7], sampling=sampling, cached=cached)
    assert torch.equal(ids[True], ids[False])
    assert len(seen[True]) == 9
    for with_cache, without in zip(seen[True], seen[False], strict=True):
        torch.testing.assert_close(with_cache, without, atol=1e-5, rtol=1e-5)


def test_the_caption_is_read_once(monkeypatch):
    calls = []
    keys_values = CrossAttention.keys_values
    monkeypatch.setattr(
        CrossAttention, "keys_values", lambda self, context: calls.append(len(context)) or keys_values(self, context)
    )
    ids_of(build(), CAPTIONS, seed=0, indices=range(3), sampling=TokenSampling(guidance=3.0))
    assert calls == [6, 6]  # a layer each, both guidance branches


def test_a_sample_depends_on_seed_index_and_caption_alone():
    model = build()
    options = {"sampling": TokenSampling(guidance=3.0)}
    batch = ids_of(model, CAPTIONS, seed=9, indices=[10, 11, 12], **options)
    alone = [ids_of(model, Captions.pad([row]), seed=9, indices=[10 + i], **options) for i, row in enumerate(ROWS)]
    assert torch.equal(batch, torch.cat(alone))
    other = ids_of(model, Captions.pad([ROWS[1]] * 3), seed=9, indices=[10, 11, 12], **options)
    assert torch.equal(other[1], batch[1])
    assert not torch.equal(other, batch)


def test_fewer_tokens_are_the_beginning_of_more():
    model = build()
    whole = ids_of(model, CAPTIONS, seed=0, indices=range(3))
    assert torch.equal(ids_of(model, CAPTIONS, seed=0, indices=range(3), num_tokens=4), whole[:, :4])


def test_guidance_of_zero_is_the_empty_caption():
    model = build()
    ignored = ids_of(model, CAPTIONS, seed=0, indices=range(3), sampling=TokenSampling(guidance=0.0))
    empty = Captions.pad([model.empty_caption] * 3)
    alone = ids_of(model, empty, seed=0, indices=range(3), sampling=TokenSampling(guidance=1.0))
    assert torch.equal(ignored, alone)
    plain = ids_of(model, CAPTIONS, seed=0, indices=range(3), sampling=TokenSampling(guidance=1.0))
    assert not torch.equal(ignored, plain)


# ---------------------------------------------------------------- training


def test_dropped_captions_are_the_empty_one():
    model = build(drop=1.0)
    with torch.no_grad():
        logits = model.logits(Captions.pad([model.empty_caption] * 3), IDS)
    expected = F.cross_entropy(logits.flatten(0, 1), IDS.flatten())
    assert model(Tokens.full(IDS), CAPTIONS, generator=generator()).total.item() == pytest.approx(
        expected.item(), rel=1e-6
    )
    losses = {build(drop=0.5)(Tokens.full(IDS), CAPTIONS, generator=generator(i)).total.item() for i in (0, 0, 1, 2, 3)}
    assert 1 < len(losses) <= 4


def test_everything_is_trained_but_the_empty_caption():
    model = build(drop=0.5)
    model(Tokens.full(IDS), CAPTIONS, generator=generator(2)).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert "empty_caption" in model.state_dict()
    assert "empty_caption" not in dict(model.named_parameters())


def test_overfits_three_captions_and_samples_their_sequences():
    model = build(awake=False, dropout=0.0, drop=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(60):
        loss = model(Tokens.full(IDS), CAPTIONS, generator=generator(step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    drawn = ids_of(model.eval(), CAPTIONS, seed=0, indices=range(3), sampling=TokenSampling(guidance=1.0, top_k=1))
    assert torch.equal(drawn, IDS)


def half_precision(device: str) -> None:
    """Stored features in 16 bits: a training step in mixed precision, and drawing with a model in bfloat16."""
    model = build(drop=0.5).to(device)
    stored = Captions(CAPTIONS.features.half(), CAPTIONS.mask).to(device)
    with torch.autocast(device, torch.bfloat16):
        loss = model(Tokens.full(IDS.to(device)), stored, generator=generator(2)).total
    loss.backward()
    full = model(Tokens.full(IDS.to(device)), CAPTIONS.to(device), generator=generator(2)).total
    assert loss.item() == pytest.approx(full.item(), rel=0.02)
    ids = ids_of(model.bfloat16(), stored, seed=0, indices=range(3), sampling=TokenSampling(guidance=3.0))
    assert ids.shape == (3, 9)
    assert ids.device.type == device


def test_half_precision():
    half_precision("cpu")


@pytest.mark.gpu
def test_half_precision_on_a_gpu():
    half_precision("cuda")


# ---------------------------------------------------------------- errors, files


def test_the_wrong_condition_is_refused():
    with pytest.raises(ValueError, match=r"\(condition cross_attention\) draws for captions, given labels"):
        ids_of(build(), torch.tensor([0]), seed=0, indices=[0])
    classes = GPT(dataclasses.replace(TINY, condition=StartPlusClass()))
    with pytest.raises(ValueError, match=r"\(condition start_plus_class\) draws for labels, given captions"):
        ids_of(classes, CAPTIONS, seed=0, indices=range(3))


@pytest.mark.parametrize("shape", [(7, 12), (3, 13)])
def test_captions_of_another_encoder_are_refused(shape):
    with pytest.raises(ValueError, match=r"this model reads at most 6 of width 12"):
        ids_of(build(), Captions.pad([torch.zeros(shape)]), seed=0, indices=[0])


def test_an_empty_caption_longer_than_any_is_refused():
    with pytest.raises(ValueError, match="empty_length: 7 is more than text_length = 6"):
        TINY.with_condition(empty_length=7)


def test_a_model_folder_knows_its_empty_caption(tmp_path):
    model = build(condition=dataclasses.replace(TINY.condition, text_encoder="google/flan-t5-xl"))
    model.save_pretrained(tmp_path)
    loaded = imgtok.load(tmp_path, expect=GPT)
    assert loaded.config == model.config
    assert torch.equal(loaded.empty_caption, model.empty_caption)
    assert torch.equal(
        ids_of(loaded, CAPTIONS, seed=0, indices=range(3)), ids_of(model, CAPTIONS, seed=0, indices=range(3))
    )
