"""The arm of `cost` whose head's gradient is exact along the mean of the hidden states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl", reason="the trainer needs trl")

from gradient_samples import (  # noqa: F401
    counted,
    exact,
    near,
    one_thread,
    peaked_problem,
    small_chunks_fixture,
    token_gradients,
)
from problems import OBJECTIVES
from sharding import arguments

from benchmarks.evidence import exact_mean
from benchmarks.evidence.experiments import COST
from benchmarks.learning import arms, models
from benchmarks.learning.run import Run
from tropd_kernels import linear_distillation_loss

pytestmark = pytest.mark.slow  # of our own tools, not of the package

RULE = OBJECTIVES["gkd"]


def gradients(problem, seed, along_mean):
    """Of hidden states and head, from a sample."""
    teacher, options = arguments(problem, RULE, "hidden", torch.float64)
    hidden, weight = (t.clone().requires_grad_() for t in (problem.hidden, problem.weight))

    def loss(hidden, weight, tolerance):
        return linear_distillation_loss(
            hidden, weight, problem.labels, teacher, RULE, backend="torch", seed=seed,
            gradient_tolerance=tolerance, **options,
        )  # fmt: skip

    if along_mean:
        out = exact_mean.exact_along_mean(loss, hidden, weight, problem.labels >= 0, 0.3)
    else:
        out = loss(hidden, weight, 0.3)
    assert out.gradient_share < 0.5
    return torch.autograd.grad(out.loss, (hidden, weight))


def test_exact_along_the_mean_and_unbiased_across_it(small_chunks):
    """Catches a part along the mean that is missing, twice there or sampled, another call's sample,
    and a mean over tokens that do not count."""
    problem = peaked_problem(tokens=32, vocab_size=301, width=8, full=False)
    del problem.options["token_weight"]
    problem.hidden += 2
    problem.weight -= problem.weight.mean(1, keepdim=True)  # leaves the logits as they were
    problem.labels[:5], problem.hidden[:5] = -100, -9
    tokens = counted(problem)
    mean = problem.hidden[tokens].mean(0)
    mean /= mean.norm()
    truth = exact(problem, token_gradients(problem, RULE))["weight"]
    errors = []
    for seed in range(100):
        plain_hidden, plain = gradients(problem, seed, along_mean=False)
        d_hidden, d_weight = gradients(problem, seed, along_mean=True)
        error, plain_error = d_weight - truth, plain - truth
        assert torch.equal(d_hidden, plain_hidden)
        assert (plain_error @ mean).norm() > 0.1 * plain_error.norm(), "there is something to take"
        rounding = 100 * torch.finfo(torch.float64).eps * truth.norm()
        assert (error @ mean).norm() < rounding
        across = plain_error - torch.outer(plain_error @ mean, mean)
        assert (error - across).norm() < rounding
        errors.append(error)
    each = torch.stack(errors)
    for direction in (truth, torch.randn_like(truth), torch.randn_like(truth)):
        assert near((each * direction).sum((1, 2)), 0.0)  # within four standard errors


def test_one_arm_is_exact_along_the_mean(tmp_path, monkeypatch):
    """From the arm's name to the head's gradient at the first step, of all ids and sampled."""
    plain, along_mean = "gkd_tolerance_0.03", f"gkd_tolerance_0.03{exact_mean.SUFFIX}"
    found, directions, combine = {}, [], exact_mean.exact_along_mean

    def load(recipe, seed, folder):
        model = models.build(replace(recipe, width=16, layers=1), seed)
        with torch.no_grad():
            model.lm_head.weight *= 100  # peaked: else all ids are kept
        model.lm_head.weight.register_hook(lambda grad: found.setdefault(run.arm, grad.clone()))
        return model.eval()

    def watched(loss, hidden, weight, counts, tolerance):
        mean = hidden.detach()[counts].mean(0)
        directions.append(mean / mean.norm())
        return combine(loss, hidden, weight, counts, tolerance)

    monkeypatch.setattr(arms, "BATCH", 4)
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models, "evaluate", lambda *_: {"accuracy": 0.0, "notation": 0.0})
    monkeypatch.setattr(exact_mean, "exact_along_mean", watched)
    for arm in ("gkd", plain, along_mean):
        run = Run("long_tail_far", arm, 1, steps=1)
        COST.record_of(run, COST.arms[arm], tmp_path)
    (mean,) = directions
    errors = {arm: found[arm] - found["gkd"] for arm in (plain, along_mean)}
    assert (errors[plain] @ mean).norm() > 1e-3 * found["gkd"].norm()
    assert (errors[along_mean] @ mean).norm() < 1e-5 * found["gkd"].norm()
    assert errors[along_mean].norm() > 1e-3 * found["gkd"].norm()
