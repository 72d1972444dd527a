"""The experiments: arms, mismatches and claims, written down before their runs.

An arm is settings of `TrOPDConfig`, as in `benchmarks.learning.arms`; steps, batch, temperature and
optimizer are the same for all.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.learning.arms import ARMS, TOP_K

from .claims import Claim, Measure, Record

#: Learning rates that every arm tries, and the further one where the best is at an end.
RATES = (3e-4, 1e-3, 3e-3)
BEYOND = {3e-4: 1e-4, 3e-3: 1e-2}
#: Seeds on which an arm chooses its rate, none of the experiment's.
CHOOSING = (101, 102, 103)
SEEDS = 20


@dataclass(frozen=True)
class Experiment:
    """`claims` are corrected together, over all mismatches. `looks` are claims that were not stated
    as such: differences with an interval and without a verdict."""

    name: str
    arms: Mapping[str, Mapping[str, Any]]
    mismatches: tuple[str, ...]
    claims: tuple[Claim, ...]
    looks: tuple[Claim, ...] = field(default=())


def end(record: Record) -> float:
    """Accuracy at the end: the mean of the last three measurements, steps 80, 90 and 100."""
    return statistics.fmean(record["accuracy"][-3:])


def throughout(record: Record) -> float:
    """Mean accuracy over training."""
    return statistics.fmean(record["accuracy"][1:])


def early(record: Record) -> float:
    """Mean accuracy over the first 30 % of the steps."""
    return statistics.fmean(record["accuracy"][1:4])


def measured(key: str) -> Measure:
    return lambda record: record[key]


_TROPD = ARMS["tropd"]
_PREFIX = {"prefix_schedule": "cosine", "prefix_relative": True}  # the paper's

POWER = Experiment(
    "power",
    arms={
        **{arm: ARMS[arm] for arm in ("opd", "eopd", "reopold", "clip_outlier", "mask_outlier")},
        "tropd": _TROPD,
        "tropd_expected": {"objective": "tropd",
                           "objective_kwargs": {"top_k": TOP_K, "gate": "expected"}},
        "tropd_official_code": {"objective": "tropd",
                                "objective_kwargs": {"top_k": TOP_K,
                                                     "outlier": "forward_kl_reward",
                                                     "top_k_tail": "renormalize_teacher"}},
        "tropd_relative_prefix": _TROPD | _PREFIX,
    },
    mismatches=("near", "middle", "far"),
    claims=(
        Claim("TrOPD ends above OPD", "tropd", "opd", end),
        Claim("TrOPD ends above EOPD", "tropd", "eopd", end),
        Claim("TrOPD ends above REOPOLD", "tropd", "reopold", end),
        Claim("TrOPD ends above clipping", "tropd", "clip_outlier", end),
        Claim("TrOPD ends above masking", "tropd", "mask_outlier", end),
        Claim("the prefix ends above TrOPD without it", "tropd_relative_prefix", "tropd", end),
        Claim("OPD's largest gradient norm exceeds TrOPD's", "opd", "tropd",
              measured("largest_norm")),
        Claim("masking keeps more entropy than clipping", "mask_outlier", "clip_outlier",
              measured("entropy")),
    ),
    looks=(
        Claim("the expected gate ends above the sampled one", "tropd_expected", "tropd", end),
        Claim("the paper's outlier ends above the official code's", "tropd",
              "tropd_official_code", end),
        Claim("TrOPD is above OPD over all of training", "tropd", "opd", throughout),
        Claim("the prefix is above none early (30 % of the steps)", "tropd_relative_prefix",
              "tropd", early),
        Claim("OPD's norm spikes more (largest over its median)", "opd", "tropd",
              lambda record: record["largest_norm"] / record["median_norm"]),
    ),
)  # fmt: skip

EXPERIMENTS = {experiment.name: experiment for experiment in (POWER,)}
