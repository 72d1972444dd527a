"""The chunk loop's own `Problem`, for tests that call it without the public functions."""

import torch
from torch import Tensor

from tropd_kernels.loss.problem import NO_GRADIENTS, GradNeeds, LossOptions, Problem, Side
from tropd_kernels.loss.sampling import NO_SAMPLING
from tropd_kernels.objectives import TokenRule
from tropd_kernels.rows.layout import TokenInputs

BOTH = GradNeeds(hidden=True, weight=True)
OPTIONS = {
    "temperature": 1.0, "ignore_index": -100, "max_workspace_bytes": None, "sampling": NO_SAMPLING
}  # fmt: skip


def flat_problem(
    student: Side,
    teacher: Side | None,
    labels: Tensor,
    rule: TokenRule,
    backend: str,
    inputs: dict[str, Tensor] | None = None,
    needs: GradNeeds = BOTH,
    reference: Side | None = None,
    **options,
) -> Problem:
    """Of flat tensors, with a loss scale of 1. options: other fields of `LossOptions`."""
    return Problem(
        student=student,
        teacher=teacher,
        reference=reference,
        labels=labels,
        inputs=TokenInputs(**(inputs or {})),
        options=LossOptions(rule=rule, backend=backend, **(OPTIONS | options)),
        loss_scale=torch.ones((), device=labels.device),
        forward_grads=needs,
        backward_grads=NO_GRADIENTS,
    )
