"""Speculative decoding: the law of what is drawn, the loop over ragged rows, and what the GPT makes of its settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import toy_law
from toy_law import LAWS, METHODS, TOKENS, drawn, goodness, probabilities

from imgtok.config import ConfigError
from imgtok.generators import speculative_gpt
from imgtok.generators.conditioning import ClassSlot, StartPlusClass, TextPrefix
from imgtok.generators.digits import DigitsConfig
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.sampling import TokenSampling, law
from imgtok.generators.speculative import Noise, Window
from imgtok.generators.speculative_recycled import Recycling
from imgtok.text.captions import Captions
from imgtok.tokenizers.tokens import Tokens

MANY, FEWER = 100_000, 10_000
EACH = pytest.mark.parametrize("method", METHODS)

# ---------------------------------------------------------------- the law, on a toy that is known


def check_law(name: str, ids: torch.Tensor) -> None:
    z, beyond = goodness(ids, probabilities(LAWS[name]))
    print(f"z = {z:.2f}, p = {beyond:.3f}")
    assert beyond > 0.001


@EACH
def test_the_law_is_that_of_the_network(method):
    check_law("all", drawn(LAWS["all"], FEWER, **METHODS[method]).ids)


@pytest.mark.slow
@EACH
@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("window", [2, 4, 8])
def test_the_law_with_every_window_and_filter(method, name, window):
    check_law(name, drawn(LAWS[name], MANY, seed=10, **{"window": window} | METHODS[method]).ids)


def in_batches(method: str, images: int, size: int, name: str = "all") -> tuple[Tokens, Tokens]:
    """The same images in batches and in one."""
    how = {"window": 4} | METHODS[method]
    given = toy_law.noise(images, how["window"], gumbel=how.get("gumbel", False))
    parts = [Noise(*(None if x is None else x[i : i + size] for x in given)) for i in range(0, images, size)]
    found = [drawn(LAWS[name], len(part.first), given=part, **how) for part in parts]
    return Tokens.cat(found), drawn(LAWS[name], images, given=given, **how)


@EACH
@pytest.mark.parametrize("size", [1, 7])
def test_an_image_is_the_same_in_every_batch(method, size):
    """To the bit: so what holds of a hundred thousand in one batch holds of batches of 1 and 7."""
    parts, whole = in_batches(method, 8 * size, size)
    assert torch.equal(parts.ids, whole.ids)
    assert torch.equal(parts.calls.calls, whole.calls.calls)
    assert torch.equal(parts.calls.judged, whole.calls.judged)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["maximal", "gumbel", "jacobi"])
@pytest.mark.parametrize(("size", "images"), [(1, 2_000), (7, 20_000)])
def test_the_law_in_small_batches(method, size, images):
    parts, whole = in_batches(method, images, size)
    assert torch.equal(parts.ids, whole.ids)
    check_law("all", parts.ids)


def test_the_test_of_the_law_notices():
    """Groups, amplified probabilities, and p in place of the residual draw from other laws."""
    expected = probabilities(LAWS["plain"])
    z, beyond = goodness(drawn(LAWS["plain"], 5_000, group=2).ids, expected)
    assert z > 50
    assert beyond < 1e-9
    assert goodness(drawn(LAWS["guided"], 5_000).ids, expected)[0] > 50


@pytest.mark.parametrize("name", ["plain", "top_k"])
def test_larger_groups_accept_more_from_a_law_further_off(name):
    expected, found = probabilities(LAWS[name]), [drawn(LAWS[name], 5_000, group=size) for size in (1, 2, 3)]
    assert torch.equal(found[0].ids, drawn(LAWS[name], 5_000).ids)
    accepted = [int(tokens.calls.accepted.sum()) / int(tokens.calls.judged.sum()) for tokens in found]
    assert accepted == sorted(accepted)
    assert toy_law.distance(found[0].ids, expected) < 0.08 < toy_law.distance(found[1].ids, expected)


@EACH
def test_calls_never_exceed_tokens(method):
    how = {"window": 4} | METHODS[method]
    calls = drawn(LAWS["plain"], 2_000, **how).calls
    assert calls.calls.max() <= TOKENS
    assert calls.calls.min() >= 1 + -(-(TOKENS - 1) // how["window"])
    assert (calls.accepted <= calls.judged).all()
    assert (calls.calls - 1 - calls.single <= (TOKENS - 1) // 2).all(), "two or more tokens each"
    if method == "exact":
        assert set(calls.calls.tolist()) == {TOKENS}


def test_what_followed_a_token_before_is_guessed_again():
    """The latest time counts, also within a window; a token that was not seen is guessed to follow itself."""
    drafter, tokens = Recycling(), torch.tensor([[2, 0, 1, 0, 0, 0, 0]])
    drafter.begin(torch.eye(4)[[2]], 3)
    said = torch.eye(4)[[1, 3, 2]][None]  # after the ids 0, 1, 0: of tokens 1 to 3
    drafter.learn(said, Window(torch.tensor([0]), 3, torch.tensor([1])), torch.tensor([[0, 1, 0]]))
    q = drafter.propose(tokens, Window(torch.tensor([1]), 5, torch.tensor([2])), torch.zeros(1, 4))
    assert tokens.tolist() == [[2, 0, 1, 0, 2, 2, 0]], "tokens 4 and 5 are new"
    assert torch.equal(q[0], torch.eye(4)[[3, 2, 2, 2]])


# ---------------------------------------------------------------- the GPT

TINY = GPTConfig(vocab_size=24, num_tokens=16, width=32, depth=2, num_heads=2, mlp_multiple=32)
WAYS = {
    "jacobi": {"decoding": "jacobi"},
    "maximal": {"decoding": "coupled"},
    "gumbel": {"decoding": "coupled", "coupling": "gumbel"},
    "grouped": {"decoding": "grouped", "group_size": 3},
    "both": {"decoding": "coupled", "group_size": 3},
    "draft": {"decoding": "draft"},
}
FAST = pytest.mark.parametrize("way", WAYS)


def build(std: float = 0.3, **changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, **changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=std)
    return model


@pytest.fixture(scope="module")
def models() -> tuple[GPT, str]:
    """A model, and the name of a smaller one, which it has read already."""
    model = build()
    model.drafts["small"] = build(depth=1, std=0.25)
    return model, "small"


def settings(models: tuple[GPT, str], way: str, **changes) -> TokenSampling:
    draft = {"draft_model": models[1]} if way == "draft" else {}
    return TokenSampling(**{"guidance": 2.0, "window": 5} | WAYS.get(way, {}) | draft | changes)


def generate(models: tuple[GPT, str], way: str, rows: int = 6, start: int = 0, count: int | None = None, **changes):
    indices = range(start, start + rows)
    sampling = settings(models, way, **changes)
    condition = torch.tensor(indices) % 5
    return models[0].generate(condition, seed=3, indices=indices, sampling=sampling, num_tokens=count)


@FAST
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_most_likely_tokens_are_the_same_by_every_method(models, way, guidance):
    exact = generate(models, "exact", temperature=0.0, guidance=guidance)
    found = generate(models, way, temperature=0.0, guidance=guidance)
    assert torch.equal(found.ids, exact.ids)
    assert found.calls.calls.max() <= 16


@FAST
@pytest.mark.parametrize("changes", [{}, {"window": 40, "guidance": 1.0, "top_k": 7}])
def test_images_of_a_gpt_do_not_depend_on_their_batch(models, way, changes):
    whole = generate(models, way, 7, **changes)
    parts = Tokens.cat([generate(models, way, 1, **changes), generate(models, way, 6, 1, **changes)])
    assert torch.equal(whole.ids, parts.ids)
    assert torch.equal(whole.calls.calls, parts.calls.calls)
    assert len(set(whole.calls.calls.tolist())) > 1, "rows are ragged"


@FAST
def test_a_longer_request_begins_with_a_shorter_one(models, way):
    """But for the last token, which is never guessed."""
    assert torch.equal(generate(models, way, count=9).ids[:, :8], generate(models, way).ids[:, :8])
    assert generate(models, way, count=1).calls.calls.tolist() == [1] * 6
    assert generate(models, way, count=2).ids.shape == (6, 2)


@pytest.mark.parametrize("rule", ["nearest", "released"])
def test_groups_of_one_are_the_token_rule_to_the_bit(models, rule):
    for one, other in (("grouped", "jacobi"), ("both", "maximal")):
        grouped = generate(models, one, group_size=1, group_rule=rule, top_k=12)
        assert torch.equal(grouped.ids, generate(models, other, top_k=12).ids)


@pytest.mark.parametrize("way", ["grouped", "both"])
def test_a_group_of_all_ids_accepts_all_drafts(models, way):
    calls = generate(models, way, group_size=24).calls
    assert torch.equal(calls.accepted, calls.judged)
    assert calls.calls.tolist() == [4] * 6  # the first, and fifteen tokens in fives


@FAST
def test_filters_hold(models, way):
    found = generate(models, way, 40, top_k=3, guidance=1.0, forbidden=(5,))
    logits = models[0].logits(torch.arange(40) % 5, found.ids)
    kept = law(logits, TokenSampling(top_k=3, forbidden=(5,)))
    assert (kept.gather(2, found.ids[..., None]) > 0).all()


def test_a_window_of_one_is_exact_decoding_with_other_numbers(models):
    assert generate(models, "maximal", window=1).calls.calls.tolist() == [16] * 6


@torch.no_grad()
@pytest.mark.parametrize("prefix", [False, True])
def test_the_network_forgets_what_was_rejected(prefix):
    """After any windows of ragged rows, logits are those of a fresh pass."""
    text = {"condition": TextPrefix(text_width=12, text_length=6), "positions": "rotary_2d"}
    model = build(**text if prefix else {"condition": StartPlusClass(num_classes=5)})
    generator = torch.Generator().manual_seed(1)
    lengths = (2, 6, 4)
    caption = Captions.pad([torch.randn(n, 12, generator=generator) for n in lengths])
    condition = caption if prefix else torch.tensor([0, 1, 2])
    network = speculative_gpt.GPTNetwork(model, model._reading(condition, 3, guided=True), 3, 16)
    ids = torch.randint(24, (3, 16), generator=generator)
    rows = network.reading
    expected = model.logits(rows, ids.repeat(2, 1))
    torch.testing.assert_close(network.first(), expected[:, 0], atol=1e-4, rtol=1e-4)

    def check(starts: torch.Tensor | int, width: int, *, right: bool = True) -> None:
        start = torch.full((3,), starts) if isinstance(starts, int) else starts
        places = start[:, None] + torch.arange(width)
        given = ids.gather(1, places)
        found = network.score(given if right else (given + 7) % 24, starts)
        wanted = expected.gather(1, (places + 1).repeat(2, 1)[..., None].expand(-1, -1, 24))
        if right:
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)

    check(0, 4)
    check(2, 5, right=False)
    check(torch.tensor([2, 1, 2]), 6)
    check(torch.tensor([5, 3, 8]), 4, right=False)
    check(torch.tensor([5, 3, 8]), 4)
    check(4, 9)
    check(torch.tensor([12, 11, 12]), 3)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["exact", "draft", "jacobi", "maximal", "gumbel"])
@pytest.mark.parametrize("changes", [{"guidance": 1.0}, {"guidance": 2.0, "top_k": 2, "temperature": 1.3}])
def test_the_law_of_a_gpt(way, changes, tmp_path):
    """Its probabilities are added up over all 81 sequences of four tokens."""
    shape = {"vocab_size": 3, "num_tokens": 4, "condition": ClassSlot(num_classes=5)}
    build(depth=1, **shape).save_pretrained(tmp_path)
    model, rows = build(**shape), 10_000
    sampling = settings((model, str(tmp_path)), way, **changes, window=3)
    label = torch.full((rows,), 2)
    with torch.no_grad():
        found = [
            model.generate(label, seed=0, indices=range(i, i + rows), sampling=sampling).ids
            for i in range(0, MANY, rows)
        ]
        sequences = torch.cartesian_prod(*[torch.arange(3)] * 4)
        given, none = (model.logits(torch.full((81,), one), sequences) for one in (2, -1))
        laws = law(given, sampling, none if sampling.guidance != 1 else None).double()
    expected = laws.gather(2, sequences[..., None]).prod(dim=1)[:, 0]
    numbers = (torch.cat(found) * torch.tensor([27, 9, 3, 1])).sum(dim=1)
    counts, due = torch.bincount(numbers, minlength=81).double(), expected * MANY
    assert not counts[due == 0].any()
    statistic = ((counts - due)[due > 0] ** 2 / due[due > 0]).sum()
    freedom = torch.tensor((int((due > 0).sum()) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, statistic / 2) > 0.001


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 0}, r"window: given 0, must be an integer of at least 1"),
        ({"decoding": "fast"}, r"decoding: given 'fast', must be one of 'exact', 'draft', 'jacobi'"),
        ({"decoding": "jacobi", "group_size": 3}, r"group_size: jacobi has no groups; say decoding=grouped, or"),
        ({"decoding": "draft"}, r"draft_model: goes with decoding=draft; name one"),
        ({"draft_model": "x"}, r"draft_model: goes with decoding=draft; exact has none; say draft_model=null"),
        ({"top_k": -1}, r"top_k: given -1, must be"),
    ],
)
def test_settings_that_do_not_go_together(given, message):
    with pytest.raises(ValueError, match=message):
        TokenSampling(**given)


@pytest.mark.parametrize(
    ("way", "given", "message"),
    [
        (
            "grouped",
            {"group_size": 25},
            r"sampling.group_size: a group of 25 is larger than the vocabulary, which has 24",
        ),
        ("jacobi", {"top_k": 25}, r"sampling.top_k: there are 24 to choose from, cannot keep 25; 0 is all"),
    ],
)
def test_settings_that_do_not_suit_a_model(models, way, given, message):
    with pytest.raises(ValueError, match=message):
        generate(models, way, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 30}, r"sampling.draft_model: it has 30 ids, and the model 24; both must agree"),
        ({"num_tokens": 9}, r"sampling.draft_model: it has 9 tokens, and the model 16"),
        ({"condition": ClassSlot(num_classes=7)}, r"sampling.draft_model: it has 7 classes, and the model 1000"),
    ],
)
def test_a_draft_model_of_other_tokens(models, monkeypatch, changes, message):
    monkeypatch.setitem(models[0].drafts, "other", build(**changes))
    with pytest.raises(ConfigError, match=message):
        generate((models[0], "other"), "draft")


def test_a_draft_model_is_read_from_its_folder_once(models, tmp_path, monkeypatch):
    build(depth=1, std=0.25).save_pretrained(tmp_path)
    monkeypatch.setattr(models[0], "drafts", {})
    found = generate((models[0], str(tmp_path)), "draft", 2)
    (tmp_path / "model.safetensors").unlink()
    assert torch.equal(generate((models[0], str(tmp_path)), "draft", 2).ids, found.ids)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        generate((models[0], "nowhere"), "draft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ends": True},
            r"sampling.decoding: jacobi is not there for a model that draws sequences that end; say exact",
        ),
        (
            {"head": DigitsConfig(digits=(4, 6), width=16, depth=1, num_heads=2)},
            r"sampling.decoding: jacobi is not there for a model that draws ids digit by digit; say exact",
        ),
    ],
)
def test_models_whose_tokens_cannot_be_guessed_yet(changes, message):
    with pytest.raises(ConfigError, match=message):
        generate((build(**changes), ""), "jacobi")


def test_what_goes_with_exact_decoding_alone(models):
    condition, how = torch.arange(2), {"seed": 0, "indices": range(2), "sampling": settings(models, "jacobi")}
    with pytest.raises(ValueError, match=r"cached=False: goes with sampling.decoding=exact alone, given jacobi"):
        models[0].generate(condition, cached=False, **how)
    with pytest.raises(ValueError, match=r"control: goes with sampling.decoding=exact alone"):
        models[0].generate(condition, control=lambda step, reading: None, **how)
    reading = models[0]._reading(condition, 2, guided=True)
    with pytest.raises(ConfigError, match=r"sampling.decoding: draft takes labels or captions, since two networks"):
        models[0].generate(reading, seed=0, indices=range(2), sampling=settings(models, "draft"))
