"""Multi-head attention through `scaled_dot_product_attention`, once for every model of the suite.

What varies between published models is passed in: query/key normalisation (FlexTok), the softmax
scale (8 / head width under muP), rotary positions (LlamaGen), a mask, and a key/value cache.

Shapes: B batch, L sequence, D width, H heads, E head width, S cached plus new keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from imgtok.layers.cache import LayerCache, MemoryLayer
from imgtok.layers.norms import layer_norm
from imgtok.layers.record import LayerRecord

Rotation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Look:
    """Positions `queries` of a sequence look at its positions `keys`, and at nothing else."""

    queries: slice
    keys: slice
    mask: Tensor | None = None
    """Boolean (True = may look) or additive; broadcasts to (B, H, queries, keys)."""


class Attention(nn.Module):
    """Self-attention with one fused projection whose rows are q, k, v in that order."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qk_norm: bool = False,
        scale: float | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_norm = qk_norm
        self.scale = scale
        self.weight_dropout = weight_dropout
        self.qkv_proj = nn.Linear(width, 3 * width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BLD: Tensor,
        *,
        looks: Sequence[Look] = (),
        mask: Tensor | None = None,
        causal: bool = False,
        rotate: Rotation | None = None,
        cache: LayerCache | None = None,
        record: LayerRecord | None = None,
    ) -> Tensor:
        """`mask` is boolean (True = may look) or additive, and broadcasts to (B, H, L, S).

        With `looks` in place of a mask, the output has their queries' positions, one look after the other: parts that
        do not see each other cost nothing, and what no look asks for is not computed. With a `cache`, the new keys and
        values join those of earlier calls; its window says what is seen of them, or else looks, which count from the
        cache's first key. A `record` keeps the map of what a mask says.
        """
        qkv = self.qkv_proj(x_BLD).unflatten(-1, (3, self.num_heads, -1))  # einops takes longer
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, L, E)
        qk, v = qkv[:2], qkv[2]
        qk = self.normed(qk)
        if rotate is not None:
            qk = rotate(qk)
        q, k = qk
        if cache is not None:
            assert mask is None, "what is seen of a cache is for its window to say"
            k, v = cache.append(k, v)
            mask, causal = cache.window.mask, cache.window.causal
        if record is not None:
            assert mask is not None, "a map is recorded where a mask says what is seen"
            record.add(q, k, mask, self.scale)
        if looks:
            parts = [self._attend(q[:, :, a.queries], k[:, :, a.keys], v[:, :, a.keys], a.mask) for a in looks]
            out_BHLE = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        else:
            out_BHLE = self._attend(q, k, v, mask, causal)
        return self.dropout(self.out_proj(out_BHLE.transpose(1, 2).flatten(2)))

    def normed(self, qk: Tensor) -> Tensor:
        """Queries and keys (2, B, H, L, E) as they are compared."""
        return layer_norm(qk) if self.qk_norm else qk

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        dropped = self.weight_dropout if self.training else 0.0
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=as_dtype_of(q, mask), dropout_p=dropped, is_causal=causal, scale=self.scale
        )


class NormedAttention(Attention):
    """Self-attention whose queries and keys go through norms of their own, with scale and shift (a ViT's qk-norm)."""

    def __init__(self, width: int, num_heads: int, *, eps: float, **options: Any) -> None:
        super().__init__(width, num_heads, **options)
        self.q_norm = nn.LayerNorm(width // num_heads, eps=eps)
        self.k_norm = nn.LayerNorm(width // num_heads, eps=eps)

    def normed(self, qk: Tensor) -> Tensor:
        weight, bias = (
            torch.stack([q, k])[:, None, None, None].to(qk.dtype)
            for q, k in ((self.q_norm.weight, self.k_norm.weight), (self.q_norm.bias, self.k_norm.bias))
        )
        return torch.addcmul(bias, layer_norm(qk, self.q_norm.eps), weight)


class CrossAttention(nn.Module):
    """Attention from one sequence to another; the fused projection of the other's has the rows of k, then of v.

    `keys_values` is a step of its own, so that a sampler takes it once and not once a token.
    """

    def __init__(
        self, width: int, num_heads: int, *, qk_norm: bool = False, dropout: float = 0.0, weight_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_norm = qk_norm
        self.weight_dropout = weight_dropout
        self.q_proj = nn.Linear(width, width, bias=False)
        self.kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, context_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, T, E) of what is looked at."""
        k, v = rearrange(self.kv_proj(context_BTD), "b t (two h e) -> two b h t e", two=2, h=self.num_heads)
        return (layer_norm(k) if self.qk_norm else k), v

    def forward(self, x_BLD: Tensor, memory: MemoryLayer) -> Tensor:
        """X (B, L, D) looks at a memory of B rows."""
        q = rearrange(self.q_proj(x_BLD), "b l (h e) -> b h l e", h=self.num_heads)
        if self.qk_norm:
            q = layer_norm(q)
        if memory.record is not None:
            memory.record.add(q, memory.keys, memory.mask)
        dropped = self.weight_dropout if self.training else 0.0
        mask = as_dtype_of(q, memory.mask)
        out_BHLE = F.scaled_dot_product_attention(q, memory.keys, memory.values, attn_mask=mask, dropout_p=dropped)
        return self.dropout(self.out_proj(rearrange(out_BHLE, "b h l e -> b l (h e)")))


def as_dtype_of(q: Tensor, mask: Tensor | None) -> Tensor | None:
    """A mask as attention wants it: boolean, or additive in the queries' dtype."""
    return mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
