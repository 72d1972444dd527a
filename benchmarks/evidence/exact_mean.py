"""Sampled gradients without the noise along the mean of the hidden states: an arm of `cost`.

Row v of the head's gradient is d_v = sum_i g_iv h_i. With m the unit vector along the mean of the
hidden states and k_v / pi_v the weight that the sample gives id v (0 where it is not kept),

    plain    (k_v / pi_v) d_v
    here     (k_v / pi_v) (d_v - (d_v . m) m) + (d_v . m) m

Both are unbiased. The second has no noise along m, and across it that of the first: the sampled
call is the same one, of the same hidden states, head and seed, so it keeps the same ids with the
same probabilities, and the gradient of the hidden states is the same too. Of
d_v = (sum_i g_iv) mean + sum_i g_iv (h_i - mean) this makes the first term exact, and of the second
what lies along m.

d_v . m comes from a second call without a sample. Within the loss that would not be needed:
sum_i g_iv (h_i . m) is the product of a vector and d_logits, and the sampler forms it already, with
each super-chunk's own m.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.learning.measures import Result
from benchmarks.learning.run import Run
from tropd_kernels.functional import DistillationOutput
from tropd_kernels.trainer import TrOPDTrainer

from . import records

#: Ends the names of the arms that are trained so.
SUFFIX = "_exact_mean"


def exact_along_mean(
    loss: Callable[[Tensor, Tensor, float], DistillationOutput],
    hidden: Tensor,  # (*, H)
    weight: Tensor,  # (V, H)
    counts: Tensor,  # (*) bool
    tolerance: float,
) -> DistillationOutput:
    """`loss(hidden, weight, tolerance)` with a head's gradient that is exact along the mean of the
    hidden states that count. The head's only: a bias would get its gradient twice."""
    mean = normalize(hidden.detach()[counts].mean(0), dim=0)
    along = torch.outer(weight @ mean, mean)
    along = along - along.detach()  # 0, and its gradient is d_weight's part along the mean
    sampled = loss(hidden, weight - along, tolerance)
    exact = loss(hidden.detach(), weight.detach() + along, 0.0).loss
    return replace(sampled, loss=sampled.loss + (exact - exact.detach()))


class Trainer(TrOPDTrainer):
    """For one teacher: several are compared part by part, each of which would add the exact one."""

    def _compare(self, student, teacher, labels, rule, **options):
        compare, tolerance = super()._compare, options.pop("gradient_tolerance", 0.0)

        def loss(hidden: Tensor, weight: Tensor, tolerance: float) -> DistillationOutput:
            side = replace(student, hidden=hidden, weight=weight)
            return compare(side, teacher, labels, rule, gradient_tolerance=tolerance, **options)

        if not tolerance:
            return loss(student.hidden, student.weight, tolerance)
        return exact_along_mean(loss, student.hidden, student.weight, labels >= 0, tolerance)


def record_of(run: Run, arm: Mapping[str, Any], cache: Path) -> Result:
    trainer = Trainer if run.arm.endswith(SUFFIX) else TrOPDTrainer
    return records.record_of(run, arm, cache, trainer)
