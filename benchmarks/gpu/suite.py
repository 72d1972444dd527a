"""Tests on the GPU, a record each as it ends: those that compile kernels, or need a GPU.

    python -m benchmarks.gpu.suite
    python -m benchmarks.gpu.suite "tests/test_numbers.py::test_x[triton]"    these alone

Kernels compile on the processor, so that several workers keep one GPU busy, where pytest-xdist is
there to run them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence

import pytest

from benchmarks import records

#: By what is most worth knowing first.
SUITES = (
    "tests/test_correctness.py", "tests/test_triton_rows.py", "tests/test_numbers.py",
    "tests/test_infinities.py", "tests/test_memory.py", "tests/test_compile.py",
    "tests/test_agreement.py", "tests/test_autograd.py", "tests/test_draws.py",
    "tests/test_autocast.py", "tests/test_tolerance.py", "tests/test_selection.py",
)  # fmt: skip
QUIET = ("-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:benchmark")
WORKERS = 8


class Lines:
    """Of pytest's plugins: a record for each test that fails, passes or is skipped."""

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = ""
            if report.outcome == "failed":
                crash = getattr(report.longrepr, "reprcrash", None)
                reason = getattr(crash, "message", None) or str(report.longrepr)
            elif report.outcome == "skipped":
                reason = str(report.longrepr[-1] if report.longrepr else "")
            records.emit(
                test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2),
                **({"reason": reason[:300]} if reason else {}),
            )  # fmt: skip


def options_of(where: Sequence[str], workers: int) -> list[str]:
    """pytest's: `where` as it stands, else the suites' tests of kernels."""
    several = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    return [*QUIET, *several, *(where or ("-k", "triton or gpu", *SUITES))]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 also where tests fail: that is what the records say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.suite", description=__doc__)
    parser.add_argument("where", nargs="*", help="tests or files, in place of the suites")
    options = parser.parse_args(arguments)
    workers = 1 if options.where else min(WORKERS, (os.cpu_count() or 2) // 2)
    status = pytest.main(options_of(options.where, workers), plugins=[Lines()])
    return 0 if status == pytest.ExitCode.TESTS_FAILED else int(status)


if __name__ == "__main__":
    sys.exit(main())
