"""`imgtok cache text` with a tiny random T5, and with MiniLM; then training on its features, and pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load, save_file
from tiny_t5 import tiny_t5

import imgtok
from imgtok.cli import main
from imgtok.data.captions import CaptionDataset
from imgtok.data.loaders import token_loader
from imgtok.data.sources import DataError
from imgtok.data.tokens import TokenDataset
from imgtok.generators.controls.uncontextualised import UncontextualisedConfig
from imgtok.generators.pipeline import Pipeline
from imgtok.metrics.saved_images import SavedImages
from imgtok.shapes.captions import VOCABULARY, caption
from imgtok.shapes.dataset import ShapesDataset
from imgtok.shapes.world import ShapesConfig, scene
from imgtok.signals import Stopped
from imgtok.text.captions import Captions
from imgtok.text.encoder import MINILM_PACKAGE, TextEncoder
from imgtok.text.words import build
from imgtok.tokenizers.flextok import FlexTok, FlexTokConfig, FlexTokDecoding, TrunkConfig
from imgtok.tokenizers.vae import VAE, VAEConfig
from imgtok.train import cache_text
from imgtok.train.captions import check_same_encoder
from imgtok.train.failure import tensors_of

CPU = torch.device("cpu")
SHAPES = ShapesConfig(mode="text", num_images=40)


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    return tiny_t5(tmp_path_factory.mktemp("t5"))


def cache(t5: Path, out: Path, **fields) -> CaptionDataset:
    fields = {"data": SHAPES, "shard_size": 16, "batch_size": 8, "max_length": 12} | fields
    cache_text.main(cache_text.Config(encoder=str(t5), out=out, **fields))
    return CaptionDataset(out)


@pytest.fixture(scope="module")
def text(t5, tmp_path_factory) -> CaptionDataset:
    return cache(t5, tmp_path_factory.mktemp("text") / "features")


# ------------------------------------------------------------------------------------------------ the encoder


def test_features_are_those_of_transformers(t5):
    """Alone and in a padded batch; with its end mark, which a long text keeps."""
    encoder = TextEncoder.load(str(t5), max_length=4, device=CPU)
    texts = ["a red circle", "", "a red circle and a blue ring above a small square"]
    short, empty, long = (caption.features[0] for caption in encoder.encode(texts))
    assert [len(rows) for rows in (short, empty, long)] == [4, 1, 4]
    model = transformers.T5EncoderModel.from_pretrained(t5).eval()
    ids = [2 + 1 + VOCABULARY.index(word) for word in ("a", "red", "circle")]
    with torch.no_grad():
        expected = model(torch.tensor([[*ids, 1]])).last_hidden_state[0]
        torch.testing.assert_close(short, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(empty, model(torch.tensor([[1]])).last_hidden_state[0], atol=1e-5, rtol=1e-5)
        cut = model(torch.tensor([[*ids, 1]])).last_hidden_state[0]
    torch.testing.assert_close(long, cut, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder.encode(texts[:1])[0].features[0], short, atol=1e-5, rtol=1e-5)
    assert encoder.width == 16


def test_columns_of_words_are_found_by_their_characters(t5):
    text = "a red circle and a small blue ring"
    captions = Captions.cat(TextEncoder.load(str(t5), max_length=12, device=CPU).encode(["a red circle", text]))
    pieces = text.split()
    for word in ("red", "small", "ring"):
        start = text.index(word)
        assert captions.columns(1, start, start + len(word)) == [pieces.index(word)]
    assert captions.columns(1, 0, len(text)) == list(range(8)), "without the end mark"
    assert captions.columns(0, text.index("ring"), len(text)) == []
    assert captions.spans[0, 3:].tolist() == [[0, 0]] * 6


def test_fingerprints_and_empty_captions_tell_encoders_apart(t5, tmp_path):
    encoder = TextEncoder.load(str(t5), max_length=12, device=CPU)
    other = TextEncoder.load(str(tiny_t5(tmp_path / "other", seed=1)), max_length=12, device=CPU)
    again = TextEncoder.load(str(tiny_t5(tmp_path / "again")), max_length=4, device=CPU)
    assert encoder.fingerprint() == again.fingerprint() != other.fingerprint()
    empty = encoder.encode([""])[0].features[0]
    again.check_same(empty.half())
    with pytest.raises(ValueError, match="is not the encoder that the generator was trained with"):
        other.check_same(empty)


def test_folders_that_are_no_text_encoder(t5, tmp_path):
    folder = tiny_t5(tmp_path / "t5")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        TextEncoder.load(str(folder), max_length=4, device=CPU)
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="not a T5 text encoder"):
        TextEncoder.load(str(folder), max_length=4, device=CPU)
    tensors = load(weights)
    del tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights missing, such as encoder\.block\.1"):
        TextEncoder.load(str(folder), max_length=4, device=CPU)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: missing"):
        TextEncoder.load(str(folder), max_length=4, device=CPU)


def test_without_transformers_the_error_says_what_to_install(t5, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"text needs the library transformers.*pip install 'imgtok\[text\]'"):
        TextEncoder.load(str(t5), max_length=4, device=CPU)


# ------------------------------------------------------------------------------------------------ the command


def test_every_caption_has_its_features(t5, text):
    shapes, encoder = ShapesDataset(SHAPES, 8), TextEncoder.load(str(t5), max_length=12, device=CPU)
    assert len(text) == 40
    texts = [shapes.caption(index).text for index in range(40)]
    assert len({len(text.features(index)) for index in range(40)}) > 3
    for index in (0, 7, 16, 39):
        expected = encoder.encode([texts[index]])[0]
        torch.testing.assert_close(text.features(index).float(), expected.features[0], atol=2e-3, rtol=2e-3)
        assert torch.equal(text.spans(index), expected.spans[0])
    assert torch.equal(text.empty, encoder.encode([""])[0].features[0].half().float())


def test_an_interrupted_command_writes_only_what_is_missing(t5, text, tmp_path):
    cache(t5, tmp_path)
    whole = {path.name: path.read_bytes() for path in text.folder.iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole
    first, second, _ = sorted(tmp_path.iterdir())
    second.unlink()
    before = first.stat().st_mtime_ns
    cache(t5, tmp_path)
    assert second.read_bytes() == whole[second.name]
    assert first.stat().st_mtime_ns == before


def test_data_without_captions_is_refused(t5, tmp_path):
    with pytest.raises(DataError, match="images 0 to 15 of shapes data have no captions"):
        cache(t5, tmp_path, data=ShapesConfig(num_images=40))


# ------------------------------------------------------------------------------------------------ to pictures


@pytest.fixture(scope="module")
def trained(t5, tmp_path_factory) -> Path:
    """Tokens and text features of the same shapes, and a generator trained on both through the command line."""
    folder = tmp_path_factory.mktemp("trained")
    trunk = TrunkConfig(width=16, depth=1, head_dim=8)
    torch.manual_seed(0)
    tokenizer = FlexTok(
        FlexTokConfig(
            image_size=16,
            patch_size=4,
            num_registers=4,
            levels=(4, 4),
            encoder=trunk,
            decoder=trunk,
            decoding=FlexTokDecoding(steps=2),
        )
    )
    for parameter in tokenizer.parameters():
        if parameter.ndim > 1 and not parameter.any():  # with the zeros of a fresh model nothing depends on the image
            torch.nn.init.normal_(parameter, std=0.5)
    tokenizer.save_pretrained(folder / "tokenizer")
    data = ("data.kind=shapes", "data.mode=text", "data.num_images=12")
    run("cache", folder / "tokenizer", f"out={folder / 'tokens'}", *data)
    run("cache", "text", t5, f"out={folder / 'text'}", "max_length=24", *data)
    run(
        "train", "generator", f"out={folder / 'run'}", f"tokens={folder / 'tokens'}", f"text={folder / 'text'}",
        f"tokenizer={folder / 'tokenizer'}", "num_preview=2", "model.kind=gpt",
        "model.condition.kind=cross_attention", "model.width=32",
        "model.depth=1", "model.num_heads=2", "model.mlp_multiple=1", "model.dropout=0.0", "training.steps=80",
        "training.batch_size=12", "training.learning_rate=2e-2", "training.ema=0", "training.trackers=[]",
    )  # fmt: skip
    return folder


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_training_fills_in_the_text_and_learns(trained, t5):
    model = imgtok.load(trained / "run/final")
    condition = model.config.condition
    assert (condition.text_width, condition.text_length, condition.empty_length) == (16, 24, 1)
    assert condition.text_encoder == str(t5)
    assert torch.equal(model.empty_caption, CaptionDataset(trained / "text").empty)
    lines = [json.loads(line) for line in (trained / "run/log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert (trained / "run/samples/step_0000080.png").is_file()


def test_each_caption_was_joined_to_its_image(trained):
    """The model finds an image's tokens likelier after its own caption than after the next image's."""
    model, tokens = imgtok.load(trained / "run/final"), TokenDataset(trained / "tokens")
    text, indices = CaptionDataset(trained / "text"), tokens.indices.tolist()
    ids = tokens.tokens(range(len(tokens))).ids
    with torch.no_grad():
        logits = [model.logits(text.batch(rows), ids) for rows in (indices, indices[1:] + indices[:1])]
    own, other = (F.cross_entropy(these.flatten(0, 1), ids.flatten()) for these in logits)
    assert own < other - 0.2


def test_prompts_become_pictures(trained, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue ring above a small square\n", encoding="utf-8")
    model = trained / "run/final"
    run("sample", model, f"prompts={prompts}", "num=5", "exact=true", f"out={tmp_path / 'five'}")
    record = json.loads((tmp_path / "five/samples.json").read_text())
    assert record["labels"] == [0, 1, 0, 1, 0]
    assert record["request"]["prompts"] == ["a red circle", "a blue ring above a small square"]
    pictures = [(tmp_path / f"five/{i:06d}.png").read_bytes() for i in range(5)]
    assert len(set(pictures)) == 5
    # image 1 drawn with another batch size and among others is the same; with another prompt it is not
    run(
        "sample",
        model,
        f"prompts={prompts}",
        "num=2",
        "batch_size=1",
        "grid=0",
        "exact=true",
        f"out={tmp_path / 'two'}",
    )
    assert [(tmp_path / f"two/{i:06d}.png").read_bytes() for i in range(2)] == pictures[:2]
    run("sample", model, "prompts=a red circle", "num=2", "num_tokens=2", "grid=0", f"out={tmp_path / 'one'}")
    assert json.loads((tmp_path / "one/samples.json").read_text())["request"]["prompts"] == ["a red circle"]
    assert (tmp_path / "one/000001.png").read_bytes() != pictures[1]
    assert SavedImages(tmp_path / "five").labels is None  # the numbers of prompts are no classes
    for _ in range(2):  # the second time there is nothing to do
        run("sample", model, f"prompts={prompts}", "num=2", "format=npz", f"out={tmp_path / 'npz'}")
    with np.load(tmp_path / "npz/samples.npz") as arrays:
        assert arrays["prompts"].tolist() == [0, 1]
        assert "arr_1" not in arrays
    prompts.write_text("a red circle\na pink star\n", encoding="utf-8")
    assert main(["sample", str(model), f"prompts={prompts}", "num=5", f"out={tmp_path / 'five'}"]) == 2


def test_captions_may_stand_before_the_tokens(trained, t5, tmp_path):
    run(
        "train", "generator", f"out={tmp_path / 'run'}", f"tokens={trained / 'tokens'}", f"text={trained / 'text'}",
        f"tokenizer={trained / 'tokenizer'}", "num_preview=2", "model.kind=gpt", "model.condition.kind=text_prefix",
        "model.width=32", "model.depth=1", "model.num_heads=2", "model.mlp_multiple=1", "training.steps=4",
        "training.batch_size=4", "training.learning_rate=1e-2", "training.trackers=[]",
    )  # fmt: skip
    model = imgtok.load(tmp_path / "run/final")
    condition = model.config.condition
    assert (condition.kind, condition.text_width, condition.text_length) == ("text_prefix", 16, 24)
    assert condition.text_encoder == str(t5)
    assert (tmp_path / "run/samples/step_0000004.png").is_file()
    run("sample", tmp_path / "run/final", "prompts=a red circle", "num=2", "grid=0", f"out={tmp_path / 'two'}")
    assert (tmp_path / "two/000001.png").is_file()
    assert torch.equal(model.empty_caption, CaptionDataset(trained / "text").empty.float())
    TextEncoder.load(str(t5), max_length=24, device=CPU).check_same(model.empty_caption)
    model.empty_caption.neg_()  # as if it had been trained with another one
    pipe = Pipeline(model, imgtok.load(trained / "tokenizer"), device="cpu")
    with pytest.raises(ValueError, match="is not the encoder that the generator was trained with"):
        pipe(prompts="a red circle")
    card = (tmp_path / "run/final/README.md").read_text()
    assert f'imgtok.pipeline("{tmp_path / "run/final"}")' in card
    assert "pipeline_tag: text-to-image" in card


def test_controls_act_on_what_is_trained_on_and_on_what_is_drawn(trained, t5, tmp_path):
    """The captions of training are those that the generator reads when it draws, without anybody naming a control."""
    data = ("data.kind=shapes", "data.mode=text", "data.num_images=12")
    run("cache", "text", t5, f"out={tmp_path / 'text'}", "max_length=24", "controls=uncontextualised", *data)
    text, plain = CaptionDataset(tmp_path / "text"), CaptionDataset(trained / "text")
    assert text.info.digest != plain.info.digest
    run(
        "train", "generator", f"init={trained / 'run/final'}", f"out={tmp_path / 'run'}",
        f"tokens={trained / 'tokens'}", f"text={tmp_path / 'text'}", f"tokenizer={trained / 'tokenizer'}",
        "training.steps=2", "training.batch_size=4", "training.learning_rate=1e-2",
        "training.trackers=[]", "training.preview_every=0",
    )  # fmt: skip
    pipe = imgtok.pipeline(tmp_path / "run/final", device="cpu")
    assert [control.config for control in pipe.controls_of_training] == [UncontextualisedConfig()]
    off = imgtok.pipeline(tmp_path / "run/final", device="cpu", controls=[UncontextualisedConfig(strength=0)])
    assert not off.controls_of_training, "what is named is not done twice"
    read, generate = [], pipe.generator.generate
    pipe.generator.generate = lambda captions, **how: read.append(captions) or generate(captions, **how)
    texts = scene_texts(12)
    number = next(i for i, said in enumerate(texts) if " and " in said and len(said.split()) < 20)
    pipe(texts[number])
    trained_on = text.features(number).float()
    assert not torch.allclose(trained_on, plain.features(number).float(), atol=1e-2)
    torch.testing.assert_close(read[-1].features[0, : len(trained_on)], trained_on, atol=2e-3, rtol=2e-3)
    run("sample", tmp_path / "run/final", f"prompts={texts[number]}", "num=1", "grid=0", f"out={tmp_path / 'one'}")
    for left_alone in ("", " ".join(["a red circle and"] * 9), "red red"):  # nobody named a control that could refuse
        assert len(pipe(left_alone)) == 1
        assert torch.equal(read[-1].features, pipe.encoder().encode([left_alone])[0].features)


def test_captions_that_are_cut_off_stay_as_they_are(t5, tmp_path, caplog):
    kinds = {"with": ("uncontextualised",), "without": ()}
    short, plain = (cache(t5, tmp_path / name, max_length=6, controls=those) for name, those in kinds.items())
    told = [message for message in caplog.messages if "captions stay as they are" in message]
    assert told
    assert all("the prompt is too long" in message for message in told)
    number = next(i for i, said in enumerate(scene_texts(40)) if len(said.split()) > 20)
    assert torch.equal(short.features(number), plain.features(number))


def test_controls_that_cannot_act_on_captions(t5, tmp_path):
    for kind, message in (
        ("frap", "controls: frap acts while images are drawn"),
        ("grap", "controls: given 'grap', must be one"),
    ):
        with pytest.raises(ValueError, match=message):
            cache(t5, tmp_path / kind, controls=(kind,))


def test_validation_has_the_controls_of_training(text):
    other = dataclasses.replace(text.info, controls=("uncontextualised",))
    with pytest.raises(DataError, match=r"controls of prompts none, and text has those with uncontextualised"):
        check_same_encoder(text.info, other)


@pytest.mark.skipif(importlib.util.find_spec(MINILM_PACKAGE) is None, reason="pip install 'imgtok[judges]'")
def test_minilm_goes_from_captions_to_pictures(trained, t5, tmp_path):
    """By its name all the way; and nobody asks for more features than it has positions."""
    data = ("data.kind=shapes", "data.mode=text", "data.num_images=12")
    run("cache", "text", "minilm", f"out={tmp_path / 'text'}", "max_length=600", *data)
    text = CaptionDataset(tmp_path / "text")
    assert (text.info.encoder, text.info.width, text.info.max_length, len(text.empty)) == ("minilm", 384, 512, 2)
    run(
        "train", "generator", f"out={tmp_path / 'run'}", f"tokens={trained / 'tokens'}", f"text={tmp_path / 'text'}",
        f"tokenizer={trained / 'tokenizer'}", "num_preview=2", "model.kind=gpt",
        "model.condition.kind=cross_attention", "model.width=32",
        "model.depth=1", "model.num_heads=2", "model.mlp_multiple=1", "training.steps=2",
        "training.batch_size=4", "training.learning_rate=1e-2", "training.trackers=[]",
    )  # fmt: skip
    pipe = imgtok.pipeline(tmp_path / "run/final", device="cpu")
    assert pipe.text_encoder == "minilm"
    (named,), (first,) = pipe(prompts="a red circle"), pipe("a red circle")
    assert named.tobytes() == first.tobytes()
    assert len(pipe(["a red circle", "a blue ring"], num_per_condition=2)) == 4
    run("sample", tmp_path / "run/final", "prompts=a red circle", "num=1", "grid=0", f"out={tmp_path / 'one'}")
    assert (tmp_path / "one/000000.png").is_file()
    with pytest.raises(ValueError, match="is not the encoder that the generator was trained with"):
        imgtok.pipeline(tmp_path / "run/final", device="cpu", text_encoder=str(t5))("a red circle")


def test_words_go_from_captions_to_pictures_without_any_download(trained, tmp_path):
    data = ("data.kind=shapes", "data.mode=text", "data.num_images=12")
    run("cache", "text", "words", f"out={tmp_path / 'text'}", "max_length=24", *data)
    text = CaptionDataset(tmp_path / "text")
    assert text.info.encoder == str(tmp_path / "text/words")
    assert text.info.width == len(set(" ".join(scene_texts(12)).replace(",", " ,").split())) + 2
    run(
        "train", "generator", f"out={tmp_path / 'run'}", f"tokens={trained / 'tokens'}", f"text={tmp_path / 'text'}",
        f"tokenizer={trained / 'tokenizer'}", "num_preview=2", "model.kind=gpt",
        "model.condition.kind=cross_attention", "model.condition.context_layers=1", "model.width=32",
        "model.depth=1", "model.num_heads=2", "model.mlp_multiple=1", "training.steps=2",
        "training.batch_size=4", "training.learning_rate=1e-2", "training.trackers=[]",
    )  # fmt: skip
    (tmp_path / "text").rename(tmp_path / "moved")  # the model has its own words
    pipe = imgtok.pipeline(tmp_path / "run/final", device="cpu")
    (first,) = pipe("a red circle")
    captions = pipe.condition(["a red circle", "a zebra"])
    with torch.no_grad():
        logits = pipe.generator.logits(captions, torch.zeros(2, pipe.generator.config.num_tokens, dtype=torch.long))
    assert not torch.equal(logits[0], logits[1])
    assert captions.features.sum(-1).tolist() == [[1.0] * 4, [1.0] * 3 + [0.0]]
    other = build([" ".join(f"w{k}" for k in range(text.info.width - 2))], tmp_path / "other")
    with pytest.raises(ValueError, match="is not the encoder that the generator was trained with: its word 2 is"):
        imgtok.pipeline(tmp_path / "run/final", device="cpu", text_encoder=str(other))("a red circle")
    assert captions.columns(0, 2, 5) == [1]
    pipe.save_pretrained(tmp_path / "again")
    assert imgtok.pipeline(tmp_path / "again", device="cpu")("a red circle")[0].tobytes() == first.tobytes()


def scene_texts(count: int) -> list[str]:
    return [caption(scene("train", k), "train", k).text for k in range(count)]


def test_a_mistyped_encoder_is_said_before_the_data_are_opened(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    words = ["data.kind=folder", f"data.path={tmp_path / 'empty'}", f"out={tmp_path / 'out'}"]
    assert main(["cache", "text", "minilmm", *words]) == 2
    assert "there is no text encoder 'minilmm'" in capsys.readouterr().err


def test_the_documentations_control_runs(trained):
    text = (Path(__file__).parents[2] / "docs/flextok.md").read_text(encoding="utf-8")
    lines = text.partition("### Captions under control")[2].partition("```python")[2].partition("```")[0]
    found: dict[str, Any] = {}
    exec(lines.replace("outputs/text/flextok-d12/final", str(trained / "run/final")), found)
    assert found["columns"] == [1]
    assert found["red"].shape == (2, 4)
    assert found["gradient"].any()
    assert len(found["images"]) == 1


def test_ids_follow_the_prompt_through_the_pipeline(trained, t5):
    from imgtok.generators.pipeline import pipeline
    from imgtok.generators.sampling import TokenSampling

    pipe = pipeline(trained / "run/final", device=CPU)
    condition = pipe.condition(["a pink star", "a red circle", "a pink star"])
    encoder = TextEncoder.load(str(t5), max_length=24, device=CPU)
    expected = Captions.cat([encoder.encode([text])[0] for text in ("a pink star", "a red circle", "a pink star")])
    assert torch.equal(condition.features, expected.features)
    greedy = TokenSampling(top_k=1, guidance=1.0)
    ids = pipe.generator.generate(condition, seed=0, indices=range(3), sampling=greedy).ids
    assert torch.equal(ids[0], ids[2])
    ids = pipe.tokens(prompts=["a pink star", "a red circle", "a pink star"], top_k=1, guidance=1).ids
    assert torch.equal(ids[0], ids[2])
    with pytest.raises(ValueError, match="draws from text: give prompts="):
        pipe(classes=[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "this generator draws from text"),
        (["prompts=a red circle", "classes=[1]"], "classes: this generator draws from text and has none"),
        (["prompts=nowhere.txt"], "nowhere.txt: No such file"),
        (["prompts=a red circle", "text_encoder=nowhere"], "say where the text encoder is with text_encoder=FOLDER"),
    ],
)
def test_sampling_mistakes_are_said(trained, tmp_path, capsys, words, message):
    assert main(["sample", str(trained / "run/final"), f"out={tmp_path / 'out'}", *words]) == 2
    assert message in capsys.readouterr().err


def test_scoring_asks_for_pictures_of_prompts(trained, tmp_path, capsys):
    words = [
        f"model={trained / 'run/final'}",
        "data.kind=shapes",
        "metrics=[oracle]",
        f"out={tmp_path / 'scores.json'}",
    ]
    assert main(["evaluate", *words]) == 2
    assert "score its images with imgtok evaluate images=FOLDER" in capsys.readouterr().err


def test_a_failed_batch_is_kept_with_its_captions(trained):
    tokens, text = TokenDataset(trained / "tokens"), CaptionDataset(trained / "text")
    kept = tensors_of(next(token_loader(tokens, 3, seed=0, captions=text)))
    assert set(kept) == {
        "content.ids",
        "content.lengths",
        "labels",
        "captions.features",
        "captions.mask",
        "captions.spans",
    }
    assert len(kept["captions.features"]) == 3


def test_another_text_encoder_is_refused(trained, tmp_path, capsys):
    other = tiny_t5(tmp_path / "other", seed=1)
    words = [f"text_encoder={other}", "prompts=a red circle", f"out={tmp_path / 'out'}"]
    assert main(["sample", str(trained / "run/final"), *words]) == 2
    assert "is not the encoder that the generator was trained with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.condition.kind=cross_attention"], "text: is required with model.condition.kind=cross_attention"),
        (["text={text}"], "text: model.condition.kind=class_slot reads no text"),
    ],
)
def test_training_mistakes_are_said(trained, tmp_path, capsys, words, message):
    words = [word.format(text=trained / "text") for word in words]
    given = [f"tokens={trained / 'tokens'}", f"tokenizer={trained / 'tokenizer'}", f"out={tmp_path}", "model.kind=gpt"]
    training = ["training.steps=1", "training.batch_size=2", "training.learning_rate=1e-3"]
    assert main(["train", "generator", *given, *training, *words]) == 2
    assert message in capsys.readouterr().err


def test_held_out_captions_are_validated_on_and_those_of_another_encoder_are_not(trained, t5, tmp_path, capsys):
    data = ("data.kind=shapes", "data.mode=text", "data.num_images=12", "split=held_out")
    run("cache", trained / "tokenizer", f"out={tmp_path / 'tokens'}", *data)
    for name, encoder in (("text", t5), ("other", tiny_t5(tmp_path / "encoder", seed=1))):
        run("cache", "text", encoder, f"out={tmp_path / name}", "max_length=24", *data)

    def train(text: str) -> int:
        return main([
            "train", "generator", f"out={tmp_path / 'run'}", f"init={trained / 'run/final'}",
            f"tokens={trained / 'tokens'}", f"text={trained / 'text'}", f"tokenizer={trained / 'tokenizer'}",
            f"validation={tmp_path / 'tokens'}", f"validation_text={tmp_path / text}", "training.validate_every=1",
            "training.steps=1", "training.batch_size=4", "training.learning_rate=1e-3", "training.trackers=[]",
        ])  # fmt: skip

    assert train("other") == 2
    assert "validation_text: features of" in capsys.readouterr().err
    assert train("text") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation/loss" in line] == [0, 1]


# ------------------------------------------------------------------------------------------------ through latents


@pytest.fixture(scope="module")
def trained_on_latents(t5, tmp_path_factory) -> Path:
    """Latents and text features of the same shapes, and an xAR trained on both through the command line."""
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    vae = VAE(
        VAEConfig(latent_channels=2, block_channels=(4, 4), layers_per_block=1, norm_groups=2, scaling_factor=1.0)
    )
    vae.save_pretrained(folder / "vae")
    data = ("data.kind=shapes", "data.mode=text", "data.num_images=12")
    run("cache", "latents", folder / "vae", f"out={folder / 'latents'}", "image_size=8", *data)
    run("cache", "text", t5, f"out={folder / 'text'}", "max_length=24", *data)
    run(
        "train", "generator", f"out={folder / 'run'}", f"latents={folder / 'latents'}", f"text={folder / 'text'}",
        f"tokenizer={folder / 'vae'}", "num_preview=3", "model.kind=xar", "model.grid=4",
        "model.condition.kind=cross_attention", "model.entities={kind: cell, height: 2, width: 2}", "model.width=16",
        "model.depth=1", "model.num_heads=2", "model.sampling.steps=[3]", "training.steps=4", "training.batch_size=4",
        "training.learning_rate=1e-3", "training.ema=0.5", "training.trackers=[]",
    )  # fmt: skip
    return folder


def test_an_xar_is_trained_on_captions(trained_on_latents, t5):
    folder = trained_on_latents
    model = imgtok.load(folder / "run/final")
    config, condition = model.config, model.config.condition
    assert (condition.text_width, condition.text_length, condition.empty_length) == (16, 24, 1)
    assert (condition.text_encoder, config.latent_channels, config.grid) == (str(t5), 2, 4)
    assert torch.equal(model.empty_caption, CaptionDataset(folder / "text").empty)
    assert (folder / "run/samples/step_0000004.png").is_file()


def test_an_xar_draws_for_prompts(trained_on_latents, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue ring above a small square\n", encoding="utf-8")
    model = trained_on_latents / "run/final"
    how = ("sampling.guidance=[4]", "exact=true")
    run("sample", model, f"prompts={prompts}", "num=3", *how, f"out={tmp_path / 'three'}")
    pictures = [(tmp_path / f"three/{i:06d}.png").read_bytes() for i in range(3)]
    assert len(set(pictures)) == 3
    run("sample", model, f"prompts={prompts}", "num=2", "batch_size=1", *how, f"out={tmp_path / 'two'}")
    assert [(tmp_path / f"two/{i:06d}.png").read_bytes() for i in range(2)] == pictures[:2]


def test_a_signal_keeps_the_captions_that_are_encoded(t5, tmp_path, monkeypatch):
    """Within the second of three shards; they end as those that were written in one go."""
    encode, seen = TextEncoder.encode, list[int]()

    def watched(self, texts):
        seen.append(len(texts))
        if len(seen) == 20:  # the first is the empty caption, and a shard has 16
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, texts)

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", watched)
        with pytest.raises(Stopped, match="SIGTERM: stopped; what is encoded is in"):
            cache(t5, folder, batch_size=1)
        assert len(seen) == 1 + 16 + cache_text.SORTED
        text = cache(t5, folder, batch_size=1)
    assert len(seen) == 1 + 40 + 1
    whole = {path.name: path.read_bytes() for path in cache(t5, tmp_path / "whole", batch_size=1).folder.iterdir()}
    assert {path.name: path.read_bytes() for path in text.folder.iterdir()} == whole


def test_a_text_is_encoded_once_among_others_of_its_length(t5, tmp_path, monkeypatch):
    encode, seen = TextEncoder.encode, list[list[str]]()
    monkeypatch.setattr(TextEncoder, "encode", lambda self, texts: seen.append(list(texts)) or encode(self, texts))
    data = ShapesConfig(mode="text", num_images=60, max_objects=1, textures=("solid",), sizes=("large",))
    cached = cache(t5, tmp_path, data=data, shard_size=60)
    texts = [ShapesDataset(data, 8).caption(index).text for index in range(60)]
    assert len(set(texts)) < 55
    asked = [text for batch in seen[1:] for text in batch]
    assert sorted(asked) == sorted(set(texts))
    assert [*map(len, asked)] == sorted(map(len, asked))
    encoder = TextEncoder.load(str(t5), max_length=12, device=CPU)
    for index, text in enumerate(texts):
        expected = encode(encoder, [text])[0].features[0]
        torch.testing.assert_close(cached.features(index).float(), expected, atol=2e-3, rtol=2e-3)
