"""A random T5 encoder over the words of the captions of shapes: `from tiny_t5 import tiny_t5`."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers

from imgtok.shapes.captions import VOCABULARY


def tiny_t5(folder: Path, seed: int = 0) -> Path:
    """Saves one as a real one is."""
    words = ["<pad>", "</s>", "<unk>", *VOCABULARY]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(seed)
    config = transformers.T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
