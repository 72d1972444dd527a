"""A job: a process with a time limit. A step: jobs with a common deadline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A process with a time limit.

    step, name: its records carry them. command: a program and its arguments. seconds: its limit,
    from its turn on. until: its step's deadline, in seconds after the start of the call. needs: see
    `missing`. exclusive: nothing else runs in its turn, which would spoil its figures. prestart: it
    is started before its turn, since its command calls `records.wait_for_turn`. open_end: that its
    time is up is no failure.
    """

    step: str
    name: str
    command: tuple[str, ...]
    seconds: float
    until: float = float("inf")
    needs: tuple[str, ...] = ()
    exclusive: bool = True
    prestart: bool = False
    open_end: bool = False

    @property
    def title(self) -> str:
        return self.step if self.name == self.step else f"{self.step} {self.name}"


def step(until: float, jobs: Iterable[Job]) -> list[Job]:
    """Jobs with this deadline, in seconds after the call's start."""
    return [replace(job, until=until) for job in jobs]


def scaled(jobs: Iterable[Job], factor: float) -> list[Job]:
    """The same jobs for a call that has more time, or less."""
    return [replace(job, seconds=factor * job.seconds, until=factor * job.until) for job in jobs]


def missing(needs: Iterable[str], facts: Facts | None) -> str | None:
    """Why a job cannot run on this machine, in one line; None where it can, or where nothing is
    known of the machine.

    needs: "gpu"; "nvidia", a GPU and not AMD's; "sm_80", that or a later one; "sm_90", that one and
    no other; else a module."""
    if facts is None:
        return None
    gpu, modules = facts.get("gpu"), facts.get("modules", {})
    for need in needs:
        if need in ("gpu", "nvidia") or need.startswith("sm_"):
            if gpu is None:
                return f"needs a GPU: {facts.get('why_no_gpu') or 'torch sees none'}"
            if need != "gpu" and gpu["vendor"] != "nvidia":
                return f"needs an NVIDIA GPU; this one is {gpu['name']} (ROCm)"
            if need.startswith("sm_"):
                has, wanted = 10 * gpu["capability"][0] + gpu["capability"][1], int(need[3:])
                if has < wanted or (need == "sm_90" and has != wanted):
                    return f"needs {need}; {gpu['name']} is sm_{has}"
        elif not modules.get(need):
            return f"needs {need}, which is not installed"
    return None
