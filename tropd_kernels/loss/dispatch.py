"""Sends a problem to the reference, to the custom op, or to the loss sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..backends import has_row_engine
from ..transforms import check_none, check_tangents
from .agreement import check_agreement
from .eager import reference_loss
from .ops import differentiable_distill
from .problem import Problem
from .sharded import sharded_loss

if TYPE_CHECKING:  # a torch without distributed has no such name
    from torch.distributed import ProcessGroup


class LossResult(NamedTuple):
    """loss: scalar. token_loss (N,), times the tokens' weights. stats (Stat, N): log-probs and
    entropies are differentiable if the forward formed no gradient. sampling_report:
    (SamplingReport,), None or empty if no gradient was sampled."""

    loss: Tensor
    token_loss: Tensor
    stats: Tensor
    sampling_report: Tensor | None


def compute(
    prepare: Callable[[], Problem], group: ProcessGroup | None, reduction: str
) -> LossResult:
    """The loss of the problem that `prepare` returns. With a group, an error of `prepare` on any
    rank is raised on every rank."""
    if group is None:
        problem = prepare()
        return _divided(problem, _on_one_device(problem))
    check_none("process_group")
    sharded = _sharded
    if torch.compiler.is_compiling():  # as a decorator it would import the compiler with us
        sharded = torch.compiler.disable(_sharded)
    return sharded(prepare, group, reduction)


def _on_one_device(problem: Problem) -> LossResult:
    if not has_row_engine(problem.options.backend):
        return LossResult(*reference_loss(problem), None)
    student = problem.student
    check_tangents(student.source, student.weight, student.bias)
    loss, token_loss, stats, *_, report = differentiable_distill(problem)
    return LossResult(loss, token_loss, stats, report)


def _sharded(prepare: Callable[[], Problem], group: ProcessGroup, reduction: str) -> LossResult:
    problem, shard = check_agreement(group, prepare, reduction)
    return _divided(problem, LossResult(*sharded_loss(problem, shard)))


def _divided(problem: Problem, result: LossResult) -> LossResult:
    if problem.divide_by is None:
        return result
    count = result.stats[problem.divide_by].detach().sum().clamp_min(1)
    return result._replace(loss=result.loss / count)
