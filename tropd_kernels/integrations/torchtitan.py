"""The objectives as torchtitan's loss: hidden states and lm_head, without logits.

    from tropd_kernels.integrations.torchtitan import DistillationLoss
    loss = DistillationLoss.Config(objective="tropd", knobs={"top_k": 64})   # of Trainer.Config

torchtitan gives a ChunkedLossWrapper the head and makes the model stop before it; this is one whose
loss is ours, of all tokens in one call. The teacher of a batch comes as further arguments of the
call, as torchtitan's reinforcement learning passes its log-probs: a trainer's own step has to pass
them, since its stock one knows of no teacher. Each has the labels' shape (B, T) in front:

    teacher_log_probs, teacher_ids    (B, T, K), with label_log_probs (B, T): a top-k teacher
    label_log_probs                   alone: a sampled teacher
    teacher_hidden, with teacher_weight (V, G): a teacher's last hidden states and its head
    old_log_probs, uniforms, token_weight, ...   what `linear_distillation_loss` takes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper

from ..functional import linear_distillation_loss
from ..teachers import HiddenTeacher, SampledTeacher, Teacher, TopKTeacher
from .frameworks import check_parameters, check_version
from .heads import in_head
from .log_probs import named_rule

_OF_A_LOSS = ("self", "pred", "labels", "global_valid_tokens", "loss_inputs")


class DistillationLoss(ChunkedLossWrapper):
    """A torchtitan loss (hidden states, labels, global_valid_tokens) -> (loss, metrics)."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """objective and knobs as those of `tropd train`; temperature divides all logits."""

        objective: str = "tropd"
        knobs: dict[str, Any] = field(default_factory=dict)
        temperature: float = 1.0

    def __init__(self, config: Config, *, compile_config: Any = None):
        check_version("torchtitan")
        check_parameters("torchtitan", ChunkedLossWrapper, "__call__", _OF_A_LOSS)
        if compile_config is not None and "loss" in compile_config.components:
            if compile_config.enable:
                raise ValueError(
                    "compile.components: 'loss' would compile a loss that runs kernels of its own: "
                    "leave it out"
                )
        self.rule = named_rule("loss.knobs", config.objective, config.knobs)
        self.temperature = config.temperature
        self.lm_head = None

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | None = None,
        **loss_inputs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over the tokens, divided by global_valid_tokens, and metrics."""
        loss_inputs.pop("positions", None)
        if hasattr(pred, "full_tensor"):
            raise NotImplementedError(
                "loss: hidden states that are a DTensor (tensor parallelism) are not served: set "
                "tensor_parallel_degree=1"
            )
        teacher = teacher_of(loss_inputs)

        def call(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            out = linear_distillation_loss(
                hidden, weight, labels, teacher, self.rule, bias=bias, reduction="sum",
                temperature=self.temperature, **loss_inputs,
            )  # fmt: skip
            return out.loss, out.stats.trust

        loss, trust = in_head(self.lm_head, pred, call)
        divisor = 1 if global_valid_tokens is None else global_valid_tokens
        counted = trust[(labels != -100) & ~trust.isnan()]
        return loss / divisor, {"distillation/trust/mean": counted.sum() / divisor}


def teacher_of(inputs: dict[str, Any]) -> Teacher | None:
    """Takes the teacher out of a call's arguments; None without one."""
    hidden, weight = inputs.pop("teacher_hidden", None), inputs.pop("teacher_weight", None)
    ids, log_probs = inputs.pop("teacher_ids", None), inputs.pop("teacher_log_probs", None)
    label = inputs.pop("label_log_probs", None)
    if hidden is not None:
        return HiddenTeacher(hidden, weight)
    if ids is not None:
        return TopKTeacher(ids, log_probs, label)
    return None if label is None else SampledTeacher(label)
