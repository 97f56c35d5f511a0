"""A checkpoint in the published layout, filled with a case's weights: our loader reads it, our writer writes it.

The names, the shapes and the numbers that come out are the published code's, so nothing here rests on our map alone.
"""

from __future__ import annotations

import json

import pytest
import runs
import torch
from cases import Case
from models import flextok
from safetensors.torch import load_file, save_file

import imgtok
from imgtok.layers.positions import sincos_2d
from imgtok.published import flextok as published
from imgtok.published.flextok_config import write_config

CASE = Case.load("flextok/image")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The case as a folder: published names and shapes, the fixed tables, and its autoencoder's shape beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = CASE.weights()
    for name, (_, width, rows, columns) in CASE.about["computed"].items():
        tensors[name] = sincos_2d(width, rows, columns).permute(2, 0, 1)[None].contiguous()
    save_file(tensors, folder / "model.safetensors")
    about, vae = CASE.about["model"], CASE.about["model"]["vae"]
    (folder / "config.json").write_text(json.dumps(write_config(flextok(CASE).config)))
    levels = len(vae["block_channels"])
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text(
        json.dumps(
            {
                "_class_name": "AutoencoderKL",
                "latent_channels": about["latent_channels"],
                "block_out_channels": vae["block_channels"],
                "down_block_types": ["DownEncoderBlock2D"] * levels,
                "up_block_types": ["UpDecoderBlock2D"] * levels,
                "layers_per_block": vae["layers_per_block"],
                "norm_num_groups": vae["norm_groups"],
            }
        )
    )
    return folder


def test_tokens_and_images_of_a_loaded_checkpoint(checkpoint):
    ours = runs.image(imgtok.load(checkpoint), CASE)
    assert ours.keys() == CASE.recorded.keys()
    errors = CASE.errors(ours)
    assert all(error <= 1 for error in errors.values()), errors


def test_writing_gives_the_checkpoint_back(checkpoint, tmp_path):
    published.save(imgtok.load(checkpoint), tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path))
    shapes = CASE.about["shapes"] | CASE.about["computed"]
    assert {name: list(value.shape) for name, value in after.items()} == shapes
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert json.loads((checkpoint / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())


def test_swapped_projections_are_noticed(checkpoint, tmp_path):
    """Queries for keys leave every shape as it is: only the recorded tokens can tell."""
    tensors = load_file(checkpoint / "model.safetensors")
    block = "encoder.module_dict.enc_transformer.blocks.0.attn"
    tensors[f"{block}.wq.weight"], tensors[f"{block}.wv.weight"] = (
        tensors[f"{block}.wv.weight"],
        tensors[f"{block}.wq.weight"],
    )
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", "vae/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    ours = runs.image(imgtok.load(tmp_path), CASE)
    assert CASE.errors({"apg.indices": ours["apg.indices"]})["apg.indices"] > 1
