"""The error of a provider's gradients against float64, on the first tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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


def truth(loss: str, problem: Problem) -> Truth:
    """Raises MemoryError where float64 would take more than there is."""
    vocab_size, width = problem.weight.shape
    tokens = min(TOKENS, problem.hidden.shape[0])
    # Two heads, one gradient, and some copies of the logits.
    a_row = 2 * width + problem.teacher_weight.shape[1] + 12 * tokens
    check_room(8 * vocab_size * a_row, problem.hidden.device)
    part, form = problem.first(TOKENS), LOSSES[loss].teacher
    exact = runner("eager", loss)(problem.first(TOKENS, torch.float64).ready_for(form))
    return Truth(part.ready_for(form), exact)
