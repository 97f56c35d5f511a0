"""LlamaGen's VQ tokenizer: what it takes and refuses, its configuration, and training by the suite's own program.

Its numbers are held to the published code's in tests/parity/test_vq.py.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import kinds
import pytest
import torch

import imgtok
import imgtok.config
from imgtok.cli import main
from imgtok.layers.convolution import channels_last
from imgtok.tokenizers.base import Rate
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vq import VQ, VQConfig

LINE = kinds.LINES["vq"]


@pytest.fixture(scope="module")
def model() -> VQ:
    return kinds.build(LINE)


def test_what_it_is(model):
    assert (model.image_size, model.num_tokens, model.vocab_size) == (16, 64, 16)
    assert model.rates() == [Rate(64)]
    assert model.cost() == "64 tokens of 16 ids, 256 bits"
    assert VQConfig().factor == VQConfig().grid == 16


def test_there_and_back_is_what_training_decodes(model):
    images = kinds.images(model, 2)
    tokens = model.encode(images)
    assert tokens.ids.shape == (2, 64)
    with torch.no_grad():
        decoded = model(images, generator=torch.Generator()).images
    torch.testing.assert_close(model.decode(tokens), decoded.clamp(-1, 1), atol=1e-5, rtol=0)


def test_the_parts_of_the_loss_add_up(model):
    config = model.config
    losses = model(kinds.images(model, 2), generator=torch.Generator()).losses
    total = losses.parts["quantizer"] + config.quantizer.entropy_weight * losses.parts["entropy"]
    assert losses.total.item() == pytest.approx(total.item())
    assert losses.num_codes == 16
    assert losses.codes.shape == (2, 8, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_size": 24}, r"image_size: 24 must be a multiple of 16, the pixels a side of a cell"),
        ({"block_channels": (128, 100)}, r"block_channels: 100 is not a positive multiple of norm_groups = 32"),
        ({"block_channels": ()}, r"block_channels: name the width of at least one level"),
    ],
)
def test_configurations_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        VQConfig(**given)


def test_what_is_refused(model):
    with pytest.raises(
        ValueError, match=r"takes images of 16 x 16 pixels, given 8 x 16; imgtok.preprocess\(pictures, 1"
    ):
        model.encode(kinds.images(model, 1)[..., :8, :])
    with pytest.raises(ValueError, match="does not have the rate 16; it has 64"):
        model.encode(kinds.images(model, 1), rate=Rate(16))
    tokens = kinds.tokens(model, 2)
    with pytest.raises(ValueError, match="has 64 tokens, and one has 9"):
        model.decode(tokens.truncate([9, 64]))
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 16\); got 0 to 16"):
        model.decode(Tokens.full(tokens.ids.clone().fill_(16).index_fill(1, torch.tensor([0]), 0)))
    with pytest.raises(ValueError, match="has no settings"):
        model.decode(tokens, decoding=object())


# ---------------------------------------------------------------- bits in place of a table


@pytest.fixture(scope="module")
def binary() -> VQ:
    return kinds.build(kinds.LINES["vq-binary"])


def test_bits_are_tokens_too(binary):
    assert (binary.vocab_size, binary.levels, binary.num_tokens) == (32, (2,) * 5, 64)
    assert binary.cost() == "64 tokens of 32 ids, 320 bits"
    assert not any(name.startswith("quantizer") for name, _ in binary.named_parameters()), "there is no table"
    images = kinds.images(binary, 2)
    tokens = binary.encode(images)
    with torch.no_grad():
        bits = (channels_last(binary.vectors(images)) > 0).float()
        decoded = binary.to_pixels(bits).clamp(-1, 1)
    torch.testing.assert_close(binary.decode(tokens), decoded)
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 32\); got 32 to 32"):
        binary.decode(Tokens.full(torch.full((1, 64), 32)))


def test_training_draws_bits_unless_it_takes_the_more_probable(binary):
    images = kinds.images(binary, 2)
    drawn = [binary(images, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0].losses.codes, drawn[1].losses.codes)
    assert not torch.equal(drawn[0].losses.codes, drawn[2].losses.codes)
    sure = copy.deepcopy(binary)
    quantizer = dataclasses.replace(binary.config.quantizer, training="threshold")
    sure.config = dataclasses.replace(binary.config, quantizer=quantizer)
    found = sure(images, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.losses.codes.flatten(1), binary.encode(images).ids)
    torch.testing.assert_close(found.images.clamp(-1, 1), binary.decode(binary.encode(images)), atol=1e-5, rtol=0)
    parts = found.losses.parts
    assert found.losses.total.item() == pytest.approx(0.1 * parts["variance"].item())
    assert 0 < parts["bit_entropy"].item() <= 1
    assert found.losses.num_codes == 32


def test_the_quantizer_is_chosen_by_its_kind(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("quantizer: {kind: binary, bits: 20}\n")
    config = imgtok.config.load(VQConfig, path)
    assert config.quantizer.vocab_size == 2**20
    assert imgtok.config.load(VQConfig, path, ["quantizer.kind=table"]) == VQConfig()
    with pytest.raises(ValueError, match="quantizer has no field 'vocab_size'"):
        imgtok.config.load(VQConfig, path, ["quantizer.vocab_size=5"])


@pytest.mark.slow
def test_it_learns(tmp_path):
    """A few colours of a few shapes, in a minute."""
    training = "{steps: 150, batch_size: 16, learning_rate: 3.e-3, warmup: 20, ema: 0.9, trackers: [], save_every: 150}"
    model = "{kind: vq, image_size: 16, block_channels: [16, 32], layers_per_block: 1, norm_groups: 8}"
    data = "data={kind: shapes, textures: [solid], sizes: [large], scale: 1.3, num_images: 4096}"
    words = [f"out={tmp_path / 'vq'}", data, f"model={model}", f"training={training}", "num_preview=4"]
    words += ["model.quantizer.vocab_size=64"]
    assert main(["train", "tokenizer", *words]) == 0
    log = [json.loads(line) for line in (tmp_path / "vq/log.jsonl").read_text().splitlines()]
    assert log[-1]["loss/mse"] < 0.25 * log[0]["loss/mse"]
    assert log[-1]["codebook_use"] > 0.1
    assert isinstance(imgtok.load(tmp_path / "vq"), VQ)
