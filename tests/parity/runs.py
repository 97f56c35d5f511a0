"""What each case asks of our code: functions from a case (and a run of it) to named outputs.

The tests compare these with the recording; the checks of pitfalls run them on wrong code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from cases import Case
from models import gpt_places
from torch import Tensor

import imgtok.generators.decoding
import imgtok.generators.sampling
from imgtok import flow, randomness
from imgtok.generators.conditioning import Condition
from imgtok.generators.gpt import GPT
from imgtok.generators.sampling import TokenSampling, law
from imgtok.layers.attention import Look
from imgtok.layers.positions import sincos_2d, time_features
from imgtok.published.flextok import as_published, flextok_places
from imgtok.quantizers.fsq import FSQ
from imgtok.text.captions import Captions
from imgtok.tokenizers import flextok_fast
from imgtok.tokenizers.flextok import FlexTok, crop_positions
from imgtok.tokenizers.flextok_fast import prefix_causal_mask
from imgtok.tokenizers.tokens import Tokens

Outputs = dict[str, Tensor]

# ---------------------------------------------------------------- FlexTok: parts


def channels_first(table: Tensor) -> Tensor:
    """(h, w, D) -> (1, D, h, w), as the cases store position tables."""
    return table.permute(2, 0, 1)[None]


def table(case: Case, run: Mapping[str, Any]) -> Outputs:
    out = run["out"]
    if run["what"] == "sincos":
        return {out: channels_first(sincos_2d(run["width"], run["h"], run["w"]))}
    if run["what"] == "sincos_crop":
        rows, columns = run["size"]
        corner = crop_positions(sincos_2d(run["width"], *run["max"]), torch.empty(1, 1, rows, columns), 1)
        return {out: channels_first(corner.unflatten(0, (rows, columns)))}
    if run["what"] == "time":
        return {out: time_features(torch.tensor(run["t"]), run["freq_dim"], scale=1000 / run["max_timestep"])}
    u, clean, noise = (case.input(run[name]) for name in ("u", "clean", "noise"))
    if run["mode_scale"] == 0:
        u = 1 - u  # at 0 the published code returns u, its formula and ours 1 - u: both are uniform
    with patch.object(torch, "rand", return_value=u):
        sigma = flow.mode_times(len(u), run["mode_scale"], torch.Generator())
    return {f"{out}.sigma": sigma, f"{out}.noised": flow.interpolate(clean, noise, sigma)}


def quantizer(case: Case, run: Mapping[str, Any]) -> Outputs:
    fsq = FSQ(tuple(run["levels"]))
    z = case.input(run["z"]).requires_grad_()
    codes = fsq(z)
    (gradient,) = torch.autograd.grad((codes * case.input(run["grad"])).sum(), z)
    return {
        f"{run['out']}.{name}": value
        for name, value in {
            "bounded": fsq.bound(z),
            "codes": codes,
            "indices": fsq.codes_to_ids(codes),
            "codes_of_ids": fsq.ids_to_codes(case.input(run["ids"])),
            "codebook_size": torch.tensor(fsq.vocab_size),
            "grad_z": gradient,
        }.items()
    }


def guidance(case: Case, run: Mapping[str, Any]) -> Outputs:
    if run["kind"] == "apg":
        combine: Callable[..., Tensor] = flow.AdaptiveProjectedGuidance(
            momentum=run["momentum"],
            cap=run["norm_threshold"] or math.inf,  # the cases write "no cap" as 0
            parallel=run["eta"],
        )
    else:
        combine = flow.classifier_free_guidance
    outputs = {}
    for step in range(run["steps"]):
        v_cond, v_null = case.input(run["cond"], step), case.input(run["uncond"], step)
        outputs[f"{run['out']}.step{step}"] = combine(v_cond, v_null, run["scale"])
    return outputs


# ---------------------------------------------------------------- FlexTok: the model


def numbers(model: FlexTok, latents: Tensor) -> Tensor:
    """What the encoder hands to the quantizer, all registers."""
    return flextok_fast.encode(model.encoder, latents, model.num_tokens)


@torch.no_grad()
def encode_square(model: FlexTok, case: Case) -> Outputs:
    latents = case.input("latents")
    reached: list[Tensor] = []
    last = model.encoder.blocks[-1]
    hook = last.register_forward_pre_hook(lambda module, inputs: reached.append(inputs[0]))
    z = numbers(model, latents)
    hook.remove()
    rows, columns = (side // model.config.patch_size for side in latents.shape[-2:])
    one = prefix_causal_mask(rows * columns, model.num_tokens, latents.device)
    everything = [Look(slice(None), slice(None), one)]
    trunk = last(reached[0], everything)  # `encoder` itself computes only the registers of its last block
    return {
        **codes_of(model, z, "square"),
        "square.patch_features": trunk[:, : rows * columns].unflatten(1, (rows, columns)),
        # The reference packs the batch into one sequence: ours, once for each image, along the diagonal.
        "square.mask": torch.block_diag(*[one] * len(latents)),
        "enc_grid": channels_first(model.encoder.positions),
    }


@torch.no_grad()
def encode_mixed(model: FlexTok, case: Case) -> Outputs:
    """The reference packs the sizes into one sequence; ours takes one call for each, with equal results."""
    z = torch.cat([numbers(model, case.input(name)) for name in ("latents", "tall", "wide")])
    return codes_of(model, z, "mixed")


def codes_of(model: FlexTok, z: Tensor, out: str) -> Outputs:
    codes = model.quantizer(z)
    return {
        f"{out}.latents_to_codes_input": z,
        f"{out}.codes": codes,
        f"{out}.indices": model.quantizer.codes_to_ids(codes),
    }


@torch.no_grad()
def velocity(model: FlexTok, case: Case, run: Mapping[str, Any]) -> Outputs:
    t = torch.tensor(run["t"])
    codes = model.quantizer.ids_to_codes(case.input(run["ids"]))
    null = torch.tensor(run["null"]) if "null" in run else None
    registers = model.decoder.condition(codes, torch.tensor(run["keep"]), null)
    outputs = {f"{run['out']}.velocity": model.decoder(case.input(run["noised"]), t, registers)}
    if run.get("time"):
        features = time_features(t, scale=model.decoder.time_scale)
        outputs[f"{run['out']}.time_features"] = features
        outputs[f"{run['out']}.time_embedding"] = model.decoder.time_mlp(features)
    return outputs


def decode(model: FlexTok, ids: Tensor, noise: Tensor, run: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Latents and images through the public `decode` (`decode_latents` where the scale changes), from that noise."""
    states: list[Tensor] = []
    tokens, scale = Tokens(ids, torch.tensor(run["keep"])), run["guidance"]["scale"]
    how = replace(model.config.decoding, steps=run["steps"])

    def on_step(step: int, latents: Tensor, guess: Tensor) -> None:
        states.append(latents)

    def along(t: float) -> float:
        return float(scale[0] + (scale[1] - scale[0]) * t)

    with patch.object(randomness, "normal", return_value=noise):
        if isinstance(scale, list):
            images = model.to_images(model.decode_latents(tokens, decoding=how, guidance=along, on_step=on_step))
        else:
            images = model.decode(tokens, decoding=replace(how, guidance=scale), on_step=on_step)
    return states[-1], images


def decode_latents(model: FlexTok, case: Case, run: Mapping[str, Any]) -> Outputs:
    ids, noise = case.input(run["ids"]), case.input(run["noise"])
    return {f"{run['out']}.latents": decode(model, ids, noise, run)[0]}


def train_step(model: FlexTok, case: Case) -> Outputs:
    """The model's own training step, with every draw replaced by the case's."""
    (run,) = case.runs
    latents = case.input(run["latents"])
    with (
        patch.object(model, "to_latents", lambda images, noise: images),
        patch.object(model, "draw_keep_counts", return_value=torch.tensor(run["keep"])),
        patch.object(model, "draw_times", return_value=torch.tensor(run["sigma"])),
        patch.object(torch, "rand", return_value=1 - torch.tensor(run["null"]).float()),  # 0 < null_dropout <= 1
        patch.object(torch, "randn", return_value=case.input(run["noise"])),
    ):
        losses = model(latents, generator=torch.Generator())
    losses.total.backward()
    gradients = {name: _gradient(parameter) for name, parameter in model.named_parameters()}
    known = flextok_places(gradients)
    outputs = {
        "step.loss": losses.total,
        "step.indices": model.quantizer.codes_to_ids(model.quantizer(numbers(model, latents))),
        "step.grad_norms": torch.stack([known[published].view(gradients).norm() for published in case.about["shapes"]]),
    }
    for published in run["grads"]:
        outputs[f"step.grad.{published}"] = as_published(published, known[published].view(gradients))
    return outputs


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def image(model: FlexTok, case: Case) -> Outputs:
    """Image -> latents -> tokens -> image, through `encode_latents` and `decode`."""
    (run,) = case.runs
    images = case.input(run["image"])
    ids = model.encode_latents(model.to_latents(images)).ids  # recorded pixels go beyond [-1, 1]: encode refuses them
    latents, decoded = decode(model, ids, case.input(run["noise"]), run)
    with torch.no_grad():
        unclamped = model.vae.decode(latents)
    assert torch.equal(decoded, unclamped.clamp(-1, 1))
    return {
        "apg.vae_latents": model.to_latents(images),
        "apg.indices": ids,
        "apg.latents": latents,
        "apg.image": unclamped,
    }


# ---------------------------------------------------------------- GPT


def gpt_condition(model: GPT, case: Case) -> Condition:
    """The case's labels; or its captions, whose padded columns hold numbers that must not matter."""
    if not model.config.reads_text:
        return case.input("labels")
    return Captions(case.input("text_features"), case.input("text_mask").bool())


def gpt_training(model: GPT, case: Case) -> Outputs:
    tokens, condition = case.input("tokens"), gpt_condition(model, case)
    content = Tokens.full(tokens)
    if model.config.reads_text:  # rows flagged as not valid have no tokens to learn from
        content = Tokens(tokens, case.input("valid") * tokens.shape[1])
    losses = model(content, condition, generator=torch.Generator())
    losses.total.backward()
    gradients = {name: _gradient(parameter) for name, parameter in model.named_parameters()}
    known = gpt_places(gradients)
    norms = [known[key].view(gradients).norm() for key in case.about["grad_keys"]]
    with torch.no_grad():
        logits = model.logits(condition, tokens)
        null_logits = model.logits(model.unconditional(condition), tokens)
    outputs = {"train_logits": logits, "train_loss": losses.total, "grad_norms": torch.stack(norms)}
    if model.config.reads_text:
        return outputs
    return outputs | {
        "null_logits": null_logits,
        "null_loss": F.cross_entropy(null_logits.flatten(0, 1), tokens.flatten()),
    }


def gpt_generation(model: GPT, case: Case, name: str, *, cached: bool = True) -> Outputs:
    """Arg-max in place of the draw; the logits it sees are recorded."""
    steps: list[Tensor] = []

    def argmax(
        logits: Tensor, sampling: TokenSampling, unconditional: Tensor | None = None, closed: Tensor | None = None
    ) -> Tensor:
        if unconditional is not None:
            logits = imgtok.generators.sampling.guide(logits, unconditional, sampling.guidance)
        steps.append(logits)
        return law(logits, TokenSampling(temperature=0.0))

    about = case.about["generation"][name]
    last = about.get("cfg_interval", -1)  # the last step after the prefill that is guided; step i draws token i + 1
    sampling = TokenSampling(guidance=about["cfg_scale"], interval=None if last < 0 else (0, last + 2))
    condition = gpt_condition(model, case)
    with patch.object(imgtok.generators.decoding, "law", argmax):
        tokens = model.generate(condition, seed=0, indices=range(len(condition)), sampling=sampling, cached=cached)
    return {f"ids_{name}": tokens.ids, f"steps_{name}": torch.stack(steps, dim=1)}
