"""The error of a provider's gradients against float64, on the first tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.bench.budget import Cost
from benchmarks.bench.losses import LOSSES
from benchmarks.bench.problem import Gradients, Problem
from benchmarks.bench.providers import Runner, runner
from benchmarks.bench.timing import check_room

#: Tokens that the error is taken on: float64 holds all their logits.
TOKENS = 64


@dataclass(frozen=True)
class Truth:
    """The first tokens of a problem, and their gradients by eager PyTorch in float64, from the same
    inputs unrounded."""

    part: Problem
    gradients: Gradients

    def error_of(self, run: Runner) -> float:
        """The larger relative error of d_hidden and d_weight. Each counts by its own norm, or the
        head's would drown the other."""
        errors = [
            (ours.double() - exact).square().sum() / exact.square().sum()
            for ours, exact in zip(run(self.part), self.gradients, strict=True)
        ]
        return float(torch.stack(errors).max().sqrt())


def truth(loss: str, problem: Problem, budget: float | None = None) -> Truth:
    """Raises MemoryError where float64 would take more than there is, and OutOfTime where it would
    take more than `budget` seconds."""
    vocab_size, width = problem.weight.shape
    tokens = min(TOKENS, problem.hidden.shape[0])
    # Two heads, one gradient, and some copies of the logits.
    a_row = 2 * width + problem.teacher_weight.shape[1] + 12 * tokens
    check_room(8 * vocab_size * a_row, problem.hidden.device)
    part, form = problem.first(TOKENS), LOSSES[loss].teacher
    wide, run = problem.first(TOKENS, torch.float64), runner("eager", loss)
    if budget is not None:
        Cost().check(lambda n: partial(run, wide.first(n).ready_for(form)), [tokens], budget)
    exact = run(wide.ready_for(form))
    return Truth(part.ready_for(form), exact)
