"""torch.func: its gradients are autograd's, and what cannot work says so in our words. A custom
op's autograd alone ends in PyTorch's about `setup_context`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tropd_kernels import (
    GKD,
    HiddenTeacher,
    TrOPD,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)
from tropd_kernels.gathering import gathered_tokens

N, V, H = 6, 30, 8
BACKENDS = ["reference", "torch", "native", "triton"]
KINDS = ["mean", "none", "log_probs", "logits"]


def loss_of(kind, backend, device):
    """f(hidden, weight), and these."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, teacher_hidden, teacher_weight = (
        torch.randn(n, H, generator=draw).to(device) for n in (N, V, N, V)
    )
    labels = torch.randint(V, (N,), generator=draw).to(device)
    teacher = HiddenTeacher(teacher_hidden, teacher_weight)

    def loss(hidden, weight):
        if kind == "log_probs":
            return linear_log_probs(hidden, weight, labels, backend=backend).sum()
        if kind == "logits":
            logits = hidden @ weight.T
            return distillation_loss(logits, labels, teacher, GKD(), backend=backend).loss
        return linear_distillation_loss(
            hidden, weight, labels, teacher, TrOPD(top_k=5), seed=1, reduction=kind, backend=backend
        ).loss.sum()

    return loss, hidden, weight


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd(kind, backend, device):
    loss, hidden, weight = loss_of(kind, backend, device)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(*leaves)
    truth = torch.autograd.grad(value, leaves)

    gradients, found = torch.func.grad_and_value(loss, argnums=(0, 1))(hidden, weight)
    assert torch.equal(found, value)
    _, pull_back = torch.func.vjp(loss, hidden, weight)
    doubled = pull_back(torch.full((), 2.0, device=device))
    for ours, twice, expected in zip(gradients, doubled, truth, strict=True):
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(twice, 2 * expected)


def test_of_a_module_whose_parameters_are_arguments(device):
    loss, hidden, weight = loss_of("mean", "torch", device)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Parameter(torch.zeros_like(weight))

        def forward(self, hidden):
            return loss(hidden, self.head)

    def of(parameters):
        return torch.func.functional_call(Model(), parameters, (hidden,))

    gradient = torch.func.grad(of)({"head": weight})["head"]
    torch.testing.assert_close(gradient, torch.func.grad(loss, argnums=1)(hidden, weight))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_refused(kind, backend, device):
    loss, hidden, weight = loss_of(kind, backend, device)
    name = "logits" if kind == "logits" else "hidden"
    several = hidden.expand(2, N, H)
    for function in (loss, torch.func.grad(loss)):
        with pytest.raises(NotImplementedError, match=f"{name} is batched by torch.vmap"):
            torch.vmap(function, in_dims=(0, None))(several, weight)
    # A map over something else leaves the loss as it is.
    found = torch.vmap(lambda factor: factor * loss(hidden, weight))(torch.ones(2, device=device))
    torch.testing.assert_close(found, loss(hidden, weight).expand(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_incoming_gradients(kind, backend, device):
    """By jacrev, and by the older is_grads_batched, which vectorize=True uses."""
    loss, hidden, weight = loss_of(kind, backend, device)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(*leaves)
    truth = torch.autograd.grad(value, leaves, retain_graph=True)
    factors = torch.tensor([1.0, -3.0, 0.5], device=device)
    batched = torch.autograd.grad(value, leaves, factors, is_grads_batched=True)
    jacobian = torch.func.jacrev(lambda *args: factors * loss(*args), argnums=(0, 1))
    for other in (batched, jacobian(hidden, weight)):
        for ours, expected in zip(other, truth, strict=True):
            torch.testing.assert_close(ours, factors[:, None, None] * expected)


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused_as_outside(kind, device):
    loss, hidden, weight = loss_of(kind, "torch", device)

    def norm(hidden):
        return torch.func.grad(loss)(hidden, weight).square().sum()

    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.func.grad(norm)(hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_is_refused_but_by_the_reference(kind, device):
    loss, hidden, weight = loss_of(kind, "torch", device)
    for transform in (torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(NotImplementedError, match="forward-mode .*backend='reference'"):
            transform(loss)(hidden, weight)
    loss, *_ = loss_of(kind, "reference", device)
    ours = torch.func.jacfwd(loss, argnums=(0, 1))(hidden, weight)
    for forward, backward in zip(ours, torch.func.jacrev(loss, (0, 1))(hidden, weight)):
        torch.testing.assert_close(forward, backward)
    assert torch.func.hessian(loss)(hidden, weight).isfinite().all()


def test_ranks_exchange_nothing_inside(group):
    _, hidden, weight = loss_of("mean", "torch", "cpu")
    labels = torch.zeros(N, dtype=torch.int64)

    def sharded(hidden):
        return linear_log_probs(hidden, weight, labels, process_group=group).sum()

    with pytest.raises(NotImplementedError, match="process_group inside a torch.func transform"):
        torch.func.grad(sharded)(hidden)
    with pytest.raises(NotImplementedError, match="gathered_tokens inside a torch.func transform"):
        torch.func.grad(lambda hidden: gathered_tokens(hidden, group).sum())(hidden)
