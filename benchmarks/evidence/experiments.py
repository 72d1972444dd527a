"""The experiments: arms, mismatches and claims, written down before their runs.

An arm is settings of `TrOPDConfig`, as in `benchmarks.learning.arms`; steps, batch, temperature and
optimizer are the same for all.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import ARMS, TOP_K
from benchmarks.learning.measures import (
    Claim,
    Measure,
    Result,
    early_accuracy,
    mean_accuracy,
)
from benchmarks.learning.run import EVERY, Run

from . import exact_mean, language, records

#: Learning rates that every arm tries, and the further one where the best is at an end.
RATES = (3e-4, 1e-3, 3e-3)
BEYOND = {3e-4: 1e-4, 3e-3: 1e-2}
#: Seeds on which an arm chooses its rate, none of the experiment's.
CHOOSING = (101, 102, 103)
SEEDS = 20


def end(record: Result) -> float:
    """Accuracy at the end: the mean of the last three measurements, steps 80, 90 and 100."""
    return statistics.fmean(record["accuracy"][-3:])


@dataclass(frozen=True)
class Outcome:
    """What an arm chooses its learning rate by. `sign`: 1 where more is better, else -1."""

    name: str
    measure: Measure
    sign: int = 1


@dataclass(frozen=True)
class Curve:
    """Numbers of a record, one every `every` steps, that a picture shows over the steps from
    `first` on."""

    key: str
    label: str
    every: int = EVERY
    first: int = 0


@dataclass(frozen=True)
class Experiment:
    """`claims` get a verdict, and are corrected together over all mismatches. `looks` are shown
    with their intervals alone."""

    name: str
    arms: Mapping[str, Mapping[str, Any]]
    mismatches: tuple[str, ...]
    claims: tuple[Claim, ...]
    looks: tuple[Claim, ...] = ()
    seeds: int = SEEDS
    choosing: tuple[int, ...] = CHOOSING
    rates: tuple[float, ...] = RATES
    beyond: Mapping[float, float] = field(default_factory=lambda: BEYOND)
    outcome: Outcome = Outcome("Accuracy at the end", end)
    curves: tuple[Curve, ...] = (Curve("accuracy", "held-out accuracy"),)
    record_of: Callable[[Run, Mapping[str, Any], Path], Result] = records.record_of


def lost(record: Result) -> float:
    """Accuracy before training minus that at the end."""
    return record["accuracy"][0] - end(record)


def early_trust(record: Result) -> float:
    """Share of the student's tokens that the gate lets through, mean of steps 10, 20 and 30."""
    return statistics.fmean(record["trust"][1:4])


def excess_mass(record: Result) -> float:
    """The student's mass on the teacher's top k minus the teacher's own there, at the end."""
    teacher, student = record["topk_mass"]
    return student - teacher


def spike(record: Result) -> float:
    """Largest gradient norm over the run's own median."""
    return record["largest_norm"] / record["median_norm"]


def measured(key: str) -> Measure:
    return lambda record: record[key]


def _knobs(objective: str, **knobs: Any) -> dict[str, Any]:
    return {"objective": objective, "objective_kwargs": knobs}


_TROPD = ARMS["tropd"]
_PREFIX = {"prefix_schedule": "cosine", "prefix_relative": True}  # the paper's

POWER = Experiment(
    "power",
    arms={
        **{arm: ARMS[arm] for arm in ("opd", "eopd", "reopold", "clip_outlier", "mask_outlier")},
        "tropd": _TROPD,
        "tropd_expected": _knobs("tropd", top_k=TOP_K, gate="expected"),
        "tropd_official_code": _knobs("tropd", top_k=TOP_K, outlier="forward_kl_reward",
                                      top_k_tail="renormalize_teacher"),
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
        Claim("OPD's largest gradient norm exceeds TrOPD's, each at its rate", "opd", "tropd",
              measured("largest_norm")),
        Claim("masking keeps more entropy than clipping, each at its rate", "mask_outlier",
              "clip_outlier", measured("entropy")),
    ),
    looks=(
        Claim("the expected gate ends above the sampled one", "tropd_expected", "tropd", end),
        Claim("the paper's outlier ends above the official code's", "tropd",
              "tropd_official_code", end),
        Claim("TrOPD is above OPD over all of training", "tropd", "opd", mean_accuracy),
        Claim("the prefix is above none early (30 % of the steps)", "tropd_relative_prefix",
              "tropd", early_accuracy),
        Claim("OPD's norm spikes more (largest over its median)", "opd", "tropd", spike),
    ),
)  # fmt: skip

TAIL = Experiment(
    "tail",
    arms={
        "opd": ARMS["opd"],
        "gkd": ARMS["gkd"],
        "mopd": _knobs("mopd", top_k=64),
        "forward_kl": {"objective": "forward_kl"},
        "forward_kl_topk": _knobs("forward_kl", top_k=64),
        "forward_kl_bucket": _knobs("forward_kl", top_k=64, top_k_tail="bucket"),
        "forward_kl_renormalized": _knobs("forward_kl", top_k=64,
                                          top_k_tail="renormalize_teacher"),
        "tropd": {"objective": "tropd"},
        "tropd_bucket": _knobs("tropd", top_k_tail="bucket"),
    },
    mismatches=("long_tail_near", "long_tail_far"),
    claims=(
        Claim("forward KL on the top k everywhere ends below its start", "forward_kl_topk", None,
              lost),
        Claim("TrOPD ends above forward KL on the top k everywhere", "tropd", "forward_kl_topk",
              end),
        Claim("TrOPD ends above MOPD", "tropd", "mopd", end),
        Claim("TrOPD ends above OPD", "tropd", "opd", end),
        Claim("forward KL on the top k: a bucket for the tail ends above none",
              "forward_kl_bucket", "forward_kl_topk", end),
        Claim("forward KL on the top k: the teacher renormalised there ends above raw",
              "forward_kl_renormalized", "forward_kl_topk", end),
        Claim("TrOPD: a bucket for the tail ends above none", "tropd_bucket", "tropd", end),
        Claim("raw, the top k draws more of the student's mass than with a bucket",
              "forward_kl_topk", "forward_kl_bucket", excess_mass),
    ),
)  # fmt: skip

#: The mechanism alone. A raw KL on the top k is least where no mass of the student's is outside,
#: which is not at the teacher: a student who starts there would leave. A bucket for the tail makes
#: it the KL of two whole distributions, which is least at the teacher.
UNLEARN = Experiment(
    "unlearn",
    arms={name: TAIL.arms[name] for name in (
        "forward_kl", "forward_kl_topk", "forward_kl_bucket", "forward_kl_renormalized", "tropd",
        "tropd_bucket")},
    mismatches=("long_tail_itself",),
    claims=(
        Claim("raw, a student who is the teacher ends farther from it (forward KL) than with a "
              "bucket", "forward_kl_topk", "forward_kl_bucket", measured("forward_kl")),
        Claim("raw, it puts more mass on the top k than the teacher", "forward_kl_topk", None,
              excess_mass),
        Claim("raw, its accuracy falls", "forward_kl_topk", None, lost),
        Claim("the teacher renormalised there, it ends farther than with a bucket",
              "forward_kl_renormalized", "forward_kl_bucket", measured("forward_kl")),
        Claim("TrOPD: raw outliers leave it farther than with a bucket", "tropd", "tropd_bucket",
              measured("forward_kl")),
    ),
    seeds=10,
    choosing=(101,),
    rates=(1e-3,),  # that of the first experiment: one rate for all, since none has to learn
    beyond={},
)  # fmt: skip

PREFIX = Experiment(
    "prefix",
    arms={
        "tropd": {"objective": "tropd"},
        "tropd_prefix": {"objective": "tropd", "prefix_schedule": "cosine", "prefix_length": 17},
        "tropd_relative_prefix": {"objective": "tropd"} | _PREFIX,
    },
    mismatches=("foreign",),
    claims=(
        Claim("the relative prefix raises trust early (30 % of the steps)",
              "tropd_relative_prefix", "tropd", early_trust),
        Claim("the relative prefix raises accuracy early", "tropd_relative_prefix", "tropd",
              early_accuracy),
        Claim("the relative prefix ends above none", "tropd_relative_prefix", "tropd", end),
        Claim("the relative prefix ends above one of 17 tokens", "tropd_relative_prefix",
              "tropd_prefix", end),
    ),
)  # fmt: skip

_GKD = ARMS["gkd"]
_TOLERANCES = {
    "gkd": _GKD,
    "gkd_tolerance_0.01": _GKD | {"gradient_tolerance": 0.01},
    "gkd_tolerance_0.03": _GKD | {"gradient_tolerance": 0.03},
}
_LARGER_FORWARD_KL = tuple(
    Claim(f"a gradient tolerance of {tolerance} leaves a larger forward KL",
          f"gkd_tolerance_{tolerance}", "gkd", measured("forward_kl"))
    for tolerance in (0.01, 0.03)
)  # fmt: skip

#: The same sample, but the head's gradient is exact along the mean of the hidden states. Suspected
#: is the noise along it, so two claims of forward KL: the plain tolerance leaves a larger one than
#: this arm (A), and this arm a larger one than the gradient of all ids (B). Where the claim that
#: the plain tolerance leaves a larger one is confirmed, A confirmed without B says that this noise
#: is why, A with B that it is a part of why, and B without A that it is not, as far as 20 seeds can
#: tell. Otherwise they say nothing of why.
_EXACT_MEAN = f"gkd_tolerance_0.03{exact_mean.SUFFIX}"

COST = Experiment(
    "cost",
    arms=_TOLERANCES
    | {
        _EXACT_MEAN: _TOLERANCES["gkd_tolerance_0.03"],
        "gkd_selected_0.3": _GKD | {"select_by": "entropy", "select_fraction": 0.3},
        "gkd_selected_0.1": _GKD | {"select_by": "entropy", "select_fraction": 0.1},
    },
    mismatches=("long_tail_far",),
    claims=(
        Claim("a gradient tolerance of 0.01 costs accuracy", "gkd", "gkd_tolerance_0.01", end),
        Claim("a gradient tolerance of 0.03 costs accuracy", "gkd", "gkd_tolerance_0.03", end),
        Claim("a gradient tolerance of 0.01 leaves a larger reverse KL", "gkd_tolerance_0.01",
              "gkd", measured("reverse_kl")),
        Claim("a gradient tolerance of 0.03 leaves a larger reverse KL", "gkd_tolerance_0.03",
              "gkd", measured("reverse_kl")),
        *_LARGER_FORWARD_KL,
        Claim("0.03: a gradient that is exact along the mean hidden state leaves a smaller "
              "forward KL", "gkd_tolerance_0.03", _EXACT_MEAN, measured("forward_kl")),
        Claim("0.03: even so it leaves a larger one than the gradient of all ids", _EXACT_MEAN,
              "gkd", measured("forward_kl")),
        Claim("three tenths of the tokens cost accuracy", "gkd", "gkd_selected_0.3", end),
        Claim("a tenth of the tokens costs accuracy", "gkd", "gkd_selected_0.1", end),
    ),
    record_of=exact_mean.record_of,
)  # fmt: skip

#: With sampled gradients AdamW moves a rarely drawn row of the head less than many small gradients
#: would, because of its denominator. SGD has none: there a difference could not come from that.
SGD = Experiment(
    "sgd",
    arms={name: arm | {"optim": "sgd"} for name, arm in _TOLERANCES.items()},
    mismatches=("long_tail_far",),
    claims=_LARGER_FORWARD_KL,
    rates=(0.03, 0.1, 0.3),
    beyond={0.03: 0.01, 0.3: 1.0},
)


def end_distance(record: Result) -> float:
    """Reverse KL to the teacher on held-out prompts after the last step, nats a token."""
    return record["held_out_kl"][-1]


def end_entropy(record: Result) -> float:
    """The student's entropy, mean of the last ten steps."""
    return statistics.fmean(record["entropy"][-10:])


def largest_norm(record: Result) -> float:
    return max(record["grad_norm"])


LANGUAGE = Experiment(
    "language",
    arms={name: ARMS[name] for name in ("opd", "reverse_kl", "gkd")}
    | {"tropd": {"objective": "tropd"}},
    mismatches=(language.STUDENT,),
    claims=(),  # three seeds cannot confirm one: the smallest p of their sign flips is 2 / 8
    looks=(
        Claim("OPD ends farther from the teacher than TrOPD", "opd", "tropd", end_distance),
        Claim("TrOPD ends farther than the exact reverse KL", "tropd", "reverse_kl", end_distance),
        Claim("GKD ends farther than the exact reverse KL", "gkd", "reverse_kl", end_distance),
        Claim("OPD's largest gradient norm exceeds TrOPD's", "opd", "tropd", largest_norm),
        Claim("TrOPD keeps more entropy than OPD", "tropd", "opd", end_entropy),
    ),
    seeds=3,
    choosing=(101,),
    rates=(1e-4, 3e-4),
    beyond={},
    outcome=Outcome("Reverse KL to the teacher on held-out prompts, nats a token, at the end",
                    end_distance, sign=-1),
    curves=(
        Curve("held_out_kl", "held-out reverse KL, nats a token", every=language.EVERY),
        Curve("entropy", "entropy, nats", every=1, first=1),
        Curve("grad_norm", "gradient norm before clipping", every=1, first=1),
    ),
    record_of=language.record_of,
)  # fmt: skip

EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (POWER, TAIL, UNLEARN, PREFIX, COST, SGD, LANGUAGE)
}
