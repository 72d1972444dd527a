"""The transforms of the reward that a rule may name: one table of all that is known of each but its
formula.

R0 = lq - lo is the log-ratio of teacher and sampling policy at the token. It has no lower bound, so
a token that the teacher finds unlikely may outweigh a whole batch. A transform T(R0) keeps its sign
and tames its size; with q = exp(lq) and p = exp(lo):

| name      | T(R0)                     | parameter   | range         | source              |
|-----------|---------------------------|-------------|---------------|---------------------|
| log_ratio | R0                        |             | unbounded     | OPD                 |
| power     | q^a - p^a                 | a > 0       | [-1, 1]       | PowerOPD 2606.17199 |
| proximal  | log(a q/p + 1 - a)        | a in (0, 1] | from log(1-a) | TOP-D 2607.04751    |
| log1p     | sign(R0) log(1 + abs(R0)) |             | unbounded     | 2607.13399          |
| tanh      | tanh(R0 / a)              | a > 0, or 1 | [-1, 1]       | in 2606.17199       |
| sign      | sign(R0)                  |             | {-1, 0, 1}    | TV-OPD 2609.08341   |

"tanh" is one of PowerOPD's baselines; its authors' code has a = 5.

A small `a` of "power" costs digits, since q^a and p^a are then both near 1: the reward, about a R0,
is off by 1e-7 in float32.

The formulas are in `reference.py`, `rows/rewards.py` (torch) and `rows/triton_kernels/rewards.py`;
each refuses a name that it has no formula for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .checks import number

REWARD_POLICIES = ("old", "current")
REWARD_FILTERS = ("positive", "negative", "agree", "agree_scaled")


@dataclass(frozen=True, kw_only=True)
class RewardSpec:
    """What the package knows of one transform."""

    largest: float | None = None
    """The parameter lies above 0 and is at most this; None: it takes no parameter."""
    default: float | None = None
    """The parameter where none is given; None: one has to be."""
    bounded: bool = False
    """The reward is finite where the teacher gives the token probability 0. "proximal" is so, too,
    below 1."""


REWARDS: dict[str, RewardSpec] = {
    "log_ratio": RewardSpec(),
    "power": RewardSpec(largest=math.inf, bounded=True),
    "proximal": RewardSpec(largest=1.0),
    "log1p": RewardSpec(),
    "tanh": RewardSpec(largest=math.inf, default=1.0, bounded=True),
    "sign": RewardSpec(bounded=True),
}


def check_reward_parameter(reward: str, value: Any, name: str = "reward_parameter") -> None:
    """Raises where `reward` has no value at this parameter, called `name`."""
    largest, default = REWARDS[reward].largest, REWARDS[reward].default
    if largest is None:
        if value is not None:
            raise ValueError(
                f"reward={reward!r} takes no {name}, got {value!r}: leave it None, or choose "
                f"{' or '.join(repr(r) for r, spec in REWARDS.items() if spec.largest)}"
            )
        return
    if value is None and default is not None:
        return
    if value is None:
        raise ValueError(f"reward={reward!r} needs a {name}: give {_range(largest)}")
    number(name, value, 0.0, largest)
    if value == 0:
        raise ValueError(f"{name} of reward={reward!r} must be {_range(largest)}, got {value!r}")


def _range(largest: float) -> str:
    return "a number above 0" if largest == math.inf else f"a number in (0, {largest:g}]"


def is_bounded(reward: str, parameter: float | None) -> bool:
    """Whether the reward is finite where the teacher gives the token probability 0."""
    below_1 = parameter is not None and parameter < 1
    return REWARDS[reward].bounded or (reward == "proximal" and below_1)
