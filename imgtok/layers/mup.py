"""muP (arXiv 2203.03466) as a note on parameters: which matrices read something as wide as the network.

Adam moves every entry of a matrix by about its learning rate. The sum over a wider input then moves further,
unless the rate falls with the width; vectors, biases and matrices that read inputs of a fixed size need no
such care. So the module that makes a matrix notes its input's width here, and `imgtok.train.optim` divides by it.
Nothing in a forward pass, and nothing in a saved file, knows of it.
"""

from __future__ import annotations

from torch import nn

_TAG = "mup_width"


def note_width(width: int, *modules: nn.Module) -> None:
    """Note on the weights of all Linear layers in `modules` that what they read is (a multiple of) `width` wide."""
    for module in modules:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                setattr(layer.weight, _TAG, width)


def noted_width(parameter: nn.Parameter) -> int | None:
    """What was noted on a parameter; None for one whose learning rate does not depend on the width."""
    width: int | None = getattr(parameter, _TAG, None)
    return width
