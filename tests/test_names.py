"""Lone published files go through the programs as folders do: nothing has to be exported first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import imgtok
from imgtok.cli import main
from imgtok.generators.published import xar
from imgtok.generators.xar import XAR, XARConfig
from imgtok.published import diffusers, flextok
from imgtok.published.kl16 import is_kernel, published_name
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokenizers.vae import VAE, VAEConfig

SMALL = VAEConfig(latent_channels=3, block_channels=(32, 32), layers_per_block=1, scaling_factor=0.2325)
DATA = ("data.kind=shapes", "data.num_images=40", "image_size=32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`kl16.ckpt`, `xAR.pth`, `flextok.safetensors` (the shape of its autoencoder is beside it), `vae` of diffusers."""
    folder = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    vae = VAE(SMALL).eval()
    tensors = {published_name(name, 2): value for name, value in vae.autoencoder.state_dict().items()}
    tensors = {name: value[..., None, None] if is_kernel(name) else value for name, value in tensors.items()}
    torch.save({"model": tensors}, folder / "kl16.ckpt")
    diffusers.save(vae, folder / "vae")
    xar.save(XAR(XARConfig(latent_channels=3, width=64, depth=1, num_heads=1)), folder / "xAR.pth")
    trunk = TrunkConfig(width=32, depth=1, head_dim=16)
    config = FlexTokConfig(image_size=32, vae=SMALL, num_registers=4, levels=(4, 3), encoder=trunk, decoder=trunk)
    flextok.save(FlexTok(config), folder / "made")
    (folder / "made/model.safetensors").rename(folder / "flextok.safetensors")
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)


def test_a_generator_and_its_autoencoder(folder):
    arguments = ["num=1", "sampling.steps=[2]", "grid=0", "out=drawn"]
    assert main(["sample", "xAR.pth", "tokenizer=kl16.ckpt", *arguments]) == 0
    assert Path("drawn/000000.png").is_file()
    pipe = imgtok.pipeline("xAR.pth", tokenizer="vae")
    assert pipe(classes=[3], steps=2)[0].size == (32, 32)
    with pytest.raises(FileNotFoundError, match=r"xAR\.pth has no tokenizer/ folder: say which one with tokenizer="):
        imgtok.pipeline("xAR.pth")


def test_sampling_reads_each_description_once(monkeypatch):
    assert main(["export", "xAR.pth", "vae=kl16.ckpt", "out=both", "layout=imgtok"]) == 0
    reads: list[str] = []
    text = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **options: reads.append(str(path)) or text(path, **options))
    assert main(["sample", "both", "num=1", "sampling.steps=[2]", "grid=0", "out=once"]) == 0
    assert [path for path in reads if path.endswith("config.json")] == [
        "both/config.json",
        "both/tokenizer/config.json",
    ]


@pytest.mark.parametrize("name", ["kl16.ckpt", "vae"])
def test_an_autoencoder_alone(name):
    assert main(["cache", "latents", f"vae={name}", f"out=latents-{name}", "held_out=0.2", *DATA]) == 0
    assert main(["reconstruct", name, f"out=again-{name}", "num=2", *DATA]) == 0
    assert json.loads(Path(f"again-{name}/rates.json").read_text())["rates"]


def test_a_tokenizer(folder):
    tokens = [argument for argument in DATA if not argument.startswith("image_size")]
    assert main(["cache", "flextok.safetensors", "out=tokens", "held_out=0.2", *tokens]) == 0
    assert main(["reconstruct", "flextok.safetensors", "out=again", "num=2", "decoding.steps=2", *tokens]) == 0
    assert list(json.loads(Path("again/rates.json").read_text())["rates"]) == ["1", "2", "4"]


def test_each_says_what_it_needs(capsys):
    for arguments, message in (
        (["sample", "kl16.ckpt"], "kl16.ckpt holds a published VAE, but a generator is needed here"),
        (["cache", "vae", "out=x"], "vae holds a published VAE, but a tokenizer is needed here"),
        (["cache", "latents", "vae=xAR.pth", "out=x", *DATA], "xAR.pth holds a published XAR, but a"),
        (["sample", "xAR.pth", "tokenizer=flextok.safetensors"], "holds a published FlexTok, but an autoencoder is"),
        (["sample", "xAR-L.pth"], "xAR-L.pth: no such file of weights; did you mean xAR.pth?"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_weights_of_a_method_that_is_not_here(capsys):
    save_file({"z_proj.weight": torch.zeros(2, 2), "mask_token": torch.zeros(2)}, "mar.safetensors")
    assert main(["info", "mar.safetensors"]) == 2
    assert "mar.safetensors: weights of no model that imgtok reads a lone file of" in capsys.readouterr().err
