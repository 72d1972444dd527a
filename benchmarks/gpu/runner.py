"""Runs jobs in order, each within its time limit, and records how each of them ended.

An `exclusive` job has the machine to itself in its turn; the others share it, as many at a time as
there are workers. While a job runs, the next ones with `prestart` are started, so that their
imports cost them no time. A job may crash, hang, print garbage or leave children behind, which are
stopped with it: the next ones run all the same. All jobs end with the runner, even if it is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT, records
from benchmarks.gpu.jobs import Facts, Job, missing

#: How many jobs are started before their turn.
PRESTARTED = 2
#: Seconds between two polls of the running jobs; a job with less time left than this is not begun.
POLL_SECONDS, MIN_SECONDS = 0.05, 1.0
#: Bytes of each log that `logs.txt` keeps, of its end.
LOG_BYTES = 20_000


@dataclass
class Live:
    """A process of a job. since: when its turn came; None before that."""

    job: Job
    process: subprocess.Popen
    log: Path
    since: float | None = None


class Runner:
    """folder: gets `results.jsonl` and `logs.txt`. logs: a folder for each log whole.
    clock: seconds since the call's start."""

    def __init__(
        self, folder: Path, logs: Path, environment: Mapping[str, str], workers: int,
        clock: Callable[[], float],
    ):  # fmt: skip
        self.results, self.all_logs, self.logs = folder / "results.jsonl", folder / "logs.txt", logs
        self.environment, self.workers, self.clock = dict(environment), workers, clock
        self.queue: deque[Job] = deque()
        self.live: list[Live] = []
        self.stopping: str | None = None

    def run(self, jobs: Iterable[Job], facts: Facts | None) -> None:
        """Returns once all have ended. Raises nothing that a job could cause."""
        skipped: dict[str, list[str]] = {}
        for job in jobs:
            reason = missing(job.needs, facts)
            if reason:
                self.record(job, "skipped", reason)
                skipped.setdefault(reason, []).append(job.title)
            else:
                self.queue.append(job)
        for reason, titles in skipped.items():
            print(f"skipped, {reason}: {', '.join(titles)}", flush=True)
        try:
            while self.queue or self.live:
                self.reap()
                self.drop_late()
                self.give_turns()
                self.start_ahead()
                if self.live:
                    time.sleep(POLL_SECONDS)
        finally:
            for live in self.live:
                end(live.process)

    def stop(self, reason: str) -> None:
        """From a signal's handler: what runs is stopped, the rest does not begin."""
        self.stopping = reason

    # --- turns ---------------------------------------------------------------------------------

    def give_turns(self) -> None:
        """To the first in line, as long as nothing speaks against it."""
        while (job := self.next_job()) and self.may_go(job):
            waiting = next((live for live in self.live if live.since is None), None)
            if waiting is None:
                waiting = self.start(self.queue.popleft())
                if waiting is None:
                    continue
            waiting.since = self.clock()
            if waiting.process.stdin:
                with contextlib.suppress(OSError):  # it has ended already
                    waiting.process.stdin.write(b"\n")
                    waiting.process.stdin.close()

    def next_job(self) -> Job | None:
        waiting = [live.job for live in self.live if live.since is None]
        return waiting[0] if waiting else (self.queue[0] if self.queue else None)

    def may_go(self, job: Job) -> bool:
        going = [live.job for live in self.live if live.since is not None]
        if job.exclusive or any(other.exclusive for other in going):
            return not going
        return len(going) < self.workers

    def start_ahead(self) -> None:
        """While others run. Those that wait come before the queue, in its order."""
        waiting = sum(live.since is None for live in self.live)
        if waiting == len(self.live):
            return
        while waiting < PRESTARTED and self.queue and self.queue[0].prestart:
            waiting += self.start(self.queue.popleft()) is not None

    # --- beginning and ending ------------------------------------------------------------------

    def start(self, job: Job) -> Live | None:
        log = self.logs / (re.sub(r"[^\w.-]+", "_", job.title) + ".log")
        environment = self.environment | {
            records.FILE: str(self.results),
            records.FIELDS: json.dumps({"step": job.step, "job": job.name}),
            "PYTHONUNBUFFERED": "1",
        }
        if job.prestart:
            environment[records.TURN] = "1"
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    job.command, cwd=ROOT, env=environment, stdout=output, process_group=0,
                    stderr=subprocess.STDOUT, preexec_fn=_end_with_parent,
                    stdin=subprocess.PIPE if job.prestart else subprocess.DEVNULL,
                )  # fmt: skip
        except OSError as error:
            self.record(job, "crashed", f"could not be started: {error}")
            return None
        live = Live(job, process, log)
        self.live.append(live)
        return live

    def reap(self) -> None:
        now = self.clock()
        for live in list(self.live):
            status, job = live.process.poll(), live.job
            if status == 0:
                self.finish(live, "done", "")
            elif status == records.RECORDED_FAILURE:
                self.finish(live, "failed", last_reason(live.log))
            elif status is not None:
                self.finish(live, "crashed", exit_text(status))
            elif self.stopping:
                self.finish(live, "stopped", self.stopping)
            elif live.since is not None and now > min(live.since + job.seconds, job.until):
                if job.open_end:
                    self.finish(live, "done", "until its time was up")
                else:
                    self.finish(live, "stopped", f"stopped after {now - live.since:.0f} s")
            elif live.since is None and now > job.until - MIN_SECONDS:
                self.finish(live, "late", "its step's time was up")

    def drop_late(self) -> None:
        now = self.clock()
        for job in list(self.queue):
            if self.stopping or now > job.until - MIN_SECONDS:
                self.queue.remove(job)
                self.record(job, "late", self.stopping or "its step's time was up")

    def finish(self, live: Live, state: str, reason: str) -> None:
        end(live.process)
        self.live.remove(live)
        took = None if live.since is None else self.clock() - live.since
        if state in ("crashed", "stopped"):
            reason += f"; last line: {last_line(live.log)}"
        self.record(live.job, state, reason, took)
        with self.all_logs.open("ab") as file:
            file.write(f"\n=== {live.job.title}: {state}\n".encode() + tail(live.log))

    def record(self, job: Job, state: str, reason: str = "", took: float | None = None) -> None:
        fields = {"step": job.step, "job": job.name, "state": state, "at": round(self.clock(), 1)}
        if took is not None:
            fields["seconds"] = round(took, 1)
        records.append(self.results, fields | ({"reason": reason} if reason else {}))
        if state == "skipped":  # `run` says it for all at once
            return
        took_text = "" if took is None else f" {took:.0f} s"
        print(
            f"{self.clock():5.0f} s  {job.title}: {state}{took_text}"
            + (f": {reason}"[:160] if reason else ""),
            flush=True,
        )


def end(process: subprocess.Popen) -> None:
    """With the children that it leaves behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin:
        with contextlib.suppress(OSError):
            process.stdin.close()
    # One that waits in the driver may not die at once: nothing waits for it.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=2)


def exit_text(status: int) -> str:
    if status > 0:
        return f"status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def last_reason(log: Path) -> str:
    """The reason in the last record that has one."""
    for line in reversed(tail(log).decode("utf-8", errors="replace").splitlines()):
        with contextlib.suppress(ValueError, AttributeError):
            if reason := json.loads(line).get("reason"):
                return str(reason)
    return last_line(log)


def tail(log: Path) -> bytes:
    data = log.read_bytes()
    return data if len(data) <= LOG_BYTES else b"[...]" + data[-LOG_BYTES:]


def last_line(log: Path) -> str:
    """The last line of the log that can be read, whatever was printed."""
    text = tail(log).decode("utf-8", errors="replace")
    text = "".join(c if c.isprintable() or c in "\n\r" else "?" for c in text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "none"


def _libc():
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None


_LIBC = _libc() if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """Runs in the child: the kernel ends it if the runner is killed."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
