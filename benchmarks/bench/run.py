"""From settings to rows: for every number of tokens and every loss, all providers in turns.

Each loss has the bare products in its turns, so that the ratio to the floor is one of the same
minutes. A provider is first asked why it cannot run, then what it would take is estimated, then its
gradient error is taken, then it is warmed up, and only then timed; where any of it fails, or the
row would take more than the budget, the row says why and the others go on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks.bench.accuracy import TOKENS, Truth, truth
from benchmarks.bench.budget import Cost, OutOfTime
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.problem import Problem
from benchmarks.bench.providers import GEMMS, PROVIDERS, Runner, runner, why_not
from benchmarks.bench.results import Row
from benchmarks.bench.table import seconds
from benchmarks.bench.timing import (
    Call,
    Turns,
    check_fits,
    empty_cache,
    one_turn,
    reason_of,
    runs_to_fit,
    take_turns,
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured, besides the problem. budget: seconds of a row, None without a limit."""

    tokens: list[int]
    losses: list[str]
    providers: list[str]
    repeats: int
    device: str
    budget: float | None = None


@dataclass
class Known:
    """What runs on fewer tokens have shown, by loss and provider. errors: of the gradients."""

    errors: dict[tuple[str, str], float] = field(default_factory=dict)
    costs: dict[tuple[str, str], Cost] = field(default_factory=dict)


def measure(
    problem: Problem, settings: Settings, say: Say, snapshot: Path | None = None
) -> Iterator[list[Row]]:
    """The rows of each loss as soon as they are there. `problem` has the most tokens. snapshot: a
    file for the allocations of the first loss; those of all would be too many to look at."""
    if snapshot:
        torch.cuda.memory._record_memory_history()
    known = Known()
    for tokens in settings.tokens:
        part = problem.first(tokens)
        for loss in settings.losses:
            rows = measure_loss(loss, part, settings, known, say)
            if snapshot:
                torch.cuda.memory._dump_snapshot(str(snapshot))
                torch.cuda.memory._record_memory_history(enabled=None)
                snapshot = None
            yield rows


def measure_loss(
    loss: str, problem: Problem, settings: Settings, known: Known, say: Say
) -> list[Row]:
    """known: filled here."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # what was compiled for another number of tokens
    tokens, device, errors = problem.hidden.shape[0], settings.device, known.errors
    names = [GEMMS, *(name for name in settings.providers if loss in PROVIDERS[name].losses)]
    new = [name for name in names if name != GEMMS and (loss, name) not in errors]
    calls: dict[str, Call] = {}
    reasons: dict[str, str] = {}
    exact = None
    try:
        make_teacher(loss, problem, settings)
    except Exception as error:
        reasons = dict.fromkeys(names, reason_of(error))
        say(f"{tokens} tokens, {loss}: {reason_of(error)}{hint(error)}")
    else:
        exact = truth_or_none(loss, problem, settings, say) if new else None
    for name in (name for name in names if name not in reasons):
        try:
            reason = None if name == GEMMS else why_not(name, problem)
            outcome = reason
            if reason is None:
                takes_error = exact is not None and name in new
                calls[name] = prepared(name, loss, problem, settings, known, takes_error)
                if exact is not None and takes_error:
                    errors[loss, name] = exact.error_of(calls[name][0])
                start = time.perf_counter()
                one_turn(calls[name], device)
                outcome = f"warm after {seconds(time.perf_counter() - start)}"
        except Exception as error:  # a row that fails is a result
            calls.pop(name, None)
            reason = reason_of(error)
            outcome = f"{reason}{hint(error)}"
        if reason is not None:
            reasons[name] = reason
            empty_cache(device)
        say(f"{tokens} tokens, {loss}, {name}: {outcome}")
    measured, failed = take_turns(calls, settings.repeats, device)
    reasons |= failed
    floor = measured.get(GEMMS)

    def row(name: str) -> Row:
        error = errors.get((loss, name))
        if name not in measured:
            return Row(tokens, loss, name, error=error, reason=reasons[name])
        mine: Turns = measured[name]
        known.costs.setdefault((loss, name), Cost()).add(tokens, mine.both.median)
        over = None if mine.peak is None else max(0, mine.peak - problem.gradient_bytes)
        return Row(
            tokens, loss, name, mine.forward, mine.backward, mine.both,
            None if floor is None else mine.both.median / floor.both.median,
            mine.peak, over, error,
        )  # fmt: skip

    return [row(name) for name in names]


def make_teacher(loss: str, problem: Problem, settings: Settings) -> None:
    """The teacher in the form that the loss takes, which every provider is given."""
    form = LOSSES[loss].teacher
    if settings.budget is not None and not problem.is_ready_for(form):
        Cost().check(
            lambda n: partial(problem.first(n).ready_for, form), [problem.hidden.shape[0]],
            settings.budget, "the teacher's log-probs, made for all: ",
        )  # fmt: skip
    problem.ready_for(form)


def prepared(
    name: str, loss: str, problem: Problem, settings: Settings, known: Known, takes_error: bool
) -> Call:
    """Raises OutOfTime where the row would take more than the budget, and MemoryError where there
    is less memory than it needs."""
    run, tokens = runner(name, loss), problem.hidden.shape[0]
    holds_logits = name == GEMMS or PROVIDERS[name].holds_logits
    if settings.budget is not None:
        calls = [min(TOKENS, tokens)] if takes_error else []
        calls += runs_to_fit(problem) if holds_logits else []
        # The warm-up, the turns, and the one for memory.
        calls += [tokens] * (settings.repeats + 2)
        cost = known.costs.setdefault((loss, name), Cost())
        cost.check(partial(small_run, run, loss, problem, settings.device), calls, settings.budget)
    if holds_logits:
        check_fits(run, problem)
    return run, problem


def small_run(
    run: Runner, loss: str, problem: Problem, device: str, tokens: int
) -> Callable[[], object]:
    part = problem.first(tokens).ready_for(LOSSES[loss].teacher)
    return partial(one_turn, (run, part), device)


def truth_or_none(loss: str, problem: Problem, settings: Settings, say: Say) -> Truth | None:
    """None where float64 cannot be had; the table then has no errors of this loss."""
    try:
        return truth(loss, problem, settings.budget)
    except Exception as error:
        say(f"no gradient errors of {loss}: {reason_of(error)}{hint(error)}")
        return None


def hint(error: Exception) -> str:
    """How to ask for what was left out."""
    if not isinstance(error, OutOfTime):
        return ""
    return f"; --budget {error.sufficient} takes it, --budget 0 all"
