"""Maps of attention, for those who ask: what each position looked at, kept in the autograd graph.

A record is handed to the network with what it reads (`Reading.recorded`, `Memory.recorded`), and filled while the
network is called. It changes nothing of what the network computes, and where there is none, no map is computed.

Shapes: R rows, H heads, L queries, S columns looked at, E head width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor


class AttentionRecord:
    """The maps (R, H, L, T) of every call, float32, by layer, over the T columns of the captions.

    Of cross-attention, each row of a map is a distribution. Of captions that stand before the tokens, it is the share
    that their slots have in a distribution over everything that the position sees, and the L positions of a call count
    those slots. Maps stay in memory, with their graph, until `clear` or the end of the record. With activations that
    are computed again in the backward pass, a map is recorded a second time there.
    """

    def __init__(self, layers: Collection[int] | None = None) -> None:
        """`layers` are the numbers of those whose maps are wanted; None is all."""
        self.layers = layers
        self.maps: dict[int, list[Tensor]] = {}

    def of_layer(self, layer: int, columns: int | None = None) -> LayerRecord | None:
        """What keeps the maps of a layer, or the first `columns` of them; None for a layer that is not wanted."""
        return LayerRecord(self, layer, columns) if self.layers is None or layer in self.layers else None

    def clear(self) -> None:
        """Forget all maps."""
        self.maps.clear()


@dataclass(frozen=True)
class LayerRecord:
    """The part of a record that one layer fills."""

    record: AttentionRecord
    layer: int
    columns: int | None = None

    def add(self, q: Tensor, k: Tensor, mask: Tensor | None, scale: float | None = None) -> None:
        """Computes and keeps the map of one call; see `attention_map`."""
        found = attention_map(q, k, mask, scale)
        self.record.maps.setdefault(self.layer, []).append(found[..., : self.columns])


def attention_map(q: Tensor, k: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) (R, H, L, S) in float32, of queries (R, H, L, E) and keys (R, H, S, E).

    `scale` is E^-1/2 unless given; `mask` is boolean (True = may look) or additive. Every query has to see something.
    """
    logits = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(dim=-1)
