"""The first pass over a row: normalisers, entropies, exact KLs, the label's log-probs.

Every lane of a program (`logits.py`) keeps an online softmax of both rows, with first moments of
z - max and of the difference of the two. The entropies and both KLs follow from them without the
cancellation of E[z] - E[t]. Lanes are joined at the end of the row; where several programs share a
row, `join_kernel` joins their sums. HAS_MEAN: they also sum z - max without weights.

The sums of weight * value have no guard against ids that one side excludes, where the product is
0 * inf. A row whose sums come out infinite or NaN is read once more, relative to its final maxima,
with a guard around each product. This also covers an infinite gap found while a maximum was still
rising, whose remainder would depend on the order of ids. A partly filled last tile has padding, and
is guarded too.
"""

import triton
import triton.language as tl

from .constants import (
    C_ENTROPY,
    C_MEAN_GAP,
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
from .exponential import _exp
from .logits import _at, _load_logits, _lowest, _moved, _raise_to, _tile, _weighed


@triton.jit
def statistics_kernel(
    student, teacher, student_bias, teacher_bias, labels, label_log_probs, teacher_entropy,
    stats, coefs, parts, vocab_size, student_stride, teacher_stride, columns,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr, HAS_MEAN: tl.constexpr,
    PARTS: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One part of a row of student logits, and of the teacher's. parts (8, PARTS, rows), or with
    HAS_MEAN (10, PARTS, rows), receives the parts' maxima and sums where PARTS > 1."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    student += row * student_stride
    if teacher is not None:
        teacher += row * teacher_stride
    lowest: tl.constexpr = _lowest(ACC)
    top = tl.full((LANES,), lowest, ACC)
    mass = tl.zeros((LANES,), ACC)
    moment = tl.zeros((LANES,), ACC)
    gaps = tl.zeros((LANES,), ACC)
    count = tl.zeros((LANES,), ACC)
    t_top = tl.full((LANES,), lowest, ACC)
    t_mass = tl.zeros((LANES,), ACC)
    t_moment = tl.zeros((LANES,), ACC)
    reverse = tl.zeros((LANES,), ACC)
    forward = tl.zeros((LANES,), ACC)
    TILE: tl.constexpr = UNROLL * LANES
    width = tl.cdiv(tl.cdiv(vocab_size, TILE), PARTS) * TILE
    begin = part * width
    end = tl.minimum(begin + width, vocab_size)
    whole = tl.minimum(end, vocab_size // TILE * TILE)
    for start in range(begin, whole, TILE):
        top, mass, moment, gaps, count, t_top, t_mass, t_moment, reverse, forward = _add_tile(
            top, mass, moment, gaps, count, t_top, t_mass, t_moment, reverse, forward, start,
            student, teacher, student_bias, teacher_bias, vocab_size, False, ACC, SCALE, CAP,
            TEACHER_SCALE, TEACHER_CAP, TEMPERATURE, HAS_MEAN, UNROLL, LANES,
        )  # fmt: skip
    if (begin <= whole) & (whole < end):
        top, mass, moment, gaps, count, t_top, t_mass, t_moment, reverse, forward = _add_tile(
            top, mass, moment, gaps, count, t_top, t_mass, t_moment, reverse, forward, whole,
            student, teacher, student_bias, teacher_bias, vocab_size, True, ACC, SCALE, CAP,
            TEACHER_SCALE, TEACHER_CAP, TEMPERATURE, HAS_MEAN, UNROLL, LANES,
        )  # fmt: skip

    top, mass, moment, gaps, count, t_top, t_mass, t_moment, reverse, forward = _join(
        top, mass, moment, gaps, count, t_top, t_mass, t_moment, reverse, forward
    )
    if PARTS == 1:
        _finish(
            top, mass, moment, gaps, t_top, t_mass, t_moment, reverse, forward,
            row, student, teacher, student_bias, teacher_bias, labels, label_log_probs,
            teacher_entropy, stats, coefs, vocab_size, columns,
            ACC, SCALE, CAP, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE, HAS_MEAN,
            UNROLL, LANES,
        )  # fmt: skip
    else:
        rows = tl.num_programs(0)
        parts += part * rows + row
        step = PARTS * rows
        tl.store(parts, top)
        tl.store(parts + step, mass)
        tl.store(parts + 2 * step, moment)
        tl.store(parts + 3 * step, t_top)
        tl.store(parts + 4 * step, t_mass)
        tl.store(parts + 5 * step, t_moment)
        tl.store(parts + 6 * step, reverse)
        tl.store(parts + 7 * step, forward)
        if HAS_MEAN:
            tl.store(parts + 8 * step, gaps)
            tl.store(parts + 9 * step, count)


@triton.jit
def _add_tile(
    top, mass, moment, gaps, count, t_top, t_mass, t_moment, reverse, forward, start,
    student, teacher, student_bias, teacher_bias, vocab_size, PADDED: tl.constexpr,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr, HAS_MEAN: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Adds a tile to the lanes' maxima and sums. PADDED: it may reach beyond the row."""
    cols = _tile(start, UNROLL, LANES)
    mask = cols < vocab_size if PADDED else None
    z = _load_logits(student, student_bias, cols, mask, ACC, SCALE, CAP, TEMPERATURE)
    new = tl.maximum(top, tl.max(z, 0))
    shift, shrink = _raise_to(top, new, PADDED)
    top = new
    z = z - top[None, :]
    if HAS_MEAN:
        gaps = _shifted(gaps, count, shift)
        if PADDED:
            gaps += tl.sum(tl.where(mask, z, 0.0), 0)
            count += tl.sum((cols < vocab_size).to(ACC), 0)
        else:
            gaps += tl.sum(z, 0)
            count += UNROLL
    e = tl.exp(z) if PADDED else _exp(z)
    moment = _moved(moment, mass, shift, shrink, PADDED) + _weighed(e, z, PADDED)
    if teacher is not None:
        t = _load_logits(
            teacher, teacher_bias, cols, mask, ACC, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE
        )
        new = tl.maximum(t_top, tl.max(t, 0))
        t_shift, t_shrink = _raise_to(t_top, new, PADDED)
        t_top = new
        t = t - t_top[None, :]
        t_e = tl.exp(t) if PADDED else _exp(t)
        gap = z - t
        reverse = _moved(reverse, mass, shift - t_shift, shrink, PADDED) + _weighed(e, gap, PADDED)
        forward = _moved(forward, t_mass, t_shift - shift, t_shrink, PADDED) + _weighed(
            t_e, -gap, PADDED
        )
        t_moment = _moved(t_moment, t_mass, t_shift, t_shrink, PADDED) + _weighed(t_e, t, PADDED)
        t_mass = t_mass * t_shrink + tl.sum(t_e, 0)
    mass = mass * shrink + tl.sum(e, 0)
    return top, mass, moment, gaps, count, t_top, t_mass, t_moment, reverse, forward


@triton.jit
def _shifted(gaps, count, shift):
    """Sums of `count` gaps to a maximum that has risen by -shift. Before the first id it rises from
    the lowest number."""
    return gaps + tl.where(count > 0, shift * count, 0.0)


@triton.jit
def join_kernel(
    student, teacher, student_bias, teacher_bias, labels, label_log_probs, teacher_entropy,
    stats, coefs, parts, vocab_size, student_stride, teacher_stride, columns,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr, HAS_MEAN: tl.constexpr,
    PARTS: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A row's statistics from those of its parts."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    if teacher is not None:
        teacher += row * teacher_stride
    rows = tl.num_programs(0)
    parts += tl.arange(0, PARTS) * rows + row
    step = PARTS * rows
    gaps = tl.zeros((PARTS,), ACC)
    count = tl.zeros((PARTS,), ACC)
    if HAS_MEAN:
        gaps = tl.load(parts + 8 * step)
        count = tl.load(parts + 9 * step)
    top, mass, moment, gaps, _, t_top, t_mass, t_moment, reverse, forward = _join(
        tl.load(parts), tl.load(parts + step), tl.load(parts + 2 * step), gaps, count,
        tl.load(parts + 3 * step), tl.load(parts + 4 * step), tl.load(parts + 5 * step),
        tl.load(parts + 6 * step), tl.load(parts + 7 * step),
    )  # fmt: skip
    _finish(
        top, mass, moment, gaps, t_top, t_mass, t_moment, reverse, forward,
        row, student, teacher, student_bias, teacher_bias, labels, label_log_probs,
        teacher_entropy, stats, coefs, vocab_size, columns,
        ACC, SCALE, CAP, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE, HAS_MEAN,
        UNROLL, LANES,
    )  # fmt: skip


@triton.jit
def _join(top, mass, moment, gaps, count, t_top, t_mass, t_moment, reverse, forward):
    """Joins the maxima and sums of lanes, or of parts, into one each."""
    shift, shrink = _raise_to(top, tl.max(top, 0), True)
    t_shift, t_shrink = _raise_to(t_top, tl.max(t_top, 0), True)
    return (
        tl.max(top, 0),
        tl.sum(mass * shrink, 0),
        tl.sum(_moved(moment, mass, shift, shrink, True), 0),
        tl.sum(_shifted(gaps, count, shift), 0),
        tl.sum(count, 0),
        tl.max(t_top, 0),
        tl.sum(t_mass * t_shrink, 0),
        tl.sum(_moved(t_moment, t_mass, t_shift, t_shrink, True), 0),
        tl.sum(_moved(reverse, mass, shift - t_shift, shrink, True), 0),
        tl.sum(_moved(forward, t_mass, t_shift - shift, t_shrink, True), 0),
    )


@triton.jit
def _finish(
    top, total, moment, gaps, t_top, t_total, t_moment, reverse, forward,
    row, student, teacher, student_bias, teacher_bias, labels, label_log_probs, teacher_entropy,
    stats, coefs, vocab_size, columns,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr, HAS_MEAN: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A row's numbers from its maxima and sums."""
    finite = tl.abs(moment) < INF
    if teacher is not None:
        finite = finite & (tl.abs(t_moment) < INF)
        finite = finite & (tl.abs(reverse) < INF) & (tl.abs(forward) < INF)
    if finite:
        pass
    else:  # ids are excluded, a KL is infinite, or infinities cancelled
        guarded, t_guarded, reverse, forward = _guarded_sums(
            top, t_top, student, teacher, student_bias, teacher_bias, vocab_size, ACC,
            SCALE, CAP, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE, UNROLL, LANES,
        )  # fmt: skip
        # A student's finite entropy keeps its bits, whatever the teacher's row holds.
        moment = tl.where(tl.abs(moment) < INF, moment, guarded)
        t_moment = tl.where(tl.abs(t_moment) < INF, t_moment, t_guarded)
    top = tl.where(total == 0, -INF, top)
    log_sum = tl.log(total)
    entropy = log_sum - moment / total
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
    if HAS_MEAN:
        tl.store(coefs + C_MEAN_GAP * columns, gaps / vocab_size)
    if teacher is not None:
        t_top = tl.where(t_total == 0, -INF, t_top)
        t_log_sum = tl.log(t_total)
        t = _at(teacher, teacher_bias, at, ACC, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE)
        t_log_prob = tl.where(known, (t - t_top) - t_log_sum, float("nan"))
        tl.store(stats + TEACHER_LOG_PROB * columns, t_log_prob)
        tl.store(stats + TEACHER_ENTROPY * columns, t_log_sum - t_moment / t_total)
        tl.store(stats + REVERSE_KL * columns, reverse / total - log_sum + t_log_sum)
        tl.store(stats + FORWARD_KL * columns, forward / t_total - t_log_sum + log_sum)
        tl.store(coefs + TEACHER_MAX * columns, t_top)
        tl.store(coefs + TEACHER_LOG_SUM * columns, t_log_sum)
        tl.store(coefs + C_REVERSE_KL * columns, reverse / total)
    if label_log_probs is not None:
        tl.store(stats + TEACHER_LOG_PROB * columns, tl.load(label_log_probs + row).to(ACC))
    if teacher_entropy is not None:
        tl.store(stats + TEACHER_ENTROPY * columns, tl.load(teacher_entropy + row).to(ACC))


@triton.jit
def _guarded_sums(
    top, t_top, student, teacher, student_bias, teacher_bias, vocab_size, ACC: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr, UNROLL: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The moments of both sides and the sums of gaps, relative to the row's final maxima."""
    moment = tl.zeros((LANES,), ACC)
    t_moment = tl.zeros((LANES,), ACC)
    reverse = tl.zeros((LANES,), ACC)
    forward = tl.zeros((LANES,), ACC)
    for start in range(0, vocab_size, UNROLL * LANES):
        cols = _tile(start, UNROLL, LANES)
        mask = cols < vocab_size
        z = _load_logits(student, student_bias, cols, mask, ACC, SCALE, CAP, TEMPERATURE) - top
        e = tl.exp(z)
        moment += _weighed(e, z, True)
        if teacher is not None:
            t = _load_logits(
                teacher, teacher_bias, cols, mask, ACC, TEACHER_SCALE, TEACHER_CAP, TEMPERATURE
            ) - t_top  # fmt: skip
            t_e = tl.exp(t)
            t_moment += _weighed(t_e, t, True)
            reverse += _weighed(e, z - t, True)
            forward += _weighed(t_e, t - z, True)
    return tl.sum(moment, 0), tl.sum(t_moment, 0), tl.sum(reverse, 0), tl.sum(forward, 0)
