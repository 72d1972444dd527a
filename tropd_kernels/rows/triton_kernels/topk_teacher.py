"""Sums over the ids of a top-k teacher, and its entropy."""

import triton
import triton.language as tl

from .constants import (
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
    TEACHER_ENTROPY,
    TEACHER_MASS,
    TEACHER_TAIL,
    TEACHER_TOPK_MASS,
)
from .generators import _generator
from .logits import _load_logits


@triton.jit
def _given(row, ids, log_probs, vocab_size, k, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """A row's ids, 0 at padding, and its log-probs, -inf at padding."""
    at = tl.arange(0, BLOCK)
    id_ = tl.load(ids + row * k + at, mask=at < k, other=-1)
    usable = (id_ >= 0) & (id_ < vocab_size)
    lq = tl.load(log_probs + row * k + at, mask=at < k, other=-INF).to(ACC)
    return tl.where(usable, id_, 0), tl.where(usable, lq, -INF)


@triton.jit
def _on_k(row, lq, least):
    """-inf also off K. K holds the ids whose log-probs reach least (n,), all ids where None."""
    if least is not None:
        lq = tl.where(lq < tl.load(least + row).to(lq.dtype), -INF, lq)
    return lq


@triton.jit
def _entropy(lq):
    """Twin of `rule.topk_entropy`."""
    q = tl.exp(lq)
    tail = 1 - tl.sum(q, 0)
    tail = tl.where(tail < 0, 0.0, tail)  # maximum() would drop NaN
    inside = tl.sum(tl.where(q > 0, -q * lq, 0.0), 0)
    return inside - tl.where(tail == 0, 0.0, tail * tl.log(tail))


@triton.jit
def _mass_off(
    student, student_bias, sorted_ids, top, log_sum, vocab_size, k,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The student's mass in a row outside the given ids. A difference from 1 would have no digits
    left where their mass is near 1."""
    mass = tl.zeros((TILE,), ACC)
    at = 0
    next_id = tl.load(sorted_ids)
    for start in range(0, vocab_size, TILE):
        cols = start + tl.arange(0, TILE)
        z = _load_logits(
            student, student_bias, cols, cols < vocab_size, ACC, SCALE, CAP, TEMPERATURE
        )
        p = tl.exp((z - top) - log_sum)
        while next_id < tl.minimum(start + TILE, vocab_size):
            p = tl.where(cols == next_id, 0.0, p)
            at += 1
            next_id = tl.load(sorted_ids + at, mask=at < k, other=vocab_size)
        mass += p
    return tl.sum(mass, 0)


@triton.jit
def topk_teacher_sums_kernel(
    student, student_bias, ids, topk_log_probs, least, sorted_ids, stats, coefs, sums, vocab_size,
    student_stride, k, columns,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    PARAMETER: tl.constexpr, GENERATOR: tl.constexpr, TAIL: tl.constexpr,
    ENTROPY_UNKNOWN: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The sums of `dense_sums_kernel` over K, if the rule has any, and the teacher's entropy, if
    the teacher did not give it. sorted_ids (n, k): the ids of K in ascending order, vocab_size at
    padding; for a bucket, whose tail of the student is a pass over the row."""
    row = tl.program_id(0).to(tl.int64)
    stats += row
    id_, lq = _given(row, ids, topk_log_probs, vocab_size, k, ACC, BLOCK)
    if ENTROPY_UNKNOWN:
        tl.store(stats + TEACHER_ENTROPY * columns, _entropy(lq))
    if sums is not None:
        lq = _on_k(row, lq, least)
        on_k = lq > -INF
        student += row * student_stride
        z = _load_logits(student, student_bias, id_, on_k, ACC, SCALE, CAP, TEMPERATURE)
        coefs += row
        top = tl.load(coefs + STUDENT_MAX * columns)
        log_sum = tl.load(coefs + STUDENT_LOG_SUM * columns)
        lp = (z - top) - log_sum
        p = tl.exp(lp)
        q = tl.exp(lq)
        student_mass = tl.sum(p, 0)
        teacher_mass = tl.sum(q, 0)
        high = tl.max(lp, 0)
        base = tl.where(high == -INF, 0.0, high)
        rows = tl.num_programs(0)
        sums += row
        tl.store(sums + TEACHER_MASS * rows, teacher_mass)
        tl.store(sums + STUDENT_MASS * rows, student_mass)
        if TAIL == "bucket":
            EPS: tl.constexpr = (
                2.220446049250313e-16 if ACC == tl.float64 else 1.1920928955078125e-07
            )
            LEAST: tl.constexpr = EPS if GENERATOR == "topk_reverse_kl" else 0.0
            tl.store(sums + TEACHER_TAIL * rows, tl.maximum(1 - teacher_mass, LEAST))
            student_tail = _mass_off(
                student, student_bias, sorted_ids + row * k, top, log_sum, vocab_size, k,
                ACC, SCALE, CAP, TEMPERATURE, TILE,
            )  # fmt: skip
            tl.store(sums + STUDENT_TAIL * rows, student_tail)
        share = tl.exp(lp - base)
        mass = tl.sum(share, 0)
        tl.store(sums + STUDENT_LOG_MASS * rows, base + tl.log(mass))
        kl = tl.where(on_k & (q > 0), q * (lq - lp), 0.0)
        tl.store(sums + SUM_FORWARD_KL * rows, tl.sum(kl, 0))
        if GENERATOR is not None:
            value, slope = _generator(lp, lq, p, q, GENERATOR, PARAMETER, True)
            if (GENERATOR == "topk_reverse_kl") & (TAIL == "renormalize_both"):
                value = tl.where(share > 0, share * (lp - lq), 0.0) / tl.where(mass > 0, mass, 1.0)
            tl.store(sums + SUM_VALUE * rows, tl.sum(tl.where(on_k, value, 0.0), 0))
            tl.store(sums + SUM_SLOPE * rows, tl.sum(tl.where(on_k, slope, 0.0), 0))
        tl.store(stats + TEACHER_TOPK_MASS * columns, teacher_mass)
        tl.store(stats + STUDENT_TOPK_MASS * columns, student_mass)
