"""The fast path of TokenBridge's sampling (`generators/tokenbridge.py`): the same numbers, to rounding, with less work.

Both guidance streams go through the networks in one call; while nothing of any image is there, the unguided stream is
one row for all of them; the last block of the decoder computes only the positions that are drawn; the head keeps keys
and values (`DimensionHead.draw`); and which positions are looked up or written follows from the order and the schedule,
which the host knows, so that nothing is read from the device.

Shapes: B images, C channels, L positions, K positions that are drawn at once, P slots, R rows, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from imgtok.generators.conditioning import Control, Reading, controlled
from imgtok.generators.dimension_head import Choice
from imgtok.generators.sampling import guide
from imgtok.layers.attention import Attention
from imgtok.layers.positions import at

if TYPE_CHECKING:
    from imgtok.generators.tokenbridge import Block, Reveal, RevealSampling, Start, TokenBridge


class Drawing:
    """The positions of one call of `generate` as they are revealed."""

    def __init__(
        self, model: TokenBridge, how: RevealSampling, reading: Reading, start: Start, control: Control | None = None
    ) -> None:
        """`reading` is that of the images or, where anything is guided, of both streams."""
        self.model = model
        self.how = how
        self.reading = reading
        self.control = control
        self.streams = 1 if how.guidance == 1 else 2
        self.values, self.order, self.uniforms, self.left = start.values, start.order, start.uniforms, start.hidden

    @torch.no_grad()
    def reveal(self, step: int, reveal: Reveal) -> None:
        """One iteration: draw `reveal.count` positions of every image."""
        self.reading = controlled(self.control, step, self.reading)
        confident = self.how.order == "confidence"
        places = self.order[:, 0 if confident else self.left - reveal.count : self.left]  # (B, K)
        visible = self.order[:, self.left :]
        found = features(self.model, self.values, visible, places, *self.streams_now())
        if self.streams == 2:
            conditional, unconditional = found.chunk(2)
            found = guide(conditional, unconditional, reveal.guidance)
        uniforms = at(self.uniforms, places.to(self.uniforms.device)).flatten(0, 1)
        choice = Choice(self.how.temperature, uniforms, scored=confident)
        ids = self.model.head.draw(found.flatten(0, 1), choice).view(*places.shape, -1)
        if confident:
            best = choice.score.view(places.shape).argsort(dim=1, stable=True)
            self.order = torch.cat([places.gather(1, best), visible], dim=1)
            best = best[:, self.left - reveal.count :]
            places, ids = places.gather(1, best), at(ids, best)
        drawn = self.model.quantizer.decode(ids[..., self.model.inverse], channel_dim=-1)
        self.values = self.values.scatter(1, places[..., None].expand_as(drawn), drawn)
        self.left -= reveal.count

    def streams_now(self) -> tuple[Reading, int]:
        """The reading of this iteration, and how many streams it is for."""
        if self.control is not None or self.left < self.model.length:
            return self.reading, self.streams
        return self.reading.rows(slice(0, len(self.order) + self.streams - 1)), self.streams


def features(
    model: TokenBridge, values: Tensor, visible: Tensor, places: Tensor, reading: Reading, streams: int
) -> Tensor:
    """`TokenBridge.features` (R, K, D) of places (B, K), for each of the streams: values (B, L, C), visible (B, V).

    Where nothing is visible, the reading may have one row in all for the second stream, which says the same everywhere.
    """
    seen, visible, places = (
        part.repeat(streams, *[1] * (part.ndim - 1)) for part in (at(values, visible), visible, places)
    )
    rows = len(reading)
    h = model.decoder_input(model.encode(seen[:rows], visible[:rows], reading), visible[:rows])
    *blocks, last = model.decoder_blocks
    for block in blocks:
        h = block(h)
    if rows < len(places):
        h = torch.cat([h, h[-1:].expand(len(places) - rows, -1, -1)])
    return model.feature(wanted_only(cast("Block", last), h, places + model.num_slots), places)


def wanted_only(block: Block, x: Tensor, wanted: Tensor) -> Tensor:
    """What the block says (R, K, D) of the wanted places (R, K) of x (R, L, D): only these look, at all of them."""
    normed = block.attention_norm(x)
    x = at(x, wanted) + attend(block.attention, at(normed, wanted), normed)
    return x + block.mlp(block.mlp_norm(x))


def attend(attention: Attention, some: Tensor, all_of_them: Tensor) -> Tensor:
    """Self-attention of which only `some` (R, K, D) of all positions (R, L, D) are asked for."""
    weight, bias = attention.qkv_proj.weight, attention.qkv_proj.bias
    width, heads = some.shape[-1], attention.num_heads
    q = F.linear(some, weight[:width], bias[:width]).unflatten(-1, (heads, -1)).transpose(1, 2)
    kv = F.linear(all_of_them, weight[width:], bias[width:]).unflatten(-1, (2, heads, -1))
    k, v = kv.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    projected: Tensor = attention.out_proj(out.transpose(1, 2).flatten(2))
    return projected
