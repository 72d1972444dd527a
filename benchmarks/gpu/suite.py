"""Tests on the GPU, a record each as it ends: those that compile kernels, or need a GPU.

    python -m benchmarks.gpu.suite
    python -m benchmarks.gpu.suite --passed OUT/results.jsonl     without what passed there
    python -m benchmarks.gpu.suite "tests/rows/test_x.py::test_y[triton]"    only this one

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

#: Environment of pytest's processes: an earlier call's records.
PASSED = "TROPD_PASSED"
#: By what is most worth knowing first.
SUITES = (
    "tests/objectives/test_correctness.py", "tests/rows/test_triton_rows.py",
    "tests/objectives/test_numbers.py", "tests/rows/test_rows_and_ids.py",
    "tests/objectives/test_gradients.py", "tests/loss/test_triton_scaling.py",
    "tests/objectives/test_infinities.py", "tests/loss/test_memory.py",
    "tests/loss/test_compile.py", "tests/objectives/test_agreement.py",
    "tests/loss/test_autograd.py", "tests/public/test_draws.py", "tests/loss/test_autocast.py",
    "tests/loss/test_sampling_gradients.py", "tests/loss/test_sampling_corners.py",
    "tests/loss/test_selection.py",
)  # fmt: skip
QUIET = ("-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:benchmark", "-p",
         "benchmarks.gpu.plugin")  # fmt: skip
WORKERS = 8


def options_of(where: Sequence[str], workers: int) -> list[str]:
    """pytest's options: for the tests named in `where`, else for the suites' tests of kernels."""
    several = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    return [*QUIET, *several, *(where or ("-k", "triton or gpu", *SUITES))]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 also if tests fail: the records say so."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.suite", description=__doc__)
    parser.add_argument("where", nargs="*", help="tests or files, in place of the suites")
    parser.add_argument("--passed", help="an earlier call's records: what passed is left out")
    options = parser.parse_args(arguments)
    if options.passed:
        os.environ[PASSED] = options.passed
    workers = 1 if options.where else min(WORKERS, (os.cpu_count() or 2) // 2)
    status = pytest.main(options_of(options.where, workers))
    ran = (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    return 0 if status in ran else int(status)


if __name__ == "__main__":
    sys.exit(main())
