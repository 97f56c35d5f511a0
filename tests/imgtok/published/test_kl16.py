"""Files in the layout of kl16.ckpt: read whole or refused with what is wrong."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import imgtok
from imgtok.cli import main
from imgtok.published.kl16 import is_kernel, published_name
from imgtok.tokenizers.flextok import FlexTok
from imgtok.tokenizers.vae import VAE, VAEConfig, load_vae

SMALL = VAEConfig(
    latent_channels=3, block_channels=(32, 64), layers_per_block=1, scaling_factor=0.2325, encoder_attention=True
)


def model(config: VAEConfig = SMALL) -> VAE:
    torch.manual_seed(0)
    return VAE(config).eval()


def published(vae: VAE) -> dict[str, Tensor]:
    """As the published code would have named and shaped it."""
    levels = len(vae.config.block_channels)
    found = {published_name(name, levels): value for name, value in vae.autoencoder.state_dict().items()}
    return {name: value[..., None, None] if is_kernel(name) else value for name, value in found.items()}


@pytest.fixture
def path(tmp_path) -> Path:
    torch.save({"model": published(model())}, tmp_path / "kl16.ckpt")
    return tmp_path / "kl16.ckpt"


def same(found: VAE, wanted: VAE) -> bool:
    state = wanted.state_dict()
    return found.config == wanted.config and all(torch.equal(v, state[k]) for k, v in found.state_dict().items())


def test_published_names():
    names = published(model())
    for name in ("nin_shortcut.weight", "downsample.conv.bias"):
        assert any(name in found for found in names)
    assert names["encoder.down.1.attn.0.q.weight"].shape == (64, 64, 1, 1)
    assert names["encoder.mid.attn_1.proj_out.weight"].shape == (64, 64, 1, 1)
    assert names["decoder.up.1.upsample.conv.weight"].shape == (64, 64, 3, 3)
    assert names["decoder.up.0.block.0.nin_shortcut.weight"].shape == (32, 64, 1, 1)
    assert names["encoder.norm_out.weight"].shape == (64,)
    assert "decoder.up.0.upsample.conv.weight" not in names


def test_a_file_is_the_same_autoencoder(path, tmp_path):
    state = torch.get_rng_state()
    vae = load_vae(str(path))
    assert torch.equal(torch.get_rng_state(), state), "loading drew from the global generator"
    assert not vae.training
    assert same(vae, model())
    assert same(imgtok.load(path), model())
    assert same(VAE.from_pretrained(path), model())
    save_file(published(model()), tmp_path / "kl16.safetensors")
    assert same(load_vae(tmp_path / "kl16.safetensors"), model())
    assert same(imgtok.load(tmp_path / "kl16.safetensors"), model())
    assert load_vae(path, 0.5).config.scaling_factor == 0.5


def test_one_without_attention_in_its_encoder(tmp_path):
    plain = model(VAEConfig(latent_channels=2, block_channels=(32,), layers_per_block=3, scaling_factor=0.2325))
    torch.save({"model": published(plain)}, tmp_path / "plain.ckpt")
    assert same(load_vae(tmp_path / "plain.ckpt"), plain)


def test_it_becomes_a_folder_of_ours(path, tmp_path):
    load_vae(path).save_pretrained(tmp_path / "folder")
    again = load_vae(tmp_path / "folder")
    assert same(again, model())
    assert again.fingerprint() == load_vae(path).fingerprint()


def test_info(path, capsys):
    assert main(["info", str(path)]) == 0
    assert "kind: vae (VAE)" in capsys.readouterr().out


def test_what_its_training_left_is_dropped(tmp_path, caplog):
    caplog.set_level("INFO", logger="imgtok.published.kl16")
    tensors = published(model()) | {"loss.logvar": torch.zeros(1)}
    torch.save({"model": tensors, "epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "kl16.ckpt")
    assert same(load_vae(tmp_path / "kl16.ckpt"), model())
    assert "left out 1 tensors of its training (loss.*)" in caplog.text


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    tensors = published(model())
    del tensors["encoder.conv_in.bias"], tensors["decoder.mid.attn_1.k.weight"]
    tensors["decoder.up.1.attn.0.q.weight"] = torch.zeros(64, 64, 1, 1)
    tensors["quant_conv.weight"] = torch.zeros(5, 6, 1, 1)
    torch.save({"model": tensors}, tmp_path / "kl16.ckpt")
    with pytest.raises(ValueError, match="the weights do not fit the KL autoencoder") as caught:
        load_vae(tmp_path / "kl16.ckpt")
    lines = {line.strip() for line in str(caught.value).splitlines()[1:]}
    assert lines == {
        "missing: encoder.conv_in.bias (32,)",
        "missing: decoder.mid.attn_1.k.weight (64, 64, 1, 1)",
        "unexpected: decoder.up.1.attn.0.q.weight (64, 64, 1, 1)",
        "another shape: quant_conv.weight is (5, 6, 1, 1) in the file, (6, 6, 1, 1) in the model",
    }


class Code:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}, "epoch": 1}, "must hold tensors by name.*found: state_dict, epoch"),
        (torch.zeros(2), "must hold tensors by name.*found: Tensor"),
        (
            {"model": {"blocks.0.weight": torch.zeros(2)}},
            "weights of no model that imgtok reads.*found: blocks.0.weight",
        ),
        ({"model": {"weights": 3}}, "must hold tensors by name"),
        ({"model": {}, "args": Fraction(1, 3)}, r"not a file of weights alone: it needs fractions\.Fraction"),
        ({"model": Code()}, r"imgtok runs no code from a file.*keep only the weights.*torch\.save"),
    ],
    ids=["another key", "a tensor", "another model", "no tensors", "an object", "code"],
)
def test_foreign_files(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=message) as caught:
        load_vae(tmp_path / "other.ckpt")
    assert str(tmp_path / "other.ckpt") in str(caught.value)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["kl16.ckpt", "weights/kl16.ckpt", "/nowhere/kl16.safetensors"])
def test_missing_files(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{name}: no such file of weights"):
        load_vae(name)


def test_damaged_files(path, tmp_path):
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="kl16.ckpt: not a .*file"):
        load_vae(path)
    (tmp_path / "text.ckpt").write_text("404: Not Found")
    with pytest.raises(ValueError, match="text.ckpt: not a .*file"):
        load_vae(tmp_path / "text.ckpt")
    (tmp_path / "x.safetensors").write_bytes(b"abc")
    for read in (load_vae, imgtok.load):
        with pytest.raises(ValueError, match="x.safetensors: not a whole safetensors file"):
            read(tmp_path / "x.safetensors")


def test_widths_that_the_groups_do_not_divide(tmp_path):
    narrow = model(VAEConfig(latent_channels=2, block_channels=(8,), layers_per_block=1, norm_groups=4))
    torch.save({"model": published(narrow)}, tmp_path / "kl16.ckpt")
    with pytest.raises(ValueError, match=r"kl16.ckpt: an autoencoder that imgtok cannot stand for: block_channels: 8"):
        load_vae(tmp_path / "kl16.ckpt")


def test_a_tokenizer_is_asked_for(path):
    with pytest.raises(ValueError, match=r"holds a published VAE, but a FlexTok is needed here"):
        imgtok.load(path, expect=FlexTok)
