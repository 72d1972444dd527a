"""The k-th largest of a row, or its head by mass, without sorting. See the package's docstring."""

import triton
import triton.language as tl

from .constants import INF
from .exponential import _exp
from .logits import _load_logits


@triton.jit
def _bits(x, ACC: tl.constexpr):
    """Unsigned integers in the order of the floats."""
    if ACC == tl.float64:
        bits = x.to(tl.uint64, bitcast=True)
        sign = tl.full((), 1, tl.uint64) << 63
    else:
        bits = x.to(tl.uint32, bitcast=True)
        sign = tl.full((), 1, tl.uint32) << 31
    # Not ~bits: Triton 3.6's interpreter lacks it for unsigned integers.
    return tl.where((bits & sign) != 0, bits ^ (sign | (sign - 1)), bits | sign)


@triton.jit
def _from_bits(bits, ACC: tl.constexpr):
    if ACC == tl.float64:
        sign = tl.full((), 1, tl.uint64) << 63
    else:
        sign = tl.full((), 1, tl.uint32) << 31
    return tl.where((bits & sign) != 0, bits ^ sign, bits ^ (sign | (sign - 1))).to(
        ACC, bitcast=True
    )


@triton.jit
def _search(
    teacher, bias, base, log_sum, target, vocab_size, BY_MASS: tl.constexpr, ACC: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest log-prob that at least `target` entries reach (or entries of that much mass)."""
    DIGITS: tl.constexpr = 16 if ACC == tl.float64 else 8
    found = tl.full((), 0, tl.uint64 if ACC == tl.float64 else tl.uint32)
    for digit in range(DIGITS):
        pivots = _pivots(found, digit, DIGITS)
        reached = tl.zeros((16,), ACC)
        for start in range(0, vocab_size, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = cols < vocab_size
            t = _load_logits(teacher, bias, cols, mask, ACC, SCALE, CAP, TEMPERATURE)
            lq = (t - base) - log_sum
            weight = tl.where(mask, 1.0, 0.0).to(ACC)
            if BY_MASS:
                weight = _exp(lq)
            reached += tl.sum(tl.where(_reach(lq, pivots, ACC), weight[None, :], 0.0), 1)
        found, _ = _choose(found, digit, reached, target, DIGITS)
    return _from_bits(found, ACC)


@triton.jit
def _pivots(found, digit, DIGITS: tl.constexpr):
    shift = 4 * (DIGITS - 1 - digit)
    return found + (tl.arange(0, 16).to(found.dtype) << shift)


@triton.jit
def _reach(lq, pivots, ACC: tl.constexpr):
    """(16, entries): whether the entry reaches the pivot."""
    return _bits(lq, ACC)[None, :] >= pivots[:, None]


@triton.jit
def _choose(found, digit, reached, target, DIGITS: tl.constexpr):
    """`found` with one more digit, and how many entries reach it. Counts fall with the pivot, so
    the digit is the last pivot that enough entries reach."""
    chosen = tl.maximum(tl.sum((reached >= target).to(tl.int32), 0) - 1, 0)
    at_chosen = tl.sum(tl.where(tl.arange(0, 16) == chosen, reached, 0), 0)
    return found + (chosen.to(found.dtype) << 4 * (DIGITS - 1 - digit)), at_chosen


@triton.jit
def _lanes_search(
    teacher, bias, base, log_sum, target, vocab_size, ACC: tl.constexpr, SCALE: tl.constexpr,
    CAP: tl.constexpr, TEMPERATURE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The `target`-th largest log-prob among the three largest of every lane. It is also the row's,
    unless `target` or more entries of the row exceed it: then four of the row's largest share a
    lane."""
    first = tl.full((LANES,), -INF, ACC)
    second = tl.full((LANES,), -INF, ACC)
    third = tl.full((LANES,), -INF, ACC)
    for start in range(0, vocab_size, LANES):
        cols = start + tl.arange(0, LANES)
        t = _load_logits(teacher, bias, cols, cols < vocab_size, ACC, SCALE, CAP, TEMPERATURE)
        third = tl.maximum(third, tl.minimum(second, t))
        second = tl.maximum(second, tl.minimum(first, t))
        first = tl.maximum(first, t)
    first = (first - base) - log_sum
    second = (second - base) - log_sum
    third = (third - base) - log_sum
    DIGITS: tl.constexpr = 16 if ACC == tl.float64 else 8
    found = tl.full((), 0, tl.uint64 if ACC == tl.float64 else tl.uint32)
    searching = tl.full((), 1, tl.int32)
    for digit in range(DIGITS):
        if searching == 1:
            pivots = _pivots(found, digit, DIGITS)
            reached = _reach(first, pivots, ACC).to(tl.int32)
            reached += _reach(second, pivots, ACC).to(tl.int32)
            reached += _reach(third, pivots, ACC).to(tl.int32)
            found, at_chosen = _choose(found, digit, tl.sum(reached, 1), target, DIGITS)
            searching = tl.where(at_chosen == target, 0, 1)
    # Where the search stopped early, `found` lies below the entry itself.
    least = _from_bits(found, ACC)
    kth = tl.minimum(_least_above(first, least), _least_above(second, least))
    return tl.min(tl.minimum(kth, _least_above(third, least)), 0)


@triton.jit
def _least_above(lq, least):
    return tl.where(lq >= least, lq, INF)
