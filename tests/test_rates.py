"""A tokenizer with lengths of its own and an autoencoder go through the programs by a line in the hub's tables.

Nothing in the programs knows the toys (tests/toy.py): what they do with them they will do with the next method.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import toy
from toy import ToyAE, ToyAEConfig, ToyTok, ToyTokConfig

from imgtok.cli import main as imgtok
from imgtok.data.images import open_images
from imgtok.data.latents import open_latents
from imgtok.data.loaders import token_loader
from imgtok.data.tokens import TokenDataset
from imgtok.metrics.reconstruction import psnr
from imgtok.pictures import to_uint8
from imgtok.shapes.world import ShapesConfig
from imgtok.tokenizers.base import Rate
from imgtok.tokenizers.tokens import Tokens
from imgtok.tokenizers.vae import load_vae

DATA = ("data.kind=shapes", "data.num_images=80")
RATES = ["4@0.05", "4@0.4", "16@0.05", "16@0.4"]


@pytest.fixture(autouse=True)
def known(monkeypatch):
    toy.enter(monkeypatch)


@pytest.fixture(scope="module")
def model() -> ToyTok:
    """With ids that differ from patch to patch."""
    torch.manual_seed(0)
    model = ToyTok(ToyTokConfig(tolerances=(0.05, 0.4)))
    torch.nn.init.normal_(model.encoder.weight, std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toytok")
    model.save_pretrained(folder)
    return folder


def images(split: str, count: int) -> torch.Tensor:
    return open_images(ShapesConfig(num_images=80), 16, split=split).batch(range(count)).images


def run(*words) -> None:
    assert imgtok([*map(str, words)]) == 0


def test_lengths_and_slots_go_from_the_cache_to_the_batch(model, tokenizer, tmp_path):
    run("cache", tokenizer, f"out={tmp_path}", "batch_size=7", "shard_size=30", *DATA)
    dataset = TokenDataset(tmp_path)
    expected = model.encode(images("train", 72))
    assert len(expected.lengths.unique()) > 2
    found = dataset.tokens(range(72))
    for name in ("ids", "lengths", "slots"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (dataset.info.num_slots, dataset.info.fixed_length, dataset.info.num_tokens) == (16, False, 16)
    batch = next(token_loader(dataset, 8, seed=0))
    assert isinstance(batch.content, Tokens)
    assert torch.equal(batch.content.mask.sum(dim=1), batch.content.lengths)
    assert torch.equal(model.decode(batch.content), model.decode(expected[dataset_rows(batch)]))


def dataset_rows(batch) -> list[int]:
    """The images of a batch, from their names."""
    return [int(name.removeprefix("train[").removesuffix("]")) for name in batch.names]


def test_a_cache_at_another_rate(model, tokenizer, tmp_path, capsys):
    run("cache", tokenizer, f"out={tmp_path}", "rate=4@0.4", *DATA)
    dataset = TokenDataset(tmp_path)
    assert (dataset.info.rate, dataset.info.num_tokens) == ("4@0.4", 4)
    expected = model.encode(images("train", 72), rate=Rate(4, 0.4))
    assert torch.equal(dataset.tokens(range(72)).ids, expected.ids)
    assert imgtok(["cache", str(tokenizer), f"out={tmp_path / 'other'}", "rate=8", *DATA]) == 2
    assert "does not have the rate 8; it has 4@0.05" in capsys.readouterr().err
    assert imgtok(["cache", str(tokenizer), f"out={tmp_path}", *DATA]) == 2
    assert "rate '4@0.4' instead of None" in capsys.readouterr().err


def test_every_rate_of_a_tokenizer_is_encoded_and_scored(model, tokenizer, tmp_path, monkeypatch, capsys):
    asked, encode = [], ToyTok.encode
    monkeypatch.setattr(
        ToyTok, "encode", lambda self, given, rate: asked.append(str(rate)) or encode(self, given, rate=rate)
    )
    out = tmp_path / "scores.json"
    run("evaluate", f"tokenizer={tokenizer}", "metrics=[psnr]", f"out={out}", "decoding.contrast=0.5", *DATA)
    assert asked == RATES
    record = json.loads(out.read_text())
    assert record["protocol"]["decoding"] == {"contrast": 0.5}
    found = {(row["key"], row["rate"]): row["value"] for row in record["scores"]}
    held_out = images("held_out", 8)
    for text in RATES:
        tokens = encode(model, held_out, rate=Rate.parse(text))
        assert found["tokens", text] == pytest.approx(tokens.lengths.double().mean().item())
        assert found["bits", text] == pytest.approx(model.bits(tokens).mean().item())
        assert found["codebook_use", text] == len(tokens.ids[tokens.mask].unique()) / 16
        decoded = model.decode(tokens, decoding=toy.ToyDecoding(contrast=0.5))
        quality = psnr(to_uint8(decoded), to_uint8(held_out)).mean().item()
        assert found["psnr", text] == pytest.approx(quality, abs=1e-3)
    assert found["tokens", "16@0.4"] < found["tokens", "16@0.05"]
    lines = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert [line["rate"] for line in lines] == ["4@0.4", "4@0.05", "16@0.4", "16@0.05"]
    assert list(lines[0]) == ["rate", "tokens", "bits", "codebook_use", "codebook_perplexity", "psnr"]
    assert out.with_suffix(".png").is_file()
    assert "log2(16) a token + log2(16) for their number + log2(16 over it) for their slots" in capsys.readouterr().out


def test_reconstructions_at_chosen_rates(tokenizer, tmp_path):
    run("reconstruct", tokenizer, f"out={tmp_path}", "rates=[16@0.4,4@0.05]", "num=4", *DATA)
    found = json.loads((tmp_path / "rates.json").read_text())["rates"]
    assert list(found) == ["16@0.4", "4@0.05"]
    assert set(found["4@0.05"]) == {"tokens", "bits", "codebook_use", "codebook_perplexity", "psnr"}
    assert (tmp_path / "grid.png").is_file()


def test_latents_of_any_autoencoder_are_cached(tmp_path):
    torch.manual_seed(0)
    model = ToyAE(ToyAEConfig()).eval()
    model.save_pretrained(tmp_path / "toyae")
    run("cache", "latents", tmp_path / "toyae", "image_size=16", "mirrored=false", f"out={tmp_path / 'latents'}", *DATA)
    found = open_latents(tmp_path / "latents", model).batch(range(72)).content
    with torch.no_grad():
        assert torch.allclose(found, model.encode(images("train", 72)), atol=1e-2)  # stored in half precision


def test_an_autoencoder_alone_is_shown_and_scored(tmp_path, capsys):
    torch.manual_seed(0)
    ToyAE(ToyAEConfig()).save_pretrained(tmp_path / "toyae")
    for name, size, rate in ((tmp_path / "toyae", 16, None), ("shapes32", 32, None)):
        out = tmp_path / f"of{size}"
        run("reconstruct", name, f"image_size={size}", f"out={out}", "num=4", *DATA)
        run("evaluate", f"tokenizer={name}", f"image_size={size}", "metrics=[psnr,mae]", f"out={out}/s.json", *DATA)
        record = json.loads((out / "s.json").read_text())
        assert {row["key"]: row["rate"] for row in record["scores"]} == {"psnr": rate, "mae": rate}
        assert set(record["weights"]) == {"autoencoder"}
        assert list(json.loads((out / "rates.json").read_text())["rates"]) == ["latents"]
        assert (out / "grid.png").is_file()
    held_out = open_images(ShapesConfig(num_images=80), 32, split="held_out").batch(range(8)).images
    expected = psnr(to_uint8(load_vae("shapes32").reconstruct(held_out)), to_uint8(held_out)).mean().item()
    psnr_found = next(row["value"] for row in record["scores"] if row["key"] == "psnr")
    assert psnr_found == pytest.approx(expected, abs=1e-3)
    assert psnr_found > 25
    run("reconstruct", "shapes32", f"out={tmp_path / 'recorded'}", "num=1", *DATA)  # at the size of its training
    assert json.loads((tmp_path / "recorded/rates.json").read_text())["data"]["image_size"] == 32
    assert imgtok(["reconstruct", str(tmp_path / "toyae"), f"out={tmp_path / 'x'}", *DATA]) == 2
    assert "image_size: an autoencoder takes images of any multiple of its 2 pixels, none" in capsys.readouterr().err
    for words, message in (
        (["image_size=30"], "multiple of its 8 pixels, given 30"),
        (["image_size=32", "rates=[4]"], "rates: an autoencoder has no tokens and no rates, given 4"),
        (["image_size=32", "decoding.steps=4"], "decoding"),
    ):
        assert imgtok(["reconstruct", "shapes32", f"out={tmp_path / 'x'}", *words, *DATA]) == 2
        assert message in capsys.readouterr().err
