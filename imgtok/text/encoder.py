"""A frozen T5 encoder (FLAN-T5-XL for FlexTok): from captions to the features that a text generator reads.

Needs the libraries `transformers` and `tokenizers`, which are not among imgtok's own: `pip install 'imgtok[text]'`. A
folder holds config.json, tokenizer.json and safetensors weights; nothing in it is executed, and pickled weights are
refused. The end mark that T5's tokenizer appends gives even the empty text one feature.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imgtok.hub import find_folder
from imgtok.text.captions import Captions

NEEDED = "tokenizer.json", "config.json"


class TextEncoder:
    """T5's encoder with its tokenizer; a text gives at most `max_length` features of `width` channels."""

    def __init__(self, name: str, folder: Path, model: Any, tokenizer: Any, max_length: int) -> None:
        self.name, self.folder, self.max_length = name, folder, max_length
        self.width: int = model.config.d_model
        self._model, self._tokenizer = model, tokenizer
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length)  # the end mark stays

    @classmethod
    def load(cls, name: str, *, max_length: int, device: torch.device) -> TextEncoder:
        """From a local folder or a Hub name such as google/flan-t5-xl, in float32.

        Raises ValueError when a library is missing or the folder holds no T5, FileNotFoundError when it lacks files.
        """
        try:
            from tokenizers import Tokenizer
            from transformers import T5Config, T5EncoderModel
        except ImportError as error:
            raise ValueError(f"text needs the library {error.name}; install it: pip install 'imgtok[text]'") from error
        folder = find_folder(name)
        for file in NEEDED:
            if not (folder / file).is_file():
                raise FileNotFoundError(f"{folder / file}: missing; a text encoder's folder holds {', '.join(NEEDED)}")
        if not sorted(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"{folder}: no *.safetensors; pickled weights are not read, convert them")
        with _as_value_error(folder):
            model, loading = T5EncoderModel.from_pretrained(
                folder,
                config=T5Config.from_pretrained(folder),
                use_safetensors=True,
                local_files_only=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if missing := sorted(loading["missing_keys"]):  # which transformers would leave random
            raise ValueError(f"{folder}: not a T5 text encoder: {len(missing)} weights missing, such as {missing[0]}")
        return cls(name, folder, model.to(device).eval().requires_grad_(False), tokenizer, max_length)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[Captions]:
        """Each text as a caption of its own length, (1, T_i, W) float32 on the encoder's device; computed as one batch.

        Spans are those of the tokenizer's pieces; its end mark stands for no characters.
        """
        encodings = self._tokenizer.encode_batch(list(texts))
        ids = [encoding.ids for encoding in encodings]
        if not all(ids):
            raise ValueError(
                f"{self.folder / 'tokenizer.json'}: gives no token for {texts[ids.index([])]!r}; T5's does"
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
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
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


@contextlib.contextmanager
def _as_value_error(folder: Path) -> Iterator[None]:
    """What transformers raises for a folder that does not fit, as an error of the user's input."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"{folder}: not a T5 text encoder ({type(error).__name__}: {error})") from error
