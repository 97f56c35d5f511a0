"""A word-level encoder that needs no download: a caption as the numbers of its words, whose meaning training finds.

The vocabulary is that of the captions which a cache was made of (`imgtok cache text words`), kept as a tokenizer of the
library `tokenizers` (WordLevel), which comes with `pip install 'imgtok[text]'`. A word's feature is one in its own
channel and zero in all others, so the first matrix of a generator's `text_proj` is the table of word embeddings; what a
word means beside others is found by the layers of `condition.context_layers`, which are trained with the generator too.
Sums of features are sums of embeddings, and everything is differentiable, as it is with a frozen encoder.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok.files import file_sha256, replacing
from imgtok.hub import read_json
from imgtok.text.captions import Captions

logger = logging.getLogger(__name__)

NAME = "words"
"""The name of the encoder whose vocabulary is made of the captions at hand."""
MODEL_TYPE = "words"
END, UNKNOWN = "</s>", "<unk>"
FILES = ("tokenizer.json", "config.json")
MOST = 1024
"""Words that a vocabulary may have: a feature has a channel for each."""


class WordEncoder:
    """A tokenizer of words; a text gives at most `max_length` features of as many channels as there are words.

    The last feature is that of the end mark, so even the empty text has one; words that the vocabulary lacks are all
    the same word.
    """

    def __init__(self, name: str, folder: Path, tokenizer: Any, max_length: int, device: torch.device) -> None:
        """Raises ValueError for a length that holds nothing of a text."""
        if max_length < 2:
            raise ValueError(f"max_length: {max_length} features hold nothing of a caption: {name} adds an end mark")
        self.name, self.folder, self.max_length = name, folder, max_length
        self.width: int = tokenizer.get_vocab_size()
        self._tokenizer, self._device = tokenizer, device
        self._unknown: int = tokenizer.token_to_id(UNKNOWN)
        self._said: set[str] = set()
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)

    @classmethod
    def load(cls, name: str, folder: Path, *, max_length: int, device: torch.device) -> WordEncoder:
        """From a folder that `build` wrote. Raises ValueError where the library is missing."""
        tokenizer = _library().Tokenizer.from_file(str(folder / "tokenizer.json"))
        return cls(name, folder, tokenizer, max_length, device)

    @property
    def words(self) -> list[str]:
        """The vocabulary in order, marks included."""
        known: dict[str, int] = self._tokenizer.get_vocab()
        return sorted(known, key=lambda word: known[word])

    def encode(self, texts: Sequence[str]) -> list[Captions]:
        """Each text as a caption of its own length, (1, T_i, W) float32; spans are those of its words.

        Words that the vocabulary lacks are said once.
        """
        encodings = self._tokenizer.encode_batch(list(texts))
        self._say_unknown(texts, encodings)
        return [
            Captions.pad(
                [F.one_hot(torch.tensor(own.ids, device=self._device), self.width).float()],
                [torch.tensor(own.offsets, device=self._device)],
            )
            for own in encodings
        ]

    def _say_unknown(self, texts: Sequence[str], encodings: Sequence[Any]) -> None:
        """Warns of words that the vocabulary lacks."""
        there = {
            text[start:stop].lower()
            for text, own in zip(texts, encodings, strict=True)
            for number, (start, stop) in zip(own.ids, own.offsets, strict=True)
            if number == self._unknown
        }
        if new := sorted(there - self._said):
            self._said |= there
            logger.warning(
                "text: %s knows no %s; whatever it does not know is one and the same word to it",
                self.name,
                ", ".join(map(repr, new)),
            )

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the vocabulary."""
        return file_sha256(self.folder / "tokenizer.json")[:16]

    def check_same(self, empty_caption: Tensor) -> None:
        """Raises ValueError unless the vocabulary has as many words as training had (of an empty text only the end mark
        is known).
        """
        if empty_caption.shape[-1] != self.width:
            raise ValueError(
                f"text_encoder: {self.name} knows {self.width} words, and the generator was trained with "
                f"{empty_caption.shape[-1]}; give the folder of its own"
            )

    def check_vocabulary(self, folder: Path) -> None:
        """Raises ValueError unless its words are, in order, those of the encoder in a folder, such as a model's own."""
        mine, theirs = self.words, WordEncoder.load(NAME, folder, max_length=self.max_length, device=self._device).words
        if mine != theirs:
            number = next((k for k, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), len(theirs))
            raise ValueError(
                f"text_encoder: {self.name} is not the encoder that the generator was trained with: its word {number} "
                f"is {mine[number : number + 1]}, and there it was {theirs[number : number + 1]}; leave text_encoder "
                "out"
            )


def build(texts: Iterable[str], folder: Path) -> Path:
    """Writes the vocabulary of the texts into a folder, which is a text encoder's afterwards.

    Raises ValueError for more words than features have channels, and where the library is missing.
    """
    library = _library()
    tokenizer = library.Tokenizer(library.models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = library.normalizers.Lowercase()
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    trainer = library.trainers.WordLevelTrainer(special_tokens=[END, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() > MOST:
        raise ValueError(
            f"encoder: these captions have {tokenizer.get_vocab_size()} words, and encoder=words knows at most {MOST}; "
            "take a frozen encoder, such as minilm"
        )
    tokenizer.post_processor = library.processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    folder.mkdir(parents=True, exist_ok=True)
    description = {"model_type": MODEL_TYPE, "num_words": tokenizer.get_vocab_size()}
    _write(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    _write(folder / "config.json", json.dumps(description, indent=2) + "\n")
    return folder


def _library() -> Any:
    """The library `tokenizers`. Raises ValueError where it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(f"text needs the library {error.name}; install it: pip install 'imgtok[text]'") from error
    return tokenizers


def copy(folder: Path, to: Path) -> None:
    """An encoder of this kind into another folder, such as a model's."""
    to.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        _write(to / name, (folder / name).read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_words(folder: Path) -> bool:
    """Whether a folder holds an encoder of this kind."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    return read_json(folder / "config.json").get("model_type") == MODEL_TYPE
