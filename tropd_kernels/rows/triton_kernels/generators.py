"""Terms of the f-divergences: twin of `generators.generator_terms`."""

import triton
import triton.language as tl

from .constants import INF
from .exponential import _exp


@triton.jit
def _generator(lp, lq, p, q, KIND: tl.constexpr, C: tl.constexpr, GUARDED: tl.constexpr):
    """q f(u) and p g of `generators.generator_terms`. Unless GUARDED, they may be 0 * inf = NaN
    where a side excludes the id."""
    if (KIND == "jsd") | (KIND == "skew_forward") | (KIND == "skew_reverse") | (KIND == "topk_jsd"):
        # From the probabilities at hand; where both underflow, so do their products.
        smallest: tl.constexpr = (
            2.2250738585072014e-308 if p.dtype == tl.float64 else 1.1754943508222875e-38
        )
        TEACHER: tl.constexpr = 1 - C if KIND == "skew_reverse" else C  # its share of m
        m = tl.maximum(TEACHER * q + (1 - TEACHER) * p, smallest)
        lm = tl.log(m)
        from_student = p * (lp - lm)
        from_teacher = q * (lq - lm)
        if GUARDED:
            from_student = tl.where(p > 0, from_student, 0.0)
            from_teacher = tl.where(q > 0, from_teacher, 0.0)
        both = q * (p / m)
        if KIND == "jsd":
            value = C * from_teacher + (1 - C) * from_student
            slope = (1 - C) * from_student
        elif KIND == "skew_forward":
            value = from_teacher
            slope = (C - 1) * both
        elif KIND == "skew_reverse":
            value = from_student
            slope = from_student + TEACHER * both
        else:  # topk_jsd
            value = C * from_teacher
            slope = C * (C - 1) * both
    elif (KIND == "alpha") | (KIND == "chi2"):
        # chi2 is twice the alpha divergence at 2.
        factor: tl.constexpr = 2.0 if KIND == "chi2" else 1.0
        A: tl.constexpr = 2.0 if KIND == "chi2" else C
        neither = (lp == -INF) & (lq == -INF)
        power = tl.where(neither, 0.0, _exp(A * lp + (1 - A) * lq))
        value = (power - A * p - (1 - A) * q) * (factor / (A * (A - 1)))
        slope = (power - p) * (factor / (A - 1))
    elif KIND == "total_variation":
        value = tl.abs(p - q) * 0.5
        slope = p * tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))
    elif (KIND == "mopd") | (KIND == "todi") | (KIND == "topk_reverse_kl"):
        reverse = p * (lp - lq)
        if GUARDED:
            reverse = tl.where(p > 0, reverse, 0.0)
        if KIND == "mopd":
            value = reverse - p + q
            slope = reverse
        elif KIND == "topk_reverse_kl":
            value = reverse
            slope = reverse
        else:  # todi
            to_teacher = tl.where((p == 0) & (q == 0), 0.5, 1 / (1 + _exp(lp - lq)))
            away = tl.where(reverse == 0, 0.0, (1 - to_teacher) * reverse)
            forward = to_teacher * q * (lq - lp)
            if GUARDED:
                forward = tl.where(q > 0, forward, 0.0)
            value = forward + away
            slope = away + (1 - to_teacher) * p - to_teacher * q
    else:
        tl.static_assert(False, "this divergence has no generator in Triton")
    return value, slope
