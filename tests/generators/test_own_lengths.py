"""Images with numbers of tokens of their own, from KARL's tokens in a cache to the numbers beside the samples."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import kinds

import imgtok
from imgtok.cli import main as command_line
from imgtok.data.images import open_images
from imgtok.data.tokens import TokenDataset
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.sample.images import count_of
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.base import Rate
from imgtok.tokenizers.karl import KARL

NUM = 20
DATA = ("data.kind=shapes", f"data.num_images={NUM}")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return open_images(ShapesConfig(num_images=NUM), 16, split="train").batch(range(NUM)).images


@pytest.fixture(scope="module")
def karl(images) -> KARL:
    """With weights that tell images apart, and a threshold among its probabilities: kept slots have gaps between them,
    and their number varies.
    """
    model = kinds.build(kinds.LINES["karl"])
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    threshold = model.encode(images).probabilities.quantile(0.45).item()
    model.config = dataclasses.replace(model.config, threshold=threshold)
    return model


@pytest.fixture(scope="module")
def folder(karl, tmp_path_factory) -> Path:
    """A generator with random weights, and KARL as its tokenizer."""
    folder = tmp_path_factory.mktemp("generator")
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=32, num_tokens=8, ends=True, num_slots=12, width=32, depth=1, num_heads=2, mlp_multiple=16
    )
    model = GPT(config.with_condition(num_classes=5))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    karl.save_pretrained(folder / "tokenizer")
    return folder


def run(*words: object) -> None:
    assert command_line([*map(str, words)]) == 0


# ------------------------------------------------------------------------------------------------ caches


@pytest.mark.parametrize("rate", [None, "7@0.02"])
def test_a_cache_holds_what_each_image_needs(karl, images, folder, tmp_path, rate, caplog):
    """The same as of images that are encoded alone; slots travel with the ids."""
    words = [] if rate is None else [f"rate={rate}"]
    caplog.set_level("INFO")
    run("cache", folder / "tokenizer", f"out={tmp_path}", "batch_size=7", *words, *DATA)
    cache = TokenDataset(tmp_path)
    budget = 8 if rate is None else 7
    assert (cache.info.num_tokens, cache.info.num_slots, cache.info.fixed_length) == (budget, 12, False)
    found = cache.tokens(range(NUM))
    asked = None if rate is None else Rate.parse(rate)
    alone = imgtok.Tokens.cat([karl.encode(image[None], rate=asked).padded() for image in images])
    assert len(alone.lengths.unique()) > 1, "images of one length would show nothing"
    assert torch.equal(found.lengths, alone.lengths)
    columns = alone.ids.shape[1]
    assert torch.equal(found.ids[:, :columns], alone.ids)
    assert torch.equal(found.slots[:, :columns], alone.slots)
    assert (found.slots != torch.arange(budget))[found.mask].any(), "prefixes alone would show nothing"
    lengths = alone.lengths.double()
    said = f"{lengths.mean():.1f} tokens an image, from {int(lengths.min())} to {int(lengths.max())}"
    assert said in caplog.text
    assert f"rate: {rate or '8@0.05'}" in caplog.text


def test_vectors_are_no_ids(tmp_path, capsys):
    kinds.build(kinds.LINES["karl-vectors"]).save_pretrained(tmp_path / "karl")
    assert command_line(["cache", str(tmp_path / "karl"), f"out={tmp_path / 'tokens'}", *DATA]) == 2
    assert f"the tokens of {tmp_path / 'karl'} are vectors, and a cache of tokens holds ids" in capsys.readouterr().err
    assert not (tmp_path / "tokens").exists()


def test_a_generator_is_trained_on_such_a_cache(folder, tmp_path):
    run("cache", folder / "tokenizer", f"out={tmp_path / 'tokens'}", *DATA)
    training = "training={steps: 2, batch_size: 4, learning_rate: 1e-3, trackers: [], log_every: 1}"
    model = "model={kind: gpt, width: 16, depth: 1, num_heads: 2, mlp_multiple: 8}"
    inputs = (f"tokens={tmp_path / 'tokens'}", f"tokenizer={folder / 'tokenizer'}", "num_preview=2")
    run("train", "generator", f"out={tmp_path / 'gpt'}", *inputs, model, training)
    config = imgtok.load(tmp_path / "gpt/final").config
    assert (config.vocab_size, config.num_tokens, config.ends, config.num_slots) == (32, 8, True, 12)
    log = (tmp_path / "gpt/log.jsonl").read_text().splitlines()
    assert {"loss/cross_entropy", "loss/slots"} <= json.loads(log[-1]).keys()


# ------------------------------------------------------------------------------------------------ images


def test_images_tell_how_many_tokens_they_took(folder):
    pipe = imgtok.pipeline(folder, device="cpu", exact=True)
    found = pipe([0, 1, 2, 3, 4], num_per_condition=4, seed=1, guidance=1.5, batch_size=7)
    assert pipe.own_lengths
    assert len(found) == len(found.tokens) == 20
    assert len(found.tokens.lengths.unique()) > 2
    assert [image.tobytes() for image in pipe.decode(found.tokens)] == [image.tobytes() for image in found]
    alone = pipe([2], seed=1, indices=[9], guidance=1.5)
    assert alone[0].tobytes() == found[9].tobytes()
    assert alone.tokens.lengths.tolist() == found.tokens.lengths[9:10].tolist()
    drawn = pipe.tokens([2], seed=1, indices=[9], guidance=1.5)
    assert torch.equal(drawn.slots, alone.tokens.slots)
    assert torch.equal(drawn.ids, alone.tokens.ids)


@pytest.mark.parametrize("form", ["png", "npz"])
def test_samples_tell_how_many_tokens_they_took(folder, tmp_path, form, caplog):
    def sample(num: int, batch_size: int) -> list[int]:
        caplog.clear()
        words = (f"num={num}", f"batch_size={batch_size}", f"format={form}", "exact=true", "grid=0")
        run("sample", folder, f"out={tmp_path / 'samples'}", *words)
        return json.loads((tmp_path / "samples/samples.json").read_text())["tokens"]

    caplog.set_level("INFO")
    drawn = imgtok.pipeline(folder, device="cpu", exact=True)([i % 5 for i in range(12)])
    expected = drawn.tokens.lengths.tolist()
    few = sample(5, 3)
    assert few == expected[:5]
    assert sample(5, 2) == few  # which draws nothing, and forgets nothing
    assert sample(12, 7) == expected  # of which five are there already
    assert f"; {np.mean(expected):.1f} tokens an image, from {min(expected)} to {max(expected)}" in caplog.text
    if form == "npz":
        with np.load(tmp_path / "samples/samples.npz") as arrays:
            assert arrays["tokens"].tolist() == expected
            assert len(arrays["arr_0"]) == 12


def test_an_image_whose_file_tells_nothing_is_named(folder, tmp_path, capsys):
    run("sample", folder, f"out={tmp_path}", "num=2", "grid=0")
    path = tmp_path / "000001.png"
    assert count_of(path) >= 1
    imgtok.pictures.save_png(torch.zeros(3, 16, 16, dtype=torch.uint8), path)
    assert command_line(["sample", str(folder), f"out={tmp_path}", "num=2", "grid=0"]) == 2
    assert f"{path}: the file does not tell how many tokens its image took; delete it" in capsys.readouterr().err
