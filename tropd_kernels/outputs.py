"""What the loss returns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .loss.dispatch import LossResult
from .loss.sampling import SamplingReport
from .rows.layout import SCORE, Stat
from .summary import Summarized
from .teachers import HiddenTeacher, LogitsTeacher, Teacher, TopKTeacher


@dataclass(frozen=True, eq=False, repr=False)
class TokenStats(Summarized):
    """Statistics per token, detached, shaped like `labels`; 0 at tokens that do not count. None:
    this form of teacher cannot give it. NaN: the objective did not need it at this token.

    Attributes:
        log_probs: Of the label, in nats.
        teacher_log_probs: Likewise under the teacher.
        lse: logsumexp of the student's logits after scale, softcap and temperature, in nats.
        entropy: H(p), in nats.
        teacher_entropy: H(q), in nats. For a TopKTeacher without `entropy` a lower bound, which
            treats the mass outside its ids as one id.
        forward_kl: Exact, over the vocabulary, for a dense teacher. For a TopKTeacher another
            quantity: on its ids, or where the rule uses K on the likeliest `top_k` of them, with
            the rule's `top_k_tail`.
        reverse_kl: Exact, over the vocabulary, for a dense teacher.
        reward: R, transformed and clipped to the rule's clip_reward_*, or the caller's advantages,
            clipped. Before an outlier's floor and the filter, and without the task's advantages, so
            that what a credit function makes of it can be passed as `advantages`.
        trust: The gate's M; 0 on a prefix.
        outlier: 1 - M; 0 on a prefix.
        teacher_topk_mass: q's mass on K; for a dense teacher only at the tokens at which the rule
            looks at K, for a TopKTeacher at all tokens.
        student_topk_mass: Likewise p's.
        token_loss: Before `token_weight`.
        kept: Whether the token passed gate and selection.
        score: What the rule selects tokens by, of those that are left out, too. NaN at a token that
            is not ranked: one that does not count, or on a prefix that the rule weighs. None if the
            rule selects none.
    """

    log_probs: Tensor
    teacher_log_probs: Tensor | None
    lse: Tensor
    entropy: Tensor
    teacher_entropy: Tensor | None
    forward_kl: Tensor | None
    reverse_kl: Tensor | None
    reward: Tensor | None
    trust: Tensor
    outlier: Tensor
    teacher_topk_mass: Tensor | None
    student_topk_mass: Tensor | None
    token_loss: Tensor
    kept: Tensor
    score: Tensor | None = None

    @property
    def threshold(self) -> Tensor | None:
        """Scalar: the lowest score that was selected, which selects the same tokens as a
        `select_threshold`. inf: none was. None: the rule does not select."""
        if self.score is None:
            return None
        selected = self.score.masked_fill(self.score.isnan() | self.trust.isnan(), math.inf)
        of_nothing = selected.new_full((1,), math.inf)  # no tokens have no minimum
        return torch.cat([selected.flatten(), of_nothing]).min()


@dataclass(frozen=True, eq=False, repr=False)
class DistillationOutput(Summarized):
    """What a loss function returns.

    Attributes:
        loss: Scalar, or shaped like labels for reduction="none".
        stats: Statistics per token, detached.
        gradient_error: Scalar: standard deviation of a sampled gradient relative to its norm, the
            larger of that of hidden (exact) and that of weight (estimated); inf where the sample
            kept nothing. None where no gradient was sampled. The norm is the sample's, which the
            error makes larger: relative to the exact gradient's norm, e is e / sqrt(1 - e^2).
        gradient_share: Scalar: the fraction of the vocabulary's columns that entered the gradient
            products. None likewise.
    """

    loss: Tensor
    stats: TokenStats
    gradient_error: Tensor | None = None
    gradient_share: Tensor | None = None


def output_of(
    result: LossResult, labels: Tensor, teacher: Teacher | None, reduction: str
) -> DistillationOutput:
    """The result in the shape of `labels`."""
    loss = result.token_loss.reshape(labels.shape) if reduction == "none" else result.loss
    stats = _token_stats(result.stats.detach(), labels, teacher)
    report = result.sampling_report
    if report is None or len(report) == 0:
        return DistillationOutput(loss, stats)
    return DistillationOutput(
        loss, stats, report[SamplingReport.ERROR], report[SamplingReport.SHARE]
    )


def _token_stats(stats: Tensor, labels: Tensor, teacher: Teacher | None) -> TokenStats:
    dense = isinstance(teacher, (HiddenTeacher, LogitsTeacher))
    top_k = dense or isinstance(teacher, TopKTeacher)
    given = {
        Stat.TEACHER_LOG_PROB: teacher is not None,
        Stat.REWARD: teacher is not None,
        Stat.TEACHER_ENTROPY: top_k,
        Stat.FORWARD_KL: top_k,
        Stat.REVERSE_KL: dense,
        Stat.TEACHER_TOPK_MASS: top_k,
        Stat.STUDENT_TOPK_MASS: top_k,
    }
    names = {
        "log_probs": Stat.LOG_PROB, "teacher_log_probs": Stat.TEACHER_LOG_PROB,
        "lse": Stat.LSE, "entropy": Stat.ENTROPY, "teacher_entropy": Stat.TEACHER_ENTROPY,
        "forward_kl": Stat.FORWARD_KL, "reverse_kl": Stat.REVERSE_KL, "reward": Stat.REWARD,
        "trust": Stat.TRUST, "outlier": Stat.OUTLIER,
        "teacher_topk_mass": Stat.TEACHER_TOPK_MASS, "student_topk_mass": Stat.STUDENT_TOPK_MASS,
        "token_loss": Stat.TOKEN_LOSS, "kept": Stat.KEPT,
    }  # fmt: skip
    return TokenStats(
        **{
            name: stats[row].reshape(labels.shape) if given.get(row, True) else None
            for name, row in names.items()
        },
        score=stats[SCORE].reshape(labels.shape) if len(stats) > SCORE else None,
    )
