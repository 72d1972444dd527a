"""The row engine in PyTorch: the twin to read beside the Triton kernels, and the CPU's fallback.

It walks the chunk in blocks of a few rows, so that its temporaries stay in the cache (and within
`scratch_bytes`, which the chunk plan counts), and makes the passes of `rows` on each: statistics,
gate, sums over K where needed, rule; then, when asked, the gradient. `rule.py` holds the rule itself.

0 log 0: an id of probability 0 (in the working precision) contributes nothing, whatever the other
side says of it; `nansum` drops those 0 * inf. A NaN that is a defect shows in the label's log-prob.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..objectives import TokenRule
from .generators import generator_terms
from .given import given_top_k
from .layout import FIRST_WEIGHT, Coef, LogitTransform, RowBatch, RowOptions, Stat
from .rule import Gate, Sums, apply_rule, forward_kl, gate, rows_with_sums, topk_entropy

#: Elements of one block's temporary: 4 MiB of float32 on a CPU, enough to fill a GPU on one.
BLOCK_ELEMENTS = {"cpu": 1 << 20}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 25
#: Temporaries of a block that are alive at once, at most.
TEMPORARIES = 12


def block_rows(vocab_size: int, device_type: str) -> int:
    elements = BLOCK_ELEMENTS.get(device_type, BLOCK_ELEMENTS_ELSEWHERE)
    return max(1, elements // vocab_size)


def scratch_bytes(rows: int, vocab_size: int, itemsize: int, device_type: str) -> int:
    """Upper bound on the temporaries of one call on `rows` rows."""
    return TEMPORARIES * min(rows, block_rows(vocab_size, device_type)) * vocab_size * itemsize


def forward(batch: RowBatch, options: RowOptions) -> tuple[Tensor, Tensor]:
    """stats (Stat, n) and coefs (Coef, n) of the chunk."""
    dtype = torch.promote_types(batch.student.dtype, torch.float32)
    n = batch.student.shape[0]
    stats = batch.student.new_full((len(Stat), n), math.nan, dtype=dtype)
    coefs = batch.student.new_zeros((len(Coef), n), dtype=dtype)
    for rows, part in _blocks(batch):
        s, c = stats[:, rows], coefs[:, rows]
        lp, lq = _statistics(part, options, s, c)
        gated = gate(s, part, options)
        sums = _sums(part, options, s, c, gated, lp, lq)
        apply_rule(s, c, gated, sums, part, options)
        if lq is None and sums is not None:
            s[Stat.FORWARD_KL] = forward_kl(sums, options.rule)[0]
    return stats, coefs


def entropy(batch: RowBatch, options: RowOptions) -> Tensor:
    """H(p) (n,) alone, for rules that rank the batch by it."""
    dtype = torch.promote_types(batch.student.dtype, torch.float32)
    result = batch.student.new_empty((batch.student.shape[0],), dtype=dtype)
    for rows, part in _blocks(batch):
        lp, p, _, _ = _normalise(part.student, options.student, dtype)
        result[rows] = -(p.mul_(lp)).nansum(-1)
    return result


def gradient(batch: RowBatch, coefs: Tensor, options: RowOptions, out: Tensor) -> None:
    """Writes d_logits (n, V) into `out`, which may be `batch.student` itself."""
    for rows, part in _blocks(batch):
        c = coefs[:, rows]
        d = _gradient(part, c, options)
        # Tokens that do not count may hold anything, NaN too.
        out[rows] = d.masked_fill_((c[FIRST_WEIGHT:] == 0).all(0).unsqueeze(-1), 0.0)


def transform(logits: Tensor, how: LogitTransform, dtype: torch.dtype) -> Tensor:
    """A transformed copy."""
    z = logits.to(dtype, copy=True)
    if how.bias is not None:
        z += how.bias
    if how.scale != 1.0:
        z *= how.scale
    if how.softcap is not None:
        z.div_(how.softcap).tanh_().mul_(how.softcap)
    if how.temperature != 1.0:
        z /= how.temperature
    return z


# --- forward passes over one block -------------------------------------------------------------


def _normalise(logits: Tensor, how: LogitTransform, dtype: torch.dtype):
    """log-probs, probs (rows, V), row maximum and log of the shifted sum (rows,)."""
    z = transform(logits, how, dtype)
    top = z.amax(-1)
    z -= top.unsqueeze(-1)
    p = z.exp()
    total = p.sum(-1)
    p /= total.unsqueeze(-1)
    log_sum = total.log_()
    return z.sub_(log_sum.unsqueeze(-1)), p, top, log_sum


def _statistics(part: RowBatch, options: RowOptions, s: Tensor, c: Tensor):
    """Fills s up to REVERSE_KL and c up to REVERSE_KL; returns lp and lq (None: not dense)."""
    lp, p, c[Coef.STUDENT_MAX], c[Coef.STUDENT_LOG_SUM] = _normalise(
        part.student, options.student, s.dtype
    )
    s[Stat.LOG_PROB] = _pick(lp, part.labels)
    s[Stat.ENTROPY] = c[Coef.ENTROPY] = -(p * lp).nansum(-1)
    if part.teacher is None:
        if part.label_log_probs is not None:
            s[Stat.TEACHER_LOG_PROB] = part.label_log_probs
        if part.teacher_entropy is not None:
            s[Stat.TEACHER_ENTROPY] = part.teacher_entropy
        elif part.ids is not None:
            s[Stat.TEACHER_ENTROPY] = topk_entropy(_given(part, None, lp.shape[-1], s.dtype)[1])
        return lp, None
    lq, q, c[Coef.TEACHER_MAX], c[Coef.TEACHER_LOG_SUM] = _normalise(
        part.teacher, options.teacher, s.dtype
    )
    s[Stat.TEACHER_LOG_PROB] = _pick(lq, part.labels)
    s[Stat.TEACHER_ENTROPY] = -(q * lq).nansum(-1)
    difference = lp - lq
    s[Stat.REVERSE_KL] = c[Coef.REVERSE_KL] = p.mul_(difference).nansum(-1)
    s[Stat.FORWARD_KL] = -q.mul_(difference).nansum(-1)
    return lp, lq


def _sums(
    part: RowBatch,
    options: RowOptions,
    s: Tensor,
    c: Tensor,
    gated: Gate,
    lp: Tensor,
    lq: Tensor | None,
) -> Sums | None:
    """The sums that the rule needs, made only for the rows that need them."""
    rule = options.rule
    if not rule.uses_sums:
        return None
    if lq is None:
        ids, lq, on_k = _given(part, rule.top_k, lp.shape[-1], s.dtype)
        sums = _sum_terms(lp.gather(-1, ids), lq, on_k, rule, dense=False)
        s[Stat.TEACHER_TOPK_MASS], s[Stat.STUDENT_TOPK_MASS] = sums.teacher_mass, sums.student_mass
        return sums
    c[Coef.THRESHOLD] = -math.inf
    if rule.sums_are_statistics:
        one, zero = torch.ones_like(s[Stat.FORWARD_KL]), torch.zeros_like(s[Stat.FORWARD_KL])
        return Sums(one, one, zero, zero, zero, s[Stat.FORWARD_KL])

    # Sorting out rows costs a host sync on a GPU, and a copy where all are needed anyway.
    needed = rows_with_sums(gated, rule)
    some = lp.device.type == "cpu" and not bool(needed.all())
    if some:
        lp, lq = lp[needed], lq[needed]
    on_k = torch.ones_like(lq, dtype=torch.bool)
    if rule.divergence == "akl" or rule.uses_top_k:
        if rule.divergence == "akl":
            threshold = _head_threshold(lq, rule.divergence_parameter)
        else:
            k = min(rule.top_k, lq.shape[-1])
            threshold = lq.topk(k, dim=-1).values[:, -1]
        # Ids that the teacher excludes are never in K, however few it leaves.
        threshold = threshold.clamp_min(torch.finfo(lq.dtype).min)
        on_k = lq >= threshold.unsqueeze(-1)
        if rule.uses_top_k:  # AKL's gradient is not confined to its head
            c[Coef.THRESHOLD, needed if some else slice(None)] = threshold
    sums = _sum_terms(lp, lq, on_k, rule, dense=True)
    if some:
        sums = _spread(sums, needed)
    if rule.uses_top_k:
        s[Stat.TEACHER_TOPK_MASS] = sums.teacher_mass.masked_fill(~needed, math.nan)
        s[Stat.STUDENT_TOPK_MASS] = sums.student_mass.masked_fill(~needed, math.nan)
    return sums


def _sum_terms(lp: Tensor, lq: Tensor, on_k: Tensor, rule: TokenRule, dense: bool) -> Sums:
    p, q = lp.exp(), lq.exp()
    p_k, q_k = p.where(on_k, 0.0), q.where(on_k, 0.0)
    student_mass, teacher_mass = p_k.sum(-1), q_k.sum(-1)
    if dense:  # off K directly: near 1 the complement of the mass has no digits left
        student_tail, teacher_tail = (p - p_k).sum(-1), (q - q_k).sum(-1)
    else:
        student_tail, teacher_tail = ((1 - m).clamp_min(0) for m in (student_mass, teacher_mass))
    sums = Sums(
        teacher_mass,
        student_mass,
        teacher_tail,
        student_tail,
        lp.where(on_k, -math.inf).logsumexp(-1),
        (q_k * (lq - lp)).nansum(-1),
    )
    if rule.generator:
        value, slope = generator_terms(rule.generator, rule.divergence_parameter, lp, lq)
        if rule.uses_top_k:
            value, slope = value.where(on_k, 0.0), slope.where(on_k, 0.0)
        sums.value, sums.slope = value.sum(-1), slope.sum(-1)
    elif rule.divergence == "akl":
        gap = (p - q).abs()
        sums.value, sums.slope = gap.where(on_k, 0.0).sum(-1), gap.where(~on_k, 0.0).sum(-1)
    return sums


def _spread(sums: Sums, rows: Tensor) -> Sums:
    """From the rows picked to all rows; the others get a mass of 1 and zeros, which they ignore."""
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


def _gradient(part: RowBatch, c: Tensor, options: RowOptions) -> Tensor:
    rule = options.rule
    needs_teacher = (c[[Coef.P_TOP_K, Coef.REVERSE, Coef.Q, Coef.GENERATOR]] != 0).any(0)
    c = c.unsqueeze(-1)
    lp = transform(part.student, options.student, c.dtype)
    cap_slope = None
    if options.student.softcap is not None:  # 1 - tanh^2, from the capped logits
        tanh = lp * (options.student.temperature / options.student.softcap)
        cap_slope = 1 - tanh * tanh
    lp.sub_(c[Coef.STUDENT_MAX]).sub_(c[Coef.STUDENT_LOG_SUM])
    p = lp.exp()
    if rule.entropy_coef:
        d = p * (lp + c[Coef.ENTROPY]).where(p > 0, 0.0)
        d.mul_(-c[Coef.ENTROPY_WEIGHT]).add_(p * c[Coef.P])
    else:
        d = p * c[Coef.P]
    if part.teacher is not None and rule.reads_teacher_rows:
        picked = needs_teacher.nonzero().squeeze(-1) if lp.device.type == "cpu" else slice(None)
        d[picked] += _teacher_terms(
            lp[picked], p[picked], part.teacher[picked], c[:, picked], options
        )
    elif part.ids is not None and rule.uses_sums:
        ids, lq, on_k = _given(part, rule.top_k, d.shape[-1], d.dtype)
        lp_k = lp.gather(-1, ids)
        d.scatter_add_(-1, ids, _on_top_k(lp_k, lp_k.exp(), lq, c, rule).where(on_k, 0.0))
    labels = part.labels.unsqueeze(-1)
    inside = (labels >= 0) & (labels < d.shape[-1])
    d.scatter_add_(-1, labels.where(inside, 0), -c[Coef.LABEL].where(inside, 0.0))
    if cap_slope is not None:
        d *= cap_slope
    chain = options.student.scale / options.student.temperature
    return d if chain == 1.0 else d.mul_(chain)


def _teacher_terms(lp: Tensor, p: Tensor, teacher: Tensor, c: Tensor, options: RowOptions) -> Tensor:
    """Terms of the gradient that read the teacher's row."""
    rule = options.rule
    lq = transform(teacher, options.teacher, c.dtype)
    lq.sub_(c[Coef.TEACHER_MAX]).sub_(c[Coef.TEACHER_LOG_SUM])
    d = _on_top_k(lp, p, lq, c, rule)
    if rule.uses_top_k:
        d = d.where(lq >= c[Coef.THRESHOLD], 0.0)
    if rule.uses_reverse_kl:
        live = (c[Coef.REVERSE] != 0) & (p > 0)  # also keeps inf - inf of an infinite KL out
        d += (c[Coef.REVERSE] * p * (lp - lq - c[Coef.REVERSE_KL])).where(live, 0.0)
    return d


def _on_top_k(lp: Tensor, p: Tensor, lq: Tensor, c: Tensor, rule: TokenRule) -> Tensor:
    """What the ids of K add to the gradient."""
    d = -(lq.exp() * c[Coef.Q])
    if rule.top_k_tail in ("bucket", "renormalize_both"):
        d += p * c[Coef.P_TOP_K]
    if rule.generator:
        _, slope = generator_terms(rule.generator, rule.divergence_parameter, lp, lq)
        d += (slope * c[Coef.GENERATOR]).where(c[Coef.GENERATOR] != 0, 0.0)
    return d


# --- small pieces ------------------------------------------------------------------------------


def _blocks(batch: RowBatch):
    n, vocab_size = batch.student.shape
    size = block_rows(vocab_size, batch.student.device.type)
    per_row = [
        f.name for f in fields(batch) if f.name != "student" and getattr(batch, f.name) is not None
    ]
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        part = {name: getattr(batch, name)[rows] for name in per_row}
        yield rows, replace(batch, student=batch.student[rows], **part)


def _pick(log_probs: Tensor, labels: Tensor) -> Tensor:
    """The label's log-prob (rows,), NaN for a label outside the vocabulary."""
    inside = (labels >= 0) & (labels < log_probs.shape[-1])
    picked = log_probs.gather(-1, labels.where(inside, 0).unsqueeze(-1)).squeeze(-1)
    return picked.where(inside, math.nan)


def _given(part: RowBatch, k: int | None, vocab_size: int, dtype: torch.dtype):
    """ids (in range), lq (-inf off K) and membership (rows, K) of a top-k teacher's K."""
    ids, lq = given_top_k(part.ids, part.topk_log_probs.to(dtype), k, vocab_size)
    return ids, lq, lq > -math.inf
