"""What a training step of verl asks of its model's head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from verl.utils import tensordict_utils

from ..functional import linear_log_probs
from ..objectives import TokenRule
from .verl_batch import RULES, k_of
from .verl_rows import Rows, head_losses


@dataclass
class Request:
    """What is asked of the head: log-probs, with the loss of a rule where there is one.

    labels: (n), of each row. differentiable: whether verl has a loss of log-probs or entropy, too.
    sums_d_hidden: whether the ranks of a split vocabulary add up their gradients of hidden states.
    """

    labels: Tensor
    rule: TokenRule | None = None
    rows: Rows | None = None
    k: int | None = None
    differentiable: bool = True
    entropy: bool = True
    sums_d_hidden: bool = False
    found: dict[str, Tensor] = field(default_factory=dict)

    def of_head(self, hidden: Tensor, weight: Tensor, **head: Any) -> dict[str, Tensor]:
        """Per-token losses, log-probs and entropy, each (n), of hidden states (n, H). What verl
        does not carry to the loss stays in `found`."""
        found = {}
        if self.rule is not None:
            found = head_losses(hidden, weight, self.rows, self.rule, self.k, **head)
        if self.differentiable or self.entropy:
            log_probs, entropy = linear_log_probs(
                hidden, weight, self.labels, return_entropy=True, **head
            )
            found |= {"log_probs": log_probs, "entropy": entropy}
        self.found = {n: found.pop(n).detach() for n in list(found) if n.startswith("tropd_")}
        # Copies: FSDP 2 hooks onto what leaves a unit, and warns of views.
        return {name: value.clone() for name, value in found.items()}


def configs_of(loss_function: Any, sampled: bool = True) -> tuple[Any, Any] | None:
    """The actor's and the distillation's configuration of verl's loss function, where its loss is
    one of ours, and not of a sampled teacher unless `sampled`; else None."""
    named = getattr(loss_function, "keywords", {})
    distillation = named.get("distillation_config")
    settings = getattr(distillation, "distillation_loss", None)
    if getattr(settings, "loss_mode", None) not in RULES:
        return None
    return (named["config"], distillation) if sampled or k_of(distillation) else None


def request_of(distillation: Any, micro_batch: Any, rule: TokenRule, rows: Rows) -> Request:
    """What verl asks of the head for a loss of ours."""
    return Request(
        rows.labels,
        rule,
        rows,
        k_of(distillation),
        differentiable=distillation.distillation_loss.use_task_rewards,
        entropy=asks(micro_batch, "calculate_entropy"),
    )


def asks(micro_batch: Any, key: str, default: bool = False) -> bool:
    """A flag that verl gives with a batch."""
    return bool(tensordict_utils.get_non_tensor_data(micro_batch, key=key, default=default))
