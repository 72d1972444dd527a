"""What is read off one run, and the claims that are tested on it.

A claim is a difference that should be positive, taken seed by seed: both arms of a pair start from
the same student and see the same problems. It is confirmed where the whole 95 % interval of the
difference is positive, contradicted where it is negative, and undecided otherwise.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .intervals import Interval, interval

#: Steps whose mean is "at the end".
LAST = 10
#: Share of training that is "the start" in the claim about the prefix.
START = 0.3

CONFIRMED, REVERSE, OPEN = "**yes**", "**the reverse**", "open"

Result = dict[str, Any]
Measure = Callable[[Result], float]


def final_accuracy(run: Result) -> float:
    return run["accuracy"][-1]


def mean_accuracy(run: Result) -> float:
    """Over the measurements after the first, that is over training."""
    return statistics.fmean(run["accuracy"][1:])


def early_accuracy(run: Result) -> float:
    return _early(run["accuracy"])


def early_notation(run: Result) -> float:
    """Share of held-out problems that are answered in the teacher's notation, early on."""
    return _early(run["notation"])


def gained(run: Result) -> float:
    return run["accuracy"][-1] - run["accuracy"][0]


def largest_norm(run: Result) -> float:
    return max(run["grad_norm"])


def median_norm(run: Result) -> float:
    return statistics.median(run["grad_norm"])


def spike(run: Result) -> float:
    """Largest gradient norm over the run's own median."""
    return largest_norm(run) / median_norm(run)


def final_entropy(run: Result) -> float:
    return statistics.fmean(run["entropy"][-LAST:])


def mean_entropy(run: Result) -> float:
    return statistics.fmean(run["entropy"])


def first_trust(run: Result) -> float:
    """Share of tokens that the gate lets through, before any update."""
    return run["trust_ratio"][0]


def final_trust(run: Result) -> float:
    return run["trust_ratio"][-1]


def final_kl(run: Result) -> float:
    """Exact reverse KL on the student's tokens at the last step, nats."""
    return run["reverse_kl"][-1]


def _early(values: list[float]) -> float:
    after = values[1:]
    return statistics.fmean(after[: max(1, round(START * len(after)))])


@dataclass(frozen=True)
class Claim:
    """`text` says that `measure` is larger for arm `more` than for arm `less` (None: than 0)."""

    text: str
    more: str
    less: str | None
    measure: Measure
    sign: int = 1

    def differences(self, runs: list[Result]) -> list[float]:
        """The claimed difference, a value for each seed that has both arms."""
        ours = by_seed(runs, self.more)
        theirs = by_seed(runs, self.less) if self.less else {}
        return [
            self.sign * (self.measure(run) - (self.measure(theirs[seed]) if self.less else 0.0))
            for seed, run in ours.items()
            if not self.less or seed in theirs
        ]


CLAIMS = (
    Claim("OPD's largest gradient norm exceeds TrOPD's", "opd", "tropd", largest_norm),
    Claim("OPD's norm spikes more (largest over its median)", "opd", "tropd", spike),
    Claim("forward KL on the top k everywhere ends below its start", "forward_kl_topk", None,
          gained, sign=-1),
    Claim("forward KL on the top k everywhere ends below TrOPD", "tropd", "forward_kl_topk",
          final_accuracy),
    Claim("masking keeps more entropy than clipping, static gate", "mask_outlier",
          "clip_outlier", mean_entropy),
    Claim("masking keeps more entropy than clipping, TrOPD's gate", "tropd_mask", "tropd_clip",
          mean_entropy),
    Claim("the prefix speeds up the start (accuracy over the first 30 % of steps)",
          "tropd_prefix", "tropd", early_accuracy),
    Claim("the prefix brings the teacher's notation sooner (share over the same steps)",
          "tropd_prefix", "tropd", early_notation),
    Claim("the prefix is better over all of training (mean accuracy)", "tropd_prefix", "tropd",
          mean_accuracy),
    Claim("TrOPD ends above OPD", "tropd", "opd", final_accuracy),
    Claim("TrOPD with the prefix ends above OPD", "tropd_prefix", "opd", final_accuracy),
)  # fmt: skip


def by_seed(runs: list[Result], arm: str) -> dict[int, Result]:
    return {run["seed"]: run for run in runs if run["arm"] == arm}


def verdict(difference: Interval) -> str:
    if math.isnan(difference.half):
        return OPEN
    if difference.low > 0:
        return CONFIRMED
    return REVERSE if difference.high < 0 else OPEN


def over_seeds(runs: list[Result], arm: str, measure: Measure) -> Interval:
    return interval([measure(run) for run in by_seed(runs, arm).values()])
