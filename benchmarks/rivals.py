"""The field's fused losses of a dense teacher, as providers for `losses.provider`.

Optional: each is imported only when it is asked for, from the versions that the extra `bench` pins.
Both take one number, beta, with the same meaning as here (0 forward KL, 1 reverse KL, between them
the Jensen-Shannon divergence), so both serve the same objectives.

| rival | what it is                                         | GEMM work            | logits  |
|-------|----------------------------------------------------|----------------------|---------|
| liger | `liger_kernel.chunked_loss`, under `torch.compile` | 3S + T               | bf16    |
| trl   | `trl.kernels.chunked_divergence`; plain torch on a | 4S + 2T; 5S + 3T for | float32 |
|       | CPU, whose products are float32                    | Jensen-Shannon       |         |

`tests/test_agreement.py` shows that they agree with ours in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:  # losses.py imports this module
    from benchmarks.losses import Problem

Loss = Callable[["Problem"], Tensor]

#: The objectives that a rival computes, and its beta for each.
BETAS = {"gkd": 0.5, "reverse_kl": 1.0}


def liger(beta: float) -> Loss:
    """As its defaults have it: compiled, chunks of 1024 tokens."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)

    def loss(problem: Problem) -> Tensor:
        return module(
            problem.hidden, problem.weight, problem.teacher_hidden, problem.teacher_weight,
            problem.labels,
        )  # fmt: skip

    return loss


def trl(beta: float) -> Loss:
    """A loss per token there, hence the mean."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(problem: Problem) -> Tensor:
        divergence, _ = ChunkedDivergenceFunction.apply(
            problem.hidden, problem.weight, None,
            problem.teacher_hidden, problem.teacher_weight, None, beta,
        )  # fmt: skip
        return divergence.mean()

    return loss


RIVALS: dict[str, Callable[[float], Loss]] = {"liger": liger, "trl": trl}
