"""From the public functions' arguments to a `Problem`: checked, flat, detached."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from .. import native
from ..arguments import (
    check_call,
    check_devices,
    check_float,
    check_sampling,
    flat_per_token,
    is_number,
)
from ..backends import choose_backend, has_row_engine
from ..draws import seed_tensor, uniforms_like
from ..dtypes import result_dtype
from ..objectives import TokenRule, TrOPD
from ..parallel import check_plain, local_part, whole_tensor
from ..rows.layout import Stat, TokenInputs
from ..symbolic import as_tensor, shown
from ..teachers import (
    HiddenTeacher,
    LogitsTeacher,
    Teacher,
    TopKTeacher,
    check_head,
    check_reference,
    check_scale,
    check_serves,
)
from ..transforms import check_unbatched
from .main_grad import has_main_grad
from .problem import NO_GRADIENTS, GradNeeds, LossOptions, Problem, Side
from .sampling import NO_SAMPLING, GradientSampling

if TYPE_CHECKING:  # a torch without distributed has no such name
    from torch.distributed import ProcessGroup


def student_with_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None,
    group: ProcessGroup | None,
) -> Side:  # fmt: skip
    """The student's side, checked; `source` is still (*, H). Of a sharded head this rank's part."""
    hidden = whole_tensor("hidden", hidden, group)
    weight = local_part("weight", weight, group)
    bias = None if bias is None else local_part("bias", bias, group)
    check_head("student", hidden, weight, bias)
    check_scale("student", logit_scale, softcap)
    return Side(hidden, weight, bias, float(logit_scale), _softcap(softcap))


def student_logits(logits: Tensor, group: ProcessGroup | None) -> Side:
    """The student's side, checked; `source` is still (*, V)."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    check_float("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be (*, V), got {tuple(logits.shape)}")
    return Side(local_part("logits", logits, group, -1))


def distillation_problem(
    student: Side,
    labels: Tensor,
    teacher: Teacher | None,
    objective: TokenRule | None,
    *,
    per_token: dict[str, Tensor | None],  # fields of `TokenInputs` that the caller gave
    ids: Tensor | None,
    reference: Teacher | None,
    temperature: float,
    seed: int | Tensor | None,
    ignore_index: int | None,
    normalizer: float | Tensor | None,
    reduction: str,
    backend: str | None,
    group: ProcessGroup | None,
    max_workspace_bytes: int | None = None,
    gradient_tolerance: float = 0.0,
    gradient_sampling: float | None = None,
) -> Problem:
    """The problem of a distillation loss. Errors are those of `linear_distillation_loss`."""
    rule = TrOPD() if objective is None else objective
    source, weight, bias = student.source, student.weight, student.bias
    check_sampling(gradient_tolerance, gradient_sampling, reduction, backend, seed)
    check_call(source, labels, rule, temperature, ignore_index, reduction, max_workspace_bytes)
    backend = _backend(backend, source, group, max_workspace_bytes)
    check_serves(teacher, rule)
    check_reference(reference, rule)
    check_plain({"labels": labels, "ids": ids} | per_token)
    given = {"weight": weight, "bias": bias, "labels": labels, "ids": ids}
    check_devices(source, given | per_token)
    check_unbatched(
        {"logits" if weight is None else "hidden": source, "weight": weight, "bias": bias}
        | {"labels": labels, "ids": ids, "seed": seed, "normalizer": normalizer}
        | per_token
        | ({} if teacher is None else _named(teacher))
        | ({} if reference is None else _named(reference, "reference_teacher"))
    )
    _check_ids(rule, ids, labels)
    _check_read(rule, per_token)
    if rule.gate == "bernoulli" and per_token["uniforms"] is None:
        if seed is None:
            raise ValueError(
                "this objective draws its gate at random: pass seed=<an integer that changes every "
                "step>, or uniforms=<numbers in [0, 1) shaped like labels>, or choose "
                "gate='expected', which draws nothing"
            )
        per_token = per_token | {"uniforms": uniforms_like(labels, seed)}
    dense, known = _teacher(teacher, labels, source, group)
    if ids is not None:
        known["ids"] = _rows(ids).long()
    beside, _ = _teacher(reference, labels, source, group, "reference_teacher")
    flat = {name: flat_per_token(name, value, labels) for name, value in per_token.items()}
    inputs = TokenInputs(**flat, **known)
    flat_labels = labels.reshape(-1)
    scale, divide_by = _loss_scale(
        rule, flat_labels, inputs.token_weight, ignore_index, normalizer, reduction, source
    )
    grads = _wanted(student)
    forms = reduction != "none" and weight is not None
    sampling = NO_SAMPLING
    if gradient_tolerance or gradient_sampling is not None:
        share = None if gradient_sampling is None else float(gradient_sampling)
        assert seed is not None  # `check_sampling`
        drawn = seed_tensor(seed, labels.device)
        sampling = GradientSampling(float(gradient_tolerance), share, drawn)
    return _saveable(
        Problem(
            student=replace(student, source=_rows(source)),
            teacher=dense,
            reference=beside,
            labels=flat_labels,
            inputs=inputs,
            options=LossOptions(
                rule=rule,
                backend=backend,
                temperature=float(temperature),
                ignore_index=ignore_index,
                max_workspace_bytes=max_workspace_bytes,
                sampling=sampling,
            ),
            loss_scale=scale,
            forward_grads=grads if forms else NO_GRADIENTS,
            backward_grads=NO_GRADIENTS if forms else grads,
            divide_by=divide_by,
        )
    )


def log_probs_problem(
    student: Side,
    labels: Tensor,
    *,
    temperature: float,
    ignore_index: int | None,
    entropy: bool,  # differentiable as well
    backend: str | None,
    max_workspace_bytes: int | None,
    group: ProcessGroup | None,
) -> Problem:
    """A problem of which only the statistics are read."""
    source = student.source
    rule = TokenRule(policy_gradient=0.0, nll_weight=1.0, entropy_coef=float(entropy))
    check_call(source, labels, rule, temperature, ignore_index, "none", max_workspace_bytes)
    check_plain({"labels": labels})
    check_devices(source, {"weight": student.weight, "bias": student.bias, "labels": labels})
    check_unbatched(
        {"hidden": source, "weight": student.weight, "bias": student.bias, "labels": labels}
    )
    return _saveable(
        Problem(
            student=replace(student, source=_rows(source)),
            teacher=None,
            labels=labels.reshape(-1),
            inputs=TokenInputs(),
            options=LossOptions(
                rule=rule,
                backend=_backend(backend, source, group, max_workspace_bytes),
                temperature=float(temperature),
                ignore_index=ignore_index,
                max_workspace_bytes=max_workspace_bytes,
                sampling=NO_SAMPLING,
            ),
            loss_scale=source.new_ones((), dtype=result_dtype(source.dtype)),
            forward_grads=NO_GRADIENTS,
            backward_grads=_wanted(student),
        )
    )


def _check_ids(rule: TokenRule, ids: Any, labels: Tensor) -> None:
    def wanted() -> str:  # when it is asked for: torch.compile writes no length that it traces
        shape = ", ".join(map(str, (*labels.shape, "K")))
        return f"an int64 tensor of shape ({shape}) with -1 at padding"

    if rule.top_k_ids == "given" and ids is None:
        raise ValueError(f"{rule!r} sums over ids that are given: pass ids=<{wanted()}>")
    if ids is None:
        return
    if rule.top_k_ids != "given":
        raise ValueError(
            f"ids are the set K of an objective with top_k_ids='given', and {rule!r} does not read "
            "them: leave ids out, or take Divergence('reverse_kl', top_k_ids='given') (ids that a "
            "TopKTeacher scored are its own)"
        )
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be {wanted()}, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be {wanted()}, got {ids.dtype}")
    if ids.shape[:-1] != labels.shape or ids.dim() == 0 or ids.shape[-1] == 0:
        raise ValueError(f"ids must be {wanted()}, got shape {tuple(ids.shape)}")


#: Arguments that some rules read and others do not: which, what to give, and what reads it.
_READ_BY_SOME: dict[str, tuple[Callable[[TokenRule], bool], str, str]] = {
    "mixing": (
        lambda rule: rule.weighs_by_mixing,
        "numbers in [0, 1], 1 for the forward KL, 0 for the reverse",
        "Divergence('mixed')",
    ),
    "task_advantages": (
        lambda rule: rule.uses_task_advantages, "numbers", "a task_weight or a reward_filter",
    ),
    "scores": (
        lambda rule: rule.select_by == "scores", "numbers, the highest of which count",
        "select_by='scores'",
    ),
}  # fmt: skip


def _check_read(rule: TokenRule, per_token: dict[str, Tensor | None]) -> None:
    """Each of them is given with a rule that reads it, and with no other; advantages and blending
    may be given with one that does."""
    for name, (reads, what, reader) in _READ_BY_SOME.items():
        given = per_token[name] is not None
        if reads(rule) and not given:
            raise ValueError(
                f"{rule!r} reads {name}: pass {name}=<{what}, shaped like labels>, or choose an "
                f"objective without {reader}"
            )
        if given and not reads(rule):
            _raise_idle(name, rule, reader)
    if per_token["advantages"] is not None and not rule.reads_advantages:
        _raise_idle("advantages", rule, "a policy_gradient")
    if per_token["blending"] is not None and not rule.reshapes_target:
        _raise_idle("blending", rule, "a student_power or another power, such as Veto")


def _raise_idle(name: str, rule: TokenRule, reader: str) -> NoReturn:
    raise ValueError(
        f"{name} has no effect with {rule!r}: leave it out, or choose an objective with {reader}"
    )


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _softcap(value: float | None) -> float | None:
    return None if value is None else float(value)


def _backend(
    requested: str | None, student: Tensor, group: ProcessGroup | None, budget: int | None
) -> str:
    backend = choose_backend(requested, student.device)
    if requested is None and student.device.type == "cpu":
        native.advise_to_build()
    for name, given in (("process_group", group), ("max_workspace_bytes", budget)):
        if given is not None and not has_row_engine(backend):
            raise NotImplementedError(
                f"backend='reference' takes no {name}: use 'torch', 'native' or 'triton'"
            )
    return backend


def _wanted(student: Side) -> GradNeeds:
    """Which gradients a backward may be asked for."""
    hidden, weight, bias = (
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (student.source, student.weight, student.bias)
    )
    return GradNeeds(hidden, weight, bias, weight and has_main_grad(student.weight))


# --- the teacher ---------------------------------------------------------------------------------


def _teacher(
    teacher: Teacher | None,
    labels: Tensor,
    student: Tensor,
    group: ProcessGroup | None,
    name: str = "teacher",
) -> tuple[Side | None, dict[str, Tensor]]:
    """A dense teacher's side, and what other forms know of each token: fields of `TokenInputs`.
    name: in errors."""
    if teacher is None:
        return None, {}
    if teacher.tokens_shape != labels.shape:
        whose = "" if name == "teacher" else f" {name}"
        raise ValueError(
            f"the {type(teacher).__name__}{whose} covers tokens of shape "
            f"{tuple(teacher.tokens_shape)}, labels are {tuple(labels.shape)}: give one teacher "
            "entry per label"
        )
    check_devices(student, _named(teacher, name))
    if isinstance(teacher, HiddenTeacher):
        if result_dtype(teacher.hidden.dtype) != result_dtype(student.dtype):
            raise TypeError(
                f"{name} hidden is {teacher.hidden.dtype}, student {student.dtype}: float64 on "
                "one side alone; cast one of them"
            )
        hidden = whole_tensor(f"the {name}'s hidden", teacher.hidden, group)
        weight = local_part(f"the {name}'s weight", teacher.weight, group)
        bias = teacher.bias
        if bias is not None:
            bias = local_part(f"the {name}'s bias", bias, group)
        softcap = _softcap(teacher.softcap)
        return Side(_rows(hidden), weight, bias, float(teacher.logit_scale), softcap), {}
    if isinstance(teacher, LogitsTeacher):
        return Side(_rows(local_part(f"the {name}'s logits", teacher.logits, group, -1))), {}
    check_plain(_named(teacher))
    dtype = result_dtype(student.dtype)
    known = {"label_log_probs": teacher.label_log_probs.reshape(-1).to(dtype)}
    if isinstance(teacher, TopKTeacher):
        known["ids"] = _rows(teacher.ids).long()
        known["topk_log_probs"] = _rows(teacher.log_probs).to(dtype)
        if teacher.entropy is not None:
            known["teacher_entropy"] = teacher.entropy.reshape(-1).to(dtype)
    return None, known


def _named(teacher: Teacher, name: str = "teacher") -> dict[str, Any]:
    """Its fields, by the names that errors give them. (torch 2.10 cannot compile vars().)"""
    return {f"{name} {field}": getattr(teacher, field) for field in teacher.__match_args__}


# --- normalisation -------------------------------------------------------------------------------


def _loss_scale(
    rule: TokenRule,
    labels: Tensor,
    token_weight: Tensor | None,
    ignore_index: int | None,
    normalizer: float | Tensor | None,
    reduction: str,
    student: Tensor,
) -> tuple[Tensor, Stat | None]:
    """The factor on the sum of the tokens' losses, and the statistic whose sum divides the loss if
    that is known only after the gate has run."""
    dtype, device = result_dtype(student.dtype), student.device
    if reduction != "mean":
        if normalizer is not None:
            raise ValueError(
                f"normalizer divides the sum in reduction='mean', and reduction={reduction!r} "
                "divides by nothing: use 'mean', or divide the loss yourself"
            )
        return torch.ones((), dtype=dtype, device=device), None
    if normalizer is not None:
        # Where no token counts, a caller's own count may be 0.
        some = _counts(labels, ignore_index, token_weight).any()
        return torch.where(some, 1 / _normalizer(normalizer, device, dtype), 0.0), None
    if rule.normalize == "kept":
        return torch.ones((), dtype=dtype, device=device), Stat.KEPT
    # `ignore_index=None` says that tokens of weight 0 count, too.
    counts = _counts(labels, ignore_index, None if ignore_index is None else token_weight)
    return 1 / counts.sum().clamp_min(1).to(dtype), None


def _counts(labels: Tensor, ignore_index: int | None, weight: Tensor | None) -> Tensor:
    """Which tokens count (N,), bool."""
    counts = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        counts = labels != ignore_index
    return counts if weight is None else counts & (weight != 0)


def _normalizer(value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"normalizer must be one number, got shape {tuple(value.shape)}")
        return value.detach().reshape(()).to(device=device, dtype=dtype)
    # Written with a number, since a compiler takes a symbol to be below infinity.
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"normalizer must be a positive number, got {shown(value)}")
    return as_tensor(float(value), dtype, device)


# --- inference tensors ---------------------------------------------------------------------------


def _saveable(problem: Problem) -> Problem:
    """The problem as autograd can save it. Autograd refuses tensors from torch.inference_mode().
    Copies them, except hidden states, logits and heads: those raise RuntimeError if the backward
    reads them. (A traced call is left to torch.)"""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return problem
    student, teacher, beside = problem.sides
    eager = not has_row_engine(problem.options.backend)
    if problem.backward_grads.any or (eager and problem.forward_grads.any):
        _check_saveable("student", student)
        for name, side in (("teacher", teacher), ("reference_teacher", beside)):
            if side is not None and not eager:  # which saves the teacher's log-probs
                _check_saveable(name, side)
    return replace(
        problem,
        student=_with_saved_bias(student),
        teacher=None if teacher is None else _with_saved_bias(teacher),
        reference=None if beside is None else _with_saved_bias(beside),
        labels=_saved(problem.labels),
        inputs=problem.inputs.map(_saved),
    )


def _with_saved_bias(side: Side) -> Side:
    return side if side.bias is None else replace(side, bias=_saved(side.bias))


def _saved(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor


def _check_saveable(name: str, side: Side) -> None:
    source = "logits" if side.weight is None else "hidden"
    for what, tensor in ((source, side.source), ("weight", side.weight)):
        if tensor is not None and tensor.is_inference():
            raise RuntimeError(
                f"{name} {what} was made under torch.inference_mode(), and autograd cannot keep it "
                "for a backward that reads it again (reduction='none', distillation_loss, "
                "linear_log_probs, backend='reference'): make it under torch.no_grad(), or pass a "
                "clone()"
            )
