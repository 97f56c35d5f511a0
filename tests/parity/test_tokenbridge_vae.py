"""KL-16 as TokenBridge uses it, against what the published code computed: encoder, posterior, decoder, and the image
that is left after rounding the latents.

The weights reach our autoencoder as a user's would: out of a file in the layout of kl16.ckpt.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import recipe
import torch
from cases import Case
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from models import tokenbridge
from tokenbridge_runs import sampling
from torch import Tensor

from imgtok.generators.pipeline import Pipeline
from imgtok.published.kl16 import KL16
from imgtok.quantizers.normal import NormalConfig, NormalQuantizer
from imgtok.tokenizers.base import latents_of_moments
from imgtok.tokenizers.vae import VAE, load_vae

TOLERANCE = 1e-4
"""That of the cases."""


def autoencoder(folder: Path, shapes: dict[str, list[int]], seed: int) -> VAE:
    torch.save({"model": {name: torch.from_numpy(value) for name, value in recipe.weights(shapes, seed).items()}},
               folder / "kl16.ckpt")  # fmt: skip
    return load_vae(folder / "kl16.ckpt")


@torch.no_grad()
def outputs(vae: VAE, case: Case) -> dict[str, Tensor]:
    """Latents are scaled in our code and not in the case's."""
    scale = vae.config.scaling_factor
    image, noise, faint, z, wide = (case.input(name) for name in ("image", "noise", "faint", "z", "wide_moments"))
    moments = vae.moments(image)
    mean, logvar = moments.chunk(2, dim=1)
    sample = latents_of_moments(moments, noise, scale)
    posterior = DiagonalGaussianDistribution(wide)  # which `VAE` takes its posteriors from
    each = range(len(image))
    kl = [vae.forward_drawn(image[i : i + 1], noise[i : i + 1]).losses.parts["kl"] * image[i].numel() for i in each]
    return {
        "moments": moments,
        "mean": mean,
        "logvar": logvar,
        "std": latents_of_moments(torch.cat([0 * mean, logvar], dim=1), torch.ones_like(mean), 1.0),
        "kl": torch.stack(kl),
        "moments_flip": vae.moments(image.flip(-1)),
        "moments_faint": vae.moments(faint),
        "sample": sample / scale,
        "decoded_sample": vae.decode(sample),
        "decoded_z": vae.decode(z * scale),
        "decoded_faint": vae.decode(z * 0.001 * scale),
        "wide_logvar": posterior.logvar,
        "wide_std": latents_of_moments(torch.cat([0 * wide[:, :16], wide[:, 16:]], 1), torch.ones(2, 16, 2, 3), 1.0),
        "wide_kl": posterior.kl(),
    }


@torch.no_grad()
def rounded(vae: VAE, case: Case, quantizer: NormalQuantizer | None = None) -> dict[str, Tensor]:
    about = case.about["config"]["settings"]
    config = NormalConfig(levels=about["levels"], range=tuple(about["range"]), cut=about["std_range"])
    quantizer = quantizer or NormalQuantizer(config)
    values, ids = quantizer(vae.encode(case.input("image"), case.input("noise")))
    return {"recon_indices": ids, "recon_dequant": values, "recon_image": vae.decode(values)}


def check(case: Case, ours: dict[str, Tensor]) -> None:
    errors = case.errors(ours, TOLERANCE)
    largest = max(errors, key=lambda name: errors[name])
    print(f"{case.about['case']}: {largest} {errors[largest] * TOLERANCE:.2e}")
    assert all(error <= 1 for error in errors.values()), errors


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> VAE:
    case = Case.load("tokenbridge/vae_tiny")
    return autoencoder(tmp_path_factory.mktemp("kl16"), case.about["shapes"], case.about["weights_seed"])


def test_a_small_one(small):
    case = Case.load("tokenbridge/vae_tiny")
    assert small.config.scaling_factor == case.about["config"]["latent_scale"]
    ours = outputs(small, case) | rounded(small, case)
    assert ours.keys() == case.recorded.keys()
    check(case, ours)


def test_the_case_notices_what_is_done_otherwise(small):
    """The scale forgotten, no clamp, and levels of another table."""
    case = Case.load("tokenbridge/vae_tiny")
    assert case.errors({"recon_image": small.decode(rounded(small, case)["recon_dequant"] * 1.01).detach()},
                       TOLERANCE)["recon_image"] > 1  # fmt: skip
    unclamped = torch.exp(case.input("wide_moments")[:, 16:] / 2)
    assert not case.errors({"wide_std": unclamped}, TOLERANCE)["wide_std"] <= 1
    uniform = NormalQuantizer(NormalConfig(levels=64, spacing="uniform"))
    assert min(case.errors(rounded(small, case, uniform), TOLERANCE).values()) > 1


@pytest.mark.slow  # 66 million numbers are drawn
def test_the_published_one(tmp_path):
    case = Case.load("tokenbridge/vae_full")
    vae = autoencoder(tmp_path, case.about["shapes"], case.about["weights_seed"])
    assert vae.config == KL16
    ours = outputs(vae, case)
    assert ours.keys() == case.recorded.keys()
    check(case, ours)


def test_a_sampling_decoded_to_pixels(small):
    """The last of the six samplings' outputs; its autoencoder has the same weights as the small one."""
    case, other = Case.load("tokenbridge/sample"), Case.load("tokenbridge/vae_tiny")
    about = case.about
    assert (about["shapes_vae"], about["weights_seed"]) == (other.about["shapes"], other.about["weights_seed"])
    model = tokenbridge(case)
    latents = sampling(model, case, "linear")["linear.latents"]
    with torch.no_grad():
        check(case, {"linear.image": small.decode(latents)})
    pictures = Pipeline(model, small, device="cpu").decode(latents)
    wanted = (case.recorded["linear.image"].clamp(-1, 1) + 1) * 127.5
    assert np.abs(np.array(pictures[0], dtype=float) - wanted[0].permute(1, 2, 0).numpy()).max() < 0.51
