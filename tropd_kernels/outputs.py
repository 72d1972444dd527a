"""What the loss returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .loss.dispatch import LossResult
from .loss.sampling import SamplingReport
from .rows.layout import Stat
from .summary import Summarized
from .teachers import HiddenTeacher, LogitsTeacher, Teacher, TopKTeacher


@dataclass(frozen=True, eq=False, repr=False)
class TokenStats(Summarized):
    """Detached statistics, each shaped like `labels`; 0 at tokens that do not count. None where the
    form of teacher cannot give it; NaN at tokens for which the objective had no need of it.

    log_probs, teacher_log_probs: of the label, nats. entropy, teacher_entropy: nats; of a
    TopKTeacher without `entropy` a lower bound, with the mass off its ids taken for one id's.
    forward_kl, reverse_kl: exact, over the vocabulary, with a dense teacher. forward_kl of a
    TopKTeacher is another quantity: on its ids, or where the rule uses K on the likeliest `top_k`
    of them, with the rule's `top_k_tail`. reward: R, before any clip. trust: the gate's M;
    outlier: 1 - M; both 0 on a prefix. teacher_topk_mass, student_topk_mass: of K; of a dense
    teacher at the tokens alone at which the rule looks at K, of a TopKTeacher at all tokens.
    token_loss: before `token_weight`. kept: passed gate and entropy filter.
    """

    log_probs: Tensor
    teacher_log_probs: Tensor | None
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


@dataclass(frozen=True, eq=False, repr=False)
class DistillationOutput(Summarized):
    """loss: scalar, or shaped like labels with reduction="none". stats: per token, detached.

    With `gradient_tolerance` or `gradient_sampling`, and None without them or where no product made
    a gradient: gradient_share: scalar, how much of the vocabulary's columns entered the gradient
    products. gradient_error: scalar, the standard deviation of the gradient relative to its norm,
    the larger of hidden's (exact) and weight's (estimated); inf where the sample kept nothing."""

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
        "entropy": Stat.ENTROPY, "teacher_entropy": Stat.TEACHER_ENTROPY,
        "forward_kl": Stat.FORWARD_KL, "reverse_kl": Stat.REVERSE_KL, "reward": Stat.REWARD,
        "trust": Stat.TRUST, "outlier": Stat.OUTLIER,
        "teacher_topk_mass": Stat.TEACHER_TOPK_MASS, "student_topk_mass": Stat.STUDENT_TOPK_MASS,
        "token_loss": Stat.TOKEN_LOSS, "kept": Stat.KEPT,
    }  # fmt: skip
    return TokenStats(
        **{
            name: stats[row].reshape(labels.shape) if given.get(row, True) else None
            for name, row in names.items()
        }
    )
