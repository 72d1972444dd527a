"""What autograd does around a call: activation checkpoints, forward-mode differentiation, a budget
that has to do for the backward too."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tropd_kernels import (
    GKD,
    LogitsTeacher,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)

V, H = 50, 8


def batch(device, tokens=6):
    hidden = torch.randn(tokens, H, device=device, requires_grad=True)
    weight = torch.randn(V, H, device=device, requires_grad=True)
    labels = torch.randint(V, (tokens,), device=device)
    return hidden, weight, labels, LogitsTeacher(torch.randn(tokens, V, device=device))


@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["mean", "none", "log_probs", "logits"])
def test_inside_an_activation_checkpoint(kind, reentrant, backend, device):
    """One that is not re-entrant hands out each saved tensor once."""
    hidden, weight, labels, teacher = batch(device)

    def loss(hidden, weight):
        if kind == "log_probs":
            return linear_log_probs(hidden, weight, labels, backend=backend).sum()
        if kind == "logits":
            logits = hidden @ weight.T
            return distillation_loss(logits, labels, teacher, GKD(), backend=backend).loss
        return linear_distillation_loss(
            hidden, weight, labels, teacher, GKD(), reduction=kind, backend=backend
        ).loss.sum()

    gradients = [torch.autograd.grad(loss(hidden, weight), (hidden, weight))]
    checkpoint(loss, hidden, weight, use_reentrant=reentrant).backward()
    gradients.append((hidden.grad, weight.grad))
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_forward_mode_is_refused(backend, device):
    """It would find a tangent of 0."""
    hidden, weight, labels, teacher = batch(device)

    def loss(weight):
        return linear_distillation_loss(
            hidden.detach(), weight, labels, teacher, GKD(), backend=backend
        ).loss

    weight = weight.detach()
    with pytest.raises(NotImplementedError, match="forward-mode differentiation .*reference"):
        torch.func.jvp(loss, (weight,), (torch.ones_like(weight),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        loss(forward_ad.make_dual(weight, torch.ones_like(weight)))
    with forward_ad.dual_level():  # nothing of ours is dual
        assert loss(weight).isfinite()


def test_a_budget_is_refused_before_the_backward(device):
    """The backward of reduction="none" needs more, and both walk by one plan."""
    hidden, weight, labels, teacher = batch(device, tokens=300)
    options = dict(reduction="none", backend="torch")

    def loss(budget):
        return linear_distillation_loss(
            hidden, weight, labels, teacher, GKD(), max_workspace_bytes=budget, **options
        ).loss

    with pytest.raises(ValueError, match="too small") as refused:
        loss(1)
    least = int(re.search(r"take (\d+) bytes", str(refused.value))[1])
    loss(least).sum().backward()
    with pytest.raises(ValueError, match=f"max_workspace_bytes={least - 1} is too small"):
        loss(least - 1)
    with torch.no_grad():  # no backward, no need
        loss(least - 1)
