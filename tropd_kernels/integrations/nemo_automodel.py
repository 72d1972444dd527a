"""The objectives in NeMo AutoModel's distillation recipes, in the place of its `KDLoss`.

    kd_loss_fn:
      _target_: tropd_kernels.integrations.nemo_automodel.KDLoss
      objective: jsd        # and its knobs: beta: 0.3
      temperature: 1.0

Its recipes hand both models' logits to the loss, split over the vocabulary under tensor
parallelism; they are read as they are, and no softmax of them is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import distillation_loss
from ..teachers import LogitsTeacher
from .frameworks import check_parameters, check_version
from .log_probs import named_rule

try:
    from nemo_automodel.components.loss import kd_loss
except ImportError:
    kd_loss = None

_OF_A_LOSS = ("self", "student_logits", "teacher_logits", "labels", "num_batch_labels")


class KDLoss(torch.nn.Module):
    """NeMo AutoModel's KDLoss with an objective of ours, "forward_kl" being its own.

    ignore_index, temperature, tp_group, num_batch_labels: as there; the loss is multiplied by
    temperature^2. fp32_upcast, chunk_size: what is summed is in float32, and no chunk is kept, in
    any case; a value that asks for something else is refused. knobs: of the objective.
    """

    def __init__(
        self,
        objective: str = "forward_kl",
        ignore_index: int = -100,
        temperature: float = 1.0,
        fp32_upcast: bool = True,
        tp_group: Any = None,
        chunk_size: int = 0,
        **knobs: Any,
    ):
        super().__init__()
        check_version("nemo-automodel")
        if kd_loss is not None:
            check_parameters("nemo-automodel", kd_loss.KDLoss, "forward", _OF_A_LOSS)
        if not fp32_upcast or chunk_size:
            raise ValueError(
                "kd_loss_fn: fp32_upcast=False and chunk_size have no effect here: rows are summed "
                "in float32, and no softmax is kept. Leave them out"
            )
        self.rule = named_rule("kd_loss_fn", objective, knobs)
        self.ignore_index, self.temperature, self.tp_group = ignore_index, temperature, tp_group

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        num_batch_labels: int | None = None,
    ) -> Tensor:
        """The mean over the tokens that count, or their sum over num_batch_labels."""
        group = self.tp_group
        if group is None:
            group = vocabulary_group(student_logits)
        whole = group is None
        student, teacher, labels = (
            local(tensor, whole or tensor is labels)
            for tensor in (student_logits, teacher_logits, labels)
        )
        out = distillation_loss(
            student, labels, LogitsTeacher(teacher.detach()), self.rule,
            temperature=self.temperature, ignore_index=self.ignore_index, process_group=group,
            normalizer=num_batch_labels,
        )  # fmt: skip
        return out.loss * self.temperature**2


def vocabulary_group(logits: Tensor) -> Any:
    """The ranks over which a DTensor's last dimension is split; None for any other tensor."""
    for dim, placement in enumerate(getattr(logits, "placements", ())):
        if placement.is_shard(logits.dim() - 1) or placement.is_shard(-1):
            return logits.device_mesh.get_group(dim)  # type: ignore[attr-defined]
    return None


def local(tensor: Any, whole: bool) -> Tensor:
    """A DTensor's whole or this rank's part; any other tensor as it is."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return tensor.full_tensor() if whole else tensor.to_local()
