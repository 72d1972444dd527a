"""Unbiased sampling of vocabulary columns for the d_hidden and d_weight GEMMs.

Both gradients are sums with one term per id, and almost all of a softmax's gradient lies on few
ids; the rest is a long tail of small probabilities. A sample of the ids estimates both without
bias:

    d_hidden   = sum_j g_j w_j^T          g_j (n,): column j of d_logits; w_j: row j of the head
    d_weight_j = g_j^T hidden             id j is kept with probability pi_j, and its column is
                                          divided by pi_j. Draws are independent, so exactly

    E ||error of d_hidden||^2 = sum_j (1 / pi_j - 1) ||g_j||^2 ||w_j||^2
    E ||error of d_weight||^2 = sum_j (1 / pi_j - 1) ||d_weight_j||^2

For a given expected number of ids, pi_j = min(1, c e_j) minimizes such a sum, where e_j^2 is the
term of id j. This is Poisson sampling with probability proportional to size, from survey sampling;
for matrix products see Drineas, Kannan and Mahoney, "Fast Monte Carlo Algorithms for Matrices I",
2006. If both gradients are needed, e_j^2 is the sum of both terms, each relative to its total.
||d_weight_j|| is not known before the GEMM: the part along the mean of the hidden states is
computed exactly, and the rest is estimated as if its directions were independent.

    share f        c such that sum(pi) is f of the ids
    tolerance t    c such that sum_j (1 / pi_j - 1) e_j^2 = t^2 sum_j e_j^2: with sums that estimate
                   the gradients' squares, the relative standard deviation is t

Ids are chosen anew for each super-chunk of tokens; squares add up over super-chunks, so t holds for
the batch. The host reads how many ids are kept, one sync per super-chunk. Columns are gathered
IDS_AT_ONCE at a time.

Ids whose size is not finite are kept and left out of the sums. If all finite sizes are 0, all ids
are kept, since float32 squares of gradients below 1e-22 are 0 as well. If more than DENSE of the
ids would be kept, all are: gathering them would cost what it saves. The sums that decide are sums
of integers, whose result does not depend on the order, so two runs keep the same ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from ..draws import id_uniforms
from ..rows.engine import RowEngine

IDS_AT_ONCE = 8192
DENSE = 0.5
#: Sums are of integers in units of this part of their total.
UNITS = 2**60


class SamplingReport(IntEnum):
    """What a call reports about its sample."""

    SHARE = 0  # fraction of the columns' entries that entered the products
    ERROR = 1  # standard deviation over the gradient's norm, the larger of the two


@dataclass(frozen=True)
class GradientSampling:
    """tolerance: 0 keeps all ids. share: of the ids kept on average, None keeps all. seed:
    0-d int64, for the draws."""

    tolerance: float = 0.0
    share: float | None = None
    seed: Tensor | None = None

    @property
    def on(self) -> bool:
        return self.tolerance > 0 or self.share is not None

    def probabilities(self, sizes: Tensor) -> Tensor:
        """pi (V,), float64, of ids with these e_j (V,)."""
        sizes = sizes.double()
        finite, units = _in_units(sizes)
        order = _ascending(finite, units)
        sorted_units = units[order]
        sums = sorted_units.cumsum(0).double() / UNITS
        values = sorted_units.double() / UNITS  # of a size that is not finite: 0
        if self.share is not None:
            c = _for_share(self.share, values, sums, finite[order])
        else:
            finite_sizes = torch.where(finite, sizes, 0.0)
            c = _for_tolerance(self.tolerance, finite_sizes, order, values, sums, finite[order])
        pi = torch.where(units > 0, (c * (units.double() / UNITS)).clamp(0, 1), 0.0)
        pi = torch.where(finite, pi, 1.0)
        # Asked for exactly DENSE, the sum's last bit must not decide.
        dense = pi.sum() > (DENSE + 1e-9) * len(pi)
        all_are_kept = dense | ~(units > 0).any()
        return torch.where(all_are_kept, 1.0, pi)


NO_SAMPLING = GradientSampling()


def _for_share(fraction: float, values: Tensor, sums: Tensor, finite: Tensor) -> Tensor:
    """c such that the sum of min(1, c e) is `fraction` of the n finite: these in ascending order,

    c_j = (fraction n - (n - j)) / (e_1 + ... + e_j),    the largest j for which c_j e_j <= 1
    """
    missing = (1 - fraction) * finite.sum().double()
    places = torch.arange(1, len(values) + 1, device=values.device) - missing
    last = _last((values * places <= sums) & finite)
    below = sums.index_select(0, last)
    return torch.where(below > 0, places.index_select(0, last) / below, torch.inf)


def _for_tolerance(
    tolerance: float, sizes: Tensor, order: Tensor, values: Tensor, sums: Tensor, finite: Tensor
) -> Tensor:
    """c such that sum (1 / min(1, c e) - 1) e^2 = tolerance^2 sum e^2. With the j smallest below 1,

    sum = (e_1 + ... + e_j) / c - (e_1^2 + ... + e_j^2),    the largest j for which c_j e_j <= 1

    e is in units of its sum, and e^2 in units of its own, which is 1 / `ratio` of the others'
    square."""
    squares = _in_units(sizes.square())[1][order].cumsum(0).double() / UNITS
    total = sizes.sum()
    ratio = total.square() / sizes.square().sum()
    variance = ratio * values * sums - squares  # with c = 1 / e_j
    last = _last((variance <= tolerance**2) & finite)
    at_most = tolerance**2 + squares.index_select(0, last)
    below = sums.index_select(0, last)
    return torch.where(below > 0, ratio * below / at_most, torch.inf)


def _last(holds: Tensor) -> Tensor:
    """The index (1,) of the last for which it holds; 0 where it holds for none. Sums up to it are 0
    where more ids may be kept than have a size: then all that have one are."""
    return (holds.sum() - 1).clamp_min(0).view(1)


class ColumnSampler:
    """The sample of a call: which ids its super-chunks keep, and what that does to its gradients.

    Adds up on the device, and waits for it once a super-chunk. Sharded over ranks each of them
    samples its own ids.
    """

    def __init__(
        self,
        sampling: GradientSampling,
        engine: RowEngine,
        weight: Tensor | None,  # (V, H), where d_hidden is asked for
        d_weight: bool,  # is asked for
        like: Tensor,  # in the precision of the sums
        first_id: int = 0,
    ):
        self.sampling, self.engine = sampling, engine
        self.d_weight, self.first_id = d_weight, first_id
        self.dtype = like.dtype
        self.head = None if weight is None else engine.row_squares(weight, like.dtype).double()
        #: Entries that the products saw, and all; squared errors and squares of the gradients.
        self.seen, self.entries = 0, 0
        nothing = like.new_zeros((), dtype=torch.float64)
        self.hidden_error = self.hidden_square = self.weight_error = self.weight_square = nothing

    def choose(
        self,
        d_logits: Tensor,  # (n, V)
        hidden: Tensor,  # (n, H)
        start: int,  # the super-chunk's first token
    ) -> list[tuple[Tensor, Tensor]] | None:
        """(ids, 1 / pi) of those kept, in blocks; None where all are."""
        n, v = d_logits.shape
        squares, spread, along = self.engine.column_sums(d_logits, _hidden_sums(hidden, self.dtype))
        sizes, hidden_sizes = squares.new_zeros(v, dtype=torch.float64), None
        if self.head is not None:
            hidden_sizes = squares.double() * self.head
            sizes += _relative(hidden_sizes)
        if self.d_weight:
            sizes += _relative(spread.double() + along.double().square())
        pi = self.sampling.probabilities(sizes.sqrt())
        if d_logits.dtype == torch.float16:  # in which no entry divided by pi may overflow
            least = squares.double().sqrt().nan_to_num(nan=torch.inf) / 2**15
            pi = torch.maximum(pi, least).clamp(max=1)
        assert self.sampling.seed is not None
        kept = id_uniforms(self.sampling.seed, start, self.first_id, v, d_logits.device) < pi
        if hidden_sizes is not None:
            lost = torch.where(pi > 0, (1 / pi - 1) * hidden_sizes, 0.0)
            self.hidden_error = self.hidden_error + torch.where(pi < 1, lost, 0.0).sum()
        # The host sync.
        count, drawn = torch.stack([kept.sum(), (pi < 1).sum()]).tolist()
        self.seen, self.entries = self.seen + n * count, self.entries + n * v
        if not drawn:
            return None
        # A stable sort instead of nonzero(): the count is known, so it needs no sync of its own.
        ids = torch.argsort(~kept, stable=True)[:count]
        weights = (1 / pi[ids]).to(self.dtype)
        return [
            (ids[low : low + IDS_AT_ONCE], weights[low : low + IDS_AT_ONCE])
            for low in range(0, count, IDS_AT_ONCE)
        ]

    def saw_hidden(self, d_hidden: Tensor) -> None:
        square = torch.linalg.vector_norm(d_hidden).double().square()
        self.hidden_square = self.hidden_square + square

    def saw_weight(self, rows: Tensor, weights: Tensor) -> None:
        """Rows of d_weight (kept, H), times their weights 1 / pi: of the sum over all ids that is
        E ||error||^2, those kept tell (1 / pi - 1) ||d_weight_j||^2 / pi without bias."""
        squares = torch.linalg.vector_norm(rows, dim=1).double().square()
        self.weight_error = self.weight_error + ((1 - 1 / weights.double()) * squares).sum()

    def report(self, d_weight: Tensor | None, shard) -> Tensor:
        """(SamplingReport,) of the whole call."""
        if d_weight is not None:
            self.weight_square = self.engine.row_squares(d_weight, self.dtype).double().sum()
        seen, entries = self.hidden_error.new_tensor([self.seen, self.entries])
        numbers = torch.stack(
            [seen, entries, self.hidden_error, self.weight_error, self.weight_square]
        )
        if shard is not None:
            shard.sum_(numbers)
        seen, entries, hidden_error, weight_error, weight_square = numbers
        errors = torch.stack([hidden_error, weight_error])
        error = errors / torch.stack([self.hidden_square, weight_square])
        error = torch.where(errors == 0, 0.0, error).amax().sqrt()
        share = torch.where(entries > 0, seen / entries, 1.0)
        return torch.stack([share, error]).to(self.dtype)


def workspace_bytes(
    super_rows: int, vocab_size: int, hidden_size: int, gradient_dtype: torch.dtype,
    dtype: torch.dtype,
) -> int:  # fmt: skip
    """Of the sample: a block of columns, of rows of the head and of d_weight, hidden states in the
    sums' precision, and some twenty numbers an id."""
    ids = min(IDS_AT_ONCE, vocab_size)
    columns = (gradient_dtype.itemsize + dtype.itemsize) * super_rows * ids
    rows = 2 * dtype.itemsize * ids * hidden_size
    return columns + rows + dtype.itemsize * super_rows * hidden_size + 20 * 8 * vocab_size


def _hidden_sums(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """(2, n): of each hidden state the square of what is not along their mean, and what is."""
    hidden = hidden.to(dtype)
    mean = torch.nn.functional.normalize(hidden.sum(0), dim=0, eps=torch.finfo(dtype).tiny)
    along = hidden @ mean
    square = torch.linalg.vector_norm(hidden, dim=1).square()
    return torch.stack([(square - along.square()).clamp_min(0), along])


def _relative(squares: Tensor) -> Tensor:
    """In units of the sum of those that are finite."""
    total = torch.where(squares.isfinite(), squares, 0.0).sum()
    return squares / torch.where(total > 0, total, 1.0)


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
