"""Captions as the numbers of their words."""

from __future__ import annotations

import sys

import pytest
import torch

from imgtok.text.words import WordEncoder, build, copy, is_words

CPU = torch.device("cpu")
TEXTS = ["a red circle, a blue ring", "a red star"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(TEXTS, tmp_path_factory.mktemp("words"))


def test_each_word_has_a_channel_of_its_own(folder):
    encoder = WordEncoder.load("words", folder, max_length=9, device=CPU)
    assert encoder.words[:2] == ["</s>", "<unk>"]
    assert set(encoder.words[2:]) == {"a", "red", "circle", ",", "blue", "ring", "star"}
    assert encoder.width == 9
    caption, empty, unknown = encoder.encode(["A red  circle", "", "a zebra"])
    assert [encoder.words[k] for k in caption.features[0].argmax(-1)] == ["a", "red", "circle", "</s>"]
    assert caption.features.sum().item() == 4
    assert caption.spans[0].tolist() == [[0, 1], [2, 5], [7, 13], [0, 0]]
    assert empty.features.shape == (1, 1, 9)
    assert [encoder.words[k] for k in unknown.features[0].argmax(-1)] == ["a", "<unk>", "</s>"]


def test_unknown_words_are_said_once(folder, caplog):
    encoder = WordEncoder.load("words", folder, max_length=9, device=CPU)
    encoder.encode(["a red star", ""])
    assert not caplog.messages
    for _ in range(2):
        encoder.encode(["a Zebra, a red ant"])
    assert caplog.messages == [
        "text: words knows no 'ant', 'zebra'; whatever it does not know is one and the same word to it"
    ]


def test_a_missing_library_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (
        lambda: WordEncoder.load("words", folder, max_length=9, device=CPU),
        lambda: build(TEXTS, tmp_path / "new"),
    ):
        with pytest.raises(ValueError, match=r"needs the library tokenizers; install it: pip install 'imgtok\[text\]'"):
            call()


def test_a_vocabulary_of_other_words_is_refused(folder, tmp_path):
    """Even one of as many."""
    other = WordEncoder.load("w", build(["a red circle, a blue dog", "a red cat"], tmp_path), max_length=5, device=CPU)
    mine = WordEncoder.load("w", folder, max_length=5, device=CPU)
    assert other.width == mine.width
    other.check_same(torch.zeros(1, 9))
    mine.check_vocabulary(folder)
    with pytest.raises(
        ValueError, match=r"its word \d is \['\w+'\], and there it was \['\w+'\]; leave text_encoder out"
    ):
        other.check_vocabulary(folder)


def test_long_texts_are_cut_before_the_end_mark(folder):
    encoder = WordEncoder.load("words", folder, max_length=3, device=CPU)
    (caption,) = encoder.encode([TEXTS[0]])
    assert [encoder.words[k] for k in caption.features[0].argmax(-1)] == ["a", "red", "</s>"]
    with pytest.raises(ValueError, match="max_length: 1 features hold nothing"):
        WordEncoder.load("words", folder, max_length=1, device=CPU)


def test_a_folder_is_known_again(folder, tmp_path):
    copy(folder, tmp_path / "copy")
    assert is_words(tmp_path / "copy")
    assert not is_words(tmp_path)
    mine, other = (
        WordEncoder.load("w", path, max_length=5, device=CPU)
        for path in (tmp_path / "copy", build(["a dog"], tmp_path / "other"))
    )
    assert mine.fingerprint() == WordEncoder.load("w", folder, max_length=5, device=CPU).fingerprint()
    assert mine.fingerprint() != other.fingerprint()
    mine.check_same(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="knows 4 words, and the generator was trained with 9"):
        other.check_same(torch.zeros(1, 9))


def test_too_many_words_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"have 1102 words, and encoder=words knows at most 1024.*minilm"):
        build([" ".join(f"w{k}" for k in range(1100))], tmp_path / "many")
