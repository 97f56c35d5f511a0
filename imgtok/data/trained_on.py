"""Which images a job on a trained model works on: those that it is told, or those that the model was trained on.

A model's folder has the configuration of its run (`config.yaml`) and what tells the run's images from others
(`identity.json`). By these a job knows whether the images at hand are those of the training, of which a share was held
out. Models of earlier versions may have the configuration alone: the place of the images is then all that is known.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from imgtok import runs
from imgtok.config import ConfigError, from_dict, read_yaml, to_dict
from imgtok.data.images import HOW_TO_NAME, DataConfig, DataError, ImageSource, Opened, Split, in_words, size_in_words
from imgtok.data.parts import parts_of
from imgtok.data.sources import NOT_TOLD, differing
from imgtok.hub import Found
from imgtok.shapes.world import ShapesConfig
from imgtok.sizes import Size

SHARE = 0.1
"""The share that is held out where nothing says another one."""


@dataclass(frozen=True, kw_only=True)
class _Section:
    """The part of a run's configuration that is read here."""

    data: DataConfig


@dataclass(frozen=True)
class Training:
    """What the record of a model's training says."""

    model: str
    """The model's name."""
    data: DataConfig
    """Its images, as they were named."""
    held_out: float
    """The share of them that was held out."""
    image_size: int | None
    """Pixels a side, where the run says that."""
    identity: dict[str, Any] | None
    """What tells the images from others; None where it was not kept beside the model."""

    @classmethod
    def of(cls, found: Found) -> Training | None:
        """None for a model without such a record. Raises ConfigError for one that this release cannot read."""
        path = found.path / runs.CONFIG
        if not path.is_file():
            return None
        written: Any = read_yaml(path)
        if not isinstance(written.get("data"), dict):
            return None
        data = from_dict(_Section, {"data": written["data"]}, str(path)).data
        kept = runs.identity_path(found.path)
        identity = json.loads(kept.read_text(encoding="utf-8")).get("data") if kept is not None else None
        held_out = written.get("held_out", SHARE)
        return cls(found.name, data, float(held_out), written.get("image_size"), identity)

    def had(self, config: DataConfig, identity: dict[str, Any]) -> bool:
        """Whether these images are those of the training."""
        if self.identity is not None:
            defaults = to_dict(ShapesConfig()) if isinstance(config, ShapesConfig) else NOT_TOLD
            return not any(differing(_images(self.identity), _images(identity), defaults))
        return _place(config) == _place(self.data)

    def had_some_of(self, config: DataConfig, identity: dict[str, Any]) -> bool:
        """Whether these images are those of the training, of which either may have used only some (`num`)."""
        known = self.identity
        whole = replace(self, data=_whole(self.data), identity=known and {**known, "num": None})
        return whole.had(_whole(config), {**identity, "num": None})

    @property
    def has_held_out(self) -> bool:
        """Whether the training had images of their own to show, and trained on all of these."""
        if self.identity is not None and "own_held_out" in self.identity:  # they may be gone, or come since
            return bool(self.identity["own_held_out"])
        return not isinstance(self.data, ShapesConfig) and parts_of(self.data).held_out is not None


def _images(identity: dict[str, Any]) -> dict[str, Any]:
    """What tells images from others, whatever their labels are and whatever is held out beside them."""
    return {name: value for name, value in identity.items() if name not in ("labels", "own_held_out")}


def _place(config: DataConfig) -> dict[str, Any]:
    """What names the images, with an absolute path."""
    told = to_dict(config)
    if isinstance(config, ShapesConfig):
        return told
    path = {"path": str(Path(told["path"]).expanduser().absolute())} if "path" in told else {}
    return {name: told.get(name) for name in ("kind", "name", "subset", "split", "num")} | path


def _whole(config: DataConfig) -> DataConfig:
    return config if isinstance(config, ShapesConfig) else replace(config, num=None)


class Chosen(NamedTuple):
    """The images that a job works on."""

    source: ImageSource
    data: DataConfig
    held_out: float | None
    """The share of `data` that is held out, and this or not this; 1 is all of it, None a part of its own."""
    words: str
    """Where they are, which, and how many, for the line that a job begins with."""


@dataclass(frozen=True)
class Named:
    """Images that are named, or else those that a model was trained on; and what is known of that training."""

    data: DataConfig
    found: Found
    training: Training | None
    opened: Opened

    @classmethod
    def of(cls, data: DataConfig | None, found: Found) -> Named:
        """The images `data`, or for None those of the record of the model.

        Raises ConfigError where there is no record, FileNotFoundError for recorded images that are no longer there,
        DataError where other images lie there now.
        """
        if data is not None:
            try:
                training = Training.of(found)
            except ConfigError:  # written by another release; nothing here depends on it
                training = None
            return cls(data, found, training, Opened(data))
        training = Training.of(found)
        if training is None:
            raise ConfigError(
                f"data: is required, since {found.name} has no record of what it was trained on: {HOW_TO_NAME}"
            )
        named = cls(training.data, found, training, _open_recorded(training))
        before, now = training.identity, named._identity
        if before is not None and not named._known:
            raise DataError(
                f"data: {in_words(named.data)} holds other images now than {found.name} was trained on "
                f"({_difference(before, now)}); name those that are meant: {_named_in_words(named.data)}"
            )
        return named

    def to_show(self, size: Size, held_out: float | None = None) -> Chosen:
        """The images that the model is shown or scored on.

        A part of its own that a data set has for this is taken whole. Otherwise `held_out` is the share that is taken,
        as training held it out; 1 takes all. None takes what the model's training held out of the images that it was
        trained on, and all of others; of the built-in shapes some that no training sees, since they are drawn. Raises
        DataError where nothing was held out.
        """
        share = self.share_to_show(held_out)
        if share is None:
            return self._chosen(self.opened.images(size, "held_out", 0.0), share, "the {} of its held-out part")
        if share == 1:
            return self._chosen(self.opened.images(size, "train", 0.0), share, "all {}", self._overlap())
        if share == 0 or (self.opened.count < 2 and not isinstance(self.data, ShapesConfig)):
            raise DataError(self._none_held_out(share))
        return self._chosen(self.opened.images(size, "held_out", share), share, f"{{}} held out (held_out={share:g})")

    def to_encode(self, size: Size, split: Split, held_out: float | None = None) -> Chosen:
        """One part of the images, for a cache. For None they are divided as the model's training divided them, or with
        the share `SHARE` where they are others.
        """
        known = self.training.held_out if self.training is not None and self._known else SHARE
        share = known if held_out is None else held_out
        source, part = self.opened.images(size, split, share), "{} to train on" if split == "train" else "{} held out"
        if self.opened.has_held_out:
            return self._chosen(source, None, part)
        return self._chosen(source, share, f"{part} (held_out={share:g})")

    def _chosen(self, source: ImageSource, share: float | None, which: str, more: str = "") -> Chosen:
        known = ""
        if self.training is not None and self._known:
            sure = self.training.identity is not None
            known = f", as {self.found.name} was trained on" if sure else f", by the record of {self.found.name}"
        words = f"{in_words(self.data)}{known}: {size_in_words(source, which)}{more}"
        return Chosen(source, self.data, share, words)

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.opened.identity)
        return told

    @functools.cached_property
    def _known(self) -> bool:
        """Whether these are the images of the training."""
        return self.training is not None and self.training.had(self.data, self._identity)

    def share_to_show(self, held_out: float | None = None) -> float | None:
        """The share that `to_show` takes; None for a part of its own."""
        if self.opened.has_held_out:
            return None
        return self._share_by_default() if held_out is None else held_out

    def _share_by_default(self) -> float:
        if isinstance(self.data, ShapesConfig):
            if self.data.split != "train":
                return 1.0
            return self.training.held_out or SHARE if self.training is not None and self._known else SHARE
        if self.training is None or not self._known:
            return 1.0
        return 0.0 if self.training.has_held_out else self.training.held_out

    def _none_held_out(self, share: float) -> str:
        """What to say where nothing is held out, with the remedy."""
        where = in_words(self.data)
        what = f"held_out={share:g} takes none of {where}"
        if share > 0:
            what = f"none of {self.opened.count} image of {where} can be held out"
        elif self._known:
            what = f"{self.found.name} was trained on all of {where}"
        return f"held_out: {what}: held_out=1 takes all of it; or name other images, data.kind=... data.path=..."

    def _overlap(self) -> str:
        """What the line at the start adds to all images, of which some may be known from the training."""
        if isinstance(self.data, ShapesConfig):
            return ""
        if self.training is None:
            return f", and what {self.found.name} was trained on is not known"
        if not self.training.had_some_of(self.data, self._identity):
            return ""
        every = self._known and (self.training.has_held_out or not self.training.held_out)
        return f", and {self.found.name} was trained on {'them' if every else 'some of them'}"


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first number or word in which two identities differ; a digest says nothing to a reader."""
    for name, value in before.items():
        if now.get(name) != value and name not in ("names", "labels", "content"):
            return f"{name}: {value} then, {now.get(name)} now"
    changed = [name for name in ("names", "content") if before.get(name) != now.get(name)]
    return f"their {' and '.join(changed)} {'has' if changed == ['content'] else 'have'} changed"


def _named_in_words(data: DataConfig) -> str:
    """How images of this kind are named on the command line."""
    told = to_dict(data)
    place = next((name for name in ("path", "name") if name in told), None)
    return f"data.kind={told['kind']}" + (f" data.{place}=..." if place else "")


def _open_recorded(training: Training) -> Opened:
    try:
        return Opened(training.data)
    except OSError as error:
        raise FileNotFoundError(
            f"data: {error}. {training.model} was trained on these images, and no others are named: say where they lie "
            f"now, {_named_in_words(training.data)}"
        ) from error
