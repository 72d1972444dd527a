"""Tensors made under torch.inference_mode(), as generation and scoring leave them: autograd saves
none. Per-token ones are copied; what is large is not, and refused by name where it would be saved.
"""

from __future__ import annotations

import pytest
import torch
from problems import OBJECTIVES, make_problem, with_everything

from tropd_kernels import distillation_loss, linear_distillation_loss, linear_log_probs

BACKENDS = ["reference", "torch", "native", "triton"]


def inferred(tensor):
    with torch.inference_mode():
        return tensor.clone()


def problem_on(device):
    problem = with_everything(make_problem(device=device))
    hidden, weight, bias = (t.float() for t in (problem.hidden, problem.weight, problem.bias))
    return problem, hidden.requires_grad_(), weight, bias


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("form", "name"), [("top_k", "tropd_ppo"), ("sampled", "opd_ppo"), (None, "sft")]
)
def test_per_token(form, name, reduction, backend, device):
    problem, hidden, weight, bias = problem_on(device)
    options = {k: v for k, v in problem.options.items() if k != "temperature"}

    def gradient(made):
        teacher = None
        if form is not None:
            given = problem.teacher(form, torch.float32)
            teacher = type(given)(*(made(t) for t in vars(given).values() if t is not None))
        per_token = {k: made(v.float() if v.is_floating_point() else v) for k, v in options.items()}
        loss = linear_distillation_loss(
            hidden, weight, made(problem.labels), teacher, OBJECTIVES[name], bias=made(bias),
            reduction=reduction, backend=backend, **per_token,
        ).loss  # fmt: skip
        return torch.autograd.grad(loss.sum(), hidden)[0]

    assert torch.equal(gradient(inferred), gradient(torch.clone))


def losses(problem, hidden, weight, form, backend, change):
    """By name: calls with something large from inference mode."""
    plain, teacher = problem.teacher(form, torch.float32), problem.teacher(form, torch.float32)
    for name, value in vars(teacher).items():
        if name in ("hidden", "weight", "logits") and change == name:
            object.__setattr__(teacher, name, inferred(value))
    common = dict(objective=OBJECTIVES["gkd"], backend=backend)
    logits, labels = hidden @ weight.T, problem.labels
    return {
        "mean": lambda: linear_distillation_loss(hidden, weight, labels, teacher, **common).loss,
        "none": lambda: (
            linear_distillation_loss(
                hidden, weight, labels, teacher, reduction="none", **common
            ).loss
        ),
        "logits": lambda: distillation_loss(logits, labels, teacher, **common).loss,
        "head": lambda: (
            linear_distillation_loss(
                hidden, inferred(weight), labels, plain, reduction="none", **common
            ).loss
        ),
        "log_probs": lambda: linear_log_probs(hidden, inferred(weight), labels, backend=backend),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("form", "change"), [("hidden", "hidden"), ("hidden", "weight"), ("logits", "logits")]
)
def test_large(form, change, backend, device):
    problem, hidden, weight, _ = problem_on(device)
    calls = losses(problem, hidden, weight, form, backend, change)
    for name, call in calls.items():
        of = "student weight" if name in ("head", "log_probs") else f"teacher {change}"
        if name == "mean" or (backend == "reference" and of.startswith("teacher")):
            call().sum().backward()
            continue
        with pytest.raises(RuntimeError, match=rf"{of} was made under.*no_grad\(\).*clone\(\)"):
            call()
        with torch.no_grad():  # where nothing is saved
            call()
