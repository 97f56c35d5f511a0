"""Vector quantization (arXiv 1711.00937): the nearest of a table of learned vectors, a token is its row.

The table learns by gradient, from a loss of two terms: the *codebook* term pulls a row to the vectors that it stands
for, the *commitment* term these vectors to their row. Vectors and rows may be brought to unit length first, so that the
nearest row is that of the largest cosine (arXiv 2110.04627); gradients then go through that step. A third term, of
entropies, keeps all rows in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imgtok.config import NonNegativeFloat, PositiveInt, check
from imgtok.quantizers.ids import check_ids


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """A table of codes, and the weights of its losses; the defaults are those of LlamaGen's tokenizers."""

    kind: Literal["table"] = "table"
    vocab_size: PositiveInt = 16384
    """Rows of the table."""
    width: PositiveInt = 8
    """Numbers of a code."""
    codebook_weight: NonNegativeFloat = 1.0
    """Weight of the loss that pulls codes to the vectors that they stand for."""
    commitment_weight: NonNegativeFloat = 0.25
    """Weight of the loss that pulls vectors to their codes."""
    entropy_weight: NonNegativeFloat = 0.0
    """Weight of the loss that keeps all codes in use, and each choice sure; it holds a number for every cell of a batch
    and every row of the table."""

    def __post_init__(self) -> None:
        check(self)


class Quantized(NamedTuple):
    """What became of vectors (..., n)."""

    codes: Tensor
    """Rows of the table (..., n), with the straight-through gradient."""
    ids: Tensor
    """Their numbers (...), int64."""
    commitment: Tensor
    """Mean squared distance of the vectors, which get the gradient, from their rows; a scalar."""
    codebook: Tensor
    """The same number, for which the rows get the gradient."""


class VectorQuantizer(nn.Module):
    """Quantizer for a table of `vocab_size` rows: z (..., n) <-> codes (..., n) <-> ids (...); in float32."""

    def __init__(self, vocab_size: int, width: int, *, unit_length: bool = False) -> None:
        """`width` is n; `unit_length` compares directions alone."""
        super().__init__()
        self.vocab_size = vocab_size
        self.unit_length = unit_length
        self.table = nn.Parameter(torch.empty(vocab_size, width).uniform_(-1 / vocab_size, 1 / vocab_size))

    def forward(self, z: Tensor) -> Quantized:
        """The nearest row of each vector, and what the two terms of the loss are, means over all numbers of z."""
        with torch.autocast(z.device.type, enabled=False):
            z, rows = self.compared(z.float()), self.rows()
            ids = self._nearest(z.detach(), rows.detach())
            codes = F.embedding(ids, rows)
            commitment, codebook = F.mse_loss(z, codes.detach()), F.mse_loss(codes, z.detach())
            return Quantized(z + (codes - z).detach(), ids, commitment, codebook)

    @torch.no_grad()
    def write(self, vectors: Tensor, first: int) -> None:
        """Make vectors (N, n), at most `vocab_size`, the rows from `first` on; after the last comes row 0."""
        places = (first + torch.arange(len(vectors), device=vectors.device)) % self.vocab_size
        self.table[places] = self.compared(vectors.to(self.table.dtype))

    def rows(self) -> Tensor:
        """The table (V, n) as it is compared with, float32."""
        return self.compared(self.table.float())

    def nearest(self, z: Tensor) -> Tensor:
        """Ids (...) of the rows nearest to vectors z (..., n)."""
        with torch.autocast(z.device.type, enabled=False):
            return self._nearest(self.compared(z.float()), self.rows())

    def ids_to_codes(self, ids: Tensor) -> Tensor:
        """Ids in [0, vocab_size) -> float32 codes (..., n). Raises ValueError outside that range."""
        check_ids(ids, self.vocab_size)
        return self.codes_of(ids)

    def codes_of(self, ids: Tensor) -> Tensor:
        """`ids_to_codes` of ids that are known to exist; nothing is read by the host."""
        return F.embedding(ids, self.rows())

    def compared(self, vectors: Tensor) -> Tensor:
        """Vectors (..., n) as they are compared with rows."""
        return F.normalize(vectors, dim=-1) if self.unit_length else vectors

    def entropy_loss(self, z: Tensor, temperature: float = 0.01) -> Tensor:
        """The mean entropy of a vector's choice of a row, minus that of the mean choice, in nats; a scalar, for which
        the vectors z (..., n) and the rows get the gradient.

        A vector chooses by the softmax of minus its squared distances over `temperature`. It falls where single
        choices are sure and all rows are chosen equally often (arXiv 2310.05737, equation 5). It holds a number for
        each vector and row.
        """
        with torch.autocast(z.device.type, enabled=False):
            vectors = self.compared(z.float()).flatten(0, -2)
            # Half the squared distance, but for what all rows of a vector share and the softmax does not see.
            scores = self._similarity(vectors, self.rows()) * (2 / temperature)
            choices = scores.softmax(dim=-1)
            of_each = -(choices * scores.log_softmax(dim=-1)).sum(dim=-1).mean()
            mean = choices.mean(dim=0)
            of_all = -(mean * (mean + 1e-5).log()).sum()  # a row that nobody chooses has no logarithm
            return of_each - of_all

    def _nearest(self, z: Tensor, rows: Tensor) -> Tensor:
        return self._similarity(z, rows).argmax(dim=-1)

    def _similarity(self, z: Tensor, rows: Tensor) -> Tensor:
        """Of each row (..., V) z row - |row|^2 / 2: minus half the squared distance, but for |z|^2, which all rows
        share, and of rows of unit length also but for their own.
        """
        similarity = z @ rows.T
        return similarity if self.unit_length else similarity - rows.square().sum(dim=-1) / 2


def isotropy_loss(directions: Tensor) -> Tensor:
    """How far vectors (B, ..., n) of unit length are from pointing everywhere equally often; a scalar, 0 at the least.

    It is the squared distance of their covariance over the batch, times n, from the identity, divided by n. Without it
    a quantizer that starts afresh gives all images nearly the same few rows: deviations alone could be large along one
    line.
    """
    centred = (directions - directions.mean(dim=0)).flatten(0, -2)
    width = directions.shape[-1]
    covariance = width * centred.T @ centred / len(centred)
    return (covariance - torch.eye(width, device=directions.device)).square().sum() / width
