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
from imgtok.generators.gpt import GPTConfig
from imgtok.groups import each
from imgtok.losses.adversarial import PatchDiscriminator, adversarial_loss, discriminator_loss
from imgtok.tokenizers.base import Losses, Reconstruction
from imgtok.train.loop import ParameterGroup, Trainer
from imgtok.vision import lite0

DATA = ["data={kind: shapes, num_images: 64}"]
TRAINING = ["training={steps: 2, batch_size: 4, learning_rate: 1e-3, trackers: [], ema: 0.5, log_every: 1}"]


class JudgedTok(toy.ToyTok):
    """The toy tokenizer as one whose reconstructions the job judges."""

    reconstructs = True

    def forward(self, images, *, generator):
        parts = super().forward(images, generator=generator).parts
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


def test_tokens_with_lengths_and_slots_of_their_own(tmp_path, capsys):
    assert train("tokenizer", tmp_path / "tokenizer", *DATA, "model.kind=toytok", "num_preview=2") == 0
    tokenizer = tmp_path / "tokenizer/final"
    assert isinstance(imgtok.load(tokenizer), toy.ToyTok)
    assert main(["cache", f"tokenizer={tokenizer}", f"out={tmp_path / 'tokens'}", *DATA]) == 0
    model = ["model={kind: gpt, width: 16, depth: 1, num_heads: 2, mlp_multiple: 8}"]
    inputs = [f"tokens={tmp_path / 'tokens'}", f"tokenizer={tokenizer}", "num_preview=2", *model]
    assert train("generator", tmp_path / "gpt", *inputs) == 0
    config = imgtok.load(tmp_path / "gpt/final").config
    assert (config.vocab_size, config.num_tokens, config.ends, config.num_slots) == (16, 16, True, 16)
    head = "model.head={digits: [4, 4], width: 8, depth: 1, num_heads: 2}"
    assert train("generator", tmp_path / "digits", *inputs, head) == 0
    assert imgtok.load(tmp_path / "digits/final").config.digits == (4, 4)
    assert train("generator", tmp_path / "wrong", *inputs, head, "model.head.digits=[4, 5]") == 2
    assert (
        "model: head.digits: [4, 5] make 20 ids, but vocab_size is 16, [4, 4] would make those"
        in capsys.readouterr().err
    )


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


@pytest.mark.usefixtures("lite0_weights")
def test_reconstructions_of_a_tokenizer_are_judged_by_a_perceptual_distance(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(hub.TOKENIZERS, "toytok", f"{__name__}:JudgedTok")
    words = ["model.kind=toytok", "num_preview=0", "loss.perceptual=lite0"]
    assert train("tokenizer", tmp_path / "judged", *DATA, *words, "model.image_size=32") == 0
    assert all(line["loss/lite0"] > 0 for line in lines(tmp_path / "judged"))
    saved = load_file(tmp_path / "judged/checkpoints/step_0000002/model.safetensors")
    assert saved.keys() == {f"model.{name}" for name in load_file(tmp_path / "judged/final/model.safetensors")}
    elsewhere = f"data={{kind: folder, path: {tmp_path / 'no-images'}}}"
    assert train("tokenizer", tmp_path / "small", *words, elsewhere) == 2
    assert "loss.perceptual=lite0 needs images of at least 32 pixels a side, given" in capsys.readouterr().err
    monkeypatch.setattr(lite0, "_packaged", lambda: None)
    assert train("tokenizer", tmp_path / "absent", *words, elsewhere, "model.image_size=32") == 2
    assert "loss.perceptual=lite0: the weights of efficientnet-lite0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("vae=shapes32", "vae: a ToyTok stands on no autoencoder; leave vae out"),
        ("checkpoint_activations=true", "checkpoint_activations: ToyTok keeps its activations; leave it out"),
        ("loss={}", "loss: a ToyTok has losses of its own alone; leave loss out"),
        ("model.sise=3", "model has no field 'sise'"),
        (
            "model.kind=vae",
            "model.kind: given 'vae', must be one of 'flextok', 'karl', 'tokenbridge_tokenizer', 'vq', 'toytok'",
        ),
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

    words = ["out=x", "data.kind=shapes", "training={steps: 1, batch_size: 1, learning_rate: 1e-3}"]
    assert load(Config, None, [*words, "model.kind=toytok"]).model.over() == toy.ToyTokConfig()
    with pytest.raises(ModuleNotFoundError):
        load(Config, None, [*words, "model.kind=broken"])


# ------------------------------------------------------------------------------- a training module of its own


class Rivals(nn.Module):
    """The toy autoencoder against two discriminators, in turn; they learn at each third step, from `start` on."""

    def __init__(self, model: toy.ToyAE, start: int) -> None:
        super().__init__()
        self.model, self.start = model, start
        self.rivals = nn.ModuleList(PatchDiscriminator(4, 1, "batch") for _ in range(2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images, *, generator, perceptual=None):
        decoded, own = self.model(images, generator=generator)
        rival = self.rivals[int(torch.randint(2, (), generator=generator))]
        error = (decoded - images).abs().mean()
        weight = torch.where(self.seen < 4, 0.2, 0.8) * (self.seen >= self.start)
        fooled, caught = adversarial_loss(rival, decoded), discriminator_loss(rival, images, decoded)
        self.seen += 1
        return Losses(error + own.total + weight * fooled + caught, {"error": error, "caught": caught, **own.parts})

    def groups(self):
        its_turn = each(3)
        model = ParameterGroup(
            name="model",
            parameters=list(self.model.parameters()),
            due=lambda step: step < self.start or not its_turn(step),
        )
        rivals = ParameterGroup(
            name="rivals",
            parameters=list(self.rivals.parameters()),
            due=lambda step: step >= self.start and its_turn(step),
            averaged=False,
        )
        return [model, rivals]


class RivalAE(toy.ToyAE):
    """The toy autoencoder with a way to be trained of its own."""

    def for_training(self, loss, accumulate):
        return Rivals(self, start=2 * accumulate)


def test_an_autoencoder_brings_its_own_training_module(tmp_path, monkeypatch):
    monkeypatch.setitem(hub.AUTOENCODERS, "toyae", f"{__name__}:RivalAE")
    moved = []
    clip = Trainer.clip

    def watched(self, step):
        found = clip(self, step)
        moved.append([name for name, p in self.job.model.named_parameters() if p.grad is not None])
        return found

    monkeypatch.setattr(Trainer, "clip", watched)
    words = [*DATA, "image_size=16", "model.kind=toyae", "num_preview=0", "training.save_every=1"]
    words += ["training.schedule=constant", "training.warmup=0"]
    assert train("autoencoder", tmp_path / "whole", *words, "training.steps=7") == 0
    players = [{name.split(".")[0] for name in step} for step in moved]
    assert players == [{"model"}, {"model"}, {"rivals"}, {"model"}, {"model"}, {"rivals"}, {"model"}]
    assert train("autoencoder", tmp_path / "part", *words, "training.steps=4") == 0
    assert train("autoencoder", tmp_path / "part", *words, "training.steps=7") == 0
    for name in ("model.safetensors", "ema.safetensors"):
        whole, part = (load_file(tmp_path / run / "checkpoints/step_0000007" / name) for run in ("whole", "part"))
        assert whole.keys() == part.keys()
        assert all(torch.equal(value, part[key]) for key, value in whole.items())
    assert not any(key.startswith("rivals") for key in whole)
    assert isinstance(imgtok.load(tmp_path / "part/final"), RivalAE)


def test_repa_and_judged_reconstructions_are_refused_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(hub.TOKENIZERS, "toytok", f"{__name__}:JudgedTok")
    words = [*DATA, "model.kind=toytok", "num_preview=0", "repa={weights: no.safetensors}"]
    assert train("tokenizer", tmp_path, *words) == 2
    assert "repa: a JudgedTok is trained by its reconstructions; leave repa out" in capsys.readouterr().err


class Still(toy.ToyTok):
    """A tokenizer that has nothing to learn."""

    def __init__(self, config: toy.ToyTokConfig) -> None:
        super().__init__(config)
        self.requires_grad_(False)

    def facts(self):
        return {"table": (0.5, 1.0)}


def test_a_tokenizer_that_has_nothing_to_learn(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(hub.TOKENIZERS, "toytok", f"{__name__}:Still")
    words = [*DATA, "model.kind=toytok", "num_preview=2"]
    assert train("tokenizer", tmp_path / "run", *words, "training.steps=0") == 0
    assert isinstance(imgtok.load(tmp_path / "run/final"), Still)
    assert train("tokenizer", tmp_path / "other", *words) == 2
    assert "the model has no trainable parameter" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tokenizer", "without", "name"),
    [("ToyTok", "num_slots", "num_slots = 16"), ("ToyTok", "ends", "ends = True"), ("Still", "", "table = (0.5, 1.0)")],
)
def test_a_generator_that_cannot_be_told_a_fact(tmp_path, monkeypatch, capsys, tokenizer, without, name):
    module = __name__ if tokenizer == "Still" else toy.__name__
    monkeypatch.setitem(hub.TOKENIZERS, "toytok", f"{module}:{tokenizer}")
    made = tmp_path / "tokenizer/final"
    train("tokenizer", tmp_path / "tokenizer", *DATA, "model.kind=toytok", "num_preview=0", "training.steps=0")
    main(["cache", f"tokenizer={made}", f"out={tmp_path / 'tokens'}", *DATA])
    fields = {key: value for key, value in GPTConfig.__dataclass_fields__.items() if key != without}
    monkeypatch.setattr(GPTConfig, "__dataclass_fields__", fields)
    words = [f"tokens={tmp_path / 'tokens'}", f"tokenizer={made}", "model={kind: gpt, width: 16, num_heads: 2}"]
    assert train("generator", tmp_path / "gpt", *words) == 2
    assert f"tokens: they have {name}, and model.kind=gpt has no such field" in capsys.readouterr().err
