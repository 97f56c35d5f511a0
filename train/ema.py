"""Averaged weights: what previews and the finished model use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from imgtok.weights import read_weights, write_tensors


class EMA:
    """Running average of a model's trainable parameters and saved buffers, without frozen parameters, the parameters in
    `without`, and the buffers of modules whose own parameters are all in `without`.

    The live tensors are remembered, so buffers have to be updated in place. Buffers that are not floating
    point (counters) are copied. A decay of 0 keeps no average: then the live weights stand for it.
    """

    def __init__(
        self, model: nn.Module, decay: float, *, warmup: bool = True, without: Iterable[nn.Parameter] = ()
    ) -> None:
        """With `warmup` the decay after step s (from 0) is min(decay, (1 + s) / (10 + s)): a short run does not keep
        its first weights in the average.
        """
        self.decay, self.warmup = decay, warmup
        left_out = {id(parameter) for parameter in without}
        saved = model.state_dict().keys()
        self.live: dict[str, Tensor] = {}
        if decay > 0:
            live = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in left_out}
            alone = [name for name, part in model.named_modules() if _is_left_out(part, left_out)]
            buffers = {name: b for name, b in model.named_buffers() if name in saved}
            self.live = live | {name: b for name, b in buffers.items() if name.rpartition(".")[0] not in alone}
        self.average = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        self._averaged = [name for name, tensor in self.live.items() if tensor.is_floating_point()]
        self._copied = [name for name in self.live if name not in set(self._averaged)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after optimizer step `step` (from 0)."""
        if not self.live:
            return
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        averages = [self.average[name] for name in self._averaged]
        torch._foreach_lerp_(averages, [self.live[name] for name in self._averaged], 1 - decay)
        for name in self._copied:
            self.average[name].copy_(self.live[name])

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the model holds the averaged weights; no tensor is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, tensor in self.live.items():
            tensor.data, self.average[name].data = self.average[name].data, tensor.data

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again at the weights as they are."""
        for name, tensor in self.live.items():
            self.average[name].copy_(tensor)

    def save(self, path: Path) -> None:
        """Write the averages as safetensors."""
        write_tensors({name: tensor.contiguous() for name, tensor in self.average.items()}, path, {})

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Read what `save` wrote; raises ValueError if the names differ from this model's."""
        stored = read_weights(path)
        if stored.keys() != self.average.keys():
            different = sorted(stored.keys() ^ self.average.keys())
            raise ValueError(f"{path}: averaged weights of another model; names that differ: {different[:5]}")
        for name, tensor in self.average.items():
            tensor.copy_(stored[name])


def _is_left_out(part: nn.Module, left_out: set[int]) -> bool:
    """Whether a module has parameters of its own and all of them are left out."""
    own = [id(parameter) for parameter in part.parameters(recurse=False)]
    return bool(own) and left_out.issuperset(own)
