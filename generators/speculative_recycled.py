"""Drafts by what followed a token before: Token Recycling (arXiv 2408.08696), a chain of one successor for each token.

Its tree of several successors needs tree attention and a rule for several drafts of one position; a chain needs neither
and is judged as any other draft. The paper draws by arg-max, where a draft needs no law; here a successor is certain
given what came before, so that its law is one-hot, and what is drawn has exactly the law of the network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imgtok.generators.speculative import Jacobi, Window


class Recycling(Jacobi):
    """Drafts of the call before, as `Jacobi` has them; what has not been in a window yet is the most likely successor
    of the token before it, as the network last said of that token in this image. At first a token follows itself.
    """

    def begin(self, first: Tensor, width: int) -> None:
        super().begin(first, width)
        images, ids = first.shape
        # V times the time at which it was seen, plus the successor: the latest is the largest, in any order of writes
        self.seen = torch.arange(ids, device=first.device).repeat(images, 1)
        self.time = torch.ones((), dtype=torch.long, device=first.device)

    def draw(self, tokens: Tensor, targets: Tensor, new: Tensor, uniforms: Tensor) -> Tensor:
        ids = self.seen.shape[1]
        for slot in range(targets.shape[1]):
            target = targets[:, slot, None]
            successor = self.seen.gather(1, tokens.gather(1, target - 1)) % ids
            tokens.scatter_(1, target, successor.where(new[:, slot, None], tokens.gather(1, target)))
        drawn = tokens.gather(1, targets)
        return torch.zeros(*drawn.shape, ids, device=drawn.device).scatter(2, drawn[..., None], 1.0)

    def learn(self, laws: Tensor, window: Window, ids: Tensor) -> None:
        super().learn(laws, window, ids)
        slots = torch.arange(ids.shape[1], device=ids.device)
        stamped = (self.time + slots) * self.seen.shape[1] + laws.argmax(dim=-1)
        self.seen.scatter_reduce_(1, ids, stamped, "amax")
        self.time.add_(ids.shape[1])
