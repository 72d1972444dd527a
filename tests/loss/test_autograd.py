"""What autograd does around a call: activation checkpoints, forward-mode differentiation, and a
backward that makes the logits again, by the plan and the budget of the forward."""

from __future__ import annotations

import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from tropd_kernels import (
    GKD,
    Divergence,
    HiddenTeacher,
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


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_shard_inside_an_activation_checkpoint(reduction, group):
    hidden, weight, labels, teacher = batch("cpu")

    def loss(hidden, weight):
        return linear_distillation_loss(
            hidden, weight, labels, teacher, GKD(), reduction=reduction, process_group=group
        ).loss.sum()

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    checkpoint(loss, hidden, weight, use_reentrant=False).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), plain)


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


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_the_backward_finds_the_one_id_of_a_peaked_teacher(backend, device):
    """Its log-prob is nearly 0, and rounds as the logit of 40 that it is the difference of. A
    product of another height, as of the tokens too that do not count, would lose it for a last
    bit, and with it the whole gradient."""
    rule, labels = Divergence("forward_kl", top_k=1), torch.tensor([3, 5] + [-100] * 7).to(device)
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        hidden, head = (torch.randn(n, 1024, generator=rng).to(device) for n in (9, 1500))
        student = torch.randn(9, 1500, generator=rng).to(device)
        head *= 10 / 1024**0.5
        gradients = []
        for teacher in (HiddenTeacher(hidden, head), LogitsTeacher(hidden @ head.T)):
            z = student.clone().requires_grad_()
            distillation_loss(z, labels, teacher, rule, backend=backend).loss.backward()
            gradients.append(z.grad)
        found, expected = gradients
        assert (found - expected).norm() <= 1e-3 * expected.norm()
