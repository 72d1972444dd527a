"""The token rule on vectors of rows: statistics in, loss and coefficients out.

Plain torch on a few numbers a row, for all backends but Triton; the kernel `rule_kernel` is its
twin. It runs in two steps, because the sums between them are made only for the rows that need them:

    gate   the trust region M, and the weight of the forward KL that follows from it
    rule   loss and coefficients, once the sums over K and the generator's sums are known
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..objectives import TokenRule
from .layout import Coef, RowBatch, RowOptions, Stat, TokenInputs
from .rewards import transformed


@dataclass
class Sums:
    """Sums over K, or over the vocabulary, that a rule may need, each (n,).

    teacher_mass, student_mass: probability on K. teacher_tail, student_tail: off K.
    student_log_mass: log of student_mass, also where that underflows. forward_kl: sum_K q (lq -
    lp). value, slope: the generator's sums of q f(u) and p g (see `generators`), for "akl" the sums
    of abs(p - q) on head and tail; None for other rules. For "topk_reverse_kl" with both sides
    renormalised, value is the sum with p / p(K) in place of p, also where p underflows.
    """

    teacher_mass: Tensor
    student_mass: Tensor
    teacher_tail: Tensor
    student_tail: Tensor
    student_log_mass: Tensor
    forward_kl: Tensor
    value: Tensor | None = None
    slope: Tensor | None = None

    @property
    def terms(self) -> tuple[Tensor, Tensor]:
        """value and slope, of a rule that asks for them."""
        assert self.value is not None and self.slope is not None
        return self.value, self.slope


#: Rows of the sums as a matrix (len(SUMS), n).
SUMS = tuple(f.name for f in fields(Sums))


def as_matrix(sums: Sums) -> Tensor:
    """(len(SUMS), n), 0 in place of None."""
    zero = torch.zeros_like(sums.forward_kl)
    rows = (getattr(sums, name) for name in SUMS)
    return torch.stack([zero if row is None else row for row in rows])


@dataclass
class Gate:
    """trust: M. reward: R. forward_kl_weight: the weight of KL_K. on_policy, kept: bool. All (n,).

    reward: transformed and clipped. on_policy: not written by the teacher. kept: passed the
    gate."""

    trust: Tensor
    reward: Tensor
    forward_kl_weight: Tensor
    on_policy: Tensor
    kept: Tensor


def gate(stats: Tensor, batch: TokenInputs, options: RowOptions) -> Gate:
    """Which rows are trusted. Reads LOG_PROB, TEACHER_LOG_PROB and TEACHER_ENTROPY."""
    rule = options.rule
    lp, lq = stats[Stat.LOG_PROB], stats[Stat.TEACHER_LOG_PROB]
    lo = lp if batch.old_log_probs is None else batch.old_log_probs.to(lp.dtype)
    base = lp if rule.reward_policy == "current" else lo
    reward = transformed(*rule.reward_transform, lq, base)
    level = reward if rule.gates_transformed else lq - base
    if batch.advantages is not None:
        level = reward = batch.advantages.to(lp.dtype)
    if rule.clips_reward:
        reward = reward.clamp(rule.clip_reward_low, rule.clip_reward_high)

    acceptance = (lq - lo).clamp_max(0).exp()
    if rule.gate == "bernoulli":
        assert batch.uniforms is not None
        trust = (batch.uniforms < acceptance).to(lp.dtype)
    elif rule.gate == "expected":
        trust = acceptance
    elif rule.gate == "threshold":
        trust = (level > rule.threshold).to(lp.dtype)
    else:
        trust = torch.ones_like(lp)

    on_policy = torch.ones_like(lp, dtype=torch.bool)
    if batch.teacher_prefix is not None and rule.prefix_weight is not None:
        on_policy = ~batch.teacher_prefix
    weight = torch.zeros_like(lp)
    if rule.outlier == "forward_kl":
        weight = weight + (1 - trust)
    if rule.forward_kl_entropy is not None:
        weight = weight + (stats[Stat.TEACHER_ENTROPY] > rule.forward_kl_entropy)
    weight = weight + rule.kl_weights[0]
    weight = torch.where(on_policy, weight, 0.0)
    kept = torch.ones_like(on_policy)
    if rule.outlier == "mask":
        kept = (trust > 0) | ~on_policy
    return Gate(trust, reward, weight, on_policy, kept)


def rows_with_sums(gated: Gate, rule: TokenRule) -> Tensor:
    """Which rows (n,) need `Sums`."""
    if rule.sums_of_every_row:
        return torch.ones_like(gated.on_policy)
    needed = gated.forward_kl_weight > 0
    if rule.outlier == "forward_kl_reward":
        needed = needed | ((gated.trust < 1) & gated.on_policy)
    return needed


def apply_rule(
    stats: Tensor,
    coefs: Tensor,
    gated: Gate,
    sums: Sums | None,
    batch: RowBatch,
    options: RowOptions,
) -> None:
    """Fills stats from REWARD to KEPT and coefs from `Coef.P` on."""
    rule = options.rule
    lp, lq = stats[Stat.LOG_PROB], stats[Stat.TEACHER_LOG_PROB]
    zero = torch.zeros_like(lp)
    nll, smoothed = rule.label_weights
    loss, label = zero, zero + nll  # label: weight on -log p(y)
    p, p_top_k, reverse, q, generator, uniform = (zero,) * 6

    kl, kl_p, kl_p_top_k, kl_q = forward_kl(sums, rule) if sums else (zero,) * 4
    if rule.policy_gradient:
        value, slope = _policy_gradient(stats, gated, kl, batch, rule)
        loss, label = loss + value, label + slope
    if nll:
        loss = loss - nll * lp
    if smoothed:
        mean_nll = coefs[Coef.STUDENT_LOG_SUM] - coefs[Coef.MEAN_GAP]
        loss = loss + smoothed * mean_nll
        live = torch.where(mean_nll == math.inf, 0.0, zero + smoothed)
        p, p_top_k = p + live, p_top_k + live
        uniform = live / (options.vocab_size or batch.student.shape[-1])

    kl_weight, reverse_weight = gated.forward_kl_weight, zero + rule.kl_weights[1]
    if rule.weighs_by_gaps:
        assert sums is not None
        head, tail = sums.terms
        gap = head + tail
        share = torch.where(gap > 0, head / gap.clamp_min(torch.finfo(gap.dtype).tiny), 0.5)
        kl_weight, reverse_weight, kl = share, 1 - share, stats[Stat.FORWARD_KL]
        kl_p, kl_p_top_k, kl_q = zero + 1, zero + 1, zero + 1
    if rule.weighs_by_mixing:
        assert batch.mixing is not None
        mixing = batch.mixing.to(lp.dtype)
        kl_weight, reverse_weight = kl_weight + mixing, 1 - mixing
    if rule.uses_forward_kl:
        loss = loss + _weigh(kl_weight, kl)
        kl_weight = torch.where(kl == math.inf, 0.0, kl_weight)
        p, q = p + kl_weight * kl_p, q + kl_weight * kl_q
        p_top_k = p_top_k + kl_weight * kl_p_top_k
    if rule.uses_reverse_kl:
        kl = stats[Stat.REVERSE_KL]
        loss = loss + _weigh(reverse_weight, kl)
        reverse = torch.where(kl == math.inf, 0.0, reverse_weight)
    if rule.generator == "topk_reverse_kl":
        assert sums is not None
        value, more_p, more_p_top_k, generator = reverse_kl(sums, rule)
        loss, p, p_top_k = loss + value, p + more_p, p_top_k + more_p_top_k
    elif rule.generator:
        assert sums is not None
        value, slope = sums.terms
        loss = loss + value
        generator = torch.isfinite(value).to(lp.dtype)
        mean = slope if rule.uses_top_k else slope / sums.student_mass
        p, p_top_k = p - _weigh(generator, mean), p_top_k - _weigh(generator, mean)

    entropy_weight = zero
    if rule.entropy_coef:
        loss = loss - rule.entropy_coef * stats[Stat.ENTROPY]
        entropy_weight = zero - rule.entropy_coef
    if rule.z_loss:
        lse = stats[Stat.LSE]
        loss = loss + rule.z_loss * lse.square()
        p, p_top_k = p + 2 * rule.z_loss * lse, p_top_k + 2 * rule.z_loss * lse

    if batch.teacher_prefix is not None and rule.prefix_weight is not None:
        ours = gated.on_policy
        loss = torch.where(ours, loss, rule.prefix_weight * (lq - lp))
        label = torch.where(ours, label, rule.prefix_weight)
        p, q, p_top_k, reverse, generator, entropy_weight, uniform = (
            torch.where(ours, each, 0.0)
            for each in (p, q, p_top_k, reverse, generator, entropy_weight, uniform)
        )

    # A label outside the vocabulary has lp = NaN, which must show in the loss and the gradient, as
    # must a teacher's NaN.
    invalid = torch.isnan(lp)
    if rule.uses_teacher:
        invalid = invalid | torch.isnan(lq)
    p, p_top_k = (torch.where(invalid, math.nan, each + label) for each in (p, p_top_k))
    loss = torch.where(invalid, math.nan, loss)

    stats[Stat.REWARD] = gated.reward
    stats[Stat.TRUST] = torch.where(gated.on_policy, gated.trust, 0.0)
    stats[Stat.OUTLIER] = torch.where(gated.on_policy, 1 - gated.trust, 0.0)
    stats[Stat.TOKEN_LOSS] = loss
    stats[Stat.KEPT] = gated.kept.to(lp.dtype)
    weight = 1.0 if batch.token_weight is None else batch.token_weight.to(lp.dtype)
    scale = 1.0 if options.loss_scale is None else options.loss_scale
    for row, value in (
        (Coef.P, p), (Coef.P_TOP_K, p_top_k), (Coef.REVERSE, reverse), (Coef.Q, q),
        (Coef.ENTROPY_WEIGHT, entropy_weight), (Coef.LABEL, label), (Coef.GENERATOR, generator),
        (Coef.UNIFORM, uniform),
    ):  # fmt: skip
        coefs[row] = value * weight * scale


def _policy_gradient(stats, gated, kl, batch, rule):
    """Loss and weight on -log p(y) of the (PPO-clipped) policy gradient, inside and outside."""
    lp = stats[Stat.LOG_PROB]
    ratios = torch.ones_like(lp)
    if batch.old_log_probs is not None:
        ratios = (lp - batch.old_log_probs.to(lp.dtype)).exp()
    low = -math.inf if rule.clip_ratio_low is None else 1 - rule.clip_ratio_low
    high = math.inf if rule.clip_ratio_high is None else 1 + rule.clip_ratio_high
    task = None if batch.task_advantages is None else batch.task_advantages.to(lp.dtype)

    def surrogate(reward, weight):
        reward = _with_task(reward, task, rule)
        ratio = torch.where(torch.isinf(reward), 1.0, ratios)  # infinite, whatever the ratio
        objective = torch.minimum(reward * ratio, reward * ratio.clamp(low, high))
        # The clip applies where it lowers the objective: above for a gain, below for a loss.
        held = ((reward > 0) & (ratio > high)) | ((reward < 0) & (ratio < low))
        held = held | torch.isinf(reward)  # as an infinite divergence: no gradient
        return _weigh(weight, -objective), _weigh(weight, torch.where(held, 0.0, reward * ratio))

    value, slope = surrogate(gated.reward, gated.trust)
    outside = None
    if rule.gate != "always" and rule.outlier == "clip":
        outside = gated.reward.clamp_min(rule.threshold)
    elif rule.gate != "always" and rule.outlier == "forward_kl_reward":
        outside = -kl
    elif rule.gate != "always" and rule.task_weight:
        outside = torch.zeros_like(lp)
    if outside is not None:
        more_value, more_slope = surrogate(outside, 1 - gated.trust)
        value, slope = value + more_value, slope + more_slope
    return rule.policy_gradient * value, rule.policy_gradient * slope


def _with_task(reward: Tensor, task: Tensor | None, rule: TokenRule) -> Tensor:
    """The reward, where the sign of the task's advantages keeps it, and the weighted advantages."""
    if task is None:
        return reward
    if rule.reward_filter is not None:
        agrees = ((reward > 0) & (task > 0)) | ((reward < 0) & (task < 0)) | reward.isnan()
        kept, keeps = {
            "positive": (reward, task > 0),
            "negative": (reward, task < 0),
            "agree": (reward, agrees),
            "agree_scaled": (task.abs() * reward, agrees),
        }[rule.reward_filter]
        reward = torch.where(keeps, kept, 0 * task)  # of NaN it is NaN
    return reward + rule.task_weight * task if rule.task_weight else reward


def forward_kl(sums: Sums, rule: TokenRule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL_K(q || p), and its gradient as coefficients of p off K, of p on K and of q on K."""
    one, zero = torch.ones_like(sums.forward_kl), torch.zeros_like(sums.forward_kl)
    raw = sums.forward_kl
    if rule.top_k_tail == "raw":
        return raw, sums.teacher_mass, sums.teacher_mass, one
    if rule.top_k_tail == "bucket":
        q_tail, p_tail = sums.teacher_tail, sums.student_tail.clamp_min(least_tail(raw.dtype))
        value = raw + torch.special.xlogy(q_tail, q_tail) - torch.special.xlogy(q_tail, p_tail)
        return value, 1 - q_tail / p_tail, one, one
    # A token without any known id has no distribution to renormalise, nor has one whose mass
    # underflows: its inverse would be infinite.
    known = sums.teacher_mass >= torch.finfo(raw.dtype).tiny
    mass = torch.where(known, sums.teacher_mass, 1.0)
    kl, share = raw / mass - mass.log(), 1 / mass
    if rule.top_k_tail == "renormalize_teacher":
        one = known.to(raw.dtype)
        return kl, one, one, share
    # Where p(K) underflows, p / p(K) would be 0/0: a mass below e^-80 counts as none.
    on_k = torch.where(known, (-sums.student_log_mass).clamp_max(80).exp(), 0.0)
    # A student without any mass on K: infinite, not inf - inf.
    kl = torch.where(raw == math.inf, math.inf, kl + sums.student_log_mass)
    return torch.where(known, kl, 0.0), zero, on_k, share


def reverse_kl(sums: Sums, rule: TokenRule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL_K(p || q), and its gradient as coefficients of p off K, of p on K and of p (lp - lq)."""
    value, (p_k, q_k) = sums.terms[0], (sums.student_mass, sums.teacher_mass)
    share = torch.ones_like(value)
    # A token without any known id has no distribution to renormalise.
    known = q_k > 0
    log_q_k = torch.where(known, q_k, 1.0).log()
    if rule.top_k_tail == "bucket":
        p_tail = sums.student_tail
        excess = torch.where(p_tail > 0, p_tail.log() - sums.teacher_tail.log(), 0.0)
        value = value + _weigh(p_tail, excess)
        p, p_top_k = excess - value, -value
    elif rule.top_k_tail == "renormalize_both":
        # As for the forward KL: a mass below e^-80 counts as none in the gradient, and a student
        # without any mass on K is infinite.
        value = torch.where(known, value + log_q_k - sums.student_log_mass, value)
        share = torch.where(known, (-sums.student_log_mass).clamp_max(80).exp(), 0.0)
        p, p_top_k = torch.zeros_like(value), _weigh(share, log_q_k - sums.student_log_mass - value)
    else:
        if rule.top_k_tail == "raw":
            log_q_k = torch.zeros_like(value)
        value = value + p_k * log_q_k
        p = -(value + p_k)
        p_top_k = log_q_k + 1 + p
    finite = torch.isfinite(value)
    p, p_top_k, share = (torch.where(finite, each, 0.0) for each in (p, p_top_k, share))
    return value, p, p_top_k, share


def teacher_tail(teacher_mass: Tensor, rule: TokenRule) -> Tensor:
    """The teacher's mass off K, where only that on K is known. A reverse KL takes its logarithm, so
    there it is at least the precision of a difference from 1."""
    least = torch.finfo(teacher_mass.dtype).eps if rule.generator == "topk_reverse_kl" else 0.0
    return (1 - teacher_mass).clamp_min(least)


def least_tail(dtype: torch.dtype) -> float:
    """The floor of a student's mass off K that is summed directly, and thus accurate far below the
    precision. An id on the edge of K may change sides when a pass reads recomputed logits, and must
    not be multiplied by more than the inverse of this."""
    return torch.finfo(dtype).eps ** 2


def _weigh(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, 0 where the weight is 0 even if the value is infinite."""
    return torch.where(weight == 0, 0.0, weight * value)


def topk_entropy(log_probs: Tensor) -> Tensor:
    """Lower bound (n,) on the entropy of a distribution of which only log_probs (n, K) are known:
    the remaining mass is taken for one id's. Entries of -inf are padding."""
    q = log_probs.exp()
    tail = (1 - q.sum(-1)).clamp_min(0)
    inside = torch.where(q > 0, -q * log_probs, 0.0).sum(-1)
    return inside - torch.special.xlogy(tail, tail)
