"""The specification: every objective in plain PyTorch, on materialized logits, with autograd.

Nothing here is fast, and nothing is shared with the kernels: they are tested against this file, in
float64. Read it next to the paper (TrOPD, arXiv 2606.01249; the other sources are in
`objectives/`).

Notation, at one position: z, t logits of student and teacher after scale, soft cap and temperature;
p = softmax(z), q = softmax(t); y the token; lp = log p(y), lq = log q(y); lo = log-probability of y
under the policy that sampled it; R0 = sg(lq - lo); R = T(R0), clipped; rho = exp(lp - lo); A the
task's advantages; K the teacher's top-k ids, or those of `top_k_ids`.

Conventions: 0 log 0 = 0 (ids that either side excludes with a logit of -inf). A divergence that is
infinite (p > 0 where q = 0, or the other way round) has loss +inf and gradient 0, and so has a K1
reward that no gate rejects, so one such token cannot spoil a batch's gradient. KL terms are never
clamped, except for the mass off K that a "bucket" takes the logarithm of: of a forward KL's student
it is at least the square of the precision, of a reverse KL's top-k teacher the precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .objectives import TokenRule


@dataclass
class ReferenceTeacher:
    """What the reference needs of a teacher, at N positions.

    log_q: (N, V) log-probs; -inf where unknown. None for a sampled teacher.
    label_log_probs: (N,) lq. entropy: (N,) H(q), or None. dense: log_q is the whole distribution.
    """

    log_q: Tensor | None
    label_log_probs: Tensor
    entropy: Tensor | None
    dense: bool


def transform_logits(
    logits: Tensor, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """Scale, then soft cap, then temperature."""
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def dense_teacher(t: Tensor, labels: Tensor) -> ReferenceTeacher:
    """From transformed teacher logits (N, V)."""
    log_q = t.log_softmax(-1)
    return ReferenceTeacher(log_q, _pick(log_q, labels), _entropy(log_q), dense=True)


def target_logits(
    t: Tensor, z: Tensor, r: Tensor | None, rule: TokenRule, blending: Tensor | None = None
) -> Tensor:
    """Logits (N, V) of the target that stands in for the teacher, of the transformed logits of
    teacher, student and reference teacher: q^(1 - w) (q^a sg(p)^b r^c)^w with w = blending (N,), or
    1; -inf where one of them excludes, if its power is not 0."""
    w = torch.ones_like(t[:, :1]) if blending is None else blending.unsqueeze(-1)
    total = (1 - w + w * rule.teacher_power) * t.log_softmax(-1)
    for power, logits in ((rule.student_power, z.detach()), (rule.reference_power, r)):
        if power:
            log_prob = logits.log_softmax(-1)
            here = log_prob == -math.inf
            total = total + w * power * log_prob.masked_fill(here, 0.0)
            total = total.masked_fill(here & (w != 0), -math.inf)
    return total


def sampled_teacher(label_log_probs: Tensor) -> ReferenceTeacher:
    """From lq (N,) alone."""
    return ReferenceTeacher(None, label_log_probs, None, dense=False)


def top_k_teacher(
    ids: Tensor, log_probs: Tensor, label_log_probs: Tensor, entropy: Tensor | None, vocab_size: int
) -> ReferenceTeacher:
    """From ids and log-probs (N, K); padding ids are dropped. Without `entropy`, H(q) is bounded
    from below by lumping the mass outside the ids into one."""
    usable = (ids >= 0) & (ids < vocab_size) & (log_probs > -math.inf)
    spare = ids.new_full((), vocab_size)  # one column more takes the padding, and is cut off
    log_q = log_probs.new_full((*ids.shape[:-1], vocab_size + 1), -math.inf)
    log_q.scatter_(-1, torch.where(usable, ids, spare), log_probs)
    log_q = log_q[..., :-1]
    if entropy is None:
        tail = (1 - log_q.exp().sum(-1)).clamp_min(0)
        entropy = _entropy(log_q) - torch.special.xlogy(tail, tail)
    return ReferenceTeacher(log_q, label_log_probs, entropy, dense=False)


def token_losses(
    z: Tensor,
    labels: Tensor,
    teacher: ReferenceTeacher | None,
    rule: TokenRule,
    *,
    old_log_probs: Tensor | None = None,
    advantages: Tensor | None = None,
    task_advantages: Tensor | None = None,
    teacher_prefix: Tensor | None = None,
    uniforms: Tensor | None = None,
    mixing: Tensor | None = None,
    scores: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (N,) of each token and its statistics (N,), differentiable in z (N, V)."""
    log_p = z.log_softmax(-1)
    lp = _pick(log_p, labels)
    entropy = _entropy(log_p)
    lse = z.logsumexp(-1)
    stats = {"log_probs": lp, "entropy": entropy, "lse": lse}
    prefix = teacher_prefix
    if prefix is None:
        prefix = torch.zeros_like(lp, dtype=torch.bool)
    on_policy = ~prefix | (rule.prefix_weight is None)

    lo = lp.detach() if old_log_probs is None else old_log_probs
    # Without old_log_probs it is 1, be lp infinite.
    ratio = (lp - lo).exp() if old_log_probs is not None else _one_like(lp)
    loss = torch.zeros_like(lp)
    trust = torch.ones_like(lp)
    kl = None

    if teacher is not None:
        log_q, lq = teacher.log_q, teacher.label_log_probs
        relative_to = lp if rule.reward_policy == "current" else lo
        level, reward = rewards(rule, lq, relative_to.detach(), advantages)
        trust = trust_gate(rule, lq - lo, level, uniforms)
        stats |= {"teacher_log_probs": lq, "reward": reward}
        if teacher.entropy is not None:
            stats["teacher_entropy"] = teacher.entropy
        on_k = None if log_q is None else chosen_ids(rule, log_p.detach(), log_q, ids)
        if on_k is not None:
            kl = forward_kl(log_p, log_q, on_k, rule.top_k_tail)
            stats["forward_kl"] = kl if not teacher.dense else _expect(log_q, log_q - log_p)
            if rule.uses_top_k or (rule.uses_sums and not teacher.dense):
                stats["teacher_topk_mass"] = _mass(log_q, on_k)
                stats["student_topk_mass"] = _mass(log_p, on_k)
        if teacher.dense:
            stats["reverse_kl"] = reverse_kl(log_p, log_q)

        if rule.policy_gradient:
            outside = reward
            if rule.gate != "always" and rule.outlier == "clip":
                outside = reward.clamp_min(rule.threshold)
            elif rule.gate != "always" and rule.outlier == "forward_kl_reward":
                outside = -kl.detach()
            elif rule.outlier in ("mask", "forward_kl"):  # no reward, but the task's advantage
                outside = torch.zeros_like(reward)
            # A reward of -inf that the gate rejects must not reach the product, nor its gradient.
            inside = with_task(rule, torch.where(trust > 0, reward, 0.0), task_advantages)
            outside = with_task(rule, torch.where(trust < 1, outside, 0.0), task_advantages)
            surrogate = trust * policy_gradient_loss(inside, ratio, rule)
            always = rule.gate == "always"
            if rule.outlier in ("clip", "forward_kl_reward") or (rule.task_weight and not always):
                surrogate = surrogate + (1 - trust) * policy_gradient_loss(outside, ratio, rule)
            loss = loss + rule.policy_gradient * surrogate

        weight = torch.zeros_like(lp)
        if rule.outlier == "forward_kl":
            weight = weight + (1 - trust)
        if rule.forward_kl_entropy is not None:
            weight = weight + (teacher.entropy > rule.forward_kl_entropy)
        if rule.uses_forward_kl and rule.divergence != "akl":
            weight = weight + (rule.divergence in ("forward_kl", "jeffreys"))
            loss = loss + _weigh(weight, kl)
        if rule.divergence in ("reverse_kl", "jeffreys"):
            loss = loss + reverse_kl(log_p, log_q)
        if rule.divergence == "akl":
            loss = loss + adaptive_kl(log_p, log_q, rule.divergence_parameter)
        if rule.divergence == "mixed":
            loss = loss + _weigh(mixing, kl) + _weigh(1 - mixing, reverse_kl(log_p, log_q))
        if rule.divergence not in (None, "forward_kl", "reverse_kl", "jeffreys", "akl", "mixed"):
            loss = loss + generator_divergence(log_p, log_q, rule, on_k, teacher.dense)

    nll, smoothed = rule.label_weights
    if nll:
        loss = loss - nll * lp
    if smoothed:
        log_uniform = torch.full_like(log_p, -math.log(log_p.shape[-1]))
        loss = loss + smoothed * _expect(log_uniform, -log_p)
    if rule.entropy_coef:
        loss = loss - rule.entropy_coef * entropy
    if rule.z_loss:
        loss = loss + rule.z_loss * lse**2

    kept = chosen = torch.ones_like(lp, dtype=torch.bool)
    if rule.score is not None:
        stats["scores"] = scores
        stats["disagreement"] = (stats["teacher_log_probs"] - lo).abs() if teacher else None
        kept = chosen = selected(stats[rule.score], rule, among=on_policy)
        stats["score"] = torch.where(on_policy, stats[rule.score].detach(), math.nan)
        loss = torch.where(kept, loss, 0.0)
    if rule.outlier == "mask":
        kept = kept & (trust > 0)
    if rule.prefix_weight is not None and teacher is not None:
        loss = torch.where(prefix, rule.prefix_weight * (lq.detach() - lp), loss)
    # Comparisons pass NaN by: a row that holds one says so.
    invalid = lp.isnan() | (rule.uses_teacher & lq.isnan() if teacher is not None else False)
    unknown = torch.where(invalid, math.nan, 1.0) * torch.where(invalid, lp, 0.0)
    loss = torch.where(invalid, unknown, loss)
    stats |= {
        "trust": torch.where(on_policy, trust, 0.0).where(chosen, math.nan),
        "outlier": torch.where(on_policy, 1 - trust, 0.0).where(chosen, math.nan),
        "kept": (kept | ~on_policy).to(lp.dtype),
        "token_loss": loss,
    }
    return loss, stats


# --- the policy-gradient side ------------------------------------------------------------------


def rewards(
    rule: TokenRule, lq: Tensor, lo: Tensor, advantages: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the static gate compares with its threshold, R0 or the caller's advantages, and the
    transformed and clipped reward R; lo: of the policy that R0 is relative to. Both (N,)."""
    level = lq - lo
    if rule.divergence == "topk_jsd":  # K1 of log(p/M): the mixture stands in for the teacher
        level = reward = _log_mix(rule.divergence_parameter, lq, lo) - lo
    elif rule.reward == "power":
        reward = (rule.reward_parameter * lq).exp() - (rule.reward_parameter * lo).exp()
    elif rule.reward == "proximal":  # log(a q + (1 - a) p) - log p
        reward = _log_mix(rule.reward_parameter, lq, lo) - lo
    elif rule.reward == "log1p":
        reward = torch.where(level < 0, -1.0, 1.0) * level.abs().log1p()
    elif rule.reward == "tanh":
        reward = (level / (1.0 if rule.reward_parameter is None else rule.reward_parameter)).tanh()
    elif rule.reward == "sign":
        reward = torch.where(level.isnan(), level, level.sign())
    elif rule.reward == "log_ratio":
        reward = level
    else:
        raise NotImplementedError(f"the reference has no definition of reward={rule.reward!r}")
    if advantages is not None:
        level = reward = advantages
    if rule.clip_reward_low is not None:
        reward = reward.clamp_min(rule.clip_reward_low)
    if rule.clip_reward_high is not None:
        reward = reward.clamp_max(rule.clip_reward_high)
    return level.detach(), reward.detach()


def with_task(rule: TokenRule, reward: Tensor, advantages: Tensor | None) -> Tensor:
    """The reward, where the sign of the task's advantages keeps it, and the weighted advantages."""
    if rule.reward_filter is not None:
        agrees = (reward * advantages.sign() > 0) | reward.isnan()
        keeps = {
            "positive": advantages > 0,
            "negative": advantages < 0,
            "agree": agrees,
            "agree_scaled": agrees,
        }[rule.reward_filter]
        if rule.reward_filter == "agree_scaled":
            reward = advantages.abs() * reward
        reward = torch.where(keeps, reward, 0 * advantages)  # of NaN it is NaN
    return reward + rule.task_weight * advantages if rule.task_weight else reward


def trust_gate(
    rule: TokenRule, log_ratio: Tensor, reward: Tensor, uniforms: Tensor | None
) -> Tensor:
    """M (N,), from the teacher's log-ratio lq - lo (detached) and the untransformed reward."""
    acceptance = log_ratio.detach().clamp_max(0).exp()  # P = min(q(y)/p(y), 1)
    if rule.gate == "bernoulli":
        return (uniforms < acceptance).to(acceptance.dtype)
    if rule.gate == "expected":
        return acceptance
    if rule.gate == "threshold":
        return (reward > rule.threshold).to(acceptance.dtype)
    return torch.ones_like(acceptance)


def policy_gradient_loss(reward: Tensor, ratio: Tensor, rule: TokenRule) -> Tensor:
    """-R rho, with PPO's pessimistic clip where the rule has one; an infinite R has no gradient,
    and is one however small rho."""
    ratio = torch.where(reward.isinf(), 1.0, ratio)
    low = -math.inf if rule.clip_ratio_low is None else 1 - rule.clip_ratio_low
    high = math.inf if rule.clip_ratio_high is None else 1 + rule.clip_ratio_high
    return -torch.minimum(reward * ratio, reward * ratio.clamp(low, high))


def selected(score: Tensor, rule: TokenRule, among: Tensor) -> Tensor:
    """Which tokens' score is in the top fraction of those `among` (linear quantile), or reaches the
    rule's threshold. A NaN does, so that it shows."""
    most = torch.finfo(score.dtype).max / 4
    score = score.detach().clamp(-most, most)  # there is nothing between two infinite ones
    level: Any = rule.select_threshold
    if level is None:
        fraction = rule.entropy_top_fraction or rule.select_fraction
        ranked = score[among].double()
        level = torch.nanquantile(ranked, 1 - fraction) if among.any() else math.nan
    return ~among | ~(score.double() < level)


# --- the vocabulary side -----------------------------------------------------------------------


def chosen_ids(rule: TokenRule, log_p: Tensor, log_q: Tensor, ids: Tensor | None) -> Tensor:
    """K (N, V) of a rule, or all ids. ids: (N, K) of the caller, -1 at padding."""
    if rule.top_k_ids == "given":
        spare = torch.zeros_like(log_q[:, :1], dtype=torch.bool)  # which takes the padding
        on_k = torch.cat([torch.zeros_like(log_q, dtype=torch.bool), spare], -1)
        outside = (ids < 0) | (ids >= log_q.shape[-1])
        return on_k.scatter(-1, ids.masked_fill(outside, log_q.shape[-1]), True)[:, :-1]
    if rule.top_k_ids == "student":  # of ids that tie the first ones, as far as there are places
        order = log_p.sort(dim=-1, descending=True, stable=True).indices[:, : rule.top_k]
        return torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, order, True) & (
            log_p > -math.inf
        )
    return top_k_mask(log_q, rule.top_k if rule.uses_top_k else None)


def top_k_mask(log_q: Tensor, k: int | None) -> Tensor:
    """K (N, V): ids whose teacher log-prob is at least the k-th largest, ties and all."""
    possible = log_q > -math.inf
    if k is None or k >= log_q.shape[-1]:
        return possible
    return possible & (log_q >= log_q.topk(k, dim=-1).values[..., -1:])


def forward_kl(log_p: Tensor, log_q: Tensor, on_k: Tensor, tail: str) -> Tensor:
    """KL_K(q || p) (N,). Raw, it may be negative: q on K does not sum to 1."""
    raw = _expect(log_q, log_q - log_p, on_k)
    if tail == "raw":
        return raw
    infinite = raw == math.inf
    log_p = torch.where(infinite.unsqueeze(-1), 0.0, log_p)  # anything with a finite gradient
    return torch.where(infinite, math.inf, _with_tail(raw, log_p, log_q, on_k, tail))


def _with_tail(raw: Tensor, log_p: Tensor, log_q: Tensor, on_k: Tensor, tail: str) -> Tensor:
    q_k = _mass(log_q, on_k)
    if tail == "bucket":
        # p off K directly: near 1 the complement of its mass has no digits left.
        least = torch.finfo(log_p.dtype).eps ** 2
        q_tail, p_tail = (1 - q_k).clamp_min(0), _mass(log_p, ~on_k).clamp_min(least)
        return raw + torch.special.xlogy(q_tail, q_tail) - torch.special.xlogy(q_tail, p_tail)
    # Of a token of which no id is known, or none with mass, there is no distribution to make.
    none = q_k < torch.finfo(q_k.dtype).tiny
    q_k, on_k = torch.where(none, 1.0, q_k), on_k | none.unsqueeze(-1)
    kl = raw / q_k - q_k.log()
    if tail == "renormalize_both":
        kl = kl + log_p.masked_fill(~on_k, -math.inf).logsumexp(-1)
    return kl


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) (N,), +inf with gradient 0 where p has mass that q excludes."""
    return _expect(log_p, log_p - log_q)


def reverse_kl_on_k(log_p: Tensor, log_q: Tensor, on_k: Tensor, tail: str, dense: bool) -> Tensor:
    """KL_K(p || q) (N,). Raw, it may be negative: p on K does not sum to 1."""
    raw = _expect(log_p, log_p - log_q, on_k)
    q_k = _mass(log_q, on_k)
    log_q_k = torch.where(q_k == 0, 1.0, q_k).log()
    if tail == "renormalize_teacher":
        return torch.where(raw == math.inf, math.inf, raw + _mass(log_p, on_k) * log_q_k)
    if tail == "renormalize_both":
        # A student without any mass on K has no distribution there: infinite.
        empty = ~(on_k & (log_p > -math.inf)).any(-1)
        infinite = (raw == math.inf) | (empty & on_k.any(-1))
        of_k = log_p.masked_fill(~on_k, -math.inf).masked_fill(empty.unsqueeze(-1), 0.0)
        share = log_p - of_k.logsumexp(-1, keepdim=True)
        kl = _expect(share, share - (log_q - log_q_k.unsqueeze(-1)), on_k)
        return torch.where(infinite, math.inf, kl)
    if tail == "bucket":
        p_tail = _mass(log_p, ~on_k)
        # q off K directly, where it is known.
        least = torch.finfo(log_q.dtype).eps
        q_tail = _mass(log_q, ~on_k) if dense else (1 - q_k).clamp_min(least)
        infinite = (raw == math.inf) | ((p_tail > 0) & (q_tail == 0))
        some = (p_tail > 0) & ~infinite
        excess = torch.where(some, p_tail, 1.0).log() - torch.where(some, q_tail, 1.0).log()
        return torch.where(infinite, math.inf, raw + torch.where(some, p_tail, 0.0) * excess)
    return raw


def adaptive_kl(log_p: Tensor, log_q: Tensor, head_mass: float) -> Tensor:
    """AKL (N,): forward KL weighted by the gap on the head, reverse KL by the gap on the tail. The
    head is the smallest set of the teacher's likeliest ids with mass at least `head_mass`."""
    q = log_q.exp()
    order = log_q.argsort(dim=-1, descending=True)
    before = q.gather(-1, order).cumsum(-1) - q.gather(-1, order)
    head = torch.zeros_like(q, dtype=torch.bool).scatter(-1, order, before < head_mass)
    # Ids that tie with the last of the head belong to it.
    head = log_q >= log_q.masked_fill(~head, math.inf).amin(-1, keepdim=True)
    gap = (log_p.exp() - q).abs().detach()
    on_head = torch.where(head, gap, 0.0).sum(-1)
    on_tail = torch.where(head, 0.0, gap).sum(-1)
    total = on_head + on_tail
    share = torch.where(total > 0, on_head / total.clamp_min(torch.finfo(q.dtype).tiny), 0.5)
    return share * _expect(log_q, log_q - log_p) + (1 - share) * reverse_kl(log_p, log_q)


def generator_divergence(
    log_p: Tensor, log_q: Tensor, rule: TokenRule, on_k: Tensor, dense: bool
) -> Tensor:
    """The divergences that are a sum of q f(p/q) (N,), each from its definition."""
    kind, c = rule.divergence, rule.divergence_parameter
    if kind == "jsd":
        log_m = _log_mix(c, log_q, log_p)
        return c * _expect(log_q, log_q - log_m) + (1 - c) * _expect(log_p, log_p - log_m)
    if kind == "skew_forward":
        return _expect(log_q, log_q - _log_mix(c, log_q, log_p))
    if kind == "skew_reverse":
        return _expect(log_p, log_p - _log_mix(c, log_p, log_q))
    if kind == "topk_jsd":  # the other half of it is a policy gradient
        return c * _expect(log_q, log_q - _log_mix(c, log_q, log_p), on_k)
    if kind == "topk_reverse_kl":
        return reverse_kl_on_k(log_p, log_q, on_k, rule.top_k_tail, dense)
    if kind == "mopd":
        inside = _expect(log_p, log_p - log_q, on_k)
        return inside - _mass(log_p, on_k) + _mass(log_q, on_k)
    p, q = log_p.exp(), log_q.exp()
    if kind == "total_variation":
        return (p - q).abs().sum(-1) / 2
    if kind == "todi":
        toward_teacher = torch.sigmoid(log_q - log_p).nan_to_num(nan=0.5).detach()
        forward = _expect(log_q, toward_teacher * (log_q - log_p))
        total = forward + _expect(log_p, (1 - toward_teacher) * (log_p - log_q))
        return torch.where(total == math.inf, math.inf, total)
    if kind not in ("alpha", "chi2"):
        raise NotImplementedError(f"the reference has no definition of {kind!r}")
    alpha = 2.0 if kind == "chi2" else c  # chi-square is twice the alpha-divergence at 2
    with_mass = (log_p > -math.inf) & (log_q > -math.inf)
    exponent = alpha * torch.where(with_mass, log_p, 0.0) + (1 - alpha) * torch.where(
        with_mass, log_q, 0.0
    )
    power = torch.where(with_mass, exponent.exp(), 0.0).sum(-1)
    value = (power - 1) / (alpha * (alpha - 1))
    excluded = (log_p > -math.inf) & (log_q == -math.inf) if alpha > 1 else torch.zeros_like(on_k)
    if alpha < 0:
        excluded = (log_q > -math.inf) & (log_p == -math.inf)
    value = torch.where(excluded.any(-1), math.inf, value)
    return 2 * value if kind == "chi2" else value


# --- small pieces ------------------------------------------------------------------------------


def _pick(log_probs: Tensor, labels: Tensor) -> Tensor:
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _mass(log_probs: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, log_probs, -math.inf).exp().sum(-1)


def _entropy(log_probs: Tensor) -> Tensor:
    return _expect(log_probs, -log_probs)


def _one_like(log_prob: Tensor) -> Tensor:
    """exp(log_prob - its own value): 1, with the gradient of log_prob."""
    finite = torch.where(log_prob == -math.inf, 0.0, log_prob)
    return (finite - finite.detach()).exp()


def _safe(value: Tensor) -> Tensor:
    """Without infinities or NaN, so that a masked-out entry has a gradient of 0, not NaN."""
    return torch.where(value.isfinite(), value, 0.0)


def _expect(log_weight: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """sum of exp(log_weight) * value over the vocabulary, with 0 * anything = 0; +inf, with
    gradient 0, where an entry of positive weight is +inf."""
    present = log_weight > -math.inf
    if mask is not None:
        present = present & mask
    weight = torch.where(present, log_weight, -math.inf).exp()
    total = (weight * _safe(torch.where(present, value, 0.0))).sum(-1)
    return torch.where((present & (value == math.inf)).any(-1), math.inf, total)


def _log_mix(c: float, log_q: Tensor, log_p: Tensor) -> Tensor:
    """log(c q + (1 - c) p), -inf where both are."""
    empty = (log_q == -math.inf) & (log_p == -math.inf)
    log_q, log_p = torch.where(empty, 0.0, log_q), torch.where(empty, 0.0, log_p)
    rest = math.log1p(-c) if c < 1 else -math.inf
    mixed = torch.logaddexp(log_q + math.log(c), log_p + rest)
    return torch.where(empty, -math.inf, mixed)


def _weigh(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, 0 where the weight is 0 even if the value is infinite."""
    return torch.where(weight == 0, 0.0, weight * torch.where(weight == 0, 0.0, value))
