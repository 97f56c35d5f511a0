"""Our KARLs, built as a case describes, and what each case asks of them: functions from a case to named outputs."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from cases import Case
from torch import Tensor

from imgtok.layers.convolution import channels_first, channels_last
from imgtok.losses.lpips import LPIPS
from imgtok.losses.reconstruction import ReconstructionLossConfig
from imgtok.published import karl as published
from imgtok.quantizers.vq import VectorQuantizer
from imgtok.tokenizers.base import latents_of_moments
from imgtok.tokenizers.karl import KARL, Draws, KARLConfig, KARLTraining, Run, TransformerConfig
from imgtok.tokenizers.karl_training import Curriculum, TrainableKARL
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.train.config import TrainingConfig
from imgtok.train.optim import rate_at

Outputs = dict[str, Tensor]
PARTS = {  # of a run: ours -> recorded
    "keep": "active_bce",
    "drop": "halt_bce",
    "token": "token_nll",
    "code": "code_mse",
    "latent": "code_mse",
    "quantizer": "quantizer",
    "lpips": "p_loss",
    "adversarial": "g_loss",
    "adaptive_weight": "d_weight",
    "discriminator": "disc_loss",
}


def unit(images: Tensor) -> Tensor:
    """Images of ours in the range of the cases."""
    return (images + 1) / 2


def ours(images: Tensor) -> Tensor:
    """Images of the cases in our range; exact, as they are multiples of 2^-24."""
    return images * 2 - 1


# ---------------------------------------------------------------- models


def base_config(about: dict[str, Any]) -> VAEConfig | MaskGITVQGANConfig:
    shape: dict[str, Any] = {
        "latent_channels": about["latent_channels"],
        "block_channels": tuple(about["base_channels"] * multiplier for multiplier in about["channel_multipliers"]),
        "layers_per_block": about["residual_blocks"],
    }
    if about["kind"] == "vqgan":
        return MaskGITVQGANConfig(**shape, vocab_size=about["codebook_size"])
    return VAEConfig(**shape, scaling_factor=about["scale"], encoder_attention=True)


def autoencoder(case: Case) -> VAE | MaskGITVQGAN:
    """The autoencoder of a case of its own."""
    config = base_config(case.about["model"])
    model = VAE(config) if isinstance(config, VAEConfig) else MaskGITVQGAN(config)
    model.load_state_dict(published.autoencoder_as_ours(model, case.weights()))
    return model.eval()


def config(case: Case, **training: Any) -> KARLConfig:
    about = case.about["model"]
    sizes = {
        part: TransformerConfig(width=about[part]["width"], depth=about[part]["layers"], num_heads=about[part]["heads"])
        for part in ("encoder", "decoder")
    }
    return KARLConfig(
        image_size=about["base"]["resolution"],
        base=base_config(about["base"]),
        base_use="published",
        quantized=about["quantized"],
        vocab_size=about["token_codebook_size"],
        token_width=about["token_dim"],
        max_tokens=about["max_tokens"],
        position_grid=about["position_grid"],
        halting_width=about["halting_hidden"],
        training=KARLTraining(**training),
        **sizes,
    )


@functools.cache
def _karl(name: str, training: tuple[tuple[str, Any], ...]) -> KARL:
    case = Case.load(f"karl/{name}")
    model = KARL(config(case, **dict(training))).eval()
    shapes = {key: shape for key, shape in case.about["shapes"].items() if not key.startswith("gan_losses.")}
    weights = Case({**case.about, "shapes": shapes}, {}).weights()
    assert weights.keys() == set(published.names_of(model).values()), "the case has other weights"
    model.load_state_dict(published.as_ours(model, weights))
    return model


def karl(case: Case, **training: Any) -> KARL:
    """The case's model, which a test may change."""
    return copy.deepcopy(_karl(case.about["case"], tuple(training.items())))


# ---------------------------------------------------------------- parts


def quantizer(case: Case) -> Outputs:
    outputs = {}
    for name, unit_length in (("l2", True), ("plain", False)):
        module = VectorQuantizer(*case.about["shapes"]["quantize.embedding.weight"], unit_length=unit_length)
        module.table.data = case.weights()["quantize.embedding.weight"]
        z, weight = case.input("z").requires_grad_(), case.about["model"]["commitment_weight"]
        codes, ids, commitment, codebook = module(z)
        loss = weight * commitment + codebook
        gradients = torch.autograd.grad(loss + (codes * case.input("probe")).sum(), [z, module.table])
        found = {"indices": ids, "quantized": codes, "quantizer_loss": loss, "codebook_loss": codebook}
        found |= {"commitment_loss": weight * commitment, "grad_z": gradients[0], "grad_codebook": gradients[1]}
        assert torch.equal(module.nearest(z), ids)
        outputs |= {f"{name}_{key}": value for key, value in found.items()}
    return outputs


@torch.no_grad()
def vqgan(case: Case) -> Outputs:
    model = autoencoder(case)
    assert isinstance(model, MaskGITVQGAN)
    image = ours(case.input("image"))
    features = model.features(image)
    _, ids, commitment, codebook = model.quantizer(channels_last(features))
    given = channels_first(model.quantizer.ids_to_codes(case.input("indices")))
    return {
        "latent": features,
        "indices": ids,
        "quantized": model.encode(image),
        "quantizer_loss": model.config.commitment_weight * commitment + model.config.codebook_weight * codebook,
        "reconstruction": unit(model.decode(model.encode(image))),
        "decoded_from_indices": unit(model.decode(given)),
    }


@torch.no_grad()
def vae(case: Case) -> Outputs:
    model, noise = autoencoder(case), case.input("noise")
    assert isinstance(model, VAE)
    posterior = model.autoencoder.encode(case.input("image")).latent_dist
    scale = model.config.scaling_factor
    sample = latents_of_moments(model.moments(case.input("image")), noise, scale)
    return {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "std": posterior.std,
        "kl": posterior.kl(),
        "scaled_sample": sample,
        "decoded_scaled": model.decode(sample * scale),
        "decoded_unscaled": model.decode(sample),
    }


def conditioning(case: Case) -> Outputs:
    model = karl(case, slot_counts=tuple(range(16, 369, 16)))
    bins = model.bin_of(torch.tensor(case.about["errors"]))
    outputs = {
        "bins": model.tolerances,
        "binned": model.tolerances[bins],
        "embedding_first8": model.encoder.conditions[bins, :8],
        "curriculum_start": Curriculum(model).probabilities,
        "first_budgets": torch.tensor(model.config.slot_counts),
    }
    per_epoch = 10_000  # so many that half a step does not show
    for name, about in case.about["schedules"].items():
        schedule = TrainingConfig(
            steps=about["epochs"] * per_epoch,
            warmup=about["warmup_epochs"] * per_epoch,
            learning_rate=about["lr"],
            final_rate=about["min_lr"],
            batch_size=1,
        )
        rates = [rate_at(round(epoch * per_epoch), schedule) for epoch in about["at"]]
        outputs[f"lr_{name}"] = 1e4 * torch.tensor(rates)
    return outputs


# ---------------------------------------------------------------- encoding and decoding


@torch.no_grad()
def one_run(model: KARL, images: Tensor, noise: Tensor | None, budget: int, eps: float) -> tuple[Outputs, Run]:
    """Encodes and decodes images in our range, as training's second run does."""
    seen: Outputs = {}
    with model.encoder.halting_norm.register_forward_hook(lambda m, inputs, out: seen.update(hidden=inputs[0])):
        cells = model.encoder.cells(unit(images), model.look(images, noise).features)
        bins = model.bin_of(torch.full((len(images),), eps))
        run = model.run(cells, bins, budget, masked=True)
    return seen | {"condition": model.tolerances[bins], "image_tokens_every16": cells[:, ::16]}, run


@torch.no_grad()
def encoding(model: KARL, case: Case, number: int) -> Outputs:
    """What is recorded of a run of an `encode` case."""
    about = case.runs[number]
    row = slice(about["image"], about["image"] + 1)
    images = ours(case.input("image")[row])
    noise = case.input("noise")[row] if "noise" in str(case.about["inputs"]) else None
    seen, run = one_run(model, images, noise, about["budget"], about["desired_error"])
    probabilities = run.logits.sigmoid()
    vectors = model.encoder.vectors(seen["hidden"])
    image = unit(model.to_images(model.to_latents(run.out)))
    found = {
        **seen,
        "condition": seen["condition"][0],
        "halt_logits": run.logits,
        "halt_prob": probabilities,
        **{
            f"active_{name}": (probabilities <= value).sum(1)
            for name, value in (("075", 0.75), ("05", 0.5), ("03", 0.3))
        },
        "tokens": vectors,
        "decoded": run.out,
        "image": image,
        "l1": (image - unit(images)).abs().mean(dim=(1, 2, 3)),
    }
    if model.quantizer is not None:
        codes = model.quantizer(vectors)
        found |= {"indices": codes.ids, "quantized": codes.codes}
    return {f"run{number}_{name}": found[name] for name in about["record"]}


@torch.no_grad()
def decoding(model: KARL, case: Case, *, plainly: bool = False) -> Outputs:
    """All of a `decode` case: by gathering the kept slots, or plainly with a mask over all of them."""
    outputs: Outputs = {}
    budget, pick = case.about["budget"], case.input("pick")
    codes = case.input("codes") if model.quantizer is None else model.quantizer.ids_to_codes(case.input("indices"))
    for about in case.runs:
        name, wanted = about["name"], about["active"]
        kept = torch.ones(budget, dtype=torch.bool)
        if wanted != "all":
            kept = torch.arange(budget) < wanted["prefix"] if "prefix" in wanted else pick < wanted["pick_below"]
        slots = kept.nonzero().T
        out = model.decoder.plainly(codes, kept[None]) if plainly else model.decoder(codes[:, slots[0]], slots)
        outputs |= {f"{name}_decoded": out, f"{name}_active": kept}
        latents = model.to_latents(out)
        if f"{name}_code_every16" in case.recorded:
            outputs[f"{name}_code_every16"] = latents.flatten(2).transpose(1, 2)[:, ::16]
        if f"{name}_image" in case.recorded:
            outputs[f"{name}_image"] = unit(model.to_images(latents))
    return outputs


# ---------------------------------------------------------------- training


@functools.cache
def step_inputs(name: str, run: str) -> tuple[Tensor, Draws]:
    """Images that come near the reconstructions of the case's model, and the draws of the step."""
    case = Case.load(f"karl/{name}")
    about, model = next(each for each in case.runs if each["name"] == run), _karl(name, ())
    images, noises = [], []
    for entry in about["images"]:
        row = slice(entry["image"], entry["image"] + 1)
        image = ours(case.input("image")[row])
        noise = case.input("noise")[row] if "noise" in str(case.about["inputs"]) else None
        for _ in range(entry["passes"]):
            _, found = one_run(model, image, noise, 96, 0.01)
            with torch.no_grad():
                image = model.to_images(model.to_latents(found.out))
        images.append(image)
        noises += [] if noise is None else [noise]
    bins = torch.tensor(about["first_condition_bins"])
    posterior = torch.cat(noises) if noises else None
    draws = Draws(posterior, about["first_budget"], bins, torch.tensor(False), torch.zeros(len(bins)))
    return torch.cat(images), draws


def step(
    model: KARL,
    case: Case,
    name: str,
    judges: TrainableKARL | None = None,
    *,
    number: int = 0,
    perceptual: Any = None,
    backward: bool = True,
) -> Outputs:
    """What is recorded of a training step, its gradients among them; `number` is that of the step."""
    about = next(run for run in case.runs if run["name"] == name)
    images, draws = step_inputs(case.about["case"], name)
    runs_seen: list[tuple[Tensor, Run]] = []
    original = model.run

    def run(cells: Tensor, bins: Tensor, count: int, **rest: Any) -> Run:
        runs_seen.append((bins, original(cells, bins, count, **rest)))
        return runs_seen[-1][1]

    model.run = run  # type: ignore[method-assign]
    runs = model.forward_drawn(images, draws)
    losses = runs.losses if judges is None else judges.with_image_losses(images, draws, runs, number, perceptual)
    total, parts = losses.total, losses.parts
    curriculum = Curriculum(model)
    if about.get("curriculum_start") == "uniform":
        curriculum.probabilities.fill_(1 / 19)
    before = curriculum.probabilities.clone()
    curriculum.update(model.tolerances, runs.errors)
    found = {
        "total": total,
        "first_error": runs.errors,
        "curriculum_before": before,
        "curriculum_after": curriculum.probabilities,
    }
    for which, (bins, each) in zip(("first", "second"), runs_seen, strict=True):
        found |= {
            f"{which}_condition": model.tolerances[bins],
            f"{which}_halt_logits": each.logits,
            f"{which}_decoded_every16": each.out[:, ::16],
        }
        found |= {f"{which}_{PARTS[part]}": value for part, value in parts_of(parts, which).items() if part in PARTS}
        if judges is not None and not judges.is_discriminator_turn(number):
            found |= judged_pixels(parts_of(parts, which), judges.adversarial_weight(number), which)
        if runs.images and which == "second":
            found["second_error"] = (runs.images[1] - images).abs().mean(dim=(1, 2, 3)) / 2
    found["second_active_075"] = runs_seen[1][1].kept.sum(dim=1)  # type: ignore[union-attr]
    if backward and about.get("gradients", True):
        found |= gradients(model, total, case, name)
    return {key: value for part, value in found.items() if (key := f"{name}_{part}") in case.recorded}


def judged_pixels(parts: Mapping[str, Tensor], weight: float, which: str) -> Outputs:
    """What is recorded of the maker's losses besides: "rec" has the perceptual distance in it."""
    pixels = parts["l1"] / 2 + parts["lpips"]
    total = pixels
    if "adversarial" in parts:  # no term of a game that is not yet on
        total = total + weight * parts["adaptive_weight"] * parts["adversarial"]
    return {f"{which}_{name}_loss": value for name, value in (("nll", pixels), ("rec", pixels), ("total", total))}


def parts_of(parts: Mapping[str, Tensor], which: str) -> Outputs:
    """Those of the first or the second run, without its name in front."""
    return {name.removeprefix(f"{which}_"): value for name, value in parts.items() if name.startswith(f"{which}_")}


def gradients(model: KARL, total: Tensor, case: Case, name: str) -> Outputs:
    total.backward()
    mine = {theirs: ours for ours, theirs in published.names_of(model).items()}
    found = {}
    for key in case.recorded:
        if match := re.fullmatch(rf"{name}_grad\.(.*)", key):
            gradient = model.get_parameter(mine[match[1]]).grad
            assert gradient is not None
            found[f"grad.{match[1]}"] = gradient.reshape(case.recorded[key].shape)
    norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
    return found | {"grad_norm": torch.stack(norms).norm()}


def errors(case: Case, ours: Mapping[str, Tensor], gradient: float = 1e-3) -> dict[str, float]:
    """As `Case.errors`, but gradients in units of `gradient` times the largest."""
    found = {}
    for name, value in ours.items():
        if "grad" in name and "_grad_" not in name.replace("_grad_norm", ""):
            reference = case.recorded[name]
            found[name] = ((value - reference).abs().max() / (gradient * reference.abs().max())).item()
        else:
            found |= case.errors({name: value})
    return found


# ---------------------------------------------------------------- the second stage's judges


def lpips(weights: Mapping[str, Tensor], prefix: str) -> LPIPS:
    """The published names say the slice and then torchvision's number of the layer."""
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    backbone = {f"features.{name.split('.', 2)[2]}": value for name, value in own.items() if name.startswith("net.")}
    heads = {name: value for name, value in own.items() if name.startswith("lin")}
    found = LPIPS("vgg", backbone, {name: value.abs() for name, value in heads.items()})
    for index, head in enumerate(found.heads):  # the recipe's have both signs, which LPIPS refuses of a file
        head.data = heads[f"lin{index}.model.1.weight"].view_as(head)
    return found


def discriminator_weights(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """By our names; statistics of batch norms are not among them."""
    return {f"layers.{name.removeprefix(prefix)}": value for name, value in weights.items() if name.startswith(prefix)}


@functools.cache
def judge_weights() -> dict[str, Tensor]:
    """Those of the discriminator and the LPIPS that the case of the second stage uses, of its two."""
    case = Case.load("karl/finetune_step_vqgan_quantized")
    shapes = {key: shape for key, shape in case.about["shapes"].items() if key.startswith("gan_losses.1.")}
    return Case({**case.about, "shapes": shapes}, {}).weights()


@functools.cache
def judging_lpips() -> LPIPS:
    return lpips(judge_weights(), "gan_losses.1.perceptual_loss.")


def perceptual(images: Tensor, references: Tensor) -> Tensor:
    """LPIPS of images as the case feeds them, in [0, 1]."""
    return judging_lpips()(unit(images), unit(references))


def taught(model: KARL, adversarial: float, start: int = 0) -> TrainableKARL:
    """The case's judges around the model, which see images in [0, 1]."""
    loss = ReconstructionLossConfig(
        l1=0.5,  # of errors on the scale [-1, 1]
        mse=0.0,
        lpips=1.0,
        adversarial=adversarial,
        adversarial_start=start,
        adaptive="last_layer",
        discriminator_norm="batch",
        discriminator_every=9,
    )
    judges = model.for_training(loss, accumulate=1)
    assert isinstance(judges, TrainableKARL)
    numbers = discriminator_weights(judge_weights(), "gan_losses.1.discriminator.main.")
    missing = judges.discriminators[1].load_state_dict(numbers, strict=False)
    assert not missing.unexpected_keys
    for discriminator in judges.discriminators:
        discriminator.register_forward_pre_hook(lambda module, inputs: (unit(inputs[0]),))
    return judges
