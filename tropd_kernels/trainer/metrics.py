"""From per-token statistics to the sums and counts of the logged means.

Each metric is a sum and a count over the tokens that it concerns. Both are added up over processes,
micro-batches, and the steps or batches until the next log; the division comes last, so that a batch
of few tokens has little weight. A value that an objective does not compute (NaN), or that no batch
has, is not logged. The loss of an evaluation is treated alike, and so are TRL's metrics that are
means over tokens (entropy), completions (their lengths) or calls of tools.

| metric               | over              | meaning                                               |
|----------------------|-------------------|-------------------------------------------------------|
| trust_ratio          | student's tokens  | mean of the gate M                                    |
| outlier_ratio        | student's tokens  | mean of 1 - M                                         |
| reward_mean, _min    | student's tokens  | K1's lq - lo, nats; minus its mean is the reverse KL  |
| reverse_kl           | student's tokens  | exact, nats                                           |
| forward_kl           | student's tokens  | exact, nats                                           |
| forward_kl_topk      | student's tokens  | the objective's KL_K(q || p), with its tail, nats     |
| teacher_topk_mass    | student's, chosen | q's mass on its top-k                                 |
| student_topk_mass    | student's, chosen | p's mass there                                        |
| teacher_entropy      | all tokens        | exact, nats                                           |
| teacher_entropy_topk | all tokens        | at least, nats: the mass off the top-k is one id's    |
| prefix_nll           | teacher's tokens  | -log p of the prefix, nats                            |
| sampling_mass        | student's tokens  | p's mass on the ids that top_k, top_p, min_p keep; of |
|                      |                   | 256 tokens a micro-batch, where K1 takes part, and no |
|                      |                   | other setting but the temperature changes the sampler |
| selected_share       | ranked tokens     | share that `select_by`, or the objective, selects     |
| selected_score_share | ranked tokens     | share of the sum of the finite scores that selected   |
|                      |                   | tokens hold; not of rewards, which may be negative    |
| select_threshold     | micro-batches     | the lowest score that was selected                    |
| prefix_length        | completions       | tokens                                                |
| gradient_error       | micro-batches     | of a sampled gradient, relative to its norm           |
| gradient_share       | micro-batches     | of the vocabulary's columns that made it              |

A teacher in this process has whole distributions: the exact quantities are logged. A served or
precomputed one has only the top-k: forward_kl_topk and teacher_entropy_topk are logged instead,
which are other quantities. Everything else is the same for both. "Chosen" are the tokens at which
the objective uses the top-k: TrOPD's outliers, EOPD's tokens of high entropy, all of a
divergence's. Of a token that is not selected only what its score is made of is known: means,
and reward_min, are over the tokens at which the value is known, in an evaluation as well. The loss
of left-out tokens is unknown, and so the share of it that selected tokens hold; that of the score
is logged instead, which for a reverse KL selected by "reverse_kl" is the same. A `select_threshold`
like the logged one selects about as many tokens as the fraction did, whatever the micro-batches.
"""

import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import TokenStats
from ..objectives import TokenRule

PREFIX = "tropd/"

#: TRL's, of completions.
_LENGTHS = "completions/"
#: TRL's, of calls.
_TOOLS = "tools/"
#: Where transformers, TRL or the trainer itself logs: the first parts of names, and whole names.
_OWN_PARTS = (PREFIX, _LENGTHS, _TOOLS)
_OWN_NAMES = {
    "loss", "grad_norm", "learning_rate", "epoch", "num_input_tokens_seen", "runtime",
    "samples_per_second", "steps_per_second", "train_loss", "train_runtime", "total_flos",
    "train_samples_per_second", "train_steps_per_second", "num_tokens", "step_time", "entropy",
    "aux_loss", "reward", "reward_std", "frac_reward_zero_std",
}  # fmt: skip
#: Sum and count of each metric.
Sums = Mapping[str, tuple[float, float]]


def is_own(name: str) -> bool:
    """Whether a user's metric of this name would overwrite one that is logged anyway."""
    return name in _OWN_NAMES or name.startswith(_OWN_PARTS)


def _least_of_any(values: Sequence[float]) -> float:
    """The least value; 0 means that no completion of a batch ended."""
    return min((value for value in values if value), default=0.0)


#: Metrics that are not means, and how several batches' values are combined.
EXTREMES: dict[str, Callable[[Sequence[float]], float]] = {
    PREFIX + "reward_min": min,
    PREFIX + "peak_memory_gib": max,
    _LENGTHS + "min_length": min,
    _LENGTHS + "max_length": max,
    _LENGTHS + "min_terminated_length": _least_of_any,
    _LENGTHS + "max_terminated_length": max,
}


def token_sums(
    stats: TokenStats,  # (B, T) each
    counted: Tensor,  # (B, T) bool
    teacher_prefix: Tensor,  # (B, T) bool
    rule: TokenRule,
    old_log_probs: Tensor | None = None,  # (B, T)
) -> tuple[dict[str, Tensor], Tensor]:
    """Sum and count (2,) of each metric on this process, and its smallest reward (1,)."""
    student, teacher = counted & ~teacher_prefix, counted & teacher_prefix
    # The loss's own reward would be the return where the config discounts.
    reward = stats.teacher_log_probs
    if reward is not None:
        reward = reward - (stats.log_probs if old_log_probs is None else old_log_probs)
    whole = stats.reverse_kl is not None  # a teacher with k ids does not have it
    chosen = student & _uses_top_k(stats, rule)
    ranked = counted if rule.prefix_weight is None else student
    # The gate is made for selected tokens alone.
    selected = None if rule.score is None else (~stats.trust.isnan()).to(stats.trust.dtype)
    sums = {
        "trust_ratio": _sum(stats.trust, student),
        "outlier_ratio": _sum(stats.outlier, student),
        "selected_share": _sum(selected, ranked),
        "selected_score_share": _score_share(stats, rule),
        "select_threshold": _finite(stats.threshold, counted.device),
        "reward_mean": _sum(reward, student),
        "reverse_kl": _sum(stats.reverse_kl, student),
        "forward_kl": _sum(stats.forward_kl if whole else None, student),
        "forward_kl_topk": _sum(None if whole else stats.forward_kl, student),
        "teacher_topk_mass": _sum(stats.teacher_topk_mass, chosen),
        "student_topk_mass": _sum(stats.student_topk_mass, chosen),
        "teacher_entropy": _sum(stats.teacher_entropy if whole else None, counted),
        "teacher_entropy_topk": _sum(None if whole else stats.teacher_entropy, counted),
        "prefix_nll": _sum(-stats.log_probs, teacher),
        "prefix_length": torch.stack([teacher.sum().float(), counted.any(1).sum().float()]),
    }
    sums = {PREFIX + name: pair for name, pair in sums.items()}
    sums["entropy"] = _sum(stats.entropy, counted)  # TRL's metric
    lowest = torch.full((1,), torch.inf, dtype=torch.float32, device=counted.device)
    if reward is not None and student.any():
        known = reward[student]
        lowest = known.masked_fill(known.isnan(), torch.inf).min().float().reshape(1)
    return sums, lowest


def totals(accelerator: Any, sums: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """`token_sums` of all processes, by name. A collective."""
    summed, counts = accelerator.reduce(torch.stack([*sums.values()], 1), reduction="sum").tolist()
    return dict(zip(sums, zip(summed, counts)))


def completion_totals(
    accelerator: Any,
    lengths: Tensor,  # (B,)
    ended: Tensor,  # (B,) bool
    counted: Tensor,  # (B,) bool
) -> dict[str, tuple[float, float]]:
    """Sums and counts of all processes' lengths, of which TRL logs means of means. A collective."""
    ended, lengths = ended & counted, lengths.float()
    rows, terminated = counted.sum().float(), ended.sum().float()
    sums = torch.stack(
        [lengths[counted].sum(), rows, rows - terminated, lengths[ended].sum(), terminated]
    )
    written, rows, clipped, whole, terminated = accelerator.reduce(sums, reduction="sum").tolist()
    return {
        _LENGTHS + "mean_length": (written, rows),
        _LENGTHS + "clipped_ratio": (clipped, rows),
        _LENGTHS + "mean_terminated_length": (whole, terminated),
    }


def tool_totals(
    accelerator: Any, calls: int, failures: int, rows: int
) -> dict[str, tuple[float, float]]:
    """Sums and counts of all processes' calls, of which TRL logs means of means. A collective."""
    sums = torch.tensor([calls, failures, rows], dtype=torch.float, device=accelerator.device)
    called, failed, rows = accelerator.reduce(sums, reduction="sum").tolist()
    return {
        _TOOLS + "call_frequency": (called, rows),
        _TOOLS + "failure_frequency": (failed, called),
    }


def first_occurrences(accelerator: Any, rows: int) -> Tensor:
    """Mask (rows,) of the rows of an evaluation's batch that are not repetitions.

    accelerate fills up the last batch of several processes with rows from the beginning.
    """
    real = torch.ones(rows, dtype=torch.bool, device=accelerator.device)
    state = accelerator.gradient_state
    if accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0:
        first = accelerator.process_index * rows
        real[max(state.remainder - first, 0) :] = False
    return real


def sample_means(accelerator: Any, sampled: Tensor) -> dict[str, float]:
    """Means of error and share (2,) over all processes' micro-batches. A collective."""
    error, share = accelerator.reduce(sampled.detach(), reduction="mean").tolist()
    return {PREFIX + "gradient_error": error, PREFIX + "gradient_share": share}


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: on its GPU, or its resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _uses_top_k(stats: TokenStats, rule: TokenRule) -> Tensor:
    """Mask (B, T) of the tokens at which the objective uses the top-k.

    A dense teacher's masses are known only there, those of a teacher with k ids everywhere.
    """
    if rule.sums_of_every_row:
        return torch.ones_like(stats.trust, dtype=torch.bool)
    looks = torch.zeros_like(stats.trust, dtype=torch.bool)
    if rule.outlier.startswith("forward_kl"):
        looks = stats.outlier > 0
    if rule.forward_kl_entropy is not None and stats.teacher_entropy is not None:
        looks = looks | (stats.teacher_entropy > rule.forward_kl_entropy)
    return looks


def _score_share(stats: TokenStats, rule: TokenRule) -> Tensor:
    """The selected tokens' finite scores, summed, and those of all ranked tokens (2,)."""
    if stats.score is None or rule.score == "reward":
        return torch.zeros(2, device=stats.kept.device)
    of_all = stats.score.where(stats.score.isfinite(), 0.0)
    return torch.stack([of_all.where(~stats.trust.isnan(), 0.0).sum(), of_all.sum()]).float()


def _finite(value: Tensor | None, device: torch.device) -> Tensor:
    """A scalar as sum and count (2,), nothing where it is not finite."""
    if value is None:
        return torch.zeros(2, device=device)
    known = value.isfinite()
    return torch.stack([value.where(known, 0.0), known]).float()


def _sum(value: Tensor | None, where: Tensor) -> Tensor:
    """Sum and count (2,) of the values in `where` that are not NaN."""
    if value is None:
        return torch.zeros(2, device=where.device)
    known = where & ~value.isnan()
    return torch.stack([value.where(known, 0.0).sum().float(), known.sum().float()])
