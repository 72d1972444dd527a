"""The public functions: check arguments, choose the backend, normalise, call the op.

`linear_distillation_loss` takes hidden states and a head, `distillation_loss` logits that already
exist, `linear_log_probs` gives per-token log-probabilities of a head. The mathematics is in
`reference.py`, the chunk loop in `loss/loop.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import native
from .arguments import (
    check_call,
    check_devices,
    check_float,
    check_selection,
    flat_per_token,
    is_number,
    savable,
)
from .backends import choose_backend
from .draws import seed_tensor, uniforms_like
from .dtypes import result_dtype
from .loss import ops
from .loss.agreement import agree
from .loss.eager import reference_loss
from .loss.loop import INPUTS
from .loss.main_grad import offers_main_grad
from .loss.sampling import EVERY_ID, Sampled, Selection
from .loss.sharded import sharded_loss
from .objectives import TokenRule, TrOPD
from .parallel import check_plain, group_of, local_part, whole_tensor
from .rows.layout import Stat
from .summary import Summarized
from .symbolic import as_tensor, shown, symbols_of
from .teachers import (
    HiddenTeacher,
    LogitsTeacher,
    Teacher,
    TopKTeacher,
    check_head,
    check_scale,
    check_serves,
)
from .transforms import check_none, check_tangents, check_unbatched

if TYPE_CHECKING:  # a torch without distributed has no such name
    from torch.distributed import ProcessGroup


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

    def call():
        student = whole_tensor("hidden", hidden, group)
        head, shift = local_part("weight", weight, group), local_part("bias", bias, group)
        check_head("student", student, head, shift)
        check_scale("student", logit_scale, softcap)
        check_selection(gradient_tolerance, gradient_sampling, reduction, backend, seed)
        return _flat_call(
            student, head, shift, labels, teacher, objective,
            (float(logit_scale), float(softcap or 0.0)), temperature,
            dict(old_log_probs=old_log_probs, advantages=advantages, token_weight=token_weight,
                 teacher_prefix=teacher_prefix, uniforms=uniforms),
            seed, ignore_index, normalizer, reduction, backend, max_workspace_bytes, group,
            gradient_tolerance, gradient_sampling,
        )  # fmt: skip

    found, after = _found(call, group, reduction)
    return _output(found, after, labels, teacher, reduction)


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

    def call():
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
        check_float("logits", logits)
        if logits.dim() < 1 or logits.shape[-1] == 0:
            raise ValueError(f"logits must be (*, V), got {tuple(logits.shape)}")
        return _flat_call(
            local_part("logits", logits, group, -1), None, None, labels, teacher, objective,
            (1.0, 0.0), temperature,
            dict(old_log_probs=old_log_probs, advantages=advantages, token_weight=token_weight,
                 teacher_prefix=teacher_prefix, uniforms=uniforms),
            seed, ignore_index, normalizer, reduction, backend, None, group,
        )  # fmt: skip

    found, after = _found(call, group, reduction)
    return _output(found, after, labels, teacher, reduction)


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

    def call():
        student = whole_tensor("hidden", hidden, group)
        head, shift = local_part("weight", weight, group), local_part("bias", bias, group)
        check_head("student", student, head, shift)
        check_scale("student", logit_scale, softcap)
        rule = TokenRule(policy_gradient=0.0, nll_weight=1.0, entropy_coef=float(return_entropy))
        check_call(student, labels, rule, temperature, ignore_index, "none", max_workspace_bytes)
        check_plain({"labels": labels})
        check_devices(student, {"weight": head, "bias": shift, "labels": labels})
        check_unbatched({"hidden": student, "weight": head, "bias": shift, "labels": labels})
        scales = [float(logit_scale), float(softcap or 0.0), 1.0, 0.0, float(temperature)]
        flat = (student.reshape(-1, student.shape[-1]), head, shift, labels.reshape(-1))
        one = student.new_ones((), dtype=result_dtype(student.dtype))
        needs, chosen = [False] * 4, _backend(backend, student, group)
        later = _wanted(student, head, shift)
        return (
            *savable((*flat, None, None, None), {}, needs, chosen), one, needs, later, rule, scales,
            chosen, ignore_index, max_workspace_bytes, EVERY_ID,
        ), None  # fmt: skip

    (_, _, stats, _), _ = _found(call, group, "none")
    log_probs = stats[Stat.LOG_PROB].reshape(labels.shape)
    if return_entropy:
        return log_probs, stats[Stat.ENTROPY].reshape(labels.shape)
    return log_probs


def _flat_call(
    student, weight, bias, labels, teacher, objective, student_scales, temperature, per_token,
    seed, ignore_index, normalizer, reduction, backend, max_workspace_bytes, group,
    tolerance=0.0, sampling=None,
):  # fmt: skip
    """(what `_run` takes, the statistic whose sum divides the loss): the arguments, checked."""
    rule = TrOPD() if objective is None else objective
    check_call(student, labels, rule, temperature, ignore_index, reduction, max_workspace_bytes)
    backend = _backend(backend, student, group)
    check_serves(teacher, rule)
    check_plain({"labels": labels} | per_token)
    check_devices(student, {"weight": weight, "bias": bias, "labels": labels} | per_token)
    check_unbatched(
        {"logits" if weight is None else "hidden": student, "weight": weight, "bias": bias}
        | {"labels": labels, "seed": seed, "normalizer": normalizer}
        | per_token
        | ({} if teacher is None else {f"teacher {k}": v for k, v in vars(teacher).items()})
    )
    if rule.gate == "bernoulli" and per_token["uniforms"] is None:
        if seed is None:
            raise ValueError(
                "this objective draws its gate at random: pass seed=<an integer that changes every "
                "step>, or uniforms=<numbers in [0, 1) shaped like labels>, or choose "
                "gate='expected', which draws nothing"
            )
        per_token["uniforms"] = uniforms_like(labels, seed)
    (teacher_source, teacher_weight, teacher_bias), teacher_scales, known = _flat_teacher(
        teacher, labels, student, group
    )
    per_token = {name: flat_per_token(name, t, labels) for name, t in per_token.items()}
    inputs = {k: v for k, v in (per_token | known).items() if v is not None}

    flat_labels = labels.reshape(-1)
    dtype = result_dtype(student.dtype)
    after = None  # a divisor known only once the gate has run
    weighs = inputs.get("token_weight")
    if reduction != "mean":
        if normalizer is not None:
            raise ValueError(
                f"normalizer divides the sum in reduction='mean', and reduction={reduction!r} "
                "divides by nothing: use 'mean', or divide the loss yourself"
            )
        scale = torch.ones((), dtype=dtype, device=student.device)
    elif normalizer is not None:
        # Where no token counts, a caller's own count may be 0.
        some = _counts(flat_labels, ignore_index, weighs).any()
        scale = torch.where(some, 1 / _normalizer(normalizer, student.device, dtype), 0.0)
    elif rule.normalize == "kept":
        scale, after = torch.ones((), dtype=dtype, device=student.device), Stat.KEPT
    else:
        # `ignore_index=None` says that tokens of weight 0 count, too.
        counts = _counts(flat_labels, ignore_index, None if ignore_index is None else weighs)
        scale = 1 / counts.sum().clamp_min(1).to(dtype)

    wanted = _wanted(student, weight, bias)
    formed = reduction != "none" and weight is not None
    needs, later = (wanted, [False] * 3) if formed else ([False] * 3, wanted)
    needs = [*needs, needs[1] and offers_main_grad(weight)]
    selection = EVERY_ID
    if tolerance or sampling is not None:
        share = None if sampling is None else float(sampling)
        selection = Selection(float(tolerance), share, seed_tensor(seed, labels.device))
    flat = (student.reshape(-1, student.shape[-1]), weight, bias, flat_labels)
    tensors = (*flat, teacher_source, teacher_weight, teacher_bias)
    call = (
        *savable(tensors, inputs, needs, backend), scale, needs, later, rule,
        [*student_scales, *teacher_scales, float(temperature)], backend, ignore_index,
        max_workspace_bytes, selection,
    )  # fmt: skip
    return call, after


def _wanted(*tensors: Tensor | None) -> list[bool]:
    """Which of them a backward may be asked for."""
    grad = torch.is_grad_enabled()
    return [grad and t is not None and t.requires_grad for t in tensors]


def _found(call, group, reduction: str):
    """((loss, token_loss, stats, sampled), the statistic whose sum divides the loss) of the flat
    call that `call` makes of this rank's arguments; with a group, what it raises is raised on every
    rank."""
    if group is None:
        arguments, after = call()
        return _run(*arguments), after
    check_none("process_group")
    sharded = _found_sharded
    if torch.compiler.is_compiling():  # as a decorator it would import the compiler with us
        sharded = torch.compiler.disable(_found_sharded)
    return sharded(call, group, reduction)


def _found_sharded(call, group, reduction: str):
    (arguments, after), shard = agree(group, call, reduction)
    return sharded_loss(shard, *arguments), after


def _backend(requested: str | None, student: Tensor, group) -> str:
    backend = choose_backend(requested, student.device)
    if requested is None and student.device.type == "cpu":
        native.advise_to_build()
    if group is not None and backend == "reference":
        raise NotImplementedError(
            "backend='reference' takes no process_group: use 'torch', 'native' or 'triton'"
        )
    return backend


def _output(found, after, labels, teacher, reduction) -> DistillationOutput:
    loss, token_loss, stats, sampled = found
    stats = stats.detach()
    if after is not None:
        loss = loss / stats[after].sum().clamp_min(1)
    if reduction == "none":
        loss = token_loss.reshape(labels.shape)
    tokens = _token_stats(stats, labels, teacher)
    if sampled is None or len(sampled) == 0:
        return DistillationOutput(loss, tokens)
    return DistillationOutput(loss, tokens, sampled[Sampled.ERROR], sampled[Sampled.SHARE])


def _run(
    tensors, inputs, scale, needs, later, rule, scales, backend, ignore_index,
    max_workspace_bytes, selection,
):  # fmt: skip
    """(loss, token_loss, stats, sampled) of the flat problem."""
    more = (backend, ignore_index, max_workspace_bytes)
    row_inputs = [inputs.get(name) for name in INPUTS]
    if backend == "reference":
        arguments = (*tensors, row_inputs, rule.key, scales, *more)
        return *reference_loss(ops.flat_problem(*arguments), scale), None
    check_tangents(*tensors[:3])
    tolerance, sampling = selection.tolerance, selection.sampling
    symbols = symbols_of([*scales, tolerance, sampling or 0.0])
    if symbols is not None:
        scales, tolerance, sampling = [], 0.0, None
    found = ops.differentiable_distill(
        *tensors, row_inputs, scale, needs, later, rule.key, scales, *more, tolerance, sampling,
        selection.seed, symbols,
    )  # fmt: skip
    return *found[:3], found[-1]


# --- the teacher, flat -------------------------------------------------------------------------


def _flat_teacher(teacher: Teacher | None, labels: Tensor, student: Tensor, group=None):
    """(logits or hidden, weight, bias), (logit scale, soft cap), per-token tensors by name."""
    nothing, plain = (None, None, None), (1.0, 0.0)
    if teacher is None:
        return nothing, plain, {}
    if teacher.tokens_shape != labels.shape:
        raise ValueError(
            f"the {type(teacher).__name__} covers tokens of shape {tuple(teacher.tokens_shape)}, "
            f"labels are {tuple(labels.shape)}: give one teacher entry per label"
        )
    check_devices(student, {f"teacher {k}": getattr(teacher, k) for k in teacher.__match_args__})
    if isinstance(teacher, HiddenTeacher):
        if result_dtype(teacher.hidden.dtype) != result_dtype(student.dtype):
            raise TypeError(
                f"teacher hidden is {teacher.hidden.dtype}, student {student.dtype}: float64 on "
                "one side alone; cast one of them"
            )
        hidden = whole_tensor("the teacher's hidden", teacher.hidden, group)
        flat = hidden.reshape(-1, hidden.shape[-1])
        scales = (float(teacher.logit_scale), float(teacher.softcap or 0.0))
        weight = local_part("the teacher's weight", teacher.weight, group)
        return (flat, weight, local_part("the teacher's bias", teacher.bias, group)), scales, {}
    if isinstance(teacher, LogitsTeacher):
        logits = local_part("the teacher's logits", teacher.logits, group, -1)
        return (logits.reshape(-1, logits.shape[-1]), None, None), plain, {}
    check_plain({f"teacher {k}": getattr(teacher, k) for k in teacher.__match_args__})
    dtype = result_dtype(student.dtype)
    known = {"label_log_probs": teacher.label_log_probs.reshape(-1).to(dtype)}
    if isinstance(teacher, TopKTeacher):
        k = teacher.ids.shape[-1]
        known["ids"] = teacher.ids.reshape(-1, k).long()
        known["topk_log_probs"] = teacher.log_probs.reshape(-1, k).to(dtype)
        if teacher.entropy is not None:
            known["teacher_entropy"] = teacher.entropy.reshape(-1).to(dtype)
    return nothing, plain, known


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


# --- normalisation -----------------------------------------------------------------------------


def _counts(labels: Tensor, ignore_index: int | None, weight: Tensor | None) -> Tensor:
    """Which tokens count (N,), bool."""
    counts = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        counts = labels != ignore_index
    return counts if weight is None else counts & (weight != 0)


def _normalizer(value, device, dtype) -> Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"normalizer must be one number, got shape {tuple(value.shape)}")
        return value.detach().reshape(()).to(device=device, dtype=dtype)
    # Written with a number, since a compiler takes a symbol to be below infinity.
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"normalizer must be a positive number, got {shown(value)}")
    return as_tensor(float(value), dtype, device)
