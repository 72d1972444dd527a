"""From settings to rows: for every number of tokens and every loss, all providers in turns.

Each loss has the bare products in its turns, so that the ratio to the floor is one of the same
minutes. A provider is first asked why it cannot run, then its gradient error is taken, then it is
warmed up, and only then timed; where any of it fails the row says why and the others go on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.bench.accuracy import Truth, truth
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.problem import Problem
from benchmarks.bench.providers import GEMMS, PROVIDERS, runner, why_not
from benchmarks.bench.results import Row
from benchmarks.bench.timing import Call, Turns, check_fits, free, reason_of, take_turns

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured, beside the problem."""

    tokens: list[int]
    losses: list[str]
    providers: list[str]
    repeats: int
    device: str


def measure(
    problem: Problem, settings: Settings, say: Say, snapshot: Path | None = None
) -> Iterator[list[Row]]:
    """The rows of each loss as soon as they are there. `problem` has the most tokens. snapshot: a
    file for the allocations of the first loss; those of all would be too many to look at."""
    if snapshot:
        torch.cuda.memory._record_memory_history()
    errors: dict[tuple[str, str], float] = {}
    for tokens in settings.tokens:
        part = problem.first(tokens)
        for loss in settings.losses:
            rows = measure_loss(loss, part, settings, errors, say)
            if snapshot:
                torch.cuda.memory._dump_snapshot(str(snapshot))
                torch.cuda.memory._record_memory_history(enabled=None)
                snapshot = None
            yield rows


def measure_loss(
    loss: str, problem: Problem, settings: Settings, errors: dict[tuple[str, str], float], say: Say
) -> list[Row]:
    """errors: of (loss, provider), filled here; they are taken at the first number of tokens."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what was compiled for another number of tokens
    tokens, device = problem.hidden.shape[0], settings.device
    names = [GEMMS, *(name for name in settings.providers if loss in PROVIDERS[name].losses)]
    new = [name for name in names if name != GEMMS and (loss, name) not in errors]
    exact = truth_or_none(loss, problem, say) if new else None
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    for name in names:
        try:
            reason = None if name == GEMMS else why_not(name, problem)
            if reason is None:
                calls[name] = prepared(name, loss, problem)
                if exact is not None and name in new:
                    errors[loss, name] = exact.error_of(calls[name][0])
                calls[name][0](problem)  # the warm-up
        except Exception as error:  # a row that fails is a result
            calls.pop(name, None)
            reason = reason_of(error)
        if reason is not None:
            reasons[name] = reason
            free(device)
        say(f"{tokens} tokens, {loss}, {name}: {reason or 'warm'}")
    measured, failed = take_turns(calls, settings.repeats, device)
    reasons |= failed
    floor = measured.get(GEMMS)

    def row(name: str) -> Row:
        error = errors.get((loss, name))
        if name not in measured:
            return Row(tokens, loss, name, error=error, reason=reasons[name])
        mine: Turns = measured[name]
        over = None if mine.peak is None else max(0, mine.peak - problem.gradient_bytes)
        return Row(
            tokens, loss, name, mine.forward, mine.backward, mine.both,
            None if floor is None else mine.both.median / floor.both.median,
            mine.peak, over, error,
        )  # fmt: skip

    return [row(name) for name in names]


def prepared(name: str, loss: str, problem: Problem) -> Call:
    problem.ready_for(LOSSES[loss].teacher)
    run = runner(name, loss)
    if name == GEMMS or PROVIDERS[name].holds_logits:
        check_fits(run, problem)
    return run, problem


def truth_or_none(loss: str, problem: Problem, say: Say) -> Truth | None:
    """None where float64 cannot be had; the table then has no errors of this loss."""
    try:
        return truth(loss, problem)
    except Exception as error:
        say(f"no gradient errors of {loss}: {reason_of(error)}")
        return None
