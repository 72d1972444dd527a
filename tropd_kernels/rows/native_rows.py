"""The row engine in C++ (`csrc/`): passes over the vocabulary there, the rule on rows in `rule`.

The gradient overwrites the logits where it is told to, in float32 or, at half the stride, in
bfloat16. float16 logits are upcast, a chunk at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..native import row_contiguous
from ..objectives import TokenRule
from . import torch_rows
from .layout import Coef, LogitTransform, Matrices, RowBatch, RowOptions, Stat, matrices
from .rule import SUMS, Gate, Sums, apply_rule, as_matrix, forward_kl, gate, rows_with_sums
from .topk_teacher import topk_teacher_ids, topk_teacher_statistics
from .torch_rows import on_top_k, sum_terms, transform

ops = torch.ops.tropd_native

#: Order of csrc/rows.h's enumeration of generators.
GENERATORS = (
    None, "jsd", "skew_forward", "skew_reverse", "topk_jsd", "alpha", "chi2", "total_variation",
    "todi", "mopd", "akl",
)  # fmt: skip


def forward(batch: RowBatch, options: RowOptions, into: Matrices | None = None) -> Matrices:
    """stats (Stat, n) and coefs (Coef, n) of the chunk."""
    rule, sides = options.rule, _sides(batch, options)
    stats, coefs = _statistics(batch, sides, into)
    if batch.teacher is None:
        topk_teacher_statistics(batch, stats)
    gated = gate(stats, batch, options)
    sums = _sums(batch, options, sides, stats, coefs, gated)
    apply_rule(stats, coefs, gated, sums, batch, options)
    if batch.teacher is None and sums is not None:
        stats[Stat.FORWARD_KL] = forward_kl(sums, rule)[0]
    return stats, coefs


def entropy(batch: RowBatch, options: RowOptions) -> Tensor:
    """H(p) (n,) alone, for rules that rank the batch by it."""
    return _statistics(batch, _sides(batch, options))[0][Stat.ENTROPY]


def gradient(batch: RowBatch, coefs: Tensor, options: RowOptions, out: Tensor) -> None:
    """Writes d_logits (n, V) into `out`, which may be `batch.student`'s own memory."""
    rule, sides = options.rule, _sides(batch, options, for_gradient=True)
    given = added = None
    if batch.ids is not None and rule.uses_sums:
        given, lq, lp = _given(batch, options, coefs)
        added = on_top_k(lp, lq, coefs.unsqueeze(-1), rule)
        given = given.masked_fill(lq == -math.inf, -1)  # which the kernel passes over
        added = added.contiguous()
    kind, parameter = (rule.generator, rule.divergence_parameter) if rule.generator else (None, 0.5)
    direct = out.dtype in (torch.float32, torch.bfloat16, torch.float64)
    target = out if direct else torch.empty_like(out, dtype=coefs.dtype)
    ops.gradient(
        *sides, batch.labels, coefs, given, added, target, rule.uses_top_k,
        GENERATORS.index(kind), parameter,
    )  # fmt: skip
    if not direct:
        out.copy_(target)


def column_sums(d_logits: Tensor, hidden: Tensor) -> Tensor:
    """(3, V) of d_logits (n, V) and hidden (2, n), as in `torch_rows`."""
    sums = hidden.new_empty((3, d_logits.shape[1]))
    ops.column_sums(d_logits, hidden.contiguous(), sums)
    return sums


def row_squares(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows,), as in `torch_rows`."""
    if torch.promote_types(matrix.dtype, torch.float32) != dtype or matrix.dtype == torch.float16:
        return torch_rows.row_squares(matrix, dtype)
    squares = matrix.new_empty(matrix.shape[:1], dtype=dtype)
    ops.row_squares(row_contiguous(matrix), squares)
    return squares


def statistics(batch: RowBatch, options: RowOptions, into: Matrices | None = None) -> Matrices:
    """Of a part of each row; see `torch_rows.statistics`."""
    stats, coefs = _statistics(batch, _sides(batch, options), into)
    sides = ((batch.student, options.student), (batch.teacher, options.teacher))
    for (logits, how), at in zip(sides, (Coef.STUDENT_MAX, Coef.TEACHER_MAX), strict=True):
        rows = (coefs[at] == -math.inf).nonzero().squeeze(-1)
        if logits is not None and rows.numel():
            # The kernel's maximum passes over NaN: are the ids excluded, or is it a defect?
            z = transform(logits[rows], how, coefs.dtype)
            coefs[at + 1, rows] = torch.where(z.isnan().any(-1), math.nan, -math.inf)
    return stats, coefs


def sums(batch: RowBatch, options: RowOptions, gated: Gate, stats: Tensor, coefs: Tensor) -> Tensor:
    """Of a part of each row; see `torch_rows.sums`."""
    rule = options.rule
    if batch.teacher is None:
        _, lq, lp = _given(batch, options, coefs)
        return as_matrix(sum_terms(lp, lq, lq > -math.inf, rule, dense=False))
    needed = rows_with_sums(gated, rule)
    return _dense_sums(batch, _sides(batch, options), needed, coefs, rule, given=True)


def _statistics(batch: RowBatch, sides, into: Matrices | None = None) -> Matrices:
    stats, coefs = matrices(batch, into)
    ops.statistics(*sides, batch.labels, stats, coefs)
    return stats, coefs


def _sides(batch: RowBatch, options: RowOptions, for_gradient: bool = False) -> tuple:
    """Logits, biases and scales, as the operators take them."""
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


def _sums(
    batch: RowBatch, options: RowOptions, sides, stats: Tensor, coefs: Tensor, gated: Gate
) -> Sums | None:
    """The sums that the rule needs, made only for the rows that need them."""
    rule = options.rule
    if batch.teacher is not None:
        coefs[Coef.THRESHOLD] = -math.inf
    if not rule.uses_sums:
        return None
    if batch.teacher is None:
        _, lq, lp = _given(batch, options, coefs)
        sums = sum_terms(lp, lq, lq > -math.inf, rule, dense=False)
        unknown = torch.zeros_like(batch.labels, dtype=torch.bool)
    elif rule.sums_from_statistics:
        one, zero = torch.ones_like(stats[0]), torch.zeros_like(stats[0])
        return Sums(one, one, zero, zero, zero, stats[Stat.FORWARD_KL])
    else:
        needed = rows_with_sums(gated, rule)
        made = _dense_sums(batch, sides, needed, coefs, rule)
        sums = Sums(**dict(zip(SUMS, made.unbind(), strict=True)))
        if not rule.uses_top_k:
            return sums
        unknown = ~needed
    stats[Stat.TEACHER_TOPK_MASS] = sums.teacher_mass.masked_fill(unknown, math.nan)
    stats[Stat.STUDENT_TOPK_MASS] = sums.student_mass.masked_fill(unknown, math.nan)
    return sums


def _dense_sums(
    batch: RowBatch, sides, needed: Tensor, coefs: Tensor, rule: TokenRule, given: bool = False
) -> Tensor:
    """(len(SUMS), n), in the order of csrc/rows.h; K by its k-th id, or as THRESHOLD gives it."""
    made = coefs.new_empty((len(SUMS), coefs.shape[1]))
    ops.sums(
        *sides, batch.labels, needed, coefs, made, rule.top_k if rule.uses_top_k else 0,
        rule.sums_only_on_k, GENERATORS.index(_divergence(rule)),
        rule.divergence_parameter if _divergence(rule) else 0.5, given,
    )  # fmt: skip
    return made


def _divergence(rule) -> str | None:
    return "akl" if rule.divergence == "akl" else rule.generator


def _given(batch: RowBatch, options: RowOptions, coefs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ids (in range), lq (-inf off K) and lp (n, K) of a top-k teacher's K."""
    log_probs = batch.topk_log_probs.to(coefs.dtype)
    ids, lq = topk_teacher_ids(batch.ids, log_probs, options.rule.top_k, batch.student.shape[1])
    how = options.student
    at = None if how.bias is None else how.bias[ids]
    logits = transform(batch.student.gather(1, ids), how, coefs.dtype, bias=at)
    high, log_sum = (coefs[row].unsqueeze(-1) for row in (Coef.STUDENT_MAX, Coef.STUDENT_LOG_SUM))
    return ids.contiguous(), lq, (logits - high) - log_sum
