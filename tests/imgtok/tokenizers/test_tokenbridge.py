"""Symbols of an autoencoder's latents: their order, what they stand for and cost, and a GPT that is trained on them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import kinds
import pytest
import torch
from kinds import LINES

import imgtok
from imgtok.cli import main
from imgtok.config import ConfigError, from_dict
from imgtok.quantizers.normal import NormalConfig
from imgtok.tokenizers.base import Rate
from imgtok.tokenizers.tokenbridge import TokenBridgeTokenizer, TokenBridgeTokenizerConfig
from imgtok.tokenizers.tokens import Tokens

LINE = LINES["tokenbridge_tokenizer"]
ORDER = LINE.config.channel_order


@pytest.fixture(scope="module")
def model() -> TokenBridgeTokenizer:
    return kinds.build(LINE)


def test_symbols_go_position_by_position_and_channels_in_their_order(model):
    ids = torch.arange(4 * 64).view(1, 4, 8, 8)  # of channel c at position p: 64 c + p
    symbols = model.in_sequence(ids)
    assert symbols[0, :8].tolist() == [*(64 * c for c in ORDER), *(64 * c + 1 for c in ORDER)]
    assert torch.equal(model.in_place(symbols), ids)


@pytest.mark.parametrize("kind", ["vae", "dcae"])
def test_an_image_is_what_its_rounded_latent_decodes_to(kind):
    model = kinds.build(replace(LINE, config=replace(LINE.config, vae=LINES[kind].config)))
    images = kinds.images(model, 2)
    tokens = model.encode(images)
    assert tokens.ids.shape == (2, model.num_tokens) == (2, 256)
    with torch.no_grad():
        values, ids = model.quantizer(model.vae.encode(images))
        decoded = model.vae.decode(values).clamp(-1, 1)
    assert torch.equal(model.in_place(tokens.ids), ids)
    torch.testing.assert_close(model.decode(tokens), decoded)
    assert ids.unique().numel() > 4


def test_more_levels_are_nearer_to_the_continuous_image(model):
    images, state = kinds.images(model, 4), model.state_dict()
    errors = []
    for levels in (4, 16, 64):
        finer = TokenBridgeTokenizer(replace(LINE.config, quantizer=NormalConfig(levels=levels))).eval()
        finer.load_state_dict(state)
        with torch.no_grad():
            errors.append((finer.reconstruct(images) - model.vae.reconstruct(images)).abs().mean().item())
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_what_an_image_costs(model):
    tokens = model.encode(kinds.images(model, 3))
    assert model.bits(tokens).tolist() == [256 * 3] * 3  # of 8 levels
    assert model.cost() == "256 tokens of 8 ids, 768 bits"
    assert [str(rate) for rate in model.rates()] == ["256"]
    with torch.device("meta"):
        published = TokenBridgeTokenizer(replace(LINE.config, image_size=32, quantizer=NormalConfig()))
    assert published.cost() == "1,024 tokens of 64 ids, 6,144 bits"


def test_latents_that_the_range_cuts_off_are_warned_of(caplog):
    model = kinds.build(LINE)
    model.calibrate([kinds.images(model, 4)])
    assert not caplog.text
    narrow = TokenBridgeTokenizer(replace(LINE.config, quantizer=NormalConfig(levels=8, range=(-0.1, 0.1))))
    narrow.load_state_dict(model.state_dict())
    narrow.calibrate([kinds.images(model, 4)])
    assert re.search(
        r"range: \[-0.1, 0.1\]: \d+\.\d\d % of the numbers lie beyond .* a wider range keeps them", caplog.text
    )
    assert narrow.config.channel_order == ORDER, "it was given"


def test_what_does_not_fit(model):
    for fields, message in (
        (
            {"channel_order": (0, 1)},
            r"channel_order: \[0, 1\] must have each of the channels 0 to 3 once; leave it out",
        ),
        ({"image_size": 15}, "image_size: 15 must be a multiple of 2, the pixels a side of a latent position"),
        ({"quantizer": NormalConfig(means=(0.0,), deviations=(1.0,))}, "quantizer.means: 1 numbers for 4 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(LINE.config, **fields)
    with pytest.raises(ConfigError, match=r"quantizer.levels: given 1, must be"):
        from_dict(TokenBridgeTokenizerConfig, {"quantizer": {"levels": 1}})
    with pytest.raises(ValueError, match="vae: these symbols are of an autoencoder's latents; name one"):
        TokenBridgeTokenizer(TokenBridgeTokenizerConfig())
    with pytest.raises(ValueError, match="takes images of 16 x 16 pixels, given 8 x 8; imgtok.preprocess"):
        model.encode(kinds.images(model, 1)[..., ::2, ::2])
    with pytest.raises(ValueError, match="rates: this tokenizer does not have the rate 3; it has 256"):
        model.encode(kinds.images(model, 1), rate=Rate(3))
    tokens = model.encode(kinds.images(model, 1))
    with pytest.raises(ValueError, match="decode: an image of this tokenizer has 256 tokens, and one has 3"):
        model.decode(tokens.truncate(3))
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 8\); got 0 to 8"):
        model.decode(Tokens.full(torch.cat([tokens.ids[:, :-1] * 0, torch.tensor([[8]])], dim=1)))
    broken = kinds.build(LINE)
    with torch.no_grad():
        next(broken.vae.parameters())[0] = torch.nan
    with pytest.raises(ValueError, match="numbers are not finite .* the autoencoder or its input is broken"):
        broken.encode(kinds.images(model, 1))


def test_a_gpt_learns_the_symbols_of_any_autoencoder(tmp_path, monkeypatch, capsys, caplog):
    """From the autoencoder to images, as docs/tokenbridge.md has it."""
    monkeypatch.chdir(tmp_path)
    kinds.build(LINES["vae"]).save_pretrained("vae")
    data, training = ("data.kind=shapes", "data.num_images=32"), "training={learning_rate: 1e-3, trackers: [], "

    def run(*words: str) -> str:
        assert main([*words]) == 0
        return capsys.readouterr().out

    model = ("vae=vae", "model={kind: tokenbridge_tokenizer, image_size: 8}", "num_preview=4", *data)
    run("train", "tokenizer", "out=run", *model, training + "steps: 0, batch_size: 8}")
    assert "model.quantizer.range" not in caplog.text
    order = json.loads(Path("run/final/config.json").read_text())["channel_order"]
    assert sorted(order) == [0, 1, 2, 3]
    assert imgtok.load("run/final").order.tolist() == order
    assert "an image: 64 tokens of 64 ids, 384 bits" in run("info", "run/final")
    run("cache", "run/final", "out=tokens")
    gpt = "model={kind: gpt, width: 16, depth: 1, num_heads: 2, mlp_multiple: 8}"
    run("train", "generator", "out=gpt", "tokens=tokens", "tokenizer=run/final", gpt, "num_preview=2",
        training + "steps: 2, batch_size: 4}")  # fmt: skip
    run("sample", "gpt/final", "num=2", "out=drawn")
    assert len(list(Path("drawn").glob("0*.png"))) == 2
    assert main(["train", "tokenizer", "out=other", *model, training + "steps: 3, batch_size: 8}"]) == 2
    assert "training.steps: 3, but the model has no trainable parameter: 0 saves it as it is" in capsys.readouterr().err
