"""DC-AE in the format of diffusers, such as the published mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

import imgtok
from imgtok.config import ConfigError
from imgtok.hub import resolve
from imgtok.published import diffusers_dc

SHAPE = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [16, 32],
    "decoder_block_out_channels": [16, 32],
    "encoder_layers_per_block": [0, 1],
    "decoder_layers_per_block": [1, 2],
    "encoder_qkv_multiscales": [[], [5]],
    "decoder_qkv_multiscales": [[], []],
    "decoder_norm_types": ["batch_norm", "rms_norm"],
    "decoder_act_fns": ["relu", "silu"],
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.37,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, AutoencoderDC]:
    """A small AutoencoderDC and the folder that diffusers itself wrote."""
    torch.manual_seed(0)
    model = AutoencoderDC(**SHAPE).eval()
    folder = tmp_path_factory.mktemp("dcae")
    model.save_pretrained(folder)
    return folder, model


@torch.no_grad()
def test_a_folder_of_diffusers_is_the_same_autoencoder(written, tmp_path):
    folder, model = written
    assert resolve(folder).layout == "diffusers_dc"
    ours = imgtok.load(folder)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latent = model.encode(images).latent
    assert torch.equal(ours.encode(images), latent * 0.37)
    assert torch.allclose(ours.decode(latent * 0.37), model.decode(latent).sample, atol=1e-5)
    assert (ours.config.factor, ours.config.encoder.layers, ours.config.norms) == (
        2,
        (0, 1),
        ("batch_norm", "rms_norm"),
    )
    assert ours.config.decoder.blocks == ("ResBlock", "ResBlock")
    (tmp_path / "again").mkdir()
    diffusers_dc.save(ours, tmp_path / "again")
    again = AutoencoderDC.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again.encode(images).latent, latent)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 4}, "in_channels: 4, imgtok can use 3 alone"),
        ({"encoder_layers_per_block": [1]}, "layers: 1 entries for 2 levels"),
        ({"decoder_act_fns": None}, "lacks decoder_act_fns; copy"),
        ({"scaling_factor": None}, "lacks scaling_factor; give it yourself, vae_scaling_factor=NUMBER"),
        ({"encoder_qkv_multiscales": [[], [3, 5]]}, r"qkv_multiscales: \[3, 5\], imgtok can use one kernel a level"),
        ({"downsample_block_type": "pool"}, "downsample: .*'pool'"),
    ],
)
def test_settings_that_it_cannot_stand_for(written, tmp_path, changes, message):
    settings = json.loads((written[0] / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message):
        imgtok.load(tmp_path)


def test_a_factor_that_is_given_takes_the_place_of_one_that_is_missing(written, tmp_path):
    settings = json.loads((written[0] / "config.json").read_text()) | {"scaling_factor": None}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / name).symlink_to(written[0] / name)
    assert imgtok.hub.load(resolve(tmp_path).scaled(0.5)).config.scaling_factor == 0.5
