"""What every public name says of itself: an example that runs."""

from __future__ import annotations

import doctest
import inspect

import pytest

import tropd_kernels
from tropd_kernels import credit

#: Results, which calls return, and functions of `heads` and the trainer, which need models.
WITHOUT = {"DistillationOutput", "TokenStats", "ChunkPlan"}
NAMES = {
    name: getattr(tropd_kernels, name) for name in tropd_kernels.__all__ if name not in WITHOUT
}
NAMES |= {
    name: value for name in credit.__all__ if inspect.isfunction(value := getattr(credit, name))
}
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def documented(value: object) -> object:
    """TrOPD is an instance that is called like a function."""
    return value if inspect.isroutine(value) or inspect.isclass(value) else type(value)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name: str):
    text = inspect.getdoc(documented(NAMES[name]))
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert result.failed == 0, "".join(said)
