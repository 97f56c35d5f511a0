"""KL-16 against what its published code computed, at the cases' tolerance (1e-4 of the largest value).

The weights reach our autoencoder as a user's would: out of a file in the layout of kl16.ckpt.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import recipe
import torch
from cases import Case
from torch import Tensor

from imgtok.published import kl16
from imgtok.tokenizers.base import latents_of_moments
from imgtok.tokenizers.vae import VAE, VAEConfig, load_vae

CASE = Case.load("xar/vae_kl16_small")
ABOUT = CASE.about["config"]


def published() -> dict[str, Tensor]:
    arrays = recipe.weights(CASE.about["shapes"], ABOUT["weights_seed"])
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kl16") / "kl16.ckpt"
    torch.save({"model": published()}, path)
    return path


@torch.no_grad()
def outputs(vae: VAE) -> dict[str, Tensor]:
    images, noise = CASE.input("xar.vae.image").clamp(-1, 1), CASE.input("xar.vae.posterior")
    moments = vae.moments(images)
    latents = latents_of_moments(moments, noise, vae.config.scaling_factor)
    return {
        "moments": moments,
        "moments_flip": vae.moments(images.flip(-1)),
        "latent": latents,
        "decoded": vae.decode(latents),
        "decoded_mean": vae.decode(vae.encode(images[:1])),
    }


def test_the_published_numbers(ckpt):
    vae = load_vae(ckpt)
    multipliers = ABOUT["channel_multipliers"]
    assert vae.config == VAEConfig(
        latent_channels=ABOUT["latent_channels"],
        block_channels=tuple(ABOUT["base_channels"] * multiplier for multiplier in multipliers),
        layers_per_block=ABOUT["residual_blocks_per_level"],
        norm_groups=ABOUT["group_norm_groups"],
        scaling_factor=ABOUT["scale"],
        encoder_attention=True,
    )
    ours = outputs(vae)
    assert ours.keys() == CASE.recorded.keys()
    errors = CASE.errors(ours)
    print({name: f"{error:.4f}" for name, error in errors.items()})
    assert all(error <= 1 for error in errors.values()), errors


@torch.no_grad()
def test_a_sample_is_what_encode_makes_of_the_same_noise(ckpt):
    images, noise = CASE.input("xar.vae.image").clamp(-1, 1), CASE.input("xar.vae.posterior")
    assert max(CASE.errors({"latent": load_vae(ckpt).encode(images, noise)}).values()) <= 1


def swap(a: str, b: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Two groups of tensors of equal shapes in each other's place."""

    def swapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {name: name.replace(a, "\n").replace(b, a).replace("\n", b) for name in tensors}
        return {name: tensors[other] for name, other in names.items()}

    return swapped


@pytest.mark.parametrize(
    "wrong",
    [
        swap(".mid.block_1.", ".mid.block_2."),
        swap("decoder.up.0.block.1.", "decoder.up.0.block.2."),
        swap(".attn.0.", ".attn.1."),
        swap(".q.", ".k."),
        swap(".v.", ".proj_out."),
        lambda tensors: {name: v.flip(0) if name == "quant_conv.weight" else v for name, v in tensors.items()},
    ],
    ids=["mid blocks", "decoder blocks", "attentions", "query and key", "value and output", "mean and variance"],
)
def test_the_case_notices_weights_in_the_wrong_place(tmp_path, wrong):
    torch.save({"model": wrong(published())}, tmp_path / "kl16.ckpt")
    assert max(CASE.errors(outputs(load_vae(tmp_path / "kl16.ckpt"))).values()) > 1


def test_the_case_notices_another_scale(ckpt):
    ours = outputs(load_vae(ckpt, 0.2335))
    assert max(CASE.errors(ours).values()) > 1


def test_the_published_size():
    assert [ABOUT["published_base_channels"] * m for m in ABOUT["channel_multipliers"]] == [*kl16.KL16.block_channels]
    assert kl16.KL16.scaling_factor == ABOUT["scale"]
    with torch.device("meta"):
        vae = VAE(kl16.KL16)
    assert sum(parameter.numel() for parameter in vae.parameters()) == ABOUT["published_parameters"] == 66_456_019
