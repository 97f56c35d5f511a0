"""Token ids as numbers with digits: what ids share because of them, and ids that are read and drawn digit by digit.

**Shared digits** (`DigitRows`): an FSQ id is the number of its levels, and ids that differ in one level mean nearly the
same. Embeddings and logits are sums of one vector a digit, beside a free row for each id.

**A head for digits** (`DigitsConfig`, `Digits`): ELM (arXiv 2410.16257) splits the ids of a large vocabulary into a few
sub-codes, two at best, so that no table has a row for each id. It draws them independently of one another
(`IndependentHead`). A head with a size of its own draws each given those before it, by the dimension-wise head of
TokenBridge (`dimension_head.py`) on the GPT's state:

    p(id | ...) = p(digit 1 | ...) p(digit 2 | digit 1, ...) ... p(digit C | digits 1 to C - 1, ...)

Independent digits have this law without the conditions on digits, which cannot say that two values only come together.
Guidance, temperature, top-k and top-p are those of `sampling.law`, for one digit after the other, as if digits were
tokens. So guidance acts on the logits of each digit, from the unconditional to the conditional ones, both given the
digits drawn so far. Without guidance and filters an id comes with exactly the probability above. A guided or filtered
law makes the probabilities of each digit add up to one, where that of a softmax over all ids would do so for the ids:
that would be another law of the id, but one that takes the logits of all ids to draw from. Of independent digits the
guided law is the same either way, and so is that of a temperature.

Shapes: V ids, C digits of an id, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.config import PositiveInt, check
from imgtok.generators.dimension_head import LOWEST, Choose, StackConfig


class DigitRows(nn.Module):
    """Rows (V, D) for ids that are mixed-radix numbers, the least significant digit first, as FSQ counts: each is the
    sum of one learned vector a digit.
    """

    digits: Tensor

    def __init__(self, levels: tuple[int, ...], width: int) -> None:
        super().__init__()
        starts = torch.cumsum(torch.tensor((0, *levels[:-1])), dim=0)
        most_significant_first = torch.cartesian_prod(*(torch.arange(count) for count in reversed(levels)))
        digits = most_significant_first.view(-1, len(levels)).flip(1)
        self.register_buffer("digits", digits + starts, persistent=False)  # (V, n) rows of the table
        self.table = nn.Parameter(torch.empty(sum(levels), width))

    def forward(self, ids: Tensor | None = None) -> Tensor:
        """The rows of `ids` (..., D), or of all ids in order (V, D)."""
        digits = self.digits if ids is None else self.digits[ids]
        return F.embedding_bag(digits.flatten(0, -2), self.table, mode="sum").unflatten(0, digits.shape[:-1])


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """A head that draws the digits of an id: one after the other by a small transformer, whose size is given, or
    independently of one another.
    """

    digits: tuple[PositiveInt, ...]
    """How many values each digit has, the most significant digit first; their product is vocab_size."""
    width: PositiveInt | None = None
    """Channels of the transformer; a multiple of num_heads. null, as depth and num_heads then, for none: digits are
    drawn independently (ELM)."""
    depth: PositiveInt | None = None
    """Blocks of the transformer."""
    num_heads: PositiveInt | None = None
    """Attention heads of the transformer."""

    def __post_init__(self) -> None:
        check(self)
        if len(self.digits) < 2 or min(self.digits) < 2:
            raise ValueError(f"digits: {list(self.digits)} must be two or more, each of at least 2 values")
        size = {name: getattr(self, name) for name in ("width", "depth", "num_heads")}
        missing = [name for name, number in size.items() if number is None]
        if 0 < len(missing) < len(size):
            raise ValueError(
                f"{missing[0]}: is missing beside {', '.join(f'{name} = {n}' for name, n in size.items() if n)}; give "
                "all three for a transformer that draws each digit given those before it, none for independent digits"
            )
        _ = self.stack  # whose check it is that heads fit into the width

    @property
    def stack(self) -> StackConfig | None:
        """The size of the transformer; None where digits are independent."""
        if self.width is None or self.depth is None or self.num_heads is None:
            return None
        return StackConfig(width=self.width, depth=self.depth, num_heads=self.num_heads)

    def check_ids(self, vocab_size: int) -> None:
        """Raises ValueError for digits that make another number of ids."""
        made = math.prod(self.digits)
        if made != vocab_size:
            low = max(d for d in range(1, math.isqrt(vocab_size) + 1) if vocab_size % d == 0)
            remedy = f"{[vocab_size // low, low]} would make those" if low > 1 else "which is prime: leave head out"
            raise ValueError(
                f"head.digits: {list(self.digits)} make {made} ids, but vocab_size is {vocab_size}, {remedy}"
            )


class Digits(nn.Module):
    """Ids as numbers of several digits, the most significant first, and embeddings that are the sum of one learned
    vector a digit (what ELM's projection of their concatenation amounts to).
    """

    places: Tensor
    counts: Tensor
    starts: Tensor

    def __init__(self, counts: tuple[int, ...], width: int) -> None:
        """`counts` are the numbers of values of the digits."""
        super().__init__()
        places = [math.prod(counts[digit + 1 :]) for digit in range(len(counts))]
        starts = [sum(counts[:digit]) for digit in range(len(counts))]
        for name, numbers in (("places", places), ("counts", counts), ("starts", starts)):
            self.register_buffer(name, torch.tensor(numbers), persistent=False)
        self.table = nn.Parameter(torch.empty(sum(counts), width))

    def split(self, ids: Tensor) -> Tensor:
        """Digits (..., C) of ids (...). An end mark, which comes after all ids, has one value more at its first."""
        upper = ids[..., None] // self.places
        return torch.cat([upper[..., :1], upper[..., 1:] % self.counts[1:]], dim=-1)

    def join(self, digits: Tensor) -> Tensor:
        """Ids (...) of digits (..., C)."""
        return (digits * self.places).sum(dim=-1)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (..., D) of ids (...)."""
        rows = self.split(ids) + self.starts
        return F.embedding_bag(rows.flatten(0, -2), self.table, mode="sum").unflatten(0, ids.shape)


class IndependentHead(nn.Module):
    """Features (N, Z) -> digits (N, C), each by a classifier of its own that does not know the others (ELM).

    It is called as `dimension_head.DimensionHead` is. Where digits have unequal numbers of values, those that a digit
    lacks have the lowest logit and are never drawn.
    """

    def __init__(self, feature_width: int, sizes: Sequence[int]) -> None:
        """`sizes` are the numbers of values of the digits."""
        super().__init__()
        self.sizes = list(sizes)
        self.readout = nn.Linear(feature_width, sum(sizes), bias=False)
        nn.init.zeros_(self.readout.weight)  # every value is as likely at first, as of a GPT without digits

    def forward(self, features: Tensor, digits: Tensor | None = None) -> Tensor:
        """Logits (N, C, most values of a digit), float32; `digits` (N, C) change nothing."""
        most = max(self.sizes)
        parts = self.readout(features).float().split(self.sizes, dim=-1)
        return torch.stack([F.pad(part, (0, most - part.shape[-1]), value=LOWEST) for part in parts], dim=1)

    def draw(self, features: Tensor, choose: Choose) -> Tensor:
        """Digits (N, C)."""
        logits = self(features)
        return torch.stack([choose(digit, logits[:, digit]) for digit in range(len(self.sizes))], dim=1)

    draw_plainly = draw  # there is nothing that could be kept from one digit to the next
