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
from .teachers import HiddenTeacher, LogitsTeacher, Teacher

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
    task_advantages: Tensor | None = None,  # (*)
    token_weight: Tensor | None = None,  # (*)
    teacher_prefix: Tensor | None = None,  # (*)
    scores: Tensor | None = None,  # (*)
    uniforms: Tensor | None = None,  # (*)
    mixing: Tensor | None = None,  # (*)
    blending: Tensor | None = None,  # (*)
    ids: Tensor | None = None,  # (*, K)
    reference_teacher: HiddenTeacher | LogitsTeacher | None = None,
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
    """Distillation loss of a student's head. The full (tokens, V) logits are never materialized.

    logits = cap(logit_scale * (hidden @ weight.T + bias)), cap(x) = softcap * tanh(x / softcap).

    Args:
        hidden: Last hidden states, aligned so that hidden[i] predicts labels[i].
        weight: The head, of any float dtype. The product is computed in the dtype of `hidden`, to
            which a head of another dtype is copied; the gradient is rounded once, from float32
            sums to the head's own dtype. An input that does not require grad costs no GEMM.
        labels: int64. Tokens with `ignore_index` or weight 0 are dropped before the first GEMM.
        teacher: A HiddenTeacher, LogitsTeacher, TopKTeacher or SampledTeacher; None for `SFT()`. If
            the vocabularies differ in size, the ids that all have are used.
        objective: A `TokenRule`, such as `TrOPD()` (the default), `OPD()` or `GKD()`.
        bias: Added to the logits.
        logit_scale: Factor on the logits.
        softcap: Bound of the tanh that caps the logits.
        temperature: Divides all sides' logits.
        old_log_probs: Log-probs of the labels under the policy that sampled them; by default the
            student's own. All per-token tensors are constants.
        advantages: Replace the reward R; taken as they are, but for the rule's clip_reward_*.
        task_advantages: Of a verifier, or another reward of the task, at each token: added to R
            with the objective's `task_weight`, or its sign decides which rewards count
            (`reward_filter`, `OPDVR()`). For objectives that have one of the two, which need it.
        token_weight: Factor on each token's loss.
        teacher_prefix: bool, whether the teacher wrote the token.
        scores: Scores for select_by="scores"; the tokens with the highest are selected.
        uniforms: Draws in [0, 1) for a Bernoulli gate.
        mixing: Each token's weight w in [0, 1] of `Divergence("mixed")`, w KL(q || p) +
            (1 - w) KL(p || q). For example `torch.sigmoid((entropy - 0.8) / 0.1)` of the
            `teacher_entropy` in an earlier call's statistics, a soft form of EOPD's gate.
        blending: Each token's weight w in [0, 1] of the target that the objective's powers make,
            q^(1 - w) (q^a sg(p)^b r^c)^w renormalised: by default 1; 0 is the teacher alone. For
            objectives with such powers (`Veto`, `ExOPD`, `DemoPSD`).
        ids: int64, the set K of an objective with `top_k_ids="given"`: distinct within a token,
            -1 at padding.
        seed: An integer from which the draws are derived instead, per token
            (`draws.uniforms_like`), and those of a sampled gradient. Change it for every step, for
            every micro-batch, and for every rank that has tokens of its own, for instance
            (step * micro_batches + i) * ranks + rank. Equal seeds give equal draws, and the errors
            of their samples do not cancel.
        reference_teacher: A HiddenTeacher or LogitsTeacher r, for an objective with a
            `reference_power`, such as `ExOPD`. Costs a product with its head, and one more chunk of
            logits.
        ignore_index: Label of tokens that do not count. None: all tokens count. On a GPU this saves
            the call's one host sync, and with it the checks of values: a label out of range then
            makes its row NaN. A CPU checks anyway. (An objective that selects tokens waits once.)
        normalizer: Divisor of the sum for reduction="mean"; by default the number of tokens that
            count. The host does not read a tensor: it may be 0 only if no token counts, and the
            loss is then 0.
        reduction: "mean" and "sum" form the gradients in the forward. "none" gives per-token
            losses, whose backward recomputes the logits.
        backend: None takes the best one available; see `available_backends`.
        max_workspace_bytes: Makes the chunks smaller; see `plan_chunks`. Not for
            backend="reference", which has none.
        process_group: The ranks over which the heads are sharded by vocabulary. `weight` and
            `bias`, and a teacher's `weight` and `bias` or logits, then hold this rank's consecutive
            ids, in the order of the ranks; the sides may be cut differently. All other
            arguments are the same on every rank, and so are the loss, the statistics and the
            gradient of `hidden`, which is the complete one: add no all-reduce. A weight that is a
            DTensor with Shard(0) brings its group along. (One that FSDP shards has to be gathered:
            its ranks hold other tokens, which is an error here.) On a mesh that also replicates the
            weight, its gradient is that of this rank's tokens: sum it over the replicas if they
            hold other tokens. This is a collective: every rank makes the same call, and for
            reduction="none" the same backward. Not for backend="reference"; runs eagerly under
            torch.compile. `parallel` states what is communicated.
        gradient_tolerance: Computes the gradients of `hidden` and `weight` from an unbiased sample
            of the vocabulary's ids, drawn by how much each contributes. Most of a softmax's
            gradient lies on few ids, so most of two GEMMs is saved. Keeps as many ids as a relative
            standard deviation of the gradient of about this size requires, for instance 0.01. Needs
            `seed`. `gradient_error` of the output says what it was. Loss, statistics and the
            gradient of `bias` stay exact. Adam moves the head's row of a rarely drawn id less than
            many small gradients would. The ids are chosen once per super-chunk (see `plan_chunks`),
            at the cost of a host sync. Not for reduction="none" or backend="reference". See
            `loss.sampling`.
        gradient_sampling: The same, with this fraction of the ids on average, for instance 0.1. All
            ids are kept where more than half of them would be. Give one of the two.

    Returns:
        A `DistillationOutput`: loss, statistics per token, and what the sampling did.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: They say what was given and what
            was expected; with a process_group on every rank, naming the one at fault.

    Examples:
        >>> import torch
        >>> from tropd_kernels import HiddenTeacher, TrOPD, linear_distillation_loss
        >>> hidden, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(300, 16)
        >>> labels = torch.randint(300, (2, 5))
        >>> teacher = HiddenTeacher(torch.randn(2, 5, 24), torch.randn(300, 24))
        >>> out = linear_distillation_loss(hidden, weight, labels, teacher, TrOPD(), seed=1)
        >>> out.loss.backward()
        >>> out.stats.trust.shape
        torch.Size([2, 5])
    """
    group = group_of(process_group, weight)

    def prepared() -> Problem:
        return distillation_problem(
            student_with_head(hidden, weight, bias, logit_scale, softcap, group),
            labels, teacher, objective,
            per_token=dict(old_log_probs=old_log_probs, advantages=advantages, uniforms=uniforms,
                           token_weight=token_weight, teacher_prefix=teacher_prefix,
                           mixing=mixing, blending=blending, task_advantages=task_advantages,
                           scores=scores),
            reference=reference_teacher, ids=ids,
            temperature=temperature, seed=seed, ignore_index=ignore_index, normalizer=normalizer,
            reduction=reduction, backend=backend, group=group,
            max_workspace_bytes=max_workspace_bytes, gradient_tolerance=gradient_tolerance,
            gradient_sampling=gradient_sampling,
        )  # fmt: skip

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
    task_advantages: Tensor | None = None,  # (*)
    token_weight: Tensor | None = None,  # (*)
    teacher_prefix: Tensor | None = None,  # (*)
    scores: Tensor | None = None,  # (*)
    uniforms: Tensor | None = None,  # (*)
    mixing: Tensor | None = None,  # (*)
    blending: Tensor | None = None,  # (*)
    ids: Tensor | None = None,  # (*, K)
    reference_teacher: HiddenTeacher | LogitsTeacher | None = None,
    seed: int | Tensor | None = None,
    ignore_index: int | None = -100,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
    process_group: ProcessGroup | None = None,
) -> DistillationOutput:
    """The same loss on logits that already exist.

    Args:
        logits: Of any float dtype; read as they are and reduced in float32. With a process_group
            this rank's ids, as a column-parallel head gives them. The backward computes their
            gradient from a second read; nothing of their size is kept in between.

    The other arguments, the result and the errors are those of `linear_distillation_loss`.

    Examples:
        >>> import torch
        >>> from tropd_kernels import GKD, LogitsTeacher, distillation_loss
        >>> logits = torch.zeros(3, 4, requires_grad=True)
        >>> teacher = LogitsTeacher(torch.zeros(3, 4))
        >>> out = distillation_loss(logits, torch.tensor([0, 1, 2]), teacher, GKD())
        >>> out.loss.item()
        0.0
    """
    group = group_of(process_group, logits, "logits", -1)

    def prepared() -> Problem:
        return distillation_problem(
            student_logits(logits, group), labels, teacher, objective,
            per_token=dict(old_log_probs=old_log_probs, advantages=advantages, uniforms=uniforms,
                           token_weight=token_weight, teacher_prefix=teacher_prefix,
                           mixing=mixing, blending=blending, task_advantages=task_advantages,
                           scores=scores),
            reference=reference_teacher, ids=ids,
            temperature=temperature, seed=seed, ignore_index=ignore_index, normalizer=normalizer,
            reduction=reduction, backend=backend, group=group,
        )  # fmt: skip

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
    """log p(label) per token, in nats.

    Args:
        return_entropy: Return H(p) per token as well.

    The other arguments and the errors are those of `linear_distillation_loss`.

    Returns:
        float32, shaped like `labels`, 0 where the label is `ignore_index`; with `return_entropy` a
        pair of such tensors. Differentiable in hidden, weight and bias; the backward recomputes the
        logits.

    Examples:
        >>> import torch
        >>> from tropd_kernels import linear_log_probs
        >>> hidden, weight = torch.zeros(3, 16), torch.randn(4, 16)
        >>> labels = torch.tensor([0, 1, -100])
        >>> log_probs, entropy = linear_log_probs(hidden, weight, labels, return_entropy=True)
        >>> log_probs.shape, log_probs[-1].item()
        (torch.Size([3]), 0.0)
    """
    group = group_of(process_group, weight)

    def prepared() -> Problem:
        return log_probs_problem(
            student_with_head(hidden, weight, bias, logit_scale, softcap, group), labels,
            temperature=temperature, ignore_index=ignore_index, entropy=return_entropy,
            backend=backend, max_workspace_bytes=max_workspace_bytes, group=group,
        )  # fmt: skip

    stats = compute(prepared, group, "none").stats
    log_probs = stats[Stat.LOG_PROB].reshape(labels.shape)
    if return_entropy:
        return log_probs, stats[Stat.ENTROPY].reshape(labels.shape)
    return log_probs
