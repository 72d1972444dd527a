"""Estimates of what a row takes, from small runs before it is begun.

    cost = Cost()
    cost.check(small_run, [64, 1024, 1024, 1024], budget=120.0)    # raises OutOfTime

A call takes a constant time (converting a head, writing its gradient) and a time for each token, so
its seconds are extrapolated from runs on two numbers of tokens. The smallest run comes first; a
larger one follows only if the smaller ones leave the answer open and a share of the budget covers
it. Later measurements are added, so that the next number of tokens needs no small runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: Seconds of a row where none are asked for, by the type of the device; None: no limit.
DEFAULTS: dict[str, float | None] = {"cuda": None, "cpu": 120.0}
#: Tokens of the small runs.
SIZES = (2, 8, 32, 128)
#: Of the budget, what the small runs after the first may take.
SHARE = 0.1

#: make(n): a call on n tokens, with what it needs at hand.
Make = Callable[[int], Callable[[], object]]


class OutOfTime(Exception):
    """needs, budget: seconds."""

    def __init__(self, needs: float, budget: float, what: str = ""):
        super().__init__(f"{what}needs about {duration(needs)}, --budget is {budget:g} s")
        self.needs, self.budget = needs, budget

    @property
    def sufficient(self) -> int:
        """A budget that takes it, in seconds: a fifth more, in two figures."""
        more, ten = 1.2 * self.needs, 1
        while more / ten >= 100:
            ten *= 10
        return ten * -int(-more // ten)


@dataclass
class Cost:
    """Measured seconds of a call. points: (tokens, seconds), ascending in tokens. loading: how much
    longer the first run took than the second; None before the second."""

    points: list[tuple[int, float]] = field(default_factory=list)
    loading: float | None = None
    clock: Callable[[], float] = time.perf_counter

    def of(self, tokens: int) -> float:
        """Seconds of a call on this many tokens: on the line through the last two points, or in
        proportion to the tokens of a single one, which overestimates."""
        (many, seconds), *others = self.points[::-1]
        slope = seconds / many
        if others:
            fewer, less = others[0]
            slope = min(slope, max(0.0, (seconds - less) / (many - fewer)))
        return seconds + slope * (tokens - many)

    def add(self, tokens: int, seconds: float) -> None:
        """Adds a measurement."""
        if self.loading is None:  # then the first run's seconds include loading
            self.points, self.loading = [], 0.0
        self.points = [point for point in self.points if point[0] < tokens] + [(tokens, seconds)]

    def check(self, make: Make, calls: Sequence[int], budget: float, what: str = "") -> None:
        """Raises OutOfTime where calls on these numbers of tokens would take more than `budget`
        seconds in all."""
        start, most = self.clock(), max(calls)
        if not self.points:
            n = min(SIZES[0], most)
            first = self._timed(make, n)
            self.points = [(n, first)]
            if self._needs(calls, start) <= budget:
                return
            again = self._timed(make, n)
            self.points, self.loading = [(n, again)], max(0.0, first - again)
            for n in (n for n in SIZES if n > self.points[-1][0] and n < most):
                spent = self.clock() - start
                small_runs = spent - self.loading + self.of(n)
                if self._needs(calls, start) <= budget or small_runs > SHARE * budget:
                    break
                self.add(n, self._timed(make, n))
        needs = self._needs(calls, start)
        if needs > budget:
            raise OutOfTime(needs, budget, what)

    def _needs(self, calls: Sequence[int], start: float) -> float:
        """With what the small runs have taken."""
        return self.clock() - start + (self.loading or 0.0) + sum(map(self.of, calls))

    def _timed(self, make: Make, tokens: int) -> float:
        call = make(tokens)
        start = self.clock()
        call()
        return self.clock() - start


@dataclass
class Pace:
    """Of work in many parts: `after(done)` raises OutOfTime once the whole would take more than the
    budget at the pace so far. budget: seconds, or None without a limit."""

    whole: int
    budget: float | None
    what: str = ""
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self):
        self.start = self.clock()

    def after(self, done: int) -> None:
        needs = (self.clock() - self.start) * self.whole / done
        if self.budget is not None and needs > self.budget:
            raise OutOfTime(needs, self.budget, self.what)


def duration(seconds: float) -> str:
    """As text, in a suitable unit."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 3 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
