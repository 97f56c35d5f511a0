"""What each TokenBridge case asks of our code: functions from a case to named outputs (as `runs` for other models)."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from cases import Case
from models import tokenbridge
from torch import Tensor

from imgtok import randomness
from imgtok.generators import tokenbridge as module
from imgtok.generators.dimension_head import Choice, Choose, DimensionHead
from imgtok.generators.published.tokenbridge import published_places
from imgtok.generators.tokenbridge import RevealSampling, TokenBridge, hidden_share, plan_reveals
from imgtok.quantizers.normal import NormalConfig, NormalQuantizer, normal_boundaries
from imgtok.tokenizers.base import Losses, latents_of_moments
from imgtok.train.config import TrainingConfig
from imgtok.train.ema import EMA
from imgtok.train.optim import parameter_groups, rate_at

Outputs = dict[str, Tensor]


def quantizer(case: Case, *, plainly: bool = False) -> Outputs:
    x, edges = case.input("x"), torch.tensor(case.about["config"]["edges"])
    outputs: Outputs = {}
    for about in case.about["config"]["settings"]:
        config = NormalConfig(levels=about["levels"], range=tuple(about["range"]), cut=about["std_range"])
        made = NormalQuantizer(config)
        encode = made.encode_plainly if plainly else made.encode
        assert torch.equal(encode(made.values[0]), torch.arange(about["levels"]))
        found = {
            "boundaries": normal_boundaries(about["levels"], about["std_range"]).float(),
            "centroids": made.levels,
            "indices": encode(x),
            "dequant": made.decode(encode(x)),
            "edge_indices": encode(edges),
            "edge_dequant": made.decode(encode(edges)),
            "latent_values": made.values[0],
        }
        outputs |= {f"{about['name']}.{name}": value for name, value in found.items()}
    return outputs


def masks(case: Case) -> Outputs:
    outputs: Outputs = {}
    for about in case.about["schedules"]:
        how = RevealSampling(iterations=about["iterations"], guidance=about["guidance"])
        plan = plan_reveals(how, about["tokens"], about["tokens"])
        outputs |= {
            f"{about['name']}.mask_len": torch.tensor([reveal.left for reveal in plan]),
            f"{about['name']}.predicted": torch.tensor([reveal.count for reveal in plan]),
            f"{about['name']}.guidance": torch.tensor([reveal.guidance for reveal in plan]),
        }
    for least in case.about["config"]["mask_ratio_mins"]:
        rates = [hidden_share(float(uniform), least) for uniform in case.input("u")]
        outputs[f"rate_{least}"] = torch.tensor(rates, dtype=torch.float64)
        for count in case.about["config"]["token_counts"]:
            model: Any = type("Positions", (), {"length": count})
            hidden = [TokenBridge.hide(model, torch.zeros(1, count), rate)[0].shape[1] for rate in rates]
            outputs[f"masked_{least}_{count}"] = torch.tensor(hidden)
        grid = [hidden_share((number + 0.5) / 4_000, least) for number in range(4_000)]
        many = torch.tensor(grid, dtype=torch.float64)
        outputs[f"moments_{least}"] = torch.stack([many.mean(), many.std()])
    return outputs


# ---------------------------------------------------------------- the head


def head(model: TokenBridge, case: Case, *, plainly: bool = False) -> Outputs:
    z, targets, u = case.input("z"), case.input("targets"), case.input("u")
    draw = model.head.draw_plainly if plainly else model.head.draw

    @torch.no_grad()
    def drawn(temperature: float) -> tuple[Tensor, Tensor]:
        choice, seen = Choice(temperature, u.double()), []

        def choose(step: int, logits: Tensor) -> Tensor:
            seen.append(logits)
            return choice(step, logits)

        return draw(z, choose), torch.stack(seen, dim=1)

    greedy, greedy_logits = drawn(0.0)
    tokens, logits = drawn(case.about["config"]["temperature"])
    return {
        "teacher_logits": model.head(z, targets),
        "greedy_tokens": greedy,
        "greedy_logits": greedy_logits,
        "teacher_logits_on_greedy": model.head(z, greedy),
        "drawn_tokens": tokens,
        "drawn_logits": logits,
    }


# ---------------------------------------------------------------- training


def pass_of(
    model: TokenBridge, latents: Tensor, labels: Tensor, order: Tensor, drop: Tensor, rate: float
) -> tuple[Losses, Tensor, Tensor]:
    """The model's own training step with every draw replaced: losses, and the places (hidden, visible)."""
    places: list[Tensor] = []
    hide = model.hide

    def keep(order: Tensor, share: float) -> tuple[Tensor, Tensor]:
        places.extend(hide(order, share))
        return places[0], places[1]

    with (
        patch.object(torch, "rand", side_effect=[drop, order.argsort(dim=1).float(), torch.zeros(())]),
        patch.object(module, "hidden_share", return_value=rate),
        patch.object(model, "hide", keep),
    ):
        losses = model(latents, labels, generator=torch.Generator())
    return losses, places[0], places[1]


def forward(case: Case) -> Outputs:
    latents, labels, order, drop = (case.input(name) for name in ("latents", "labels", "orders", "drop"))
    outputs: Outputs = {}
    for run in case.runs:
        model = tokenbridge(case, drop=0.1 if run["train_mode"] else 0.0)
        seen: dict[str, Tensor] = {}
        hooks = [
            model.encoder_norm.register_forward_hook(lambda m, i, x, seen=seen: seen.update(encoder_out=x)),
            model.head.register_forward_hook(lambda m, i, x, seen=seen: seen.update(logits=x)),
            model.decoder_norm.register_forward_hook(lambda m, i, x, seen=seen: seen.update(z=x)),
        ]
        losses, hidden, _ = pass_of(model, latents, labels, order, drop, run["mask_rate"])
        logits, encoded = seen["logits"], seen["encoder_out"]
        for hook in hooks:
            hook.remove()
        values, ids = model.quantizer(model.positions_of(latents), channel_dim=-1)
        none = (drop < 0.1) & run["train_mode"]
        reading = model.read(labels.masked_fill(none, -1))
        visible = torch.stack([torch.tensor([p for p in range(16) if p not in row]) for row in hidden.tolist()]).long()
        every = torch.arange(16).expand(len(labels), -1)
        z = model.features(module.at(values, visible), visible, reading, every)
        targets = ids[..., model.order]
        errors = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), module.at(targets, hidden).flatten(), reduction="none"
        )
        outputs |= {
            f"{run['name']}.mask": torch.zeros(len(labels), 16, dtype=torch.long).scatter(1, hidden, 1),
            f"{run['name']}.encoder_out": encoded,
            f"{run['name']}.z": z,
            f"{run['name']}.logits": logits,
            f"{run['name']}.loss": losses.total[None],
            f"{run['name']}.loss_per_dimension": errors.view(-1, 16).mean(dim=0),
            "indices": ids,
            "dequant": values,
            "targets": targets,
        }
    return outputs


def training(case: Case) -> Outputs:
    """Two optimiser steps: gradients, clipping, AdamW in our groups, the average, and the schedules."""
    about, model = case.about["training"], tokenbridge(case)
    inputs = {name: case.input(name) for name in case.about["inputs"]}
    average = EMA(model, about["ema"], warmup=False)
    optimizer = torch.optim.AdamW(
        [
            {k: v for k, v in g.items() if k != "rate_scale"}
            for g in parameter_groups(model.parameters(), about["weight_decay"])
        ],
        lr=0.0,
        betas=tuple(about["betas"]),
        eps=about["adam_eps"],
    )
    known = published_places(dict(model.named_parameters()), 16)
    rates = [rate(about, about["epochs"], epoch) for epoch in about["epoch_positions"]]
    outputs: Outputs = {"lrs": torch.tensor(rates, dtype=torch.float64)}
    losses, norms = [], []
    for step in range(about["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        latents = latents_of_moments(inputs["moments"][step], inputs["noise"][step], about["latent_scale"])
        loss, _, _ = pass_of(
            model,
            latents,
            inputs["labels"][step],
            inputs["orders"][step],
            inputs["drop"][step],
            about["mask_rates"][step],
        )
        optimizer.zero_grad()
        loss.total.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            batched = {name: place.view(gradients) for name, place in known.items()}
            outputs |= {f"grad.{name}": shaped(case, name, batched[name]) for name in about["grads_kept"]}
            outputs["grad_norms"] = torch.stack([batched[name].norm() for name in case.about["shapes"]])
        losses.append(loss.total.detach())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), about["grad_clip"]))
        optimizer.step()
        average.update(step)
    for kept, tensors in (("param", dict(model.named_parameters())), ("ema", average.average)):
        outputs |= {f"{kept}.{name}": shaped(case, name, known[name].view(tensors)) for name in about["params_kept"]}
    outputs |= {"losses": torch.stack(losses), "total_norms": torch.stack(norms)}
    for schedule in case.about["schedules"]:
        values = [rate(schedule, schedule["epochs"], epoch) for epoch in schedule["at"]]
        outputs[f"schedule.{schedule['name']}"] = torch.tensor(values, dtype=torch.float64)
    return outputs


def rate(about: dict[str, Any], epochs: int, epoch: float) -> float:
    """The published schedule in the terms of our training configuration, a hundred thousand steps an epoch."""
    an_epoch = 100_000
    config = TrainingConfig(
        steps=epochs * an_epoch + 1,
        batch_size=1,
        learning_rate=about["lr"],
        warmup=about["warmup_epochs"] * an_epoch,
        schedule=about.get("kind", about.get("lr_schedule")),
        final_rate=about["min_lr"] / about["lr"],
    )
    return rate_at(round(epoch * an_epoch), config)


def shaped(case: Case, name: str, value: Tensor) -> Tensor:
    return value.reshape(case.about["shapes"][name])


# ---------------------------------------------------------------- sampling


@torch.no_grad()
def sampling(model: TokenBridge, case: Case, name: str, *, plainly: bool = False) -> Outputs:
    run = case.named(name)
    orders = case.input(run["orders"])
    labels = torch.full((len(orders),), -1) if run["labels"] is None else case.input(run["labels"])
    how = RevealSampling(
        iterations=run["iterations"],
        guidance=run["guidance"],
        schedule=run["schedule"],
        temperature=float(run["temperature"]),
    )
    uniforms = torch.zeros(*orders.shape, 16) if run["uniforms"] is None else case.input(run["uniforms"])

    def stored(seed: int, indices: object, shape: tuple[int, ...], purpose: str) -> Tensor:
        return orders.argsort(dim=1).double() / 16 if purpose == "order" else uniforms.double()

    guided: list[Tensor] = []
    logits: list[Tensor] = []
    which = "draw_plainly" if plainly else "draw"
    original = getattr(DimensionHead, which)

    def record(head: DimensionHead, features: Tensor, choose: Choose) -> Tensor:
        seen: list[Tensor] = []

        def watched(step: int, found: Tensor) -> Tensor:
            seen.append(found)
            return choose(step, found)

        ids: Tensor = original(head, features, watched)
        guided.append(features)
        logits.append(torch.stack(seen, dim=1))
        return ids

    with patch.object(randomness, "uniform", stored), patch.object(DimensionHead, which, record):
        generate = model.generate_plainly if plainly else model.generate
        latents = generate(labels, seed=0, indices=range(len(labels)), sampling=how)
    plan = plan_reveals(how, 16, 16)
    outputs = {
        "tokens": model.quantizer.encode(model.positions_of(latents)),
        "latents": latents,
        "mask_len": torch.tensor([reveal.left for reveal in plan]),
        "predicted": torch.tensor([reveal.count for reveal in plan]) * len(labels),
    }
    if run.get("keep_logits"):
        rows, end, ranks = [], 16, []
        for reveal in plan:
            places = orders[:, end - reveal.count : end]
            ranks.append(places.argsort(dim=1) + reveal.count * torch.arange(len(labels))[:, None])
            images = torch.arange(len(labels))[:, None].expand_as(places)
            rows.append(torch.stack([images, places.sort(dim=1).values], dim=-1).flatten(0, 1))
            end -= reveal.count
        outputs["rows"] = torch.cat(rows)
        outputs["guided"] = torch.cat([part[rank.flatten()] for part, rank in zip(guided, ranks, strict=True)])
        outputs["logits"] = torch.cat([part[rank.flatten()] for part, rank in zip(logits, ranks, strict=True)])
    return {f"{name}.{key}": value for key, value in outputs.items()}
