"""The objectives as torchtitan's loss: hidden states and lm_head, without logits.

    from tropd_kernels.integrations.torchtitan import DistillationLoss
    loss = DistillationLoss.Config(objective="tropd", knobs={"top_k": 64})   # of Trainer.Config

torchtitan gives a ChunkedLossWrapper the head and makes the model stop before it; this is one whose
loss is ours, of all tokens in one call. The teacher comes as further arguments of the call, which a
step of your own has to pass, since the stock one knows of none. (B, T) are the labels':

    teacher_ids, teacher_log_probs    (B, T, K), with label_log_probs (B, T): a top-k teacher
    label_log_probs                   alone: a sampled teacher
    teacher_hidden, teacher_weight    (B, T, G) and (V, G): a teacher's hidden states and head
    seed, old_log_probs, ...          what else `linear_distillation_loss` takes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper

from ..functional import linear_distillation_loss
from ..objectives import TokenRule
from ..teachers import HiddenTeacher, SampledTeacher, Teacher, TopKTeacher
from .frameworks import check_parameters, check_version
from .heads import in_head
from .log_probs import named_rule

_OF_A_LOSS = ("self", "pred", "labels", "global_valid_tokens", "loss_inputs")


def lm_head_loss(
    rule: TokenRule, temperature: float, lm_head: Any, pred: Tensor, labels: Tensor,
    global_valid_tokens: Tensor | None = None, positions: Any = None, **loss_inputs: Any,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The sum over the tokens, divided by global_valid_tokens, and metrics, of hidden states
    (B, T, H) and labels (B, T). positions: of the model, not read."""
    if hasattr(pred, "full_tensor"):
        raise NotImplementedError(
            "loss: hidden states that are a DTensor (tensor parallelism) are not served: set "
            "tensor_parallel_degree=1"
        )
    teacher = teacher_of(loss_inputs)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        out = linear_distillation_loss(
            hidden, weight, labels, teacher, rule, bias=bias, reduction="sum",
            temperature=temperature, **loss_inputs,
        )  # fmt: skip
        return out.loss, out.stats.trust

    loss, trust = in_head(lm_head, pred, call)
    divisor = 1 if global_valid_tokens is None else global_valid_tokens
    # NaN where a token is not selected. The one objective that selects, entropy_opd, has no gate:
    # all the others are 1, and so is their mean.
    counted = trust[labels != -100].nan_to_num(1.0)
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


class DistillationLoss(ChunkedLossWrapper):
    """`lm_head_loss` with the options of its Config and the head that torchtitan sets."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """objective and knobs as those of `tropd train`; temperature divides all logits."""

        objective: str = "tropd"
        knobs: dict[str, Any] = field(default_factory=dict)
        temperature: float = 1.0

    def __init__(self, config: Config, *, compile_config: Any = None):
        check_version("torchtitan")
        check_parameters("torchtitan", ChunkedLossWrapper, "__call__", _OF_A_LOSS)
        if compile_config and compile_config.enable and "loss" in compile_config.components:
            raise ValueError(
                "compile.components: 'loss' would compile a loss that runs kernels of its own: "
                "leave it out"
            )
        self.rule = named_rule("loss.knobs", config.objective, config.knobs, missing=())
        self.temperature, self.lm_head = config.temperature, None

    def __call__(self, pred, labels, global_valid_tokens=None, **loss_inputs):
        own = (self.rule, self.temperature, self.lm_head)
        return lm_head_loss(*own, pred, labels, global_valid_tokens, **loss_inputs)
