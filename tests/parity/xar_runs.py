"""What each xAR case asks of our code: functions from a case to named outputs (as `runs` for the other models)."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from cases import Case, draw
from torch import Tensor

from imgtok import flow, randomness
from imgtok.generators.entities import Entities, cells, scales, subsamples
from imgtok.generators.published.xar import NAMES, as_published
from imgtok.generators.xar import XAR, EntityPlan, FlowSampling
from imgtok.generators.xar_fast import BOTH, SamplingNetwork, Span
from imgtok.layers.positions import rotary_of, rotate
from imgtok.published.names import places
from imgtok.train.config import TrainingConfig
from imgtok.train.ema import EMA
from imgtok.train.optim import parameter_groups, rate_at

Outputs = dict[str, Tensor]


def by_entity(tokens: Tensor, entities: Entities) -> Tensor:
    """(B, L, C) -> (N, B, l, C), as the cases store cells."""
    return tokens.unflatten(1, (len(entities), -1)).transpose(0, 1)


# ---------------------------------------------------------------- order, mask, positions


def orders(case: Case) -> Outputs:
    grid = case.about["config"]["latent_grid"][0]
    (latent,) = (case.input(entry["name"]) for entry in case.about["inputs"])
    plans = {f"cell_k{side}": cells(grid, side, side) for side in (16, 8, 4, 2, 1)}
    plans |= {f"subsample_d{side}": subsamples(grid, side) for side in (2, 4, 8)}
    plans["cell_4x16"] = cells(grid, 4, 16)
    outputs = {name: plan.order.view(len(plan), -1) for name, plan in plans.items()}
    pyramid = scales(grid, (2, 4, 8, 16))
    assert torch.equal(pyramid.join(pyramid.cut(latent)), latent)
    for plan in plans.values():
        assert torch.equal(plan.join(plan.cut(latent)), latent)
    return outputs | {
        "scale_source": pyramid.order,
        "scale_tokens": pyramid.cut(latent)[:, :84],
        "cells_of_latent": plans["cell_k8"].cut(latent).unflatten(1, (4, 64)),
    }


def masks(case: Case) -> Outputs:
    grid = round(case.about["config"]["tokens"] ** 0.5)
    outputs = {
        f"allowed_{count}_entities": cells(grid, side, side).may_look() for count, side in ((4, 8), (16, 4), (64, 2))
    }
    for cell in range(4):  # the finished cell before it and the current one, as the sampler's looks show them
        entities = cells(grid, 8, 8)
        span = Span.of(entities, max(0, cell - 1), cell + 1, entities.which())
        seen = torch.zeros(span.length, entities.offsets[cell + 1], dtype=torch.bool)
        for look in span.looks:
            seen[look.queries, look.keys] = True
        outputs[f"first_call_rows_cell{cell}"] = seen
    return outputs


def rotary(case: Case) -> Outputs:
    config = case.about["config"]
    entities = cells(config["latent_grid"][0], *config["cell"])
    outputs = {}
    for size, stride in zip(config["head_sizes"], (1, 17, 51), strict=True):
        table = rotary_of(entities.places, size)
        cos, sin = (part.repeat_interleave(2, dim=1)[::stride] for part in table.unbind(-1))
        frequencies = table[entities.order == 16][0, : size // 4]  # the angles of row 1
        outputs |= {
            f"cos_d{size}": cos,
            f"sin_d{size}": sin,
            f"freqs_d{size}": torch.atan2(frequencies[:, 1], frequencies[:, 0]),
        }
    q, table = case.input("xar.rope.q"), rotary_of(entities.places, 16)
    return outputs | {
        "rotated_all": rotate(q, table),
        "rotated_cell2": rotate(q[:, :, :64], table[128:192]),
        "rotated_cells12": rotate(q[:, :, :128], table[64:192]),
    }


# ---------------------------------------------------------------- training


def training(model: XAR, case: Case) -> Outputs:
    """The model's own training step, with every draw replaced by the case's."""
    entities, cut = model.entities, model.entities.cut
    latents, labels = case.input("xar.train.latent"), case.input("xar.train.label")
    noise = torch.cat([case.input(f"xar.train.noise.{cell}") for cell in range(len(entities))], dim=1)
    t = case.input("xar.train.logit_time").double().sigmoid().float()  # (N, B)
    seen: dict[str, Tensor] = {}
    condition = model.condition

    def keep_condition(t: Tensor, labels: Tensor) -> Tensor:
        seen["t_index"], seen["labels_used"] = (t * 1000).long().T, labels[:, 0]
        result = condition(t, labels)
        seen["cond"] = result.transpose(0, 1).flatten(0, 1)
        return result

    hooks = [
        model.input_proj.register_forward_pre_hook(lambda module, inputs: seen.update(noisy=inputs[0].flatten(1, -2))),
        model.first_blocks[0].register_forward_hook(
            lambda module, inputs, x: seen.update(block0_image0=x[0].flatten(0, -2))
        ),
        model.first_norm.register_forward_hook(lambda module, inputs, x: seen.update(mid_image0=x[0].flatten(0, -2))),
        model.readout.register_forward_hook(lambda module, inputs, x: seen.update(velocity=x.flatten(1, -2))),
    ]
    with (
        patch.object(model, "condition", keep_condition),
        patch.object(model, "_draw_times", return_value=t.flatten()),
        patch.object(torch, "rand", return_value=case.input("xar.train.class_drop")),
        patch.object(torch, "randn", return_value=noise),
    ):
        losses = model(latents, labels, generator=torch.Generator())
    for hook in hooks:
        hook.remove()
    losses.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    known = places(gradients, NAMES, {})
    target = flow.velocity_target(cut(latents), noise)
    errors = by_entity((seen["velocity"] - target).square(), entities)
    whole = as_gradients(known, gradients)
    return {
        **seen,
        "target": target,
        "loss": losses.total[None],
        "loss_per_cell": errors.mean(dim=(1, 2, 3)),
        "grad_norms": torch.stack([whole[name].double().norm() for name in case.about["shapes"]]),
        "grad_pred_weight": whole["pred.weight"],
        "grad_z_proj_weight": whole["z_proj.weight"],
    }


def as_gradients(known: Any, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published name -> gradient."""
    return {name: as_published(name, place.view(gradients)) for name, place in known.items()}


def optimisation(case: Case) -> Outputs:
    """The published schedule and average, in the terms of our training configuration."""
    about = case.about["config"]
    per_epoch = 10_000
    config = TrainingConfig(
        steps=about["end_epoch"] * per_epoch + 1,
        batch_size=1,
        learning_rate=about["peak_lr"],
        warmup=about["warmup_epochs"] * per_epoch,
        schedule="cosine",
        decay_from=about["hold_until_epoch"] / about["end_epoch"],
        final_rate=about["min_lr"] / about["peak_lr"],
    )
    rates = [rate_at(round(float(epoch) * per_epoch), config) for epoch in case.recorded["epochs"]]
    holder = torch.nn.Linear(1, 1)
    holder.weight = torch.nn.Parameter(case.input("xar.ema.a"))
    average = EMA(holder, about["ema"], warmup=False)
    holder.weight.data = case.input("xar.ema.b")
    average = replaced_live(average, holder)
    for step in range(3):
        average.update(step)
    return {"lr": torch.tensor(rates, dtype=torch.float64) / about["peak_lr"], "ema": average.average["weight"]}


def replaced_live(average: EMA, holder: torch.nn.Linear) -> EMA:
    """The same average, following the weights that `holder` has now."""
    average.live["weight"] = holder.weight
    return average


# ---------------------------------------------------------------- sampling


def sampling(model: XAR, case: Case, *, plainly: bool = False) -> Outputs:
    about = case.about["sampler"]
    labels_entry, start_entry, *noise_entries = case.about["inputs"]  # names with the cell and the step left open
    labels = case.input(labels_entry["name"])
    first: list[Tensor] = []
    call, plain_velocity = SamplingNetwork._call, XAR.velocity

    def record(network: SamplingNetwork, x: Tensor, step: int, branches: range) -> Tensor:
        v = call(network, x, step, branches)
        if step == 0:
            first.append(v)
        return v

    def record_plainly(model: XAR, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        v, entity = plain_velocity(model, x, t, condition), t.shape[1] - 1
        if t[0, -1] == 1:
            current = v[:, model.entities.offsets[entity] :]
            first[entity:] = [torch.cat([*first[entity:], current])]  # the unconditional branch comes second
        return v

    def stored(seed: int, indices: object, shape: tuple[int, ...], purpose: str) -> Tensor:
        cell = purpose.split()[-1]
        names = [start_entry["name"].replace("<s>", cell)]
        for entry in noise_entries:
            names += [entry["name"].replace("<s>", cell).replace("<i>", str(i)) for i in range(shape[0] - 1)]
        draws = [draw({**start_entry, "name": name}, start_entry["seed"]) for name in names]
        return torch.stack(draws + [torch.zeros_like(draws[0])] * (shape[0] - len(draws)), dim=1)

    how = FlowSampling(
        steps=(about["evaluations_per_cell"],),
        guidance=(about["guidance"],),
        solver="euler" if "ODE" in about["kind"] else "stochastic",
    )
    with (
        patch.object(randomness, "normal", stored),
        patch.object(SamplingNetwork, "_call", record),
        patch.object(XAR, "velocity", record_plainly),
    ):
        generate = model.generate_plainly if plainly else model.generate
        latent = generate(labels, seed=0, indices=range(len(labels)), sampling=how)
    outputs = {"labels": labels, "latent": latent, "cells": by_entity(model.entities.cut(latent), model.entities)}
    if "first_velocity" in case.recorded:
        outputs["first_velocity"] = torch.stack([padded(v, cell, case) for cell, v in enumerate(first)])
    return outputs


def padded(v: Tensor, cell: int, case: Case) -> Tensor:
    """Where we compute no null rows, the recorded ones, which nothing depends on."""
    recorded = case.recorded["first_velocity"][cell]
    return torch.cat([v, recorded[len(v) :]])


def one_step(model: XAR, case: Case) -> Outputs:
    """First and following calls of each cell by the sampling network, then one step of each solver on cell 2."""
    inputs = {entry["name"].removeprefix("xar.step."): case.input(entry["name"]) for entry in case.about["inputs"]}
    times = [0.52, 0.3, 0.7, 0.111]
    plan = EntityPlan("stochastic", 4, 1.8, (0.0, 1.0))
    with patch.object(EntityPlan, "times", [1.0, *times]):
        network = SamplingNetwork(model, model.reading(inputs["label"]), [plan] * 4)
    first, following = [], []
    with torch.no_grad():
        for cell in range(4):
            first.append(network._call(inputs[f"x.{cell}"], 0, BOTH))
            following.append(network._call(inputs[f"x.{cell}"], cell + 1, BOTH))
            if cell < 3:
                network.finished.append(inputs[f"clean.{cell}"])
    keys, values = network.cache.keys, network.cache.values
    x, eps, v = inputs["x.2"].double(), inputs["eps"].double(), following[2].double()
    t, after = 0.7, 0.6
    twice = x.repeat(2, 1, 1)
    guided = flow.classifier_free_guidance(*v.chunk(2), plan.guidance)
    mean = step_of(flow.stochastic_euler, x, guided, (t, after), torch.zeros_like(eps))
    return {
        "cache_key_first_block": keys[0][0, :, :192],
        "cache_value_first_block": values[0][0, :, :192],
        "cache_key_last_block": keys[-1][0, :, :192],
        "velocity_first": torch.stack(first),
        "velocity_cached": torch.stack(following),
        "score": -(twice + (1 - t) * v) / t,  # by the formula: nothing of ours computes it, only the velocity counts
        "drift_guided": (mean - x) / (after - t),
        "sde_next": step_of(flow.stochastic_euler, x, guided, (t, after), eps),
        "sde_mean_next": mean,
        "ode_next": first_euler_step(x, guided, steps=round(1 / (t - after))),
    }


def step_of(solver: Any, x: Tensor, v: Tensor, times: tuple[float, float], eps: Tensor) -> Tensor:
    """One noisy step of the stochastic solver from times[0] to times[1]."""
    states: list[Tensor] = []
    with patch.object(flow, "stochastic_times", return_value=list(times)):
        solver(lambda x, step, t: v, x, 2, [eps], lambda step, x, guess: states.append(x))
    return states[0]


def first_euler_step(x: Tensor, v: Tensor, steps: int) -> Tensor:
    """One of `steps` equal steps along a constant velocity."""
    states: list[Tensor] = []
    flow.euler(lambda x, step, t: v, x, steps, lambda step, x, guess: states.append(x))
    return states[0]


def check_decay(case: Case, model: XAR) -> None:
    """Which published parameters decay, and which do not."""
    known = places(model.state_dict(), NAMES, {})
    decaying, others = (
        {id(p) for group in groups for p in group["params"]}
        for groups in (
            [g for g in parameter_groups(model.parameters(), 0.02) if g["weight_decay"]],
            [g for g in parameter_groups(model.parameters(), 0.02) if not g["weight_decay"]],
        )
    )
    parameters = dict(model.named_parameters())
    ours = {name: id(parameters[place.name]) for name, place in known.items()}
    assert {name for name, p in ours.items() if p in decaying} == set(case.about["decay_keys"])
    assert {name for name, p in ours.items() if p in others} == set(case.about["no_decay_keys"])
