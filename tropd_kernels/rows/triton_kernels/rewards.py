"""Transforms of the reward, for one row or many: twin of `rewards.transformed`."""

import triton
import triton.language as tl

from .constants import INF


@triton.jit
def _log_mix(lq, lp, LOG_SHARE: tl.constexpr, LOG_REST: tl.constexpr):
    """log(c q + (1 - c) p) with the logs of c and 1 - c, -inf where both are."""
    a = lq + LOG_SHARE
    b = lp + LOG_REST
    top = tl.maximum(a, b)
    base = tl.where(top == -INF, 0.0, top)
    return base + tl.log(tl.exp(a - base) + tl.exp(b - base))


@triton.jit
def _transformed(
    lq, lo, REWARD: tl.constexpr, PARAMETER: tl.constexpr, LOG_SHARE: tl.constexpr,
    LOG_REST: tl.constexpr,
):  # fmt: skip
    """Twin of `rewards.transformed`. The logs are those of `rewards.log_shares`."""
    ratio = lq - lo
    if REWARD == "log_ratio":
        reward = ratio
    elif REWARD == "power":
        reward = tl.exp(PARAMETER * lq) - tl.exp(PARAMETER * lo)
    elif REWARD == "proximal":
        reward = _log_mix(lq, lo, LOG_SHARE, LOG_REST) - lo
    elif REWARD == "log1p":
        size = tl.log(1 + tl.abs(ratio))
        reward = tl.where(ratio < 0, -size, size)
    elif REWARD == "tanh":  # as 2 sigmoid(2 x) - 1, which saturates cleanly
        reward = 2 / (1 + tl.exp(ratio * (-2 / PARAMETER))) - 1
    elif REWARD == "sign":  # of NaN it is NaN
        reward = tl.where(ratio > 0, 1.0, tl.where(ratio < 0, -1.0, 0 * ratio))
    else:
        tl.static_assert(False, "this reward has no formula in Triton")
    return reward


@triton.jit
def _with_task(reward, task, WEIGHT: tl.constexpr, FILTER: tl.constexpr):
    """Twin of `rule._with_task`."""
    if FILTER == "positive":
        reward = tl.where(task > 0, reward, 0 * task)
    elif FILTER == "negative":
        reward = tl.where(task < 0, reward, 0 * task)
    elif FILTER == "agree" or FILTER == "agree_scaled":
        agrees = ((reward > 0) & (task > 0)) | ((reward < 0) & (task < 0)) | (reward != reward)
        if FILTER == "agree_scaled":
            reward = tl.abs(task) * reward
        reward = tl.where(agrees, reward, 0 * task)
    else:
        tl.static_assert(FILTER is None, "this filter has no formula in Triton")
    if WEIGHT != 0:
        reward = reward + WEIGHT * task
    return reward
