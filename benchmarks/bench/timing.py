"""Times and memory of providers that take turns, and whether a function that holds all logits fits.

    measured, failed = take_turns({"eager": call, "native": call}, repeats=5, device="cpu")
    measured["native"].forward.median, measured["native"].peak

Each turn times a call's forward and its backward, in the order in which the providers stand; after
them one more call each is for its peak of memory (`benchmarks.measure.peak_memory`). Who fails
drops out with the reason, and the others go on.
"""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.bench.budget import OutOfTime
from benchmarks.bench.problem import Problem
from benchmarks.bench.providers import Runner
from benchmarks.measure import Times, available_memory, peak_memory, summary, synchronize

#: Tokens of the two runs from which the memory of all logits is extrapolated.
PROBES = (256, 512)
#: Copies of float32 logits that an eager loss may come to hold; where twice as many fit, nothing is
#: extrapolated.
COPIES = 8
#: Of the free memory, what a run may take.
FREE_SHARE = 0.9


@dataclass(frozen=True)
class Turns:
    """Seconds of each half and of both; bytes over the inputs, None where no mark can be read."""

    forward: Times
    backward: Times
    both: Times
    peak: int | None


Call = tuple[Runner, Problem]


def take_turns(
    calls: Mapping[str, Call], repeats: int, device: str
) -> tuple[dict[str, Turns], dict[str, str]]:
    """The providers' measurements, and by name why the others have none. Every call has been warmed
    up already."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    peaks: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    gc.collect()
    frozen = gc.get_freeze_count()  # by the caller, who goes on without it
    gc.freeze()  # each turn collects garbage: not all of torch again
    try:
        for turn in range(repeats + 1):
            for name, call in calls.items():
                if name in failed:
                    continue
                try:
                    if turn < repeats:
                        gc.collect()
                        seconds[name].append(one_turn(call, device))
                    else:
                        peaks[name] = peak_memory(partial(one_turn, call, device), device=device)
                except Exception as error:  # a row that fails is a result
                    failed[name] = reason_of(error)
                if name in failed:  # only now is what it held without an owner
                    empty_cache(device)
    finally:
        if not frozen:
            gc.unfreeze()

    def turns(name: str) -> Turns:
        forward, backward = zip(*seconds[name])
        return Turns(
            summary(forward), summary(backward), summary([sum(pair) for pair in seconds[name]]),
            peaks[name],
        )  # fmt: skip

    return {name: turns(name) for name in calls if name not in failed}, failed


def one_turn(call: Call, device: str) -> tuple[float, float]:
    """Seconds of forward and backward."""
    run, problem = call
    start = time.perf_counter()
    state = run.forward(problem)
    synchronize(device)
    middle = time.perf_counter()
    run.backward(problem, state)
    synchronize(device)
    return middle - start, time.perf_counter() - middle


def runs_to_fit(problem: Problem) -> list[int]:
    """Tokens of the runs that `check_fits` makes; none where the logits surely fit, or where on a
    GPU an allocation that fails is an error like others."""
    tokens = problem.hidden.shape[0]
    has = None if problem.hidden.is_cuda else available_memory()
    logits = 4 * tokens * problem.weight.shape[0]
    if has is None or tokens <= max(PROBES) or 2 * COPIES * logits < has:
        return []
    return [n for n in PROBES for _ in range(2)]


def check_fits(run: Runner, problem: Problem) -> None:
    """`check_room` for a function that holds all logits; what it would need is extrapolated from
    two small runs."""
    if not runs_to_fit(problem):
        return
    tokens, (few, more), peaks = problem.hidden.shape[0], PROBES, {}
    for n in PROBES:
        part = problem.first(n)
        run(part)
        peaks[n] = peak_memory(lambda part=part: run(part))
    if peaks[few] is None or peaks[more] is None:
        return
    needs = peaks[more] + (tokens - more) * (peaks[more] - peaks[few]) / (more - few)
    check_room(needs, problem.hidden.device)


def check_room(needs: float, device: str | torch.device) -> None:
    """Raises MemoryError where this many bytes are not free, on a CPU that says what it has: a
    system that runs out of memory kills the whole run."""
    has = None if torch.device(device).type == "cuda" else available_memory()
    if has is not None and needs > FREE_SHARE * has:
        raise MemoryError(f"needs about {needs / 1e9:.1f} GB, {has / 1e9:.1f} GB are free")


def reason_of(error: Exception) -> str:
    """One line, without the folders of the machine."""
    text = (str(error).strip() or type(error).__name__).split("\n")[0]
    text = re.sub(r"(?:/[\w.+~-]+){2,}", lambda path: path[0].rsplit("/", 1)[1], text)
    if isinstance(error, OutOfTime):
        return f"out of time ({text})"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"out of memory ({text})"
    if "can't allocate memory" in text:  # torch's CPU allocator, a RuntimeError
        asked = text[text.index("you tried") :] if "you tried" in text else text
        return f"out of memory ({asked})"
    return f"{type(error).__name__}: {text}"


def empty_cache(device: str) -> None:
    """After a failure, so that the next provider has what the last one left."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
