"""Per-token statistics to the means that are logged.

Each metric is a sum and a count over the tokens that it is about. Sums and counts travel, means are
taken last, so that processes with few tokens weigh little. What an objective does not compute (NaN)
or a batch does not hold is left out rather than logged as 0.

| metric              | over              | what                                                   |
|---------------------|-------------------|--------------------------------------------------------|
| trust_ratio         | student's tokens  | mean of the gate M                                     |
| outlier_ratio       | student's tokens  | mean of 1 - M                                          |
| reward_mean, _min   | student's tokens  | K1's lq - lo, nats; minus its mean is the reverse KL   |
| reverse_kl          | student's tokens  | exact, nats                                            |
| forward_kl          | student's tokens  | exact, nats                                            |
| teacher_topk_mass   | student's tokens  | q's mass on its top-k, where the objective looks at it |
| student_topk_mass   | student's tokens  | p's mass there                                         |
| teacher_entropy     | all tokens        | nats                                                   |
| prefix_nll          | teacher's tokens  | -log p of the prefix, nats                             |
| prefix_length       | completions       | tokens                                                 |
| gradient_error      | micro-batches     | of a sampled gradient, relative to its norm            |
| gradient_share      | micro-batches     | of the vocabulary's columns that made it               |

TRL takes the mean of micro-batches' means over an accumulation window and the steps between logs.
The student's entropy and the lengths of completions are TRL's own metrics.
"""

import resource
import sys
from typing import Any

import torch
from torch import Tensor

from ..functional import TokenStats

PREFIX = "tropd/"

_STUDENT = {
    "trust_ratio": "trust",
    "outlier_ratio": "outlier",
    "reward_mean": None,  # the loss's own is the return where the config discounts
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "teacher_topk_mass": "teacher_topk_mass",
    "student_topk_mass": "student_topk_mass",
}
#: Metrics that are no means, and what makes one of several micro-batches'.
EXTREMES = {PREFIX + "reward_min": min, PREFIX + "peak_memory_gib": max}
NAMES = (*_STUDENT, "teacher_entropy", "prefix_nll", "prefix_length")


def token_sums(
    stats: TokenStats,  # (B, T) each
    counted: Tensor,  # (B, T) bool
    teacher_prefix: Tensor,  # (B, T) bool
    old_log_probs: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor]:
    """Sums and counts (2, len(NAMES)) of this process, and its smallest reward (1,)."""
    student, teacher = counted & ~teacher_prefix, counted & teacher_prefix
    reward = stats.teacher_log_probs
    if reward is not None:
        reward = reward - (stats.log_probs if old_log_probs is None else old_log_probs)
    columns = [
        _sum(reward if field is None else getattr(stats, field), student)
        for field in _STUDENT.values()
    ]
    columns.append(_sum(stats.teacher_entropy, counted))
    columns.append(_sum(-stats.log_probs, teacher))
    completions = counted.new_tensor(counted.shape[0], dtype=torch.float32)
    columns.append(torch.stack([teacher_prefix.sum().float(), completions]))
    lowest = torch.full((1,), float("inf"), device=counted.device)
    if reward is not None and student.any():
        lowest = reward[student].min().float().reshape(1)
    return torch.stack(columns, dim=1), lowest


def means(accelerator: Any, sums: Tensor, lowest: Tensor) -> dict[str, float]:
    """Metrics of all processes' tokens. A collective: every process has to come here."""
    totals, counts = accelerator.reduce(sums, reduction="sum").tolist()
    lowest = accelerator.gather(lowest).min().item()
    result = {
        PREFIX + name: total / count for name, total, count in zip(NAMES, totals, counts) if count
    }
    if lowest != float("inf"):
        result[PREFIX + "reward_min"] = lowest
    return result


def sample_means(accelerator: Any, sampled: Tensor) -> dict[str, float]:
    """Of all processes' micro-batches: error and share (2,). A collective."""
    error, share = accelerator.reduce(sampled.detach(), reduction="mean").tolist()
    return {PREFIX + "gradient_error": error, PREFIX + "gradient_share": share}


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held so far: on its GPU, or in all on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _sum(value: Tensor | None, where: Tensor) -> Tensor:
    """Sum and count (2,) of the known values there."""
    if value is None:
        return torch.zeros(2, device=where.device)
    known = where & ~value.isnan()
    return torch.stack([value.where(known, 0.0).sum().float(), known.sum().float()])
