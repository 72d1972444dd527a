"""All pairs in place of all combinations: of a test's parameters, a few combinations in which every
two values that occur together at all occur together.

A mistake rarely takes three things at once: an objective, a teacher's form and a backend. Of a test
that is marked `pairs`, `make test` runs these few, `make compiled` a few of the combinations with
Triton in which every two values of the other parameters occur, and `make test-all` every
combination. Where three do go together, the mark is given a function of the parameters: what it
returns is one more of them, and occurs with every value of the others.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations

import pytest


def covering(every: Iterable[Sequence[Hashable]]) -> list[int]:
    """Positions of combinations that hold every pair of values, those first that bring many new
    ones; of a single parameter, every value. The same for the same list: all processes of a run
    have to choose alike."""
    pairs = [set(combinations(enumerate(each), min(2, len(each)))) for each in every]
    left, chosen = set().union(*pairs), set()
    for least in range(max(map(len, pairs), default=0), 0, -1):
        for i, held in enumerate(pairs):
            if len(held & left) >= least:
                chosen.add(i)
                left -= held
    return sorted(chosen)


def values(item: pytest.Function) -> list[Hashable]:
    """Of a test's parameters, the position of one that cannot be hashed; and what the mark adds."""
    call, mark = item.callspec, item.get_closest_marker("pairs")
    plain = [
        value if isinstance(value, Hashable) else call.indices[name]
        for name, value in call.params.items()
    ]
    return plain + [more(**call.params) for more in mark.kwargs.values()]


def mark_the_rest_slow(items: Iterable[pytest.Function]) -> None:
    """Items that are marked `skip` hold no pair, or what only they hold would not run at all."""
    tests: dict[tuple, list[pytest.Function]] = {}
    for item in items:
        if item.get_closest_marker("pairs") and not item.get_closest_marker("skip"):
            tests.setdefault((item.path, item.originalname), []).append(item)
    for every in tests.values():
        few = set(covering(map(values, every)))
        for i, item in enumerate(every):
            if i not in few:
                item.add_marker(pytest.mark.slow)
                item.add_marker(pytest.mark.beyond_pairs)
