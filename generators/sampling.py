"""From logits to token ids: the usual filters, and draws by inverse CDF from explicit uniforms.

One uniform per (sample, step) decides a token, so a sample depends on its own seed and index and
not on who shares its batch, and two samplers fed the same uniforms can be compared token by token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Divides (B, V) logits by `temperature`, then sets all but the top k, then the nucleus p, to -inf.

    top_k = 0 and top_p = 1 keep everything. Ties with the k-th logit are kept. The most likely token always stays.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        # A token is dropped if those before it already hold p: the one that crosses p is kept.
        dropped = probabilities.cumsum(dim=-1) - probabilities > top_p
        dropped[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Ids (B,) from (B, V) logits and (B,) uniforms in [0, 1), by inverse CDF in float64.

    A token of probability zero is never drawn.
    """
    device = logits.device
    if device.type == "mps":  # which has no float64
        logits = logits.cpu()
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    thresholds = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)
    return found.clamp(max=logits.shape[-1] - 1).to(device)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Guided logits: unconditional + scale * (conditional - unconditional)."""
    return unconditional + scale * (conditional - unconditional)
