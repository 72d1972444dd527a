"""A sampled gradient is unbiased, and as far off as `gradient_error` says."""

import math

import pytest
import torch
from gradient_samples import (  # noqa: F401
    TOLERANCE,
    call,
    exact,
    near,
    one_thread,
    peaked_problem,
    sample,
    small_chunks_fixture,
    token_gradients,
)
from problems import OBJECTIVES, make_problem, relative_error

from tropd_kernels import SFT
from tropd_kernels.loss.sampling import GradientSampling


@pytest.mark.parametrize(
    ("trained", "options"),
    [
        (("hidden",), {"gradient_tolerance": 0.4}),
        (("weight",), {"gradient_sampling": 0.2}),
        (("hidden", "weight"), {"gradient_tolerance": 0.4}),
        (("hidden", "weight"), {"gradient_sampling": 0.2}),
    ],
    ids=str,
)
def test_unbiased_and_as_far_off_as_stated(trained, options, small_chunks):
    """Over many seeds: the mean error is what is left of chance, the mean square is the formula's,
    and so is the one that a call states: of d_hidden to the last digit, of d_weight on average."""
    problem = peaked_problem(tokens=16, vocab_size=101, width=4, full=False)
    rule, runs = OBJECTIVES["reverse_kl"], 300
    d_logits = token_gradients(problem, rule)
    truth = exact(problem, d_logits)
    errors = {name: [] for name in trained}
    stated, shares = [], []
    for seed in range(runs):
        out, gradients = call(problem, rule, "torch", trained=trained, seed=seed, **options)
        for name in trained:
            errors[name].append(gradients[name] - truth[name])
        stated.append((out.gradient_error * gradients[trained[0]].norm()) ** 2)
        shares.append(out.gradient_share)
    expected = sample(problem, d_logits, options | {"seed": 0}, trained=trained)
    for name in trained:
        each = torch.stack(errors[name])
        squares = each.square().sum((1, 2))
        variance = expected.variance[name]
        assert variance > 0.01 * truth[name].square().sum(), "the sample is a real one"
        assert near(squares, variance)
        # The mean's squared error is chi-square-like around variance / runs.
        assert each.mean(0).square().sum() < 2 * variance / runs
        for direction in (truth[name], torch.ones_like(truth[name])):
            assert near((each * direction).sum((1, 2)), 0.0)
    assert near(torch.stack(shares), float(torch.stack(expected.probabilities).mean()))
    if trained == ("hidden",):
        for each in stated:
            torch.testing.assert_close(float(each), expected.variance["hidden"], rtol=1e-9, atol=0)
    elif trained == ("weight",):
        assert near(torch.stack(stated), expected.variance["weight"])


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("trained", [("weight",), ("hidden", "weight")], ids=str)
def test_hidden_states_of_a_common_direction(mean, trained):
    """There the columns' signs count: ids that all tokens push the same way bring far more to
    d_weight than their squares say, and a choice by those alone would be 2.3 times as far off."""
    problem = make_problem(64, 1001, spread=2.5)
    problem.hidden += mean
    problem.weight -= problem.weight.mean(1, keepdim=True)  # leaves the logits as they were
    d_logits = token_gradients(problem, SFT())
    truth = exact(problem, d_logits)["weight"]
    squares, shares = [], []
    for seed in range(20):
        out, gradients = call(
            problem, SFT(), "torch", trained=trained, gradient_tolerance=0.3, seed=seed
        )
        squares.append(relative_error(gradients["weight"], truth) ** 2)
        shares.append(float(out.gradient_share))
    assert max(shares) < 0.5
    # Random directions are not quite independent, and the two gradients share one tolerance.
    most = 0.42 if mean == 0 or "hidden" in trained else 0.33
    assert 0.24 < math.sqrt(sum(squares) / len(squares)) < most


def test_a_square_of_the_mean_counts_once():
    """Hidden states that are all the same have nothing but their mean: sizes are exact there."""
    problem = make_problem(20, 301, spread=4)
    problem.hidden[:] = problem.hidden[0]
    d_logits = token_gradients(problem, SFT())
    truth = exact(problem, d_logits)["weight"].square().sum(1)
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        patch.setattr(
            GradientSampling, "probabilities", lambda _, e: seen.append(e) or torch.ones_like(e)
        )
        call(problem, SFT(), "torch", trained=("weight",), **TOLERANCE)
    torch.testing.assert_close(seen[0].square(), truth / truth.sum(), rtol=1e-10, atol=1e-20)
