"""The table of frameworks, and what is said where one is another than the one that was tested."""

from pathlib import Path
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


def test_the_command_says_what_is_here_and_how_to_switch_it_on(capsys, monkeypatch):
    from tropd_kernels import cli

    versions = {"verl": "0.9.1", "torchtitan": "9.9"}

    def version(name):
        if name not in versions:
            raise frameworks.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(frameworks.metadata, "version", version)
    assert cli.main(["integrations"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(frameworks.FRAMEWORKS)
    assert lines[0] == "verl  here: 0.9.1  tested: 0.9.1" and "use_fused_kernels=true" in lines[1]
    assert "torchtitan  here: 9.9, untested  tested: 0.3.0" in lines
    assert "ms-swift  here: not installed  tested: 4.6.0" in lines
    assert "slime  here: not on PyPI  tested: 624b824" in lines


def test_the_page_has_each_framework_with_the_version_that_was_tested():
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text("utf-8")
    table: dict[str, str] = {}
    for line in page.splitlines():
        if line.startswith("|"):
            _, name, version, *_ = (cell.strip() for cell in line.split("|"))
            table.setdefault(name.lower(), version)  # of the first table
    named = {"nemo-automodel": "nemo automodel"}
    for name, framework in frameworks.FRAMEWORKS.items():
        if name in ("veomni", "megatron-core"):  # which have verl's row
            assert framework.tested in page
        else:
            assert table[named.get(name, name)] == framework.tested
