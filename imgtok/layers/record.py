"""Maps of attention, for those who ask: what each position looked at, kept in the autograd graph.

A record is handed to the network with what it looks at (`Memory.recorded`), and filled while the network is called. It
changes nothing of what the network computes, and where there is none, no map is computed.

Shapes: R rows, H heads, L queries, T columns looked at, E head width.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor


class AttentionRecord:
    """The maps (R, H, L, T) of every call, float32, by layer: each row of a map is a distribution over the columns.

    They stay in memory, with their graph, until `clear` or the end of the record. With activations that are computed
    again in the backward pass, a map is recorded a second time there.
    """

    def __init__(self, layers: Collection[int] | None = None) -> None:
        """`layers` are the numbers of those whose maps are wanted; None is all."""
        self.layers = layers
        self.maps: dict[int, list[Tensor]] = {}

    def wants(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def add(self, layer: int, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """Computes and keeps the map of one call of a layer; see `attention_map`."""
        self.maps.setdefault(layer, []).append(attention_map(q, k, mask))

    def clear(self) -> None:
        """Forget all maps."""
        self.maps.clear()


def attention_map(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(E)) (R, H, L, T) in float32, of queries (R, H, L, E) and keys (R, H, T, E); `mask` is
    boolean (True = may look) or additive, and every query has to see something.
    """
    logits = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1)
