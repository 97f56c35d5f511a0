"""`imgtok train generator` with an xAR: what training fills in, what it leaves, what it refuses.

That a run can be interrupted, resumed, sampled from and scored is seen in tests/test_configs.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import imgtok
from imgtok import hub
from imgtok.config import ConfigError, load
from imgtok.data.content import LatentContent
from imgtok.data.sources import DataError
from imgtok.generators.conditioning import TextCrossAttention
from imgtok.generators.entities import Cells
from imgtok.generators.gpt import GPTConfig
from imgtok.generators.xar import XAR, FlowSampling, XARConfig
from imgtok.sample.images import Config as SampleConfig
from imgtok.sample.images import main as sample
from imgtok.sections import Settings
from imgtok.shapes.world import CLASS_NAMES, ShapesConfig
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.train import cache_latents
from imgtok.train.config import TrainingConfig
from imgtok.train.generator import Config, GeneratorJob, main

SMALL = VAEConfig(latent_channels=2, block_channels=(4, 4), layers_per_block=1, norm_groups=2, scaling_factor=0.5)
MODEL = XARConfig(
    grid=4,
    entities=Cells(height=2, width=2),
    width=16,
    depth=1,
    num_heads=2,
    sampling=FlowSampling(steps=(2,), guidance=(1.5,)),
)


TEXT = replace(MODEL, condition=TextCrossAttention())


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with an autoencoder and latents of 16 shapes, 4 x 4 positions."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    VAE(SMALL).save_pretrained(folder / "vae")
    cache_latents.main(
        cache_latents.Config(
            vae=str(folder / "vae"), out=folder / "latents", data=ShapesConfig(num_images=16), image_size=8
        )
    )
    return folder


def job(made: Path, out: Path, **fields) -> Config:
    training = TrainingConfig(steps=2, batch_size=2, learning_rate=1e-3, ema=0.5, save_every=1, trackers=())
    own = {"latents": made / "latents", "tokenizer": str(made / "vae"), "model": MODEL, "num_preview": 2}
    return Config(**{"out": out, "training": training} | own | fields)


def test_what_the_latents_decide_is_filled_in(made, tmp_path):
    main(job(made, tmp_path))
    model = imgtok.load(tmp_path / "final", expect=XAR)
    assert model.config == replace(MODEL, latent_channels=2).with_condition(num_classes=64, classes=CLASS_NAMES)
    vae = imgtok.load(tmp_path / "final/tokenizer", expect=VAE)
    assert vae.fingerprint() == imgtok.load(made / "vae").fingerprint()
    assert (tmp_path / "samples/step_0000002.png").is_file()


def test_activations_computed_again_train_to_the_same_weights(made, tmp_path):
    for name, again in (("kept", False), ("again", True)):
        main(job(made, tmp_path / name, checkpoint_activations=again))
    kept, again = (imgtok.load(tmp_path / name / "final").state_dict() for name in ("kept", "again"))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


# ---------------------------------------------------------------------------------------------- validation

LOOKING = TrainingConfig(steps=2, batch_size=2, learning_rate=1e-3, ema=0.5, trackers=(), validate_every=1)


def held_out_losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["validation/images"], line["validation/loss"]) for line in lines if "validation/loss" in line]


def test_a_share_of_the_cache_is_held_out_and_not_trained_on(made, tmp_path):
    config = job(made, tmp_path, held_out=0.25, training=LOOKING, num_preview=0)
    main(config)
    assert [images for images, _ in held_out_losses(tmp_path)] == [4, 4, 4]
    content = LatentContent(made / "latents", hub.resolve(str(made / "vae")))
    trained = GeneratorJob(config, XAR(MODEL), content, hub.resolve(str(made / "vae")))
    seen = {name for batch in islice(trained.batches(start_step=0, rank=0, world=1), 12) for name in batch.names}
    batch = trained.held_out().batch(range(4), 0)
    assert len(seen) == 12
    assert len(seen | set(batch.names)) == 16
    assert torch.equal(batch.content, trained.held_out().batch(range(4), 0).content)


def test_copies_of_what_is_trained_on_are_named(made, tmp_path):
    (path,) = (made / "latents").glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["moments"][:] = tensors["moments"][0]
    (tmp_path / "latents").mkdir()
    save_file(tensors, tmp_path / "latents" / path.name, about)
    of_copies = {"latents": tmp_path / "latents", "held_out": 0.25, "num_preview": 0}
    with pytest.raises(
        DataError, match=r"held_out: 4 of 4 held-out rows have the latents of rows .*: train\[\d+\] \(as"
    ):
        main(job(made, tmp_path / "run", training=LOOKING, **of_copies))
    main(job(made, tmp_path / "run", training=replace(LOOKING, validate_every=None), **of_copies))


def test_another_cache_is_validated_on_and_must_be_of_other_images(made, tmp_path):
    common = {"vae": str(made / "vae"), "image_size": 8}
    for name, data, split in (
        ("val", ShapesConfig(num_images=30), "held_out"),
        ("more", ShapesConfig(num_images=20), "train"),
    ):
        cache_latents.main(cache_latents.Config(out=tmp_path / name, data=data, split=split, held_out=0.1, **common))
    main(job(made, tmp_path / "run", validation=tmp_path / "val", training=LOOKING, num_preview=0))
    assert [images for images, _ in held_out_losses(tmp_path / "run")] == [3, 3, 3]
    with pytest.raises(
        DataError, match=r"validation: 16 of its images are trained on, too: train\[0\], .*split=held_out"
    ):
        main(job(made, tmp_path / "again", validation=tmp_path / "more", training=LOOKING))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training": LOOKING}, r"no images are held out: held_out=0.1 .*cache latents split=held_out"),
        ({"validation": Path("a")}, "validation: nothing looks at this data"),
        ({"validation": Path("a"), "training": LOOKING, "held_out": 0.1}, "held_out: 0.1 keeps .* give one of the two"),
        ({"validation_text": Path("a")}, "validation_text: goes with validation and text"),
    ],
)
def test_nothing_to_validate_on_and_what_contradicts_it_are_refused(made, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        main(job(made, tmp_path, **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latents": None}, "latents: is required with model.kind=xar; `imgtok cache latents` makes"),
        ({"tokens": Path("tokens")}, "tokens: model.kind=xar learns from latents; leave tokens out"),
        ({"model": GPTConfig()}, "tokens: is required with model.kind=gpt; `imgtok cache` makes"),
        (
            {"model": GPTConfig(), "latents": None, "tokens": Path("tokens"), "vae_scaling_factor": 1.0},
            "vae_scaling_factor: a tokenizer has its own; only for latents, leave it out",
        ),
        ({"model": None}, "model.kind: is required, unless init=MODEL"),
    ],
)
def test_what_does_not_belong_together_is_refused(made, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        job(made, tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share_digits": True}, "share_digits: model.kind=xar knows of no digits; leave it out"),
        ({"model": TEXT}, "text: is required with model.condition.kind=cross_attention; `imgtok cache text` makes"),
        ({"sampling": Settings(temperature=2.0)}, "sampling has no field 'temperature'"),
        ({"init_new": ("head",)}, "init_new, init_drop: say how to start from a model; name it with init=MODEL"),
        ({"init": "nothing/here", "model": None}, "nothing/here"),
    ],
)
def test_what_does_not_fit_the_model_or_its_data_is_refused(made, tmp_path, fields, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(job(made, tmp_path, **fields))


def test_the_latents_of_another_autoencoder_are_refused(made, tmp_path):
    torch.manual_seed(1)
    VAE(SMALL).save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="latents of another autoencoder, scale or size .fingerprint"):
        main(job(made, tmp_path / "out", tokenizer=str(tmp_path / "other")))


def test_the_latents_of_another_scale_are_refused(made, tmp_path):
    vae = imgtok.load(made / "vae")
    vae.config = replace(vae.config, scaling_factor=0.25)
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match=r"scaling_factor 0\.5, not 0\.25"):
        main(job(made, tmp_path / "out", tokenizer=str(tmp_path / "other")))


def test_latents_of_unknown_images_have_no_captions(made, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "mar" / name).mkdir(parents=True)
        moments = np.zeros((4, 4, 4), np.float32)
        np.savez(tmp_path / "mar" / name / "0.npz", moments=moments, moments_flip=moments)
    with pytest.raises(ValueError, match="text: the latents in .*mar do not say which images they are of"):
        main(job(made, tmp_path / "out", latents=tmp_path / "mar", text=tmp_path / "text", model=TEXT))


def test_a_grid_that_the_cells_do_not_tile_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match="entities.height: cells of 8 do not tile a grid of 4"):
        XARConfig(grid=4)


def from_yaml(made: Path, out: Path, *overrides: str) -> Config:
    """The same job as a user writes it, the model's fields field by field."""
    inputs = [f"latents={made / 'latents'}", f"tokenizer={made / 'vae'}", f"out={out}", "num_preview=0"]
    training = "training={steps: 1, batch_size: 2, learning_rate: 1e-3, trackers: []}"
    model = ["model={kind: xar, width: 16, depth: 1, num_heads: 2, entities: {kind: cell, height: 2, width: 2}}"]
    return load(Config, None, [*inputs, training, *model, *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.grid=16", r"command line: model.grid: given 16, but the data in .*latents decides it: 4; leave it out"),
        ("model.latent_channels=16", r"model.latent_channels: given 16, but the data in .* decides it: 2"),
        ("model.condition.num_classes=1000", r"model.condition.num_classes: given 1000, but .* decides it: 64"),
        ("model.condition={kind: class, num_classes: 63}", r"model.condition.num_classes: given 63, but .*: 64"),
    ],
)
def test_a_value_that_the_data_contradict_is_refused_whether_it_is_a_default_or_not(made, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        main(from_yaml(made, tmp_path, override))


def test_facts_may_be_left_out_or_given_and_the_run_keeps_them(made, tmp_path):
    main(from_yaml(made, tmp_path / "without"))
    main(
        from_yaml(made, tmp_path / "with", "model.grid=4", "model.latent_channels=2", "model.condition.num_classes=64")
    )
    configs = [imgtok.load(tmp_path / name / "final").config for name in ("without", "with")]
    assert configs[0] == configs[1]
    kept = load(Config, tmp_path / "without/config.yaml")
    assert kept.model.over() == configs[0]
    main(kept)  # the run is complete: nothing contradicts


def test_a_grid_that_the_entities_do_not_tile_is_refused(made, tmp_path):
    with pytest.raises(ValueError, match="entities.height: cells of 8 do not tile a grid of 4"):
        main(job(made, tmp_path, model=XARConfig()))


def test_latents_scaled_by_another_factor_are_trained_on_with_it(made, tmp_path):
    config = cache_latents.Config(
        vae=str(made / "vae"),
        vae_scaling_factor=2.0,
        out=tmp_path / "latents",
        data=ShapesConfig(num_images=16),
        image_size=8,
    )
    cache_latents.main(config)
    with pytest.raises(DataError, match="scaling_factor 2.0, not 0.5"):
        main(job(made, tmp_path / "out", latents=tmp_path / "latents"))
    main(job(made, tmp_path / "out", latents=tmp_path / "latents", vae_scaling_factor=2.0))
    assert imgtok.load(tmp_path / "out/final/tokenizer").config.scaling_factor == 2.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sampling": Settings(steps=1)}, "steps: a stochastic flow sampler needs at least 2 steps"),
        ({"num_tokens": 4}, "num_tokens.*draws whole latents"),
        ({"decoding": Settings(steps=4)}, "decoding has no field 'steps'"),
        ({"classes": (64,)}, "classes: 64 is not a class of the model; it has classes 0 to 63"),
        ({"prompts": "a circle"}, "prompts: this generator cannot read them"),
    ],
)
def test_requests_that_it_cannot_serve_are_refused(made, tmp_path, fields, message):
    main(job(made, tmp_path / "run"))
    with pytest.raises(ValueError, match=message):
        sample(SampleConfig(model=str(tmp_path / "run/final"), out=tmp_path / "samples", num=2, **fields))


def test_more_steps_or_guidance_draw_other_images(made, tmp_path):
    main(job(made, tmp_path / "run"))
    drawn = {}
    for name, how in (
        ("own", Settings()),
        ("steps", Settings(steps=5)),
        ("ode", Settings(solver="euler")),
    ):
        config = SampleConfig(model=str(tmp_path / "run/final"), out=tmp_path / name, num=2, grid=0, sampling=how)
        sample(config)
        drawn[name] = (tmp_path / name / "000000.png").read_bytes()
    assert len(set(drawn.values())) == 3
