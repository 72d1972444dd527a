"""`nn.Module` twins of the functions in `functional.py`, with the same argument names.

What is fixed for a run (objective, temperature, reduction, ...) goes to the constructor; what
changes from batch to batch goes to the call, exactly as the function takes it. The head is not a
parameter of the
module: it belongs to the model and is passed in, so that it is never registered, saved or sharded
twice.
"""

from __future__ import annotations

from torch import Tensor, nn

from .functional import (
    DistillationOutput,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)
from .objectives import TokenRule, TrOPD
from .teachers import Teacher


class _Fixed(nn.Module):
    """Holds the options of a run."""

    def __init__(self, **options):
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class LinearDistillationLoss(_Fixed):
    """`linear_distillation_loss` with its options fixed.

    objective: a `TokenRule`; default `TrOPD()`. options: any keyword of the function that does not
    change between batches (`temperature`, `logit_scale`, `softcap`, `reduction`, `backend`, ...).
    """

    def __init__(self, objective: TokenRule | None = None, **options):
        super().__init__(objective=objective or TrOPD(), **options)

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, teacher: Teacher | None, **batch
    ) -> DistillationOutput:
        """hidden (*, H), weight (V, H), labels (*); batch: `bias`, `seed`, `old_log_probs`, ..."""
        return linear_distillation_loss(hidden, weight, labels, teacher, **self.options, **batch)


class DistillationLoss(_Fixed):
    """`distillation_loss`, on logits that already exist, with its options fixed."""

    def __init__(self, objective: TokenRule | None = None, **options):
        super().__init__(objective=objective or TrOPD(), **options)

    def forward(
        self, logits: Tensor, labels: Tensor, teacher: Teacher | None, **batch
    ) -> DistillationOutput:
        """logits (*, V), labels (*); batch: `seed`, `old_log_probs`, `token_weight`, ..."""
        return distillation_loss(logits, labels, teacher, **self.options, **batch)


class LinearLogProbs(_Fixed):
    """`linear_log_probs` with its options fixed."""

    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor, **batch):
        """hidden (*, H), weight (V, H), labels (*): log-probs (*), and entropies where asked."""
        return linear_log_probs(hidden, weight, labels, **self.options, **batch)
