"""Training of methods that no program knows (tests/toy.py): what the jobs ask of a model, and what they say where it
has none of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import toy

import imgtok
from imgtok import hub
from imgtok.cli import main
from imgtok.tokenizers.base import Losses, Reconstruction

DATA = ["data={kind: shapes, num_images: 64}"]
TRAINING = ["training={steps: 2, batch_size: 4, learning_rate: 1e-3, trackers: [], ema: 0.5, log_every: 1}"]


class JudgedTok(toy.ToyTok):
    """The toy tokenizer as one whose reconstructions the job judges."""

    reconstructs = True

    def forward(self, images, *, generator):
        _, parts = super().forward(images, generator=generator)
        patches = toy.patchify(images, self.config.patch_size)
        side = self.config.image_size // self.config.patch_size
        decoded = self.decoder(self.quantizer(self.encoder(patches)))
        own = self.blank.square().mean()
        images = toy.unpatchify(decoded, self.config.patch_size, side, side)
        return Reconstruction(images, Losses(own, {"blank": own, **parts}))

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decoder.weight


@pytest.fixture(autouse=True)
def known(monkeypatch):
    toy.enter(monkeypatch)


def train(what: str, out: Path, *words: object) -> int:
    return main(["train", what, f"out={out}", *TRAINING, *map(str, words)])


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_tokens_with_lengths_and_slots_of_their_own(tmp_path):
    assert train("tokenizer", tmp_path / "tokenizer", *DATA, "model.kind=toytok", "num_preview=2") == 0
    tokenizer = tmp_path / "tokenizer/final"
    assert isinstance(imgtok.load(tokenizer), toy.ToyTok)
    assert main(["cache", f"tokenizer={tokenizer}", f"out={tmp_path / 'tokens'}", *DATA]) == 0
    model = ["model={kind: gpt, width: 16, depth: 1, num_heads: 2, mlp_multiple: 8}"]
    inputs = [f"tokens={tmp_path / 'tokens'}", f"tokenizer={tokenizer}", "num_preview=2", *model]
    assert train("generator", tmp_path / "gpt", *inputs) == 0
    config = imgtok.load(tmp_path / "gpt/final").config
    assert (config.vocab_size, config.num_tokens, config.ends, config.num_slots) == (16, 16, True, 16)


def test_a_fact_of_tokens_that_is_contradicted(tmp_path, capsys):
    train("tokenizer", tmp_path / "tokenizer", *DATA, "model.kind=toytok", "num_preview=0", "training.steps=0")
    tokenizer = tmp_path / "tokenizer/final"
    main(["cache", f"tokenizer={tokenizer}", f"out={tmp_path / 'tokens'}", *DATA])
    words = [f"tokens={tmp_path / 'tokens'}", f"tokenizer={tokenizer}", "model={kind: gpt, width: 16, num_heads: 2}"]
    assert train("generator", tmp_path / "gpt", *words, "model.ends=false") == 2
    assert "model.ends: given false, but the data in" in capsys.readouterr().err
    assert train("generator", tmp_path / "gpt", *words, "share_digits=true", "model.levels=[2, 8]") == 2
    assert "share_digits: the tokenizer's ids have no digits" in capsys.readouterr().err


def test_an_autoencoder_and_a_generator_of_its_latents(tmp_path):
    loss = "loss={adversarial: 0.1, adaptive: last_layer, discriminator_channels: 8, discriminator_layers: 2}"
    words = [*DATA, "image_size=16", "model.kind=toyae", loss, "num_preview=2"]
    assert train("autoencoder", tmp_path / "ae", *words) == 0
    autoencoder = tmp_path / "ae/final"
    assert imgtok.load(autoencoder).config.scaling_factor != 1
    assert {"loss/size", "loss/adaptive_weight", "loss/discriminator"} <= lines(tmp_path / "ae")[0].keys()
    assert main(["cache", "latents", str(autoencoder), f"out={tmp_path / 'latents'}", "image_size=16", *DATA]) == 0
    model = "model={kind: xar, width: 16, depth: 1, num_heads: 2, entities: {kind: cell, height: 4, width: 4}}"
    sampling = ["model.sampling={steps: [2]}", "sampling={steps: [3]}", "num_preview=2"]
    inputs = [f"latents={tmp_path / 'latents'}", f"tokenizer={autoencoder}", model, *sampling]
    assert train("generator", tmp_path / "xar", *inputs) == 0
    assert imgtok.load(tmp_path / "xar/final/tokenizer").fingerprint() == imgtok.load(autoencoder).fingerprint()


def test_reconstructions_of_a_tokenizer_are_judged(tmp_path, monkeypatch):
    monkeypatch.setitem(hub.TOKENIZERS, "toytok", f"{__name__}:JudgedTok")
    loss = ["loss={adversarial: 0.1, discriminator_channels: 8, discriminator_layers: 2, discriminator_every: 2}"]
    words = [*DATA, "model.kind=toytok", "num_preview=0"]
    assert train("tokenizer", tmp_path / "judged", *words, *loss) == 0
    assert {"loss/blank", "loss/l1", "loss/adversarial"} <= lines(tmp_path / "judged")[0].keys()
    assert (
        imgtok.load(tmp_path / "judged/final").state_dict().keys() == JudgedTok(toy.ToyTokConfig()).state_dict().keys()
    )
    averaged = load_file(tmp_path / "judged/checkpoints/step_0000002/ema.safetensors")
    assert not any("discriminator" in name for name in averaged)
    assert train("tokenizer", tmp_path / "plain", *words) == 0
    assert "loss/l1" in lines(tmp_path / "plain")[0]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("vae=shapes32", "vae: a ToyTok stands on no autoencoder; leave vae out"),
        ("checkpoint_activations=true", "checkpoint_activations: ToyTok keeps its activations; leave it out"),
        ("loss={}", "loss: a ToyTok has losses of its own alone; leave loss out"),
        ("model.sise=3", "model has no field 'sise'"),
        ("model.kind=vae", "model.kind: given 'vae', must be one of 'flextok', 'toytok'"),
    ],
)
def test_what_a_tokenizer_does_not_have_is_said(tmp_path, capsys, word, message):
    assert train("tokenizer", tmp_path, *DATA, "model.kind=toytok", "num_preview=0", word) == 2
    assert message in capsys.readouterr().err


def test_repa_wants_blocks_to_look_at(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    hub.write_tensors(timm.create_model("test_vit").state_dict(), path, {})
    repa = f"repa={{weights: {path}, encoder: test_vit, image_size: 32}}"
    assert train("tokenizer", tmp_path / "out", *DATA, "model.kind=toytok", "num_preview=0", repa) == 2
    assert "repa: a ToyTok shows none of its blocks; leave repa out" in capsys.readouterr().err


def test_only_the_chosen_kind_is_imported(monkeypatch):
    monkeypatch.setitem(hub.TOKENIZERS, "broken", "imgtok.no_such_module:Class")
    from imgtok.config import load
    from imgtok.train.tokenizer import Config

    words = ["out=x", "training={steps: 1, batch_size: 1, learning_rate: 1e-3}"]
    assert load(Config, None, [*words, "model.kind=toytok"]).model.over() == toy.ToyTokConfig()
    with pytest.raises(ModuleNotFoundError):
        load(Config, None, [*words, "model.kind=broken"])
