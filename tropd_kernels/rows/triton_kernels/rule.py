"""The token rule on a block of rows: twin of `rule.apply_rule`."""

import triton
import triton.language as tl

from .constants import (
    C_ENTROPY_WEIGHT,
    C_GENERATOR,
    C_LABEL,
    C_MEAN_GAP,
    C_P,
    C_P_TOP_K,
    C_Q,
    C_REVERSE,
    C_THRESHOLD,
    C_UNIFORM,
    ENTROPY,
    FORWARD_KL,
    INF,
    KEPT,
    LEAST_TAIL_32,
    LEAST_TAIL_64,
    LOG_PROB,
    LSE,
    REVERSE_KL,
    REWARD,
    STAT_OUTLIER,
    STUDENT_LOG_MASS,
    STUDENT_LOG_SUM,
    STUDENT_MASS,
    STUDENT_MAX,
    STUDENT_TAIL,
    SUM_FORWARD_KL,
    SUM_SLOPE,
    SUM_VALUE,
    TEACHER_LOG_PROB,
    TEACHER_MASS,
    TEACHER_TAIL,
    TINY_32,
    TINY_64,
    TOKEN_LOSS,
    TRUST,
)
from .gate import _row_gate
from .rewards import _transformed, _with_task


@triton.jit
def _surrogate(reward, ratio, weight, CLIP_LOW: tl.constexpr, CLIP_HIGH: tl.constexpr):
    """PPO's objective: (loss, weight on -log p(y))."""
    held = tl.abs(reward) == INF  # no gradient, as of an infinite divergence
    ratio = tl.where(held, 1.0, ratio)
    clipped = ratio
    # where(), here and below: minimum() and maximum() of NaN and a bound give the bound, and an
    # undefined value would pass for a loss.
    if CLIP_LOW is not None:
        clipped = tl.where(clipped < 1 - CLIP_LOW, 1 - CLIP_LOW, clipped)
        held = held | ((reward < 0) & (ratio < 1 - CLIP_LOW))
    if CLIP_HIGH is not None:
        clipped = tl.where(clipped > 1 + CLIP_HIGH, 1 + CLIP_HIGH, clipped)
        held = held | ((reward > 0) & (ratio > 1 + CLIP_HIGH))
    loss = -tl.minimum(reward * ratio, reward * clipped)
    slope = tl.where(held, 0.0, reward * ratio)
    return _weigh(weight, loss), _weigh(weight, slope)


@triton.jit
def _weigh(weight, value):
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def _reverse_kl(sums, row, n, ACC: tl.constexpr, TAIL: tl.constexpr):
    """Twin of `rule.reverse_kl`."""
    value = tl.load(sums + SUM_VALUE * n + row)
    q_k = tl.load(sums + TEACHER_MASS * n + row)
    share = tl.full(value.shape, 1.0, ACC)
    known = q_k > 0
    log_q_k = tl.log(tl.where(known, q_k, 1.0))
    if TAIL == "bucket":
        p_tail = tl.load(sums + STUDENT_TAIL * n + row)
        excess = tl.log(p_tail) - tl.log(tl.load(sums + TEACHER_TAIL * n + row))
        excess = tl.where(p_tail > 0, excess, 0.0)
        value += p_tail * excess
        p_coef = excess - value
        p_top_k = -value
    elif TAIL == "renormalize_both":
        log_mass = tl.load(sums + STUDENT_LOG_MASS * n + row)
        value = tl.where(known, value + log_q_k - log_mass, value)
        share = tl.where(known, tl.exp(tl.minimum(-log_mass, 80.0)), 0.0)
        p_coef = tl.zeros_like(value)
        p_top_k = _weigh(share, log_q_k - log_mass - value)
    else:
        if TAIL == "raw":
            log_q_k = tl.zeros_like(value)
        p_k = tl.load(sums + STUDENT_MASS * n + row)
        value += p_k * log_q_k
        p_coef = -(value + p_k)
        p_top_k = log_q_k + 1 + p_coef
    counts = tl.abs(value) < INF
    return (
        value, tl.where(counts, p_coef, 0.0), tl.where(counts, p_top_k, 0.0),
        tl.where(counts, share, 0.0),
    )  # fmt: skip


@triton.jit
def rule_kernel(
    old_log_probs, advantages, uniforms, prefix, mixing, task_advantages, token_weight, loss_scale,
    stats, coefs, sums, n, columns,
    ACC: tl.constexpr, GATE: tl.constexpr, OUTLIER: tl.constexpr, THRESHOLD: tl.constexpr,
    KL_ENTROPY: tl.constexpr, KL_WEIGHT: tl.constexpr, SUMS_OF_EVERY_ROW: tl.constexpr,
    FROM_CURRENT: tl.constexpr, MIX_LOG_SHARE: tl.constexpr, MIX_LOG_REST: tl.constexpr,
    TRANSFORM: tl.constexpr, TRANSFORM_PARAMETER: tl.constexpr, LOG_SHARE: tl.constexpr,
    LOG_REST: tl.constexpr, REWARD_LOW: tl.constexpr, REWARD_HIGH: tl.constexpr,
    TASK_WEIGHT: tl.constexpr, REWARD_FILTER: tl.constexpr,
    REVERSE_KL_WEIGHT: tl.constexpr, BY_GAPS: tl.constexpr, GENERATOR: tl.constexpr,
    TAIL: tl.constexpr, POLICY: tl.constexpr, CLIP_LOW: tl.constexpr, CLIP_HIGH: tl.constexpr,
    PREFIX_WEIGHT: tl.constexpr, NLL: tl.constexpr, ENTROPY_COEF: tl.constexpr,
    SMOOTHED: tl.constexpr, UNIFORM: tl.constexpr, Z_LOSS: tl.constexpr,
    USES_TEACHER: tl.constexpr, USES_FORWARD_KL: tl.constexpr, USES_REVERSE_KL: tl.constexpr,
    USES_TOP_K: tl.constexpr, DENSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Twin of `rule.apply_rule`: makes loss and coefficients of statistics and sums (SUMS, n).
    columns: the row stride of stats and coefs."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n
    row = tl.where(inside, row, 0)
    trust, kl_weight, on_policy, kept, _ = _row_gate(
        row, old_log_probs, advantages, uniforms, prefix, stats, columns,
        GATE, OUTLIER, THRESHOLD, KL_ENTROPY, KL_WEIGHT, SUMS_OF_EVERY_ROW, FROM_CURRENT,
        MIX_LOG_SHARE, MIX_LOG_REST,
    )  # fmt: skip
    lp = tl.load(stats + LOG_PROB * columns + row)
    lq = tl.load(stats + TEACHER_LOG_PROB * columns + row)
    zero = tl.zeros((BLOCK,), ACC)
    ratio = zero + 1
    lo = lp
    if old_log_probs is not None:
        lo = tl.load(old_log_probs + row).to(ACC)
        ratio = tl.exp(lp - lo)
    if advantages is not None:
        reward = tl.load(advantages + row).to(ACC)
    else:
        base = lp if FROM_CURRENT else lo
        reward = _transformed(lq, base, TRANSFORM, TRANSFORM_PARAMETER, LOG_SHARE, LOG_REST)
    if REWARD_LOW is not None:
        reward = tl.where(reward < REWARD_LOW, REWARD_LOW, reward)
    if REWARD_HIGH is not None:
        reward = tl.where(reward > REWARD_HIGH, REWARD_HIGH, reward)
    loss = zero
    label = zero + NLL
    p_coef = zero
    p_top_k = zero
    q_coef = zero
    reverse = zero
    generator = zero
    entropy_weight = zero
    uniform = zero

    kl = zero
    kl_p = zero
    kl_p_top_k = zero
    kl_q = zero + 1
    if USES_FORWARD_KL and sums is None:  # over the vocabulary: a statistic of the first pass
        kl = tl.load(stats + FORWARD_KL * columns + row)
        kl_p = zero + 1
        kl_p_top_k = zero + 1
    elif USES_FORWARD_KL or (not DENSE and sums is not None):  # at least a statistic
        kl = tl.load(sums + SUM_FORWARD_KL * n + row)
        teacher_mass = tl.load(sums + TEACHER_MASS * n + row)
        if TAIL == "raw":
            kl_p = teacher_mass
            kl_p_top_k = teacher_mass
        elif TAIL == "bucket":
            LEAST: tl.constexpr = LEAST_TAIL_64 if ACC == tl.float64 else LEAST_TAIL_32
            q_tail = tl.load(sums + TEACHER_TAIL * n + row)
            p_tail = tl.maximum(tl.load(sums + STUDENT_TAIL * n + row), LEAST)
            kl += tl.where(q_tail > 0, q_tail * (tl.log(q_tail) - tl.log(p_tail)), 0.0)
            kl_p = 1 - q_tail / p_tail
            kl_p_top_k = zero + 1
        else:
            infinite = kl == INF
            # A token without any known id has no distribution to renormalise.
            # Nor has one whose mass underflows: its inverse would be infinite.
            TINY: tl.constexpr = TINY_64 if ACC == tl.float64 else TINY_32
            known = teacher_mass >= TINY
            teacher_mass = tl.where(known, teacher_mass, 1.0)
            kl = kl / teacher_mass - tl.log(teacher_mass)
            kl_q = 1 / teacher_mass
            if TAIL == "renormalize_teacher":
                kl_p = tl.where(known, zero + 1, 0.0)
                kl_p_top_k = kl_p
            else:
                # Where p(K) underflows, p / p(K) would be 0/0: a mass below e^-80 counts as none.
                log_mass = tl.load(sums + STUDENT_LOG_MASS * n + row)
                # A student without any mass on K: infinite, not inf - inf.
                kl = tl.where(infinite, INF, tl.where(known, kl + log_mass, 0.0))
                kl_p_top_k = tl.where(known, tl.exp(tl.minimum(-log_mass, 80.0)), 0.0)
    if not DENSE and sums is not None:
        tl.store(stats + FORWARD_KL * columns + row, kl, mask=inside)

    if POLICY != 0:
        task = zero
        if task_advantages is not None:
            task = tl.load(task_advantages + row).to(ACC)
        inner = _with_task(reward, task, TASK_WEIGHT, REWARD_FILTER)
        value, slope = _surrogate(inner, ratio, trust, CLIP_LOW, CLIP_HIGH)
        rewarded = (OUTLIER == "clip") | (OUTLIER == "forward_kl_reward")
        if (GATE != "always") & (rewarded | (TASK_WEIGHT != 0)):
            outside = zero
            if OUTLIER == "clip":
                outside = tl.where(reward < THRESHOLD, THRESHOLD, reward)
            elif OUTLIER == "forward_kl_reward":
                outside = -kl
            outside = _with_task(outside, task, TASK_WEIGHT, REWARD_FILTER)
            value_out, slope_out = _surrogate(outside, ratio, 1 - trust, CLIP_LOW, CLIP_HIGH)
            value += value_out
            slope += slope_out
        loss += POLICY * value
        label += POLICY * slope
    if NLL != 0:
        loss -= NLL * lp
    if SMOOTHED != 0:
        mean_nll = tl.load(coefs + STUDENT_LOG_SUM * columns + row)
        mean_nll -= tl.load(coefs + C_MEAN_GAP * columns + row)
        loss += SMOOTHED * mean_nll
        p_coef += tl.where(mean_nll == INF, 0.0, zero + SMOOTHED)
        p_top_k += tl.where(mean_nll == INF, 0.0, zero + SMOOTHED)
        uniform = tl.where(mean_nll == INF, 0.0, zero + UNIFORM)

    reverse += REVERSE_KL_WEIGHT
    if BY_GAPS:
        head = tl.load(sums + SUM_VALUE * n + row)
        gap = head + tl.load(sums + SUM_SLOPE * n + row)
        share = tl.where(gap > 0, head / tl.where(gap > 0, gap, 1.0), 0.5)
        kl_weight = share
        reverse = 1 - share
        kl = tl.load(stats + FORWARD_KL * columns + row)
        kl_p = zero + 1
        kl_p_top_k = zero + 1
        kl_q = zero + 1
    if mixing is not None:
        share = tl.load(mixing + row).to(ACC)
        kl_weight += share
        reverse = 1 - share
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
    if GENERATOR == "topk_reverse_kl":
        value, more_p, more_p_top_k, generator = _reverse_kl(sums, row, n, ACC, TAIL)
        loss += value
        p_coef += more_p
        p_top_k += more_p_top_k
    elif GENERATOR is not None:
        value = tl.load(sums + SUM_VALUE * n + row)
        loss += value
        generator = tl.where(tl.abs(value) < INF, 1.0, 0.0).to(ACC)
        mean = tl.load(sums + SUM_SLOPE * n + row)
        if not USES_TOP_K:
            mean = mean / tl.load(sums + STUDENT_MASS * n + row)
        p_coef -= _weigh(generator, mean)
        p_top_k -= _weigh(generator, mean)
    if ENTROPY_COEF != 0:
        loss -= ENTROPY_COEF * tl.load(stats + ENTROPY * columns + row)
        entropy_weight = zero - ENTROPY_COEF
    lse = tl.load(coefs + STUDENT_MAX * columns + row)
    lse += tl.load(coefs + STUDENT_LOG_SUM * columns + row)
    if Z_LOSS != 0:
        loss += Z_LOSS * lse * lse
        p_coef += 2 * Z_LOSS * lse
        p_top_k += 2 * Z_LOSS * lse

    counts = inside
    if prefix is not None:
        counts = counts & on_policy
        loss = tl.where(on_policy, loss, PREFIX_WEIGHT * (lq - lp))
        label = tl.where(on_policy, label, PREFIX_WEIGHT)
    p_coef = tl.where(counts, p_coef, 0.0) + label
    p_top_k = tl.where(counts, p_top_k, 0.0) + label
    q_coef = tl.where(counts, q_coef, 0.0)
    reverse = tl.where(counts, reverse, 0.0)
    generator = tl.where(counts, generator, 0.0)
    entropy_weight = tl.where(counts, entropy_weight, 0.0)

    # A label outside the vocabulary has lp = NaN, which must show in the loss and the gradient.
    invalid = lp != lp
    if USES_TEACHER:
        invalid = invalid | (lq != lq)
    loss = tl.where(invalid, float("nan"), loss)
    p_coef = tl.where(invalid, float("nan"), p_coef)
    p_top_k = tl.where(invalid, float("nan"), p_top_k)
    weight = zero + 1
    if token_weight is not None:
        weight = tl.load(token_weight + row).to(ACC)
    scale = tl.full((), 1.0, ACC)
    if loss_scale is not None:
        scale = tl.load(loss_scale).to(ACC)
    if DENSE and sums is None:
        tl.store(coefs + C_THRESHOLD * columns + row, zero - INF, mask=inside)
    tl.store(stats + LSE * columns + row, lse, mask=inside)
    tl.store(stats + REWARD * columns + row, reward, mask=inside)
    tl.store(stats + TRUST * columns + row, tl.where(on_policy, trust, 0.0), mask=inside)
    tl.store(stats + STAT_OUTLIER * columns + row, tl.where(on_policy, 1 - trust, 0.0), mask=inside)
    tl.store(stats + TOKEN_LOSS * columns + row, loss, mask=inside)
    tl.store(stats + KEPT * columns + row, tl.where(kept, 1.0, 0.0), mask=inside)
    tl.store(coefs + C_P * columns + row, p_coef * weight * scale, mask=inside)
    tl.store(coefs + C_P_TOP_K * columns + row, p_top_k * weight * scale, mask=inside)
    tl.store(coefs + C_REVERSE * columns + row, reverse * weight * scale, mask=inside)
    tl.store(coefs + C_ENTROPY_WEIGHT * columns + row, entropy_weight * weight * scale, mask=inside)
    tl.store(coefs + C_Q * columns + row, q_coef * weight * scale, mask=inside)
    tl.store(coefs + C_LABEL * columns + row, label * weight * scale, mask=inside)
    tl.store(coefs + C_GENERATOR * columns + row, generator * weight * scale, mask=inside)
    if SMOOTHED != 0:
        uniform = tl.where(counts, uniform, 0.0)
        tl.store(coefs + C_UNIFORM * columns + row, uniform * weight * scale, mask=inside)
