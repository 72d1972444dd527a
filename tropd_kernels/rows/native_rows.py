"""The row engine in C++: `csrc/` makes the passes over the vocabulary.

The gradient may overwrite the logits, in float32 or, at half the stride, in bfloat16. float16
logits are upcast, one chunk at a time.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..native import GENERATORS, build_command, row_contiguous
from ..objectives import TokenRule
from .engine import RowEngine, Statistics
from .layout import Coef, LogitTransform, Matrices, RowBatch, RowOptions, matrices
from .rule import SUMS, Sums
from .topk_teacher import topk_teacher_ids
from .torch_rows import mass_off, on_top_k, row_squares, topk_sums, transform

ops = torch.ops.tropd_native


class NativeRows(RowEngine):
    """The passes of `rows.engine` in C++."""

    native_products = keeps_buffers = True

    def statistics(
        self, batch: RowBatch, options: RowOptions, into: Matrices | None = None
    ) -> Statistics:
        stats, coefs = matrices(batch, into)
        sides = _sides(batch, options)
        ops.statistics(*sides, batch.labels, stats, coefs, options.rule.label_smoothing > 0)
        if options.sharded:
            _mark_undefined(batch, options, coefs)
        return Statistics(stats, coefs, sides)

    def sums(
        self, batch: RowBatch, options: RowOptions, needed: Tensor | None, found: Statistics
    ) -> Sums:
        rule, coefs = options.rule, found.coefs
        if needed is None:
            ids, lq, lp = _topk_ids(batch, options, coefs)
            on_k = lq > -math.inf
            high, log_sum = coefs[Coef.STUDENT_MAX], coefs[Coef.STUDENT_LOG_SUM]
            tail = partial(mass_off, batch.student, options.student, high, log_sum, ids, on_k)
            return topk_sums(lp, lq, on_k, rule, tail)
        made = coefs.new_empty((len(SUMS), coefs.shape[1]))  # in the order of csrc/rows.h
        ops.sums(
            *found.read, batch.labels, needed, coefs, made, rule.top_k if rule.uses_top_k else 0,
            rule.sums_only_on_k, *_generator(rule), options.sharded, rule.value_on_renormalized,
        )  # fmt: skip
        return Sums(*made)

    def gradient(self, batch: RowBatch, coefs: Tensor, options: RowOptions, out: Tensor) -> None:
        rule, sides = options.rule, _sides(batch, options, for_gradient=True)
        ids = added = None
        if batch.ids is not None and rule.uses_sums:
            ids, lq, lp = _topk_ids(batch, options, coefs)
            added = on_top_k(lp, lq, coefs.unsqueeze(-1), rule)
            ids = ids.masked_fill(lq == -math.inf, -1)  # the kernel skips negative ids
            added = added.contiguous()
        direct = out.dtype in (torch.float32, torch.bfloat16, torch.float64)
        target = out if direct else torch.empty_like(out, dtype=coefs.dtype)
        ops.gradient(
            *sides, batch.labels, coefs, ids, added, target, rule.uses_top_k, *_generator(rule),
        )  # fmt: skip
        if not direct:
            out.copy_(target)

    def column_sums(self, d_logits: Tensor, hidden: Tensor) -> Tensor:
        sums = hidden.new_empty((3, d_logits.shape[1]))
        ops.column_sums(d_logits, hidden.contiguous(), sums)
        return sums

    def row_squares(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(matrix.dtype, torch.float32)
        if wide != dtype or matrix.dtype == torch.float16:
            return row_squares(matrix, dtype)
        squares = matrix.new_empty(matrix.shape[:1], dtype=dtype)
        ops.row_squares(row_contiguous(matrix), squares)
        return squares


def _mark_undefined(batch: RowBatch, options: RowOptions, coefs: Tensor) -> None:
    """The kernel's maximum skips NaN. Where it is -inf, sets the log-sum to -inf if all ids are
    excluded, to NaN if the logits hold NaN."""
    sides = ((batch.student, options.student), (batch.teacher, options.teacher))
    for (logits, how), at in zip(sides, (Coef.STUDENT_MAX, Coef.TEACHER_MAX), strict=True):
        rows = (coefs[at] == -math.inf).nonzero().squeeze(-1)
        if logits is not None and rows.numel():
            z = transform(logits[rows], how, coefs.dtype)
            coefs[at + 1, rows] = torch.where(z.isnan().any(-1), math.nan, -math.inf)


def _sides(batch: RowBatch, options: RowOptions, for_gradient: bool = False) -> tuple:
    """Logits, biases and scales as the operators take them."""
    student = _readable(batch.student)
    dtype = torch.promote_types(student.dtype, torch.float32)
    teacher = batch.teacher
    if teacher is not None and for_gradient and not options.rule.reads_teacher_rows:
        teacher = None
    if teacher is not None:
        wrong = (teacher.dtype == torch.float64) != (dtype == torch.float64)
        teacher = _readable(teacher.to(dtype) if wrong else teacher)
    z, t = options.student, options.teacher
    scales = [z.scale, z.softcap or 0.0, t.scale, t.softcap or 0.0, z.temperature]
    return student, teacher, _bias(z, dtype), _bias(t, dtype), scales


def _readable(logits: Tensor) -> Tensor:
    if logits.dtype == torch.float16:
        logits = logits.float()
    return row_contiguous(logits)


def _bias(how: LogitTransform, dtype: torch.dtype) -> Tensor | None:
    return None if how.bias is None else how.bias.to(dtype).contiguous()


def _generator(rule: TokenRule) -> tuple[int, float]:
    """The number in csrc/ of the rule's generator, and its parameter."""
    kind = "akl" if rule.weighs_by_gaps else rule.generator or "none"
    if kind not in GENERATORS:
        raise NotImplementedError(
            f"csrc/ as it is built here has no divergence {kind!r}; to build it: {build_command()}"
        )
    return GENERATORS.index(kind), rule.divergence_parameter


def _topk_ids(batch: RowBatch, options: RowOptions, coefs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids (in range), lq (-inf off K) and lp (n, K) of a top-k teacher's K."""
    ids, lq = batch.topk
    k, width = options.rule.top_k, batch.student.shape[1]
    ids, lq = topk_teacher_ids(ids, lq.to(coefs.dtype), k, width)
    how = options.student
    at = None if how.bias is None else how.bias[ids]
    logits = transform(batch.student.gather(1, ids), how, coefs.dtype, bias=at)
    high, log_sum = (coefs[row].unsqueeze(-1) for row in (Coef.STUDENT_MAX, Coef.STUDENT_LOG_SUM))
    return ids.contiguous(), lq, (logits - high) - log_sum
