"""Autoencoders in the format of diffusers, such as the published EPFL-VILAB/flextok_vae_c16."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file

from imgtok.config import ConfigError
from imgtok.hub import resolve
from imgtok.published.diffusers import OLD_ATTENTION
from imgtok.published.diffusers import WEIGHTS_NAME as DIFFUSERS_WEIGHTS
from imgtok.tokenizers.vae import load_vae


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, AutoencoderKL]:
    """A small AutoencoderKL and the folder that diffusers itself wrote."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=3,
        scaling_factor=0.37,
    ).eval()
    folder = tmp_path_factory.mktemp("diffusers")
    model.save_pretrained(folder)
    return folder, model


def copy(folder: Path, to: Path, **changes) -> Path:
    """The folder with other settings in its config.json; None takes one out."""
    settings = json.loads((folder / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    (to / DIFFUSERS_WEIGHTS).symlink_to(folder / DIFFUSERS_WEIGHTS)
    return to


@torch.no_grad()
def same(vae, model) -> bool:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean = model.encode(images).latent_dist.mean
    latents = vae.encode(images)
    return torch.equal(latents, mean * vae.config.scaling_factor) and torch.allclose(
        vae.decode(latents), model.decode(mean).sample, atol=1e-5
    )


def test_a_folder_of_diffusers_is_the_same_autoencoder(written):
    folder, model = written
    assert resolve(folder).layout == "diffusers"
    assert resolve("shapes32").layout == "imgtok"
    vae = load_vae(folder)
    assert vae.config.scaling_factor == 0.37
    assert (vae.config.latent_channels, vae.config.block_channels, vae.config.factor) == (3, (8, 16), 2)
    assert not vae.training
    assert same(vae, model)
    assert same(load_vae(str(folder)), model)


def test_weights_under_a_prefix_of_a_larger_model(written, tmp_path):
    folder = copy(written[0], tmp_path)
    path = folder / DIFFUSERS_WEIGHTS
    save_file({f"first_stage_model.{name}": value for name, value in load_file(path).items()}, path)
    assert same(load_vae(folder), written[1])


def test_attention_in_the_last_level_of_the_encoder(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=3,
    ).save_pretrained(tmp_path)
    vae = load_vae(tmp_path)
    assert vae.config.encoder_attention
    assert same(vae, AutoencoderKL.from_pretrained(tmp_path).eval())


def test_another_scaling_factor(written, tmp_path):
    folder, model = written
    for vae in (load_vae(folder, 0.5), load_vae(resolve(str(folder)), 0.5)):
        assert vae.config.scaling_factor == 0.5
        assert same(vae, model)
    assert load_vae("shapes32", 0.5).config.scaling_factor == 0.5
    without = copy(folder, tmp_path, scaling_factor=None)
    assert load_vae(without, 0.5).config.scaling_factor == 0.5
    with pytest.raises(ConfigError, match="no scaling_factor; give it yourself, vae_scaling_factor=NUMBER"):
        load_vae(without)


def test_old_names_of_the_attention(written, tmp_path):
    folder, model = written
    copy(folder, tmp_path)
    tensors = load_file(folder / DIFFUSERS_WEIGHTS)
    for old, new in OLD_ATTENTION.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    (tmp_path / DIFFUSERS_WEIGHTS).unlink()
    save_file(tensors, tmp_path / DIFFUSERS_WEIGHTS)
    assert same(load_vae(tmp_path), model)
    both = tensors | load_file(folder / DIFFUSERS_WEIGHTS)
    save_file(both, tmp_path / DIFFUSERS_WEIGHTS)
    with pytest.raises(ValueError, match=r"unexpected: .*attentions\.0\.proj_attn"):
        load_vae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "AutoencoderTiny"},
            "not written by imgtok.* of an AutoencoderKL .*it is of a AutoencoderTiny",
        ),
        ({"act_fn": "gelu"}, "act_fn: 'gelu', imgtok can use 'silu' alone"),
        ({"shift_factor": 0.1}, "shift_factor: 0.1"),
        ({"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]}, "down_block_types"),
        ({"latent_channels": None}, "lacks latent_channels"),
    ],
)
def test_autoencoders_that_it_cannot_stand_for(written, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_vae(copy(written[0], tmp_path, **changes))


def test_weights_that_do_not_fit_or_are_not_there(written, tmp_path):
    folder = copy(written[0], tmp_path, latent_channels=4)
    with pytest.raises(ValueError, match="do not fit the autoencoder that config.json"):
        load_vae(folder)
    (folder / DIFFUSERS_WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="no diffusion_pytorch_model.safetensors"):
        load_vae(folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin: not a whole file .* \(0 bytes\)"):
        load_vae(folder)
