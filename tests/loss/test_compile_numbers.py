"""One compiled graph for all values of a call's numbers, of which a schedule varies some at every
step: as constants of the graph each would compile anew, and the ninth be refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tropd_kernels import (
    HiddenTeacher,
    LogitsTeacher,
    TrOPD,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)

V, H = 30, 8
RULE = TrOPD(top_k=5)


def mean(hidden, weight, labels, teacher_hidden, teacher_weight, x, n):
    teacher = HiddenTeacher(teacher_hidden, teacher_weight, logit_scale=x - 0.1, softcap=x + 5.0)
    out = linear_distillation_loss(
        hidden, weight, labels, teacher, RULE, seed=n, temperature=x, logit_scale=x + 0.3,
        softcap=x + 4.0, normalizer=x + 1.0, max_workspace_bytes=10**7 + n, backend="torch",
    )  # fmt: skip
    return out.loss


def per_token(hidden, weight, labels, teacher_hidden, teacher_weight, x, n):
    logits = LogitsTeacher(teacher_hidden @ teacher_weight.T)
    more = dict(temperature=x, backend="torch")
    loss = linear_distillation_loss(
        hidden, weight, labels, logits, RULE, seed=n, logit_scale=-x, reduction="none", **more
    ).loss
    log_probs = linear_log_probs(hidden, weight, labels, softcap=x, **more)
    existing = distillation_loss(hidden @ weight.T, labels, logits, RULE, seed=n, **more).loss
    return loss.sum() + log_probs.sum() + existing


def by_tolerance(hidden, weight, labels, teacher_hidden, teacher_weight, x, n):
    teacher = HiddenTeacher(teacher_hidden, teacher_weight)
    out = linear_distillation_loss(
        hidden, weight, labels, teacher, RULE, seed=n, gradient_tolerance=x / 10, backend="torch"
    )
    return out.loss * out.gradient_share + out.gradient_error


def by_share(hidden, weight, labels, teacher_hidden, teacher_weight, x, n):
    teacher = HiddenTeacher(teacher_hidden, teacher_weight)
    out = linear_distillation_loss(
        hidden, weight, labels, teacher, RULE, seed=n, gradient_sampling=x / 10, backend="torch"
    )
    return out.loss * out.gradient_share


@pytest.mark.parametrize(
    ("step", "dynamic"),
    [
        (mean, None),
        pytest.param(mean, True, marks=pytest.mark.slow),
        pytest.param(per_token, None, marks=pytest.mark.slow),
        (by_tolerance, True),
        pytest.param(by_share, None, marks=pytest.mark.slow),
    ],
)
def test_nine_values_and_lengths_share_a_graph(step, dynamic, device):
    """The first value may be a constant; from the second on the graph holds for all."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=dynamic)
    head, teacher_head = torch.randn(2, V, H, device=device)
    for i in range(9):
        hidden, teacher_hidden = torch.randn(2, 6 + i, H, device=device)
        labels = torch.randint(V, (6 + i,), device=device)
        labels[1] = -100
        found = []
        for run in (step, compiled):
            leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
            loss = run(*leaves, labels, teacher_hidden, teacher_head, 0.9 + i / 11, i + 3)
            found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        for eager, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 2


def test_a_value_that_breaks_a_condition_of_the_graph_is_refused(device):
    torch._dynamo.reset()
    hidden, weight = torch.randn(6, H, device=device), torch.randn(V, H, device=device)
    labels = torch.randint(V, (6,), device=device)

    def log_probs(temperature, scale):
        return linear_log_probs(
            hidden, weight, labels, temperature=temperature, logit_scale=scale, backend="torch"
        )

    compiled = torch.compile(log_probs, fullgraph=True, backend="aot_eager")
    for good in (0.7, 0.8, 0.9):
        torch.testing.assert_close(compiled(good, good), log_probs(good, good))
    numbers = (0.0, 1.1), (-0.7, 1.1), (math.inf, 1.1), (math.nan, 1.1), (1.1, 0.0), (1.1, math.inf)
    for bad in numbers:
        with pytest.raises(Exception, match="must be (a positive number|finite)"):
            compiled(*bad)


def test_a_divisor_that_breaks_a_condition_of_the_graph_is_refused(device):
    torch._dynamo.reset()
    hidden, weight = torch.randn(6, H, device=device), torch.randn(V, H, device=device)
    labels = torch.randint(V, (6,), device=device)
    teacher = LogitsTeacher(torch.randn(6, V, device=device))

    def loss(normalizer):
        return linear_distillation_loss(
            hidden, weight, labels, teacher, RULE, seed=1, normalizer=normalizer, backend="torch"
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for good in (0.7, 8.0):
        torch.testing.assert_close(compiled(good), loss(good))
    for bad in (0.0, -2.0, math.inf, math.nan):
        with pytest.raises(Exception, match="normalizer must be a positive number"):
            compiled(bad)


def test_a_rule_made_inside_is_a_constant_of_the_graph(device):
    """Its numbers are symbols there, too, where shapes are, but its key is a string."""
    torch._dynamo.reset()
    hidden, weight = torch.randn(6, H, device=device), torch.randn(V, H, device=device)
    labels = torch.randint(V, (6,), device=device)
    teacher = LogitsTeacher(torch.randn(6, V, device=device))

    def loss(x):
        rule = TrOPD(top_k=5, gate="expected", prefix_weight=x, entropy_coef=x / 2)
        prefix = labels > 14
        return linear_distillation_loss(
            hidden, weight, labels, teacher, rule, teacher_prefix=prefix, backend="torch"
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for x in (0.3, 0.4):
        torch.testing.assert_close(compiled(x), loss(x))
