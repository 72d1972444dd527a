"""Losses from per-token log-probs alone, for trainers that form the student's themselves.

A sampled teacher's signal is one log-prob a token, and so is all that a policy gradient needs of
the student. What reads more of either is refused by `check_rule`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..draws import bernoulli_uniforms, philox4x32
from ..loss.token_selection import scores, selected
from ..objectives import TokenRule
from ..objectives.registry import build_rule, check_knobs, check_objective, check_required
from ..rows.layout import Coef, LogitTransform, RowBatch, RowOptions, Stat, new_matrices
from ..rows.rule import apply_rule, gate

#: The argument of the loss without which a knob has no effect.
_NEEDS = {
    "prefix_weight": "teacher_prefix", "clip_ratio": "old_log_probs",
    "clip_ratio_low": "old_log_probs", "clip_ratio_high": "old_log_probs",
}  # fmt: skip


def named_rule(
    where: str,
    objective: str,
    knobs: dict[str, Any],
    *,
    missing: Collection[str] = ("teacher_prefix",),
) -> TokenRule:
    """The rule of a name of `tropd train`'s and its knobs, both checked.

    where: for errors. missing: arguments that the trainer's loss is never given. Raises ValueError
    for what would have no effect: a knob that needs one of them, and a rule with a mean of its own,
    where the trainer divides.
    """
    check_objective(objective)
    check_knobs(objective, knobs, where)
    check_required(objective, knobs, where)
    for knob, value in knobs.items():
        if (argument := _NEEDS.get(knob)) in missing and value is not None:
            raise ValueError(
                f"{where}: {knob} has no effect here, where the loss is given no {argument}: leave "
                "it out"
            )
    rule = build_rule(objective, knobs)
    if rule.normalize == "kept":
        raise ValueError(
            f"{where}: objective {objective!r} takes its mean over the tokens that gate and "
            "selection keep, and the trainer divides by its own count: choose another objective"
        )
    return rule


def check_rule(where: str, rule: TokenRule, *, logits: bool = False) -> TokenRule:
    """The rule; raises ValueError, with the reason, where log-probs of the sampled tokens do not
    serve it. logits: the student has its logits, and only the teacher is sampled."""
    why = None
    if rule.uses_dense_teacher or rule.uses_top_k or rule.uses_forward_kl:
        why = "it needs more of the teacher than the log-prob of the sampled token"
    elif rule.score in ("teacher_entropy", "reverse_kl", "scores"):
        why = f"nothing gives select_by={rule.score!r} here"
    elif rule.uses_task_advantages:
        why = "nothing gives task_advantages here: leave task_weight 0, no filter"
    elif not logits and (rule.z_loss or rule.label_smoothing):
        why = "its z_loss or label_smoothing reads the logits"
    if why:
        raise ValueError(
            f"{where}: {rule!r} cannot be served: {why}. OPD(), ClipOutlier(), MaskOutlier(), "
            "PowerOPD() and TrOPD(outlier='mask') can"
        )
    return rule


def sampled_losses(
    log_probs: Tensor,  # (*)
    teacher_log_probs: Tensor,  # (*)
    counted: Tensor,  # (*), bool
    rule: TokenRule,
    *,
    old_log_probs: Tensor | None = None,  # (*)
    entropy: Tensor | None = None,  # (*)
    uniforms: Tensor | None = None,  # (*)
    with_entropy: str = "pass entropy=",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of each token and the gate's M, 0 where `counted` is not, from log-probs alone, and the
    scores by which the rule selects, NaN where `counted` is not; None if it selects none. At a
    token that is not selected the loss is 0 and M is NaN.

    Those of a sampled teacher in `distillation_loss`; differentiable in log_probs, and in entropy
    where the rule has an entropy bonus. with_entropy: how a caller gets the entropy, for the error.
    """
    if entropy is None and (rule.entropy_coef or rule.score == "entropy"):
        raise ValueError(
            f"{rule!r} reads the student's entropy: {with_entropy}, or take an objective without it"
        )

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().reshape(-1)

    stats, coefs = new_matrices(log_probs.detach(), log_probs.numel())
    stats[Stat.LOG_PROB], stats[Stat.TEACHER_LOG_PROB] = rows(log_probs), rows(teacher_log_probs)
    if entropy is not None:
        stats[Stat.ENTROPY] = rows(entropy)
    known = {"old_log_probs": rows(old_log_probs), "uniforms": rows(uniforms)}
    batch = RowBatch(student=None, teacher=None, labels=None, **known)
    options = RowOptions(rule, LogitTransform(), LogitTransform())
    enters, ranked = counted, None
    if rule.score is not None:
        ranked = scores(stats, batch, options).view(counted.shape).masked_fill(~counted, math.nan)
        enters = counted & selected(ranked, rule)
    apply_rule(stats, coefs, gate(stats, batch, options), None, batch, options)

    def where(mask: Tensor, row: Tensor) -> Tensor:
        return torch.where(mask, row.view(counted.shape), 0.0)

    losses = where(enters, stats[Stat.TOKEN_LOSS])
    # Their gradients are known: each enters by its difference from itself, times its gradient.
    by = {Coef.LABEL: -log_probs, Coef.ENTROPY_WEIGHT: entropy}
    for coef, values in by.items():
        if values is not None:
            finite = torch.where(counted & ~values.isinf(), values, 0.0)
            losses = losses + where(enters, coefs[coef]) * (finite - finite.detach())
    trust = where(counted, stats[Stat.TRUST])
    return losses, trust.masked_fill(counted & ~enters, math.nan), ranked


def mean_trust(trust: Tensor, counted: Tensor) -> Tensor:
    """The mean of the gate's M over the tokens that entered; 1 where there is none."""
    known = trust[counted & ~trust.isnan()]
    return known.mean() if len(known) else trust.new_ones(())


def token_uniforms(seed: int, ids: Tensor, offsets: Tensor) -> Tensor:
    """The gate's draws (n), one for each row of packed sequences; row i is about token i + 1.

    ids: (n) token ids. offsets: (B + 1) where each sequence starts, and n. A sequence is named by
    the sums of two Philox words of (position, id) over its tokens: 62 bits.
    """
    lengths = offsets.diff()
    row = torch.repeat_interleave(
        torch.arange(lengths.shape[0], device=ids.device), lengths, output_size=ids.shape[0]
    )
    position = torch.arange(ids.shape[0], device=ids.device) - offsets[:-1][row]
    zero = torch.zeros_like(position)
    words = philox4x32((position, ids.long(), zero, zero), (zero[:1], zero[:1]))
    low, high = (
        zero.new_zeros(lengths.shape[0]).index_add(0, row, word) & (2**31 - 1) for word in words[:2]
    )
    return bernoulli_uniforms(seed, 0, (low + (high << 31))[row], position + 1)


def drawn(seed: int, log_probs: Tensor, mask: Tensor) -> Tensor:
    """The draws (*, T) where a trainer gives no token ids: a sequence is named by the bits of its
    log-probs under the policy that sampled it, 0 at the tokens that do not count."""
    bits = log_probs.detach().float().masked_fill(~mask, 0.0).view(torch.int32).long()
    return row_uniforms(seed, bits)


def row_uniforms(seed: int, ids: Tensor) -> Tensor:
    """The draws (*, T) where each row is a sequence, named by its ids, integers of 32 bits, padding
    included. Those of the labels are the same on all ranks that share a vocabulary, and at every
    pass that batches the data alike."""
    rows = ids.reshape(-1, ids.shape[-1])
    offsets = torch.arange(0, rows.numel() + 1, max(rows.shape[1], 1), device=ids.device)
    return token_uniforms(seed, rows.flatten() & 0xFFFFFFFF, offsets).view(ids.shape)
