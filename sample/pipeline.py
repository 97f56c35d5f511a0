"""A generator with its tokenizer: from classes or prompts to images, in batches whose size leaves no trace.

Image i of seed s depends on (s, i) and its label alone, which is a class or, after `read_prompts`, the number of
a prompt. Noise and token draws are keyed that way; what remains is arithmetic. On a CPU the last bits of a result
vary with the number of rows (other kernels) and of threads (other partial sums), and a last bit can tip a token.
So there images are computed in blocks of `ROWS`, the last one padded, with a fixed number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from generators.gpt import GPT, Condition, SamplingConfig
from imgtok.captions import Captions
from imgtok.hub import find_folder, load
from imgtok.images import to_uint8
from imgtok.processes import cpu_threads
from imgtok.text_encoder import TextEncoder
from imgtok.tokenizer import Tokenizer
from imgtok.tokens import Tokens

ROWS = 16
"""Images that a CPU computes at once."""


@dataclass(frozen=True)
class DecodeSettings:
    """How tokens become images; None leaves the tokenizer's own setting."""

    num_tokens: int | None = None
    steps: int | None = None
    guidance: float | None = None


class Pipeline:
    """A loaded generator and tokenizer on one device; `threads` is how many of a CPU it uses."""

    def __init__(self, generator: GPT, tokenizer: Tokenizer, device: torch.device, threads: int = 1) -> None:
        if generator.config.vocab_size != tokenizer.vocab_size or generator.config.num_tokens > tokenizer.num_tokens:
            raise ValueError(
                f"the generator draws {generator.config.num_tokens} tokens of {generator.config.vocab_size}, but the "
                f"tokenizer decodes {tokenizer.num_tokens} of {tokenizer.vocab_size}: they were not trained together"
            )
        self.generator = generator.to(device).eval()
        self.tokenizer = tokenizer.to(device).eval()
        self.device = device
        self.threads = threads
        self.prompts: Sequence[str] = ()
        self.encoder: TextEncoder | None = None

    @classmethod
    def load(cls, model: str, tokenizer: str | None, device: torch.device, threads: int = 1) -> Pipeline:
        """From model folders or Hub names; the tokenizer inside the generator's folder unless another is given."""
        folder = find_folder(model)
        generator = load(folder, expect=GPT)
        return cls(generator, load(tokenizer_folder(folder, tokenizer), expect=Tokenizer), device, threads)

    @property
    def reads_text(self) -> bool:
        return self.generator.config.reads_text

    @property
    def num_classes(self) -> int:
        """Labels lie in [0, num_classes): classes, or prompts. Raises ValueError for text without prompts."""
        if not self.reads_text:
            return self.generator.config.num_classes
        if not self.prompts:
            raise ValueError(
                "this generator draws from text: imgtok sample MODEL prompts='a red circle' (or prompts=FILE.txt, a "
                "prompt a line); then score its images with imgtok evaluate images=FOLDER"
            )
        return len(self.prompts)

    def read_prompts(self, prompts: Sequence[str], text_encoder: str | None) -> None:
        """Draw for `prompts` from now on, with the text encoder that is named or that the generator names.

        Raises ValueError for a generator without text or another encoder than it was trained with.
        """
        config = self.generator.config
        name = text_encoder or config.text_encoder
        if not self.reads_text or name is None:
            why = "the generator names no encoder: say text_encoder=FOLDER" if self.reads_text else "it draws classes"
            raise ValueError(f"prompts: this generator cannot read them, {why}")
        try:
            self.encoder = TextEncoder.load(name, max_length=config.text_length, device=self.device)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; say where the text encoder is with text_encoder=FOLDER") from error
        assert self.generator.empty_caption is not None
        self.encoder.check_same(self.generator.empty_caption)
        self.prompts = prompts

    def condition(self, labels: Sequence[int]) -> Condition:
        """What the generator draws for. Each prompt is encoded alone, so that its features tell nothing of others."""
        if self.encoder is None:
            return torch.tensor(labels, device=self.device)
        features = {label: self.encoder.encode([self.prompts[label]])[0] for label in sorted(set(labels))}
        return Captions.pad([features[label] for label in labels])

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
        count = self.generator.config.num_tokens if decode.num_tokens is None else decode.num_tokens
        return self.images_at((count,), indices, labels, seed=seed, sampling=sampling, decode=decode)[count]

    @torch.no_grad()
    def images_at(
        self,
        counts: Sequence[int],
        indices: Sequence[int],
        labels: Sequence[int],
        *,
        seed: int,
        sampling: SamplingConfig,
        decode: DecodeSettings,
    ) -> dict[int, Tensor]:
        """By token count, the uint8 images (len(indices), 3, H, W) that `images` gives with that many tokens.

        Each sequence is drawn once, as long as the largest count, and decoded from its prefixes: token i depends on
        its own uniform and the tokens before it, so a longer draw begins with the shorter one.
        """
        with cpu_threads(self.threads):
            blocks = [
                self._block(
                    [indices[row] for row in rows], [labels[row] for row in rows], counts, seed, sampling, decode
                )
                for rows in blocks_of(len(indices), self.device)
            ]
        return {count: torch.cat([block[count] for block in blocks]) for count in counts}

    def _block(
        self,
        indices: list[int],
        labels: list[int],
        counts: Sequence[int],
        seed: int,
        sampling: SamplingConfig,
        decode: DecodeSettings,
    ) -> dict[int, Tensor]:
        """The images of one block, computed together."""
        padded = pad_to_rows(indices)
        ids = self.generator.generate(
            self.condition(pad_to_rows(labels)),
            seed=seed,
            indices=padded,
            sampling=sampling,
            num_tokens=max(counts),
        )
        tokens, images = Tokens.full(ids), {}
        for count in counts:
            decoded = self.tokenizer.decode(
                tokens.truncate(count), seed=seed, indices=padded, steps=decode.steps, guidance=decode.guidance
            )
            images[count] = to_uint8(decoded[: len(indices)]).cpu()
        return images


def tokenizer_folder(generator: Path, tokenizer: str | None) -> Path:
    """The folder of the tokenizer that is named, or of the one inside the generator's folder."""
    if tokenizer is not None:
        return find_folder(tokenizer)
    if not (generator / "tokenizer").is_dir():
        raise FileNotFoundError(f"{generator} has no tokenizer/ folder: say which one with tokenizer=FOLDER")
    return generator / "tokenizer"


def blocks_of(count: int, device: torch.device) -> Iterator[Sequence[int]]:
    """The rows of a batch that are computed together: `ROWS` on a CPU, all elsewhere."""
    return batches_of(range(count), ROWS if device.type == "cpu" else count)


def pad_to_rows(values: Sequence[int]) -> list[int]:
    """The values, the last one repeated up to `ROWS`."""
    return [*values, *[values[-1]] * (ROWS - len(values))]


def batches_of(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive runs of at most `size` indices."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def labels_in_turn(classes: Sequence[int], count: int, num_classes: int, *, unlabelled: bool = False) -> list[int]:
    """The label of every index: classes[i % number of classes], or all of the model's `num_classes` for no classes.

    Raises ValueError for a class outside the model's; -1, no class, is one only if `unlabelled`.
    """
    for label in classes:
        if not (-1 if unlabelled else 0) <= label < num_classes:
            raise ValueError(f"classes: {label} is not a class of the model; it has classes 0 to {num_classes - 1}")
    chosen = classes or range(num_classes)
    return [chosen[i % len(chosen)] for i in range(count)]
