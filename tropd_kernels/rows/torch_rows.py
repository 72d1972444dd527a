"""The row engine in PyTorch: the readable twin of the Triton kernels, and the CPU's fallback.

It makes all passes over one block of a few rows before those over the next, so that temporaries
stay in the cache, and within `scratch_bytes`, which the chunk plan counts.

0 log 0: an id of probability 0 (in the working precision) contributes nothing, whatever its
probability on the other side; `_dot` drops those 0 * inf. A NaN in the logits shows in the label's
log-prob.

On a CPU reading a flag costs nothing, so rows and entries that need no work are skipped. On a GPU
it would be a host sync, so everything is computed and masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial

import torch
from torch import Tensor

from ..objectives import TokenRule
from .engine import RowEngine, Statistics
from .generators import generator_terms
from .layout import (
    FIRST_WEIGHT,
    Coef,
    LogitTransform,
    Matrices,
    RowBatch,
    RowOptions,
    Stat,
    matrices,
)
from .rule import SUMS, Sums, as_matrix, teacher_tail
from .top_k import columns_reaching, kth_largest, with_margin
from .topk_teacher import topk_teacher_ids

#: Elements of one temporary of a block: 4 MiB of float32 on a CPU; enough to fill a GPU elsewhere.
BLOCK_ELEMENTS = {"cpu": 1 << 20}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 25
#: The most temporaries of a block that are alive at once.
TEMPORARIES = 12


def block_rows(vocab_size: int, device_type: str) -> int:
    elements = BLOCK_ELEMENTS.get(device_type, BLOCK_ELEMENTS_ELSEWHERE)
    return max(1, elements // vocab_size)


class TorchRows(RowEngine):
    """The passes of `rows.engine` in PyTorch."""

    def scratch_bytes(self, rows: int, vocab_size: int, itemsize: int, device_type: str) -> int:
        return TEMPORARIES * min(rows, block_rows(vocab_size, device_type)) * vocab_size * itemsize

    def forward(
        self, batch: RowBatch, options: RowOptions, into: Matrices | None = None
    ) -> Matrices:
        """Block by block."""
        stats, coefs = matrices(batch, into)
        for rows, part in blocks(batch):
            super().forward(part, options, (stats[:, rows], coefs[:, rows]))
        return stats, coefs

    def statistics(
        self, batch: RowBatch, options: RowOptions, into: Matrices | None = None
    ) -> Statistics:
        stats, coefs = matrices(batch, into)
        read = None
        for rows, part in blocks(batch):
            s, c = stats[:, rows], coefs[:, rows]
            log_probs = _statistics(part, options, s, c)
            if options.sharded:
                _of_part(part, c)
            elif part is batch:
                read = log_probs
        return Statistics(stats, coefs, read)

    def sums(
        self, batch: RowBatch, options: RowOptions, needed: Tensor | None, found: Statistics
    ) -> Sums:
        if options.sharded:
            return _sums_of_part(batch, options, needed, found.coefs)
        lp, lq = found.read
        if needed is None:
            ids, lq, on_k = _topk_ids(batch, options.rule.top_k, lp.shape[-1], lp.dtype)
            return topk_sums(
                lp.gather(-1, ids), lq, on_k, options.rule, partial(_mass_off, lp, ids, on_k)
            )
        return _dense_sums(lp, lq, options, needed, found.coefs)

    def gradient(self, batch: RowBatch, coefs: Tensor, options: RowOptions, out: Tensor) -> None:
        for rows, part in blocks(batch):
            _gradient(part, coefs[:, rows], options, out[rows])

    def column_sums(self, d_logits: Tensor, hidden: Tensor) -> Tensor:
        n, v = d_logits.shape
        sums = hidden.new_zeros((3, v))
        height = block_rows(v, d_logits.device.type)
        for low in range(0, n, height):
            part = d_logits[low : low + height].to(hidden.dtype)
            weights = hidden[:, low : low + height]
            sums[2] += weights[1] @ part
            part = part.square()
            sums[0] += part.sum(0)
            sums[1] += weights[0] @ part
        return sums

    def row_squares(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        return row_squares(matrix, dtype)


def row_squares(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """||row||^2 (rows,) of a matrix, in `dtype`."""
    if matrix.dtype == dtype or matrix.device.type != "cpu":
        return torch.linalg.vector_norm(matrix, dim=1, dtype=dtype).square()
    # torch would copy the whole matrix to `dtype`.
    parts = matrix.split(block_rows(matrix.shape[1], "cpu"))
    return torch.cat([torch.linalg.vector_norm(part.to(dtype), dim=1) for part in parts]).square()


def transform(
    logits: Tensor, how: LogitTransform, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """Transformed logits; the input itself where there is nothing to do. bias: replaces `how.bias`,
    for logits that were picked from a row."""
    z = logits.to(dtype)
    bias = how.bias if bias is None else bias
    if bias is not None:
        z = z + bias.to(dtype)
    if how.scale != 1.0:
        z = z * how.scale
    if how.softcap is not None:
        z = (z / how.softcap).tanh_().mul_(how.softcap)
    if how.temperature != 1.0:
        z = z / how.temperature
    return z


# --- forward passes over one block -------------------------------------------------------------


def _log_probs(logits: Tensor, how: LogitTransform, c: Tensor, at: Coef) -> Tensor:
    """(rows, V). Writes the maxima into row `at` of c and the log-sums into the next. The gradient
    pass of whole rows makes log-probs anew rather than use these."""
    log_probs, c[at], c[at + 1] = _normalised(transform(logits, how, c.dtype))
    return log_probs


def _normalised(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (rows, V), maxima and log-sums (rows,). The maximum has to be subtracted first, and
    the logarithm last.

    On a CPU torch's own log_softmax keeps one running sum per lane of a vector register: at 151,936
    ids and 8 lanes the loss is off by 1e-5. `sum` adds in pairs."""
    if z.device.type != "cpu":
        log_probs = z.log_softmax(-1)
        return log_probs, z.amax(-1), -log_probs.amax(-1)
    high = z.amax(-1, keepdim=True)
    shifted = z - high
    log_sum = shifted.exp().sum(-1, keepdim=True).log_()
    return shifted.sub_(log_sum), high.squeeze(-1), log_sum.squeeze(-1)


def log_softmax(z: Tensor) -> Tensor:
    """Along a row."""
    return z.log_softmax(-1) if z.device.type != "cpu" else _normalised(z)[0]


def softmax(z: Tensor) -> Tensor:
    """Along a row, with the same sum as `log_softmax`."""
    if z.device.type != "cpu":
        return z.softmax(-1)
    p = (z - z.amax(-1, keepdim=True)).exp_()
    return p.div_(p.sum(-1, keepdim=True))


def _log_p(z: Tensor, c: Tensor, options: RowOptions) -> Tensor:
    """From transformed student logits. A part of a row takes the normalisers in c (Coef, n, 1)."""
    if options.sharded:
        return (z - c[Coef.STUDENT_MAX]) - c[Coef.STUDENT_LOG_SUM]
    return log_softmax(z)


def _log_q(logits: Tensor, c: Tensor, options: RowOptions) -> Tensor:
    """The same from raw teacher logits."""
    t = transform(logits, options.teacher, c.dtype)
    if options.sharded:
        return (t - c[Coef.TEACHER_MAX]) - c[Coef.TEACHER_LOG_SUM]
    return log_softmax(t)


def _statistics(
    part: RowBatch, options: RowOptions, s: Tensor, c: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Fills s and c up to REVERSE_KL; returns lp and lq (None: not dense)."""
    lp = _log_probs(part.student, options.student, c, Coef.STUDENT_MAX)
    p = lp.exp()
    s[Stat.LOG_PROB] = _pick(lp, part.labels)
    s[Stat.ENTROPY] = c[Coef.ENTROPY] = -_dot(p, lp)
    if options.rule.label_smoothing:
        c[Coef.MEAN_GAP] = lp.mean(-1) + c[Coef.STUDENT_LOG_SUM]
    if part.teacher is None:
        return lp, None
    lq = _log_probs(part.teacher, options.teacher, c, Coef.TEACHER_MAX)
    q = lq.exp()
    s[Stat.TEACHER_LOG_PROB] = _pick(lq, part.labels)
    s[Stat.TEACHER_ENTROPY] = -_dot(q, lq)
    difference = lp - lq  # E_p[lp] - E_p[lq] would cancel where the two agree
    s[Stat.REVERSE_KL] = _dot(p, difference)
    if options.rule.uses_reverse_kl:
        c[Coef.REVERSE_KL] = s[Stat.REVERSE_KL] / p.sum(-1)
    s[Stat.FORWARD_KL] = -_dot(q, difference)
    return lp, lq


def _of_part(part: RowBatch, c: Tensor) -> None:
    """Turns c into what the other engines give for a part of a row: log-sums of -inf where all of
    its ids are excluded, and the mean log-ratio relative to the maxima, without the log-sums."""
    for at in (Coef.STUDENT_MAX, Coef.TEACHER_MAX)[: 1 if part.teacher is None else 2]:
        c[at + 1] = torch.where(c[at] == -math.inf, -math.inf, c[at + 1])
    c[Coef.REVERSE_KL] += c[Coef.STUDENT_LOG_SUM] - c[Coef.TEACHER_LOG_SUM]


def _dense_sums(lp: Tensor, lq: Tensor, options: RowOptions, needed: Tensor, c: Tensor) -> Sums:
    """For the rows that need them. Writes THRESHOLD into c."""
    rule = options.rule
    # Picking rows costs a host sync on a GPU, and a copy.
    some = lp.device.type == "cpu" and not bool(needed.all())
    if some:
        lp, lq = lp[needed], lq[needed]
    threshold = None
    if rule.weighs_by_gaps:  # its gradient covers more than the head, so c keeps -inf
        threshold = _head_threshold(lq, rule.divergence_parameter)
    elif rule.uses_top_k:
        assert rule.top_k is not None
        threshold = with_margin(_kth_largest(lq, rule.top_k), options.teacher.softcap)
        c[Coef.THRESHOLD, needed if some else slice(None)] = threshold
    sums = _dense_terms(lp, lq, threshold, rule)
    return _spread(sums, needed) if some else sums


def _sums_of_part(
    batch: RowBatch, options: RowOptions, needed: Tensor | None, coefs: Tensor
) -> Sums:
    """The share of a part of each row in its sums, by the normalisers and the THRESHOLD of the
    whole rows."""
    rule, on_cpu = options.rule, coefs.device.type == "cpu"
    made = coefs.new_zeros((len(SUMS), coefs.shape[1]))
    for rows, part in blocks(batch):
        picked: Tensor | slice = slice(None)
        if needed is not None and on_cpu:
            picked = needed[rows].nonzero().squeeze(-1)
        c = coefs[:, rows][:, picked].unsqueeze(-1)
        lp = _log_p(transform(part.student[picked], options.student, c.dtype), c, options)
        if part.teacher is None:
            ids, lq, on_k = _topk_ids(part, rule.top_k, lp.shape[-1], c.dtype)
            found = topk_sums(lp.gather(-1, ids), lq, on_k, rule, partial(_mass_off, lp, ids, on_k))
        else:
            masked = rule.uses_top_k or rule.weighs_by_gaps
            lq = _log_q(part.teacher[picked], c, options)
            threshold = c[Coef.THRESHOLD].squeeze(-1) if masked else None
            found = _dense_terms(lp, lq, threshold, rule)
        made[:, rows][:, picked] = as_matrix(found)
    return Sums(*made)


def _dense_terms(lp: Tensor, lq: Tensor, threshold: Tensor | None, rule: TokenRule) -> Sums:
    """Sums over the entries that reach the row's threshold; None: over all."""
    if threshold is None:
        return sum_terms(lp, lq, None, rule)
    if rule.uses_top_k and rule.sums_only_on_k and lp.device.type == "cpu":
        columns = columns_reaching(lq, threshold)
        lp, lq = lp.gather(-1, columns), lq.gather(-1, columns)
    return sum_terms(lp, lq, lq >= threshold.unsqueeze(-1), rule)


def topk_sums(
    lp: Tensor, lq: Tensor, on_k: Tensor, rule: TokenRule, student_tail: Callable[[], Tensor]
) -> Sums:
    """Sums (n,) over a top-k teacher's ids (n, K). student_tail: gives the mass outside K."""
    sums = sum_terms(lp, lq, on_k, rule)
    if rule.top_k_tail == "bucket":
        sums.student_tail = student_tail()
        sums.teacher_tail = teacher_tail(sums.teacher_mass, rule)
    return sums


def mass_off(
    logits: Tensor, how: LogitTransform, high: Tensor, log_sum: Tensor, ids: Tensor, on_k: Tensor
) -> Tensor:
    """The mass (n,) of logits (n, V), with the normalisers `high` and `log_sum`, outside the ids
    (n, K) that are on K."""
    tails = []
    size = block_rows(logits.shape[1], logits.device.type)
    per_row = (logits, high.unsqueeze(-1), log_sum.unsqueeze(-1), ids, on_k)
    for z, top, total, *on in zip(*(each.split(size) for each in per_row), strict=True):
        tails.append(_mass_off((transform(z, how, high.dtype) - top) - total, *on))
    return torch.cat(tails)


def sum_terms(lp: Tensor, lq: Tensor, on_k: Tensor | None, rule: TokenRule) -> Sums:
    """Sums over the entries on K, and the tails over the others; None: over all."""
    p, q = lp.exp(), lq.exp()
    p_k, q_k = (p, q) if on_k is None else (p.where(on_k, 0.0), q.where(on_k, 0.0))
    student_mass, teacher_mass = p_k.sum(-1), q_k.sum(-1)
    lp_k = lp if on_k is None else lp.where(on_k, -math.inf)
    sums = Sums(
        teacher_mass,
        student_mass,
        # Summed off K: a difference from 1 has no digits left where the mass is near 1.
        (q - q_k).sum(-1),
        (p - p_k).sum(-1),
        lp_k.logsumexp(-1) if rule.top_k_tail == "renormalize_both" else student_mass.log(),
        _dot(q_k, lq - lp),
    )
    if rule.generator:
        value, slope = generator_terms(rule.generator, rule.divergence_parameter, lp, lq)
        if on_k is not None:
            value, slope = value.where(on_k, 0.0), slope.where(on_k, 0.0)
        sums.value, sums.slope = value.sum(-1), slope.sum(-1)
        if rule.value_on_renormalized:
            sums.value = _dot(softmax(lp_k), lp - lq)
    elif rule.weighs_by_gaps:
        assert on_k is not None
        gap = (p - q).abs()
        sums.value, sums.slope = gap.where(on_k, 0.0).sum(-1), gap.where(~on_k, 0.0).sum(-1)
    return sums


def _spread(sums: Sums, rows: Tensor) -> Sums:
    """From the picked rows to all rows. The others ignore their sums: masses of 1, and zeros."""
    spread = {}
    for field in fields(sums):
        value = getattr(sums, field.name)
        if value is not None:
            filler = 1.0 if field.name.endswith("_mass") else 0.0
            whole = value.new_full(rows.shape, filler)
            spread[field.name] = whole.masked_scatter_(rows, value)
    return Sums(**spread)


def _head_threshold(lq: Tensor, mass: float) -> Tensor:
    """The smallest log-prob in the smallest set of likeliest ids with at least `mass`, (rows,)."""
    ordered = lq.sort(dim=-1, descending=True).values
    q = ordered.exp()
    before = q.cumsum(-1) - q
    return ordered.where(before < mass, math.inf).amin(-1)


# --- the gradient pass over one block ----------------------------------------------------------


def _gradient(part: RowBatch, c: Tensor, options: RowOptions, out: Tensor) -> None:
    rule, on_cpu = options.rule, c.device.type == "cpu"
    needs_teacher = (c[[Coef.REVERSE, Coef.Q, Coef.GENERATOR]] != 0).any(0)
    needs_teacher |= c[Coef.P_TOP_K] != c[Coef.P]
    idle = (c[FIRST_WEIGHT:] == 0).all(0)
    c = c.unsqueeze(-1)
    if options.sharded:  # this engine forms log-ratios with the log-sums
        c = c.clone()
        c[Coef.REVERSE_KL] -= c[Coef.STUDENT_LOG_SUM] - c[Coef.TEACHER_LOG_SUM]
    z = transform(part.student, options.student, c.dtype)
    d = _log_p(z, c, options).exp_() if options.sharded else softmax(z)
    teacher = part.teacher if rule.reads_teacher_rows else None
    if teacher is not None and on_cpu and not bool(needs_teacher.any()):
        teacher = None
    if teacher is not None:
        picked = needs_teacher.nonzero().squeeze(-1) if on_cpu else slice(None)
        lq = _log_q(teacher[picked], c[:, picked], options)
    weight = c[Coef.P]
    if rule.uses_top_k and rule.p_differs_on_k:
        weight = weight.expand(d.shape).clone()
        if teacher is not None:
            on_k = lq >= c[Coef.THRESHOLD, picked]
            weight[picked] = torch.where(on_k, c[Coef.P_TOP_K, picked], weight[picked])
        elif part.ids is not None:
            ids, _, on_k = _topk_ids(part, rule.top_k, d.shape[-1], d.dtype)
            weight = torch.where(_is_on_k(ids, on_k, d), c[Coef.P_TOP_K], weight)
    if rule.entropy_coef:
        inner = _log_p(z, c, options).add_(c[Coef.ENTROPY]).where(d > 0, 0.0)
        weight = weight - c[Coef.ENTROPY_WEIGHT] * inner
    d *= weight
    if rule.label_smoothing:
        d -= c[Coef.UNIFORM]
    if teacher is not None:
        on_k_alone = rule.uses_top_k and not rule.uses_reverse_kl
        add = _add_on_top_k if on_k_alone and on_cpu else _add_teacher_terms
        add(d, _log_p(z[picked], c[:, picked], options), lq, c[:, picked], picked, rule)
    elif part.ids is not None and rule.uses_sums:
        ids, lq, on_k = _topk_ids(part, rule.top_k, d.shape[-1], d.dtype)
        lp = _log_p(z, c, options).gather(-1, ids)
        d.scatter_add_(-1, ids, on_top_k(lp, lq, c, rule).where(on_k, 0.0))
    labels = part.labels.unsqueeze(-1)
    inside = (labels >= 0) & (labels < d.shape[-1])
    d.scatter_add_(-1, labels.where(inside, 0), -c[Coef.LABEL].where(inside, 0.0))
    chain = options.student.scale / options.student.temperature
    if options.student.softcap is not None:  # 1 - tanh^2, from the capped logits
        tanh = z * (options.student.temperature / options.student.softcap)
        d *= 1 - tanh * tanh
    if chain != 1.0:
        d *= chain
    if not on_cpu or bool(idle.any()):  # rows without weight may hold anything, even NaN
        d.masked_fill_(idle.unsqueeze(-1), 0.0)
    out.copy_(d)


def _is_on_k(ids: Tensor, on_k: Tensor, like: Tensor) -> Tensor:
    """(n, V), bool, shaped like a row's block: the ids (n, K) that are on K."""
    counts = torch.zeros(like.shape, dtype=torch.int16, device=like.device)
    return counts.scatter_add_(-1, ids, on_k.to(torch.int16)) > 0  # padding adds nothing


def _mass_off(lp: Tensor, ids: Tensor, on_k: Tensor) -> Tensor:
    """(n,): the mass of lp (n, V) outside the ids (n, K) that are on K."""
    return lp.exp().masked_fill_(_is_on_k(ids, on_k, lp), 0.0).sum(-1)


def _add_teacher_terms(d: Tensor, lp: Tensor, lq: Tensor, c: Tensor, picked, rule) -> None:
    """The terms of the gradient that read the teacher's rows, on all ids."""
    p = lp.exp()
    more = on_top_k(lp, lq, c, rule)
    if rule.uses_top_k:
        more = more.where(lq >= c[Coef.THRESHOLD], 0.0)
    if rule.uses_reverse_kl:
        live = (c[Coef.REVERSE] != 0) & (p > 0)  # also keeps inf - inf of an infinite KL out
        more += (c[Coef.REVERSE] * p * (lp - lq - c[Coef.REVERSE_KL])).where(live, 0.0)
    d[picked] += more


def _add_on_top_k(d: Tensor, lp: Tensor, lq: Tensor, c: Tensor, picked, rule) -> None:
    """The same where all of these terms lie on K: only on its few ids."""
    columns = columns_reaching(lq, c[Coef.THRESHOLD].squeeze(-1))
    lp, lq = lp.gather(-1, columns), lq.gather(-1, columns)
    more = on_top_k(lp, lq, c, rule).where(lq >= c[Coef.THRESHOLD], 0.0)
    d[picked.unsqueeze(-1), columns] += more  # the columns are distinct


def on_top_k(lp: Tensor, lq: Tensor, c: Tensor, rule: TokenRule) -> Tensor:
    """What ids of K add to the gradient, besides the different weight of p."""
    d = -(lq.exp() * c[Coef.Q])
    if rule.generator:
        _, slope = generator_terms(rule.generator, rule.divergence_parameter, lp, lq)
        d += (slope * c[Coef.GENERATOR]).where(c[Coef.GENERATOR] != 0, 0.0)
    return d


# --- small pieces ------------------------------------------------------------------------------


def blocks(batch: RowBatch) -> Iterator[tuple[slice, RowBatch]]:
    """(slice, its rows) of each block."""
    n, vocab_size = batch.student.shape
    size = block_rows(vocab_size, batch.student.device.type)
    if 0 < n <= size:
        yield slice(0, n), batch
        return
    per_row = [
        f.name for f in fields(batch) if f.name != "student" and getattr(batch, f.name) is not None
    ]
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        part = {name: getattr(batch, name)[rows] for name in per_row}
        yield rows, replace(batch, student=batch.student[rows], **part)


def _dot(weight: Tensor, value: Tensor) -> Tensor:
    """sum of weight * value along a row, with 0 * inf = 0."""
    return (weight * value).nansum(-1)


def _kth_largest(lq: Tensor, k: int) -> Tensor:
    if lq.device.type == "cpu":
        return kth_largest(lq, k)
    return lq.topk(min(k, lq.shape[-1]), dim=-1).values[:, -1]


def _pick(log_probs: Tensor, labels: Tensor) -> Tensor:
    """The label's log-prob (rows,), NaN for a label outside the vocabulary."""
    inside = (labels >= 0) & (labels < log_probs.shape[-1])
    picked = log_probs.gather(-1, labels.where(inside, 0).unsqueeze(-1)).squeeze(-1)
    return picked.where(inside, math.nan)


def _topk_ids(part: RowBatch, k: int | None, vocab_size: int, dtype: torch.dtype):
    """ids (in range), lq (-inf off K) and membership (rows, K) of a top-k teacher's K."""
    ids, lq = part.topk
    ids, lq = topk_teacher_ids(ids, lq.to(dtype), k, vocab_size)
    return ids, lq, lq > -math.inf
