"""The first pass over a row: normalisers, entropies, exact KLs, the label's log-probs."""

import triton
import triton.language as tl

from .constants import (
    C_ENTROPY,
    C_REVERSE_KL,
    ENTROPY,
    FORWARD_KL,
    INF,
    LOG_PROB,
    REVERSE_KL,
    STUDENT_LOG_SUM,
    STUDENT_MAX,
    TEACHER_ENTROPY,
    TEACHER_LOG_PROB,
    TEACHER_LOG_SUM,
    TEACHER_MAX,
)
from .logits import _at, _load_logits, _moment, _rescale


@triton.jit
def statistics_kernel(
    student, teacher, student_bias, teacher_bias, labels, label_log_probs, teacher_entropy,
    stats, coefs, vocab_size, student_stride, teacher_stride, columns,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass over a row of student logits, and of teacher logits beside it: online softmax of
    both with first moments of (z - max) and of the difference of the two, from which come the
    entropies and both KLs without the cancellation of E[z] - E[t]."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    top = tl.full((), -INF, ACC)
    mass = tl.zeros((BLOCK,), ACC)
    moment = tl.zeros((BLOCK,), ACC)
    t_top = tl.full((), -INF, ACC)
    t_mass = tl.zeros((BLOCK,), ACC)
    t_moment = tl.zeros((BLOCK,), ACC)
    reverse = tl.zeros((BLOCK,), ACC)
    forward = tl.zeros((BLOCK,), ACC)
    if teacher is not None:
        teacher += row * teacher_stride
    for start in range(0, vocab_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < vocab_size
        z = _load_logits(student, student_bias, cols, mask, ACC, SCALE, CAP, TEMPERATURE)
        top, base, shift, shrink = _rescale(top, z)
        z = z - base
        e = tl.exp(z)
        moment = _moment(moment, mass, shift, shrink, e, z)
        if teacher is not None:
            t = _load_logits(
                teacher, teacher_bias, cols, mask, ACC, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE
            )
            t_top, t_base, t_shift, t_shrink = _rescale(t_top, t)
            t = t - t_base
            t_e = tl.exp(t)
            reverse = _moment(reverse, mass, shift - t_shift, shrink, e, z - t)
            forward = _moment(forward, t_mass, t_shift - shift, t_shrink, t_e, t - z)
            t_moment = _moment(t_moment, t_mass, t_shift, t_shrink, t_e, t)
            t_mass = t_mass * t_shrink + t_e
        mass = mass * shrink + e

    total = tl.sum(mass, 0)
    log_sum = tl.log(total)
    entropy = log_sum - tl.sum(moment, 0) / total
    label = tl.load(labels + row)
    known = (label >= 0) & (label < vocab_size)
    at = tl.where(known, label, 0)
    z = _at(student, student_bias, at, ACC, SCALE, CAP, TEMPERATURE)
    stats += row
    coefs += row
    tl.store(stats + LOG_PROB * columns, tl.where(known, (z - top) - log_sum, float("nan")))
    tl.store(stats + ENTROPY * columns, entropy)
    tl.store(coefs + STUDENT_MAX * columns, top)
    tl.store(coefs + STUDENT_LOG_SUM * columns, log_sum)
    tl.store(coefs + C_ENTROPY * columns, entropy)
    if teacher is not None:
        t_total = tl.sum(t_mass, 0)
        t_log_sum = tl.log(t_total)
        t = _at(teacher, teacher_bias, at, ACC, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE)
        reverse_kl = tl.sum(reverse, 0) / total - log_sum + t_log_sum
        forward_kl = tl.sum(forward, 0) / t_total - t_log_sum + log_sum
        t_log_prob = tl.where(known, (t - t_top) - t_log_sum, float("nan"))
        tl.store(stats + TEACHER_LOG_PROB * columns, t_log_prob)
        tl.store(stats + TEACHER_ENTROPY * columns, t_log_sum - tl.sum(t_moment, 0) / t_total)
        tl.store(stats + REVERSE_KL * columns, reverse_kl)
        tl.store(stats + FORWARD_KL * columns, forward_kl)
        tl.store(coefs + TEACHER_MAX * columns, t_top)
        tl.store(coefs + TEACHER_LOG_SUM * columns, t_log_sum)
        tl.store(coefs + C_REVERSE_KL * columns, tl.sum(reverse, 0) / total)
    if label_log_probs is not None:
        tl.store(stats + TEACHER_LOG_PROB * columns, tl.load(label_log_probs + row).to(ACC))
    if teacher_entropy is not None:
        tl.store(stats + TEACHER_ENTROPY * columns, tl.load(teacher_entropy + row).to(ACC))
