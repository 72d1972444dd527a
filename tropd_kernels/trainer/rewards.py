"""Advantages and token weights of a micro-batch, as the config's credit settings make them.

    advantages      return_to_go over the student's tokens; other tokens keep their own reward
    token_weight    importance_weights x drift_gates; other tokens weigh 1

The functions are those of `tropd_kernels.credit`. Returns are of the objective's own reward, as it
transforms and clips it; importance weights count the log-ratio of teacher and sampling policy.

A reward of -inf (the teacher gives the token probability 0, and no transform bounds it) would make
every earlier return -inf. An objective with a gate keeps such a token out of its loss: the token
stays outside the gate, and earlier returns count it as the rule's `threshold`. Without a gate
nothing bounds it: the advantages and the loss are infinite.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..credit import drift_gates, importance_weights, return_to_go
from ..functional import TokenStats
from ..objectives import OPD, TokenRule


def needs_rewards(args: Any, old_log_probs: Tensor | None) -> bool:
    """Whether the config asks for advantages or weights; drift needs the sampling policy."""
    drifted = args.drift_tau is not None and old_log_probs is not None
    return bool(args.kl_discount_factor) or args.importance_gamma is not None or drifted


def reward_rule(rule: TokenRule) -> TokenRule:
    """K1 with the reward of `rule`, for a pass of which only the rewards are read."""
    fields = ("reward", "reward_parameter", "reward_policy", "clip_reward_low", "clip_reward_high")
    return replace(OPD(), **{name: getattr(rule, name) for name in fields})


def token_credit(
    args: Any,  # a TrOPDConfig
    rule: TokenRule,
    stats: TokenStats,  # (B, C): of `reward_rule`
    own: Tensor,  # (B, C) bool: the student's tokens
    old_log_probs: Tensor | None,
) -> dict[str, Tensor]:
    """`advantages` and `token_weight` (B, C), as far as the config asks for them."""
    credit = {}
    if args.kl_discount_factor and rule.reads_advantages:  # not each rule of a schedule does
        credit["advantages"] = _advantages(stats, own, args.kl_discount_factor, rule)
    weights = []
    if args.importance_gamma is not None:
        ratios = stats.teacher_log_probs
        ratios = ratios - (stats.log_probs if old_log_probs is None else old_log_probs)
        weights.append(importance_weights(ratios, own, args.importance_gamma))
    if args.drift_tau is not None and old_log_probs is not None:
        block, tau = args.drift_block_size, args.drift_tau
        weights.append(drift_gates(old_log_probs, stats.log_probs, own, block, tau))
    if weights:
        credit["token_weight"] = torch.stack(weights).prod(0).where(own, 1.0)
    return credit


def _advantages(stats: TokenStats, own: Tensor, discount: float, rule: TokenRule) -> Tensor:
    reward = stats.reward
    if rule.gate == "always":
        return return_to_go(reward, own, discount).where(own, reward)
    floored = reward.masked_fill(reward == -torch.inf, rule.threshold)
    # Later tokens must not lift one that the teacher excludes above the gate.
    excluded = (stats.teacher_log_probs == -torch.inf) & ~reward.isnan()
    returns = return_to_go(floored, own, discount).masked_fill(excluded, rule.threshold)
    return returns.where(own, floored)
