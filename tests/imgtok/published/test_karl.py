"""Published KARLs and the VQGAN under them: small files in their layouts, read strictly without running anything."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

import imgtok
from imgtok.hub import resolve
from imgtok.published import karl as published
from imgtok.tokenizers.karl import KARL, KARLConfig, TransformerConfig
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from imgtok.tokenizers.vae import VAEConfig

VQGAN = MaskGITVQGANConfig(latent_channels=4, vocab_size=16, block_channels=(32, 32), layers_per_block=1)
VAE = VAEConfig(
    latent_channels=4, block_channels=(32, 32), layers_per_block=1, scaling_factor=0.2325, encoder_attention=True
)
HEADS = {(32, 2): 2, (16, 1): 2}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(published, "HEADS", HEADS)


def small(base: MaskGITVQGANConfig | VAEConfig, quantized: bool) -> KARL:
    torch.manual_seed(0)
    sizes = {
        part: TransformerConfig(width=width, depth=depth, num_heads=HEADS[width, depth])
        for part, (width, depth) in (("encoder", (32, 2)), ("decoder", (16, 1)))
    }
    config = KARLConfig(
        image_size=32, base=base, base_use="published", quantized=quantized, token_width=4, max_tokens=8, budget=8,
        position_grid=16, halting_width=8, **({"vocab_size": 32} if quantized else {}), **sizes,
    )  # fmt: skip
    return KARL(config).eval()


def weights_of(model: KARL) -> dict[str, Tensor]:
    state = model.state_dict()
    names = published.names_of(model)
    return {theirs: published.as_published(theirs, state[ours]).clone() for ours, theirs in names.items()}


def write(path: Path, weights: dict[str, Tensor]) -> Path:
    """As its training program does: averaged weights beside the trained ones, the optimizer, the command line."""
    trained = {name: value + 1 for name, value in weights.items()}
    stored = {
        "model": trained,
        "ema": weights,
        "optimizer": {"state": {}},
        "epoch": 3,
        "args": argparse.Namespace(lr=1),
    }
    torch.save(stored, path)
    return path


@pytest.mark.parametrize(("base", "quantized"), [(VQGAN, True), (VAE, False)], ids=["vqgan", "vae"])
def test_a_published_file(base, quantized, tmp_path, caplog):
    model = small(base, quantized)
    leftovers = {name: torch.zeros(2) for name in ("gan_losses.0.discriminator.main.0.bias", "code_loss_embeddings")}
    path = write(tmp_path / "karl_small.pth", weights_of(model) | leftovers)
    with caplog.at_level(logging.INFO):
        loaded = imgtok.load(path)
    assert "left out 2 tensors of its training" in caplog.text
    assert isinstance(loaded, KARL)
    assert loaded.config.base == base
    assert {name: getattr(loaded.config, name) for name in ("image_size", "quantized", "base_use", "token_width")} == {
        "image_size": 32, "quantized": quantized, "base_use": "published", "token_width": 4,
    }  # fmt: skip
    assert (loaded.config.budget, loaded.config.max_tokens) == (8, 8), "no larger than the number of slots"
    state, wanted = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert not loaded.training
    raw = imgtok.load(path, raw=True)
    assert torch.equal(raw.encoder.slots, model.encoder.slots + 1)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded.encode(images, 8).slots, model.encode(images, 8).slots)


def test_a_file_that_is_not_whole(tmp_path):
    weights = weights_of(small(VQGAN, True))
    del weights["decoder.ffn.0.bias"]
    weights["mystery"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"(?s)missing: decoder.ffn.0.bias \(32,\).*unexpected: mystery \(3,\)"):
        imgtok.load(write(tmp_path / "x.pth", weights))
    del weights["mystery"], weights["pre_quantizer_mlp.weight"]
    with pytest.raises(ValueError, match="x.pth: not a whole KARL: it lacks 'pre_quantizer_mlp.weight'"):
        imgtok.load(write(tmp_path / "x.pth", weights))


def test_the_weights_of_one_autoencoder_under_the_other(tmp_path):
    """A checkpoint for a VAE whose autoencoder was exchanged: patches leave another number of channels."""
    weights = weights_of(small(VAE, False))
    wide = MaskGITVQGANConfig(latent_channels=8, vocab_size=16, block_channels=(32, 32), layers_per_block=1)
    other = {name: value for name, value in weights_of(small(wide, False)).items() if name.startswith("base_tok")}
    mixed = {name: value for name, value in weights.items() if not name.startswith("base_tok")} | other
    with pytest.raises(
        ValueError, match=r"another shape: patch_embed.weight is \(28, 3, 2, 2\) in the file, \(24, 3, 2, 2\)"
    ):
        imgtok.load(write(tmp_path / "x.pth", mixed))


def test_sizes_whose_heads_are_not_known(tmp_path, monkeypatch):
    path = write(tmp_path / "x.pth", weights_of(small(VQGAN, True)))
    monkeypatch.setattr(published, "HEADS", {(512, 8): 8})
    with pytest.raises(
        ValueError, match="encoder has width 32 and depth 2, and the number of heads is in no file; .*512 x"
    ):
        imgtok.load(path)


def test_a_file_that_would_run_code(tmp_path):
    torch.save({"ema": weights_of(small(VQGAN, True)), "args": print}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="imgtok runs no code from a file"):
        imgtok.load(tmp_path / "x.pth")


def test_the_vqgan_alone(tmp_path):
    torch.manual_seed(0)
    model = MaskGITVQGAN(VQGAN).eval()
    names = published.autoencoder_names(model)
    weights = {names[name]: value for name, value in model.state_dict().items()}
    torch.save({"state_dict": weights | {"loss.logvar": torch.zeros(1)}}, tmp_path / "vqgan.ckpt")
    found = resolve(tmp_path / "vqgan.ckpt")
    assert (found.layout, found.kind) == ("maskgit_vqgan", "maskgit_vqgan")
    loaded = imgtok.load(tmp_path / "vqgan.ckpt")
    assert loaded.config == VQGAN
    assert loaded.fingerprint() == model.fingerprint()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))
    del weights["encoder.mid.block_1.norm1.weight"]
    torch.save(weights, tmp_path / "vqgan.ckpt")
    with pytest.raises(ValueError, match=r"missing: encoder.mid.block_1.norm1.weight \(32,\)"):
        imgtok.load(tmp_path / "vqgan.ckpt")
