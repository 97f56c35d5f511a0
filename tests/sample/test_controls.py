"""`imgtok sample` and `imgtok.pipeline` with controls of prompts, from a tiny model's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_t5 import tiny_t5

import imgtok
from imgtok.cli import main
from imgtok.generators.conditioning import TextCrossAttention
from imgtok.generators.gpt import GPT, GPTConfig
from imgtok.generators.pipeline import Pipeline
from imgtok.text.encoder import TextEncoder
from imgtok.tokenizers.vq import VQ, TableConfig, VQConfig

PROMPT = "a red circle and a blue star"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("controls")
    encoder = TextEncoder.load(str(tiny_t5(root / "t5")), max_length=12, device=torch.device("cpu"))
    torch.manual_seed(0)
    tokenizer = VQ(
        VQConfig(
            image_size=16, block_channels=(8, 8, 8), layers_per_block=1, hidden_channels=8, norm_groups=4,
            quantizer=TableConfig(vocab_size=16, width=4),
        )
    )  # fmt: skip
    condition = TextCrossAttention(text_width=16, text_length=12, text_encoder=str(root / "t5"))
    sizes = {"vocab_size": tokenizer.vocab_size, "num_tokens": tokenizer.num_tokens, "positions": "rotary_2d"}
    model = GPT(GPTConfig(**sizes, width=32, depth=1, num_heads=2, condition=condition))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    model.set_empty_caption(encoder.encode([""])[0].features[0])
    Pipeline(model, tokenizer).save_pretrained(root / "model")
    return root


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)


def test_a_command_says_and_stores_what_was_understood(caplog):
    caplog.set_level("INFO")
    command = ["sample", "model", f"prompts={PROMPT}", "num=2", "grid=0", "controls=tome,frap"]
    assert main([*command, "control_settings.frap.updates=1", "out=both"]) == 0
    assert f"{PROMPT!r}: circle: red; star: blue" in caplog.messages
    request = json.loads(Path("both/samples.json").read_text())["request"]
    assert request["controls"] == ["tome", "frap"]
    assert request["control_settings"] == {"frap": {"updates": 1}}
    assert [one["head"] for one in request["entities"][0]["entities"]] == ["circle", "star"]
    assert main([*command[:-1], "out=plain"]) == 0
    assert "controls" not in json.loads(Path("plain/samples.json").read_text())["request"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["controls=tom"], "controls: given 'tom', must be one of tome, frap"),
        (["controls=tome", "control_settings.frap.updates=1"], "control_settings.frap: there is no such control"),
        (["controls=frap", "control_settings.frap.low=2"], "low, high: given 2.0 and 1.4; weights start at 1"),
        (["controls=frap", "control_settings.frap.lo=2"], "control_settings.frap has no field 'lo'"),
    ],
)
def test_mistakes_in_a_command(capfd, arguments, message):
    assert main(["sample", "model", f"prompts={PROMPT}", "num=1", "out=wrong", *arguments]) != 0
    assert message in capfd.readouterr().err


def test_a_pipeline_in_python():
    plain, controlled = imgtok.pipeline("model"), imgtok.pipeline("model", controls=["tome", "frap"])
    expected = plain.tokens(PROMPT, seed=1)
    assert len(controlled.tokens(PROMPT, seed=1)) == 1
    assert {note["control"] for note in controlled.notes} == {"tome", "frap"}
    off = imgtok.pipeline("model", controls=[imgtok.hub.controls_of("frap")[0]])
    off.controls = imgtok.hub.controls_of(["frap"], {"frap": {"strength": 0}})
    assert torch.equal(off.tokens(PROMPT, seed=1).ids, expected.ids)
    controlled(PROMPT, entities=["red circle"])
    assert [one.head.text for one in controlled.parses[PROMPT].entities] == ["circle"]
    with pytest.raises(ValueError, match="bird"):
        controlled(PROMPT, entities=["red bird"])
