"""A claim, the test of it, and when it counts as confirmed.

A claim says that one arm's measure is larger than another's, at one mismatch. Both arms of a seed
start from the same student and see the same problems, so it is tested on their differences, one
for each seed:

    test        exact sign-flip test of a mean difference of 0, two-sided: the share of the 2ⁿ
                choices of signs whose mean is at least as far from 0. It assumes only that under
                the hypothesis a difference is as likely as its negative
    correction  Holm's, over all claims of an experiment and all its mismatches
    verdict     confirmed where the corrected p is below 0.05 and the mean difference positive;
                the reverse where that is negative; open otherwise

Beside each verdict stands the mean difference with Student's 95 % interval, which is not corrected.
"""

from collections.abc import Sequence

import numpy as np

LEVEL = 0.05
CONFIRMED, REVERSE, OPEN = "**confirmed**", "**the reverse**", "open"


def sign_flip(differences: Sequence[float]) -> float:
    """p of the exact two-sided test. For up to 20 differences: 2²⁰ choices of signs.

    Raises:
        ValueError: No difference, or more than 20.
    """
    n = len(differences)
    if not 1 <= n <= 20:
        raise ValueError(f"an exact sign-flip test takes 1 to 20 differences; got {n}")
    values = np.asarray(differences, np.float64)
    choices = np.arange(2**n)
    sums = np.zeros(2**n)
    for i, value in enumerate(values):
        sums += np.where(choices >> i & 1, -value, value)
    # Sums that are equal but for rounding count as equal.
    reached = abs(values.sum()) - 1e-9 * np.abs(values).sum()
    return float(np.mean(np.abs(sums) >= reached))


def holm(p: Sequence[float]) -> list[float]:
    """Corrected p-values, in the order given (Holm 1979)."""
    order = sorted(range(len(p)), key=p.__getitem__)
    corrected, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = least
    return corrected


def verdict(mean: float, corrected: float) -> str:
    if corrected >= LEVEL:
        return OPEN
    return CONFIRMED if mean > 0 else REVERSE
