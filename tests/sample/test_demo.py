"""`imgtok demo`: what its page shows, and the page itself as a program uses it, and in Chromium where that is there."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import browser
import kinds
import pytest
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


def test_mistakes_are_named(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("model")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "model"]) == 2
    assert "demo needs gradio; install it: pip install 'imgtok[demo]'" in capsys.readouterr().err
    assert main(["demo", "model", "port=99999"]) == 2
    assert "port" in capsys.readouterr().err


@pytest.fixture(scope="module")
def there(tokenizer, picture, tmp_path_factory) -> Path:
    """A folder with a picture, and with the model whose page is `served`."""
    folder = tmp_path_factory.mktemp("demo")
    tokenizer.save_pretrained(folder / "model")
    picture.save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def served(there) -> Iterator[str]:
    """The address of the page, which the command serves."""
    words = [sys.executable, "-m", "imgtok", "demo", str(there / "model"), "port=0", "device=cpu"]
    quiet = os.environ | {"GRADIO_ANALYTICS_ENABLED": "False", "NO_PROXY": "127.0.0.1,localhost"}
    program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet)
    deadline = threading.Timer(600, program.kill)
    deadline.start()
    try:
        assert program.stdout is not None
        said = ""
        while "Running on local URL" not in said:
            line = program.stdout.readline()
            assert line, f"the command ended before the page was there:\n{said}"
            said += line
        yield said.split()[-1]
    finally:
        deadline.cancel()
        program.kill()
        program.wait()


@pytest.mark.page
def test_a_program_uses_the_page(tokenizer, picture, there, tmp_path, served):
    """As a browser does: an image is uploaded, and another place of the slider shows another picture of it."""
    from gradio_client import Client, handle_file

    showing = demo.Rebuilding(tokenizer)
    encoded = showing.encode(picture)
    client = Client(served, verbose=False, download_files=tmp_path)
    client.predict(handle_file(there / "picture.png"), api_name="/encode")
    for place in (3, 0):
        shown, cost = client.predict(place, api_name="/at")
        expected, said = showing.at(encoded, place)
        assert cost == said
        with Image.open(shown) as image:
            assert image.tobytes() == expected.tobytes()
    assert showing.at(encoded, 0)[0].tobytes() != showing.at(encoded, 3)[0].tobytes()


@pytest.mark.page
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_in_a_browser(there, served):
    """An image is uploaded, and other tokens show another picture of it."""
    with browser.chromium() as page:
        page.open(served)
        page.wait("!!document.querySelector('#given input[type=file]')")
        page.upload("#given input[type=file]", there / "picture.png")
        shown = "(document.querySelector('#rebuilt img') || {}).src"
        first = page.wait(shown)
        assert "8 tokens" in page.wait("document.querySelector('#cost').innerText")
        page.slide("#rate input[type=range]", 0)
        page.wait(f"{shown} && {shown} !== {first!r}")
        assert "1 token," in page.wait("document.querySelector('#cost').innerText")
