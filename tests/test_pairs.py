"""The choice of combinations that `make test` runs of a test that is marked `pairs`."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest
from pairs import covering, mark_the_rest_slow


def pairs(every):
    return {pair for each in every for pair in combinations(enumerate(each), 2)}


@pytest.mark.parametrize(
    ("axes", "most"),
    [(("ab", "cd", "ef"), 4), ((range(9), "abc", "de"), 27), (("ab", "cd"), 4), (("abc",), 0)],
)
def test_every_pair_is_held_by_few(axes, most):
    every = list(product(*axes))
    chosen = [every[i] for i in covering(every)]
    assert pairs(chosen) == pairs(every)
    assert len(chosen) <= most


def test_combinations_that_do_not_exist_are_not_asked_for():
    every = [each for each in product("ab", "cd", "ef") if each != ("a", "c", "e")]
    chosen = [every[i] for i in covering(every)]
    assert pairs(chosen) == pairs(every) and len(chosen) < len(every)


def test_nothing_to_choose_from():
    assert covering([]) == []


class Item:
    """A test with these parameters, as pytest collects it."""

    def __init__(self, name, marked, **parameters):
        self.path, self.originalname, self.marked, self.added = "file", name, marked, []
        indices = {name: sum(value) for name, value in parameters.items() if name == "unhashable"}
        self.callspec = SimpleNamespace(params=parameters, indices=indices)

    def get_closest_marker(self, name):
        return self.marked and name == "pairs"

    def add_marker(self, mark):
        self.added.append(mark.name)


def test_the_others_of_a_marked_test_are_slow():
    def items(name, marked):
        return [
            Item(name, marked, text=text, number=number, unhashable=unhashable)
            for text, number, unhashable in product("ab", (1, 2), ([3], [4]))
        ]

    first, second, plain = items("first", True), items("second", True), items("plain", False)
    mark_the_rest_slow([*first, *plain, *second])
    for every in (first, second):
        assert sorted(item.added for item in every) == [[]] * 4 + [["slow"]] * 4
    assert not any(item.added for item in plain)
