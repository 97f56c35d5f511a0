"""`imgtok export ... layout=onnx`: each file is what torch computes, for any number of images."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import kinds
import pytest
import torch

import imgtok
from imgtok.cli import main
from imgtok.sample import onnx_files

WRITTEN = ["flextok-vae", "karl", "tokenbridge_tokenizer"]
"""What is exported besides a codebook tokenizer and lone autoencoders."""
SIDE = replace(kinds.DCAE_SIDE, blocks=("ResBlock", "EfficientViTBlock"), kernels=(0, 5))
ATTENTION = replace(kinds.LINES["dcae"], config=replace(kinds.SMALL_DCAE, encoder=SIDE, decoder=SIDE))
"""A DC-AE with its attention, which divides by sums that can be 0."""


@pytest.fixture(autouse=True)
def there(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def export(line: kinds.Line) -> dict[str, dict]:
    kinds.build(line).save_pretrained("model")
    assert main(["export", "model", "layout=onnx", "out=files"]) == 0
    parts = json.loads(Path("files/onnx.json").read_text())["parts"]
    assert {part["file"] for part in parts.values()} == {path.name for path in Path("files").glob("*.onnx")}
    return parts


@pytest.mark.slow
def test_a_codebook_tokenizer(caplog):
    pytest.importorskip("onnxruntime")
    caplog.set_level(logging.INFO)
    parts = export(kinds.LINES["vq"])
    assert parts["encoder"]["inputs"] == {"images": ["batch", 3, 16, 16]}
    assert parts["encoder"]["relative"] == 0.0  # ids
    assert parts["decoder"]["largest"] < 1e-5
    assert "encoder.onnx (" in caplog.text
    assert "images (batch, 3, 16, 16) -> ids; 0 % of the ids differ" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("line", [kinds.LINES["vae"], ATTENTION, kinds.LINES["maskgit_vqgan"]])
def test_a_lone_autoencoder_takes_images_of_any_size(line):
    """It was compared with torch at another size than it was made with; here it computes a third one."""
    pytest.importorskip("onnxruntime")
    parts = export(line)
    assert parts["encoder"]["inputs"] == {"images": ["batch", 3, "2 rows", "2 columns"]}
    assert parts["decoder"]["inputs"] == {"latents": ["batch", 4, "rows", "columns"]}
    assert max(part["largest"] for part in parts.values()) < 1e-4
    model, images = imgtok.load("model"), kinds.random(1, 3, 22, 48).clamp(-1, 1)
    with torch.no_grad():
        latents = model.encode(images)
        expected = {"encoder": latents, "decoder": model.decode(latents)}
    for part, given in (("encoder", {"images": images}), ("decoder", {"latents": latents})):
        assert torch.allclose(onnx_files.computed(Path(f"files/{part}.onnx"), given), expected[part], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_tokenizers_that_stand_on_an_autoencoder(name):
    pytest.importorskip("onnxruntime")
    parts = export(kinds.LINES[name])
    own = {"encoder", "decoder_step"} if name == "flextok-vae" else set()
    assert parts.keys() == own | {"autoencoder_encoder", "autoencoder_decoder"}
    assert parts["autoencoder_encoder"]["inputs"] == {"images": ["batch", 3, 16, 16]}
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
