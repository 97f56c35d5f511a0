"""What a generator learns from: a cache of tokens or of latents, with the frozen model that made it.

Both are the same to a training program: batches with `.content` and `.condition`, the facts that decide fields of the
generator's configuration, and the decoder that makes images of what is drawn. A generator says by `learns_from` which
of the two it takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from imgtok.data.captions import CaptionDataset
from imgtok.data.images import DataError, split_indices
from imgtok.data.latents import LatentBatch, Latents, open_latents
from imgtok.data.loaders import latent_loader, latent_rows, token_loader, token_rows
from imgtok.data.tokens import TokenBatch, TokenDataset
from imgtok.hub import Found, load
from imgtok.sizes import Size
from imgtok.tokenizers.base import Autoencoder, Tokenizer


class Content(ABC):
    """A cache and its decoder."""

    COMMAND: ClassVar[str]
    """What writes such a cache."""
    cache: TokenDataset | Latents
    decoder: Tokenizer | Autoencoder
    digest: str
    """Changes with what the cache was made from."""

    @property
    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Values of the generator's configuration that are not open to choice, for `imgtok.sections.Section.over`."""

    @property
    def needed(self) -> frozenset[str]:
        """The facts without which the content is misread: a generator's configuration must have these fields."""
        return frozenset(self.decoder.facts())

    @abstractmethod
    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start_step: int,
        rank: int,
        world: int,
        num_workers: int,
        captions: CaptionDataset | None,
        among: Sequence[int] | None = None,
    ) -> Iterator[TokenBatch | LatentBatch]:
        """Batches for one process, without end, from `start_step` on, of the rows `among` which they are drawn, by
        default all; see `imgtok.data.loaders`.
        """

    @abstractmethod
    def rows(self, rows: Sequence[int], seed: int, captions: CaptionDataset | None) -> TokenBatch | LatentBatch:
        """Some rows as training has them, what is drawn with them by the seed: always the same."""

    def divide(self, share: float) -> tuple[list[int], list[int]]:
        """The rows to train on, and those that are held out: those of a share of the images, from all over the cache
        (which may be sorted by class), all views of an image on one side. Raises DataError where a side has none.
        """
        images = self.indices.unique()
        kept = images[torch.from_numpy(split_indices(len(images), "held_out", share))]
        apart = torch.isin(self.indices, kept)
        return torch.nonzero(~apart).flatten().tolist(), torch.nonzero(apart).flatten().tolist()

    def check_like(self, other: Content, field: str) -> None:
        """Raise DataError if the rows of the `other` content are no input of a generator of this one."""
        mine, its = self.facts, other.facts
        different = [f"{name} {its[name]!r:.60}, not {mine[name]!r:.60}" for name in mine if mine[name] != its[name]]
        if other.num_classes > self.num_classes:
            different.append(f"{other.num_classes} classes, not {self.num_classes}")
        if self.class_names and other.class_names and self.class_names != other.class_names:
            different.append(
                f"classes of other names, such as {(set(other.class_names) - set(self.class_names)) or ''}"
            )
        if different:
            raise DataError(f"{field}: unlike the cache that is trained on ({'; '.join(different)}); make it alike")

    @abstractmethod
    def beside(self, folder: Path) -> Content:
        """Another cache of the same kind, made by the same model. Raises as the constructor."""

    @property
    @abstractmethod
    def image_size(self) -> Size:
        """Pixels a side of the decoder's images, or (height, width)."""

    @property
    def indices(self) -> Tensor:
        """(N,) int64: which image of the source each row is."""
        return self.cache.indices

    @property
    def num_classes(self) -> int:
        """Labels lie in [0, num_classes); 0 for data without labels."""
        return self.cache.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in order; () where they have none."""
        return self.cache.class_names

    @property
    def in_words(self) -> str:
        """`tokens of 36 images, 3 classes`, for the line that a job begins with."""
        what = next(name for name, kind in CONTENTS.items() if isinstance(self, kind))
        count, number = len(self.indices.unique()), self.num_classes
        rows = f" ({len(self.cache)} views)" if len(self.cache) != count else ""
        classes = f"{number} class{'es'[: 2 * (number != 1)]}" if number else "unlabelled"
        return f"{what} of {count} image{'s'[: count != 1]}{rows}, {classes}"


class TokenContent(Content):
    """Tokens of a tokenizer. Raises DataError for those of another one, else as `TokenDataset` and `load`."""

    COMMAND = "imgtok cache"
    cache: TokenDataset
    decoder: Tokenizer

    def __init__(self, folder: Path, found: Found, decoder: Tokenizer | None = None) -> None:
        """`decoder` is the model that was `found`, where it is loaded already."""
        self.found = found
        self.decoder = load(found, expect=Tokenizer) if decoder is None else decoder
        self.cache = TokenDataset(folder, found.fingerprint(), same_tokens=found.encodes_as)
        self.digest = self.cache.info.digest

    def beside(self, folder: Path) -> TokenContent:
        return TokenContent(folder, self.found, self.decoder)

    @property
    def image_size(self) -> Size:
        return self.decoder.image_size

    @property
    def facts(self) -> dict[str, Any]:
        info = self.cache.info
        return self.decoder.facts() | {
            "vocab_size": info.vocab_size,
            "num_tokens": info.num_tokens,
            "ends": not info.fixed_length,
            "num_slots": info.num_slots or 0,
        }

    @property
    def needed(self) -> frozenset[str]:
        """Those of the decoder, and what makes rows of tokens differ in length, or come from slots."""
        special = {name for name in ("ends", "num_slots") if self.facts[name]}
        return super().needed | special

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start_step: int,
        rank: int,
        world: int,
        num_workers: int,
        captions: CaptionDataset | None,
        among: Sequence[int] | None = None,
    ) -> Iterator[TokenBatch]:
        # in memory: workers would have nothing to do
        place = {"seed": seed, "start_step": start_step, "rank": rank, "world": world}
        return token_loader(self.cache, batch_size, captions=captions, among=among, **place)

    def rows(self, rows: Sequence[int], seed: int, captions: CaptionDataset | None) -> TokenBatch:
        return token_rows(self.cache, rows, captions)


class LatentContent(Content):
    """Latents of an autoencoder. Raises DataError for those of another one, else as `open_latents` and `load`."""

    COMMAND = "imgtok cache latents"
    cache: Latents
    decoder: Autoencoder

    def __init__(self, folder: Path, found: Found, decoder: Autoencoder | None = None) -> None:
        """`decoder` is the model that was `found`, where it is loaded already."""
        self.found = found
        self.decoder = load(found, expect=Autoencoder) if decoder is None else decoder
        self.cache = open_latents(folder, self.decoder, same_latents=found.encodes_as)
        self.digest = self.cache.digest

    def beside(self, folder: Path) -> LatentContent:
        return LatentContent(folder, self.found, self.decoder)

    @property
    def image_size(self) -> int:
        size: int = self.cache.grid * self.decoder.config.factor
        return size

    @property
    def facts(self) -> dict[str, Any]:
        return self.decoder.facts() | {"latent_channels": self.cache.latent_channels, "grid": self.cache.grid}

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start_step: int,
        rank: int,
        world: int,
        num_workers: int,
        captions: CaptionDataset | None,
        among: Sequence[int] | None = None,
    ) -> Iterator[LatentBatch]:
        place = {"seed": seed, "start_step": start_step, "rank": rank, "world": world}
        return latent_loader(self.cache, batch_size, num_workers=num_workers, captions=captions, among=among, **place)

    def rows(self, rows: Sequence[int], seed: int, captions: CaptionDataset | None) -> LatentBatch:
        return latent_rows(self.cache, rows, seed, captions)


CONTENTS: dict[str, type[TokenContent] | type[LatentContent]] = {"tokens": TokenContent, "latents": LatentContent}
"""By `learns_from` of a generator."""
