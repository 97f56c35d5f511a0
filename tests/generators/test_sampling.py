from __future__ import annotations

import math

import pytest
import torch

from imgtok.generators.sampling import TokenSampling, draw, filter_logits, guide, law


def kept(logits: torch.Tensor, **filters: float) -> list[list[int]]:
    """Indices that survive, row by row."""
    return [row.isfinite().nonzero().flatten().tolist() for row in filter_logits(logits, **filters)]


def logs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


# ---------------------------------------------------------------- filters


def test_the_defaults_keep_everything():
    logits = torch.randn(3, 7)
    assert torch.equal(filter_logits(logits), logits)


def test_temperature_divides():
    assert torch.equal(filter_logits(torch.tensor([[1.0, -2.0]]), temperature=0.5), torch.tensor([[2.0, -4.0]]))


@pytest.mark.parametrize(("top_k", "expected"), [(1, [2]), (2, [1, 2]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k(top_k, expected):
    assert kept(logs([0.1, 0.3, 0.4, 0.2]), top_k=top_k) == [expected]


def test_top_k_keeps_ties():
    assert kept(logs([0.2, 0.3, 0.3, 0.2]), top_k=1) == [[1, 2]]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(1e-9, [2]), (0.39, [2]), (0.41, [1, 2]), (0.69, [1, 2]), (0.71, [1, 2, 3]), (0.91, [0, 1, 2, 3])],
)
def test_top_p_keeps_the_token_that_crosses(top_p, expected):
    assert kept(logs([0.1, 0.3, 0.4, 0.2]), top_p=top_p) == [expected]


def test_top_p_is_per_row():
    rows = logs([0.97, 0.01, 0.01, 0.01], [0.25, 0.25, 0.25, 0.25], [0.01, 0.01, 0.01, 0.97])
    assert kept(rows, top_p=0.9) == [[0], [0, 1, 2, 3], [3]]


def test_a_tiny_top_p_keeps_one_token_even_among_equals():
    assert [len(row) for row in kept(torch.zeros(2, 50), top_p=1e-12)] == [1, 1]


def test_top_p_comes_after_top_k_and_temperature():
    """The two that top-k keeps are 4/7 and 3/7, so 0.5 keeps one; of all four it would be two (0.4 + 0.3)."""
    logits = logs([0.1, 0.3, 0.4, 0.2])
    assert kept(logits, top_p=0.5) == [[1, 2]]
    assert kept(logits, top_k=2, top_p=0.5) == [[2]]
    assert kept(logits, temperature=0.1, top_p=0.9) == [[2]]


def test_filters_leave_their_input_alone():
    logits = torch.randn(2, 6)
    before = logits.clone()
    filter_logits(logits, temperature=0.7, top_k=3, top_p=0.5)
    assert torch.equal(logits, before)


# ---------------------------------------------------------------- the law


def plain_law(logits: list[float], none: list[float] | None, sampling: TokenSampling, closed: set[int]) -> list[float]:
    """One row, number by number."""
    if none is not None:
        logits = [u + sampling.guidance * (c - u) for c, u in zip(logits, none, strict=True)]
    alive = [i for i in range(len(logits)) if i not in closed and i not in sampling.forbidden]
    if sampling.temperature == 0:
        best = max(alive, key=lambda i: (logits[i], -i))
        return [float(i == best) for i in range(len(logits))]
    weights = {i: math.exp(logits[i] / sampling.temperature) for i in alive}
    ranked = sorted(alive, key=lambda i: -weights[i])
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    total, held, kept = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        if kept and held > sampling.top_p:
            break
        kept.append(i)
        held += weights[i] / total
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_k": 4, "top_p": 0.7, "temperature": 1.4},
        {"forbidden": (0, 5)},
        {"forbidden": (2,), "temperature": 0.0, "top_k": 2},
    ],
    ids=str,
)
def test_the_law_against_a_plain_one(settings, guided):
    generator = torch.Generator().manual_seed(7)
    logits, none = torch.randn(2, 4, 3, 9, generator=generator)
    closed = torch.zeros(3, 9, dtype=torch.bool)
    closed[1, [1, 8]] = True
    sampling = TokenSampling(guidance=1.7, **settings)
    before = logits.clone()
    found = law(logits, sampling, none if guided else None, closed)
    assert found.shape == (4, 3, 9)
    assert found.dtype == torch.float32
    assert torch.equal(logits, before)
    for i in range(4):
        for j in range(3):
            shut = set(closed[j].nonzero().flatten().tolist())
            expected = plain_law(logits[i, j].tolist(), none[i, j].tolist() if guided else None, sampling, shut)
            torch.testing.assert_close(found[i, j], torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_the_first_of_equals_comes_at_temperature_zero():
    assert law(torch.tensor([0.0, 2.0, 2.0]), TokenSampling(temperature=0.0)).tolist() == [0, 1, 0]
    assert law(torch.tensor([0.0, 2.0, 2.0]).bfloat16(), TokenSampling()).dtype == torch.float32


# ---------------------------------------------------------------- draws


def test_draws_have_the_exact_distribution():
    """Chi-square against the softmax, 9 degrees of freedom: 27.9 at 0.1 %."""
    count = 40_000
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(3))
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    probabilities = logits.softmax(-1)
    drawn = torch.bincount(draw(probabilities.expand(count, -1), uniforms), minlength=10)
    expected = logits[0].double().softmax(0) * count
    assert ((drawn - expected) ** 2 / expected).sum() < 27.9
    assert draw(probabilities.expand(count, -1), uniforms).dtype == torch.long


def test_a_draw_inverts_the_cumulative_distribution():
    probabilities = torch.tensor([[0.25, 0.5, 0.25]])
    uniforms = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(probabilities.expand(6, -1), uniforms).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(uniform):
    inf = torch.inf
    logits = torch.tensor([[-inf, -inf, 0.0, -inf, 1.3, 0.1, -inf, -inf]])
    assert draw(logits.softmax(-1), torch.tensor([uniform], dtype=torch.float64)).item() in (2, 4, 5)


def test_no_zero_tokens_among_many_hard_cases():
    """Random supports, uniforms at both ends of their range: rounding must not leave the support."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(4000, 33, generator=generator)
    hidden = torch.rand(4000, 33, generator=generator) < 0.7
    hidden[:, 16] = False
    logits = logits.masked_fill(hidden, -torch.inf)
    for uniform in (0.0, 2.0**-53, 1 - 2.0**-53):
        ids = draw(logits.softmax(-1), torch.full((4000,), uniform, dtype=torch.float64))
        assert logits.gather(1, ids[:, None]).isfinite().all()


def test_rows_are_drawn_alone():
    probabilities = torch.randn(5, 12).softmax(-1)
    uniforms = torch.rand(5, dtype=torch.float64)
    single = [draw(probabilities[i : i + 1], uniforms[i : i + 1]).item() for i in range(5)]
    assert draw(probabilities, uniforms).tolist() == single


def test_draws_of_several_positions_at_once():
    probabilities = torch.randn(3, 4, 12).softmax(-1)
    uniforms = torch.rand(3, 4, dtype=torch.float64)
    rows = [draw(probabilities[:, k], uniforms[:, k]) for k in range(4)]
    assert torch.equal(draw(probabilities, uniforms), torch.stack(rows, dim=1))


def test_guide():
    cond, null = torch.randn(2, 3, 4).unbind()
    assert torch.equal(guide(cond, null, 0.0), null)
    torch.testing.assert_close(guide(cond, null, 1.0), cond)
    torch.testing.assert_close(guide(cond, null, 2.0), 2 * cond - null)


# ---------------------------------------------------------------- guidance along the tokens


@pytest.mark.parametrize(
    ("given", "scales"),
    [
        ({}, [3.0, 3.0, 3.0, 3.0]),
        ({"schedule": "linear"}, [1.5, 2.0, 2.5, 3.0]),
        ({"schedule": "cosine"}, [2 - 0.5**0.5, 2.0, 2 + 0.5**0.5, 3.0]),
        ({"interval": (1, 3)}, [1.0, 3.0, 3.0, 1.0]),
        ({"schedule": "linear", "interval": (0, 2)}, [1.5, 2.0, 1.0, 1.0]),
    ],
)
def test_guidance_has_a_scale_for_each_token(given, scales):
    sampling = TokenSampling(guidance=3.0, top_k=5, **given)
    assert [sampling.scale(token, 4) for token in range(4)] == pytest.approx(scales)
    of_tokens = [sampling.at(token, 4) for token in range(4)]
    assert [how.guidance for how in of_tokens] == pytest.approx(scales)
    assert {(how.schedule, how.interval, how.top_k) for how in of_tokens} == {("constant", None, 5)}


def test_intervals_that_are_empty_are_refused():
    with pytest.raises(ValueError, match=r"interval: \[3, 3\] must be \[first, end\], the first below the end"):
        TokenSampling(interval=(3, 3))
