"""The two transformers of a KARL (`karl.py`): an encoder from the grid's cells to slots, a decoder from tokens to
cells.

Shapes: B batch, N grid cells, T slots, K tokens, W and D widths of encoder and decoder, P rows of a table of positions,
n numbers of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.layers.attention import Attention, Look
from imgtok.layers.recompute import call_block, keep_source
from imgtok.tokenizers.karl_config import KARLConfig, TransformerConfig


class Block(nn.Module):
    """Attention and a feed-forward layer with GELU, each after a norm and beside a skip."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.num_heads, bias=True)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width)
        self.mlp_out = nn.Linear(4 * config.width, config.width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, needed: slice | None = None, keep_less: bool = False
    ) -> Tensor:
        """X (B, L, D); with `needed` only what comes of these positions. `mask` is as attention takes it. With
        `keep_less` norms and GELUs are computed again in the backward pass.
        """

        def attend(normed: Tensor) -> Tensor:
            if needed is None:
                return self.attention(normed, mask=mask)
            return self.attention(normed, looks=[Look(needed, slice(None), mask)])

        attended = keep_source(self.attention_norm, x, attend, wanted=keep_less)
        x = (x if needed is None else x[:, needed]) + attended
        hidden = keep_source(self.mlp_norm, x, self.mlp_in, wanted=keep_less)
        return x + keep_source(F.gelu, hidden, self.mlp_out, wanted=keep_less)


def run_blocks(blocks: nn.ModuleList, x: Tensor, needed: slice, mask: Tensor | None, recompute: bool) -> Tensor:
    """X (B, L, D) through all blocks; of the last one only the positions that are `needed`."""
    for index, block in enumerate(blocks):
        part = needed if index == len(blocks) - 1 else None
        x = call_block(block, x, mask, part, not recompute, recompute=recompute)
    return x


def read_table(table: Tensor, side: int) -> Tensor:
    """A learned table (D, P, P), resized to `side` rows and columns by taking the nearest: (side * side, D)."""
    cells = torch.arange(side, device=table.device) * table.shape[-1] // side
    return table.index_select(1, cells).index_select(2, cells).flatten(1).T


class Encoder(nn.Module):
    """Cells of the grid and slots -> what each slot says, and whether it is needed."""

    def __init__(self, config: KARLConfig) -> None:
        super().__init__()
        width, base = config.encoder.width, config.required_base
        scale = width**-0.5
        self.grid = config.grid
        self.patch_proj = nn.Conv2d(3, width - base.latent_channels, base.factor, stride=base.factor)
        self.positions = nn.Parameter(scale * torch.randn(width, config.position_grid, config.position_grid))
        conditions = torch.tensor(config.tolerances)[:, None].repeat(1, width)
        if config.initialisation == "normal_conditions":
            conditions = scale * torch.randn(conditions.shape)
        self.conditions = nn.Parameter(conditions)
        self.slots = nn.Parameter(scale * torch.randn(config.max_tokens, width))
        self.input_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(config.encoder) for _ in range(config.encoder.depth))
        self.halting_norm = nn.LayerNorm(width)
        self.halting_hidden = nn.Linear(width, config.halting_width)
        self.halting_out = nn.Linear(config.halting_width, 1)
        self.readout_norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, config.token_width)
        self.recompute = False

    def cells(self, pixels: Tensor, features: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] beside what the autoencoder's encoder gives (B, C, h, w), as (B, N, W)."""
        patches = self.patch_proj(pixels.to(self.patch_proj.weight.dtype))
        return torch.cat([patches, features.to(patches.dtype)], dim=1).flatten(2).transpose(1, 2)

    def forward(self, cells: Tensor, bins: Tensor, count: int) -> Tensor:
        """The first `count` slots (B, T, W) under the conditions `bins` (B,), numbers of tolerances."""
        batch, start = len(cells), 1 + cells.shape[1]
        condition = self.conditions[bins][:, None].to(cells.dtype)
        placed = cells + read_table(self.positions, self.grid).to(cells.dtype)
        slots = self.slots[:count].to(cells.dtype).expand(batch, -1, -1)
        x = self.input_norm(torch.cat([condition, placed, slots], dim=1))
        return run_blocks(self.blocks, x, slice(start, start + count), None, self.recompute)

    def halting(self, hidden: Tensor) -> Tensor:
        """Logits (B, T), float32, of a slot's not being needed."""
        logits: Tensor = self.halting_out(torch.tanh(self.halting_hidden(self.halting_norm(hidden))))
        return logits.squeeze(-1).float()

    def vectors(self, hidden: Tensor) -> Tensor:
        """The short vectors (B, T, n)."""
        vectors: Tensor = self.readout(self.readout_norm(hidden))
        return vectors


class Decoder(nn.Module):
    """Tokens -> what the autoencoder's decoder is to be given in each cell of its grid."""

    def __init__(self, config: KARLConfig) -> None:
        super().__init__()
        width, scale = config.decoder.width, config.encoder.width**-0.5  # the encoder's, as published
        self.grid = config.grid
        self.code_proj = nn.Linear(config.token_width, width)
        self.slot_positions = nn.Parameter(scale * torch.randn(config.max_tokens, width))
        self.query = nn.Parameter(scale * torch.randn(width))
        self.positions = nn.Parameter(scale * torch.randn(width, config.position_grid, config.position_grid))
        self.input_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(config.decoder) for _ in range(config.decoder.depth))
        self.output_norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.readout = nn.Linear(2 * width, config.outputs)
        self.recompute = False

    def sequence(self, codes: Tensor, slots: Tensor | None) -> Tensor:
        """[a query for each cell | tokens], (B, N + K, D); `slots` (B, K) are those of the codes, None for 0, 1, ..."""
        places = self.slot_positions[: codes.shape[1]] if slots is None else F.embedding(slots, self.slot_positions)
        tokens = self.code_proj(codes.to(self.code_proj.weight.dtype))
        tokens = tokens + places.to(tokens.dtype)
        queries = (self.query + read_table(self.positions, self.grid)).to(tokens.dtype)
        return torch.cat([queries.expand(len(codes), -1, -1), tokens], dim=1)

    def forward(self, codes: Tensor, slots: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """Codes (B, K, n) -> (B, N, outputs). Nothing looks at a token where `kept` (B, K) is False: that is what the
        published mask comes to, as of dropped tokens nothing is read.
        """
        x = self.sequence(codes, slots)
        mask = None if kept is None else F.pad(kept, (x.shape[1] - kept.shape[1], 0), value=True)[:, None, None]
        cells = slice(0, x.shape[1] - codes.shape[1])
        return self.output(run_blocks(self.blocks, self.input_norm(x), cells, mask, self.recompute))

    def plainly(self, codes: Tensor, kept: Tensor) -> Tensor:
        """The published algorithm: a dropped slot and any other position do not see each other."""
        x = self.input_norm(self.sequence(codes, None))
        num_cells = x.shape[1] - codes.shape[1]
        dropped = F.pad(~kept, (num_cells, 0))
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        mask = ~(dropped[:, :, None] | dropped[:, None, :]) | itself
        for block in self.blocks:
            x = block(x, mask[:, None])
        return self.output(x[:, :num_cells])

    def output(self, x: Tensor) -> Tensor:
        out: Tensor = self.readout(torch.tanh(self.hidden(self.output_norm(x))))
        return out
