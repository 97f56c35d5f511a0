"""What every tokenizer and autoencoder is to the programs.

A `Tokenizer` has losses to train by, `encode` to tokens and `decode` to images. An `Autoencoder` has continuous latents
in place of tokens. Training, caching, sampling and evaluation take any class that derives from one of the two.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from imgtok.config import check, to_dict
from imgtok.flow import OnStep
from imgtok.hub import Pretrained
from imgtok.sizes import Size, sides
from imgtok.tokenizers.checks import check_images
from imgtok.tokenizers.tokens import Tokens

if TYPE_CHECKING:
    from imgtok.losses.reconstruction import ReconstructionLossConfig


class Losses(NamedTuple):
    """`total` is what training minimises; `parts` are named scalars for the log."""

    total: Tensor
    parts: dict[str, Tensor]


class CodedLosses(NamedTuple):
    """`Losses` of a model with a codebook. `codes` are the token ids of a batch, int64 of any shape in [0, num_codes),
    of the `num_codes` that there are: the log counts them, and tells how much of the codebook is used. Ids below 0 are
    those of tokens that were not kept, and do not count.

    A tuple, so that it passes through DDP and Accelerate whole.
    """

    total: Tensor
    parts: dict[str, Tensor]
    codes: Tensor
    num_codes: int


def rebuilt(total: Tensor, parts: dict[str, Tensor], own: Losses | CodedLosses) -> Losses | CodedLosses:
    """Losses around a model's `own`, with its codes where it has any."""
    return own._replace(total=total, parts=parts)


class Reconstruction(NamedTuple):
    """What a model that decodes images while it is trained gives: the `images` (B, 3, H, W), to be judged, and the
    `losses` that it has besides, such as a KL divergence or a codebook's.
    """

    images: Tensor
    losses: Losses | CodedLosses


@dataclass(frozen=True)
class Rate:
    """How much an image may cost: at most `num_tokens` tokens, and as few as keep its error within `tolerance`."""

    num_tokens: int
    """The most tokens of an image; at least 1."""
    tolerance: float | None = None
    """The error that is allowed, for tokenizers that choose the number of tokens by it; None where nothing is asked."""

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"a rate has at least 1 token, given {self.num_tokens}")
        if self.tolerance is not None and not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"the tolerance of a rate is a number from 0 on, given {self.tolerance}")

    @classmethod
    def parse(cls, text: str | int) -> Rate:
        """The rate that `str` writes as "16" or "256@0.05"; a number will do too. Raises ValueError for others."""
        count, at, tolerance = str(text).strip().partition("@")
        try:
            return cls(int(count), float(tolerance) if at else None)
        except ValueError as error:
            raise ValueError(
                f"rates: {text!r} is not a number of tokens such as 16, or one with a tolerance such as 256@0.05"
            ) from error

    def __str__(self) -> str:
        return str(self.num_tokens) if self.tolerance is None else f"{self.num_tokens}@{self.tolerance:g}"


@dataclass(frozen=True, kw_only=True)
class NoDecoding:
    """The settings of a decoder that has none."""

    def __post_init__(self) -> None:
        check(self)


class Taps(NamedTuple):
    """The blocks whose patches a tokenizer shows while it is trained: how many there are, and the patches' width."""

    num_blocks: int
    width: int


class Graph(NamedTuple):
    """A function of tensors alone, without a loop and without random numbers, that a program other than torch can run:
    one file of `imgtok export MODEL layout=onnx`.
    """

    run: Callable[..., Tensor]
    inputs: dict[str, Tensor]
    """Its arguments by name in their order, for two images; those with two rows take any number of them."""
    output: str
    """What it gives."""
    sides: int = 0
    """Where not 0, rows and columns (the last two dimensions of its inputs) are free too: any multiples of this."""


OnBlock = Callable[[int, Tensor], None]
"""Sees the number of a block, counted from 0, and the patches (B, N, D) after it, a grid row by row."""


class ImageModel(nn.Module, Pretrained):
    """What a `Tokenizer` and an `Autoencoder` have in common for the programs that train and decode them.

    `config` has `decoding`, an instance of `decoding_class`: the settings that `decode` uses unless it is given others.
    """

    decoding_class: ClassVar[type] = NoDecoding
    """The frozen dataclass of the decoder's settings."""
    reconstructs: ClassVar[bool] = False
    """Whether it decodes images while it is trained."""
    measured_at_end: ClassVar[tuple[str, ...]] = ()
    """Fields of the configuration that `calibrate` measures: a checkpoint has them as they were when its run began."""

    only_decodes: ClassVar[tuple[str, ...]] = ()
    """Patterns (`fnmatch`) of the parameters that have no part in encoding: all that is trained with `decoder_only`."""
    decodes_by: ClassVar[tuple[str, ...]] = ()
    """Fields and sections of the configuration, besides `decoding`, that have no part in encoding: with `decoder_only`
    they may differ from those of the model that the training starts from."""

    def encodes_with(self, name: str) -> bool:
        """Whether a tensor of the model, by its name, has a part in encoding."""
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.only_decodes)

    def encoding_fields(self, config: Any) -> dict[str, Any]:
        """A configuration of such a model without what has no part in encoding."""
        fields = to_dict(config)
        for name in ("decoding", *self.decodes_by):
            *outer, last = name.split(".")
            section: Any = functools.reduce(lambda found, key: found.get(key) or {}, outer, fields)
            section.pop(last, None)
        return fields

    def encodes_like(self, other: ImageModel) -> bool:
        """Whether another model gives images the same tokens, or latents: one of the same class that differs at most in
        what only decodes. Weights that float16 holds alike count as the same.
        """
        if type(other) is not type(self):
            return False
        if self.encoding_fields(self.config) != self.encoding_fields(other.config):
            return False
        mine, others = self.state_dict(), other.state_dict()
        return mine.keys() == others.keys() and all(
            torch.equal(mine[name].cpu().half(), others[name].cpu().half()) for name in mine if self.encodes_with(name)
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """Where it `reconstructs`: the weight that gives the images, at which an adaptive weight can be measured."""
        raise NotImplementedError

    def for_training(self, loss: ReconstructionLossConfig | None, accumulate: int) -> nn.Module | None:
        """A module of the method's own around this model, which training is to train in its place, such as one with
        several discriminators; by default None: the losses of the job where it `reconstructs`, else the model's own.

        It is called with images, `generator=` and `perceptual=` (the distance that `loss` asks for, or None), gives
        `Losses`, and declares its parameters by `groups()`, a list of `imgtok.groups.ParameterGroup`, each with its
        rhythm. What it counts it keeps in buffers, which checkpoints hold; it is called `accumulate` times an optimizer
        step, and where it has a method `resumed(calls)`, that is called once a checkpoint has been read, after which so
        many calls count as done. In eval mode, in which training looks at held-out images, it neither counts nor
        learns. `rests_parameters = True` says that some calls use only some of its parameters. `loss` is the job's
        section, None where none was given.
        """
        return None

    def facts(self) -> dict[str, Any]:
        """What a generator of its tokens or latents must know besides what their cache says, such as the table of a
        quantizer: fields of the generator's configuration, by name, which must exist there. By default nothing.
        """
        return {}

    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Take over what is measured on batches of images when training ends, such as the latents' scale; by default
        nothing.
        """

    def graphs(self) -> dict[str, Graph]:
        """What of the model other programs can run, by name: by default nothing."""
        return {}

    def to_images(self, guess: Tensor) -> Tensor:
        """Images of what `decode` tells `on_step` of the result that it expects: as it is, unless told in latents."""
        return guess


class Tokenizer(ImageModel):
    """Images are (B, 3, H, W) in [-1, 1]. Calling the module with images and `generator` gives its `Losses`; or, where
    `reconstructs`, a `Reconstruction` for the job to judge. One with `taps` also takes `on_block`, an `OnBlock`.
    """

    in_words: ClassVar[str] = "a tokenizer"
    card_example = """images = imgtok.preprocess(["photo.jpg"], model.image_size)  # (1, 3, H, W) in [-1, 1]
tokens = model.encode(images)
pictures = imgtok.to_pil(model.decode(tokens, seed=0))
"""
    stands_on: ClassVar[str | None] = None
    """The name of a frozen autoencoder's configuration in `config`, and of that autoencoder in the model; None for a
    tokenizer that has none."""

    @property
    def scales_latents(self) -> bool:
        """Whether the scale of the autoencoder that it stands on changes what it reads or predicts."""
        return True

    @property
    def taps(self) -> Taps | None:
        """What `on_block` sees; None for a tokenizer that does not show its blocks."""
        return None

    def recompute_activations(self) -> None:
        """From now on compute activations again in the backward pass. Raises ValueError for a model that cannot."""
        raise ValueError(f"checkpoint_activations: {type(self).__name__} keeps its activations; leave it out")

    @property
    def image_size(self) -> Size:
        """Pixels a side of the images that it was made for, or (height, width)."""
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        """The most tokens an image can have."""
        raise NotImplementedError

    def resize(self, num_tokens: int) -> None:
        """Take images of that size which has so many tokens, where no weight depends on it; by default nothing."""

    @property
    def vocab_size(self) -> int:
        """Token ids lie in [0, vocab_size)."""
        raise NotImplementedError

    @property
    def levels(self) -> tuple[int, ...]:
        """Radices of the digits that make a token id, least significant first; empty if ids have no digits."""
        return ()

    @property
    def vector_width(self) -> int | None:
        """Numbers of a token that is a vector (`Tokens.vectors`); None where tokens are ids."""
        return None

    @property
    def num_slots(self) -> int | None:
        """Slots that a token can come from, `Tokens.slots` in [0, num_slots); None if token k comes from slot k."""
        return None

    @property
    def fixed_length(self) -> bool:
        """Whether every image has exactly as many tokens as the rate allows, `num_tokens` by default."""
        return True

    def rates(self) -> list[Rate]:
        """The rates that reports show, the cheapest first; one of all tokens where nothing can be chosen."""
        return [Rate(self.num_tokens)]

    @property
    def default_rate(self) -> Rate:
        """That at which `encode` works unless it is given another."""
        return Rate(self.num_tokens)

    def graphs(self) -> dict[str, Graph]:
        """Those of the autoencoder that it stands on, `autoencoder_encoder` and `autoencoder_decoder`; a method adds
        its own to them.
        """
        base = None if self.stands_on is None else getattr(self, self.stands_on)
        if base is None:
            return {}
        return {f"autoencoder_{name}": graph for name, graph in base.graphs(self.image_size).items()}

    def check_rate(self, rate: Rate) -> None:
        """Raises ValueError for a rate at which this tokenizer does not encode: by default any but those of `rates`."""
        if rate not in self.rates():
            known = ", ".join(map(str, self.rates()))
            raise ValueError(f"rates: this tokenizer does not have the rate {rate}; it has {known}")

    def asked(self, rate: Rate) -> Rate:
        """What `encode` asks for at a rate: another one where a tokenizer takes an error for one that it knows."""
        return rate

    def encode(self, images: Tensor, *, rate: Rate | None = None) -> Tokens:
        """The tokens of each image at a rate; the default is all of them.

        Raises ValueError for a rate that the tokenizer does not have.
        """
        raise NotImplementedError

    def encode_at(self, images: Tensor, rates: Sequence[Rate]) -> list[Tokens]:
        """The tokens at several rates; a tokenizer whose rates are prefixes of each other encodes once."""
        return [self.encode(images, rate=rate) for rate in rates]

    def bits(self, tokens: Tokens) -> Tensor:
        """What each image costs when nothing is known of how often its tokens occur, (B,) float64.

        k tokens of a vocabulary of V take k log2 V bits, and vectors 32 for each of their numbers. An image with a
        number of tokens of its own takes log2 K more, K = `num_tokens`, to say which; and where tokens name their
        slots, log2 of (S over k) to say which of the S.
        """
        lengths = tokens.lengths.double()
        bits = lengths * (math.log2(self.vocab_size) if self.vector_width is None else 32 * self.vector_width)
        if not self.fixed_length:
            bits = bits + math.log2(self.num_tokens)
        if self.num_slots is not None:
            total = torch.full_like(lengths, self.num_slots)
            choices = (total + 1).lgamma() - (lengths + 1).lgamma() - (total - lengths + 1).lgamma()
            bits = bits + choices / math.log(2)
        return bits

    def cost(self, num_tokens: int | None = None) -> str:
        """What an image costs at so many tokens, by default as many as it can have, in words: `128 tokens of 64 ids,
        768 bits`.
        """
        count = num_tokens or self.num_tokens
        bits = float(self.bits(Tokens.full(torch.zeros(1, count, dtype=torch.long))))
        width = self.vector_width
        of = f"{self.vocab_size:,} ids" if width is None else f"{width} number{'s'[: width != 1]} each"
        return f"{count:,} token{'s'[: count != 1]} of {of}, {bits:,.0f} bits"

    def decode(
        self,
        tokens: Tokens,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]; what is random in row b depends on (seed, indices[b]) alone, 0.. by default.

        `decoding` is an instance of `decoding_class`, `config.decoding` by default.
        """
        raise NotImplementedError

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        rate: Rate | None = None,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
    ) -> Tensor:
        """What is left of images (B, 3, H, W) after encoding them at a rate and decoding them again."""
        return self.decode(self.encode(images, rate=rate), seed=seed, indices=indices, decoding=decoding)


class Autoencoder(ImageModel):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H / f, W / f) of about unit deviation, continuous numbers.

    Calling the module with images and `generator` gives a `Reconstruction`, for training.
    `config` also has `factor` f, `latent_channels` C and `scaling_factor`, which gives latents about unit deviation.
    """

    in_words: ClassVar[str] = "an autoencoder"
    card_example = """images = imgtok.preprocess(["photo.jpg"], 4 * model.config.factor)  # (1, 3, H, W) in [-1, 1]
latents = model.encode(images)
pictures = imgtok.to_pil(model.decode(latents))
"""
    not_of_the_latents: ClassVar[tuple[str, ...]] = ("scaling_factor",)
    """Fields of the configuration that change the latents by their scale at most."""
    reconstructs: ClassVar[bool] = True

    def moments(self, images: Tensor) -> Tensor:
        """The distributions of the latents, not scaled: means, then log-variances, (B, 2 C, H / f, W / f).

        Log-variances lie from -30, which stands for no variance, to 20.
        """
        raise NotImplementedError

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents of images in [-1, 1]: the mean of the distribution, or with standard-normal `noise` of their
        shape a sample. Raises ValueError for images of another range or shape.
        """
        check_images(images, f"{8 * self.config.factor}")
        return latents_of_moments(self.moments(images), noise, self.config.scaling_factor)

    def graphs(self, image_size: Size | None = None) -> dict[str, Graph]:
        """`encoder`, from images (B, 3, H, W) to the scaled means of their latents, and `decoder`, from latents to
        images, not clamped; for images of `image_size`, by default of any height and width that are multiples of its
        factor.
        """
        factor: int = self.config.factor
        height, width = sides(image_size or max(32, 4 * factor))
        pixels, cells = (0, 0) if image_size else (factor, 1)
        images = torch.zeros(2, 3, height, width, device=self.device)
        latents = torch.zeros(2, self.config.latent_channels, height // factor, width // factor, device=self.device)

        def encoder(images: Tensor) -> Tensor:
            return latents_of_moments(self.moments(images), None, self.config.scaling_factor)

        return {
            "encoder": Graph(encoder, {"images": images}, "latents", pixels),
            "decoder": Graph(lambda latents: self.decode(latents), {"latents": latents}, "images", cells),
        }

    def decode(
        self,
        latents: Tensor,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Images in about [-1, 1], not clamped; the other arguments are those of `Tokenizer.decode`."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the weights or the shape, not with the scale or the kind of file."""
        shape = {name: value for name, value in asdict(self.config).items() if name not in self.not_of_the_latents}
        digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().float().cpu().contiguous().numpy())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        decoding: object | None = None,
    ) -> Tensor:
        """What is left of images (B, 3, H, W) after encoding and decoding them, clamped to [-1, 1]."""
        return self.decode(self.encode(images), seed=seed, indices=indices, decoding=decoding).clamp(-1, 1)


def latents_of_moments(moments: Tensor, noise: Tensor | None, scaling_factor: float) -> Tensor:
    """Scaled latents (B, C, h, w) of `Autoencoder.moments` (B, 2 C, h, w): with standard-normal noise (B, C, h, w)
    samples of the distributions, without any their means.
    """
    mean, logvar = moments.chunk(2, dim=1)
    if noise is not None:  # clamped here too: caches of other programs may hold what their encoder gave
        mean = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise
    return mean * scaling_factor


def powers_of_two(count: int) -> list[int]:
    """1, 2, 4, ... up to `count`, which is always the last: the token counts that a tokenizer is judged at."""
    return [2**i for i in range((count - 1).bit_length())] + [count]
