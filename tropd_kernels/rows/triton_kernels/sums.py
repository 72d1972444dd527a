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
from .exponential import _exp
from .gate import _row_gate
from .generators import _generator
from .logits import _load_logits, _lowest, _tile
from .search import _lanes_search, _search


@triton.jit
def dense_sums_kernel(
    student, teacher, student_bias, teacher_bias, old_log_probs, advantages, uniforms, prefix,
    stats, coefs, sums, vocab_size, student_stride, teacher_stride, columns,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    GATE: tl.constexpr, OUTLIER: tl.constexpr, THRESHOLD: tl.constexpr, KL_ENTROPY: tl.constexpr,
    KL_WEIGHT: tl.constexpr, SUMS_OF_EVERY_ROW: tl.constexpr, FROM_CURRENT: tl.constexpr,
    MIX_LOG_SHARE: tl.constexpr, MIX_LOG_REST: tl.constexpr, BY_GAPS: tl.constexpr,
    PARAMETER: tl.constexpr, GENERATOR: tl.constexpr, TOP_K: tl.constexpr, TAIL: tl.constexpr,
    HAS_KL: tl.constexpr,
    THRESHOLD_GIVEN: tl.constexpr, BY_LANES: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr, SEARCH_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over K, or over the vocabulary, for a row that needs them; other rows are not read.
    THRESHOLD_GIVEN: these are parts of rows, and coefs hold the threshold of K, or of AKL's head,
    in the whole rows. HAS_KL: the forward KL is one of the sums. BY_LANES: the k-th largest is
    searched for among the largest of each lane first, and in the whole row only if the sums find
    too many above it. Sums that come out infinite or NaN are made again with guards."""
    row = tl.program_id(0).to(tl.int64)
    gate = _row_gate(
        row, old_log_probs, advantages, uniforms, prefix, stats, columns,
        GATE, OUTLIER, THRESHOLD, KL_ENTROPY, KL_WEIGHT, SUMS_OF_EVERY_ROW, FROM_CURRENT,
        MIX_LOG_SHARE, MIX_LOG_REST,
    )  # fmt: skip
    needed = gate[4]
    coefs += row
    rows = tl.num_programs(0)
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
        kth = tl.full((), -INF, ACC)
        target = 0
        if TOP_K is not None:
            target = tl.minimum(TOP_K, vocab_size)
        SEARCHED: tl.constexpr = (TOP_K is not None) and not THRESHOLD_GIVEN
        if THRESHOLD_GIVEN:
            threshold = tl.load(coefs + C_THRESHOLD * columns)
        elif BY_GAPS:
            threshold = _search(
                teacher, teacher_bias, t_top, t_log_sum, PARAMETER, vocab_size, True, ACC,
                TEACHER_SCALE, TEACHER_CAP, TEMPERATURE, SEARCH_BLOCK,
            )  # fmt: skip
            threshold = tl.maximum(threshold, _lowest(ACC))
        elif SEARCHED and BY_LANES:
            kth = _lanes_search(
                teacher, teacher_bias, t_top, t_log_sum, target, vocab_size, ACC,
                TEACHER_SCALE, TEACHER_CAP, TEMPERATURE, LANES,
            )  # fmt: skip
        TILE: tl.constexpr = UNROLL * LANES
        whole = vocab_size // TILE * TILE
        search = 0 if BY_LANES else 1  # 1: the next round searches the whole row for K
        unknown = 1  # 1: the sums are not known yet
        while unknown == 1:
            if SEARCHED:
                if search == 1:
                    kth = _search(
                        teacher, teacher_bias, t_top, t_log_sum, target, vocab_size, False,
                        ACC, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE, SEARCH_BLOCK,
                    )  # fmt: skip
                threshold = _threshold(kth, ACC, TEACHER_CAP)
            (
                student_mass, teacher_mass, student_tail, teacher_tail, log_mass, forward_kl,
                value_sum, slope_sum, above,
            ) = _sums(
                student, teacher, student_bias, teacher_bias, top, log_sum, t_top, t_log_sum,
                threshold, kth, whole, vocab_size, ACC, SCALE, CAP, TEACHER_SCALE, TEACHER_CAP,
                TEMPERATURE, PARAMETER, GENERATOR, BY_GAPS, TAIL, TOP_K is not None, HAS_KL,
                SEARCHED and BY_LANES, UNROLL, LANES,
            )  # fmt: skip
            size = tl.abs(forward_kl) + tl.abs(value_sum) + tl.abs(slope_sum)
            unknown = tl.where((size < INF) | (whole == 0), 0, 1)
            whole = tl.where(size < INF, whole, 0)
            if SEARCHED and BY_LANES:  # the lanes may have missed the k-th: search the row, once
                search = tl.where((above >= target) & (search == 0), 1, 2)
                unknown = tl.where(search == 1, 1, unknown)
            else:
                search = 2
    if TOP_K is not None:  # AKL's gradient covers more than its head
        tl.store(coefs + C_THRESHOLD * columns, threshold)
        unasked = tl.where(needed, 0.0, float("nan"))
        tl.store(stats + row + TEACHER_TOPK_MASS * columns, teacher_mass + unasked)
        tl.store(stats + row + STUDENT_TOPK_MASS * columns, student_mass + unasked)
    else:
        tl.store(coefs + C_THRESHOLD * columns, tl.full((), -INF, ACC))
    tl.store(sums + TEACHER_MASS * rows, teacher_mass)
    tl.store(sums + STUDENT_MASS * rows, student_mass)
    tl.store(sums + TEACHER_TAIL * rows, teacher_tail)
    tl.store(sums + STUDENT_TAIL * rows, student_tail)
    tl.store(sums + STUDENT_LOG_MASS * rows, log_mass)
    tl.store(sums + SUM_FORWARD_KL * rows, forward_kl)
    tl.store(sums + SUM_VALUE * rows, value_sum)
    tl.store(sums + SUM_SLOPE * rows, slope_sum)


@triton.jit
def _threshold(kth, ACC: tl.constexpr, TEACHER_CAP: tl.constexpr):
    """The threshold of K. The gradient pass may read recomputed logits, from a GEMM of another
    height that rounds differently: a margin of a few last bits keeps the k-th id in K there, too.
    Ids with teacher probability 0 are never in K."""
    margin: tl.constexpr = 3.6e-15 if ACC == tl.float64 else 1.9e-6
    extent: tl.constexpr = 1.0 if TEACHER_CAP is None else 1.0 + TEACHER_CAP
    return tl.maximum(kth - margin * (tl.abs(kth) + extent), _lowest(ACC))


@triton.jit
def _sums(
    student, teacher, student_bias, teacher_bias, top, log_sum, t_top, t_log_sum, threshold, kth,
    whole, vocab_size, ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr, TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    PARAMETER: tl.constexpr, GENERATOR: tl.constexpr, BY_GAPS: tl.constexpr,
    TAIL: tl.constexpr, ON_K: tl.constexpr, HAS_KL: tl.constexpr, COUNT: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One pass over a row: its sums, and how many ids exceed `kth`. Tails are summed only for
    "bucket", the log of the student's mass only for "renormalize_both". ON_K: over a set K, not
    over the vocabulary. Tiles from the id `whole` on are GUARDED."""
    p_on = tl.zeros((LANES,), ACC)
    q_on = tl.zeros((LANES,), ACC)
    p_off = tl.zeros((LANES,), ACC)
    q_off = tl.zeros((LANES,), ACC)
    kl = tl.zeros((LANES,), ACC)
    values = tl.zeros((LANES,), ACC)
    slopes = tl.zeros((LANES,), ACC)
    k_top = tl.full((LANES,), _lowest(ACC), ACC)
    k_mass = tl.zeros((LANES,), ACC)
    above = tl.zeros((LANES,), tl.int32)
    for start in range(0, whole, UNROLL * LANES):
        p_on, q_on, p_off, q_off, kl, values, slopes, k_top, k_mass, above = _add_tile(
            p_on, q_on, p_off, q_off, kl, values, slopes, k_top, k_mass, above, start,
            student, teacher, student_bias, teacher_bias, top, log_sum, t_top, t_log_sum,
            threshold, kth, vocab_size, False, ACC, SCALE, CAP, TEACHER_SCALE, TEACHER_CAP,
            TEMPERATURE, PARAMETER, GENERATOR, BY_GAPS, TAIL, ON_K, HAS_KL, COUNT, UNROLL, LANES,
        )  # fmt: skip
    for start in range(whole, vocab_size, LANES):
        p_on, q_on, p_off, q_off, kl, values, slopes, k_top, k_mass, above = _add_tile(
            p_on, q_on, p_off, q_off, kl, values, slopes, k_top, k_mass, above, start,
            student, teacher, student_bias, teacher_bias, top, log_sum, t_top, t_log_sum,
            threshold, kth, vocab_size, True, ACC, SCALE, CAP, TEACHER_SCALE, TEACHER_CAP,
            TEMPERATURE, PARAMETER, GENERATOR, BY_GAPS, TAIL, ON_K, HAS_KL, COUNT, 1, LANES,
        )  # fmt: skip
    log_mass = tl.full((), 0.0, ACC)
    if TAIL == "renormalize_both":
        highest = tl.max(k_top, 0)
        mass = tl.sum(k_mass * tl.exp(k_top - highest), 0)
        log_mass = tl.where(mass > 0, highest, -INF) + tl.log(mass)
        if GENERATOR == "topk_reverse_kl":
            values *= tl.exp(k_top - highest) / tl.where(mass > 0, mass, 1.0)
    return (
        tl.sum(p_on, 0), tl.sum(q_on, 0), tl.sum(p_off, 0), tl.sum(q_off, 0), log_mass,
        tl.sum(kl, 0), tl.sum(values, 0), tl.sum(slopes, 0), tl.sum(above, 0),
    )  # fmt: skip


@triton.jit
def _add_tile(
    p_on, q_on, p_off, q_off, kl, values, slopes, k_top, k_mass, above, start,
    student, teacher, student_bias, teacher_bias, top, log_sum, t_top, t_log_sum, threshold, kth,
    vocab_size, GUARDED: tl.constexpr, ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    TEACHER_SCALE: tl.constexpr, TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    PARAMETER: tl.constexpr, GENERATOR: tl.constexpr, BY_GAPS: tl.constexpr,
    TAIL: tl.constexpr, ON_K: tl.constexpr, HAS_KL: tl.constexpr, COUNT: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the lanes' sums. A GUARDED tile may reach beyond the row, and 0 * inf is 0
    there, NaN elsewhere."""
    cols = _tile(start, UNROLL, LANES)
    mask = cols < vocab_size if GUARDED else None
    z = _load_logits(student, student_bias, cols, mask, ACC, SCALE, CAP, TEMPERATURE)
    t = _load_logits(
        teacher, teacher_bias, cols, mask, ACC, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE
    )
    lp = (z - top) - log_sum
    lq = (t - t_top) - t_log_sum
    OF_K: tl.constexpr = (GENERATOR == "topk_reverse_kl") & (TAIL == "renormalize_both")
    p = tl.exp(lp) if GUARDED else _exp(lp)
    q = tl.exp(lq) if GUARDED else _exp(lq)
    on_k = lq >= threshold  # never padding, nor an id that the teacher excludes
    p_on += _sum_where(on_k, p, ON_K)
    if HAS_KL or ON_K:
        q_on += _sum_where(on_k, q, ON_K)
    if HAS_KL:
        term = q * (lq - lp)
        if GUARDED:
            term = tl.where(q > 0, term, 0.0)
        kl += _sum_where(on_k, term, ON_K)
    if COUNT:
        above += tl.sum((lq > kth).to(tl.int32), 0)
    if TAIL == "bucket":
        p_off += tl.sum(tl.where(on_k, 0.0, p), 0)
        q_off += tl.sum(tl.where(on_k, 0.0, q), 0)
    if TAIL == "renormalize_both":
        on_lp = tl.where(on_k, lp, -INF)
        new = tl.maximum(k_top, tl.max(on_lp, 0))
        shrink = _exp(k_top - new)
        share = _exp(on_lp - new[None, :])
        k_mass = k_mass * shrink + tl.sum(share, 0)
        k_top = new
    if OF_K:  # relative to k_top, as k_mass
        values = values * shrink + tl.sum(tl.where(share > 0, share * (lp - lq), 0.0), 0)
    elif GENERATOR is not None:
        value, slope = _generator(lp, lq, p, q, GENERATOR, PARAMETER, GUARDED)
        if GUARDED:
            value = tl.where(mask, value, 0.0)
            slope = tl.where(mask, slope, 0.0)
        values += _sum_where(on_k, value, ON_K)
        slopes += _sum_where(on_k, slope, ON_K)
    elif BY_GAPS:
        gap = tl.abs(p - q)
        values += tl.sum(tl.where(on_k, gap, 0.0), 0)
        slopes += tl.sum(tl.where(on_k, 0.0, gap), 0)
    return p_on, q_on, p_off, q_off, kl, values, slopes, k_top, k_mass, above


@triton.jit
def _sum_where(on_k, value, ON_K: tl.constexpr):
    """Over a tile's first axis, of the ids on K where ON_K, else of all."""
    if ON_K:
        value = tl.where(on_k, value, 0.0)
    return tl.sum(value, 0)
