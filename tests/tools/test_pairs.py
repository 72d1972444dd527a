"""The choice of combinations that `make test` runs of a test that is marked `pairs`."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest
from pairs import covering, mark_the_rest_slow


def pairs(every):
    return {pair for each in every for pair in combinations(enumerate(each), min(2, len(each)))}


@pytest.mark.parametrize(
    ("axes", "most"),
    [(("ab", "cd", "ef"), 4), ((range(9), "abc", "de"), 27), (("ab", "cd"), 4), (("abc",), 3)],
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

    def __init__(self, name, mark, skipped=False, **parameters):
        self.path, self.originalname, self.added = "file", name, []
        self.marks = {"pairs": mark, "skip": skipped}
        indices = {name: sum(value) for name, value in parameters.items() if name == "unhashable"}
        self.callspec = SimpleNamespace(params=parameters, indices=indices)

    def get_closest_marker(self, name):
        return self.marks.get(name)

    def add_marker(self, mark):
        self.added.append(mark.name)


def test_the_others_of_a_marked_test_are_slow():
    def items(name, mark):
        return [
            Item(name, mark, text=text, number=number, unhashable=unhashable)
            for text, number, unhashable in product("ab", (1, 2), ([3], [4]))
        ]

    pairs = pytest.mark.pairs.mark
    first, second, plain = items("first", pairs), items("second", pairs), items("plain", None)
    mark_the_rest_slow([*first, *plain, *second])
    for every in (first, second):
        assert sorted(item.added for item in every) == [[]] * 4 + [["slow", "beyond_pairs"]] * 4
    assert not any(item.added for item in plain)


def test_what_the_mark_adds_occurs_with_every_value():
    def together(text, number, backend):
        return (text, number) if text == "a" else text

    mark = pytest.mark.pairs(together=together).mark
    every = [
        Item("first", mark, text=text, number=number, backend=backend)
        for text, number, backend in product("abc", (1, 2), "xyz")
    ]
    mark_the_rest_slow(every)
    quick = {tuple(item.callspec.params.values()) for item in every if not item.added}
    assert quick >= set(product("a", (1, 2), "xyz")) and len(quick) < len(every)


def test_what_is_skipped_holds_no_pair():
    every = [
        Item("first", pytest.mark.pairs.mark, backend == "z", text=text, number=n, backend=backend)
        for text, n, backend in product("ab", (1, 2), "xyz")
    ]
    mark_the_rest_slow(every)
    runs = [tuple(i.callspec.params.values()) for i in every if not (i.marks["skip"] or i.added)]
    assert pairs(runs) == pairs(product("ab", (1, 2), "xy"))
    assert not any(item.added for item in every if item.marks["skip"])  # reported as skipped
