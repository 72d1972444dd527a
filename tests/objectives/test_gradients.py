"""What may be differentiated, and how often. The defects are numbered as in `test_numbers`."""

from dataclasses import replace

import pytest
import torch
from problems import OBJECTIVES, K, make_problem, relative_error

from tropd_kernels import GKD, TrOPD, functional, linear_distillation_loss, linear_log_probs
from tropd_kernels.rows.layout import Stat

BACKENDS = ("torch", "native", "triton")
both = pytest.mark.parametrize("backend", BACKENDS)
all_backends = pytest.mark.parametrize("backend", ["reference", *BACKENDS])


@both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_teacher_and_options_that_leave_no_input_out(reduction, backend, device):
    """10. Autograd takes a list without a gap for a list of tensors."""
    problem = make_problem(tokens=4, device=device)
    top_k = problem.teacher("top_k", torch.float32)
    whole = replace(top_k, entropy=torch.ones(4, device=device))
    options = dict(
        old_log_probs=torch.full((4,), -3.0, device=device),
        advantages=torch.ones(4, device=device), token_weight=torch.ones(4, device=device),
        teacher_prefix=torch.zeros(4, dtype=torch.bool, device=device),
        uniforms=torch.full((4,), 0.5, device=device), backend=backend, reduction=reduction,
    )  # fmt: skip

    def gradient(teacher, **more):
        hidden = problem.hidden.float().requires_grad_()
        out = linear_distillation_loss(
            hidden,
            problem.weight.float(),
            problem.labels,
            teacher,
            TrOPD(top_k=K),
            **options | more,
        )
        out.loss.sum().backward()
        return hidden.grad

    assert torch.equal(gradient(whole), gradient(top_k))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_reference_passes_anomaly_detection(name, device):
    """A NaN that no gradient reaches stopped it, at every call."""
    problem = make_problem(tokens=4, device=device)
    with torch.autograd.set_detect_anomaly(True):
        problem.call(OBJECTIVES[name], "hidden", "reference", torch.float64)


@both
@pytest.mark.parametrize("form", ["logits", "top_k"])
@pytest.mark.parametrize("name", ["tropd", "tropd_bucket", "tropd_renormalize_both", "mopd"])
def test_the_label_s_log_prob_carries_a_gradient_beside_the_loss(
    name, form, backend, device, monkeypatch
):
    """The op's statistics are differentiable, on K and off it; the public calls detach them."""
    problem, kept = make_problem(tokens=6, device=device), {}
    compute = functional.compute

    def keeping(*arguments, **more):
        result = compute(*arguments, **more)
        kept["log_probs"] = result.stats[Stat.LOG_PROB]
        return result

    monkeypatch.setattr(functional, "compute", keeping)

    def gradient(backend):
        hidden = problem.hidden.clone().requires_grad_()
        loss = linear_distillation_loss(
            hidden, problem.weight, problem.labels, problem.teacher(form, torch.float64),
            OBJECTIVES[name], backend=backend, reduction="none", **problem.options,
        ).loss  # fmt: skip
        (loss.sum() + 0.7 * kept["log_probs"].sum()).backward()
        return hidden.grad

    assert relative_error(gradient(backend), gradient("reference")) < 1e-14


def test_second_derivative_raises(device):
    """10. The gradients are constants of the forward: a penalty on them would be silently dropped
    from a sum in which other terms have a graph."""
    problem = make_problem(tokens=4, device=device)
    hidden = problem.hidden.float().requires_grad_()
    teacher = problem.teacher("hidden", torch.float32)
    for reduction in ("mean", "none"):
        loss = linear_distillation_loss(
            hidden, problem.weight.float(), problem.labels, teacher, GKD(), reduction=reduction,
            backend="torch",
        ).loss.sum()  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiated once.*backend='reference'"):
            torch.autograd.grad(gradient.sum() + hidden.square().sum(), hidden)


def test_second_derivative_of_the_reference(device):
    """What the error recommends, against differences of the gradient."""
    problem = make_problem(tokens=4, device=device)
    teacher, step = problem.teacher("hidden", torch.float64), 1e-6

    def gradient(hidden, **more):
        loss = linear_distillation_loss(
            hidden, problem.weight, problem.labels, teacher, GKD(), backend="reference"
        ).loss
        return torch.autograd.grad(loss, hidden, **more)[0]

    hidden = problem.hidden.clone().requires_grad_()
    along = torch.randn_like(hidden)
    (product,) = torch.autograd.grad(gradient(hidden, create_graph=True), hidden, along)
    with torch.no_grad():
        ends = [(hidden + s * along).requires_grad_() for s in (step, -step)]
    difference = (gradient(ends[0]) - gradient(ends[1])) / (2 * step)
    assert relative_error(product, difference) < 1e-6


@all_backends
def test_log_probs_and_entropy_are_differentiable(backend, device):
    problem = make_problem(tokens=4, device=device)
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_()
    labels = problem.labels.clone()
    labels[2] = -100
    log_probs, entropy = linear_log_probs(
        hidden, weight, labels, temperature=0.9, return_entropy=True, backend=backend
    )
    incoming = torch.arange(1.0, 5, device=device, dtype=torch.float64)
    found = torch.autograd.grad((incoming * (log_probs - 2 * entropy)).sum(), (hidden, weight))
    log_p = (hidden @ weight.T / 0.9).log_softmax(-1)
    counts = (labels != -100).double()
    lp = log_p.gather(-1, labels.clamp_min(0)[:, None])[:, 0] * counts
    h = -(log_p.exp() * log_p).sum(-1) * counts
    expected = torch.autograd.grad((incoming * (lp - 2 * h)).sum(), (hidden, weight))
    torch.testing.assert_close(log_probs, lp)
    torch.testing.assert_close(entropy, h)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert log_probs[2] == 0
