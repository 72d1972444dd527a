"""The trust gate, for one row or many: twin of `rule.gate` and `rule.rows_with_sums`."""

import triton
import triton.language as tl

from .constants import (
    LOG_PROB,
    TEACHER_ENTROPY,
    TEACHER_LOG_PROB,
)
from .rewards import _log_mix


@triton.jit
def _gate(
    lp, lq, lo, advantage, uniform, prefix, teacher_entropy,
    HAS_ADVANTAGES: tl.constexpr, HAS_PREFIX: tl.constexpr, GATE: tl.constexpr,
    OUTLIER: tl.constexpr, THRESHOLD: tl.constexpr, KL_ENTROPY: tl.constexpr,
    KL_WEIGHT: tl.constexpr, SUMS_OF_EVERY_ROW: tl.constexpr, FROM_CURRENT: tl.constexpr,
    MIX_LOG_SHARE: tl.constexpr, MIX_LOG_REST: tl.constexpr,
):  # fmt: skip
    """Twin of `rule.gate`, all but the reward, and `rule.rows_with_sums`, for one row or many."""
    base = lp if FROM_CURRENT else lo
    level = lq - base
    if MIX_LOG_SHARE is not None:
        level = _log_mix(lq, base, MIX_LOG_SHARE, MIX_LOG_REST) - base
    if HAS_ADVANTAGES:
        level = advantage
    ratio = lq - lo
    # Not minimum(), which of NaN and 0 is 0: what both sides exclude would be accepted.
    acceptance = tl.exp(tl.where(ratio > 0, 0.0, ratio))
    trust = tl.where(lp == lp, 1.0, 1.0).to(lp.dtype)  # not lp * 0 + 1: lp may be infinite
    if GATE == "bernoulli":
        trust = tl.where(uniform < acceptance, 1.0, 0.0).to(lp.dtype)
    elif GATE == "expected":
        trust = acceptance
    elif GATE == "threshold":
        trust = tl.where(level > THRESHOLD, 1.0, 0.0).to(lp.dtype)

    on_policy = lp == lp
    if HAS_PREFIX:
        on_policy = prefix == 0
    else:
        on_policy = on_policy | True
    weight = trust * 0
    if OUTLIER == "forward_kl":
        weight = weight + (1 - trust)
    if KL_ENTROPY is not None:
        weight = weight + tl.where(teacher_entropy > KL_ENTROPY, 1.0, 0.0)
    if KL_WEIGHT != 0:
        weight = weight + KL_WEIGHT
    weight = tl.where(on_policy, weight, 0.0)
    needs_sums = weight > 0
    if OUTLIER == "forward_kl_reward":
        needs_sums = needs_sums | ((trust < 1) & on_policy)
    if SUMS_OF_EVERY_ROW:
        needs_sums = needs_sums | True
    kept = on_policy | True
    if OUTLIER == "mask":
        kept = (trust > 0) | (on_policy == 0)
    return trust, weight, on_policy, kept, needs_sums


@triton.jit
def _row_gate(
    row, old_log_probs, advantages, uniforms, prefix, stats, columns,
    GATE: tl.constexpr, OUTLIER: tl.constexpr, THRESHOLD: tl.constexpr, KL_ENTROPY: tl.constexpr,
    KL_WEIGHT: tl.constexpr, SUMS_OF_EVERY_ROW: tl.constexpr, FROM_CURRENT: tl.constexpr,
    MIX_LOG_SHARE: tl.constexpr, MIX_LOG_REST: tl.constexpr,
):  # fmt: skip
    """`_gate` with its inputs loaded: `row` is one index or a block of them in range."""
    lp = tl.load(stats + LOG_PROB * columns + row)
    lq = tl.load(stats + TEACHER_LOG_PROB * columns + row)
    lo = lp
    advantage = lp
    uniform = lp
    is_prefix = 0
    if old_log_probs is not None:
        lo = tl.load(old_log_probs + row).to(lp.dtype)
    if advantages is not None:
        advantage = tl.load(advantages + row).to(lp.dtype)
    if uniforms is not None:
        uniform = tl.load(uniforms + row).to(lp.dtype)
    if prefix is not None:
        is_prefix = tl.load(prefix + row).to(tl.int32)
    return _gate(
        lp, lq, lo, advantage, uniform, is_prefix,
        tl.load(stats + TEACHER_ENTROPY * columns + row), advantages is not None,
        prefix is not None,
        GATE, OUTLIER, THRESHOLD, KL_ENTROPY, KL_WEIGHT, SUMS_OF_EVERY_ROW, FROM_CURRENT,
        MIX_LOG_SHARE, MIX_LOG_REST,
    )  # fmt: skip
