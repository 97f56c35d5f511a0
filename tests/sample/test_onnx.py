"""`imgtok export ... layout=onnx`: each file is what torch computes, for any number of images."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import kinds
import pytest

from imgtok.cli import main
from imgtok.sample import onnx_files

WRITTEN = ["vae", "flextok-vae"]
"""What is exported in the slow tests, besides the codebook tokenizer of the fast one."""


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def export(name: str) -> dict[str, dict]:
    kinds.build(kinds.LINES[name]).save_pretrained("model")
    assert main(["export", "model", "layout=onnx", "out=files"]) == 0
    parts = json.loads(Path("files/onnx.json").read_text())["parts"]
    assert {part["file"] for part in parts.values()} == {path.name for path in Path("files").glob("*.onnx")}
    return parts


@pytest.mark.slow
def test_a_codebook_tokenizer(caplog):
    pytest.importorskip("onnxruntime")
    caplog.set_level(logging.INFO)
    parts = export("vq")
    assert parts["encoder"]["inputs"] == {"images": ["batch", 3, 16, 16]}
    assert parts["encoder"]["relative"] == 0.0  # ids
    assert parts["decoder"]["largest"] < 1e-5
    assert "encoder.onnx (" in caplog.text
    assert "images (batch, 3, 16, 16) -> ids; 0 % of the ids differ" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_a_flow_and_an_autoencoder(name):
    pytest.importorskip("onnxruntime")
    parts = export(name)
    assert parts
    for name, part in parts.items():
        assert part["largest"] < (0.02 if part["output"] == "ids" else 1e-4), name


def test_mistakes_are_named(monkeypatch, capsys):
    kinds.build(kinds.LINES["gpt"]).save_pretrained("gpt")
    assert main(["export", "gpt", "layout=onnx", "out=files"]) == 2
    assert "layout: onnx is for tokenizers and autoencoders, and this is a GPT; its decoder" in capsys.readouterr().err
    kinds.build(kinds.LINES["vq"]).save_pretrained("model")
    Path("files").mkdir()
    Path("files/onnx.json").write_text('{"model": {"fingerprint": "0"}}')
    assert main(["export", "model", "layout=onnx", "out=files"]) == 2
    assert "out: files holds the files of another model" in capsys.readouterr().err
    monkeypatch.setattr(onnx_files, "NEEDED", ("onnx_of_nobody",))
    assert main(["export", "model", "layout=onnx", "out=files"]) == 2
    expected = "layout: onnx needs onnx_of_nobody; install it: pip install 'imgtok[onnx]'"
    assert expected in capsys.readouterr().err
    assert main(["export", "model", "layout=onnx", "vae=model", "out=files"]) == 2
    assert "vae: the onnx layout has no place for an autoencoder" in capsys.readouterr().err


def test_a_file_that_computes_something_else_is_refused(tmp_path):
    part = onnx_files.Written("decoder.onnx", 0.1, {"ids": ["batch", 4]}, "images", 0.5, 0.01)
    (tmp_path / part.file).write_bytes(b"")
    with pytest.raises(ValueError, match=r"decoder.onnx: onnxruntime computes something else than torch \(.*deleted"):
        onnx_files.refuse_unlike(part, tmp_path)
    assert not (tmp_path / part.file).exists()
