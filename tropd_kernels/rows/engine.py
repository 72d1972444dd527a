"""The interface of a row engine, and the parts of it that are the same for every backend.

The chunk loop makes two calls on a chunk of rows, one row being one token's logits, and before a
selection of tokens a third, `before_selection`:

    forward(batch, options, into)          stats (Stat, n) and coefs (Coef, n)
    gradient(batch, coefs, options, out)   writes d_logits (n, V)

`forward` is made of two passes over the vocabulary and of the rule on a few numbers a row:

    statistics   normalisers, log-probs of the labels, entropies, KLs
    gate         which rows are trusted                                         (`rule.gate`)
    sums         over K, or over the vocabulary, for the rows that need them
    rule         loss and coefficients                                          (`rule.apply_rule`)

A backend subclasses `RowEngine`, implements its five passes, and overrides `forward` where it fuses
some of them.

With `options.sharded` the columns are a part of each row (see `sharded`). `statistics` then gives
the part's own normalisers, both -inf where all of the part's ids are excluded. `sums` and
`gradient` read the normalisers and THRESHOLD of the whole rows from coefs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import Coef, Matrices, RowBatch, RowOptions, Stat
from .rule import Gate, Sums, apply_rule, forward_kl, gate, rows_with_sums
from .topk_teacher import topk_teacher_statistics


class Statistics(NamedTuple):
    """What the first pass found in a batch of n rows."""

    stats: Tensor  # (Stat, n), filled up to REVERSE_KL
    coefs: Tensor  # (Coef, n), filled up to REVERSE_KL, and MEAN_GAP where the rule smooths labels
    #: Of the engine's own choice, for its `sums`: what would otherwise be made twice.
    read: Any = None


class RowEngine(ABC):
    """Passes over rows of logits, on one backend."""

    #: On a CPU, bfloat16 matrices are multiplied by `csrc/` where it is built.
    native_products: bool = False
    #: Rows of logits are padded on a CPU, too, not only on a GPU.
    pads_rows: bool = False
    #: The loop takes its buffers from `buffers.arena`, which keeps them for the next call.
    keeps_buffers: bool = False

    def scratch_bytes(self, rows: int, vocab_size: int, itemsize: int, device_type: str) -> int:
        """Upper bound on the temporaries of one call on `rows` rows."""
        return 0

    def forward(
        self, batch: RowBatch, options: RowOptions, into: Matrices | None = None
    ) -> Matrices:
        """Statistics and coefficients of a chunk of n rows.

        Args:
            batch: the rows.
            options: what all rows of the call share.
            into: the matrices to fill, columns of those of a whole call, which hold NaN and 0 so
                far. None makes new ones.

        Returns:
            stats (Stat, n) and coefs (Coef, n).
        """
        found = self.statistics(batch, options, into)
        stats, coefs, _ = found
        stats[Stat.LSE] = coefs[Coef.STUDENT_MAX] + coefs[Coef.STUDENT_LOG_SUM]
        if batch.teacher is None:
            topk_teacher_statistics(batch, stats)
        gated = gate(stats, batch, options)
        sums = self._sums_of_rule(batch, options, gated, found)
        apply_rule(stats, coefs, gated, sums, batch, options)
        if batch.teacher is None and sums is not None:
            stats[Stat.FORWARD_KL] = forward_kl(sums, options.rule)[0]
        return stats, coefs

    def before_selection(self, batch: RowBatch, options: RowOptions) -> Tensor:
        """Statistics (Stat, n) of the first pass, by which tokens are selected."""
        return self.statistics(batch, options).stats

    @abstractmethod
    def statistics(
        self, batch: RowBatch, options: RowOptions, into: Matrices | None = None
    ) -> Statistics:
        """The first pass: normalisers, entropies and KLs."""

    @abstractmethod
    def sums(
        self, batch: RowBatch, options: RowOptions, needed: Tensor | None, found: Statistics
    ) -> Sums:
        """The sums over K, or over the vocabulary, that the rule asks for.

        With a dense teacher and a `top_k`, also finds K and writes THRESHOLD into `found.coefs`.

        Args:
            needed: (n,) bool, the rows that need sums; in the others any number may come out. None:
                all rows.
            found: what `statistics` returned for the same rows.
        """

    @abstractmethod
    def gradient(self, batch: RowBatch, coefs: Tensor, options: RowOptions, out: Tensor) -> None:
        """Writes d_logits (n, V) into `out`, which may be the memory of `batch.student`."""

    @abstractmethod
    def column_sums(self, d_logits: Tensor, hidden: Tensor) -> Tensor:
        """(3, V): sum_i d^2, sum_i hidden[0, i] d^2 and sum_i hidden[1, i] d of every column of
        d_logits (n, V), in the dtype of hidden (2, n)."""

    @abstractmethod
    def row_squares(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """||row||^2 (rows,) of a matrix, in `dtype`."""

    def _sums_of_rule(
        self, batch: RowBatch, options: RowOptions, gated: Gate, found: Statistics
    ) -> Sums | None:
        """The sums that the rule reads, None where it reads none. Fills the masses of K."""
        rule, (stats, coefs, _) = options.rule, found
        if not rule.uses_sums:
            return None
        needed = None
        if batch.teacher is not None:
            coefs[Coef.THRESHOLD] = -math.inf
            if rule.sums_from_statistics:
                one, zero = torch.ones_like(stats[0]), torch.zeros_like(stats[0])
                return Sums(one, one, zero, zero, zero, stats[Stat.FORWARD_KL])
            needed = rows_with_sums(gated, rule)
        sums = self.sums(batch, options, needed, found)
        if needed is None:
            stats[Stat.TEACHER_TOPK_MASS] = sums.teacher_mass
            stats[Stat.STUDENT_TOPK_MASS] = sums.student_mass
        elif rule.uses_top_k:
            stats[Stat.TEACHER_TOPK_MASS] = sums.teacher_mass.masked_fill(~needed, math.nan)
            stats[Stat.STUDENT_TOPK_MASS] = sums.student_mass.masked_fill(~needed, math.nan)
        return sums
