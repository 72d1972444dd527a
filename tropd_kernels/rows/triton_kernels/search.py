"""The k-th largest of a row, or its head by mass, without sorting. See the package's docstring."""

import triton
import triton.language as tl

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
    # not ~bits, which the interpreter of Triton 3.6 has not for unsigned integers
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
    word: tl.constexpr = tl.uint64 if ACC == tl.float64 else tl.uint32
    found = tl.full((), 0, word)
    searching = tl.full((), 1, tl.int32)
    for digit in range(DIGITS):
        if searching == 1:
            shift = 4 * (DIGITS - 1 - digit)
            pivots = found + (tl.arange(0, 16).to(word) << shift)
            reached = tl.zeros((16,), ACC)
            for start in range(0, vocab_size, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                mask = cols < vocab_size
                t = _load_logits(teacher, bias, cols, mask, ACC, SCALE, CAP, TEMPERATURE)
                lq = (t - base) - log_sum
                weight = tl.where(mask, 1.0, 0.0).to(ACC)
                if BY_MASS:
                    weight = tl.exp(lq)
                above = _bits(lq, ACC)[None, :] >= pivots[:, None]
                reached += tl.sum(tl.where(above, weight[None, :], 0.0), 1)
            enough = reached >= target
            # Counts fall with the pivot, so the digit is the last pivot that is reached often
            # enough.
            chosen = tl.maximum(tl.sum(enough.to(tl.int32), 0) - 1, 0)
            found = found + (chosen.to(word) << shift)
            if not BY_MASS:
                at_chosen = tl.sum(tl.where(tl.arange(0, 16) == chosen, reached, 0.0), 0)
                searching = tl.where(at_chosen == target, 0, 1)
    return _from_bits(found, ACC)
