"""What each case of the prompts' controls asks of our code: functions from a case to named outputs."""

from __future__ import annotations

import math

import torch
from cases import Case
from torch import Tensor

from imgtok.generators.controls import frap, tome
from imgtok.generators.controls.tome import Group

Outputs = dict[str, Tensor]


class Toy:
    """The denoiser of the cases: two layers of attention to the text, with two heads."""

    def __init__(self, case: Case) -> None:
        scales = case.about.get("weight_scale", {})
        self.weights = {
            key: value * math.prod(scale for end, scale in scales.items() if key.endswith(end))
            for key, value in case.weights().items()
        }
        self.maps: list[Tensor] = []

    def __call__(self, z: Tensor, c: Tensor) -> Tensor:
        """Noise (1, C, h, w) of latents and a text (T, D); keeps the maps (2, pixels, T) of both layers."""
        x, self.maps = z.flatten(2).mT[0], []
        for layer in range(2):
            w = {name: self.weights[f"layers.{layer}.{name}.weight"] for name in "qkvo"}
            q, k, v = (y.unflatten(-1, (2, -1)).transpose(0, 1) for y in (x @ w["q"].T, c @ w["k"].T, c @ w["v"].T))
            self.maps.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1))
            x = x + (self.maps[-1] @ v).transpose(0, 1).flatten(1) @ w["o"].T
        return (x @ self.weights["out.weight"].T).T.view_as(z)


def merge(case: Case) -> Outputs:
    groups = [Group(nouns, modifiers) for nouns, modifiers in case.about["groups"]]
    build = case.about["build"]
    merged = tome.merge(
        case.input("prompt_embeds"), groups, noun=build["noun_weight"], modifier=build["modifier_weight"]
    )
    short = case.input("merged_prompt_embeds")
    return {"merged": merged, "substituted": tome.substitute_end(merged, short, case.about["words"])}


def entropy(case: Case) -> Outputs:
    """Of both cases."""
    nouns, words, build = case.about["nouns"], range(1, case.about["words"] + 1), case.about["build"]
    logits = [case.input(entry["name"]).requires_grad_() for entry in case.about["inputs"]]
    average = tome.average_maps([layer.softmax(dim=-1) for layer in logits])
    side = math.isqrt(len(average))
    found = tome.entropies(average, nouns, words, build["temperature"])
    loss, outputs = found.sum(), {"entropies": found}
    if build["position_term"]:
        outputs["centres"] = tome.centres(average, nouns, words, (side, side), build["temperature"])
        loss = loss + tome.position_loss(outputs["centres"])
    outputs["loss"] = loss
    of_average, of_logits = torch.autograd.grad(loss, [average, logits[0]])
    outputs["grad_average"] = of_average.view(side, side, -1)
    if not build["position_term"]:
        outputs |= {"average": average.view(side, side, -1), "grad_logits_0": of_logits}
    return outputs


def binding(case: Case) -> Outputs:
    toy, latents = Toy(case), case.input("latents")
    anchor, null = case.input("anchor_embeds")[0], case.input("null_embeds")[0]
    target, without = toy(latents, anchor), toy(latents, null)
    token, tokens, losses = case.input("token")[None], [], []
    step = case.about["build"]["step"]
    for _ in range(3):
        token, found = tome.bind(token, target, lambda one: toy(latents, one), step=step, updates=1)
        tokens.append(token[0])
        losses.append(step * found[0, 0])
    together, _ = tome.bind(case.input("token")[None], target, lambda one: toy(latents, one), step=step)
    assert torch.equal(together, token)
    scale, (first, second) = case.about["guidance_scale"], case.about["sigmas"]
    nexts = {
        name: latents + (second - first) * tome.anchor_noise(target, without, scale, published=published)
        for name, published in (("anchor_next", True), ("anchor_next_guided", False))
    }
    return {"scaled_losses": torch.stack(losses), "tokens": torch.stack(tokens), **nexts}


def refinement(case: Case) -> Outputs:
    nouns, words = case.about["nouns"], range(1, case.about["words"] + 1)
    outputs: Outputs = {}
    for number, run in enumerate(case.about["runs"]):
        toy, embeds = Toy(case), case.input("embeds")

        def loss_of(latents: Tensor, states: Tensor, toy: Toy = toy) -> Tensor:
            toy(latents, states[0])
            return tome.entropies(tome.average_maps(toy.maps), nouns, words).sum()[None]

        latents, states, losses = tome.refine(
            case.input("latents"),
            embeds[1:],
            loss_of,
            step=case.about["step_size"],
            enough=torch.tensor([tome.low_enough(run["threshold"], len(nouns))]),
            passes=case.about["limits"][0 if run["t"] / 1000 > 0.9 else 1],
        )
        outputs |= {
            f"latents_{number}": latents,
            f"embeds_{number}": torch.cat([embeds[:1], states]),
            f"losses_{number}": torch.cat(losses),
        }
    return outputs


def losses(case: Case) -> Outputs:
    logits = case.input("map_logits").requires_grad_()
    maps = frap.smoothed(logits.softmax(dim=-1), (8, 8))
    objects, pairs = case.about["objects"], case.about["pairs"]
    found = {
        "presence": frap.presence(maps, objects),
        "binding": 64 * frap.overlap(maps, pairs, prob="softmax", reduce="mean"),
        "binding_sum_norm": 64 * frap.overlap(maps, pairs, prob="sum", reduce="mean"),
    }
    gradients = {
        f"grad_{name}": torch.autograd.grad(value.mean(), logits, retain_graph=True)[0] for name, value in found.items()
    }
    return found | gradients


def update(case: Case) -> Outputs:
    build, words = case.about["build"], case.about["words"]
    states, null, latents = case.input("embeds")[0], case.input("null_embeds")[0], case.input("latents")
    columns = torch.arange(len(states))
    free = (columns >= 1) & (columns <= words)
    outputs: Outputs = {}
    for way in ("plain", "bounded"):
        toy, alpha = Toy(case), case.input("alpha").where(free, 0).requires_grad_()

        def weights_of(alpha: Tensor, way: str = way) -> Tensor:
            found = frap.bounded(alpha, build["low"], build["high"]) if way == "bounded" else frap.plain(alpha)
            return found.where(free, 1)

        toy(latents, frap.interpolated(states, null, weights_of(alpha)))
        loss = frap.objective(
            frap.smoothed(tome.average_maps(toy.maps), (8, 8)),
            case.about["objects"],
            case.about["pairs"],
            strength=build["lambda"],
            prob=build["prob"],
            reduce=build["pair_reduce"],
        )
        (gradient,) = torch.autograd.grad(loss, alpha)
        new = frap.updated(alpha.detach(), gradient, free, step=build["lr"], normalised=False)
        outputs |= {
            f"loss_{way}": loss,
            f"grad_{way}": gradient,
            f"alpha_{way}": new,
            f"embeds_{way}": frap.interpolated(states, null, weights_of(new))[None],
        }
    return outputs


RUNS = {
    "tome_merge": merge,
    "tome_entropy": entropy,
    "tome_entropy_position": entropy,
    "tome_binding": binding,
    "tome_refine": refinement,
    "frap_losses": losses,
    "frap_update": update,
}
