"""A generator with its tokenizer: from class labels to images, in batches whose size leaves no trace.

Image i of seed s depends on (s, i) and its label alone. Noise and token draws are keyed that way; what
remains is arithmetic: on a CPU, matrix products of fewer than 16 rows run through other kernels and
round differently. So every batch is padded to at least `MIN_ROWS` images, and the padding thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from generators.gpt import GPT, SamplingConfig
from imgtok.flextok import FlexTok
from imgtok.hub import find_folder, load
from imgtok.images import to_uint8
from imgtok.tokens import Tokens

MIN_ROWS = 16


@dataclass(frozen=True)
class DecodeSettings:
    """How tokens become images; None leaves the tokenizer's own setting."""

    num_tokens: int | None = None
    steps: int | None = None
    guidance: float | None = None


class Pipeline:
    """A loaded generator and tokenizer on one device."""

    def __init__(self, generator: GPT, tokenizer: FlexTok, device: torch.device) -> None:
        if generator.config.vocab_size != tokenizer.vocab_size or generator.config.num_tokens > tokenizer.num_tokens:
            raise ValueError(
                f"the generator draws {generator.config.num_tokens} tokens of {generator.config.vocab_size}, but the "
                f"tokenizer decodes {tokenizer.num_tokens} of {tokenizer.vocab_size}: they were not trained together"
            )
        self.generator = generator.to(device).eval()
        self.tokenizer = tokenizer.to(device).eval()
        self.device = device

    @classmethod
    def load(cls, model: str, tokenizer: str | None, device: torch.device) -> Pipeline:
        """From model folders or Hub names; the tokenizer inside the generator's folder unless another is given."""
        folder = find_folder(model)
        generator = load(folder, expect=GPT)
        inside = folder / "tokenizer"
        if tokenizer is None and not inside.is_dir():
            raise FileNotFoundError(f"{folder} has no tokenizer/ folder: say which one with tokenizer=FOLDER")
        return cls(generator, load(tokenizer or inside, expect=FlexTok), device)

    @property
    def num_classes(self) -> int:
        return self.generator.config.num_classes

    @torch.no_grad()
    def images(
        self,
        indices: Sequence[int],
        labels: Sequence[int],
        *,
        seed: int,
        sampling: SamplingConfig,
        decode: DecodeSettings,
    ) -> Tensor:
        """uint8 images (len(indices), 3, H, W)."""
        wanted = len(indices)
        indices, labels = pad_to_rows(indices), pad_to_rows(labels)
        label_tensor = torch.tensor(labels, device=self.device)
        ids = self.generator.generate(
            label_tensor, seed=seed, indices=indices, sampling=sampling, num_tokens=decode.num_tokens
        )
        images = self.tokenizer.decode(
            Tokens.full(ids), seed=seed, indices=indices, steps=decode.steps, guidance=decode.guidance
        )
        return to_uint8(images[:wanted]).cpu()


def pad_to_rows(values: Sequence[int]) -> list[int]:
    """The values, the last one repeated up to `MIN_ROWS`."""
    return [*values, *[values[-1]] * (MIN_ROWS - len(values))]


def batches_of(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive runs of at most `size` indices."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def best_device(local_rank: int = 0) -> torch.device:
    """The GPU of this process where there is one, else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def is_image_name(path: Path) -> bool:
    """Whether a file is named as the sampler names images, 000123.png."""
    return path.suffix == ".png" and path.stem.isdigit()
