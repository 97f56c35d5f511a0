"""`imgtok demo`: what its page shows, and the page itself in a browser where gradio and Chromium are there."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import browser
import kinds
import pytest
import torch
from PIL import Image

from imgtok.cli import main
from imgtok.generators.pipeline import Pipeline
from imgtok.pictures import preprocess, to_pil
from imgtok.sample import demo
from imgtok.tokenizers.tokens import Tokens


@pytest.fixture(scope="module")
def tokenizer():
    """One whose prefixes decode."""
    return kinds.build(kinds.LINES["flextok"])


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return to_pil(kinds.random(1, 3, 40, 32).clamp(-1, 1))[0]


def test_a_picture_at_each_number_of_tokens(tokenizer, picture):
    showing = demo.Rebuilding(tokenizer)
    encoded = showing.encode(picture)
    assert [int(tokens.lengths[0]) for tokens in encoded] == [1, 2, 4, 8]
    shown, said = showing.at(encoded, 1, seed=3)
    again = tokenizer.decode(tokenizer.encode(preprocess([picture], 16)).truncate(2), seed=3)
    assert said == f"2 tokens, {float(tokenizer.bits(encoded[1])[0]):,.0f} bits"
    assert shown.size == (512, 512)
    assert shown.resize((16, 16), Image.Resampling.NEAREST).tobytes() == to_pil(again)[0].tobytes()
    assert showing.at(showing.encode(None), 1) == (None, "")


def test_an_autoencoder_has_one_picture_and_no_rates(picture):
    showing = demo.Rebuilding(kinds.build(kinds.LINES["maskgit_vqgan"]))
    encoded = showing.encode(picture)
    assert (showing.rates, len(encoded)) == ([], 1)
    assert showing.at(encoded, 0)[1] == "4 x 128 x 128 numbers"  # at 256 pixels


def test_new_images_at_each_number_of_tokens(tokenizer):
    config = kinds.GPT | {"vocab_size": tokenizer.vocab_size, "num_tokens": 8}
    gpt = kinds.build(kinds.Line(config=kinds.GPTConfig(**config), step=kinds.gpt_step))
    drawing = demo.Drawing(Pipeline(gpt, tokenizer, device="cpu"))
    assert drawing.counts == [1, 2, 4, 8]
    assert drawing.choices()[3] == ("3", 3)
    drawn = drawing.draw(3, seed=5)
    assert isinstance(drawn, Tokens)
    (few, said), (all_of_them, _) = drawing.at(drawn, 0, 5), drawing.at(drawn, 3, 5)
    assert said == "1 token"
    assert few.tobytes() != all_of_them.tobytes()
    assert drawing.at(None, 0, 5) == (None, "")


def test_an_exported_generator_is_a_space_and_a_pipeline_of_diffusers(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = kinds.GPT | {"vocab_size": tokenizer.vocab_size, "num_tokens": 8}
    gpt = kinds.build(kinds.Line(config=kinds.GPTConfig(**config), step=kinds.gpt_step))
    pipe = Pipeline(gpt, tokenizer, device="cpu")
    pipe.save_pretrained("model")
    assert main(["export", "model", "layout=imgtok", "out=space"]) == 0
    assert Path("space/requirements.txt").read_text() == "imgtok[demo]\n"
    ast.parse(Path("space/app.py").read_text())
    from diffusers import DiffusionPipeline
    from diffusers.utils import dynamic_modules_utils

    modules = tmp_path / "modules"  # the variable of the same name was read when diffusers was imported
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])
    theirs = DiffusionPipeline.from_pretrained("space", trust_remote_code=True).to("cpu")
    images = theirs(classes=[2, 4], generator=torch.Generator().manual_seed(1)).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in pipe(classes=[2, 4], seed=1)]
    assert list(modules.rglob("pipeline.py"))


def test_mistakes_are_named(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("model")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "model"]) == 2
    assert "demo needs gradio; install it: pip install 'imgtok[demo]'" in capsys.readouterr().err
    assert main(["demo", "model", "port=99999"]) == 2
    assert "port" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser(tokenizer, picture, tmp_path):
    """An image is uploaded, and other tokens show another picture of it."""
    pytest.importorskip("gradio")
    tokenizer.save_pretrained(tmp_path / "model")
    picture.save(tmp_path / "picture.png")
    words = [sys.executable, "-m", "imgtok", "demo", str(tmp_path / "model"), "port=17860", "device=cpu"]
    served = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert served.stdout is not None
        assert any("Running on local URL" in line for line in served.stdout)
        with browser.chromium() as page:
            page.open("http://127.0.0.1:17860")
            page.wait("!!document.querySelector('#given input[type=file]')")
            page.upload("#given input[type=file]", tmp_path / "picture.png")
            shown = "(document.querySelector('#rebuilt img') || {}).src"
            first = page.wait(shown)
            assert "8 tokens" in page.wait("document.querySelector('#cost').innerText")
            page.slide("#rate input[type=range]", 0)
            page.wait(f"{shown} && {shown} !== {first!r}")
            assert "1 token," in page.wait("document.querySelector('#cost').innerText")
    finally:
        served.kill()
        served.wait()
