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
    notes = [json.loads(line) for line in Path("both/controls-0.jsonl").read_text().splitlines()]
    assert {note["control"] for note in notes} == {"tome", "frap"}
    assert {image for note in notes for image in note["images"]} == {0, 1}
    assert main([*command[:-1], "out=plain"]) == 0
    plain = json.loads(Path("plain/samples.json").read_text())["request"]
    assert not {"controls", "entities", "parser"} & plain.keys()
    assert not Path("plain/controls-0.jsonl").exists()


def test_entities_are_given_to_a_command(folder, caplog, monkeypatch):
    caplog.set_level("INFO")
    command = ["sample", "model", "num=1", "grid=0", "controls=frap", "control_settings.frap.updates=1"]
    assert main([*command, f"prompts={PROMPT}", "entities=red circle,star", "out=given"]) == 0
    assert f"{PROMPT!r}: circle: red; star; not used: blue" in caplog.messages
    assert main([*command, f"prompts={PROMPT}", "entities=['red circle*', 'star*']", "out=as-refused"]) == 0
    Path("two.txt").write_text("a circle and a star, both red\na blue star\n")
    Path("entities.txt").write_text("circle* red,star\n\n")
    assert main([*command, "prompts=two.txt", "entities=entities.txt", "out=two"]) == 0
    request = json.loads(Path("two/samples.json").read_text())["request"]
    assert [(one["parser"], len(one["entities"])) for one in request["entities"]] == [("given", 2), ("grammar", 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["controls=tom"], "controls: given 'tom', must be one of uncontextualised, tome, frap"),
        (["controls=tome", "control_settings.frap.updates=1"], "control_settings.frap: there is no such control"),
        (["controls=frap", "control_settings.frap.low=2"], "low, high: given 2.0 and 1.4; weights start at 1"),
        (["controls=frap", "control_settings.frap.lo=2"], "control_settings.frap has no field 'lo'"),
        (["entities=red circle"], "entities: this is for controls, and there are none; say controls="),
        (["parser=textblob"], "parser: this is for controls"),
        (["controls=frap", "entities=red bird"], "the word 'bird' of 'red bird' is not in the prompt"),
        (["controls=frap", "prompts=three.txt", "entities=star"], "entities: given for 3 prompts; write a text file"),
        (["controls=frap", "entities=three.txt"], "entities: three.txt has 3 lines for 1 prompts"),
    ],
)
def test_mistakes_in_a_command(capfd, arguments, message):
    Path("three.txt").write_text("a star\n" * 3)
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
    with pytest.raises(ValueError, match="bird"):
        controlled(PROMPT, entities=["red bird"])
    with pytest.raises(ValueError, match="entities: these are for controls, and this pipeline has none"):
        plain(PROMPT, entities=["red circle"])
    with pytest.raises(ValueError, match=r"draws from text: give prompts=\.\.\."):
        controlled(3, entities=["red circle"])


def weighted(pipe: Pipeline) -> list[list[str]]:
    """The words that have weights, of each image of the last call."""
    (note,) = pipe.notes
    assert note["images"] == list(range(len(note["weights"])))
    return [sorted(one) for one in note["weights"]]


def test_entities_are_of_their_own_call_and_place():
    pipe = imgtok.pipeline("model", controls=imgtok.hub.controls_of(["frap"], {"frap": {"updates": 1}}))
    all_words = ["blue@19", "circle@6", "red@2", "star@24"]
    pipe.tokens(PROMPT, entities=["red circle"])
    assert weighted(pipe) == [["circle@6", "red@2"]]
    pipe.tokens(PROMPT)
    assert weighted(pipe) == [all_words], "what was said in one call is not kept for the next"
    pipe.tokens([PROMPT, PROMPT, PROMPT], entities=[["star"], None, ["blue star"]])
    assert weighted(pipe) == [["star@24"], all_words, ["blue@19", "star@24"]]
    pipe.tokens(PROMPT, entities=pipe.read_prompts([PROMPT])[0].entities, num_per_condition=2)
    assert weighted(pipe) == [all_words] * 2
    with pytest.raises(ValueError, match="parser: given 'other', must be one of grammar, textblob, spacy"):
        pipe.tokens(PROMPT, parser="other")
