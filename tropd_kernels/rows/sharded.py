"""The row engine of one shard of the vocabulary: any backend's passes, with exchanges in between.

A rank has columns [low, low + width) of every row, over which its engine makes the passes. Here the
shards' numbers are merged into those of the whole rows:

    statistics   by each shard's own normaliser, then one exchange. With P_r and Q_r the shard's
                 shares of the student's and the teacher's mass, the chain rule gives, exactly,
                     H(p)      = sum_r P_r (H_r - log P_r)
                     KL(p||q)  = sum_r P_r (KL_r + log P_r - log Q_r)      KL(q||p) likewise
                     log p(y)  = log p_r(y) + log P_r                      on the shard that has y
    threshold    of K and of AKL's head, where the rule has one (`sharded_search`)
    sums         over K or the vocabulary, by the whole row's normaliser, hence additive: one more
                 exchange, where the rule needs them
    rule         the same on every rank, from the same numbers
    gradient     of the shard's columns, without an exchange

The exchanges gather a few numbers a token from every rank, 4 or 11 statistics (one more where the
rule smooths labels) and 8 sums, and each rank adds them up in float64 in the order of ranks: all
get the same bits, whatever the collective's own order. The size of an exchange depends on the
batch's shape and on the rule, never on values, so ranks whose arithmetic differs in a last bit
still meet in the same collective.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .engine import RowEngine, Statistics
from .layout import Coef, Matrices, RowBatch, RowOptions, Stat
from .rule import SUMS, Sums, as_matrix, teacher_tail, topk_entropy
from .sharded_search import head_threshold, top_k_threshold
from .topk_teacher import topk_teacher_ids

if TYPE_CHECKING:
    from ..parallel import Shard

#: What a shard sends of a row, and what it adds with a dense teacher.
STUDENT_COEFS = (Coef.STUDENT_MAX, Coef.STUDENT_LOG_SUM)
STUDENT_STATS = (Stat.LOG_PROB, Stat.ENTROPY)
TEACHER_COEFS = (Coef.TEACHER_MAX, Coef.TEACHER_LOG_SUM, Coef.REVERSE_KL)
TEACHER_STATS = (
    Stat.TEACHER_LOG_PROB, Stat.TEACHER_ENTROPY, Stat.FORWARD_KL, Stat.REVERSE_KL
)  # fmt: skip


class ShardRows(RowEngine):
    """A row engine on a shard's columns that returns the statistics of the whole rows.

    Batches hold the shard's logits, and labels and ids of the whole vocabulary.
    """

    def __init__(self, engine: RowEngine, shard: Shard):
        self.engine, self.shard = engine, shard
        self.native_products, self.pads_rows = engine.native_products, engine.pads_rows
        self.keeps_buffers = engine.keeps_buffers

    def scratch_bytes(self, rows: int, vocab_size: int, itemsize: int, device_type: str) -> int:
        return self.engine.scratch_bytes(rows, vocab_size, itemsize, device_type)

    def forward(
        self, batch: RowBatch, options: RowOptions, into: Matrices | None = None
    ) -> Matrices:
        return super().forward(self._part(batch, options), options, into)

    def before_selection(self, batch: RowBatch, options: RowOptions) -> Tensor:
        return super().before_selection(self._part(batch, options), options)

    def gradient(self, batch: RowBatch, coefs: Tensor, options: RowOptions, out: Tensor) -> None:
        self.engine.gradient(self._part(batch, options), coefs, options, out)

    def column_sums(self, d_logits: Tensor, hidden: Tensor) -> Tensor:
        return self.engine.column_sums(d_logits, hidden)

    def row_squares(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        return self.engine.row_squares(matrix, dtype)

    def _part(self, batch: RowBatch, options: RowOptions) -> RowBatch:
        """With labels and ids as columns of this shard, out of range where another shard has them.
        K and the entropy of a top-k teacher are those of its whole row."""
        labels = batch.labels - self.shard.low
        if batch.ids is None:
            return replace(batch, labels=labels)
        v, (ids, log_probs) = self.shard.vocab_size, batch.topk
        entropy = batch.teacher_entropy
        if entropy is None:
            entropy = topk_entropy(topk_teacher_ids(ids, log_probs, None, v)[1])
        ids, log_probs = topk_teacher_ids(ids, log_probs, options.rule.top_k, v)
        columns = ids - self.shard.low
        here = (columns >= 0) & (columns < self.shard.width)
        return replace(
            batch,
            labels=labels,
            ids=columns.masked_fill(~here, -1),
            topk_log_probs=log_probs.masked_fill(~here, -math.inf),
            teacher_entropy=entropy,
        )

    def statistics(
        self, part: RowBatch, options: RowOptions, into: Matrices | None = None
    ) -> Statistics:
        """Those of the whole rows."""
        found = self.engine.statistics(part, options, into)
        stats, coefs, _ = found
        dense = part.teacher is not None
        sides = [(Stat.LOG_PROB, Coef.STUDENT_MAX, Coef.STUDENT_LOG_SUM)]
        if dense:
            sides.append((Stat.TEACHER_LOG_PROB, Coef.TEACHER_MAX, Coef.TEACHER_LOG_SUM))
        inside = (part.labels >= 0) & (part.labels < self.shard.width)
        for log_prob, high, log_sum in sides:
            # A label in a shard whose ids are all excluded is excluded, not unknown.
            empty = (coefs[high] == -math.inf) & (coefs[log_sum] == -math.inf)
            stats[log_prob] = stats[log_prob].masked_fill(empty & inside, -math.inf)
        which = list(STUDENT_COEFS + (TEACHER_COEFS if dense else ()))
        if options.rule.label_smoothing:
            which.append(Coef.MEAN_GAP)
        what = list(STUDENT_STATS + (TEACHER_STATS if dense else ()))
        gathered = self.shard.gather(torch.cat([coefs[which], stats[what]])).double()
        # In two dictionaries: members of Coef and Stat are equal as keys.
        of_coefs = dict(zip(which, gathered[:, : len(which)].unbind(1), strict=True))
        of_stats = dict(zip(what, gathered[:, len(which) :].unbind(1), strict=True))
        _merge(of_coefs, of_stats, stats, coefs, dense)
        if options.rule.label_smoothing:
            coefs[Coef.MEAN_GAP] = _mean_gap(of_coefs, coefs[Coef.STUDENT_MAX], self.shard)
        return found

    def sums(
        self, part: RowBatch, options: RowOptions, needed: Tensor | None, found: Statistics
    ) -> Sums:
        """Those of the whole rows."""
        rule = options.rule
        if needed is not None and rule.uses_top_k:
            top_k_threshold(self.shard, part, options, needed, found.coefs)
        elif needed is not None and rule.weighs_by_gaps:
            head_threshold(self.shard, part, options, found.coefs)
        made = as_matrix(self.engine.sums(part, options, needed, found))
        gathered = self.shard.gather(made).double()
        total = gathered.sum(0)
        log_mass, value = SUMS.index("student_log_mass"), SUMS.index("value")
        total[log_mass] = gathered[:, log_mass].logsumexp(0)
        if rule.value_on_renormalized:
            share = (gathered[:, log_mass] - total[log_mass]).exp().nan_to_num(nan=0.0)
            total[value] = torch.where(share == 0, 0.0, share * gathered[:, value]).sum(0)
        sums = Sums(*total.to(made.dtype))
        if needed is None:
            sums.teacher_tail = teacher_tail(sums.teacher_mass, rule)
        else:  # other rows ignore their sums, but divide by their masses
            sums.teacher_mass = sums.teacher_mass.masked_fill(~needed, 1.0)
            sums.student_mass = sums.student_mass.masked_fill(~needed, 1.0)
        return sums


# --- the chain rule ------------------------------------------------------------------------------


def _merge(c: dict, s: dict, stats: Tensor, coefs: Tensor, dense: bool) -> None:
    """Merges the shards' numbers (R, n), by Coef and Stat, into those of the whole rows."""
    high, log_sum, share = _normaliser(c[Coef.STUDENT_MAX], c[Coef.STUDENT_LOG_SUM])
    coefs[Coef.STUDENT_MAX], coefs[Coef.STUDENT_LOG_SUM] = high, log_sum
    stats[Stat.LOG_PROB] = _label(s[Stat.LOG_PROB], share)
    entropy = _expect(share, s[Stat.ENTROPY] - share, stats.dtype)
    stats[Stat.ENTROPY] = coefs[Coef.ENTROPY] = entropy
    if not dense:
        return
    t_high, t_log_sum, t_share = _normaliser(c[Coef.TEACHER_MAX], c[Coef.TEACHER_LOG_SUM])
    coefs[Coef.TEACHER_MAX], coefs[Coef.TEACHER_LOG_SUM] = t_high, t_log_sum
    stats[Stat.TEACHER_LOG_PROB] = _label(s[Stat.TEACHER_LOG_PROB], t_share)
    t_entropy = _expect(t_share, s[Stat.TEACHER_ENTROPY] - t_share, stats.dtype)
    stats[Stat.TEACHER_ENTROPY] = t_entropy
    for stat, ours, theirs in (
        (Stat.REVERSE_KL, share, t_share),
        (Stat.FORWARD_KL, t_share, share),
    ):
        # Mass in a shard that the other side excludes makes the divergence infinite.
        value = torch.where(theirs == -math.inf, math.inf, s[stat] + (ours - theirs))
        stats[stat] = _expect(ours, value, stats.dtype)
    # E_p of the log-ratio relative to the rows' maxima, from those relative to the shards'.
    moved = (c[Coef.STUDENT_MAX] - high) - (c[Coef.TEACHER_MAX] - t_high)
    coefs[Coef.REVERSE_KL] = _expect(share, c[Coef.REVERSE_KL] + moved, stats.dtype)


def _mean_gap(c: dict, high: Tensor, shard: Shard) -> Tensor:
    """Mean over all ids of z - high (n,), from the shards' means relative to their own maxima."""
    gap = c[Coef.MEAN_GAP] + (c[Coef.STUDENT_MAX] - high)
    gap = gap.masked_fill(c[Coef.STUDENT_MAX] == -math.inf, -math.inf)  # all of its ids excluded
    sums = [
        ours * (end - low) for ours, (low, end) in zip(gap, pairwise(shard.bounds)) if end > low
    ]
    return torch.stack(sums).sum(0) / shard.vocab_size


def _normaliser(high: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum and log-sum (n,) of the whole rows, and the log of each shard's share (R, n)."""
    top = high.amax(0)
    log_mass = (high - top.masked_fill(top == -math.inf, 0.0)) + log_sum
    total = log_mass.logsumexp(0)
    return top, total, log_mass - total


def _label(log_prob: Tensor, log_share: Tensor) -> Tensor:
    """The label's log-prob (n,) from the one shard that has it; NaN where none has."""
    known = log_prob + log_share
    return known.nansum(0).masked_fill(known.isnan().all(0), math.nan)


def _expect(log_share: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """sum over shards of share * value, with 0 * anything = 0 in the working precision."""
    share = log_share.exp()
    return torch.where(share.to(dtype) == 0, 0.0, share * value).sum(0)
