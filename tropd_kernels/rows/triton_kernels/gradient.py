"""The last pass over a row: d_logits."""

import triton
import triton.language as tl

from .constants import (
    C_ENTROPY,
    C_ENTROPY_WEIGHT,
    C_GENERATOR,
    C_LABEL,
    C_P,
    C_P_TOP_K,
    C_Q,
    C_REVERSE,
    C_REVERSE_KL,
    C_THRESHOLD,
    INF,
    STUDENT_LOG_SUM,
    STUDENT_MAX,
    TEACHER_LOG_SUM,
    TEACHER_MAX,
)
from .generators import _generator
from .logits import _cap, _load_logits


@triton.jit
def _student_terms(
    z, coefs, columns, SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """lp, p, the part of the gradient that needs no teacher, and the chain factor to raw logits."""
    lp = (z - tl.load(coefs + STUDENT_MAX * columns)) - tl.load(coefs + STUDENT_LOG_SUM * columns)
    p = tl.exp(lp)
    d = p * tl.load(coefs + C_P * columns)
    if HAS_ENTROPY:
        inner = tl.where(p > 0, lp + tl.load(coefs + C_ENTROPY * columns), 0.0)
        d -= tl.load(coefs + C_ENTROPY_WEIGHT * columns) * p * inner
    chain = tl.zeros_like(z) + SCALE / TEMPERATURE
    if CAP is not None:  # 1 - tanh^2, from the capped logits
        tanh = z * (TEMPERATURE / CAP)
        chain = (1 - tanh * tanh) * (SCALE / TEMPERATURE)
    return lp, p, d, chain


@triton.jit
def _top_k_terms(
    lp, p, lq, coefs, columns, HAS_P_TOP_K: tl.constexpr, GENERATOR: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr, LOG_1_C: tl.constexpr,
):  # fmt: skip
    """What the ids of K add to the gradient."""
    q = tl.exp(lq)
    d = -q * tl.load(coefs + C_Q * columns)
    if HAS_P_TOP_K:
        d += p * tl.load(coefs + C_P_TOP_K * columns)
    if GENERATOR is not None:
        weight = tl.load(coefs + C_GENERATOR * columns)
        _, slope = _generator(lp, lq, p, q, GENERATOR, C, LOG_C, LOG_1_C)
        d += tl.where(weight != 0, slope * weight, 0.0)
    return d


@triton.jit
def _row_state(coefs, columns):
    """(active, needs_teacher): any weight at all, any weight on the teacher's terms."""
    teacher_weights = (
        tl.abs(tl.load(coefs + C_P_TOP_K * columns))
        + tl.abs(tl.load(coefs + C_REVERSE * columns))
        + tl.abs(tl.load(coefs + C_Q * columns))
        + tl.abs(tl.load(coefs + C_GENERATOR * columns))
    )
    weights = (
        teacher_weights
        + tl.abs(tl.load(coefs + C_P * columns))
        + tl.abs(tl.load(coefs + C_LABEL * columns))
        + tl.abs(tl.load(coefs + C_ENTROPY_WEIGHT * columns))
    )
    return weights != 0, teacher_weights != 0


@triton.jit
def gradient_kernel(
    student, teacher, student_bias, teacher_bias, labels, coefs, out,
    vocab_size, student_stride, teacher_stride, coef_stride, out_stride,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_REVERSE: tl.constexpr, HAS_P_TOP_K: tl.constexpr, HAS_TOP_K: tl.constexpr,
    C: tl.constexpr, LOG_C: tl.constexpr, LOG_1_C: tl.constexpr, GENERATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """d_logits of one row, each element written once. `out` may be `student`: an element is read
    before it is written, by the same program. The loads of a row that has no weight, or of a
    teacher row that no coefficient asks for, are masked off and move no bytes."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    out += row * out_stride
    coefs += row
    if teacher is not None:
        teacher += row * teacher_stride
    label = tl.load(labels + row)
    label_weight = tl.load(coefs + C_LABEL * coef_stride)
    active, needs_teacher = _row_state(coefs, coef_stride)
    limit = tl.where(active, vocab_size, 0)
    t_limit = tl.where(needs_teacher, vocab_size, 0)
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < vocab_size
        z = _load_logits(student, student_bias, cols, cols < limit, ACC, SCALE, CAP, TEMPERATURE)
        lp, p, d, chain = _student_terms(
            z, coefs, coef_stride, SCALE, CAP, TEMPERATURE, HAS_ENTROPY
        )
        if teacher is not None:
            t = _load_logits(
                teacher, teacher_bias, cols, cols < t_limit, ACC,
                TEACHER_SCALE, TEACHER_CAP, TEMPERATURE,
            )  # fmt: skip
            lq = (t - tl.load(coefs + TEACHER_MAX * coef_stride)) - tl.load(
                coefs + TEACHER_LOG_SUM * coef_stride
            )
            more = _top_k_terms(
                lp, p, lq, coefs, coef_stride, HAS_P_TOP_K, GENERATOR, C, LOG_C, LOG_1_C
            )
            if HAS_TOP_K:
                more = tl.where(lq >= tl.load(coefs + C_THRESHOLD * coef_stride), more, 0.0)
            if HAS_REVERSE:
                weight = tl.load(coefs + C_REVERSE * coef_stride)
                # The logs of the normalisers cancel; without them ratio and mean agree to the bit.
                ratio = (z - tl.load(coefs + STUDENT_MAX * coef_stride)) - (
                    t - tl.load(coefs + TEACHER_MAX * coef_stride)
                )
                inner = ratio - tl.load(coefs + C_REVERSE_KL * coef_stride)
                # Also keeps inf - inf of an infinite KL out.
                more += tl.where(weight != 0, tl.where(p > 0, weight * p * inner, 0.0), 0.0)
            d += tl.where(needs_teacher, more, 0.0)
        d -= tl.where(cols == label, label_weight, 0.0)
        d = tl.where(active, d * chain, 0.0)
        tl.store(out + cols, d.to(out.dtype.element_ty), mask=mask)


@triton.jit
def given_grad_kernel(
    ids, topk_log_probs, id_logits, student_bias, labels, coefs, out, k, coef_stride, out_stride,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_P_TOP_K: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    LOG_1_C: tl.constexpr, GENERATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_logits at a top-k teacher's ids, whole, over what `gradient_kernel` wrote there: adding to
    it would round twice. `id_logits` (n, k) are the raw student logits at the ids."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    coefs += row
    _, needs_teacher = _row_state(coefs, coef_stride)
    lq = tl.load(topk_log_probs + row * k + at, mask=at < k, other=-INF).to(ACC)
    on_k = lq > tl.where(needs_teacher, -INF, INF)
    id_ = tl.load(ids + row * k + at, mask=at < k, other=0)
    z = tl.load(id_logits + row * k + at, mask=at < k, other=0.0).to(ACC)
    if student_bias is not None:
        z += tl.load(student_bias + id_, mask=on_k, other=0.0).to(ACC)
    z = _cap(z, SCALE, CAP, TEMPERATURE)
    lp, p, d, chain = _student_terms(z, coefs, coef_stride, SCALE, CAP, TEMPERATURE, HAS_ENTROPY)
    d += _top_k_terms(lp, p, lq, coefs, coef_stride, HAS_P_TOP_K, GENERATOR, C, LOG_C, LOG_1_C)
    d -= tl.where(id_ == tl.load(labels + row), tl.load(coefs + C_LABEL * coef_stride), 0.0)
    d = (d * chain).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + id_, d, mask=on_k)
