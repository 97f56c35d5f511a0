"""`init`: training starts from our models and from published files, and every tensor that does not fit is named."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import imgtok
from imgtok.config import ConfigError, load
from imgtok.generators.conditioning import ClassModulation
from imgtok.generators.published import xar as published_xar
from imgtok.generators.xar import XAR, FlowSampling, XARConfig
from imgtok.published import flextok as published_flextok
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, TrunkConfig
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.train import autoencoder, cache_latents, cache_tokens, generator, tokenizer

TINY = Path(__file__).parents[2] / "configs/tiny"
QUIET = ["training.preview_every=0", "training.trackers=[]", "num_preview=0", "training.ema=0"]
TRUNK = TrunkConfig(width=16, depth=1, head_dim=8)
SMALL = FlexTokConfig(image_size=16, patch_size=4, num_registers=4, levels=(4, 4), encoder=TRUNK, decoder=TRUNK)


def train(job, name: str, out: Path, *overrides: str) -> Path:
    job.main(load(job.Config, TINY / f"{name}.yaml", [f"out={out}", *QUIET, *overrides]))
    return out / "final"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tokenizer with its tokens, and a generator of them with its configuration alone worth a look."""
    folder = tmp_path_factory.mktemp("made")
    train(tokenizer, "flextok", folder / "tokenizer")
    words = (f"out={folder / 'tokens'}", f"tokenizer={folder / 'tokenizer/final'}")
    cache_tokens.main(load(cache_tokens.Config, TINY / "cache.yaml", words))
    train(generator, "gpt", folder / "gpt", *inputs(folder), "model.dropout=0.3")
    return folder


def inputs(folder: Path) -> list[str]:
    return [f"tokens={folder / 'tokens'}", f"tokenizer={folder / 'tokenizer/final'}"]


def go_on(made: Path, out: Path, *overrides: str) -> Path:
    """`train generator` from the generator in `made`, with no `model` in the file."""
    training = ["training={steps: 1, batch_size: 4, learning_rate: 1e-3}"]
    words = [f"out={out}", *inputs(made), f"init={made / 'gpt/final'}", *training, *QUIET, *overrides]
    generator.main(load(generator.Config, None, words))
    return out / "final"


# ------------------------------------------------------------------------------------------------ from ours


def test_no_steps_from_a_model_leave_that_model(made, tmp_path):
    final = go_on(made, tmp_path, "training.steps=0")
    assert same(weights(final), weights(made / "gpt/final"))
    assert imgtok.load(final).config == imgtok.load(made / "gpt/final").config


def test_a_step_from_a_model_moves_that_model_and_draws_as_a_fresh_run_does(made, tmp_path):
    moved, again = go_on(made, tmp_path / "a"), go_on(made, tmp_path / "b")
    start, end = weights(made / "gpt/final"), weights(moved)
    assert same(end, weights(again))
    assert not same(start, end)
    assert all((end[name] - start[name]).abs().max() < 0.01 for name in start), "one step of AdamW"


def test_fields_that_are_given_replace_those_of_the_model(made, tmp_path):
    config = imgtok.load(go_on(made, tmp_path, "model.dropout=0.0", "training.steps=0")).config
    assert config == replace(imgtok.load(made / "gpt/final").config, dropout=0.0)


def test_what_may_be_new_starts_as_in_a_fresh_run(made, tmp_path):
    deeper = ["model.depth=3", "training.steps=0", "init_new=[blocks.2.*]"]
    found, stored = weights(go_on(made, tmp_path / "deeper", *deeper)), weights(made / "gpt/final")
    fresh = weights(train(generator, "gpt", tmp_path / "fresh", *inputs(made), "model.depth=3", "training.steps=0"))
    for name, value in found.items():
        assert torch.equal(value, fresh[name] if name.startswith("blocks.2.") else stored[name]), name


def test_the_tensors_that_do_not_fit_are_named_with_what_to_do(made, tmp_path):
    with pytest.raises(ValueError, match=r"init: the weights in .*gpt/final do not fit") as error:
        go_on(made, tmp_path, "model.depth=1", "model.condition={kind: start_plus_class}", "model.mlp_multiple=16")
    text = str(error.value)
    assert "missing: start (16,); init_new=start starts it afresh" in text
    assert "too many: blocks.1.attention.out_proj.weight (16, 16); init_drop=blocks" in text
    assert "another shape: class_embedding.weight is (65, 16) there and (64, 16) here; change the model's" in text
    assert "init_new=class_embedding.weight starts it afresh" in text
    words = ["init_new=[start,class_embedding.weight]", "init_drop=[blocks.1.*]", "model.depth=1"]
    go_on(made, tmp_path, *words, "model.condition={kind: start_plus_class}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["init_new=[head]"], r"init_new: 'head' fits no tensor of the model to train; it has "),
        (["init_drop=[tail.*]"], r"init_drop: 'tail.\*' fits no tensor of .*gpt/final; it has "),
        (["model.kind=xar"], r"model.kind=xar learns from latents|latents: is required with model.kind=xar"),
        (["model.vocab_size=16384"], r"model.vocab_size: given 16384, but the data in .* decides it: 16"),
        (["model.width=15"], r"width: 15 is not a multiple of num_heads = 2"),
    ],
)
def test_what_contradicts_is_refused(made, tmp_path, words, message):
    with pytest.raises(ConfigError if "vocab" in message or "width" in message else ValueError, match=message):
        go_on(made, tmp_path, *words)


def test_a_tokenizer_is_no_start_for_a_generator(made, tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer/final holds a FlexTok .*but a generator is needed here"):
        go_on(made, tmp_path, f"init={made / 'tokenizer/final'}")


def test_a_run_from_a_model_that_was_interrupted_does_not_start_again_from_it(made, tmp_path):
    words = ["training.steps=3", "training.save_every=1"]
    whole = go_on(made, tmp_path / "whole", *words)
    part = tmp_path / "part"
    go_on(made, part, "training.steps=2", "training.save_every=1", "training.schedule=constant")
    end = go_on(made, part, *words, "training.schedule=constant")
    assert imgtok.load(end).config == imgtok.load(whole).config
    straight = go_on(made, tmp_path / "straight", *words, "training.schedule=constant")
    assert same(weights(end), weights(straight))


def test_an_autoencoder_starts_from_one(tmp_path):
    first = train(autoencoder, "vae", tmp_path / "first")
    words = [f"init={first}", "image_size=16", "training={steps: 0, batch_size: 4, learning_rate: 1e-3}"]
    data = "data={kind: shapes, num_images: 64}"
    config = load(autoencoder.Config, None, [f"out={tmp_path / 'second'}", data, *words, *QUIET])
    autoencoder.main(config)
    assert same(weights(tmp_path / "second/final"), weights(first))
    with pytest.raises(ValueError, match="image_size: 15 is not a multiple of 2"):
        autoencoder.main(replace(config, image_size=15))


def test_a_given_field_at_its_default_is_stronger_than_the_start(tmp_path):
    first = train(autoencoder, "vae", tmp_path / "first", "model.kl_weight=1e-3", "training.steps=0")
    words = [f"init={first}", "image_size=16", "training={steps: 0, batch_size: 4, learning_rate: 1e-3}", *QUIET]
    words += ["data={kind: shapes, num_images: 64}", "model={kind: vae, kl_weight: 1e-6}"]
    autoencoder.main(load(autoencoder.Config, None, [f"out={tmp_path / 'second'}", *words]))
    assert imgtok.load(first).config.kl_weight == 1e-3
    assert imgtok.load(tmp_path / "second/final").config.kl_weight == 1e-6


def test_a_run_that_has_checkpoints_does_not_read_its_start_again(tmp_path, monkeypatch):
    first = train(autoencoder, "vae", tmp_path / "first", "model.kl_weight=1e-3")
    init, data = f"init={first}", "data={kind: shapes, num_images: 64}"

    def run(out: str, steps: int, *more: str) -> Path:
        training = f"training={{steps: {steps}, batch_size: 4, learning_rate: 1e-3, schedule: constant, warmup: 0}}"
        words = [f"out={tmp_path / out}", data, "image_size=16", init, training, *QUIET, *more]
        autoencoder.main(load(autoencoder.Config, None, words))
        return tmp_path / out / "final"

    whole = run("whole", 3)
    run("part", 2)
    first.rename(tmp_path / "gone")
    assert same(weights(run("part", 3)), weights(whole))
    with pytest.raises(ValueError, match="this run was started with model.kl_weight = 0.001, and .* = 0.1 is asked"):
        run("part", 4, "model.kl_weight=0.1", "model.kind=vae")
    with pytest.raises(FileNotFoundError, match="first/final"):
        run("another", 1)


def test_the_autoencoder_of_the_start_is_not_rescaled_in_silence(tmp_path):
    torch.manual_seed(5)
    vae = VAEConfig(latent_channels=3, block_channels=(8, 8), layers_per_block=1, norm_groups=4, scaling_factor=0.25)
    FlexTok(replace(SMALL, patch_size=2, vae=vae)).save_pretrained(tmp_path / "first")
    words = [f"init={tmp_path / 'first'}", "data={kind: shapes, num_images: 64}", "model.kind=flextok", *QUIET]
    words += [f"out={tmp_path / 'run'}", "training={steps: 0, batch_size: 4, learning_rate: 1e-3}"]
    with pytest.raises(
        ConfigError, match=r"model.vae: given .* but the model .*first, whose frozen autoencoder is kept"
    ):
        tokenizer.main(load(tokenizer.Config, None, [*words, "model.vae={scaling_factor: 0.5}"]))
    tokenizer.main(load(tokenizer.Config, None, [*words, "model.vae={scaling_factor: 0.25}"]))
    assert imgtok.load(tmp_path / "run/final").config.vae == vae


# ------------------------------------------------------------------------------------------ published layouts


def test_a_step_from_a_tokenizer_in_its_published_layout(tmp_path):
    torch.manual_seed(5)
    vae = VAEConfig(latent_channels=3, block_channels=(8, 8), layers_per_block=1, norm_groups=4)
    model = FlexTok(replace(SMALL, patch_size=2, vae=vae)).eval()
    (tmp_path / "published").mkdir()
    published_flextok.save(model, tmp_path / "published")
    words = [f"init={tmp_path / 'published'}", "data={kind: shapes, num_images: 64}"]
    training = "training={steps: 1, batch_size: 4, learning_rate: 1e-3}"
    config = load(tokenizer.Config, None, [f"out={tmp_path / 'run'}", *words, training, *QUIET])
    tokenizer.main(config)
    found, start = imgtok.load(tmp_path / "run/final").state_dict(), model.state_dict()
    assert found.keys() == start.keys()
    moved = {name for name in start if not torch.equal(found[name], start[name])}
    assert any(name.startswith("encoder.") for name in moved)
    assert not any(name.startswith("vae.") for name in moved), "the autoencoder stays frozen"
    assert max(float((found[name] - start[name]).abs().max()) for name in start) < 0.01


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """Latents of 16 x 16 positions and 3 channels."""
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    VAE(
        VAEConfig(latent_channels=3, block_channels=(4, 4), layers_per_block=1, norm_groups=2, scaling_factor=0.5)
    ).save_pretrained(folder / "vae")
    fields = {"vae": str(folder / "vae"), "out": folder / "latents", "image_size": 32}
    cache_latents.main(cache_latents.Config(data=ShapesConfig(num_images=16), **fields))
    return folder


def test_a_step_from_a_generator_in_its_published_file(latents, tmp_path, caplog):
    torch.manual_seed(5)
    config = XARConfig(
        latent_channels=3,
        width=32,
        depth=1,
        num_heads=2,
        condition=ClassModulation(),
        sampling=FlowSampling(steps=(2,)),
    )
    model = XAR(config)
    published_xar.save(model, tmp_path / "xAR.pth")
    words = [f"latents={latents / 'latents'}", f"tokenizer={latents / 'vae'}", f"init={tmp_path / 'xAR.pth'}"]
    training = "training={steps: 1, batch_size: 2, learning_rate: 1e-3}"

    def run(*more: str) -> None:
        generator.main(load(generator.Config, None, [f"out={tmp_path / 'run'}", *words, training, *QUIET, *more]))

    with caplog.at_level(logging.INFO):
        run()
    assert "init: class_embedding.weight: 1000 classes there, 64 here, and the classes of one of the two" in caplog.text
    found, start = imgtok.load(tmp_path / "run/final").state_dict(), model.state_dict()
    assert imgtok.load(tmp_path / "run/final").config.num_classes == 64
    same_shape = {name for name in start if found[name].shape == start[name].shape}
    assert start.keys() - same_shape == {"class_embedding.weight"}
    assert 0 < max(float((found[name] - start[name]).abs().max()) for name in same_shape) < 0.01
    none = "class_embedding.weight"
    assert torch.allclose(found[none][-1], start[none][-1], atol=0.01), "the row of no class is kept"
