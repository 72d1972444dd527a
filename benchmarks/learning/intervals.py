"""Means over seeds with Student's 95 % interval.

mean ± t · s / √n        s the standard deviation over the n seeds, t the 97.5 % quantile with
                         n - 1 degrees of freedom
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """mean ± half; half is NaN for a single seed, which says nothing of the others."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def text(self, digits: int = 2) -> str:
        if math.isnan(self.half):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval:
    n = len(values)
    if n == 1:
        return Interval(values[0], math.nan)
    half = quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Interval(statistics.fmean(values), half)


def quantile(freedom: int) -> float:
    """Beyond the table, the normal's quantile with its first correction: off by less than 0.01."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.4 / freedom
