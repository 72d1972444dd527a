"""`Divergence("mixed")`: forward and reverse KL with a weight of each token's own."""

import math

import pytest
import torch
from calls import BACKENDS, head_loss, hidden_teacher, refused, sampled_teacher, top_k_teacher
from problems import loss_and_gradient, make_problem, with_everything

from tropd_kernels import (
    CADENCE,
    Divergence,
    LogitsTeacher,
    TokenRule,
    linear_distillation_loss,
)
from tropd_kernels.objectives.registry import OBJECTIVES, check_objective

MIXED = Divergence("mixed")
both_ends = pytest.mark.parametrize(("weight", "name"), [(1.0, "forward_kl"), (0.0, "reverse_kl")])
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_backend
def test_a_mixture_by_hand(backend, device):
    """p = (1/2, 1/2), q = (3/4, 1/4), w = 1/4: with KL(q||p) = log(27/16)/4 and KL(p||q) =
    log(4/3)/2, the loss is w KL(q||p) + (1 - w) KL(p||q), its gradient w (p - q) + (1 - w) p
    (log(p/q) - KL(p||q)): the definition in CADENCE (2607.16955)."""
    z = torch.zeros(1, 2, dtype=torch.float64, device=device)
    t = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64, device=device)
    label, w = torch.zeros(1, dtype=torch.int64, device=device), torch.full_like(z[:, 0], 0.25)
    loss, gradient, _ = loss_and_gradient(z, label, LogitsTeacher(t), MIXED, backend, mixing=w)
    assert float(loss) == pytest.approx(0.140583786, abs=1e-9)
    assert gradient[0].tolist() == pytest.approx([-0.268489804, 0.268489804], abs=1e-9)


@every_backend
@both_ends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_its_ends_are_the_two_divergences_to_the_bit(weight, name, reduction, backend, device):
    problem = with_everything(make_problem(tokens=7, vocab_size=211, device=device))
    mixing = torch.full(problem.labels.shape, weight, device=device)
    incoming = None if reduction == "mean" else torch.linspace(-1, 2, 7, device=device)
    call = dict(form="hidden", backend=backend, reduction=reduction, incoming=incoming)
    loss, gradients, stats = problem.call(MIXED, mixing=mixing, **call)
    alone, expected, theirs = problem.call(Divergence(name), **call)
    assert torch.equal(loss, alone) and torch.equal(stats.token_loss, theirs.token_loss)
    for key in expected:
        assert torch.equal(gradients[key], expected[key]), key
    middle = problem.call(MIXED, mixing=torch.full_like(mixing, 0.5), **call)[0]
    assert not torch.equal(middle, alone)


@every_backend
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_weight_of_0_keeps_an_infinite_divergence_out(side, backend, device):
    """An id that the student excludes makes KL(q||p) infinite, one that the teacher excludes
    KL(p||q): with a weight above 0 the loss is infinite, and the gradient that of the other."""
    z, t = torch.randn(2, 3, 9, device=device)
    (z if side == "student" else t)[:, 4] = -math.inf
    labels = torch.tensor([0, 1, 2], device=device)
    mixing = torch.tensor([0.0, 0.5, 1.0], device=device)
    infinite = [False, True, True] if side == "student" else [True, True, False]
    other = Divergence("reverse_kl" if side == "student" else "forward_kl")
    call = dict(labels=labels, teacher=LogitsTeacher(t), backend=backend, reduction="none")
    loss, gradient, _ = loss_and_gradient(z, objective=MIXED, mixing=mixing, **call)
    alone, expected, _ = loss_and_gradient(z, objective=other, **call)
    finite = 0 if side == "student" else 2
    assert (loss == math.inf).tolist() == infinite
    assert torch.equal(loss[finite], alone[finite])
    share = mixing if side == "teacher" else 1 - mixing  # of the other, finite one
    torch.testing.assert_close(gradient, expected * share[:, None])


def test_it_goes_with_other_terms_of_a_rule(device):
    """The forward KL that a gate chooses is added to the mixed one; on a prefix neither counts."""
    rule = TokenRule(gate="threshold", outlier="forward_kl", divergence="mixed", prefix_weight=0.1)
    problem = with_everything(make_problem(tokens=7, device=device))
    exact = problem.call(rule, "hidden", "reference", torch.float64)
    assert 0 < exact[2].outlier.sum() < 7 and problem.options["teacher_prefix"].any()
    for backend in BACKENDS[1:]:
        loss, gradients, _ = problem.call(rule, "hidden", backend)
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=0)
        for key, gradient in exact[1].items():
            torch.testing.assert_close(gradients[key].double(), gradient, rtol=1e-4, atol=1e-6)


def test_weights_from_the_teacher_s_entropy_and_one_compiled_graph(device):
    """The soft form of EOPD's gate that the docstring shows, compiled."""
    problem = make_problem(tokens=6, spread=6.0, device=device)
    hidden, weight = problem.hidden.float().requires_grad_(), problem.weight.float()
    teacher = problem.teacher("hidden", torch.float32)
    given = (weight, problem.labels, teacher)
    with torch.no_grad():
        entropy = linear_distillation_loss(hidden, *given, MIXED, mixing=torch.ones(6)).stats
        entropy = entropy.teacher_entropy
    mixing = torch.sigmoid((entropy - 0.8) / 0.1)
    assert mixing.min() < 0.1 and mixing.max() > 0.9

    def loss(hidden, mixing):
        return linear_distillation_loss(hidden, *given, MIXED, mixing=mixing).loss

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for each in (mixing, 1 - mixing):
        assert torch.equal(compiled(hidden, each), loss(hidden, each))


def test_ignored_tokens_may_hold_anything(device):
    problem = with_everything(make_problem(tokens=7, device=device))
    mixing = torch.linspace(0, 1, 7, device=device)
    expected = problem.call(MIXED, "hidden", "torch", mixing=mixing)
    mixing[problem.labels == -100] = math.nan
    found = problem.call(MIXED, "hidden", "torch", mixing=mixing)
    assert torch.equal(found[0], expected[0])


def test_bad_calls():
    assert CADENCE() == MIXED
    refused(lambda: head_loss(objective=MIXED), ValueError, "'mixed'", "mixing=", "[0, 1]")
    refused(lambda: head_loss(mixing=torch.ones(2, 3)), ValueError, "mixing", "has no effect")
    for teacher in (sampled_teacher(), top_k_teacher()):
        refused(lambda t=teacher: head_loss(objective=MIXED, teacher=t, mixing=torch.ones(2, 3)),
                ValueError, "whole distribution", "HiddenTeacher or LogitsTeacher")  # fmt: skip
    refused(lambda: TokenRule(divergence="mixed", top_k=8), ValueError, "'mixed'", "leave top_k")
    refused(lambda: Divergence("mixed", top_k=8), ValueError, "covers the whole vocabulary")
    assert head_loss(objective=MIXED, teacher=hidden_teacher(), mixing=torch.ones(2, 3)).loss > 0


@pytest.mark.parametrize("name", ["mixed", "cadence"])
def test_a_config_cannot_hold_the_weights(name):
    assert name not in OBJECTIVES
    refused(lambda: check_objective(name), ValueError, name, "mixing=", "linear_distillation_loss")
