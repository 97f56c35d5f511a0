"""A recorded case: what went in, regenerated from names by `recipe`, and what the published code gave.

`Case.errors` measures our outputs in units of the tolerance: 1 is the most that passes, and a wrong
index is infinite. Tests assert `<= 1`; the checks of pitfalls assert `> 1` on deliberately wrong code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import recipe
import torch
from torch import Tensor

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    about: dict[str, Any]
    recorded: dict[str, Tensor]

    @classmethod
    def load(cls, name: str) -> Case:
        """`name` is such as "flextok/encode"."""
        about = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        with np.load(FOLDER / f"{name}.npz") as arrays:
            return cls(about, {key: torch.from_numpy(arrays[key]) for key in arrays.files})

    @property
    def runs(self) -> list[dict[str, Any]]:
        return self.about["runs"]

    def named(self, name: str) -> dict[str, Any]:
        """The run of that name, of cases that name their runs."""
        return next(run for run in self.runs if run["name"] == name)

    def run(self, out: str) -> dict[str, Any]:
        return next(run for run in self.runs if run["out"] == out)

    def input(self, name: str, seed: int | None = None) -> Tensor:
        """The named input; `seed` replaces the one in the case."""
        entries = self.about["inputs"]
        entry = entries[name] if isinstance(entries, dict) else next(e for e in entries if e["name"] == name)
        return draw(entry, entry.get("seed", 0) if seed is None else seed)

    def weights(self) -> dict[str, Tensor]:
        """The parameters under their published names."""
        places = {**self.about.get("config", {}), **self.about}
        where = {name: places[name] for name in ("weight_seed", "weights_seed") if name in places}
        seed = next(iter(where.values())) if where else places["weights"]["seed"]
        return {key: torch.from_numpy(value) for key, value in recipe.weights(self.about["shapes"], seed).items()}

    def errors(self, ours: Mapping[str, Tensor], tolerance: float = 1e-4) -> dict[str, float]:
        """Name -> max|ours - recorded| / (tolerance max(1, max|recorded|)), for every output in `ours`."""
        return {name: self._error(name, value.detach(), tolerance) for name, value in ours.items()}

    def _error(self, name: str, ours: Tensor, tolerance: float) -> float:
        reference = self.recorded[name]
        assert ours.shape == reference.shape, f"{name}: {tuple(ours.shape)}, recorded {tuple(reference.shape)}"
        if not reference.is_floating_point():
            return 0.0 if torch.equal(ours.to(reference.dtype), reference) else float("inf")
        difference = (ours.double() - reference.double()).abs().max().item()
        largest = reference.double().abs().max().item()
        if "grad" in name.split(".")[1:2] or "grad_norms" in name:  # as the `train` cases say
            return difference / (1e-3 * largest)
        return difference / (tolerance * max(1.0, largest)) if difference else 0.0


def draw(entry: Mapping[str, Any], seed: int) -> Tensor:
    """One input by the kinds that the cases name."""
    if entry.get("kind") == "literal":
        return torch.tensor(entry["value"])
    shape, name = tuple(entry["shape"]), entry.get("recipe_name", entry["name"])
    if "integers" in (entry.get("kind"), entry.get("function")):
        return torch.from_numpy(recipe.integers(name, shape, entry["high"], seed))
    values = getattr(recipe, entry["function"] if "function" in entry else entry["kind"])(name, shape, seed)
    if entry.get("then") == "argsort":
        return torch.from_numpy(np.argsort(values, axis=-1, kind="stable"))
    return torch.from_numpy(values * np.float32(entry.get("scale", 1.0)) + np.float32(entry.get("shift", 0.0)))
