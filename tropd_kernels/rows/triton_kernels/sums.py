"""Sums over K, or over the vocabulary, for the rows that need them."""

import triton
import triton.language as tl

from .constants import (
    C_THRESHOLD,
    INF,
    STUDENT_LOG_MASS,
    STUDENT_LOG_SUM,
    STUDENT_MASS,
    STUDENT_MAX,
    STUDENT_TAIL,
    STUDENT_TOPK_MASS,
    SUM_FORWARD_KL,
    SUM_SLOPE,
    SUM_VALUE,
    TEACHER_LOG_SUM,
    TEACHER_MASS,
    TEACHER_MAX,
    TEACHER_TAIL,
    TEACHER_TOPK_MASS,
)
from .gate import _row_gate
from .generators import _generator
from .logits import _load_logits, _rescale
from .search import _search


@triton.jit
def dense_sums_kernel(
    student, teacher, student_bias, teacher_bias, old_log_probs, advantages, uniforms, prefix,
    entropy_threshold, stats, coefs, sums, vocab_size, student_stride, teacher_stride, columns,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    GATE: tl.constexpr, OUTLIER_IS: tl.constexpr, TAU: tl.constexpr, KL_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, LOG_1_C: tl.constexpr,
    GENERATOR: tl.constexpr, TOP_K: tl.constexpr, THRESHOLD_GIVEN: tl.constexpr,
    BLOCK: tl.constexpr, SEARCH_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over K (or the vocabulary) for a row that needs them; a row that does not costs
    nothing. THRESHOLD_GIVEN: K, or the head of AKL, is that of the threshold in coefs, of rows of
    which these are a part."""
    row = tl.program_id(0).to(tl.int64)
    gate = _row_gate(
        row, old_log_probs, advantages, uniforms, prefix, entropy_threshold, stats, columns,
        GATE, OUTLIER_IS, TAU, KL_ENTROPY, DIVERGENCE, C, LOG_C, LOG_1_C,
    )  # fmt: skip
    needed = gate[5]
    coefs += row
    sums += row
    teacher_mass = tl.full((), 1.0, ACC)
    student_mass = tl.full((), 1.0, ACC)
    teacher_tail = tl.full((), 0.0, ACC)
    student_tail = tl.full((), 0.0, ACC)
    log_mass = tl.full((), 0.0, ACC)
    forward_kl = tl.full((), 0.0, ACC)
    value_sum = tl.full((), 0.0, ACC)
    slope_sum = tl.full((), 0.0, ACC)
    threshold = tl.full((), -INF, ACC)
    if needed:
        student += row * student_stride
        teacher += row * teacher_stride
        top = tl.load(coefs + STUDENT_MAX * columns)
        log_sum = tl.load(coefs + STUDENT_LOG_SUM * columns)
        t_top = tl.load(coefs + TEACHER_MAX * columns)
        t_log_sum = tl.load(coefs + TEACHER_LOG_SUM * columns)
        # Ids that the teacher excludes are never in K, however few it leaves.
        floor: tl.constexpr = -1e300 if ACC == tl.float64 else -3e38
        if THRESHOLD_GIVEN:
            threshold = tl.load(coefs + C_THRESHOLD * columns)
        elif DIVERGENCE == "akl":
            threshold = _search(
                teacher, teacher_bias, t_top, t_log_sum, C, vocab_size, True, ACC,
                TEACHER_SCALE, TEACHER_CAP, TEMPERATURE, SEARCH_BLOCK,
            )  # fmt: skip
            threshold = tl.maximum(threshold, floor)
        elif TOP_K is not None:
            threshold = _search(
                teacher, teacher_bias, t_top, t_log_sum, tl.minimum(TOP_K, vocab_size), vocab_size,
                False, ACC, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE, SEARCH_BLOCK,
            )  # fmt: skip
            threshold = tl.maximum(threshold, floor)
            # The gradient pass may meet logits made again, by a product of another height that
            # rounds otherwise: a margin of a few last bits keeps the k-th id in K there, too.
            margin: tl.constexpr = 3.6e-15 if ACC == tl.float64 else 1.9e-6
            extent: tl.constexpr = 1.0 if TEACHER_CAP is None else 1.0 + TEACHER_CAP
            threshold -= margin * (tl.abs(threshold) + extent)
        p_on = tl.zeros((BLOCK,), ACC)
        q_on = tl.zeros((BLOCK,), ACC)
        p_off = tl.zeros((BLOCK,), ACC)
        q_off = tl.zeros((BLOCK,), ACC)
        kl = tl.zeros((BLOCK,), ACC)
        values = tl.zeros((BLOCK,), ACC)
        slopes = tl.zeros((BLOCK,), ACC)
        k_top = tl.full((), -INF, ACC)
        k_mass = tl.zeros((BLOCK,), ACC)
        for start in range(0, vocab_size, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < vocab_size
            z = _load_logits(student, student_bias, cols, mask, ACC, SCALE, CAP, TEMPERATURE)
            t = _load_logits(
                teacher, teacher_bias, cols, mask, ACC, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE
            )
            lp = (z - top) - log_sum
            lq = (t - t_top) - t_log_sum
            p = tl.exp(lp)
            q = tl.exp(lq)
            on_k = mask & (lq >= threshold)
            p_on += tl.where(on_k, p, 0.0)
            q_on += tl.where(on_k, q, 0.0)
            p_off += tl.where(on_k, 0.0, p)
            q_off += tl.where(on_k, 0.0, q)
            kl += tl.where(on_k & (q > 0), q * (lq - lp), 0.0)
            on_lp = tl.where(on_k, lp, -INF)
            k_top, k_base, _, k_shrink = _rescale(k_top, on_lp)
            k_mass = k_mass * k_shrink + tl.exp(on_lp - k_base)
            if GENERATOR is not None:
                value, slope = _generator(lp, lq, p, q, GENERATOR, C, LOG_C, LOG_1_C)
                values += tl.where(on_k, value, 0.0)
                slopes += tl.where(on_k, slope, 0.0)
            elif DIVERGENCE == "akl":
                gap = tl.where(mask, tl.abs(p - q), 0.0)
                values += tl.where(on_k, gap, 0.0)
                slopes += tl.where(on_k, 0.0, gap)
        student_mass = tl.sum(p_on, 0)
        teacher_mass = tl.sum(q_on, 0)
        student_tail = tl.sum(p_off, 0)
        teacher_tail = tl.sum(q_off, 0)
        log_mass = k_top + tl.log(tl.sum(k_mass, 0))
        forward_kl = tl.sum(kl, 0)
        value_sum = tl.sum(values, 0)
        slope_sum = tl.sum(slopes, 0)
    if TOP_K is not None:  # AKL's gradient is not confined to its head
        tl.store(coefs + C_THRESHOLD * columns, threshold)
        unknown = tl.where(needed, 0.0, float("nan"))
        tl.store(stats + row + TEACHER_TOPK_MASS * columns, teacher_mass + unknown)
        tl.store(stats + row + STUDENT_TOPK_MASS * columns, student_mass + unknown)
    else:
        tl.store(coefs + C_THRESHOLD * columns, tl.full((), -INF, ACC))
    tl.store(sums + TEACHER_MASS * columns, teacher_mass)
    tl.store(sums + STUDENT_MASS * columns, student_mass)
    tl.store(sums + TEACHER_TAIL * columns, teacher_tail)
    tl.store(sums + STUDENT_TAIL * columns, student_tail)
    tl.store(sums + STUDENT_LOG_MASS * columns, log_mass)
    tl.store(sums + SUM_FORWARD_KL * columns, forward_kl)
    tl.store(sums + SUM_VALUE * columns, value_sum)
    tl.store(sums + SUM_SLOPE * columns, slope_sum)


@triton.jit
def given_sums_kernel(
    student, student_bias, ids, topk_log_probs, stats, coefs, sums, student_stride, k, columns,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr, LOG_1_C: tl.constexpr, GENERATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The same sums over a top-k teacher's ids (n, k), which lie in range; log-prob -inf is
    padding."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    lq = tl.load(topk_log_probs + row * k + at, mask=at < k, other=-INF).to(ACC)
    on_k = lq > -INF
    id_ = tl.load(ids + row * k + at, mask=at < k, other=0)
    z = _load_logits(
        student + row * student_stride, student_bias, id_, on_k, ACC, SCALE, CAP, TEMPERATURE
    )
    coefs += row
    lp = (z - tl.load(coefs + STUDENT_MAX * columns)) - tl.load(coefs + STUDENT_LOG_SUM * columns)
    p = tl.exp(lp)
    q = tl.exp(lq)
    student_mass = tl.sum(p, 0)
    teacher_mass = tl.sum(q, 0)
    top = tl.max(lp, 0)
    base = tl.where(top == -INF, 0.0, top)
    sums += row
    tl.store(sums + TEACHER_MASS * columns, teacher_mass)
    tl.store(sums + STUDENT_MASS * columns, student_mass)
    tl.store(sums + TEACHER_TAIL * columns, tl.maximum(1 - teacher_mass, 0.0))
    tl.store(sums + STUDENT_TAIL * columns, tl.maximum(1 - student_mass, 0.0))
    tl.store(sums + STUDENT_LOG_MASS * columns, base + tl.log(tl.sum(tl.exp(lp - base), 0)))
    kl = tl.where(on_k & (q > 0), q * (lq - lp), 0.0)
    tl.store(sums + SUM_FORWARD_KL * columns, tl.sum(kl, 0))
    if GENERATOR is not None:
        value, slope = _generator(lp, lq, p, q, GENERATOR, C, LOG_C, LOG_1_C)
        tl.store(sums + SUM_VALUE * columns, tl.sum(tl.where(on_k, value, 0.0), 0))
        tl.store(sums + SUM_SLOPE * columns, tl.sum(tl.where(on_k, slope, 0.0), 0))
    tl.store(stats + row + TEACHER_TOPK_MASS * columns, teacher_mass)
    tl.store(stats + row + STUDENT_TOPK_MASS * columns, student_mass)
