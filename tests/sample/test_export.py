"""`imgtok export` from one layout into another; the methods' own tests are in tests/imgtok and tests/generators."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

import imgtok
from imgtok.cli import main
from imgtok.generators.conditioning import ClassSlot
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.published.kl16 import is_kernel, published_name
from imgtok.tokenizers.vae import VAE, VAEConfig

SMALL = VAEConfig(latent_channels=3, block_channels=(32, 64), layers_per_block=1, encoder_attention=True)


@pytest.fixture(autouse=True)
def vae(tmp_path, monkeypatch) -> VAE:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    vae = VAE(SMALL).eval()
    vae.save_pretrained("ours")
    return vae


def test_an_autoencoder_for_diffusers_and_back(vae):
    assert main(["export", "ours", "out=theirs"]) == 0
    assert sorted(path.name for path in Path("theirs").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    theirs = AutoencoderKL.from_pretrained("theirs")  # their own loader takes it
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(theirs.encode(images).latent_dist.mean, vae.encode(images), atol=1e-6)
    assert main(["export", "theirs", "out=again", "layout=imgtok"]) == 0
    assert imgtok.load("again").config == SMALL
    assert imgtok.load("again").fingerprint() == vae.fingerprint()


@pytest.mark.parametrize(("layout", "weights"), [
    ("imgtok", "model.safetensors"), ("published", "diffusion_pytorch_model.safetensors"),
])  # fmt: skip
def test_another_model_is_not_replaced(vae, capsys, layout, weights):
    arguments = ["export", "ours", f"layout={layout}", "out=there"]
    assert main(arguments) == 0
    assert main(arguments) == 0  # the same model replaces itself
    before = Path("there", weights).read_bytes()
    VAE(SMALL).save_pretrained("ours")  # which was trained further
    assert main(arguments) == 2
    assert "out: there holds another model; choose another place with out=PATH, or delete it" in capsys.readouterr().err
    assert Path("there", weights).read_bytes() == before
    assert main([*arguments[:-1], "out=elsewhere"]) == 0
    shutil.rmtree("there")
    assert main(arguments) == 0


def test_a_lone_file_becomes_a_folder(vae):
    names = {name: published_name(name, 2) for name in vae.autoencoder.state_dict()}
    tensors = {names[name]: value for name, value in vae.autoencoder.state_dict().items()}
    tensors = {name: value[..., None, None] if is_kernel(name) else value for name, value in tensors.items()}
    torch.save({"model": tensors, "ema": {name: value + 1 for name, value in tensors.items()}}, "kl16.ckpt")
    assert main(["export", "kl16.ckpt", "out=plain", "layout=imgtok", "raw=true"]) == 0
    assert imgtok.load("plain").fingerprint() == vae.fingerprint()
    assert main(["export", "kl16.ckpt", "out=averaged", "layout=imgtok"]) == 0
    assert imgtok.load("averaged").fingerprint() != vae.fingerprint()


def test_models_that_no_published_code_knows(capsys):
    GPT(
        GPTConfig(vocab_size=4, num_tokens=4, width=8, depth=1, num_heads=1, condition=ClassSlot(num_classes=2))
    ).save_pretrained("gpt")
    capsys.readouterr()
    for arguments, message in (
        (["gpt", "out=x"], "a GPT (kind 'gpt') cannot be written in a published layout; that is known for models of "
         "kind vae, dcae, flextok, xar, tokenbridge"),
        (["gpt", "out=x", "layout=imgtok", "raw=true"], "holds one set of weights"),
        (["ours", "out=x", "vae=ours", "layout=imgtok"], "vae: a VAE is given no autoencoder"),
        (["gpt", "out=x", "vae=gpt", "layout=imgtok"], "holds a GPT (kind 'gpt'), but an autoencoder is needed here"),
    ):  # fmt: skip
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not Path("x").exists()
    assert json.loads(Path("gpt/config.json").read_text())["kind"] == "gpt"
