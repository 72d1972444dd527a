"""The last pass over a row: d_logits.

It starts where the passes before it ended, at the last ids of the last rows, whose logits the cache
may still hold.
"""

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
    C_UNIFORM,
    INF,
    STUDENT_LOG_SUM,
    STUDENT_MAX,
    TEACHER_LOG_SUM,
    TEACHER_MAX,
)
from .exponential import _exp
from .generators import _generator
from .logits import _cap, _load_logits
from .topk_teacher import _given, _on_k


@triton.jit
def _coefs(coefs, columns, HAS_P_TOP_K: tl.constexpr, HAS_UNIFORM: tl.constexpr):
    """A row's coefficients, and whether any weight, or any weight on the teacher's terms, is not 0.
    Loaded once: the compiler would not move a load past the stores to `out`, out of the loop."""
    p = tl.load(coefs + C_P * columns)
    p_top_k = tl.load(coefs + C_P_TOP_K * columns)
    reverse = tl.load(coefs + C_REVERSE * columns)
    entropy_weight = tl.load(coefs + C_ENTROPY_WEIGHT * columns)
    q = tl.load(coefs + C_Q * columns)
    label = tl.load(coefs + C_LABEL * columns)
    generator = tl.load(coefs + C_GENERATOR * columns)
    teacher_weights = tl.abs(reverse) + tl.abs(q) + tl.abs(generator)
    if HAS_P_TOP_K:
        teacher_weights += tl.abs(p_top_k - p)
    weights = teacher_weights + tl.abs(p) + tl.abs(label) + tl.abs(entropy_weight)
    uniform = tl.zeros_like(p)
    if HAS_UNIFORM:
        uniform = tl.load(coefs + C_UNIFORM * columns)
        weights += tl.abs(uniform)
    return (
        p, p_top_k, reverse, entropy_weight, q, label, generator, uniform,
        weights != 0, teacher_weights != 0,
    )  # fmt: skip


@triton.jit
def _student_terms(
    z, top, log_sum, p_weight, entropy, entropy_weight, uniform, SCALE: tl.constexpr,
    CAP: tl.constexpr, TEMPERATURE: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_P_TOP_K: tl.constexpr, HAS_UNIFORM: tl.constexpr,
):  # fmt: skip
    """lp, p, the part of the gradient that needs no teacher, and the chain factor to raw logits."""
    lp = (z - top) - log_sum
    # Weights on K reach e^80, which makes a subnormal p count.
    p = tl.exp(lp) if HAS_P_TOP_K else _exp(lp)
    d = p * p_weight
    if HAS_ENTROPY:
        inner = tl.where(p > 0, lp + entropy, 0.0)
        d -= entropy_weight * p * inner
    if HAS_UNIFORM:
        d -= uniform
    chain = tl.zeros_like(z) + SCALE / TEMPERATURE
    if CAP is not None:  # 1 - tanh^2, from the capped logits
        tanh = z * (TEMPERATURE / CAP)
        chain = (1 - tanh * tanh) * (SCALE / TEMPERATURE)
    return lp, p, d, chain


@triton.jit
def _top_k_terms(lp, p, lq, q_weight, weight, GENERATOR: tl.constexpr, PARAMETER: tl.constexpr):
    """What ids of K add to the gradient, besides the different weight of p. `weight` is the
    generator's."""
    q = _exp(lq)
    d = -q * q_weight
    if GENERATOR is not None:
        _, slope = _generator(lp, lq, p, q, GENERATOR, PARAMETER, True)
        d += tl.where(weight != 0, slope * weight, 0.0)
    return d


@triton.jit
def gradient_kernel(
    student, teacher, student_bias, teacher_bias, labels, coefs, out,
    vocab_size, student_stride, teacher_stride, coef_stride, out_stride,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_REVERSE: tl.constexpr, HAS_P_TOP_K: tl.constexpr, HAS_UNIFORM: tl.constexpr,
    HAS_TOP_K: tl.constexpr, PARAMETER: tl.constexpr, GENERATOR: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_logits of one part of a row. Each element is written once, by the program that has read it
    before, so `out` may be `student`. A row without weight is not read, nor a teacher row that no
    coefficient asks for."""
    row = tl.num_programs(0) - 1 - tl.program_id(0).to(tl.int64)
    part = PARTS - 1 - tl.program_id(1)
    student += row * student_stride
    out += row * out_stride
    coefs += row
    label = tl.load(labels + row)
    top = tl.load(coefs + STUDENT_MAX * coef_stride)
    log_sum = tl.load(coefs + STUDENT_LOG_SUM * coef_stride)
    entropy = tl.load(coefs + C_ENTROPY * coef_stride)
    (
        p_weight, p_top_k_weight, reverse_weight, entropy_weight, q_weight, label_weight,
        generator_weight, uniform, active, needs_teacher,
    ) = _coefs(coefs, coef_stride, HAS_P_TOP_K, HAS_UNIFORM)  # fmt: skip
    if teacher is not None:
        teacher += row * teacher_stride
        # A row that is not asked for looks as if the teacher excluded all ids: none is on K.
        t_limit = tl.where(needs_teacher, vocab_size, 0)
        t_top = tl.where(needs_teacher, tl.load(coefs + TEACHER_MAX * coef_stride), 0.0)
        t_log_sum = tl.where(needs_teacher, tl.load(coefs + TEACHER_LOG_SUM * coef_stride), 0.0)
        threshold = tl.where(needs_teacher, tl.load(coefs + C_THRESHOLD * coef_stride), INF)
        reverse_kl = tl.load(coefs + C_REVERSE_KL * coef_stride)
    tiles = tl.cdiv(vocab_size, BLOCK)
    each = tl.cdiv(tiles, PARTS)
    last = tl.minimum((part + 1) * each, tiles) - 1
    count = last + 1 - part * each
    for back in range(tl.where(active, 0, count)):  # a row without weight
        cols = (last - back) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + cols, tl.zeros((BLOCK,), out.dtype.element_ty), mask=cols < vocab_size)
    for back in range(tl.where(active, count, 0)):
        low = (last - back) * BLOCK
        cols = low + tl.arange(0, BLOCK)
        mask = cols < vocab_size
        z = _load_logits(student, student_bias, cols, mask, ACC, SCALE, CAP, TEMPERATURE)
        weight = p_weight
        if teacher is not None:
            t = _load_logits(
                teacher, teacher_bias, cols, cols < t_limit, ACC,
                TEACHER_SCALE, TEACHER_CAP, TEMPERATURE,
            )  # fmt: skip
            lq = (t - t_top) - t_log_sum
            if HAS_P_TOP_K:
                weight = tl.where(lq >= threshold, p_top_k_weight, p_weight)
        lp, p, d, chain = _student_terms(
            z, top, log_sum, weight, entropy, entropy_weight, uniform, SCALE, CAP, TEMPERATURE,
            HAS_ENTROPY, HAS_P_TOP_K, HAS_UNIFORM,
        )  # fmt: skip
        if teacher is not None:
            more = _top_k_terms(lp, p, lq, q_weight, generator_weight, GENERATOR, PARAMETER)
            if HAS_TOP_K:
                more = tl.where(lq >= threshold, more, 0.0)
            if HAS_REVERSE:
                # Without the log-sums, which cancel, log-ratio and mean agree to the bit.
                inner = ((z - top) - (t - t_top)) - reverse_kl
                # The inner where() also keeps out inf - inf of an infinite KL.
                more += tl.where(
                    reverse_weight != 0, tl.where(p > 0, reverse_weight * p * inner, 0.0), 0.0
                )
            d += more
        if (label >= low) & (label < low + BLOCK):
            d -= tl.where(cols == label, label_weight, 0.0)
        tl.store(out + cols, (d * chain).to(out.dtype.element_ty), mask=mask)


@triton.jit
def topk_teacher_grad_kernel(
    ids, topk_log_probs, least, student, id_logits, student_bias, labels, coefs, out, vocab_size,
    k, student_stride, coef_stride, out_stride,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_P_TOP_K: tl.constexpr, HAS_UNIFORM: tl.constexpr,
    PARAMETER: tl.constexpr, GENERATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_logits at a top-k teacher's ids. Replaces what `gradient_kernel` wrote there: adding to it
    would round twice. id_logits (n, k): the raw student logits at the ids, where `out` has
    overwritten them; None reads them from `student`."""
    row = tl.program_id(0).to(tl.int64)
    coefs += row
    (
        p_weight, p_top_k_weight, _, entropy_weight, q_weight, label_weight, generator_weight,
        uniform, _, needs_teacher,
    ) = _coefs(coefs, coef_stride, HAS_P_TOP_K, HAS_UNIFORM)  # fmt: skip
    id_, lq = _given(row, ids, topk_log_probs, vocab_size, k, ACC, BLOCK)
    lq = _on_k(row, lq, least)
    on_k = lq > tl.where(needs_teacher, -INF, INF)
    if id_logits is None:
        z = tl.load(student + row * student_stride + id_, mask=on_k, other=0.0).to(ACC)
    else:
        at = tl.arange(0, BLOCK)
        z = tl.load(id_logits + row * k + at, mask=at < k, other=0.0).to(ACC)
    if student_bias is not None:
        z += tl.load(student_bias + id_, mask=on_k, other=0.0).to(ACC)
    z = _cap(z, SCALE, CAP, TEMPERATURE)
    lp, p, d, chain = _student_terms(
        z, tl.load(coefs + STUDENT_MAX * coef_stride),
        tl.load(coefs + STUDENT_LOG_SUM * coef_stride),
        p_top_k_weight if HAS_P_TOP_K else p_weight,
        tl.load(coefs + C_ENTROPY * coef_stride), entropy_weight, uniform,
        SCALE, CAP, TEMPERATURE, HAS_ENTROPY, HAS_P_TOP_K, HAS_UNIFORM,
    )  # fmt: skip
    d += _top_k_terms(lp, p, lq, q_weight, generator_weight, GENERATOR, PARAMETER)
    d -= tl.where(id_ == tl.load(labels + row), label_weight, 0.0)
    d = (d * chain).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + id_, d, mask=on_k)
