"""The xAR cases notice the mistakes that load and run without an error: each is made on purpose, and must fail.

Measured are velocities and latents; inner values of a case only where it is said. The tolerance is that of `test_xar`.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import xar_runs
from cases import Case
from models import xar
from test_xar import TOLERANCE

import imgtok.generators.xar as code
from imgtok import flow
from imgtok.generators import xar_fast
from imgtok.generators.xar import GEGLU, XAR, EntityPlan
from imgtok.generators.xar_fast import BOTH, ModulationTable, SamplingNetwork, Span
from imgtok.layers.attention import Look
from imgtok.layers.cache import KVCache
from imgtok.layers.norms import rms_norm

TRAIN, FOUR, FORTY = (Case.load(f"xar/{name}") for name in ("train_forward", "sample_sde_cfg", "sample_sde_40"))
pytestmark = pytest.mark.slow  # what is wrong with our code `test_xar` finds; here it is seen that it would

Change = Callable[[XAR], object]


@functools.cache
def model_of(training: bool) -> XAR:
    """Weights are the same for all sampling cases."""
    return xar(TRAIN if training else FOUR)


def fresh(case: Case) -> XAR:
    """The case's model, which a mistake may change."""
    return copy.deepcopy(model_of(case is TRAIN))


def error(case: Case, out: str, ours: xar_runs.Outputs) -> float:
    found = case.errors({out: ours[out]}, TOLERANCE)[out]
    print(f"{case.about['case']} {out}: {found:.3g}")
    return found


def train_error(change: Change = lambda model: None, out: str = "velocity") -> float:
    model = fresh(TRAIN)
    change(model)
    return error(TRAIN, out, xar_runs.training(model, TRAIN))


def sample_error(change: Change = lambda model: None, *, case: Case = FOUR, plainly: bool = False) -> float:
    model = fresh(case)
    change(model)
    return error(case, "latent", xar_runs.sampling(model, case, plainly=plainly))


def test_the_right_code_passes():
    assert train_error() <= 1
    assert train_error(out="loss") <= 1
    assert sample_error() <= 1
    assert sample_error(plainly=True) <= 1


# ---------------------------------------------------------------- times


def condition(model: XAR, thousandths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`XAR.condition` from another time index."""
    features = code.time_features(thousandths.flatten(), max_period=10000.0).unflatten(0, thousandths.shape)
    rows = torch.where(labels == -1, model.null_class, labels)
    return model.time_mlp(features) + model.class_embedding(rows)


INDICES = {
    "rounded": lambda t: (t.float() * 1000).round(),
    "fractional": lambda t: t.float() * 1000,
    "one too many": lambda t: (t.float() * 1000).floor() + 1,
}


@pytest.mark.parametrize("mistake", INDICES)
def test_time_index(monkeypatch, mistake):
    monkeypatch.setattr(XAR, "condition", lambda self, t, labels: condition(self, INDICES[mistake](t), labels))
    assert train_error() > 1
    assert sample_error(case=FOUR if mistake == "one too many" else FORTY) > 1


def test_four_steps_hide_a_missing_truncation(monkeypatch):
    """Their products are whole: this is why the case with 40 steps is there."""
    monkeypatch.setattr(XAR, "condition", lambda self, t, labels: condition(self, (t * 1000).round(), labels))
    assert sample_error() <= 1


def test_product_in_float64(monkeypatch):
    """0.68 is 679 then; times come in float64 too, as they do from numpy."""

    original = ModulationTable.__init__

    def init(self, model, condition, batch, times):
        original(self, model, condition, batch, times)
        self.times = torch.tensor([0.0, *times], dtype=torch.float64)

    monkeypatch.setattr(ModulationTable, "__init__", init)
    assert sample_error() <= 1, "the model itself goes to float32"
    monkeypatch.setattr(
        XAR, "condition", lambda self, t, labels: condition(self, (t.double() * 1000).trunc().float(), labels)
    )
    assert sample_error() > 1


def test_sampling_from_the_last_time_of_training(monkeypatch):
    monkeypatch.setattr(
        XAR, "condition", lambda self, t, labels: condition(self, (t * 1000).trunc().clamp(max=999), labels)
    )
    assert train_error() <= 1
    assert sample_error() > 1


def test_sine_first(monkeypatch):
    original = code.time_features

    def swapped(*args, **options):
        return torch.cat(original(*args, **options).chunk(2, dim=-1)[::-1], dim=-1)

    monkeypatch.setattr(code, "time_features", swapped)
    assert train_error() > 1


def test_times_in_the_order_of_images(monkeypatch):
    """Published times are entity-major: taken the other way round, entities get each other's."""
    original = XAR.condition
    monkeypatch.setattr(XAR, "condition", lambda self, t, labels: original(self, t.T.reshape(t.shape), labels))
    assert train_error() > 1


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    "gate", [F.silu, lambda x: F.gelu(x, approximate="tanh")], ids=["as its name SwiGLU says", "tanh GELU"]
)
def test_gate_of_the_feed_forward_layer(monkeypatch, gate):
    def forward(self, x):
        return self.down_proj(gate(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(GEGLU, "forward", forward)
    assert train_error() > 1
    assert sample_error() > 1


def test_gate_and_up_exchanged(monkeypatch):
    def forward(self, x):
        return self.down_proj(F.gelu(self.up_proj(x)) * self.gate_proj(x))

    monkeypatch.setattr(GEGLU, "forward", forward)
    assert train_error() > 1


ORDERS = {  # which of the published six stand where ours expects both gates, both scales, both shifts
    "as in DiT: shift, scale, gate of each": (2, 5, 1, 4, 0, 3),
    "gate, scale, shift of each": (0, 3, 1, 4, 2, 5),
    "shifts before scales": (0, 1, 4, 5, 2, 3),
    "shifts, scales, gates": (4, 5, 2, 3, 0, 1),
    "feed-forward before attention": (1, 0, 3, 2, 5, 4),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_order_of_gates_scales_and_shifts(monkeypatch, order):
    original = XAR.modulations

    def reordered(self, cond):
        chunks = (modulation.chunk(6, dim=-1) for modulation in original(self, cond))
        return [torch.cat([six[place] for place in order], dim=-1) for six in chunks]

    monkeypatch.setattr(XAR, "modulations", reordered)
    assert train_error() > 1


def test_condition_without_silu(monkeypatch):
    monkeypatch.setattr(XAR, "modulations", lambda self, cond: [block.modulation(cond) for block in self.blocks])
    assert train_error() > 1


def test_position_after_the_norm():
    def change(model: XAR) -> None:
        norm = model.input_norm.forward
        positions = model.first_positions.unflatten(0, (4, 64))  # training sees all positions at once, by entity
        model.input_norm.forward = lambda h: norm(h - positions) + positions

    assert train_error(change) > 1


def test_a_norm_at_the_start_of_the_second_stack():
    def change(model: XAR) -> None:
        model.second_blocks[0].register_forward_pre_hook(lambda block, inputs: (rms_norm(inputs[0]), *inputs[1:]))

    assert train_error(change) > 1
    assert sample_error(change) > 1


def test_epsilon_of_the_learned_norms():
    """The value after the first block shows it; the velocities, by 0.7 of the tolerance, do not."""

    def change(model: XAR) -> None:
        for norm in (model.input_norm, model.first_norm, model.second_norm):
            norm.eps = 1e-5

    assert train_error(change, out="block0_image0") > 1


def test_epsilon_of_the_blocks(monkeypatch):
    """A hundred times too large. Ten times moves these cases by half their tolerance: they cannot tell."""
    monkeypatch.setattr(code, "EPS", 1e-4)
    assert train_error() > 1


def test_layer_norm(monkeypatch):
    monkeypatch.setattr(code, "rms_norm", lambda x, eps: F.layer_norm(x, x.shape[-1:], eps=eps))
    assert train_error() > 1


# ---------------------------------------------------------------- positions and mask


def test_rotation_of_halves_instead_of_pairs(monkeypatch):
    def halves(x, table):
        a, b = x.chunk(2, dim=-1)
        cos, sin = table.unbind(-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    monkeypatch.setattr(code, "rotate", halves)
    assert train_error() > 1
    assert sample_error() > 1


def transpose(model: XAR) -> None:
    model.rotary = torch.cat(model.rotary.chunk(2, dim=1)[::-1], dim=1)


def raster(model: XAR) -> None:
    """The table as if the sequence ran over the grid row by row."""
    model.rotary = model.rotary[torch.argsort(model.entities.order)]


@pytest.mark.parametrize("change", [transpose, raster], ids=["columns first", "raster"])
def test_rotary_tables(change):
    assert train_error(change) > 1
    assert sample_error(change) > 1


@pytest.mark.parametrize("mistake", ["causal within an entity", "everything is seen", "only itself is seen"])
def test_masks(monkeypatch, mistake):
    def of(entities, first, stop, entity):
        right = original(entities, first, stop, entity)
        start, end = entities.offsets[first], entities.offsets[stop]
        allowed = entities.may_look()[start:end, :end]
        if mistake == "causal within an entity":
            allowed = torch.ones_like(allowed).tril(start)
        elif mistake == "everything is seen":
            allowed = torch.ones_like(allowed)
        else:
            allowed = allowed & entities.may_look().T[start:end, :end]
        last = replace(right.last_look, mask=allowed[right.last_look.queries])
        return replace(right, looks=[Look(slice(None), slice(None), allowed)], last_look=last)

    original = Span.of
    monkeypatch.setattr(Span, "of", of)
    assert train_error() > 1
    if mistake != "everything is seen":  # while sampling, what comes later is not there yet
        assert sample_error() > 1


# ---------------------------------------------------------------- context and cache


def written_while_denoising(self, x, step, branches):
    """Every call writes the current entity over what its last call wrote: so that of 0.04 stays."""
    current, offsets = len(self.finished), self.model.entities.offsets
    assert branches == BOTH
    rows = slice(0, 2 * self.batch)
    return Span.of(self.model.entities, current, current + 1, self.model.entity).call(
        self.model,
        x.repeat(2, 1, 1),
        self.modulations.of_span(0, self.rows[current][step], rows),
        cache=self.cache.rows(rows, offsets[current]),
        last_only=True,
    )


def keeps_the_current(self, x, step, branches):
    """The first call keeps what it computed of the current entity too, which later calls then see beside themselves."""
    current, offsets = len(self.finished), self.model.entities.offsets
    assert branches == BOTH
    rows, first = slice(0, 2 * self.batch), step == 0
    new = self.finished[-1:] if first else []
    filled = self.filled if hasattr(self, "filled") else 0
    size = (len(new) + 1) * 64
    if first:
        self.filled = filled + size
    look = Look(slice(64 * len(new), size), slice(0, filled + size))
    looks = [Look(slice(0, 64), slice(0, filled + 64)), look] if new else [look]
    places = slice(offsets[current] - 64 * len(new), offsets[current] + 64)
    return Span((64,) * (len(new) + 1), places, looks, look, self.model.entity[: places.stop - places.start]).call(
        self.model,
        torch.cat([*new, x], dim=1).repeat(2, 1, 1),
        self.modulations.of_span(len(new), self.rows[current][step], rows),
        cache=self.cache.rows(rows, filled),
        last_only=True,
    )


@pytest.mark.parametrize("mistake", [written_while_denoising, keeps_the_current])
def test_cache(monkeypatch, mistake):
    monkeypatch.setattr(EntityPlan, "guided", lambda self, t: True)  # both branches always, so that both fill alike
    monkeypatch.setattr(
        xar_fast,
        "KVCache",
        lambda layers, batch, heads, capacity, *rest: KVCache(layers, batch, heads, 3 * capacity, *rest),
    )
    assert sample_error() <= 1
    monkeypatch.setattr(SamplingNetwork, "_call", mistake)
    assert sample_error() > 1


@pytest.mark.parametrize("plainly", [False, True])
def test_context_at_the_current_time(monkeypatch, plainly):
    of_span, velocity = ModulationTable.of_span, XAR.velocity

    def current(self, clean, time, rows):
        return [part[:, -1:].expand(-1, clean + 1, -1) for part in of_span(self, clean, time, rows)]

    monkeypatch.setattr(ModulationTable, "of_span", current)
    monkeypatch.setattr(XAR, "velocity", lambda self, x, t, labels: velocity(self, x, t[:, -1:].expand_as(t), labels))
    assert sample_error(plainly=plainly) > 1


# ---------------------------------------------------------------- classes and guidance


@pytest.mark.parametrize("row", [0, 999])
def test_row_of_no_class(monkeypatch, row):
    def drop(self, labels, generator):
        return torch.where(original(self, labels, generator) == self.config.num_classes, row, labels)

    original = XAR._drop_some
    monkeypatch.setattr(XAR, "_drop_some", drop)
    assert train_error() > 1
    condition = XAR.condition
    monkeypatch.setattr(
        XAR, "condition", lambda self, t, labels: condition(self, t, torch.where(labels == 1000, row, labels))
    )
    assert sample_error() > 1


SCALES = {
    "constant": lambda scale, entity, count: scale,
    "not from 1": lambda scale, entity, count: 1 + (scale - 1) * (entity + 1) / count,
    "not to its end": lambda scale, entity, count: 1 + (scale - 1) * entity / count,
}


@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_guidance_of_each_entity(monkeypatch, scales):
    original = code.plan_entities

    def plan(sampling, count):
        plans, (scale,) = original(sampling, count), sampling.guidance
        return [replace(plan, guidance=scales(scale, entity, count)) for entity, plan in enumerate(plans)]

    model = fresh(FOUR)
    monkeypatch.setattr(code, "plan_entities", plan)
    assert error(FOUR, "latent", xar_runs.sampling(model, FOUR)) > 1


def test_guidance_around_the_conditional(monkeypatch):
    monkeypatch.setattr(flow, "classifier_free_guidance", lambda cond, null, scale: cond + scale * (cond - null))
    assert sample_error() > 1


# ---------------------------------------------------------------- solver and loss


def walk(velocity, noise, steps, draws, on_step, *, diffusion: float, noise_at_last: bool) -> torch.Tensor:
    """Euler-Maruyama with w = `diffusion` t, written from the score."""
    x = noise
    for step, (t, after) in enumerate(pairwise([*flow.stochastic_times(steps), 0.0])):
        v, w = velocity(x, step, t), diffusion * t
        score = -(x + (1 - t) * v) / t
        x = x + (v - w / 2 * score) * (after - t)
        if after > 0 or noise_at_last:
            x = x + math.sqrt(w * (t - after)) * draws[min(step, len(draws) - 1)]
    return x


@pytest.mark.parametrize(
    ("diffusion", "noise_at_last", "right"),
    [(2.0, False, True), (1.0, False, False), (2.0, True, False)],
    ids=["right", "w = t", "noise in the last step"],
)
def test_stochastic_steps(monkeypatch, diffusion, noise_at_last, right):
    monkeypatch.setattr(
        flow,
        "stochastic_euler",
        lambda velocity, noise, steps, draws, report: walk(
            velocity, noise, steps, draws, report, diffusion=diffusion, noise_at_last=noise_at_last
        ),
    )
    assert (sample_error() <= 1) == right


def even_from_one_to_zero(steps: int) -> list[float]:
    return [1 - step / steps for step in range(steps)]


def one_step_fewer(steps: int) -> list[float]:
    return [1 - 0.96 * step / steps for step in range(steps)]


@pytest.mark.parametrize("times", [even_from_one_to_zero, one_step_fewer])
def test_grid_of_times(monkeypatch, times):
    monkeypatch.setattr(flow, "stochastic_times", times)
    assert sample_error() > 1


def test_velocity_sign():
    def change(model: XAR) -> None:
        network = model.network
        model.network = lambda *args, **options: -network(*args, **options)

    assert sample_error(change) > 1


def test_target_sign(monkeypatch):
    monkeypatch.setattr(flow, "velocity_target", lambda x0, noise: x0 - noise)
    assert train_error(out="loss") > 1
