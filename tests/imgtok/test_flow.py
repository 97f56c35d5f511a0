from __future__ import annotations

import math

import pytest
import torch

from imgtok import flow


def test_the_path_runs_from_data_to_noise_at_constant_velocity():
    x0, noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(flow.interpolate(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(flow.interpolate(x0, noise, torch.ones(3)), noise)
    times = torch.tensor([0.2, 0.5, 0.8])
    h = 1e-2
    slope = (flow.interpolate(x0, noise, times + h) - flow.interpolate(x0, noise, times)) / h
    torch.testing.assert_close(slope, flow.velocity_target(x0, noise), atol=1e-3, rtol=1e-3)


def test_interpolate_takes_any_rank():
    x0, noise = torch.zeros(2, 5), torch.ones(2, 5)
    assert flow.interpolate(x0, noise, torch.tensor([0.25, 0.75]))[:, 0].tolist() == [0.25, 0.75]


SOLVERS = [flow.euler, flow.adams]


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("steps", [1, 3, 25])
def test_solvers_are_exact_on_a_straight_path(solve, steps):
    x0, noise = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    out = solve(lambda x, step, t: flow.velocity_target(x0, noise), noise, steps)
    torch.testing.assert_close(out, x0, atol=1e-14, rtol=0)


@pytest.mark.parametrize("solve", SOLVERS)
def test_solvers_call_the_velocity_at_the_beginning_of_each_step_and_never_at_zero(solve):
    times, seen = [], []

    def on_step(step, x, guess):
        seen.append((step, float(x), float(guess)))

    solve(lambda x, step, t: times.append(t) or x * 0 + 1, torch.ones(1), 4, on_step)
    assert times == [1.0, 0.75, 0.5, 0.25]
    assert seen == [(1, 0.75, 0), (2, 0.5, 0), (3, 0.25, 0), (4, 0, 0)]


@pytest.mark.parametrize(("solve", "order"), [(flow.euler, 1), (flow.adams, 2)])
def test_solvers_converge_at_their_order_on_a_curved_field(solve, order):
    """dx/dt = x + t has the solution x(0) = (x(1) + 2) / e - 1."""
    noise = torch.tensor([0.3, -1.2], dtype=torch.float64)
    exact = (noise + 2) / math.e - 1
    errors = [(solve(lambda x, step, t: x + t, noise, steps) - exact).abs().max().item() for steps in (100, 200)]
    assert errors[0] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.03)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("steps", [0, -1])
def test_solvers_need_a_step(solve, steps):
    with pytest.raises(ValueError, match="at least 1 step"):
        solve(lambda x, step, t: x, torch.ones(1), steps)


# ---------------------------------------------------------------- times


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.25, 1.29, 1.75])
def test_mode_times_have_the_published_distribution(scale):
    """The share below each time must be that of u below its preimage; the map is monotone in u."""
    times = flow.mode_times(20_000, scale, torch.Generator().manual_seed(0))
    assert times.min() >= 0
    assert times.max() <= 1
    u = torch.linspace(0, 1, 21)[1:-1]
    edges = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    shares = torch.stack([(times < edge).float().mean() for edge in edges])
    assert (shares - (1 - u)).abs().max() < 0.02  # Kolmogorov-Smirnov: 0.0115 at 1 %


def test_logit_normal_times():
    times = flow.logit_normal_times(20_000, torch.Generator().manual_seed(0))
    logits = times.double().logit()
    assert logits.mean().abs() < 0.03
    assert (logits.std() - 1).abs() < 0.03


def test_stratified_times_fill_every_range_once():
    times = flow.logit_normal_times(500, torch.Generator().manual_seed(0), stratified=True)
    below = torch.special.ndtr(times.double().logit())  # the normal's distribution function: uniform
    assert (below * 500).floor().tolist() == list(range(500))
    within = (below * 500).frac()
    assert abs(within.mean() - 0.5) < 0.05
    assert abs(within.std() - 12**-0.5) < 0.03


DRAWS = [
    lambda g: flow.mode_times(8, 0.25, g),
    lambda g: flow.logit_normal_times(8, g),
    lambda g: flow.logit_normal_times(8, g, stratified=True),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_times_come_from_the_generator_alone(draw):
    state = torch.get_rng_state()
    first, second = (draw(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------- guidance


def vectors(seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    cond, null = torch.randn(2, batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).unbind()
    return cond, null


def test_classifier_free_guidance():
    cond, null = vectors(0)
    assert torch.equal(flow.classifier_free_guidance(cond, null, 0.0), null)
    torch.testing.assert_close(flow.classifier_free_guidance(cond, null, 1.0), cond)
    torch.testing.assert_close(flow.classifier_free_guidance(cond, null, 3.0), 3 * cond - 2 * null)


def test_projected_guidance_is_the_capped_difference_less_its_part_along_the_velocity():
    cond, null = vectors(0)
    guided = flow.AdaptiveProjectedGuidance(cap=0.5)(cond, null, 3.0)
    for v_cond, v_null, v in zip(cond.flatten(1), null.flatten(1), guided.flatten(1), strict=True):
        capped = (v_cond - v_null) * 0.5 / (v_cond - v_null).norm()
        orthogonal = capped - (capped @ v_cond) / (v_cond @ v_cond) * v_cond
        torch.testing.assert_close(v, v_cond + 2 * orthogonal)
        assert (orthogonal @ v_cond).abs() < 1e-5


def test_projected_guidance_without_its_three_changes_is_plain_guidance():
    cond, null = vectors(0)
    plain = flow.AdaptiveProjectedGuidance(momentum=0.0, cap=math.inf, parallel=1.0)
    for scale in (1.0, 2.0, 7.5):
        torch.testing.assert_close(plain(cond, null, scale), flow.classifier_free_guidance(cond, null, scale))


def test_projected_guidance_keeps_the_uncapped_running_difference():
    guide = flow.AdaptiveProjectedGuidance(momentum=-0.5, cap=1e-3)
    (cond, null), (cond2, null2) = vectors(0), vectors(1)
    guide(cond, null, 2.0)
    guide(cond2, null2, 2.0)
    torch.testing.assert_close(guide.running, cond2 - null2 - 0.5 * (cond - null))


def test_projected_guidance_treats_images_alone():
    cond, null = vectors(0, batch=3)
    together = flow.AdaptiveProjectedGuidance()
    alone = [flow.AdaptiveProjectedGuidance() for _ in range(3)]
    for _ in range(2):
        batch = together(cond, null, 7.5)
        single = torch.cat([g(cond[i : i + 1], null[i : i + 1], 7.5) for i, g in enumerate(alone)])
    torch.testing.assert_close(batch, single, atol=1e-6, rtol=1e-6)


def test_projected_guidance_of_equal_velocities_is_neutral():
    cond, _ = vectors(0)
    guided = flow.AdaptiveProjectedGuidance()(cond, cond, 7.5)
    assert torch.equal(guided, cond)
    zero = torch.zeros_like(cond)
    assert flow.AdaptiveProjectedGuidance()(zero, cond, 7.5).isfinite().all()
