"""A generator with the decoder of what it draws, a tokenizer or an autoencoder: from classes or prompts to images.

    pipe = imgtok.pipeline("outputs/quickstart/generator/final")
    images = pipe(classes=[3, 7], seed=1)  # PIL images

Image i of seed s depends on (s, i) and on what it is drawn for. Noise and token draws are keyed that way; what remains
is arithmetic. On a CPU the last bits of a result vary with the number of rows (other kernels) and of threads (other
partial sums), and a last bit can tip a token. Where that matters (`exact`), images are computed in blocks of one size,
the last one padded, with a fixed number of threads; otherwise by all cores, and no more rows than were asked for.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import torch
from huggingface_hub import HfApi
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from imgtok import runs
from imgtok.config import did_you_mean
from imgtok.files import replacing
from imgtok.generators.conditioning import Condition, ConditionalGenerator, Control
from imgtok.generators.controls.scene import PromptControl
from imgtok.generators.known import WAYS, Known, kept
from imgtok.hub import OURS, RUN, Found, controls_of, load, resolve
from imgtok.pictures import preprocess, to_pil, to_uint8
from imgtok.runtime import Blocks
from imgtok.sections import Settings
from imgtok.sizes import Size, in_pixels, square
from imgtok.text import words
from imgtok.text.captions import Captions
from imgtok.text.encoder import TextEncoder, load_encoder
from imgtok.text.parsing import Entity, Parse, Parser, parse
from imgtok.text.words import WordEncoder, is_words
from imgtok.tokenizers.base import Autoencoder, Rate, Tokenizer
from imgtok.tokenizers.tokens import Tokens

logger = logging.getLogger(__name__)

ROWS = 16
"""Images that a CPU computes at once."""
POSITIONS_AT_ONCE = 1024
"""Positions at most of all those images, where one call of a generator computes several of each."""
Precision = Literal["fp32", "bf16"]
"""Arithmetic of the networks, as the jobs call it; noise and solvers stay in float32."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

BATCH = 64
"""Images that an accelerator computes at once, unless it is told otherwise."""
EXAMPLE_PROMPT = "a red circle above a blue square"
CARD = """---
library_name: imgtok
pipeline_tag: {task}
---

# A `{kinds}`, for imgtok

```python
import imgtok

pipe = imgtok.pipeline("{name}")
images = pipe({example}, seed=0)
```

The decoder is in `tokenizer/`; the configurations are in the files `config.json`.
"""
DECODER_CARD = """---
library_name: imgtok
---

# The `{kind}` of a generator, for imgtok

```python
import imgtok

decoder = imgtok.pipeline("{name}").decoder
```
"""

Drawn = Tokens | Tensor
"""What a generator draws: tokens, or latents (B, C, G, G)."""
Subject = int | str
"""What one image is drawn for: a class, -1 for none, or a prompt."""
Asked = Subject | Sequence[int | str] | None
"""What images are asked for in the first place of a call: classes, or words in place of `prompts`."""


class Made(NamedTuple):
    """What a program is given of a batch; on the CPU."""

    images: Tensor
    """(B, 3, H, W) uint8."""
    drawn: Drawn
    """What they were decoded from."""


class Images(list[Image.Image]):
    """The images of a call; `images.tokens.lengths` are how many tokens each of them took."""

    tokens: Tokens | None = None
    """What they were decoded from, on the CPU; None of a generator of latents."""


@dataclass(frozen=True)
class Step:
    """Where a call is, as its callback is told."""

    stage: Literal["draw", "decode"]
    done: int
    """Tokens, entities or steps of the decoder that are finished, of the images `indices`."""
    indices: Sequence[int]
    guess: Callable[[], Tensor] | None = None

    def images(self) -> list[Image.Image]:
        """What the images are expected to become, computed when asked for; none while tokens are drawn."""
        return [] if self.guess is None else to_pil(self.guess())


Callback = Callable[[Step], None]


def pipeline(
    name: str | Path | Found,
    *,
    tokenizer: str | Path | Found | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "float32",
    text_encoder: str | None = None,
    exact: bool = False,
    threads: int | None = None,
    controls: str | Sequence[Any] = (),
) -> Pipeline:
    """The generator that a name leads to (a folder or a Hub repository), with its decoder, ready to draw.

    tokenizer: that whose tokens it draws, or the autoencoder of its latents; without one, that inside its folder.
    device: where to compute, such as "cuda" or "cpu"; without one, the accelerator that there is, or else the CPU.
    dtype: arithmetic of the networks ("float32", "bfloat16", "float16"); weights, noise and solvers stay in float32.
    text_encoder: folder, Hub name or minilm, for a generator that reads text; without one, that which the generator
        names.
    exact, threads: see `Pipeline`.
    controls: what is done to prompts while images are drawn, by kind (`imgtok.hub.CONTROLS`) or as configurations;
        those that acted on the captions of its training act by themselves.

    Raises FileNotFoundError for what is not there, ValueError for a model that is no generator, or for a decoder that
    cannot decode what it draws.
    """
    found = resolve(name, expect=ConditionalGenerator)
    kind: type[Any] = Tokenizer if found.model_class.learns_from == "tokens" else Autoencoder
    inside = found.part() if tokenizer is None else resolve(tokenizer)
    inside.check(kind)
    generator, decoder = load(found), load(inside)
    if inside.layout not in (OURS, RUN) and isinstance(decoder, Tokenizer):  # a published file may not say a size
        decoder.resize(generator.config.num_tokens)
    if text_encoder is None and is_words(found.path / words.NAME):  # of words, which the training has put there
        text_encoder = str(found.path / words.NAME)
    pipe = Pipeline(
        generator,
        decoder,
        device=device,
        dtype=dtype,
        text_encoder=text_encoder,
        exact=exact,
        threads=threads,
        controls=controls,
    )
    pipe.found = found, inside
    if tokenizer is not None and encodes_otherwise(found, inside, decoder):
        logger.warning(
            "tokenizer: %s is another one than %s was trained after: its %s mean something else, and images will show "
            "it; leave tokenizer out, or name one that was trained from the generator's own with decoder_only",
            inside.name,
            found.name,
            "token ids" if pipe.draws_tokens else "latents",
        )
    return pipe


def encodes_otherwise(generator: Found, named: Found, decoder: Tokenizer | Autoencoder) -> bool:
    """Whether a tokenizer or an autoencoder that is `named`, and loaded, gives images other tokens or latents than that
    after which a generator was trained; False where that is not known.
    """
    own: Found | None = None
    with contextlib.suppress(OSError, ValueError):
        own = generator.part()
    if own is not None and own.path == named.path:
        return False
    record = {} if generator.path.is_file() else runs.identity_in(runs.identity_path(generator.path))
    recorded = record.get("tokenizer")
    if own is None and recorded is None:
        return False
    # its fingerprint takes a reading of all weights: where it can tell nothing more, it is left out
    if recorded is not None and (recorded in named.encodes_as or recorded == named.fingerprint()):
        return False
    if own is None:  # what an autoencoder encodes as is told by other fingerprints than the record's
        return isinstance(decoder, Tokenizer)
    before = load(own)
    if isinstance(decoder, Tokenizer) and isinstance(before, Tokenizer):
        before.resize(decoder.num_tokens)
    return not decoder.encodes_like(before)


class Pipeline:
    """A generator and its decoder on one device. Calling it gives images; `tokens` or `latents` stop before decoding.

    With `exact`, an image drawn on a CPU is the same to the byte whatever else is asked for, at a price: blocks of one
    size, the last one padded, and `threads` threads, 1 unless another number is given. Without it `threads` is torch's
    own number, which is that of the cores unless OMP_NUM_THREADS says another.
    """

    found: tuple[Found, Found] | None = None
    """Where generator and decoder were read from, if `pipeline` did so."""

    def __init__(
        self,
        generator: ConditionalGenerator,
        decoder: Tokenizer | Autoencoder,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        text_encoder: str | None = None,
        exact: bool = False,
        threads: int | None = None,
        controls: str | Sequence[Any] = (),
    ) -> None:
        """Raises ValueError for a decoder of other tokens or latents than the generator's, and for controls that are
        none or that this generator does not take.
        """
        generator.check_decoder(decoder)
        self.controls: list[PromptControl] = controls_of(controls)
        named = {control.config.kind for control in self.controls}
        trained_with = [kind for kind in generator.config.condition.controls if kind not in named]
        self.controls_of_training: list[PromptControl] = controls_of(trained_with)
        """Controls that act on every prompt as they did on the captions of training, where they can."""
        if self.controls:
            from imgtok.generators.controls import own  # which knows generators: imported where they are controlled

            own.check_reads(generator)
        self.notes: list[dict[str, Any]] = []
        """What controls did in the last call: losses and weights of every step, with the images that they are of."""
        self.generator = generator.eval()
        self.decoder: Any = decoder.eval()
        self.exact, self.threads = exact, threads
        self.text_encoder = text_encoder or generator.config.condition.text_encoder
        self._encoder: TextEncoder | WordEncoder | None = None
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.to(default_device() if device is None else device, dtype)

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: str | torch.dtype | None = None
    ) -> Self:
        """Moves both models to a device, and sets the arithmetic, where given; `to(torch.bfloat16)` sets that alone."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None:
            self.dtype = find_dtype(dtype)
        if device is not None:
            self.device = torch.device(device)
            self.generator.to(self.device)
            self.decoder.to(self.device)
            self._encoder = None
        return self

    def __repr__(self) -> str:
        models = f"{type(self.generator).__name__} -> {type(self.decoder).__name__}"
        place = f"{in_pixels(self.image_size)} pixels, {self.device}, {str(self.dtype).removeprefix('torch.')}"
        return f"Pipeline({models}, {place}, sampling={self.sampling}, decoding={self.decoding})"

    # ------------------------------------------------ what the models say of themselves

    @property
    def sampling(self) -> Any:
        """The settings by which the generator draws unless it is told otherwise."""
        config: Any = self.generator.config
        return config.sampling

    @property
    def decoding(self) -> Any:
        """The settings of the decoder, likewise."""
        return self.decoder.config.decoding

    @property
    def draws_tokens(self) -> bool:
        """Whether the generator draws tokens, and not latents."""
        return self.generator.learns_from == "tokens"

    @property
    def own_lengths(self) -> bool:
        """Whether each image has a number of tokens of its own."""
        return self.draws_tokens and not self.decoder.fixed_length

    @property
    def reads_text(self) -> bool:
        """Whether it draws for prompts, and not for classes."""
        return self.generator.config.reads_text

    @property
    def num_classes(self) -> int:
        """Classes are 0 to num_classes - 1."""
        return self.generator.config.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in order, as the training data had them; () where they had none."""
        return self.generator.config.class_names

    def class_numbers(self, classes: Sequence[int | str]) -> list[int]:
        """Classes by number (-1 for none) or by name -> by number.

        Raises ValueError for a name or a number that the model does not have.
        """
        if self.reads_text and classes:
            raise ValueError("classes: this generator draws from text and has none; leave classes out, or say prompts")
        return class_numbers(classes, self.num_classes, self.class_names)

    @property
    def image_size(self) -> Size:
        """Pixels a side, or (height, width)."""
        config: Any = self.generator.config
        size: Size = self.decoder.image_size if self.draws_tokens else config.grid * self.decoder.config.factor
        return size

    @property
    def blocks(self) -> Blocks:
        """Which images are computed together."""
        rows = max(1, min(ROWS, POSITIONS_AT_ONCE // self.generator.positions_at_once))
        return Blocks(self.device, self.exact, self.threads, rows)

    @property
    def precision(self) -> str:
        """The arithmetic of the networks, as the jobs call it."""
        return next(name for name in ("fp32", "bf16", "fp16") if DTYPES[name] == self.dtype)

    # ------------------------------------------------ for users

    def __call__(
        self,
        classes: Asked = None,
        prompts: str | Sequence[str] | None = None,
        *,
        num_per_condition: int = 1,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        num_tokens: int | None = None,
        known: Any = None,
        keep: Any = None,
        decoding: Mapping[str, Any] | str | None = None,
        batch_size: int = BATCH,
        progress: bool | None = None,
        callback: Callback | None = None,
        control: Control | None = None,
        entities: Sequence[Any] | None = None,
        parser: Parser = "grammar",
        **settings: Any,
    ) -> Images:
        """Images of classes, by number (-1 for none) or by name (`pipe.class_names`), or, from a generator that reads
        text, of prompts ("" for none), which may also stand in the first place: `pipe("a red circle")`. They are a
        list, whose `tokens` are what the images were decoded from.

        num_per_condition: images of each, which follow one another.
        seed, indices: image k has the noise and draws of (seed, indices[k]); indices count from 0 unless given.
        num_tokens: draw and decode so many tokens, fewer than all, where the generator can.
        known, keep: pictures of which a part is kept, and the rest drawn in or around it, where the generator can: one
            for all images, one for each class or prompt, or one for each image; `keep` says which part. See `known`.
        settings: any of `pipe.sampling` and `pipe.decoding` (`imgtok info MODEL` lists them). A name that both have is
            the generator's; those of the decoder can be told apart as decoding={"guidance": 2.0}. In words,
            decoding="coupled", it is the generator's setting of that name.
        batch_size: images computed at once.
        progress: a bar on the terminal; by default where there is a terminal.
        callback: is given a `Step` now and then, whose `images()` are what the images are becoming.
        control: may change what the generator sees of its conditions between steps; see
            `imgtok.generators.conditioning.Control`.
        entities: what a prompt names, for `controls` in this call, such as ["red circle", "blue star"], or a list of
            that for each of several prompts; see `read_prompts`.
        parser: who finds it where it is not given: "grammar", "textblob" or "spacy".

        Raises ValueError for a class, a setting or a number of tokens that the models do not have, and for entities
        where there are no controls.
        """
        subjects, indices = self._subjects(classes, prompts, num_per_condition, indices)
        parses = self._parses(subjects, num_per_condition, entities, parser)
        self.notes = []
        sampling, decoder = self.settings(settings, decoding)
        there = self._known(known, keep, len(subjects), num_per_condition)
        found, drawn = Images(), list[Drawn]()
        with progress_bar(len(subjects), progress, callback) as (bar, told):
            for rows in self.blocks.of(len(subjects), batch_size):
                made = self.images_at(
                    (num_tokens,),
                    [subjects[row] for row in rows],
                    [indices[row] for row in rows],
                    seed=seed,
                    sampling=sampling,
                    decoding=decoder,
                    known=None if there is None else there[rows],
                    callback=told,
                    control=control,
                    parses=[parses[row] for row in rows] if parses else None,
                    notes=self.notes,
                )[num_tokens]
                found += to_pil(made.images)
                drawn.append(made.drawn)
                bar.update(len(rows))
        found.tokens = cast(Tokens, self._joined(drawn)) if self.draws_tokens else None
        return found

    def tokens(self, classes: Asked = None, prompts: str | Sequence[str] | None = None, **options: Any) -> Tokens:
        """The tokens of such images, for `decode`. Options are those of a call, less what concerns the decoder.

        Raises ValueError for a generator of latents.
        """
        if not self.draws_tokens:
            raise ValueError("this generator draws latents and not tokens: call pipe.latents(...)")
        return cast(Tokens, self._joined(self._parts(classes, prompts, **options)))

    def latents(self, classes: Asked = None, prompts: str | Sequence[str] | None = None, **options: Any) -> Tensor:
        """The latents (B, C, G, G) of such images, for `decode`. Options are those of a call, less what concerns the
        decoder.

        Raises ValueError for a generator of tokens.
        """
        if self.draws_tokens:
            raise ValueError("this generator draws tokens and not latents: call pipe.tokens(...)")
        return cast(Tensor, self._joined(self._parts(classes, prompts, **options)))

    def known(self, pictures: Any, keep: Any) -> Known:
        """What is kept of pictures, to be drawn around; in a call it may stand for both.

        pictures: as `imgtok.preprocess` takes and crops them; or images (B, 3, S, S) in [-1, 1], or latents
            (B, C, G, G), of the decoder's.
        keep: the part that is kept, by name: "left", "right", "top" or "bottom" (that half), "center" (the middle half
            of rows and columns) or "border" (all around that); or a picture that is white there, or a boolean mask of
            pixels or of latent positions, one for all or one for each picture.

        Each picture is encoded alone, so that its latents do not depend on others. A latent position is known where all
        of its pixels are kept. Raises ValueError for a generator that cannot keep anything, and for what does not fit.
        """
        self._check_keeps()
        config: Any = self.generator.config
        size = square(self.image_size, "known: a part is kept of squares alone")
        mask = kept(keep, config.grid, size)
        latents = self._latents(pictures, size)
        if len(latents) == 1 and mask.ndim == 3:
            latents = latents.expand(len(mask), -1, -1, -1)
        if mask.ndim == 3 and len(mask) != len(latents):
            raise ValueError(f"keep: {len(mask)} masks for {len(latents)} pictures; give one for all or one for each")
        return Known(latents, mask)

    def read_prompts(
        self, prompts: Sequence[str], entities: Sequence[Any] | None = None, *, parser: Parser = "grammar"
    ) -> list[Parse]:
        """What controls understand of prompts: their entities as given (for one prompt a list of them, for several a
        list of lists, None among these leaves one to the parser), or by a parser; see `imgtok.text.parsing.parse`,
        which says what is refused.
        """
        given: Sequence[Any] = [None] * len(prompts)
        if entities is not None:
            alone = len(prompts) == 1 and (not entities or isinstance(entities[0], str | Entity))
            given = [entities] if alone else entities
        if len(given) != len(prompts):
            raise ValueError(f"entities: {len(given)} lists for {len(prompts)} prompts; give one for each")
        return [parse(prompt, parser=parser, entities=one) for prompt, one in zip(prompts, given, strict=True)]

    def decode(
        self,
        drawn: Drawn,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        batch_size: int = BATCH,
        progress: bool | None = None,
        callback: Callback | None = None,
        **decoding: Any,
    ) -> list[Image.Image]:
        """Images of what `tokens` or `latents` drew, or of any tokens or latents (B, C, G, G) of the decoder's.

        Image k has the decoder's noise of (seed, indices[k]), which count from 0 unless given; further keywords are
        settings of `pipe.decoding`.
        """
        how = Settings(**decoding).over(self.decoding, "decoding")
        chosen = check_indices(indices, len(drawn))
        found: list[Image.Image] = []
        with progress_bar(len(drawn), progress, callback) as (bar, told):
            for rows in self.blocks.of(len(drawn), batch_size):
                part = drawn[self.blocks.padded(rows)].to(self.device)
                found += to_pil(self._decode(part, [chosen[row] for row in rows], seed, how, told))
                bar.update(len(rows))
        return found

    def save_pretrained(self, folder: str | Path, *, name: str | None = None) -> None:
        """Writes a model folder with the decoder in `tokenizer/`, which `imgtok.pipeline(folder)` opens again.

        Where there is no model card yet, one is written, whose example opens `name`, by default the folder.
        """
        folder, generator = Path(folder), self.generator
        if self.reads_text:
            generator.config = generator.config.with_condition(text_encoder=self.text_encoder)
        write_cards(folder, name or str(folder), generator.config, self.decoder.config)
        generator.save_pretrained(folder)
        self.decoder.save_pretrained(folder / "tokenizer")
        if self.text_encoder is not None and is_words(Path(self.text_encoder)):
            words.copy(Path(self.text_encoder), folder / words.NAME)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a generator with its decoder",
    ) -> str:
        """Uploads what `save_pretrained` writes to the Hub repository "owner/name", and returns the commit's address.

        `imgtok.pipeline("owner/name")` opens it. Raises ConnectionError when the Hub cannot be reached or refuses.
        """
        api = HfApi(token=token)
        try:
            name = api.create_repo(name, private=private, exist_ok=True).repo_id
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(folder, name=name)
                return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message=commit_message))
        except Exception as error:  # the HTTP library, and with it the exception, varies between releases
            raise ConnectionError(f"could not push to {name!r} on the Hugging Face Hub: {error}") from error

    def settings(self, given: Mapping[str, Any], decoding: Mapping[str, Any] | str | None = None) -> tuple[Any, Any]:
        """The settings of generator and decoder with the given ones in their place: by name, the generator's first,
        and as `decoding` the decoder's alone, or in words the generator's setting of that name.

        Raises ValueError for a name that neither has, or a value that they do not take.
        """
        if isinstance(decoding, str):
            given, decoding = {**given, "decoding": decoding}, None
        own, decoders = names_of(self.sampling), names_of(self.decoding)
        check_names(given, self.__call__, "these models", sampling=own, decoding=decoders)
        sampling = Settings(**{name: value for name, value in given.items() if name in own})
        rest = {name: value for name, value in given.items() if name not in own} | dict(decoding or {})
        return sampling.over(self.sampling, "sampling"), Settings(**rest).over(self.decoding, "decoding")

    # ------------------------------------------------ for programs

    def images(
        self,
        subjects: Sequence[Subject],
        indices: Sequence[int],
        *,
        seed: int,
        sampling: Any = None,
        decoding: Any = None,
        num_tokens: int | None = None,
        known: Known | None = None,
        callback: Callback | None = None,
        control: Control | None = None,
    ) -> Tensor:
        """uint8 images (len(indices), 3, H, W) of classes or prompts, one each, computed together but for `exact`."""
        found = self.images_at(
            (num_tokens,),
            subjects,
            indices,
            seed=seed,
            sampling=sampling,
            decoding=decoding,
            known=known,
            callback=callback,
            control=control,
        )
        return found[num_tokens].images

    def images_at(
        self,
        counts: Sequence[int | None],
        subjects: Sequence[Subject],
        indices: Sequence[int],
        *,
        seed: int,
        sampling: Any = None,
        decoding: Any = None,
        known: Known | None = None,
        callback: Callback | None = None,
        control: Control | None = None,
        parses: Sequence[Parse] | None = None,
        notes: list[dict[str, Any]] | None = None,
    ) -> dict[int | None, Made]:
        """By number of tokens, what `images` gives with that many and what was decoded; None is all of them.

        Each sequence is drawn once, as long as the largest count, and decoded from its prefixes: token i depends on
        its own uniform and the tokens before it, so a longer draw begins with the shorter one.

        Controls act on `parses`, one for each subject (`read_prompts`), or on what the grammar finds; `notes` is filled
        with what they did.
        """
        counts = list(dict.fromkeys(counts))
        self.check_counts(counts)
        most = None if None in counts else max(count for count in counts if count is not None)
        made: dict[int | None, list[Made]] = {count: [] for count in counts}
        for rows in self.blocks.of(len(indices)):
            own, there = [indices[row] for row in rows], None if known is None else known[rows]
            read = None if parses is None else [parses[row] for row in rows]
            drawn = self._draw(
                [subjects[row] for row in rows], own, seed, sampling, most, there, callback, control, read, notes
            )
            for count in counts:
                cut = drawn if count is None else cast(Tokens, drawn).truncate(count)
                images = to_uint8(self._decode(cut, own, seed, decoding, callback)).cpu()
                made[count].append(Made(images, cut[: len(own)].to("cpu")))
        return {
            count: Made(torch.cat([part.images for part in parts]), self._joined([part.drawn for part in parts]))
            for count, parts in made.items()
        }

    def check_counts(self, counts: Sequence[int | None]) -> None:
        """Raises ValueError for a number of tokens that the generator does not draw or the tokenizer not decode."""
        rates, given = self.generator.rates(), [count for count in counts if count is not None]
        if given and not rates:
            why = "draws its own number of tokens" if self.draws_tokens else "draws whole latents, not tokens"
            raise ValueError(f"num_tokens: this generator {why}; leave num_tokens out")
        if any(count not in rates for count in given):
            some = f"{min(rates)} to {max(rates)}" if len(rates) == max(rates) - min(rates) + 1 else f"one of {rates}"
            raise ValueError(f"num_tokens: the generator draws {some} tokens, given {given}")
        for count in given:
            try:
                self.decoder.check_rate(Rate(count))
            except ValueError as error:
                raise ValueError(f"num_tokens: {count} cannot be decoded: {error}") from error

    def encoder(self) -> TextEncoder | WordEncoder:
        """The text encoder, loaded when it is first needed.

        Raises ValueError for a generator without text, or for another encoder than it was trained with.
        """
        if self._encoder is None:
            if not self.reads_text:
                raise ValueError("prompts: this generator cannot read them, it draws classes")
            if self.text_encoder is None:
                why = "the generator names no encoder: say text_encoder=FOLDER"
                raise ValueError(f"prompts: this generator cannot read them, {why}")
            try:
                length = self.generator.config.condition.text_length
                found = load_encoder(self.text_encoder, max_length=length, device=self.device)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}; say where the text encoder is with text_encoder=FOLDER") from error
            empty = self.generator.empty_caption
            if empty is not None and bool(empty.any()):  # zeros where a published file does not say them
                found.check_same(empty)
            own = None if self.found is None else self.found[0].path / words.NAME
            if isinstance(found, WordEncoder) and own is not None and is_words(own):
                found.check_vocabulary(own)
            self._encoder = found
        return self._encoder

    def condition(self, subjects: Sequence[Subject]) -> Condition:
        """What the generator draws for. Each prompt is encoded alone, so that its features tell nothing of others."""
        if not self.reads_text:
            return torch.tensor(subjects, dtype=torch.long, device=self.device)
        encoder, prompts = self.encoder(), cast(Sequence[str], subjects)
        captions = {prompt: encoder.encode([prompt])[0] for prompt in sorted(set(prompts))}
        for prompt, caption in captions.items():
            if rest := cut_off(prompt, caption, encoder.max_length):
                logger.warning("prompts: %r is too long for %s: %r is not read", prompt, encoder.name, rest)
        if self.controls_of_training:
            from imgtok.generators.controls.captions import all_controlled

            encode = functools.cache(lambda text: encoder.encode([text])[0])
            captions = all_controlled(self.controls_of_training, captions, encode)
        return Captions.cat([captions[prompt] for prompt in prompts])

    # ------------------------------------------------ in blocks

    def _subjects(
        self,
        classes: Asked,
        prompts: str | Sequence[str] | None,
        num_per_condition: int,
        indices: Sequence[int] | None,
    ) -> tuple[list[Subject], Sequence[int]]:
        """What each image is drawn for, and its index."""
        if prompts is None and are_words(classes) and not self.class_names:
            classes, prompts = None, cast(str | Sequence[str], classes)
        given, other, wanted = (prompts, classes, "prompts") if self.reads_text else (classes, prompts, "classes")
        if given is None or other is not None:
            kind = "from text" if self.reads_text else "classes"
            raise ValueError(f"this generator draws {kind}: give {wanted}=..., and nothing else to draw for")
        listed: list[Subject] = [given] if isinstance(given, int | str) else list(given)
        if not self.reads_text:
            listed = list(self.class_numbers([label if isinstance(label, str) else int(label) for label in listed]))
        if not listed or num_per_condition < 1:
            raise ValueError(f"nothing to draw: {len(listed)} {wanted}, num_per_condition={num_per_condition}")
        subjects = [subject for subject in listed for _ in range(num_per_condition)]
        return subjects, check_indices(indices, len(subjects))

    def _parses(
        self, subjects: Sequence[Subject], repeats: int, entities: Sequence[Any] | None, parser: Parser
    ) -> list[Parse]:
        """What controls understand of each of the subjects, `repeats` of each prompt; nothing without controls."""
        if not self.controls:
            if entities is not None:
                raise ValueError(
                    "entities: these are for controls, and this pipeline has none; open it with "
                    "imgtok.pipeline(NAME, controls=...), or leave entities out"
                )
            return []
        prompts = cast(Sequence[str], subjects[::repeats])
        return [one for one in self.read_prompts(prompts, entities, parser=parser) for _ in range(repeats)]

    def _parts(
        self,
        classes: Asked,
        prompts: str | Sequence[str] | None,
        *,
        num_per_condition: int = 1,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        num_tokens: int | None = None,
        known: Any = None,
        keep: Any = None,
        batch_size: int = BATCH,
        progress: bool | None = None,
        callback: Callback | None = None,
        control: Control | None = None,
        entities: Sequence[Any] | None = None,
        parser: Parser = "grammar",
        **settings: Any,
    ) -> list[Drawn]:
        """What is drawn, block by block, without padding."""
        subjects, indices = self._subjects(classes, prompts, num_per_condition, indices)
        parses = self._parses(subjects, num_per_condition, entities, parser)
        self.notes = []
        check_names(settings, self._parts, "the generator", sampling=names_of(self.sampling))
        sampling = Settings(**settings).over(self.sampling, "sampling")
        self.check_counts((num_tokens,))
        there = self._known(known, keep, len(subjects), num_per_condition)
        found = []
        with progress_bar(len(subjects), progress, callback) as (bar, told):
            for rows in self.blocks.of(len(subjects), batch_size):
                chosen = [subjects[row] for row in rows]
                own = [indices[row] for row in rows]
                part = None if there is None else there[rows]
                read = [parses[row] for row in rows] if parses else None
                drawn = self._draw(chosen, own, seed, sampling, num_tokens, part, told, control, read, self.notes)
                found.append(drawn[: len(rows)])
                bar.update(len(rows))
        return found

    def _known(self, known: Any, keep: Any, count: int, repeats: int) -> Known | None:
        """What is known of each of `count` images, `repeats` of each class or prompt; None where nothing is."""
        if known is None:
            if keep is not None:
                raise ValueError("keep: says which part of known pictures is kept; give these as known=...")
            return None
        self._check_keeps()
        if isinstance(known, Known) != (keep is None):
            raise ValueError(f"keep: goes with pictures, given as known=...; it must be {WAYS}, or a mask")
        there = known if isinstance(known, Known) else self.known(known, keep)
        return there.spread(count, repeats)

    def _check_keeps(self) -> None:
        if not self.generator.keeps_known:
            kind = self.generator.config.kind
            raise ValueError(f"known: a generator of kind {kind} keeps no part of an image; leave known and keep out")

    @torch.no_grad()
    def _latents(self, pictures: Any, size: int) -> Tensor:
        """Pictures, images or latents as latents (B, C, G, G), float32."""
        config: Any = self.generator.config
        shape = (config.latent_channels, config.grid, config.grid)
        if isinstance(pictures, Tensor) and pictures.shape[1:] == shape:
            return pictures.detach().float()
        images = pictures if isinstance(pictures, Tensor) else preprocess(pictures, size)
        if images.shape[1:] != (3, size, size):
            raise ValueError(
                f"known: {tuple(images.shape)} are neither images (B, 3, {size}, {size}) nor latents (B, "
                f"{', '.join(map(str, shape))}); imgtok.preprocess(pictures, {size}) makes images of pictures"
            )
        with self._computing():
            return torch.cat([self.decoder.encode(image[None].to(self.device)).float() for image in images])

    def _joined(self, parts: Sequence[Drawn]) -> Drawn:
        """What was drawn in several blocks, one after the other."""
        drawn: list[Any] = list(parts)
        return Tokens.cat(drawn) if self.draws_tokens else torch.cat(drawn)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Within the block networks compute in the arithmetic and with the threads that are asked for."""
        halves = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        with self.blocks.computing(), halves:
            yield

    def _draw(
        self,
        subjects: Sequence[Subject],
        indices: Sequence[int],
        seed: int,
        sampling: Any,
        num_tokens: int | None,
        known: Known | None,
        callback: Callback | None,
        control: Control | None,
        parses: Sequence[Parse] | None,
        notes: list[dict[str, Any]] | None,
    ) -> Drawn:
        """The tokens or latents of a block, padding included."""

        def on_step(done: int, latents: Tensor | None = None) -> None:
            assert callback is not None
            guess = None if latents is None else (lambda: self.decoder.decode(latents[: len(indices)]))
            callback(Step("draw", done, indices, guess))

        there = None if known is None else known[self.blocks.padded(range(len(known)))]
        given = {"num_tokens": num_tokens, "control": control, "known": there}
        options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        start = time.perf_counter()
        asked, numbers = self.blocks.padded(subjects), self.blocks.padded(indices)
        with self._computing():
            options |= {"sampling": sampling, "on_step": None if callback is None else on_step}
            condition = self.condition(asked)
            if self.controls:
                read = self.read_prompts(cast(Sequence[str], subjects)) if parses is None else parses
                drawn = self._controlled(condition, self.blocks.padded(read), seed, numbers, notes, options)
            else:
                drawn = self.generator.generate(condition, seed=seed, indices=numbers, **options)
        if isinstance(drawn, Tokens) and drawn.calls is not None:
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            drawn = replace(drawn, calls=drawn.calls.timed(time.perf_counter() - start, len(indices)))
        return drawn

    def _controlled(
        self,
        condition: Condition,
        parses: Sequence[Parse],
        seed: int,
        indices: Sequence[int],
        notes: list[dict[str, Any]] | None,
        options: Mapping[str, Any],
    ) -> Drawn:
        """What is generated under the controls, for prompts that were understood like this."""
        from imgtok.generators.controls.own import OwnScene

        captions, encode = cast(Captions, condition), self.encoder().encode
        scene = OwnScene(self.generator, parses, captions, encode, seed=seed, indices=indices, notes=notes, **options)
        drawn: Drawn = scene.draw(self.controls)
        return drawn

    @torch.no_grad()
    def _decode(
        self, drawn: Drawn, indices: Sequence[int], seed: int, decoding: Any, callback: Callback | None
    ) -> Tensor:
        """Images (len(indices), 3, H, W) of a block."""

        def on_step(done: int, _: Tensor, guess: Tensor) -> None:
            assert callback is not None
            callback(Step("decode", done, indices, lambda: self.decoder.to_images(guess[: len(indices)])))

        with self._computing():
            decoded = self.decoder.decode(
                drawn,
                seed=seed,
                indices=self.blocks.padded(indices),
                decoding=decoding,
                on_step=None if callback is None else on_step,
            )
        return decoded[: len(indices)]


# ------------------------------------------------ helpers


@contextlib.contextmanager
def progress_bar(total: int, shown: bool | None, callback: Callback | None) -> Iterator[tuple[Any, Callback | None]]:
    """A bar over images, for None only on a terminal, and what to tell of the steps in between, if anyone listens."""
    with tqdm(total=total, unit="image", disable=None if shown is None else not shown) as bar:
        if bar.disable:
            yield bar, callback
            return
        shown_at = time.monotonic()

        def told(step: Step) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at > 0.1:
                shown_at = time.monotonic()
                bar.set_postfix_str(f"{step.stage} {step.done}")
            if callback is not None:
                callback(step)

        yield bar, told


def write_cards(folder: Path, name: str, generator: Any, decoder: Any) -> None:
    """Model cards in the folder of a generator and in its `tokenizer/`, each where there is none, by the two models'
    configurations. Their examples open `name`, a folder or a Hub repository.
    """
    task, example = "unconditional-image-generation", "classes=[0, 1]"
    if generator.reads_text:
        task, example = "text-to-image", f"prompts={EXAMPLE_PROMPT!r}"
    kinds = f"{generator.kind}` generator with its `{decoder.kind}"
    cards = {
        folder / "README.md": CARD.format(task=task, kinds=kinds, name=name, example=example),
        folder / "tokenizer" / "README.md": DECODER_CARD.format(kind=decoder.kind, name=name),
    }
    for path, text in cards.items():
        if not path.exists():
            with replacing(path) as card:
                card.write_text(text, encoding="utf-8")


def default_device() -> torch.device:
    """The accelerator that there is, or else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def find_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A floating-point type by its name. Raises ValueError for any other than those of `DTYPES`."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype: given {name!r}, must be one of {', '.join(DTYPES)}")
    return DTYPES[name]


def cut_off(prompt: str, caption: Captions, most: int) -> str:
    """The end of a prompt that its caption (1, T, W) leaves out, as an encoder gives `most` features; "" for none."""
    if caption.spans is None or caption.features.shape[1] < most:
        return ""
    return prompt[int(caption.spans.max()) :].strip()


def are_words(given: Any) -> bool:
    """Whether it is a prompt or several."""
    if isinstance(given, str):
        return True
    return isinstance(given, Sequence) and len(given) > 0 and all(isinstance(one, str) for one in given)


def names_of(settings: Any) -> list[str]:
    """The names of the fields of a dataclass."""
    return [field.name for field in fields(settings)]


def check_names(given: Iterable[str], call: Callable[..., Any], whose: str, **settings: Sequence[str]) -> None:
    """Raises ValueError for a name that is none of the `settings`, by section, with that which is most like it, of them
    or of the arguments of the `call` that it was given to.
    """
    known = [name for names in settings.values() for name in names]
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        arguments = inspect.signature(call).parameters.values()
        options = [one.name for one in arguments if one.kind is not inspect.Parameter.VAR_KEYWORD]
        hint = did_you_mean(unknown, [*options, *known]) or "."
        has = "; ".join(f"{section} has: {', '.join(names) or 'none'}" for section, names in settings.items())
        raise ValueError(f"{unknown}: no setting of {whose}{hint} {has}")


def check_indices(indices: Sequence[int] | None, count: int) -> Sequence[int]:
    """The indices, or 0, 1, ... for none. Raises ValueError unless there are `count` of them."""
    if indices is not None and len(indices) != count:
        raise ValueError(f"indices: {len(indices)} numbers for {count} images")
    return range(count) if indices is None else list(indices)


def class_numbers(classes: Sequence[int | str], num_classes: int, names: Sequence[str] = ()) -> list[int]:
    """Classes by number (-1 for none) or by name -> by number. Raises ValueError for one that the model has not."""
    index = {name: number for number, name in enumerate(names)}
    for label in classes:
        if isinstance(label, str) and label not in index:
            close = difflib.get_close_matches(label, names, n=3)
            hint = f"did you mean {', '.join(map(repr, close))}?" if close else "it has " + some_of(names)
            hint = hint if names else "its training data had none; give numbers"
            raise ValueError(f"classes: no class of this model is called {label!r}; {hint}")
        if not isinstance(label, str) and index.get(str(label), label) != label:
            logger.warning(
                "classes: %d is the class of that number; that which is called '%d' is number %d",
                label,
                label,
                index[str(label)],
            )
    numbers = [index[label] if isinstance(label, str) else label for label in classes]
    check_classes(numbers, num_classes)
    return numbers


def some_of(names: Sequence[str]) -> str:
    """The first names of a list, in words."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_classes(classes: Sequence[int], num_classes: int, *, unlabelled: bool = True) -> None:
    """Raises ValueError for a class outside the model's; -1, no class, is one only if `unlabelled`."""
    for label in classes:
        if not (-1 if unlabelled else 0) <= label < num_classes:
            raise ValueError(f"classes: {label} is not a class of the model; it has classes 0 to {num_classes - 1}")


def batches_of(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Consecutive runs of at most `size` indices."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
