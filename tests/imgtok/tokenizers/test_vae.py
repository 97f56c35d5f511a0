from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import imgtok
from imgtok.tokenizers.base import latents_of_moments
from imgtok.tokenizers.vae import VAE, VAEConfig, load_vae

TINY = VAEConfig(latent_channels=3, block_channels=(8, 16), layers_per_block=1, norm_groups=4, scaling_factor=0.5)


@pytest.fixture(scope="module")
def model() -> VAE:
    torch.manual_seed(0)
    return VAE(TINY).eval()


def images(count: int = 2, side: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_shapes_and_scaling(model):
    posterior = model.autoencoder.encode(images()).latent_dist
    latents = model.encode(images())
    assert latents.shape == (2, 3, 4, 4)
    assert TINY.factor == 2
    torch.testing.assert_close(latents, 0.5 * posterior.mean)
    decoded = model.decode(latents)
    assert decoded.shape == (2, 3, 8, 8)
    torch.testing.assert_close(decoded, model.autoencoder.decode(posterior.mean).sample)


@torch.no_grad()
def test_a_sample_needs_its_noise_from_outside(model):
    noise = torch.randn(2, 3, 4, 4)
    posterior = model.autoencoder.encode(images()).latent_dist
    torch.testing.assert_close(model.encode(images(), noise), 0.5 * (posterior.mean + posterior.std * noise))
    assert torch.equal(model.encode(images(), torch.zeros_like(noise)), model.encode(images()))


@torch.no_grad()
def test_moments_are_what_a_sample_needs(model):
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    posterior = model.autoencoder.encode(images()).latent_dist
    moments = model.moments(images())
    assert torch.equal(moments, torch.cat([posterior.mean, posterior.logvar], dim=1))
    assert torch.equal(latents_of_moments(moments, noise, 0.5), model.encode(images(), noise))
    assert torch.equal(latents_of_moments(moments, None, 0.5), model.encode(images()))


def test_log_variances_of_any_origin_are_clamped():
    moments = torch.tensor([1.0, 200.0]).reshape(1, 2, 1, 1)
    noise = torch.ones(1, 1, 1, 1)
    torch.testing.assert_close(latents_of_moments(moments, noise, 1.0).item(), 1 + math.exp(10), rtol=1e-6, atol=0)


def test_a_fingerprint_is_of_the_weights_and_the_shape(model):
    assert len(model.fingerprint()) == 16
    again = VAE(replace(TINY, scaling_factor=2.0, kl_weight=1.0))
    again.load_state_dict(model.state_dict())
    assert again.fingerprint() == model.fingerprint()
    other = VAE(replace(TINY, norm_groups=2))
    other.load_state_dict(model.state_dict())
    assert other.fingerprint() != model.fingerprint()
    with torch.no_grad():
        next(again.parameters()).flatten()[0] += 1e-6
    assert again.fingerprint() != model.fingerprint()


def test_training_decodes_a_sample_and_measures_its_divergence(model):
    found = model(images(), generator=torch.Generator().manual_seed(3))
    posterior = model.autoencoder.encode(images()).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    decoded = model.autoencoder.decode(posterior.mean + posterior.std * noise).sample
    variance = posterior.std.square()
    kl = 0.5 * (posterior.mean.square() + variance - 1 - variance.log()).sum() / (2 * 3 * 8 * 8)
    torch.testing.assert_close(found.images, decoded)
    torch.testing.assert_close(found.losses.parts["kl"], kl)
    torch.testing.assert_close(found.losses.total, model.config.kl_weight * kl)


def test_training_reduces_the_loss_without_global_randomness():
    torch.manual_seed(0)
    model = VAE(TINY).train()
    state = torch.get_rng_state()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(20):
        found = model(images(4), generator=torch.Generator().manual_seed(step))
        loss = (found.images - images(4)).abs().mean() + found.losses.total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]
    assert torch.equal(state, torch.get_rng_state())


def test_saving_and_loading(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded = imgtok.load(tmp_path, expect=VAE)
    assert loaded.config == TINY
    with torch.no_grad():
        assert torch.equal(loaded.encode(images()), model.encode(images()))


@pytest.mark.parametrize("channels", [(8, 6), (0,)])
def test_widths_that_the_groups_do_not_divide(channels):
    with pytest.raises(ValueError, match="block_channels"):
        VAEConfig(block_channels=channels, norm_groups=4)


def test_a_packaged_autoencoder_that_does_not_exist():
    with pytest.raises(FileNotFoundError, match=r"no model folder 'nosuch' .* imgtok ships shapes32"):
        load_vae("nosuch")
