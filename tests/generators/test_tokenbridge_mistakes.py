"""What `imgtok train generator` says of a TokenBridge and of caches that it cannot learn from: file, field, remedy."""

from __future__ import annotations

from pathlib import Path

import kinds
import numpy as np
import pytest
from kinds import LINES

from imgtok.cli import main

MODEL = "model={kind: tokenbridge, head: {width: 8, depth: 1, num_heads: 1}, encoder: {width: 8, depth: 1, num_heads: 1}, decoder: {width: 8, depth: 1, num_heads: 1}}"  # noqa: E501
TRAINING = "training={steps: 2, batch_size: 2, learning_rate: 1e-3, trackers: []}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An autoencoder with a cache of its latents, and one with other weights."""
    folder = tmp_path_factory.mktemp("mistakes")
    vae = kinds.build(LINES["vae"])
    vae.save_pretrained(folder / "vae")
    vae.requires_grad_(False).autoencoder.decoder.conv_out.bias += 1
    vae.save_pretrained(folder / "other")
    data = ("data.kind=shapes", "data.num_images=8", "image_size=16")
    assert main(["cache", "latents", str(folder / "vae"), f"out={folder / 'latents'}", *data]) == 0
    return folder


@pytest.fixture
def said(folder, monkeypatch, capsys):
    """Trains, which must fail as a user's mistake, and gives what is said."""
    monkeypatch.chdir(folder)

    def train(*words: str, latents: str = "latents") -> str:
        given = [f"latents={latents}", "tokenizer=vae", "out=run", "num_preview=0", MODEL, TRAINING, *words]
        assert main(["train", "generator", *given]) == 2
        return capsys.readouterr().err

    return train


def test_fields(said):
    assert "model.quantizer.levels: given 1, must be an integer between 2 and 4096" in said("model.quantizer.levels=1")
    assert "range: [5.0, -5.0] must be [lower, upper]" in said("model.quantizer.range=5,-5")
    assert "channel_order: [0, 1] must have each of the channels 0 to 3 once" in said("model.channel_order=0,1")
    text = said("model.quantizer.levels=1024")
    assert "levels: 1024 cells of equal probability do not fit" in text
    assert "at most 740 levels, a larger cut, or spacing: uniform" in text


def test_a_cache_of_another_autoencoder_or_scale(said):
    text = said("tokenizer=other")
    assert "latents: latents of another autoencoder, scale or size (fingerprint '" in text
    assert "run `imgtok cache latents` with that one, in a new folder" in text
    assert "scaling_factor 1.0, not 0.5" in said("vae_scaling_factor=0.5")


def test_a_shard_that_is_cut_short(said, folder):
    (shard,) = (folder / "latents").glob("*.safetensors")
    cut = folder / "cut" / shard.name
    cut.parent.mkdir()
    cut.write_bytes(shard.read_bytes()[:-100])
    text = said(latents="cut")
    assert f"cut/{shard.name}" in text
    assert "delete it" in text


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_latents_that_are_not_finite(said, folder, bad):
    """In a cache of MAR's, which nobody checked when it was written."""
    mar = folder / f"mar-{bad}" / "class"
    mar.mkdir(parents=True)
    moments = np.zeros((8, 8, 8), np.float32)
    for number in range(4):
        moments[0, 3, 3] = bad if number == 2 else 0
        np.savez(mar / f"{number}.npz", moments=moments, moments_flip=moments)
    text = said(latents=str(mar.parent))
    assert f"the latent of {mar}/2.npz has numbers that are not finite" in text
    assert "make the cache again, or leave the image out" in text
