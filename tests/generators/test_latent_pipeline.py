"""`imgtok sample` of an xAR: image i of seed s is the same to the byte however it is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from imgtok.config import ConfigError
from imgtok.generators.entities import Cells
from imgtok.generators.pipeline import pipeline
from imgtok.generators.xar import XAR, FlowSampling, XARConfig
from imgtok.sample.images import Config, main
from imgtok.sections import Settings
from imgtok.tokenizers.vae import VAE, VAEConfig

SMALL = VAEConfig(latent_channels=4, block_channels=(16, 32), layers_per_block=1, norm_groups=8)
NUM = 11


@pytest.fixture(scope="module")
def generator(tmp_path_factory) -> Path:
    """An xAR of some width with its autoencoder; 256 positions, of which a CPU computes 4 images at once."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("generator")
    how = FlowSampling(steps=(2,), guidance=(2.0,))
    cells = Cells(height=8, width=8)
    config = XARConfig(latent_channels=4, entities=cells, width=96, depth=1, num_heads=3, sampling=how)
    XAR(config.with_condition(num_classes=10)).save_pretrained(folder)
    VAE(SMALL).save_pretrained(folder / "tokenizer")
    return folder


def sample(generator: Path, out: Path, **fields) -> dict[str, bytes]:
    main(Config(**{"model": str(generator), "out": out, "num": NUM, "batch_size": 16, "exact": True} | fields))
    return {path.name: path.read_bytes() for path in out.glob("[0-9]*.png")}


@pytest.fixture(scope="module")
def images(generator, tmp_path_factory) -> dict[str, bytes]:
    return sample(generator, tmp_path_factory.mktemp("samples"))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_other_batches_draw_the_same_bytes(generator, images, tmp_path, batch_size):
    count = 3 if batch_size == 1 else NUM
    drawn = sample(generator, tmp_path, num=count, batch_size=batch_size)
    assert drawn == {name: images[name] for name in drawn}
    assert len(drawn) == count


def test_other_neighbours_leave_no_trace(generator):
    """As several processes divide a job: each has every so many of the indices, beside other classes."""
    pipe = pipeline(generator, device="cpu", exact=True)
    whole = pipe.images([i % 10 for i in range(NUM)], range(NUM), seed=0)
    mine = [1, 4, 7, 10]
    assert torch.equal(pipe.images([i % 10 for i in mine], mine, seed=0), whole[mine])


def test_enlarging_a_job_keeps_what_is_there(generator, images, tmp_path):
    sample(generator, tmp_path, num=2)
    assert sample(generator, tmp_path) == images


def test_a_cpu_computes_blocks_of_one_size(generator, monkeypatch):
    seen = []
    generate = XAR.generate

    def counting(self, condition, **rest):
        seen.append(len(condition))
        return generate(self, condition, **rest)

    monkeypatch.setattr(XAR, "generate", counting)
    pipe = pipeline(generator, device="cpu", exact=True)
    assert pipe.images([0] * 6, range(6), seed=0).shape == (6, 3, 32, 32)
    assert seen == [4, 4]
    pipe.exact = False
    assert pipe.images([0] * 6, range(6), seed=0).shape == (6, 3, 32, 32)
    assert seen[2:] == [4, 2]  # not more rows than were asked for


def test_half_precision_is_another_request(generator, images, tmp_path):
    halves = sample(generator, tmp_path, precision="bf16")
    assert halves.keys() == images.keys()
    assert halves != images
    assert json.loads((tmp_path / "samples.json").read_text())["request"]["precision"] == "bf16"
    with pytest.raises(ValueError, match=r"another request \(different: precision\)"):
        sample(generator, tmp_path)


def test_settings_of_another_kind_of_generator_are_refused(generator, tmp_path):
    with pytest.raises(ConfigError, match=r"sampling has no field 'temperature'\. It has: steps, guidance, interval"):
        sample(generator, tmp_path, sampling=Settings(temperature=0.5))
    with pytest.raises(ConfigError, match="decoding has no field 'steps'"):
        sample(generator, tmp_path, decoding=Settings(steps=2))


# ---------------------------------------------------------------- from Python


def arrays(pictures) -> np.ndarray:
    return np.stack([np.array(picture) for picture in pictures]).astype(int)


def test_one_may_stop_at_the_latents_and_go_on(generator):
    pipe = pipeline(generator, device="cpu", exact=True)
    whole = pipe(classes=[1, 2, 3], seed=5, steps=3)
    latents = pipe.latents(classes=[1, 2, 3], seed=5, steps=3)
    assert latents.shape == (3, 4, 16, 16)
    assert np.array_equal(arrays(pipe.decode(latents)), arrays(whole))
    assert (arrays(pipe(classes=[1, 2, 3], seed=5, steps=3, solver="euler")) != arrays(whole)).any()
    with pytest.raises(ValueError, match=r"draws latents and not tokens: call pipe\.latents"):
        pipe.tokens(classes=[1])
    with pytest.raises(ValueError, match="num_tokens: this generator draws whole latents"):
        pipe(classes=[1], num_tokens=4)


def test_a_callback_sees_one_entity_after_the_other(generator):
    pipe, steps = pipeline(generator, device="cpu"), []
    final = pipe(classes=[1, 2], steps=[2, 3, 2, 3], callback=lambda step: steps.append((step, step.images())))
    assert [(step.stage, step.done) for step, _ in steps] == [("draw", done) for done in range(1, 11)]
    apart = [np.abs(arrays(images) - arrays(final)).mean() for _, images in steps]
    assert apart[-1] <= 1 < apart[0]


def test_it_is_saved_with_its_autoencoder(generator, tmp_path):
    pipe = pipeline(generator, device="cpu", exact=True)
    pipe.save_pretrained(tmp_path / "copy")
    again = pipeline(tmp_path / "copy", device="cpu", exact=True)
    assert np.array_equal(arrays(again(classes=[1])), arrays(pipe(classes=[1])))
    assert "a `xar` generator with its `vae`" in (tmp_path / "copy/README.md").read_text().replace("A `", "a `")
