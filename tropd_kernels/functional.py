"""The public functions.

`linear_distillation_loss` takes hidden states and a head, `distillation_loss` logits that already
exist, `linear_log_probs` gives per-token log-probabilities of a head. The mathematics is in
`reference.py`; `loss/` checks the arguments and computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .loss.dispatch import compute
from .loss.prepare import (
    distillation_problem,
    log_probs_problem,
    student_logits,
    student_with_head,
)
from .loss.problem import Problem
from .objectives import TokenRule
from .outputs import DistillationOutput, TokenStats, output_of
from .parallel import group_of
from .rows.layout import Stat
from .teachers import Teacher

if TYPE_CHECKING:  # a torch without distributed has no such name
    from torch.distributed import ProcessGroup

__all__ = [
    "DistillationOutput",
    "TokenStats",
    "distillation_loss",
    "linear_distillation_loss",
    "linear_log_probs",
]


def linear_distillation_loss(
    hidden: Tensor,  # (*, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (*)
    teacher: Teacher | None,
    objective: TokenRule | None = None,
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    old_log_probs: Tensor | None = None,  # (*)
    advantages: Tensor | None = None,  # (*)
    token_weight: Tensor | None = None,  # (*)
    teacher_prefix: Tensor | None = None,  # (*)
    uniforms: Tensor | None = None,  # (*)
    seed: int | Tensor | None = None,
    ignore_index: int | None = -100,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    max_workspace_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    gradient_tolerance: float = 0.0,
    gradient_sampling: float | None = None,
) -> DistillationOutput:
    """Distillation loss of a student's head, without ever holding the logits of all tokens.

    hidden: last hidden states, so placed that hidden[i] predicts labels[i]. weight: the head, of
    any float dtype: the product is in that of hidden, for which a head of another is copied, and
    the gradient in the head's own, straight from the float32 sums. A side that does not require
    grad costs no GEMM.
    labels: int64. Tokens with `ignore_index`, or of weight 0, are dropped before the first GEMM;
    `ignore_index=None` says that every token counts, which spares a GPU the one host sync, and with
    it the checks of values: there a label out of range gives NaN in its row. A CPU checks anyway.
    teacher: a HiddenTeacher, LogitsTeacher, TopKTeacher or SampledTeacher; None for `SFT()`. Where
    the vocabularies differ in height, the ids that both have are used.
    objective: a `TokenRule`, such as `TrOPD()` (default), `OPD()`, `GKD()`.
    bias, logit_scale, softcap: logits = cap(logit_scale * (hidden @ weight.T + bias)), then
    temperature, which divides both sides' logits.
    old_log_probs: log-probs of the labels under the policy that sampled them (default: this one).
    advantages: replace the reward R. token_weight: factor on each token's loss. All detached.
    teacher_prefix: bool, the token was written by the teacher.
    uniforms, seed: for a Bernoulli gate, the draws in [0, 1), or an integer from which they are
    derived per token (`draws.uniforms_like`), as are those of a sampled gradient: another one for
    every step, micro-batch and rank with tokens of its own, as (step * micro_batches + i) * ranks +
    rank, or they share their draws, and the errors of their samples do not cancel.
    normalizer: what the sum is divided by in the mean; default the number of tokens that count. A
    tensor is not looked at: it may be 0 only where no token counts, and the loss is 0 then.
    reduction: "mean" and "sum" form the gradients in the forward; "none" gives per-token losses and
    recomputes. backend: None takes the best available; see `available_backends`.
    max_workspace_bytes: shrinks the chunks; see `plan_chunks`.
    process_group: the ranks over which the heads are sharded by vocabulary: `weight` and `bias`,
    and a teacher's `weight` and `bias` or logits, then hold this rank's consecutive ids, ids
    running on from rank to rank; the two sides may be cut differently. All else, hidden and labels
    included, is the same on every rank, and so are the loss, the statistics and hidden's gradient,
    which is the complete one: add no all-reduce of your own. A weight that is a DTensor with
    Shard(0) brings its group along (one that FSDP shards has to be gathered: its ranks hold other
    tokens, which is an error here); on a mesh that also replicates it, its gradient is that of this
    rank's tokens, to be summed over the replicas if those hold others. Collective: every rank of
    the group makes the same call, and with reduction="none" the same backward. Not for
    backend="reference"; under torch.compile it runs eagerly. See `parallel` for what is
    communicated.
    gradient_tolerance, gradient_sampling: make the gradients of hidden and weight from a sample of
    the vocabulary's ids, drawn by how much each adds, and scaled so that both are unbiased: most of
    a softmax's gradient lies on few ids, so most of two products is spared. A tolerance, such as
    0.01, keeps as many ids as it takes for a standard deviation of about that part of the
    gradient's norm; sampling, such as 0.1, keeps that part of the ids, on average; where more than
    half of them would be kept, all are. The output's `gradient_error` says what came of it. Pass
    one of them, and `seed`. Loss, statistics and the bias's gradient stay exact. Adam moves the
    head's row of an id that is drawn seldom less than it would by many small gradients. Chosen once
    per super-chunk (see `plan_chunks`), at the cost of a host sync; not for reduction="none" or
    backend="reference". See `loss.sampling`.

    Raises ValueError, TypeError, NotImplementedError or RuntimeError that say what was given and
    what was expected; with a process_group on every rank, naming the one at fault.
    """
    group = group_of(process_group, weight)

    def prepared() -> Problem:
        return distillation_problem(
            student_with_head(hidden, weight, bias, logit_scale, softcap, group),
            labels,
            teacher,
            objective,
            per_token={
                "old_log_probs": old_log_probs,
                "advantages": advantages,
                "token_weight": token_weight,
                "teacher_prefix": teacher_prefix,
                "uniforms": uniforms,
            },
            temperature=temperature,
            seed=seed,
            ignore_index=ignore_index,
            normalizer=normalizer,
            reduction=reduction,
            backend=backend,
            group=group,
            max_workspace_bytes=max_workspace_bytes,
            gradient_tolerance=gradient_tolerance,
            gradient_sampling=gradient_sampling,
        )

    return output_of(compute(prepared, group, reduction), labels, teacher, reduction)


def distillation_loss(
    logits: Tensor,  # (*, V)
    labels: Tensor,  # (*)
    teacher: Teacher | None,
    objective: TokenRule | None = None,
    *,
    temperature: float = 1.0,
    old_log_probs: Tensor | None = None,  # (*)
    advantages: Tensor | None = None,  # (*)
    token_weight: Tensor | None = None,  # (*)
    teacher_prefix: Tensor | None = None,  # (*)
    uniforms: Tensor | None = None,  # (*)
    seed: int | Tensor | None = None,
    ignore_index: int | None = -100,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    process_group: ProcessGroup | None = None,
) -> DistillationOutput:
    """The same loss on logits that already exist. Arguments as in `linear_distillation_loss`.

    Logits may be of any float dtype; they are read as they are and reduced in float32. Their
    gradient is made in the backward, which reads them once more; nothing of their size is held in
    between. With a process_group they are this rank's ids, as a column-parallel head gives them.
    """
    group = group_of(process_group, logits, "logits", -1)

    def prepared() -> Problem:
        return distillation_problem(
            student_logits(logits, group),
            labels,
            teacher,
            objective,
            per_token={
                "old_log_probs": old_log_probs,
                "advantages": advantages,
                "token_weight": token_weight,
                "teacher_prefix": teacher_prefix,
                "uniforms": uniforms,
            },
            temperature=temperature,
            seed=seed,
            ignore_index=ignore_index,
            normalizer=normalizer,
            reduction=reduction,
            backend=backend,
            group=group,
        )

    return output_of(compute(prepared, group, reduction), labels, teacher, reduction)


def linear_log_probs(
    hidden: Tensor,  # (*, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (*)
    *,
    bias: Tensor | None = None,  # (V,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    return_entropy: bool = False,
    backend: str | None = None,
    max_workspace_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(label) per token, shaped like labels, in nats, float32; differentiable in hidden,
    weight and bias, by recomputing. 0 where the label is `ignore_index`.

    With `return_entropy`, also H(p) per token, differentiable as well. Arguments and errors as in
    `linear_distillation_loss`.
    """
    group = group_of(process_group, weight)

    def prepared() -> Problem:
        return log_probs_problem(
            student_with_head(hidden, weight, bias, logit_scale, softcap, group),
            labels,
            temperature=temperature,
            ignore_index=ignore_index,
            entropy=return_entropy,
            backend=backend,
            max_workspace_bytes=max_workspace_bytes,
            group=group,
        )

    stats = compute(prepared, group, "none").stats
    log_probs = stats[Stat.LOG_PROB].reshape(labels.shape)
    if return_entropy:
        return log_probs, stats[Stat.ENTROPY].reshape(labels.shape)
    return log_probs
