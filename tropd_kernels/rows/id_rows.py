"""The row engine of a set K that is not the teacher's: the student's own top-k, or given ids.

The teacher is dense, so it can score any id. The backend's engine reads both rows once, and its
normalisers give the teacher's log-probs at the ids of K. With these the engine makes the sums and
the gradient as for a top-k teacher. Three things differ from a top-k teacher: K may hold ids that
the teacher excludes, where a reverse KL is infinite; the teacher's mass off K is summed; the
statistics are those of the whole distribution.

The student's ids are exactly k. Of those that tie for the last places a CPU takes the lowest, a GPU
any. A backward that recomputes the logits finds the ids again. They are the same, since the logits
are the same to the bit: they are kept, or come from products of the same height (see `loss.plan`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .engine import RowEngine, Statistics
from .layout import Coef, LogitTransform, Matrices, RowBatch, RowOptions, Stat
from .rule import Sums
from .sharded import ShardRows
from .sharded_search import student_top_k
from .top_k import largest_ids
from .topk_teacher import repeats
from .torch_rows import blocks, mass_off, transform

if TYPE_CHECKING:
    from ..parallel import Shard


class IdRows(RowEngine):
    """A row engine for the ids that the rule's `top_k_ids` names, on whole rows or on a shard's."""

    def __init__(self, engine: RowEngine, shard: Shard | None):
        self.engine, self.shard = engine, shard
        #: Sums, and statistics, of the whole rows.
        self.whole = engine if shard is None else ShardRows(engine, shard)
        self.native_products, self.pads_rows = engine.native_products, engine.pads_rows
        self.keeps_buffers = engine.keeps_buffers
        self.last: tuple[RowBatch, RowBatch] | None = None

    def scratch_bytes(self, rows: int, vocab_size: int, itemsize: int, device_type: str) -> int:
        return self.engine.scratch_bytes(rows, vocab_size, itemsize, device_type)

    def statistics(
        self, batch: RowBatch, options: RowOptions, into: Matrices | None = None
    ) -> Statistics:
        part = replace(batch, labels=self._labels(batch), ids=None)
        found = self.whole.statistics(part, _with_normalisers(options), into)
        if options.rule.top_k_ids == "given" and batch.ids is not None:
            twice = repeats(batch.ids, None, self._vocab_size(batch)).any(-1)
            found.stats[Stat.TEACHER_LOG_PROB].masked_fill_(twice, math.nan)
        return found

    def sums(
        self, batch: RowBatch, options: RowOptions, needed: Tensor | None, found: Statistics
    ) -> Sums:
        rule, (stats, coefs, _) = options.rule, found
        part = self._scored(batch, options, coefs)
        part = replace(part, teacher_entropy=stats[Stat.TEACHER_ENTROPY])
        sums = self.whole.sums(part, _with_normalisers(options), None, found)
        ids, log_q = part.topk
        at, on_k = ids.clamp_min(0), log_q > -math.inf
        # Is there an id that the student does not exclude, and one of these that the teacher does?
        live = on_k & (_picked(part.student, options.student, at, coefs.dtype) > -math.inf)
        facts = [live.any(-1), (live & (log_q == _lowest(log_q))).any(-1)]
        if rule.top_k_tail == "bucket":
            assert batch.teacher is not None
            normalisers = coefs[Coef.TEACHER_MAX], coefs[Coef.TEACHER_LOG_SUM]
            facts.append(mass_off(batch.teacher, options.teacher, *normalisers, at, on_k))
        some, excluded, *tail = self._total(torch.stack([each.to(coefs.dtype) for each in facts]))
        if tail:
            sums.teacher_tail = tail[0]
        if rule.generator in ("topk_reverse_kl", "mopd"):  # with p (lp - lq) of every id of K
            infinite = excluded > 0
            if rule.top_k_tail.startswith("renormalize"):  # divided by a mass that is 0
                infinite |= (some > 0) & (sums.teacher_mass == 0)
            sums.value = sums.terms[0].masked_fill(infinite, math.inf)
        return sums

    def gradient(self, batch: RowBatch, coefs: Tensor, options: RowOptions, out: Tensor) -> None:
        part = self._scored(batch, options, coefs)
        self.engine.gradient(part, coefs, _with_normalisers(options), out)

    def column_sums(self, d_logits: Tensor, hidden: Tensor) -> Tensor:
        return self.engine.column_sums(d_logits, hidden)

    def row_squares(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        return self.engine.row_squares(matrix, dtype)

    def _scored(self, batch: RowBatch, options: RowOptions, coefs: Tensor) -> RowBatch:
        """The batch as that of a top-k teacher whose ids are K, with columns of this shard: -1 at
        padding and where another shard has the id, the lowest number where the teacher excludes
        it."""
        if self.last is not None and self.last[0] is batch:
            return self.last[1]
        assert batch.teacher is not None
        ids = self._ids(batch, options, coefs)
        inside = (ids >= 0) & (ids < batch.student.shape[1])
        at = ids.masked_fill(~inside, 0)
        t = _picked(batch.teacher, options.teacher, at, coefs.dtype)
        high, log_sum = (
            coefs[row].unsqueeze(-1) for row in (Coef.TEACHER_MAX, Coef.TEACHER_LOG_SUM)
        )
        log_q = (t - high) - log_sum
        log_q = log_q.clamp_min(_lowest(log_q)).masked_fill(~inside, -math.inf)
        scored = replace(
            batch,
            teacher=None,
            labels=self._labels(batch),
            ids=ids.masked_fill(~inside, -1),
            topk_log_probs=log_q,
        )
        self.last = batch, scored
        return scored

    def _ids(self, batch: RowBatch, options: RowOptions, coefs: Tensor) -> Tensor:
        """K (n, K) as columns of this shard, out of range at padding and where others have it."""
        if options.rule.top_k_ids == "given":
            assert batch.ids is not None
            return batch.ids if self.shard is None else batch.ids - self.shard.low
        k = options.rule.top_k
        assert k is not None
        if self.shard is not None:
            return student_top_k(self.shard, batch, options, coefs, k)
        k = min(k, batch.student.shape[1])
        found = batch.labels.new_empty((batch.student.shape[0], k))
        for rows, part in blocks(batch):
            z = transform(part.student, options.student, coefs.dtype)
            ids = largest_ids(z, k)
            found[rows] = ids.masked_fill(z.gather(-1, ids) == -math.inf, -1)
        return found

    def _labels(self, batch: RowBatch) -> Tensor:
        return batch.labels if self.shard is None else batch.labels - self.shard.low

    def _vocab_size(self, batch: RowBatch) -> int:
        return batch.student.shape[1] if self.shard is None else self.shard.vocab_size

    def _total(self, share: Tensor) -> Tensor:
        """The sum over shards of numbers a row (m, n)."""
        if self.shard is None:
            return share
        return self.shard.gather(share).double().sum(0).to(share.dtype)


def _with_normalisers(options: RowOptions) -> RowOptions:
    """With statistics that give the normalisers, and later passes that read them."""
    return replace(options, sharded=True)


def _picked(logits: Tensor, how: LogitTransform, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Transformed logits (n, K) of these ids (n, K)."""
    at = None if how.bias is None else how.bias[ids]
    return transform(logits.gather(1, ids), how, dtype, bias=at)


def _lowest(log_probs: Tensor) -> float:
    return torch.finfo(log_probs.dtype).min
