"""Feed-forward layers: the gated one that FlexTok and the GPTs share, down(silu(gate x) * up x), and that of a ViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """Gated SiLU. One fused projection holds the gate's rows first, then the up projection's."""

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        in_place = not torch.is_grad_enabled()  # the widest tensor of a model, and nobody needs it as it was
        gate = F.silu(gate, inplace=in_place)
        gated = gate.mul_(up) if in_place else gate * up
        return self.dropout(self.down_proj(gated))


class MLP(nn.Module):
    """The plain one of a ViT: two projections with bias around an exact GELU (MAR, TokenBridge)."""

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.dropout(F.gelu(self.up_proj(x)))))
