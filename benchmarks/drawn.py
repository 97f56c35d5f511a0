"""Our models with the peer's weights: drawn under their published names, put where ours have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import recipe
import torch
from torch import Tensor

from imgtok.published.names import Place


@torch.no_grad()
def fill(
    state: Mapping[str, Tensor],
    known: Mapping[str, Place],
    shapes: Mapping[str, Sequence[int]],
    seed: int,
    as_ours: Callable[[str, Tensor], Tensor],
) -> None:
    """Writes the parameters of the peer's `shapes` to their places `known` in our `state`.

    One at a time, so that the weights are in memory once. Raises ValueError where one side has other parameters.
    """
    if known.keys() != shapes.keys():
        raise ValueError(f"one side alone has the parameters {sorted(known.keys() ^ shapes.keys())}")
    for name, shape in shapes.items():
        known[name].view(state).copy_(as_ours(name, torch.from_numpy(recipe.weight(name, tuple(shape), seed))))
