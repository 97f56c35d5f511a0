"""Which ids a quantizer has."""

from __future__ import annotations

import torch
from torch import Tensor


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError for ids outside [0, vocab_size)."""
    if torch.compiler.is_exporting():
        return  # there are no values to look at
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(f"token ids must lie in [0, {vocab_size}); got {int(ids.min())} to {int(ids.max())}")
