"""The objectives in NeMo AutoModel's distillation recipes, in the place of its `KDLoss`.

    kd_loss_fn:
      _target_: tropd_kernels.integrations.nemo_automodel.KDLoss
      objective: jsd        # and its knobs: beta: 0.3
      temperature: 1.0

Its recipes give the loss both models' logits, split over the vocabulary under tensor parallelism;
they are read as they are, and no softmax of them is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..functional import distillation_loss
from ..objectives import TokenRule
from ..teachers import LogitsTeacher
from .frameworks import check_parameters, check_version
from .log_probs import named_rule, row_uniforms

_OF_A_LOSS = ("self", "student_logits", "teacher_logits", "labels", "num_batch_labels")


def kd_loss(
    rule: TokenRule, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor,
    num_batch_labels: int | None = None, *, ignore_index: int = -100, temperature: float = 1.0,
    tp_group: Any = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """The mean over the tokens that count, or their sum over num_batch_labels, times temperature^2,
    of logits (*, V / ranks) and labels (*). tp_group None: the ranks of the student's DTensor."""
    group = vocabulary_group(student_logits) if tp_group is None else tp_group
    teacher = LogitsTeacher(local(teacher_logits, group).detach())
    labels = local(labels, None)
    out = distillation_loss(
        local(student_logits, group), labels, teacher, rule, temperature=temperature,
        uniforms=row_uniforms(seed, labels), ignore_index=ignore_index, process_group=group,
        normalizer=num_batch_labels,
    )  # fmt: skip
    return out.loss * temperature**2


class KDLoss(torch.nn.Module):
    """In the place of NeMo AutoModel's class: `kd_loss` with its options.

    ignore_index, temperature, tp_group: as there. fp32_upcast, chunk_size: sums are in float32, and
    no chunk is kept, in any case; ValueError for a value that asks for something else. objective,
    knobs: "forward_kl" is its own. seed: of the draws of a Bernoulli gate, which go with a
    sequence's labels, too.
    """

    def __init__(
        self, objective: str = "forward_kl", ignore_index: int = -100, temperature: float = 1.0,
        fp32_upcast: bool = True, tp_group: Any = None, chunk_size: int = 0, seed: int = 0,
        **knobs: Any,
    ):  # fmt: skip
        from nemo_automodel.components.loss import kd_loss as theirs

        super().__init__()
        check_version("nemo-automodel")
        check_parameters("nemo-automodel", theirs.KDLoss, "forward", _OF_A_LOSS)
        if not fp32_upcast or chunk_size:
            raise ValueError(
                "kd_loss_fn: fp32_upcast=False and chunk_size have no effect here: rows are summed "
                "in float32, and no softmax is kept. Leave them out"
            )
        missing = "teacher_prefix", "old_log_probs"
        self.rule = named_rule("kd_loss_fn", objective, knobs, missing=missing)
        self.ignore_index, self.temperature = ignore_index, temperature  # which the recipes read
        self.options: dict[str, Any] = dict(tp_group=tp_group, seed=seed)

    def forward(self, student_logits, teacher_logits, labels, num_batch_labels=None) -> Tensor:
        return kd_loss(
            self.rule, student_logits, teacher_logits, labels, num_batch_labels,
            ignore_index=self.ignore_index, temperature=self.temperature, **self.options,
        )  # fmt: skip


def vocabulary_group(logits: Tensor) -> Any:
    """The ranks over which a DTensor's last dimension is split; None for any other tensor."""
    for dim, placement in enumerate(getattr(logits, "placements", ())):
        if placement.is_shard(logits.dim() - 1) or placement.is_shard(-1):
            return logits.device_mesh.get_group(dim)  # type: ignore[attr-defined]
    return None


def local(tensor: Tensor, group: Any) -> Tensor:
    """A DTensor's part of this rank where a group splits it, else its whole; others as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.full_tensor() if group is None else tensor.to_local()
