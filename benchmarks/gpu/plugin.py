"""pytest's plugin of `benchmarks.gpu.suite`, in each of its processes.

A record for each test as it ends. Tests that an earlier call saw pass are left out. Once its CUDA
context is lost, every test of a process fails: a worker then ends before its next test, which
counts as failed by a crashed worker, and pytest-xdist starts another; a lone process ends the run.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.gpu.suite import PASSED

#: What torch says where nothing works any more in a process.
LOST = ("illegal memory access", "device-side assert", "unspecified launch failure",
        "misaligned address", "an illegal instruction")  # fmt: skip
LOST_STATUS = 70


class Plugin:
    """Of one process, which is the only one or a worker or who commands the workers."""

    def __init__(self, config: pytest.Config):
        self.is_worker = hasattr(config, "workerinput")
        self.lost: str | None = None

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list) -> None:
        if not os.environ.get(PASSED):
            return
        found, _ = records.read(Path(os.environ[PASSED]))
        passed = {r["test"] for r in found if r.get("outcome") in ("passed", "skipped")}
        left_out = [item for item in items if item.nodeid in passed]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item.nodeid not in passed]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reason = reason_of(report)
        if report.outcome == "failed" and any(text in str(report.longrepr) for text in LOST):
            self.lost = reason
        if self.is_worker or (report.when != "call" and report.outcome == "passed"):
            return
        records.emit(
            test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2),
            **({"reason": reason} if reason else {}),
        )  # fmt: skip

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        if self.lost is None:
            return
        if self.is_worker:
            os._exit(LOST_STATUS)
        pytest.exit(f"the CUDA context is lost: {self.lost}", returncode=LOST_STATUS)


def reason_of(report: pytest.TestReport) -> str:
    if report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        return (getattr(crash, "message", None) or str(report.longrepr))[:300]
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])[:300]
    return ""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin(config), "benchmarks.gpu")
