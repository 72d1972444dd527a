"""Which rows of d_logits enter the products that make d_hidden and d_weight.

A token's share of d_weight is the outer product d_logits_i h_i^T, whose Frobenius norm is known
without forming it; in on-policy distillation most tokens' is orders below the batch's:

    e_i = ||d_logits_i|| ||h_i||            ||d_logits_i|| alone where the head is frozen

Per super-chunk of tokens, in which the products are made, rows are kept in one of two ways.

    tolerance t    leave out the smallest e_i while their sum of squares is at most t^2 sum_j e_j^2.
                   Over the whole batch, by summing:  sum(e_i^2 left out) <= t^2 sum(e_i^2).
    sampling f     keep row i with probability pi_i = min(1, c e_i), c such that sum(pi) = f rows,
                   and weigh it by 1 / pi_i: unbiased, of variance sum((1 / pi_i - 1) e_i^2), the
                   least for that number of independent draws (Poisson sampling with probability
                   proportional to size, as in survey sampling; for products of matrices: Drineas,
                   Kannan and Mahoney, "Fast Monte Carlo Algorithms for Matrices I", 2006).

Kept rows move to the front of their own buffer, block by block: their order stays, so a row never
moves to where one still stands that has to move. Their number is read by the host, one sync a
super-chunk. Memory beside the numbers a token: one block of rows, two for half precision on a CPU,
and a super-chunk's hidden states, in float32 where they are weighed.

Rows with NaN or infinity are always kept, and take no part in the sums. Where all finite rows have
norm 0, all are kept: float32 squares of a gradient below 1e-22 are 0 too. Sums that decide are of
integers, which no order of adding changes, so that two runs keep the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

#: Bytes of a block of rows: on a CPU it should stay in the cache, a GPU wants few launches.
BLOCK_BYTES = {"cpu": 2**22}
LARGE_BLOCK = 2**25
#: Sums are of integers in units of this part of their total.
UNITS = 2**60


class Share(IntEnum):
    """Rows of the matrix (Share, N) that tells what became of each token's share."""

    NORM = 0  # e_i
    PROBABILITY = 1  # of being kept; 0 or 1 under a tolerance
    WEIGHT = 2  # 0: left out


@dataclass(frozen=True)
class Selection:
    """tolerance: 0 keeps all rows. sampling: the share of rows kept on average, None keeps all;
    draws: float64 (N,) in [0, 1), which decide."""

    tolerance: float = 0.0
    sampling: float | None = None
    draws: Tensor | None = None

    @property
    def on(self) -> bool:
        return self.tolerance > 0 or self.sampling is not None

    def shares(self, norms: Tensor, hidden: Tensor, tokens: slice | Tensor) -> Tensor:
        """(Share, n) of the rows with these norms e_i (n,) and hidden states (n, H)."""
        if self.sampling is None:
            weight = probability = within_tolerance(norms, self.tolerance).to(norms.dtype)
        else:
            pi = probabilities(norms, self.sampling)
            if hidden.dtype == torch.float16:
                # 1 / pi multiplies the hidden state, which must not overflow.
                largest = hidden.abs().amax(1).double().nan_to_num(nan=torch.inf)
                pi = torch.maximum(pi, largest / 2**15).clamp(max=1)
            weight = torch.where(self.draws[tokens] < pi, 1 / pi, 0.0)
            probability = pi
        return torch.stack([norms, probability.to(norms.dtype), weight.to(norms.dtype)])


EVERY_ROW = Selection()


def within_tolerance(norms: Tensor, tolerance: float) -> Tensor:
    """(n,) bool: the rows to keep."""
    finite, units = _in_units(norms.double().square())
    order = _ascending(finite, units)
    # Rows that are not finite come last, where the sum is the total, which is above any tolerance.
    small = units[order].cumsum(0) <= int(tolerance**2 * UNITS)
    out = small & (units > 0).any()
    return torch.ones_like(finite).index_copy(0, order, ~out)


def probabilities(norms: Tensor, fraction: float) -> Tensor:
    """pi (n,), float64. c follows from how many rows have pi < 1: with these in ascending order,

    c_j = (fraction n - (n - j)) / (e_1 + ... + e_j),    the largest j for which c_j e_j <= 1
    """
    finite, units = _in_units(norms.double())
    order = _ascending(finite, units)
    size, total = units[order].double(), units[order].cumsum(0).double()
    # What is left of fraction * n for the j smallest rows, when all larger ones are kept.
    missing = (1 - fraction) * finite.sum().double()
    places = torch.arange(1, len(norms) + 1, device=norms.device) - missing
    below_one = (size * places <= total) & finite[order]
    last = (below_one.sum() - 1).clamp_min(0).view(1)
    c = places.index_select(0, last) / total.index_select(0, last)
    pi = torch.where(units > 0, (c * units.double()).clamp(0, 1), 0.0)
    return torch.where(finite & (units > 0).any(), pi, 1.0)


def relative_error(shares: Tensor) -> Tensor:
    """What is left out, relative to the stacked shares of all tokens: ||left out|| / ||all|| under
    a tolerance; the standard deviation relative to ||all|| of a sample. 0 of nothing."""
    norm, probability = shares[Share.NORM].double(), shares[Share.PROBABILITY].double()
    square = torch.where(norm.isfinite(), norm, 0.0).square()
    lost = torch.where(probability > 0, 1 / probability - 1, 1.0) * square
    error = (lost.sum() / square.sum()).sqrt()
    return torch.where(square.sum() > 0, error, 0.0).to(shares.dtype)


def row_norms(
    d_logits: Tensor,  # (n, V)
    dtype: torch.dtype,
) -> Tensor:
    """||d_logits_i|| (n,), summed and given in `dtype`."""
    if d_logits.dtype == dtype or d_logits.device.type != "cpu":
        return torch.linalg.vector_norm(d_logits, dim=1, dtype=dtype)
    # torch would make a copy of all in `dtype`.
    norms = d_logits.new_empty(d_logits.shape[:1], dtype=dtype)
    buffer = _block(d_logits, dtype)
    for rows in _blocks(len(d_logits), len(buffer)):
        block = buffer[: rows.stop - rows.start].copy_(d_logits[rows])
        torch.linalg.vector_norm(block, dim=1, out=norms[rows])
    return norms


def move_to_front(
    d_logits: Tensor,  # (n, V)
    index: Tensor,  # (kept,) ascending
) -> Tensor:
    """The rows at `index`, (kept, V): a view of what was overwritten by them."""
    buffer = _block(d_logits, d_logits.dtype)
    for rows in _blocks(len(index), len(buffer)):
        block = buffer[: rows.stop - rows.start]
        torch.index_select(d_logits, 0, index[rows], out=block)
        d_logits[rows] = block
    return d_logits[: len(index)]


def weighed_sum(
    d_logits: Tensor,  # (n, V)
    weights: Tensor,  # (n,)
) -> Tensor:
    """sum_i weights_i d_logits_i (V,), in the weights' dtype."""
    total = weights.new_zeros(d_logits.shape[1:])
    for rows in _blocks(len(d_logits), _block_rows(d_logits, weights.dtype)):
        total += weights[rows] @ d_logits[rows].to(weights.dtype)
    return total


def workspace_bytes(
    super_rows: int, vocab_size: int, hidden_size: int, dtype: torch.dtype, device_type: str
) -> int:
    """Of the selection: two blocks, and a super-chunk's hidden states in the working precision."""
    block = max(BLOCK_BYTES.get(device_type, LARGE_BLOCK), vocab_size * dtype.itemsize)
    return 2 * block + dtype.itemsize * super_rows * hidden_size


def _in_units(values: Tensor) -> tuple[Tensor, Tensor]:
    """Which values (n,) are finite, and these as int64, in 1 / UNITS of their sum, rounded up; 0
    for the others."""
    finite = values.isfinite()
    values = torch.where(finite, values, 0.0)
    total = values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    return finite, (values / total * UNITS).ceil().long()


def _ascending(finite: Tensor, units: Tensor) -> Tensor:
    """Indices in ascending order, those of values that are not finite last."""
    return torch.argsort(torch.where(finite, units, torch.iinfo(torch.int64).max), stable=True)


def _block_rows(matrix: Tensor, dtype: torch.dtype) -> int:
    limit = BLOCK_BYTES.get(matrix.device.type, LARGE_BLOCK)
    return max(1, limit // (matrix.shape[1] * dtype.itemsize))


def _block(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    rows = min(len(matrix), _block_rows(matrix, dtype))
    return matrix.new_empty((rows, matrix.shape[1]), dtype=dtype)


def _blocks(rows: int, height: int) -> Iterator[slice]:
    return (slice(low, min(low + height, rows)) for low in range(0, rows, height))
