"""Every YAML of configs/ is what its job expects, and those of configs/tiny run, one after the other, from end to end.

A new tokenizer or generator gets all of this for a YAML in configs/tiny: it is trained, interrupted and resumed to the
same weights, saved, loaded, sampled from and scored. The files run as their comments say, in an empty folder.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import imgtok
from imgtok import hub
from imgtok.cli import JOBS, main
from imgtok.config import from_dict, load, read_yaml
from imgtok.generators.gpt import GPT, flextok_size
from imgtok.published.kl16 import KL16
from imgtok.tokenizers.base import Tokenizer
from imgtok.tokenizers.flextok import FlexTok
from imgtok.tokenizers.maskgit_vqgan import MaskGITVQGANConfig
from imgtok.tokenizers.vae import VAE, VAEConfig, load_vae
from imgtok.train.loop import Trainer
from imgtok.train.state import complete_steps

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED_VAES = {
    "EPFL-VILAB/flextok_vae_c16": VAEConfig(latent_channels=16),
    "vqgan.ckpt": MaskGITVQGANConfig(),
    "kl16.ckpt": KL16,
}
PUBLISHED_SIZES = {
    "d12-d12": (85_185_798, 172_251_712),
    "d18-d18": (287_031_174, 578_292_544),
    "d18-d28": (287_031_174, 2_169_276_992),
}
"""Trained numbers of encoder and decoder: the specification, section 1."""
TRAINING = ("train-autoencoder", "train-tokenizer", "train-generator")
ORDER = ("train-autoencoder", "train-tokenizer", "cache", "cache-latents", "train-generator")


@functools.cache
def read(path: Path) -> dict[str, Any]:
    """A file that tests ask for again and again."""
    return read_yaml(path)


def job_of(path: Path) -> str:
    return read(path)["job"]


def paths(*jobs: str) -> list[Path]:
    """The tiny configurations of some jobs, in the order of the jobs."""
    return [path for job in jobs for path in sorted((CONFIGS / "tiny").glob("*.yaml")) if job_of(path) == job]


def command(path: Path) -> list[str]:
    """What its comment tells the reader to type."""
    return [*job_of(path).replace("-", " ").split(), str(path)]


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


RESUMED = ("vae", "flextok", "karl-1", "gpt-karl", "xar")
"""Of autoencoders, tokenizers, and generators from tokens and from latents. That a model of any kind is resumed as it
was, `tests/contract` sees; with a discriminator, `train/test_autoencoder.py`."""


def dear(found: list[Path], *, but: Collection[str]) -> list[Any]:
    """All of these with the slow tests, but those of these names with the fast ones."""
    assert set(but) <= {path.stem for path in found}
    return [pytest.param(path, id=name(path), marks=[] if path.stem in but else [pytest.mark.slow]) for path in found]


def trained_by(name: str) -> Any:
    """The section `model` of the file whose run leaves a model under this name."""
    return {f"{data.get('out')}/final": data.get("model") for data in map(read, CONFIGS.rglob("*.yaml"))}[name]


def autoencoder(name: str) -> Any:
    """The configuration of the autoencoder that a file names: published, packaged, or what another file trains."""
    if name in PUBLISHED_VAES:
        return PUBLISHED_VAES[name]
    if "/" not in name:
        return load_vae(name).config
    section = trained_by(name)
    return from_dict(hub.config_class(section["kind"]), section)


def tokenizer(config: Any) -> Any:
    """The configuration of the tokenizer that a file trains, on its autoencoder or after `init`; it checks itself."""
    if config.init is not None:
        module = importlib.import_module("imgtok.train.tokenizer")
        for path in CONFIGS.rglob("*.yaml"):
            if f"{read(path).get('out')}/final" == config.init:
                return config.model.over(tokenizer(load(module.Config, path)))
        raise AssertionError(f"no file trains {config.init}")
    facts = {hub.model_class(config.model.kind).stands_on: autoencoder(config.vae)} if config.vae is not None else None
    return config.model.over(facts=facts)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=name)
def test_every_configuration_is_valid(path):
    module, _ = JOBS[job_of(path).replace("-", " ")]
    config = load(importlib.import_module(module).Config, path)
    if job_of(path) == "train-tokenizer":
        tokenizer(config)
    words = " ".join(command(path)[:-1])
    assert f"imgtok {words} configs/{name(path)}" in path.read_text(), "the file does not say how it is run"


@pytest.mark.parametrize("size", PUBLISHED_SIZES)
def test_the_published_models_have_the_published_parameter_counts(size):
    path = CONFIGS / f"tokenizer/flextok-{size}-imagenet.yaml"
    config = load(importlib.import_module("imgtok.train.tokenizer").Config, path)
    with torch.device("meta"):
        model = FlexTok(config.model.over(facts={"vae": PUBLISHED_VAES[config.vae]}))
    counts = tuple(sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder))
    assert counts == PUBLISHED_SIZES[size]
    assert (model.config.grid, model.vocab_size, model.num_tokens) == ((16, 16), 64_000, 256)
    training = config.training
    assert training.batch_size * training.accumulate * 8 == 2048, "the header promises it"
    assert training.steps == round(200e9 / 512 / 2048)


@pytest.mark.parametrize(
    ("file", "depth", "text"),
    [("flextok-d12-imagenet", 12, False), ("flextok-d30-imagenet", 30, False), ("flextok-text-d12", 12, True)],
)
def test_flextoks_generators_have_its_sizes(file, depth, text):
    config = load(importlib.import_module("imgtok.train.generator").Config, CONFIGS / f"generator/{file}.yaml")
    assert config.model.over(facts={"vocab_size": 64_000}) == flextok_size(depth, text=text)
    assert config.training.batch_size * config.training.accumulate * 8 == 1024


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which every tiny configuration was run."""
    folder = tmp_path_factory.mktemp("tiny")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for path in paths(*ORDER):
            run(*command(path))
        run("train", "tokenizer", CONFIGS / "tiny/flextok.yaml", "vae=outputs/tiny/vae/final", "model.patch_size=1",
            "out=outputs/on-vae")  # fmt: skip
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def inside(request, monkeypatch):
    if "finished" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("finished"))


@pytest.mark.parametrize("path", paths(*TRAINING), ids=name)
def test_a_run_leaves_a_model_a_log_and_pictures(finished, path):
    out = Path(read(path)["out"])
    steps = read(path)["training"]["steps"]
    model = imgtok.load(out / "final")
    assert model.config.kind == read(path)["model"]["kind"]
    assert complete_steps(out / "checkpoints") == [4, 2]
    assert (out / "samples" / f"step_{steps:07d}.png").is_file()
    assert (out / "final/config.yaml").read_bytes() == (out / "config.yaml").read_bytes()
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(steps + 1))
    assert all(line["images_per_second"] > 0 for line in lines)
    assert list((out / "tensorboard").rglob("events*"))


@pytest.mark.parametrize("path", dear(paths(*TRAINING), but=RESUMED))
def test_an_interrupted_run_ends_with_the_same_weights(finished, path, monkeypatch):
    out = Path(f"resumed-{path.stem}")
    step = Trainer.step

    def interrupted(self, number, batches):
        step(self, number, batches)
        if number == 2:  # weights, averages and optimizer moved on, and nothing of it was saved
            raise KeyboardInterrupt

    words = [*command(path), f"out={out}", "training.preview_every=0", "training.trackers=[]"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert main(words) == 130
    assert complete_steps(out / "checkpoints") == [2]
    assert not (out / "final").exists()
    run(*words)
    whole, resumed = (load_file(folder / "final/model.safetensors") for folder in (Path(read(path)["out"]), out))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("path", dear(paths("train-generator"), but=("gpt", "gpt-karl", "xar", "tokenbridge")))
def test_a_generator_is_sampled_from_and_scored(finished, path):
    model, samples = Path(read(path)["out"]) / "final", Path("samples") / path.stem
    assert isinstance(imgtok.load(model / "tokenizer"), Tokenizer if isinstance(imgtok.load(model), GPT) else VAE)
    run("sample", model, "--num", 5, "--out", samples)
    assert sorted(file.name for file in samples.iterdir()) == [
        *(f"{index:06d}.png" for index in range(5)),
        "samples.json",
    ]
    run("evaluate", f"images={samples}", "data.kind=shapes", "metrics=[oracle]", f"out={samples}/scores.json")
    run("evaluate", f"model={model}", "data.kind=shapes", "metrics=[oracle]", "num=5", f"out={samples}/direct.json")
    scores, direct = (json.loads((samples / f"{name}.json").read_text())["scores"] for name in ("scores", "direct"))
    assert scores == [row for row in direct if row["key"].startswith("oracle")]
    costs = {row["key"] for row in direct} - {row["key"] for row in scores}
    assert costs == ({"tokens", "bits", "codebook_use", "codebook_perplexity"} if "gpt" in path.stem else set())
    own = "tokens" in json.loads((samples / "samples.json").read_text())
    assert own == ("karl" in path.stem)


TOKENIZERS = [*(Path(read(path)["out"]) for path in paths("train-tokenizer")), Path("outputs/on-vae")]


@pytest.mark.parametrize(
    "model",
    [  # karl-2 is karl-1 after its second stage
        pytest.param(model, id=model.name, marks=[pytest.mark.slow] if model.name == "karl-2" else [])
        for model in TOKENIZERS
    ],
)
def test_a_tokenizer_is_shown_and_scored(finished, model):
    out = Path("reconstructions") / model.name
    data = ("data.kind=shapes", "data.num_images=64")
    run("reconstruct", model / "final", f"out={out}", *data)
    run("evaluate", f"tokenizer={model}/final", "metrics=[psnr]", f"out={out}/scores.json", *data)
    shown = json.loads((out / "rates.json").read_text())["rates"]
    scored: dict[str, dict[str, float]] = {}
    for row in json.loads((out / "scores.json").read_text())["scores"]:
        scored.setdefault(row["rate"], {})[row["key"]] = row["value"]
    assert scored.keys() == shown.keys()
    assert all(scored[rate] == pytest.approx(shown[rate], abs=1e-4) for rate in shown)
    assert (out / "grid.png").is_file()


def test_a_tokenizer_holds_its_frozen_autoencoder(finished):
    tokenizer, vae = imgtok.load("outputs/on-vae/final"), imgtok.load("outputs/tiny/vae/final")
    assert tokenizer.config.vae == vae.config
    weights = vae.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in tokenizer.vae.state_dict().items())
