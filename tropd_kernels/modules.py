"""`nn.Module` twins of the functions in `functional.py`, with the same argument names.

What is fixed for a run (objective, temperature, reduction, ...) goes to the constructor; what
changes from batch to batch goes to the call, exactly as the function takes it. The head is not a
parameter of the module: it belongs to the model and is passed in, so that it is never registered,
saved or sharded twice.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor, nn

from .arguments import check_rule
from .functional import (
    DistillationOutput,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)
from .objectives import TokenRule, TrOPD
from .objectives.registry import nearest
from .teachers import Teacher

#: Keywords of a run. All others are a batch's, above all the seed: a module that held one would
#: draw alike at every step.
_OF_A_RUN = {
    "objective", "temperature", "normalizer", "reduction", "ignore_index", "backend", "bias",
    "logit_scale", "softcap", "gradient_tolerance", "gradient_sampling", "max_workspace_bytes",
    "process_group", "return_entropy",
}  # fmt: skip


class _Fixed(nn.Module):
    """Holds the options of a run, which are keywords of the function."""

    def __init__(self, function, **options):
        super().__init__()
        parameters = signature(function).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.name == "objective"]
        of_a_batch = [name for name in known if name not in _OF_A_RUN]
        known = [name for name in known if name in _OF_A_RUN]
        for name in options:
            if name in of_a_batch:
                raise TypeError(
                    f"{type(self).__name__} takes no {name}, which changes from batch to batch: "
                    "give it to the call"
                )
            if name not in known:
                raise TypeError(
                    f"{type(self).__name__} takes no option {name!r}{nearest(name, known)}. It "
                    f"takes {', '.join(known)}"
                )
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class LinearDistillationLoss(_Fixed):
    """`linear_distillation_loss` with its options fixed.

    Args:
        objective: A `TokenRule`; default `TrOPD()`.
        **options: Any keyword of the function that does not change between batches (`temperature`,
            `logit_scale`, `softcap`, `reduction`, `backend`, ...).

    Raises:
        TypeError: For an objective that is none, and for an option that the function does not take
            or that belongs to a batch (`seed`, `token_weight`, ...).

    Examples:
        >>> from tropd_kernels import GKD, LinearDistillationLoss
        >>> LinearDistillationLoss(GKD(), temperature=2.0)
        LinearDistillationLoss(objective=TokenRule(policy_gradient=0.0, divergence='jsd'),
        temperature=2.0)
    """

    def __init__(self, objective: TokenRule | None = None, **options: Any):
        objective = TrOPD() if objective is None else objective
        check_rule(objective)
        super().__init__(linear_distillation_loss, objective=objective, **options)

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher | None, **batch
    ) -> DistillationOutput:
        """hidden (*, H), weight (V, H), labels (*); batch: `bias`, `seed`, `old_log_probs`, ..."""
        return linear_distillation_loss(hidden, weight, labels, teacher, **self.options, **batch)


class DistillationLoss(_Fixed):
    """`distillation_loss`, on logits that already exist, with its options fixed.

    Examples:
        >>> from tropd_kernels import DistillationLoss, OPD
        >>> DistillationLoss(OPD(), reduction='sum')
        DistillationLoss(objective=TokenRule(prefix_weight=0.001), reduction='sum')
    """

    def __init__(self, objective: TokenRule | None = None, **options: Any):
        objective = TrOPD() if objective is None else objective
        check_rule(objective)
        super().__init__(distillation_loss, objective=objective, **options)

    def forward(
        self, logits: Tensor, labels: Tensor, teacher: Teacher | None, **batch
    ) -> DistillationOutput:
        """logits (*, V), labels (*); batch: `seed`, `old_log_probs`, `token_weight`, ..."""
        return distillation_loss(logits, labels, teacher, **self.options, **batch)


class LinearLogProbs(_Fixed):
    """`linear_log_probs` with its options fixed.

    Examples:
        >>> from tropd_kernels import LinearLogProbs
        >>> LinearLogProbs(return_entropy=True)
        LinearLogProbs(return_entropy=True)
    """

    def __init__(self, **options):
        super().__init__(linear_log_probs, **options)

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **batch):
        """hidden (*, H), weight (V, H), labels (*): log-probs (*), and entropies where asked."""
        return linear_log_probs(hidden, weight, labels, **self.options, **batch)
