"""What generated images are compared with: statistics of a network's features over real images.

Our own files are .safetensors with their origin in the metadata, or .npz files with `mu`, `sigma`, perhaps `mu_s` and
`sigma_s` as the ADM suite and pytorch-fid have them, and with `extractor` and `count`. Published ones do not say which
network made them, so the user has to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import imgtok
from imgtok.files import replacing
from imgtok.metrics.accumulate import Moments, Reducer, Rows
from imgtok.metrics.arrays import open_npz, read_array
from imgtok.metrics.frechet import frechet_distance
from imgtok.randomness import spread
from imgtok.vision.features import Features
from imgtok.vision.inception import INCEPTION_NAME

FORMAT = 1
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) in float64 over `count` images; a count of 0 is unknown."""

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, moments: Moments) -> Statistics:
        return cls(moments.mean, moments.covariance, int(moments.count))

    def distance(self, other: Statistics) -> float:
        """Frechet distance; raises ValueError when the numbers of features differ."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Statistics of real images under one network."""

    name: str
    """As it stands in the names of scores."""
    extractor: str
    """Name of the network, `FeatureExtractor.name`."""
    pool: Statistics
    spatial: Statistics | None = None
    """For sFID."""
    features: Tensor | None = None
    """(N, D) float32, for the scores that look at single images (precision, recall, kernel distances); not saved."""


class FeatureSums:
    """Everything that the scores on a network's features need of one set of `num` images, streamed."""

    def __init__(self, num: int, *, spatial: bool, keep: int) -> None:
        """Holds on to the pool features of at most `keep` images, from all over: the first may be of few classes."""
        self.num, self._spatial = num, spatial
        self._kept = min(keep, num)
        self._row = torch.full((num,), -1)  # of an image's features among those that are kept
        self._row[torch.from_numpy(spread(self._kept, num))] = torch.arange(self._kept)
        self.pool: Moments | None = None
        self.spatial: Moments | None = None
        self.rows: Rows | None = None

    def update(self, indices: Sequence[int], features: Features) -> None:
        if self.pool is None:
            self._begin(features)
        assert self.pool is not None
        self.pool.update(features.pool)
        if self.spatial is not None:
            assert features.spatial is not None
            self.spatial.update(features.spatial)
        if self.rows is not None:
            rows = self._row[list(indices)]
            self.rows.update(rows[rows >= 0].tolist(), features.pool.cpu()[rows >= 0])

    def _begin(self, features: Features) -> None:
        width = features.pool.shape[1]
        self.pool = Moments(width)
        if self._spatial:
            assert features.spatial is not None, "sfid is a score of Inception's"
            self.spatial = Moments(features.spatial.shape[1])
        self.rows = Rows(self._kept, width, torch.float32) if self._kept else None

    def reduce(self, reducer: Reducer | None) -> None:
        """Raises ValueError when this process got no image: more processes than images."""
        if self.pool is None:
            raise ValueError(f"fewer images ({self.num}) than processes; use fewer processes")
        for part in (self.pool, self.spatial, self.rows):
            if part is not None:
                part.reduce(reducer)

    def reference(self, name: str, extractor: str) -> Reference:
        assert self.pool is not None
        return Reference(
            name=name,
            extractor=extractor,
            pool=Statistics.of(self.pool),
            spatial=Statistics.of(self.spatial) if self.spatial else None,
            features=self.rows.scored if self.rows else None,
        )


SUFFIXES = (".safetensors", ".npz")


def save(reference: Reference, path: Path) -> None:
    """Write the statistics (not the features) as .safetensors or, if the path ends so, .npz, in one step."""
    tensors = {"mu": reference.pool.mean, "sigma": reference.pool.covariance}
    if reference.spatial:
        tensors |= {"mu_s": reference.spatial.mean, "sigma_s": reference.spatial.covariance}
    if path.suffix == ".npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        arrays |= {"extractor": np.array(reference.extractor), "count": np.array(reference.pool.count)}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        return
    metadata = {
        "format": FORMAT,
        "name": reference.name,
        "extractor": reference.extractor,
        "count": reference.pool.count,
        "imgtok_version": imgtok.__version__,
    }
    with replacing(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"imgtok": json.dumps(metadata)})


@dataclass(frozen=True)
class Contents:
    """What a file of statistics holds."""

    arrays: tuple[str, ...]
    """Names of its statistics: mu, sigma, perhaps mu_s, sigma_s."""
    extractor: str | None
    """The network that made them, where the file says so."""


def look_into(path: Path) -> Contents | None:
    """What a reference holds, None for images alone. Raises FileNotFoundError, or ValueError for a damaged file."""
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such reference file")
        tensors, metadata = _read_safetensors(path)
        return Contents(tuple(sorted(tensors)), metadata["extractor"])
    if path.suffix != ".npz" or not path.is_file():
        return None
    with open_npz(path) as arrays:
        names = tuple(sorted(name for name in STATISTICS if name in arrays))
        return Contents(names, _maker(arrays, path)) if names else None


def may_be_of(extractor: str | None, network: str) -> bool:
    """Whether statistics that `extractor` made are of `network`, by how their names begin; those of which it is not
    said are Inception's, as all that others publish.
    """
    return (extractor or INCEPTION_NAME).split(":")[0] == network


def load(path: Path, extractor: str, assume: str | None = None) -> Reference:
    """Statistics for `extractor` from our .safetensors or an .npz.

    `assume` names the network of an .npz that does not say it. Raises ValueError when the file's network is another
    one, is not known, or the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such reference file")
    made_by: str | None
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
        name, made_by, count = metadata["name"], metadata["extractor"], int(metadata["count"])
    else:
        tensors, made_by, count = _read_npz(path)
        name, made_by = path.stem, made_by or assume
    if made_by is None:
        raise unknown_network(path, extractor)
    if made_by != extractor:
        raise ValueError(f"{path}: statistics of the network {made_by} cannot be compared with features of {extractor}")
    spatial = _statistics(path, tensors, "_s", count) if "mu_s" in tensors else None
    return Reference(name=name, extractor=extractor, pool=_statistics(path, tensors, "", count), spatial=spatial)


def unknown_network(path: Path, extractor: str) -> ValueError:
    """The error for statistics of which it is not known whether `extractor` made them."""
    published = ", as for those of the ADM suite" if extractor.startswith(INCEPTION_NAME) else ""
    return ValueError(
        f"{path}: an .npz does not say which network its statistics come from; "
        f"if it was {extractor}{published}, set assume_extractor={extractor}"
    )


def _statistics(path: Path, tensors: dict[str, Tensor], suffix: str, count: int) -> Statistics:
    try:
        mean, covariance = tensors["mu" + suffix].double(), tensors["sigma" + suffix].double()
    except KeyError as error:
        raise ValueError(f"{path}: holds {sorted(tensors)}, but not {error}") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"mu{suffix} is {tuple(mean.shape)} and sigma{suffix} {tuple(covariance.shape)}"
        raise ValueError(f"{path}: {shapes}, expected (D,) and (D, D)")
    return Statistics(mean, covariance, count)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, the file is no dict
            text = (file.metadata() or {}).get("imgtok")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from error
    if text is None:
        raise ValueError(f"{path}: not a reference made by imgtok (no metadata)")
    return tensors, json.loads(text)


def _read_npz(path: Path) -> tuple[dict[str, Tensor], str | None, int]:
    """The statistics; which network made them, None where it is not said; of how many images, 0 where not."""
    with open_npz(path) as arrays:
        found = {key: torch.from_numpy(read_array(arrays, key, path)) for key in STATISTICS if key in arrays}
        count = int(read_array(arrays, "count", path)) if "count" in arrays else 0
        return found, _maker(arrays, path), count


def _maker(arrays: np.lib.npyio.NpzFile, path: Path) -> str | None:
    return str(read_array(arrays, "extractor", path)) if "extractor" in arrays else None
