"""The table of frameworks, and what is said where one is another than the one that was tested."""

from types import SimpleNamespace

import pytest

from tropd_kernels.integrations import frameworks
from tropd_kernels.integrations.frameworks import fingerprint, replace_function


def once(x, y):
    return x + y


@pytest.fixture
def known(monkeypatch):
    """A framework of the tests' own, of version 1.2, and an owner of a function."""
    framework = frameworks.Framework("some", "some-distribution", "1.2", "switch=on")
    monkeypatch.setitem(frameworks.FRAMEWORKS, "some", framework)
    frameworks.check_version.cache_clear()
    yield SimpleNamespace(__name__="some.module", once=once)
    frameworks.check_version.cache_clear()


def test_another_version_is_warned_of_by_both_names(known, monkeypatch, recwarn):
    installed = {}

    def version(name):
        if name not in installed:
            raise frameworks.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(frameworks.metadata, "version", version)
    for installed in ({}, {"some-distribution": "1.2"}):  # noqa: B007
        frameworks.check_version("some")
        frameworks.check_version.cache_clear()
    assert not recwarn.list
    installed = {"some-distribution": "1.3"}
    with pytest.warns(UserWarning, match=r"some 1\.3 is installed.*tested with some 1\.2"):
        frameworks.check_version("some")
    frameworks.check_version("some")  # said once
    assert not recwarn.list


def replaced(owner, **changes):
    settings = dict(parameters=("x", "y"), expected=fingerprint(once)) | changes
    replace_function("some", owner, "once", lambda original: lambda *a: -original(*a), **settings)


def test_a_function_is_replaced_once(known, recwarn):
    replaced(known)
    replaced(known)
    assert known.once(2, 3) == -5 and known.once.__name__ == "once"
    assert not recwarn.list


def test_a_function_whose_source_has_changed_is_warned_of(known):
    with pytest.warns(UserWarning, match=r"some\.module\.once is another than in some 1\.2"):
        replaced(known, expected="0123456789ab")
    assert known.once(2, 3) == -5


def test_a_function_that_takes_something_else_is_refused(known):
    with pytest.raises(RuntimeError, match=r"some\.module\.once is \(x, y\), expected \(x\)"):
        replaced(known, parameters=("x",))
    assert known.once is once
    del known.once
    with pytest.raises(RuntimeError, match=r"some\.module\.once is missing, expected \(x, y\)"):
        replaced(known)


def test_a_fingerprint_is_of_the_source_alone():
    assert len(fingerprint(once)) == 12 != len(fingerprint(print))
    assert fingerprint(once) != fingerprint(replaced)
