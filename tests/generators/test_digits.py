"""Embeddings that ids share by their digits, and ids that are drawn digit by digit."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from imgtok.generators import decoding
from imgtok.generators.conditioning import ClassSlot
from imgtok.generators.decoding import Uniforms
from imgtok.generators.digits import DigitRows, Digits, DigitsConfig
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.sampling import TokenSampling, law
from imgtok.quantizers.fsq import FSQ
from imgtok.tokenizers.tokens import Tokens


def test_digits_are_those_of_the_quantizer():
    levels = (4, 3, 5)
    quantizer = FSQ(levels)
    codes = quantizer.ids_to_codes(torch.arange(60))
    digits = (codes * quantizer.half_width + quantizer.half_width).round().long()
    assert torch.equal(DigitRows(levels, 2).digits, digits + torch.tensor([0, 4, 7]))


def test_rows_are_sums_over_digits():
    rows = DigitRows((2, 3), 4)
    torch.nn.init.normal_(rows.table)
    assert torch.allclose(rows()[5], rows.table[1] + rows.table[2 + 2])  # 5 = 1 + 2 * 2


def test_a_gradient_for_one_id_moves_its_neighbour():
    config = GPTConfig(
        vocab_size=6, num_tokens=3, width=8, depth=1, num_heads=2, levels=(2, 3), dropout=0.0
    ).with_condition(num_classes=2)
    torch.manual_seed(0)
    model = GPT(config)
    labels, ids = torch.tensor([0]), torch.full((1, 3), 4)
    before = model.logits(labels, ids).softmax(-1)[0, 0].detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(Tokens.full(ids), labels, generator=torch.Generator()).total.backward()
    optimizer.step()
    change = model.logits(labels, ids).softmax(-1)[0, 0].detach() - before
    assert change[4] > 0
    assert change[5] > change[1]  # 5 shares the second digit with 4, 1 shares none


def test_levels_must_make_the_vocabulary():
    with pytest.raises(ValueError, match=r"levels: \[2, 3\] make 6 ids, but vocab_size is 7"):
        GPTConfig(vocab_size=7, levels=(2, 3))


# ------------------------------------------------------------------------------------------------ drawn digit by digit

HEAD = DigitsConfig(digits=(2, 3), width=16, depth=2, num_heads=2)
INDEPENDENT = DigitsConfig(digits=(2, 3))
HEADS = pytest.mark.parametrize("head", [HEAD, INDEPENDENT], ids=["causal", "independent"])
TINY = GPTConfig(
    vocab_size=6, num_tokens=2, width=16, depth=1, num_heads=2, mlp_multiple=16, head=HEAD,
    condition=ClassSlot(num_classes=3, drop=0.0),
)  # fmt: skip
LABELS = torch.arange(3)
LENGTHS = {"fixed": {}, "ends": {"ends": True}, "slots": {"ends": True, "num_slots": 3}}


def build(**changes) -> GPT:
    """A tiny model whose laws are not flat."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(TINY, **changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def grid(side: int, *, dims: int) -> Tensor:
    """All combinations of the midpoints of `side` equal parts of [0, 1), (side ** dims, dims)."""
    middles = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.cartesian_prod(*[middles] * dims)


def counts_of_cells(probabilities: Tensor, side: int) -> list[int]:
    """How many of those midpoints fall to each outcome."""
    ends = (probabilities.cumsum(0) / probabilities.sum() * side - 0.5).ceil().long().tolist()
    return [here - before for here, before in zip(ends, [0, *ends[:-1]], strict=True)]


def loss(model: GPT, tokens: Tokens) -> Tensor:
    labels = torch.full((len(tokens),), 2)
    return model(tokens, labels, generator=torch.Generator().manual_seed(0)).total


@torch.no_grad()
def laws_of_digits(model: GPT, before: Sequence[int], sampling: TokenSampling) -> tuple[Tensor, Tensor]:
    """The laws of the first digit (2,), or with the end (3,), and of the second (2, 3) after each first one, of the
    token after the tokens `before`, for class 2; from the logits of the training path.
    """
    sequences = torch.tensor([[*before, id_] for id_ in (0, 3)])  # whose first digits are 0 and 1
    given, none = (model.logits(torch.full((2,), label), sequences)[:, -1] for label in (2, -1))
    ends = model.config.end is not None
    closed = torch.tensor([False, False, True]) if ends and not before else None
    guided = sampling.guidance != 1
    first = law(given[:1, 0], sampling, none[:1, 0] if guided else None, closed)[0]
    second = law(given[:, 1], sampling, none[:, 1] if guided else None)
    assert not first[2 + ends :].any(), "a digit has no more values than it has"
    return first[: 2 + ends].double(), second.double()


def test_ids_are_split_and_joined():
    digits, ids = Digits((5, 4, 3), 2), torch.arange(60)
    expected = torch.stack(torch.unravel_index(ids, (5, 4, 3)), dim=-1)
    assert torch.equal(digits.split(ids), expected)
    assert torch.equal(digits.join(expected), ids)
    assert digits.split(torch.tensor(60)).tolist() == [5, 0, 0]  # the end
    torch.nn.init.normal_(digits.table)
    torch.testing.assert_close(digits(torch.tensor([[37]]))[0, 0], digits.table[[3, 5 + 0, 9 + 1]].sum(0))


@HEADS
@pytest.mark.parametrize("digits", [(2, 3), (3, 2)])
@pytest.mark.parametrize("ends", [False, True])
@torch.no_grad()
def test_the_probabilities_of_all_ids_make_up_one(head, digits, ends):
    """By the training path, whichever digit has the more values; the loss is their logarithm."""
    model = build(head=dataclasses.replace(head, digits=digits), ends=ends)
    before = torch.tensor([[4, 0]] * 6)
    before[:, 1] = torch.arange(6)
    logits = model.logits(torch.full((6,), 2), before).double().log_softmax(-1)
    picked = logits.gather(-1, model.digits.split(before)[..., None]).squeeze(-1)  # (6, L, C)
    of_last = picked[:, 1].sum(-1).exp()
    end = logits[0, 1, 0, digits[0]].exp() if ends else 0
    assert (of_last.sum() + end).item() == pytest.approx(1, abs=1e-6)
    terms = picked.sum((1, 2))
    losses = torch.stack([loss(model, Tokens.full(row[None])) for row in before])
    torch.testing.assert_close(-4 * losses.double(), terms, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ends", "slots"])
@torch.no_grad()
def test_the_probabilities_of_all_sequences_make_up_one(name):
    """From the losses of sequences of every length: an end is told by its first digit alone."""
    model, total = build(**LENGTHS[name], vocab_size=4, head=dataclasses.replace(HEAD, digits=(2, 2))), 0.0
    slots = model.config.num_slots
    for length in (1, 2):
        for ids in itertools.product(range(4), repeat=length):
            for places in itertools.combinations(range(slots), length) if slots else [None]:
                row = None if places is None else torch.tensor([places])
                tokens = Tokens(torch.tensor([ids]), torch.tensor([length]), row)
                given = model(tokens, torch.tensor([2]), generator=torch.Generator())
                nats = given.parts["cross_entropy"].double() * (length + (length < 2 and not slots))
                if slots:  # a sequence ends by a slot that is none
                    nats += given.parts["slots"].double() * (length + (length < 2))
                total += math.exp(-nats.item())
    first_end = 0.0
    if name == "ends":  # the first is never an end
        logits = model.logits(torch.tensor([2]), torch.tensor([[0]]))[0, 0, 0]
        first_end = logits.softmax(-1)[2].item()
    assert total == pytest.approx(1 - first_end, abs=1e-5)


SAMPLINGS = {
    "plain": TokenSampling(guidance=1.0),
    "guided": TokenSampling(guidance=2.0, temperature=1.3),
    "top_k": TokenSampling(guidance=1.0, top_k=2),
    "top_p": TokenSampling(guidance=1.5, top_p=0.8),
}


@pytest.mark.parametrize(
    ("name", "ends", "head"),
    [("plain", False, HEAD), *((name, True, HEAD) for name in SAMPLINGS), ("guided", True, INDEPENDENT)],
)
def test_ids_have_exactly_the_probabilities_of_the_forward_pass(name, ends, head):
    """Over a grid of uniforms, one a digit, every sequence must come as often as the laws of its digits say."""
    model, side, sampling = build(ends=ends, head=head), 8, SAMPLINGS[name]
    points = grid(side, dims=4)
    drawn = decoding.cached(model, torch.full((len(points),), 2), Uniforms(points.view(-1, 2, 2)), sampling)
    found = Counter(tuple(row[:n]) for row, n in zip(drawn.ids.tolist(), drawn.lengths.tolist(), strict=True))

    def counts(before: Sequence[int]) -> dict[int, int]:
        first, second = laws_of_digits(model, before, sampling)
        ways = counts_of_cells(first, side)
        of_ids = {3 * a + b: ways[a] * n for a in range(2) for b, n in enumerate(counts_of_cells(second[a], side))}
        return of_ids | ({6: ways[2] * side} if ends else {})  # whose second digit nobody asks for

    expected = Counter()
    for one, often in counts([]).items():
        for two, times in counts([one]).items() if one < 6 else ():
            expected[(one,) if two == 6 else (one, two)] += often * times
    assert found == +expected
    assert expected.total() == len(points)


def test_samples_have_the_distribution_of_the_digits():
    """Pairs of tokens of 4000 images of one class: chi-square at 0.1 %, 35 degrees of freedom: 66.6."""
    model, sampling = build(), TokenSampling(guidance=1.5, temperature=5.0)
    ids = model.generate(torch.full((4000,), 2), seed=0, indices=range(4000), sampling=sampling).ids

    def joint(before: Sequence[int]) -> Tensor:
        first, second = laws_of_digits(model, before, sampling)
        return (first[:, None] * second).flatten()

    expected = 4000 * torch.stack([p * joint([id_]) for id_, p in enumerate(joint([]))]).flatten()
    assert expected.min() > 5
    counts = torch.bincount(6 * ids[:, 0] + ids[:, 1], minlength=36)
    assert ((counts - expected) ** 2 / expected).sum() < 66.6


@pytest.mark.parametrize(
    ("name", "guidance", "head"),
    [*itertools.product(LENGTHS, [1.0, 2.0], [HEAD]), *((name, 2.0, INDEPENDENT) for name in LENGTHS)],
)
def test_the_loops_draw_the_same(name, guidance, head):
    model = build(head=head, **LENGTHS[name] | {"num_tokens": 6} | ({"num_slots": 20} if name == "slots" else {}))
    options = {"seed": 3, "indices": range(60), "sampling": TokenSampling(guidance=guidance, top_k=2)}
    cached, plain = (model.generate(torch.arange(60) % 3, cached=c, **options) for c in (True, False))
    assert torch.equal(cached.ids, plain.ids)
    assert torch.equal(cached.lengths, plain.lengths)
    assert (cached.lengths.min() < 6) == (name != "fixed")
    assert set(cached.ids.unique().tolist()) == set(range(6))
    if cached.slots is not None:
        assert torch.equal(cached.slots, plain.slots)
    shorter = model.generate(torch.arange(60) % 3, num_tokens=4, **options)
    assert torch.equal(shorter.ids, cached.ids[:, :4])


def test_at_temperature_zero_the_most_likely_digits_come():
    model = build()
    ids = model.generate(LABELS, seed=0, indices=range(3), sampling=TokenSampling(temperature=0.0, guidance=1.0)).ids
    with torch.no_grad():
        assert torch.equal(model.logits(LABELS, ids).argmax(-1), model.digits.split(ids))


def test_recomputed_activations_give_the_same_gradients():
    found, tokens = [], Tokens.full(torch.arange(6).view(3, 2))
    for recompute in (False, True):
        model = build()
        if recompute:
            model.recompute_activations()
        loss(model, tokens).backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.no_grad()
def test_guided_independent_digits_make_the_guided_law_of_ids():
    """Which the digits of a causal head do not."""
    sampling, labels, before = (
        TokenSampling(guidance=2.5, temperature=1.3),
        torch.full((2,), 2),
        torch.tensor([[0], [3]]),
    )
    differences = {}
    for head in (HEAD, INDEPENDENT):
        model = build(head=head)
        first, second = laws_of_digits(model, [], sampling)
        of_digits = (first[:, None] * second).flatten()
        rows = []  # the logarithms of the probabilities of all ids, for the class and for none
        for label in (labels, torch.full((2,), -1)):
            one, two = model.logits(label, before)[:, 0].log_softmax(-1).unbind(1)
            rows.append((one[0, :2, None] + two[:, :3]).flatten())
        wanted = law(rows[0], sampling, rows[1]).double()
        differences[head] = (of_digits - wanted).abs().max().item()
    assert differences[INDEPENDENT] < 1e-6 < 1e-4 < differences[HEAD]


@torch.no_grad()
def test_independent_digits_do_not_know_each_other():
    model = build(head=INDEPENDENT)
    ids = torch.arange(6)[:, None]
    logits = model.logits(torch.zeros(6, dtype=torch.long), ids)[:, 0]
    assert torch.equal(logits, logits[:1].expand(6, -1, -1))
    assert logits[0, 0, 2] < -1e30, "the first digit has two values"
    assert not torch.equal(*build().logits(torch.zeros(2, dtype=torch.long), ids[[0, 3]])[:, 0, 1])


def test_no_digit_is_likelier_before_training():
    head = DigitsConfig(digits=(16, 4))
    model = GPT(dataclasses.replace(TINY, vocab_size=64, head=head))
    nats = model(Tokens.full(torch.tensor([[5, 60]])), LABELS[:1], generator=torch.Generator()).parts["cross_entropy"]
    assert nats.item() == pytest.approx(math.log(64), abs=1e-5)


@HEADS
def test_no_table_has_a_row_for_each_id(head):
    head = dataclasses.replace(head, digits=(1024, 1024))
    with torch.device("meta"):
        model = GPT(dataclasses.replace(TINY, vocab_size=2**20, head=head))
    assert max(p.numel() for p in (*model.parameters(), *model.buffers())) == 2 * 1024 * 16


def test_digits_that_do_not_fit():
    for changes, message in (
        ({"vocab_size": 8}, r"head.digits: \[2, 3\] make 6 ids, but vocab_size is 8, \[4, 2\] would make those"),
        ({"vocab_size": 7}, r"make 6 ids, but vocab_size is 7, which is prime: leave head out"),
        ({"levels": (2, 3)}, r"levels: with a head, ids share .* leave share_digits out"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **changes)
    for digits in ((6,), (6, 1)):
        with pytest.raises(ValueError, match=r"digits: .* two or more, each of at least 2 values"):
            dataclasses.replace(HEAD, digits=digits)
    with pytest.raises(ValueError, match=r"depth: is missing beside width = 16, num_heads = 2; give all three for"):
        DigitsConfig(digits=(2, 3), width=16, num_heads=2)
    with pytest.raises(ValueError, match=r"width: 16 must be a multiple of num_heads = 3"):
        DigitsConfig(digits=(2, 3), width=16, depth=1, num_heads=3)
    with pytest.raises(ValueError, match=r"sampling.forbidden: this model draws ids digit by digit"):
        build().generate(LABELS, seed=0, indices=range(3), sampling=TokenSampling(forbidden=(1,)))
