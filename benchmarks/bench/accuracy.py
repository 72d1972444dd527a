"""The error of a provider's gradients against float64, on the first tokens."""

from __future__ import annotations

import torch

from benchmarks.bench.problem import Gradients, Problem
from benchmarks.bench.providers import Runner, runner

#: Tokens that the error is taken on: float64 holds all their logits.
TOKENS = 64


def exact_gradients(loss: str, problem: Problem) -> Gradients:
    """By eager PyTorch in float64, from the same inputs unrounded."""
    return runner("eager", loss)(problem.first(TOKENS, torch.float64))


def gradient_error(run: Runner, problem: Problem, exact: Gradients) -> float:
    """The larger relative error of d_hidden and d_weight. Each counts by its own norm, or the
    head's would drown the other."""
    found = run(problem.first(TOKENS))
    errors = [
        (ours.double() - truth).square().sum() / truth.square().sum()
        for ours, truth in zip(found, exact, strict=True)
    ]
    return float(torch.stack(errors).max().sqrt())
