"""Tables and figures as docs/scaling.md shows them."""

import math

from benchmarks.measure import Times


def size(value: float) -> str:
    """Decimal units, three figures."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            return f"{figures(value)} {unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            return f"{figures(seconds * factor)} {unit}"
    raise AssertionError


def figures(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def gflop(value: float) -> str:
    return f"{value / 1e9:.1f}"


def spread(times: Times) -> str:
    return f"{times.median:.2f} s ({times.p20:.2f} to {times.p80:.2f})"
