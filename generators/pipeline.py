"""A generator with its tokenizer or autoencoder: from classes or prompts to images, in batches that leave no trace.

Image i of seed s depends on (s, i) and its label alone, which is a class or, after `read_prompts`, the number of
a prompt. Noise and token draws are keyed that way; what remains is arithmetic. On a CPU the last bits of a result
vary with the number of rows (other kernels) and of threads (other partial sums), and a last bit can tip a token.
So there images are computed in blocks of one size, the last one padded, with a fixed number of threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from imgtok.generators.conditioning import Condition, FromText
from imgtok.generators.gpt import GPT, SamplingConfig
from imgtok.generators.xar import XAR, FlowSampling
from imgtok.hub import find_folder, load
from imgtok.pictures import to_uint8
from imgtok.runtime import cpu_threads
from imgtok.text.captions import Captions
from imgtok.text.encoder import TextEncoder
from imgtok.tokenizers.base import Tokenizer
from imgtok.tokenizers.vae import VAE

ROWS = 16
"""Images that a CPU computes at once."""
TOKENS_AT_ONCE = 1024
"""Of those, tokens at most where a generator draws many in one call."""
Precision = Literal["fp32", "bf16"]
"""Arithmetic of the networks; noise and solvers stay in float32."""


@dataclass(frozen=True)
class DecodeSettings:
    """How tokens become images; None leaves the tokenizer's own setting."""

    num_tokens: int | None = None
    steps: int | None = None
    guidance: float | None = None

    def over(self, own: Any) -> Any:
        """A decoder's own settings with those given here in their place. Raises ValueError for one it does not have."""
        given = {name: getattr(self, name) for name in ("steps", "guidance") if getattr(self, name) is not None}
        for name in given:
            if not hasattr(own, name):
                raise ValueError(f"decode_{name}: this decoder has no such setting; leave it out")
        return replace(own, **given)


class Asked(NamedTuple):
    """What is the same for all blocks of a call."""

    counts: Sequence[int | None]
    seed: int
    sampling: SamplingConfig | FlowSampling
    decode: DecodeSettings


class Pipeline(ABC):
    """A loaded generator with what makes images of its draws, on one device; `threads` is how many of a CPU it uses."""

    tokenizer: Tokenizer | VAE
    most_tokens: int | None = None
    """Tokens that an image can have; None for a generator of latents."""
    rows = ROWS
    """Images that a CPU computes at once."""

    def __init__(self, generator: GPT | XAR, device: torch.device, threads: int, precision: Precision) -> None:
        self.generator = generator.to(device).eval()
        self.device = device
        self.threads = threads
        self.precision = precision
        self.prompts: Sequence[str] = ()
        self.encoder: TextEncoder | None = None

    @staticmethod
    def load(
        model: str,
        tokenizer: str | None,
        device: torch.device,
        threads: int = 1,
        precision: Precision = "fp32",
    ) -> Pipeline:
        """From model folders or Hub names; the tokenizer inside the generator's folder unless another is given."""
        folder = find_folder(model)
        generator = load(folder)
        if not isinstance(generator, GPT | XAR):
            name = type(generator).__name__
            raise ValueError(
                f"{folder} holds a {name} (kind {generator.config.kind!r}), but a GPT or XAR is needed here"
            )
        place = tokenizer_folder(folder, tokenizer)
        if isinstance(generator, XAR):
            return LatentPipeline(generator, load(place, expect=VAE), device, threads, precision)
        return TokenPipeline(generator, load(place, expect=Tokenizer), device, threads, precision)

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

    @property
    def reads_text(self) -> bool:
        """Whether it draws for prompts, and not for classes."""
        return self.generator.config.reads_text

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Pixels a side."""

    @abstractmethod
    def choose(self, sampling: SamplingConfig, flow: FlowSampling) -> SamplingConfig | FlowSampling:
        """Which of the two this generator draws by. Raises ValueError if the other was changed."""

    def read_prompts(self, prompts: Sequence[str], text_encoder: str | None) -> None:
        """Draw for `prompts` from now on, with the text encoder that is named or that the generator names.

        Raises ValueError for a generator without text or another encoder than it was trained with.
        """
        condition = self.generator.config.condition
        if not isinstance(condition, FromText):
            raise ValueError("prompts: this generator cannot read them, it draws classes")
        name = text_encoder or condition.text_encoder
        if name is None:
            why = "the generator names no encoder: say text_encoder=FOLDER"
            raise ValueError(f"prompts: this generator cannot read them, {why}")
        try:
            self.encoder = TextEncoder.load(name, max_length=condition.text_length, device=self.device)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; say where the text encoder is with text_encoder=FOLDER") from error
        if self.generator.empty_caption is not None:
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
        sampling: SamplingConfig | FlowSampling,
        decode: DecodeSettings,
    ) -> Tensor:
        """uint8 images (len(indices), 3, H, W)."""
        count = decode.num_tokens
        return self.images_at((count,), indices, labels, seed=seed, sampling=sampling, decode=decode)[count]

    @torch.no_grad()
    def images_at(
        self,
        counts: Sequence[int | None],
        indices: Sequence[int],
        labels: Sequence[int],
        *,
        seed: int,
        sampling: SamplingConfig | FlowSampling,
        decode: DecodeSettings,
    ) -> dict[int | None, Tensor]:
        """By token count, the uint8 images (len(indices), 3, H, W) that `images` gives with that many; None is all.

        Each sequence is drawn once, as long as the largest count, and decoded from its prefixes: token i depends on
        its own uniform and the tokens before it, so a longer draw begins with the shorter one.
        """
        asked = Asked(counts, seed, sampling, decode)
        halves = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        with cpu_threads(self.threads), halves:
            blocks = [
                self._block([indices[row] for row in rows], [labels[row] for row in rows], asked)
                for rows in blocks_of(len(indices), self.device, self.rows)
            ]
        return {count: torch.cat([block[count] for block in blocks]) for count in counts}

    def _padded(self, values: Sequence[int]) -> list[int]:
        """The values of a block, on a CPU as many as every block has."""
        return pad_to_rows(values, self.rows) if self.device.type == "cpu" else list(values)

    @abstractmethod
    def _block(self, indices: list[int], labels: list[int], asked: Asked) -> dict[int | None, Tensor]:
        """The images of one block, computed together."""


class TokenPipeline(Pipeline):
    """A GPT and the tokenizer whose ids it draws."""

    generator: GPT
    tokenizer: Tokenizer

    def __init__(
        self,
        generator: GPT,
        tokenizer: Tokenizer,
        device: torch.device,
        threads: int = 1,
        precision: Precision = "fp32",
    ) -> None:
        if generator.config.vocab_size != tokenizer.vocab_size or generator.config.num_tokens > tokenizer.num_tokens:
            raise ValueError(
                f"the generator draws {generator.config.num_tokens} tokens of {generator.config.vocab_size}, but the "
                f"tokenizer decodes {tokenizer.num_tokens} of {tokenizer.vocab_size}: they were not trained together"
            )
        super().__init__(generator, device, threads, precision)
        self.tokenizer = tokenizer.to(device).eval()
        self.most_tokens = generator.config.num_tokens

    @property
    def image_size(self) -> int:
        return self.tokenizer.image_size

    def choose(self, sampling: SamplingConfig, flow: FlowSampling) -> SamplingConfig:
        if flow != FlowSampling():
            raise ValueError("flow: this generator draws tokens and not latents; use the fields of `sampling`")
        return sampling

    def _block(self, indices: list[int], labels: list[int], asked: Asked) -> dict[int | None, Tensor]:
        assert isinstance(asked.sampling, SamplingConfig), "see `choose`"
        padded, total = self._padded(indices), self.generator.config.num_tokens
        tokens = self.generator.generate(
            self.condition(self._padded(labels)),
            seed=asked.seed,
            indices=padded,
            sampling=asked.sampling,
            num_tokens=max(total if count is None else count for count in asked.counts),
        )
        images = {}
        for count in asked.counts:
            decoded = self.tokenizer.decode(
                tokens.truncate(total if count is None else count),
                seed=asked.seed,
                indices=padded,
                decoding=asked.decode.over(self.tokenizer.config.decoding),
            )
            images[count] = to_uint8(decoded[: len(indices)]).cpu()
        return images


class LatentPipeline(Pipeline):
    """An xAR and the autoencoder whose latents it draws."""

    generator: XAR
    tokenizer: VAE

    def __init__(
        self,
        generator: XAR,
        autoencoder: VAE,
        device: torch.device,
        threads: int = 1,
        precision: Precision = "fp32",
    ) -> None:
        check_autoencoder(generator, autoencoder)
        super().__init__(generator, device, threads, precision)
        # Not more than do a CPU good: a lone image is padded to as many
        self.rows = max(1, min(ROWS, TOKENS_AT_ONCE // generator.entities.length))
        self.tokenizer = autoencoder.to(device).eval()

    @property
    def image_size(self) -> int:
        size: int = self.generator.config.grid * self.tokenizer.config.factor
        return size

    def choose(self, sampling: SamplingConfig, flow: FlowSampling) -> FlowSampling:
        if sampling != SamplingConfig():
            raise ValueError("sampling: this generator draws latents and not tokens; use the fields of `flow`")
        return flow

    def _block(self, indices: list[int], labels: list[int], asked: Asked) -> dict[int | None, Tensor]:
        assert isinstance(asked.sampling, FlowSampling), "see `choose`"
        if tuple(asked.counts) != (None,) or asked.decode != DecodeSettings():
            raise ValueError(
                "num_tokens, decode_steps, decode_guidance: this generator draws whole latents, which its autoencoder "
                "decodes in one go; leave them out (flow.steps are the generator's)"
            )
        latents = self.generator.generate(
            self.condition(self._padded(labels)),
            seed=asked.seed,
            indices=self._padded(indices),
            sampling=asked.sampling,
        )
        return {None: to_uint8(self.tokenizer.decode(latents)[: len(indices)]).cpu()}


def check_autoencoder(generator: XAR, autoencoder: VAE) -> None:
    """Raises ValueError for an autoencoder of other latents than the generator's."""
    drawn, decoded = generator.config.latent_channels, autoencoder.config.latent_channels
    if drawn != decoded:
        raise ValueError(
            f"the generator draws latents of {drawn} channels, but the autoencoder decodes {decoded}: they were not "
            "trained together"
        )


def tokenizer_folder(generator: Path, tokenizer: str | None) -> Path:
    """The folder of the tokenizer that is named, or of the one inside the generator's folder."""
    if tokenizer is not None:
        return find_folder(tokenizer)
    if not (generator / "tokenizer").is_dir():
        raise FileNotFoundError(f"{generator} has no tokenizer/ folder: say which one with tokenizer=FOLDER")
    return generator / "tokenizer"


def blocks_of(count: int, device: torch.device, most: int = ROWS) -> Iterator[Sequence[int]]:
    """The rows of a batch that are computed together: `most` on a CPU, all elsewhere."""
    return batches_of(range(count), most if device.type == "cpu" else count)


def pad_to_rows(values: Sequence[int], rows: int = ROWS) -> list[int]:
    """The values, the last one repeated up to `rows` of them."""
    return [*values, *[values[-1]] * (rows - len(values))]


def batches_of(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive runs of at most `size` indices."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def labels_in_turn(classes: Sequence[int], count: int, num_classes: int, *, unlabelled: bool = False) -> list[int]:
    """The label of every index: classes[i % number of classes], or all of the model's `num_classes` for no classes.

    Raises ValueError for a class outside the model's; -1, no class, is one only if `unlabelled`.
    """
    chosen = check_classes(classes, num_classes, unlabelled=unlabelled)
    return [chosen[i % len(chosen)] for i in range(count)]


def labels_by_class(classes: Sequence[int], each: int, num_classes: int, *, unlabelled: bool = False) -> list[int]:
    """The label of every index, class after class: classes[i // each]. Otherwise as `labels_in_turn`."""
    chosen = check_classes(classes, num_classes, unlabelled=unlabelled)
    return [label for label in chosen for _ in range(each)]


def check_classes(classes: Sequence[int], num_classes: int, *, unlabelled: bool) -> Sequence[int]:
    """The classes, or all of them for none; see `labels_in_turn`."""
    for label in classes:
        if not (-1 if unlabelled else 0) <= label < num_classes:
            raise ValueError(f"classes: {label} is not a class of the model; it has classes 0 to {num_classes - 1}")
    return classes or range(num_classes)
