"""ToMe's functions against what its published code computed, and FRAP's against its formulas, evaluated in float64.

The second half makes mistakes on purpose, those of the Pitfalls of our specification among them: each must fail.
"""

from __future__ import annotations

import controls_runs
import pytest
import torch
from cases import Case
from torch import Tensor

from imgtok.generators.controls import frap, tome


def errors(name: str) -> dict[str, float]:
    """Name of an output -> its error in units of the tolerance."""
    case = Case.load(f"controls/{name}")
    ours = {key: value.detach() for key, value in controls_runs.RUNS[name](case).items()}
    assert ours.keys() == case.recorded.keys()
    found = {}
    for key, value in ours.items():
        reference = case.recorded[key]
        assert value.shape == reference.shape, key
        largest, difference = reference.abs().max(), (value - reference).abs().max()
        found[key] = float(difference / (1e-3 * largest if "grad" in key else 1e-4 * largest.clamp(min=1)))
    return found


@pytest.mark.parametrize("name", controls_runs.RUNS)
def test_case(name):
    found = errors(name)
    print(name, {key: f"{error:.1e} of the tolerance" for key, error in found.items()})
    assert all(error <= 1 for error in found.values()), found


# ---------------------------------------------------------------- mistakes


def worst(name: str) -> float:
    found = [float("inf") if error != error else error for error in errors(name).values()]
    return max(found)


def test_a_plain_sum(monkeypatch):
    original = tome.merge
    monkeypatch.setattr(tome, "merge", lambda states, groups, **options: original(states, groups, noun=1, modifier=1))
    assert worst("tome_merge") > 1


def test_groups_that_do_not_see_what_earlier_ones_left(monkeypatch):
    """A group that reads the prompt's own states, where a column is shared."""
    original, states = tome.merge, torch.randn(6, 3)
    first, second = tome.Group([1], [2]), tome.Group([3], [2])
    merged = original(states, [first, second])
    assert torch.equal(merged[3], 1.1 * states[3]), "the shared column was zero by then"
    assert tome.emptied([first, second]) == [2]
    assert tome.emptied([tome.Group([1, 2]), tome.Group([2], [3])]) == [3], "which holds a composite"


def test_the_end_from_its_first_token_on(monkeypatch):
    """Pitfall 2: words counts pieces; one less, or more, moves the end."""
    original = tome.substitute_end
    monkeypatch.setattr(tome, "substitute_end", lambda states, short, words: original(states, short, words + 1))
    assert worst("tome_merge") > 1


def test_a_softmax_over_marks_and_padding(monkeypatch):
    def over_all(average: Tensor, words: range, temperature: float) -> Tensor:
        return (average / temperature).softmax(dim=-1)[:, list(words)]

    monkeypatch.setattr(tome, "word_maps", over_all)
    assert worst("tome_entropy") > 1


def test_a_map_without_its_least(monkeypatch):
    monkeypatch.setattr(tome, "spread", lambda scores: scores / scores.amax(dim=0))
    assert worst("tome_entropy") > 1


def test_a_constant_map_is_finite():
    """Pitfall 6: min-max scaling divides by zero."""
    average = torch.full((16, 5), 0.2, requires_grad=True)
    loss = tome.entropies(average, [1, 2], words=range(1, 4)).sum()
    loss.backward()
    assert loss.isfinite()
    assert average.grad.isfinite().all()
    assert tome.centres(average.detach(), [1, 2], range(1, 4), (4, 4)).isfinite().all()


def test_centres_by_rows(monkeypatch):
    original = tome.centres
    monkeypatch.setattr(tome, "centres", lambda *options: original(*options).flip(-1))
    assert worst("tome_entropy_position") > 1


def test_the_usual_sign_where_the_published_one_is_asked_for(monkeypatch):
    """Pitfall 5."""
    original = tome.anchor_noise
    monkeypatch.setattr(tome, "anchor_noise", lambda *what, published: original(*what, published=not published))
    assert worst("tome_binding") > 1


def test_a_sum_for_the_mean_of_the_binding_loss(monkeypatch):
    monkeypatch.setattr(
        tome.bind, "__kwdefaults__", {**tome.bind.__kwdefaults__, "loss": lambda a, b: (a - b).square().sum()[None]}
    )
    assert worst("tome_binding") > 1


@pytest.mark.parametrize("latent_step", [0.6, 0.0])
def test_latents_that_go_as_far_as_the_text_or_not_at_all(monkeypatch, latent_step):
    original = tome.refine
    monkeypatch.setattr(tome, "refine", lambda *what, **options: original(*what, **options, latent_step=latent_step))
    assert worst("tome_refine") > 1


def test_composites_alone_are_moved(monkeypatch):
    moves = torch.zeros(1, 12, dtype=torch.bool)
    moves[0, [2, 6]] = True
    original = tome.refine
    monkeypatch.setattr(tome, "refine", lambda *what, **options: original(*what, **options, moves=moves))
    assert worst("tome_refine") > 1


def test_the_kernel_of_a_normal_density(monkeypatch):
    monkeypatch.setattr(frap.kernel, "__defaults__", (0.5 / 2**0.5,))
    assert worst("frap_losses") > 1


def test_one_probability_for_the_other(monkeypatch):
    original = frap.probabilities
    other = {"sum": "softmax", "softmax": "sum"}
    monkeypatch.setattr(frap, "probabilities", lambda maps, how: original(maps, other[how]))
    assert worst("frap_losses") > 1


def test_an_overlap_that_is_lowered(monkeypatch):
    original = frap.overlap
    monkeypatch.setattr(frap, "overlap", lambda *what, **options: -original(*what, **options))
    assert worst("frap_update") > 1


def test_weights_of_the_marks_and_the_padding_move(monkeypatch):
    """Pitfall 11."""
    alpha, gradient = torch.zeros(2, 4), torch.ones(2, 4)
    free = torch.tensor([[False, True, True, False]]).expand(2, -1)
    assert frap.updated(alpha, gradient, free, step=0.5, normalised=True).tolist() == [[0, -0.5, -0.5, 0]] * 2
    original = frap.updated
    monkeypatch.setattr(
        frap, "updated", lambda alpha, gradient, free, **how: original(alpha + 0.1, gradient, free, **how)
    )
    assert worst("frap_update") > 1


def test_the_empty_prompt_of_another_place(monkeypatch):
    """Pitfall 12: its states are those of the same column."""
    original = frap.interpolated
    monkeypatch.setattr(
        frap, "interpolated", lambda states, null, weights: original(states, null.mean(0, keepdim=True), weights)
    )
    assert worst("frap_update") > 1


def test_weights_of_one_change_no_bit():
    states, null = torch.randn(5, 8), torch.randn(5, 8)
    for found in (frap.interpolated(states, null, torch.ones(5)), frap.scaled(states, torch.ones(5))):
        assert torch.equal(found, states)
    assert frap.bounded(torch.zeros(1), 0.6, 1.4).item() == 1
    assert frap.step_of(0.1, 0.6, 1.4) == pytest.approx(0.5)


def test_rows_stop_on_their_own():
    """A row that is low enough after its first pass is where it would be alone."""

    def loss_of(latents: Tensor, states: Tensor) -> Tensor:
        return states.square().sum(dim=(1, 2)) + latents.square().sum(dim=1)

    latents, states = torch.randn(2, 3), torch.randn(2, 4, 3)
    enough = torch.tensor([1e9, 0.0])
    together = tome.refine(latents, states, loss_of, step=0.1, enough=enough, passes=3)
    alone = [
        tome.refine(latents[i : i + 1], states[i : i + 1], loss_of, step=0.1, enough=enough[i : i + 1], passes=3)
        for i in range(2)
    ]
    for i in range(2):
        torch.testing.assert_close(together[0][i : i + 1], alone[i][0])
        torch.testing.assert_close(together[1][i : i + 1], alone[i][1])
    assert [len(one[2]) for one in alone] == [1, 3]
    assert together[2][1][0].isnan()
