"""The row passes as Triton kernels. `triton_rows` launches them; `torch_rows` is their twin.

| kernel            | program   | reads                              | writes                   |
|-------------------|-----------|------------------------------------|--------------------------|
| statistics_kernel | one row   | z and t, once, together            | normalisers, KLs, lp, lq |
| dense_sums_kernel | one row   | t a few times, z and t once more;  | sums over K, or over the |
|                   |           | only in rows whose gate asks       | vocabulary               |
| given_sums_kernel | one row   | z at a top-k teacher's ids         | the same sums            |
| rule_kernel       | 128 rows  | a few numbers a row                | loss, coefficients       |
| gradient_kernel   | one row   | z; t where a coefficient needs it  | d_logits                 |
| given_grad_kernel | one row   | z at a top-k teacher's ids         | d_logits at those ids    |

Every reduction runs in a fixed order within one program and there are no atomics, so two runs are
bitwise equal. Rows lie on grid axis 0 and offsets are 64-bit: neither 65,536 rows nor 2^31 elements
is a limit. `ACC` is float32, or float64 for float64 inputs. Scalars of the rule and of the logit
transform are compile-time constants: they are fixed for a run, and exact in both precisions.

The k-th largest teacher log-prob is found without sorting: floats order as integers once the sign
bit is dealt with, so its bits are fixed from the top, four at a time, by counting how many entries
reach each of sixteen pivots. It stops as soon as a pivot is reached by exactly k entries, mostly
after four or five of the eight rounds, and it runs only in the rows that need it. Weighted by q
instead of counted, the same search finds the head of AKL.
"""

import triton
import triton.language as tl

from .layout import Coef as _Coef
from .layout import Stat as _Stat

# Rows of the two matrices, as constants a kernel can read.
LOG_PROB = tl.constexpr(int(_Stat.LOG_PROB))
TEACHER_LOG_PROB = tl.constexpr(int(_Stat.TEACHER_LOG_PROB))
ENTROPY = tl.constexpr(int(_Stat.ENTROPY))
TEACHER_ENTROPY = tl.constexpr(int(_Stat.TEACHER_ENTROPY))
FORWARD_KL = tl.constexpr(int(_Stat.FORWARD_KL))
REVERSE_KL = tl.constexpr(int(_Stat.REVERSE_KL))
REWARD = tl.constexpr(int(_Stat.REWARD))
TRUST = tl.constexpr(int(_Stat.TRUST))
OUTLIER = tl.constexpr(int(_Stat.OUTLIER))
TEACHER_TOPK_MASS = tl.constexpr(int(_Stat.TEACHER_TOPK_MASS))
STUDENT_TOPK_MASS = tl.constexpr(int(_Stat.STUDENT_TOPK_MASS))
TOKEN_LOSS = tl.constexpr(int(_Stat.TOKEN_LOSS))
KEPT = tl.constexpr(int(_Stat.KEPT))
STUDENT_MAX = tl.constexpr(int(_Coef.STUDENT_MAX))
STUDENT_LOG_SUM = tl.constexpr(int(_Coef.STUDENT_LOG_SUM))
TEACHER_MAX = tl.constexpr(int(_Coef.TEACHER_MAX))
TEACHER_LOG_SUM = tl.constexpr(int(_Coef.TEACHER_LOG_SUM))
C_ENTROPY = tl.constexpr(int(_Coef.ENTROPY))
C_REVERSE_KL = tl.constexpr(int(_Coef.REVERSE_KL))
C_THRESHOLD = tl.constexpr(int(_Coef.THRESHOLD))
C_P = tl.constexpr(int(_Coef.P))
C_P_TOP_K = tl.constexpr(int(_Coef.P_TOP_K))
C_REVERSE = tl.constexpr(int(_Coef.REVERSE))
C_ENTROPY_WEIGHT = tl.constexpr(int(_Coef.ENTROPY_WEIGHT))
C_Q = tl.constexpr(int(_Coef.Q))
C_LABEL = tl.constexpr(int(_Coef.LABEL))
C_GENERATOR = tl.constexpr(int(_Coef.GENERATOR))
# Rows of the scratch matrix between the sums and the rule.
TEACHER_MASS = tl.constexpr(0)
STUDENT_MASS = tl.constexpr(1)
TEACHER_TAIL = tl.constexpr(2)
STUDENT_TAIL = tl.constexpr(3)
STUDENT_LOG_MASS = tl.constexpr(4)
SUM_FORWARD_KL = tl.constexpr(5)
SUM_VALUE = tl.constexpr(6)
SUM_SLOPE = tl.constexpr(7)
SUMS = 8
INF = tl.constexpr(float("inf"))


# --- logits ------------------------------------------------------------------------------------


@triton.jit
def _cap(z, SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    """Scale, soft cap, temperature. tanh(x) = 2 sigmoid(2 x) - 1 saturates cleanly at both ends."""
    z = z * SCALE
    if CAP is not None:
        z = (2 / (1 + tl.exp(z * (-2 / CAP))) - 1) * CAP
    return z / TEMPERATURE


@triton.jit
def _load_logits(
    row_ptr, bias, cols, mask, ACC: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """Transformed logits of one row at `cols`, -inf where masked: a padded column must not look
    like a logit of 0, and a soft cap would lift it to -cap."""
    z = tl.load(row_ptr + cols, mask=mask, other=0.0).to(ACC)
    if bias is not None:
        z += tl.load(bias + cols, mask=mask, other=0.0).to(ACC)
    return tl.where(mask, _cap(z, SCALE, CAP, TEMPERATURE), -INF)


@triton.jit
def _rescale(top, z):
    """New running maximum, and what the old sums shift and shrink by. 0 stands in for a maximum of
    -inf, so that nothing is ever inf - inf."""
    new = tl.maximum(top, tl.max(z, 0))
    base = tl.where(new == -INF, 0.0, new)
    shift = tl.where(top == -INF, 0.0, top - base)
    shrink = tl.where(top == -INF, 0.0, tl.exp(shift))
    return new, base, shift, shrink


@triton.jit
def _moment(total, mass, shift, shrink, weight, value):
    """A running sum of weight * value, whose values all move by `shift` when the maximum does."""
    carried = tl.where(shrink > 0, shrink * (total + shift * mass), 0.0)
    return carried + tl.where(weight > 0, weight * value, 0.0)


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


@triton.jit
def _at(
    row_ptr, bias, col, ACC: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """One transformed logit of a row."""
    z = tl.load(row_ptr + col).to(ACC)
    if bias is not None:
        z += tl.load(bias + col).to(ACC)
    return _cap(z, SCALE, CAP, TEMPERATURE)


# --- the gate ----------------------------------------------------------------------------------


@triton.jit
def _log_mix(lq, lp, C: tl.constexpr, LOG_C: tl.constexpr, LOG_1_C: tl.constexpr):
    """log(c q + (1 - c) p), -inf where both are."""
    a = lq + LOG_C
    b = lp + LOG_1_C
    top = tl.maximum(a, b)
    base = tl.where(top == -INF, 0.0, top)
    return base + tl.log(tl.exp(a - base) + tl.exp(b - base))


@triton.jit
def _gate(
    lp, lq, lo, advantage, uniform, prefix, entropy, teacher_entropy, entropy_threshold,
    HAS_ADVANTAGES: tl.constexpr, HAS_PREFIX: tl.constexpr, HAS_ENTROPY_THRESHOLD: tl.constexpr,
    GATE: tl.constexpr, OUTLIER_IS: tl.constexpr, TAU: tl.constexpr, KL_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, LOG_1_C: tl.constexpr,
):  # fmt: skip
    """Twin of `rule.gate` and `rule.rows_with_sums`, for one row or many."""
    reward = lq - lo
    if DIVERGENCE == "topk_jsd":
        reward = _log_mix(lq, lo, C, LOG_C, LOG_1_C) - lo
    if HAS_ADVANTAGES:
        reward = advantage
    acceptance = tl.exp(tl.minimum(lq - lo, 0.0))
    trust = lp * 0 + 1
    if GATE == "bernoulli":
        trust = tl.where(uniform < acceptance, 1.0, 0.0).to(lp.dtype)
    elif GATE == "expected":
        trust = acceptance
    elif GATE == "threshold":
        trust = tl.where(reward > TAU, 1.0, 0.0).to(lp.dtype)

    on_policy = lp == lp
    if HAS_PREFIX:
        on_policy = prefix == 0
    else:
        on_policy = on_policy | True
    kept = on_policy | True
    if HAS_ENTROPY_THRESHOLD:
        kept = entropy >= entropy_threshold
    weight = trust * 0
    if OUTLIER_IS == "forward_kl":
        weight = weight + (1 - trust)
    if KL_ENTROPY is not None:
        weight = weight + tl.where(teacher_entropy > KL_ENTROPY, 1.0, 0.0)
    if (DIVERGENCE == "forward_kl") | (DIVERGENCE == "jeffreys"):
        weight = weight + 1
    weight = tl.where(on_policy & kept, weight, 0.0)
    needs_sums = weight > 0
    if OUTLIER_IS == "forward_kl_reward":
        needs_sums = needs_sums | ((trust < 1) & on_policy)
    if (DIVERGENCE is not None) & (DIVERGENCE != "reverse_kl"):
        needs_sums = needs_sums | True
    if OUTLIER_IS == "mask":
        kept = kept & (trust > 0)
    kept = kept | (on_policy == 0)
    return trust, reward, weight, on_policy, kept, needs_sums


# --- sums --------------------------------------------------------------------------------------


@triton.jit
def _generator(
    lp, lq, p, q, KIND: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, LOG_1_C: tl.constexpr
):
    """q f(u) and p g of `generators.generator_terms`."""
    if (KIND == "jsd") | (KIND == "skew_forward") | (KIND == "skew_reverse") | (KIND == "topk_jsd"):
        lm = _log_mix(lq, lp, C, LOG_C, LOG_1_C)
        from_student = tl.where(p > 0, p * (lp - lm), 0.0)
        from_teacher = tl.where(q > 0, q * (lq - lm), 0.0)
        both = tl.where((p > 0) & (q > 0), tl.exp(lp + lq - lm), 0.0)
        if KIND == "jsd":
            value = C * from_teacher + (1 - C) * from_student
            slope = (1 - C) * from_student
        elif KIND == "skew_forward":
            value = from_teacher
            slope = (C - 1) * both
        elif KIND == "skew_reverse":
            value = from_student
            slope = from_student + C * both
        else:
            value = C * from_teacher
            slope = C * (C - 1) * both
    elif (KIND == "alpha") | (KIND == "chi2"):
        neither = (lp == -INF) & (lq == -INF)
        power = tl.where(neither, 0.0, tl.exp(C * lp + (1 - C) * lq))
        factor: tl.constexpr = 2.0 if KIND == "chi2" else 1.0
        value = (power - C * p - (1 - C) * q) * (factor / (C * (C - 1)))
        slope = (power - p) * (factor / (C - 1))
    elif KIND == "total_variation":
        value = tl.abs(p - q) * 0.5
        slope = p * tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))
    else:
        reverse = tl.where(p > 0, p * (lp - lq), 0.0)
        if KIND == "mopd":
            value = reverse - p + q
            slope = reverse
        else:  # todi
            to_teacher = tl.where((p == 0) & (q == 0), 0.5, 1 / (1 + tl.exp(lp - lq)))
            away = tl.where(reverse == 0, 0.0, (1 - to_teacher) * reverse)
            value = tl.where(q > 0, to_teacher * q * (lq - lp), 0.0) + away
            slope = away + (1 - to_teacher) * p - to_teacher * q
    return value, slope


@triton.jit
def _bits(x, ACC: tl.constexpr):
    """Unsigned integers in the order of the floats."""
    if ACC == tl.float64:
        bits = x.to(tl.uint64, bitcast=True)
        sign = tl.full((), 1, tl.uint64) << 63
    else:
        bits = x.to(tl.uint32, bitcast=True)
        sign = tl.full((), 1, tl.uint32) << 31
    return tl.where((bits & sign) != 0, ~bits, bits | sign)


@triton.jit
def _from_bits(bits, ACC: tl.constexpr):
    if ACC == tl.float64:
        sign = tl.full((), 1, tl.uint64) << 63
    else:
        sign = tl.full((), 1, tl.uint32) << 31
    return tl.where((bits & sign) != 0, bits ^ sign, ~bits).to(ACC, bitcast=True)


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


@triton.jit
def dense_sums_kernel(
    student, teacher, student_bias, teacher_bias, old_log_probs, advantages, uniforms, prefix,
    entropy_threshold, stats, coefs, sums, vocab_size, student_stride, teacher_stride, columns,
    ACC: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, TEACHER_SCALE: tl.constexpr,
    TEACHER_CAP: tl.constexpr, TEMPERATURE: tl.constexpr,
    GATE: tl.constexpr, OUTLIER_IS: tl.constexpr, TAU: tl.constexpr, KL_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, LOG_1_C: tl.constexpr,
    GENERATOR: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, SEARCH_BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over K (or the vocabulary) for a row that needs them; a row that does not costs
    nothing."""
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
        if DIVERGENCE == "akl":
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


# --- the rule ----------------------------------------------------------------------------------


@triton.jit
def _row_gate(
    row, old_log_probs, advantages, uniforms, prefix, entropy_threshold, stats, columns,
    GATE: tl.constexpr, OUTLIER_IS: tl.constexpr, TAU: tl.constexpr, KL_ENTROPY: tl.constexpr,
    DIVERGENCE: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, LOG_1_C: tl.constexpr,
):  # fmt: skip
    """`_gate` with its inputs loaded: `row` is one index or a block of them in range."""
    lp = tl.load(stats + LOG_PROB * columns + row)
    lq = tl.load(stats + TEACHER_LOG_PROB * columns + row)
    lo = lp
    advantage = lp
    uniform = lp
    is_prefix = 0
    limit = 0.0
    if old_log_probs is not None:
        lo = tl.load(old_log_probs + row).to(lp.dtype)
    if advantages is not None:
        advantage = tl.load(advantages + row).to(lp.dtype)
    if uniforms is not None:
        uniform = tl.load(uniforms + row).to(lp.dtype)
    if prefix is not None:
        is_prefix = tl.load(prefix + row).to(tl.int32)
    if entropy_threshold is not None:
        limit = tl.load(entropy_threshold)
    return _gate(
        lp, lq, lo, advantage, uniform, is_prefix, tl.load(stats + ENTROPY * columns + row),
        tl.load(stats + TEACHER_ENTROPY * columns + row), limit,
        advantages is not None, prefix is not None, entropy_threshold is not None,
        GATE, OUTLIER_IS, TAU, KL_ENTROPY, DIVERGENCE, C, LOG_C, LOG_1_C,
    )  # fmt: skip


@triton.jit
def _surrogate(reward, ratio, weight, CLIP_LOW: tl.constexpr, CLIP_HIGH: tl.constexpr):
    """PPO's objective: (loss, weight on -log p(y))."""
    clipped = ratio
    held = ratio != ratio
    if CLIP_LOW is not None:
        clipped = tl.maximum(clipped, 1 - CLIP_LOW)
        held = held | ((reward < 0) & (ratio < 1 - CLIP_LOW))
    if CLIP_HIGH is not None:
        clipped = tl.minimum(clipped, 1 + CLIP_HIGH)
        held = held | ((reward > 0) & (ratio > 1 + CLIP_HIGH))
    loss = -tl.minimum(reward * ratio, reward * clipped)
    slope = tl.where(held, 0.0, reward * ratio)
    return _weigh(weight, loss), _weigh(weight, slope)


@triton.jit
def _weigh(weight, value):
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def rule_kernel(
    old_log_probs, advantages, uniforms, prefix, token_weight, entropy_threshold,
    stats, coefs, sums, n, columns,
    ACC: tl.constexpr, GATE: tl.constexpr, OUTLIER_IS: tl.constexpr, TAU: tl.constexpr,
    KL_ENTROPY: tl.constexpr, DIVERGENCE: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr,
    LOG_1_C: tl.constexpr, GENERATOR: tl.constexpr, TAIL: tl.constexpr, POLICY: tl.constexpr,
    CLIP_LOW: tl.constexpr, CLIP_HIGH: tl.constexpr, PREFIX_WEIGHT: tl.constexpr,
    NLL: tl.constexpr, ENTROPY_COEF: tl.constexpr, USES_TEACHER: tl.constexpr,
    USES_FORWARD_KL: tl.constexpr, USES_REVERSE_KL: tl.constexpr, USES_TOP_K: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Twin of `rule.apply_rule`: a row's statistics and sums to its loss and coefficients."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    row = tl.where(inside, row, 0)
    trust, reward, kl_weight, on_policy, kept, _ = _row_gate(
        row, old_log_probs, advantages, uniforms, prefix, entropy_threshold, stats, columns,
        GATE, OUTLIER_IS, TAU, KL_ENTROPY, DIVERGENCE, C, LOG_C, LOG_1_C,
    )  # fmt: skip
    lp = tl.load(stats + LOG_PROB * columns + row)
    lq = tl.load(stats + TEACHER_LOG_PROB * columns + row)
    zero = tl.zeros((BLOCK,), ACC)
    loss = zero
    label = zero + NLL
    p_coef = zero
    p_top_k = zero
    q_coef = zero
    reverse = zero
    generator = zero
    entropy_weight = zero

    kl = zero
    kl_p = zero
    kl_p_top_k = zero
    kl_q = zero + 1
    if USES_FORWARD_KL and sums is None:  # over the whole vocabulary: the first pass has it
        kl = tl.load(stats + FORWARD_KL * columns + row)
        kl_p = zero + 1
    elif USES_FORWARD_KL:
        kl = tl.load(sums + SUM_FORWARD_KL * columns + row)
        teacher_mass = tl.load(sums + TEACHER_MASS * columns + row)
        if TAIL == "raw":
            kl_p = teacher_mass
        elif TAIL == "bucket":
            EPS: tl.constexpr = (
                2.220446049250313e-16 if ACC == tl.float64 else 1.1920928955078125e-07
            )
            q_tail = tl.load(sums + TEACHER_TAIL * columns + row)
            p_tail = tl.maximum(tl.load(sums + STUDENT_TAIL * columns + row), EPS)
            kl += tl.where(q_tail > 0, q_tail * (tl.log(q_tail) - tl.log(p_tail)), 0.0)
            kl_p = 1 - q_tail / p_tail
            kl_p_top_k = 1 - kl_p
        else:
            kl = kl / teacher_mass - tl.log(teacher_mass)
            kl_q = 1 / teacher_mass
            if TAIL == "renormalize_teacher":
                kl_p = zero + 1
            else:
                # p / p(K) with p(K) underflowing would be 0/0; e^-80 of mass on K is as good as
                # none.
                log_mass = tl.load(sums + STUDENT_LOG_MASS * columns + row)
                kl += log_mass
                kl_p_top_k = tl.exp(tl.minimum(-log_mass, 80.0))
    if USES_FORWARD_KL and not DENSE:
        tl.store(stats + FORWARD_KL * columns + row, kl, mask=inside)

    if POLICY != 0:
        ratio = zero + 1
        if old_log_probs is not None:
            ratio = tl.exp(lp - tl.load(old_log_probs + row).to(ACC))
        value, slope = _surrogate(reward, ratio, trust, CLIP_LOW, CLIP_HIGH)
        if GATE != "always":
            if OUTLIER_IS == "clip":
                value_out, slope_out = _surrogate(
                    tl.maximum(reward, TAU), ratio, 1 - trust, CLIP_LOW, CLIP_HIGH
                )
                value += value_out
                slope += slope_out
            elif OUTLIER_IS == "forward_kl_reward":
                value_out, slope_out = _surrogate(-kl, ratio, 1 - trust, CLIP_LOW, CLIP_HIGH)
                value += value_out
                slope += slope_out
        loss += POLICY * value
        label += POLICY * slope
    if NLL != 0:
        loss -= NLL * lp

    if (DIVERGENCE == "reverse_kl") | (DIVERGENCE == "jeffreys"):
        reverse += 1
    if DIVERGENCE == "akl":
        head = tl.load(sums + SUM_VALUE * columns + row)
        gap = head + tl.load(sums + SUM_SLOPE * columns + row)
        share = tl.where(gap > 0, head / tl.where(gap > 0, gap, 1.0), 0.5)
        kl_weight = share
        reverse = 1 - share
        kl = tl.load(stats + FORWARD_KL * columns + row)
        kl_p = zero + 1
        kl_p_top_k = zero
        kl_q = zero + 1
    if USES_FORWARD_KL:
        loss += _weigh(kl_weight, kl)
        kl_weight = tl.where(kl == INF, 0.0, kl_weight)
        p_coef += kl_weight * kl_p
        p_top_k += kl_weight * kl_p_top_k
        q_coef += kl_weight * kl_q
    if USES_REVERSE_KL:
        exact = tl.load(stats + REVERSE_KL * columns + row)
        loss += _weigh(reverse, exact)
        reverse = tl.where(exact == INF, 0.0, reverse)
    if GENERATOR is not None:
        value = tl.load(sums + SUM_VALUE * columns + row)
        loss += value
        generator = tl.where(tl.abs(value) < INF, 1.0, 0.0).to(ACC)
        mean = tl.load(sums + SUM_SLOPE * columns + row)
        if not USES_TOP_K:
            mean = mean / tl.load(sums + STUDENT_MASS * columns + row)
        p_coef -= _weigh(generator, mean)
    if ENTROPY_COEF != 0:
        loss -= ENTROPY_COEF * tl.load(stats + ENTROPY * columns + row)
        entropy_weight = zero - ENTROPY_COEF

    counts = inside
    if entropy_threshold is not None:
        counts = tl.load(stats + ENTROPY * columns + row) >= tl.load(entropy_threshold)
        loss = tl.where(counts, loss, 0.0)
        label = tl.where(counts, label, 0.0)
    if prefix is not None:
        counts = counts & on_policy
        loss = tl.where(on_policy, loss, PREFIX_WEIGHT * (lq - lp))
        label = tl.where(on_policy, label, PREFIX_WEIGHT)
    p_coef = tl.where(counts, p_coef, 0.0) + label
    p_top_k = tl.where(counts, p_top_k, 0.0)
    q_coef = tl.where(counts, q_coef, 0.0)
    reverse = tl.where(counts, reverse, 0.0)
    generator = tl.where(counts, generator, 0.0)
    entropy_weight = tl.where(counts, entropy_weight, 0.0)

    # A label outside the vocabulary has lp = NaN: its row says so instead of looking right.
    invalid = lp != lp
    if USES_TEACHER:
        invalid = invalid | (lq != lq)
    loss = tl.where(invalid, float("nan"), loss)
    p_coef = tl.where(invalid, float("nan"), p_coef)
    weight = zero + 1
    if token_weight is not None:
        weight = tl.load(token_weight + row).to(ACC)
    tl.store(stats + REWARD * columns + row, reward, mask=inside)
    tl.store(stats + TRUST * columns + row, tl.where(on_policy, trust, 0.0), mask=inside)
    tl.store(stats + OUTLIER * columns + row, tl.where(on_policy, 1 - trust, 0.0), mask=inside)
    tl.store(stats + TOKEN_LOSS * columns + row, loss, mask=inside)
    tl.store(stats + KEPT * columns + row, tl.where(kept, 1.0, 0.0), mask=inside)
    tl.store(coefs + C_P * columns + row, p_coef * weight, mask=inside)
    tl.store(coefs + C_P_TOP_K * columns + row, p_top_k * weight, mask=inside)
    tl.store(coefs + C_REVERSE * columns + row, reverse * weight, mask=inside)
    tl.store(coefs + C_ENTROPY_WEIGHT * columns + row, entropy_weight * weight, mask=inside)
    tl.store(coefs + C_Q * columns + row, q_coef * weight, mask=inside)
    tl.store(coefs + C_LABEL * columns + row, label * weight, mask=inside)
    tl.store(coefs + C_GENERATOR * columns + row, generator * weight, mask=inside)


# --- the gradient ------------------------------------------------------------------------------


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
    chain = z * 0 + SCALE / TEMPERATURE
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
