"""One suite over objective x teacher form x backend x options, against the float64 reference.

Every error here is the norm of the difference over the norm of the truth. The truth is the
reference in float64, on the very numbers that the backend was given.
"""

import pytest
import torch
from problems import (
    OBJECTIVES,
    TEACHERS,
    assert_stats_agree,
    inputs_of,
    make_problem,
    relative_error,
    serves,
    with_everything,
)

from tropd_kernels import GKD, OPD, HiddenTeacher, TrOPD, linear_distillation_loss

FAST = ("torch", "native", "triton")
FLOAT32 = 1e-5


def cases():
    for name in OBJECTIVES:
        for form in TEACHERS:
            if serves(form, name) and (form == "sampled" or name != "sft"):
                yield pytest.param(name, form, id=f"{name}-{form}")


def compare(problem, name, form, backend, bound, dtype=torch.float32, **options):
    """Loss, gradients and statistics of `backend` in `dtype` against the reference in float64."""
    # The truth sees the inputs as the backend does, rounded to its dtype.
    for field in ("hidden", "weight", "bias", "teacher_hidden", "teacher_weight", "teacher_bias"):
        value = getattr(problem, field)
        if value is not None:
            setattr(problem, field, value.to(dtype).double())
    rule = OBJECTIVES[name]
    truth = problem.call(rule, form, "reference", torch.float64, **options)
    found = problem.call(rule, form, backend, dtype, **options)
    assert relative_error(found[0], truth[0]) <= bound, "loss"
    for key, gradient in truth[1].items():
        assert relative_error(found[1][key], gradient) <= bound, f"d_{key}"
    assert_stats_agree(found[2], truth[2], 20 * bound)
    if form == "top_k" and rule.uses_top_k:
        # Where a rule looks at K its forward KL is known, a term of the loss or not.
        ours, theirs = found[2].forward_kl, truth[2].forward_kl
        assert ours is None or not (ours.isnan() & ~theirs.isnan()).any()


def sums(name, form, backend):
    """Whose sums a backend makes in a way of its own: those over the ids that a teacher names."""
    rule = OBJECTIVES[name]
    return (form, rule.top_k_tail, rule.generator) if form == "top_k" and rule.uses_top_k else form


@pytest.mark.pairs(together=sums)
@pytest.mark.parametrize(("name", "form"), list(cases()))
@pytest.mark.parametrize("backend", FAST)
def test_every_objective_with_every_option(name, form, backend, device):
    problem = with_everything(make_problem(tokens=7, device=device))
    compare(problem, name, form, backend, FLOAT32)


@pytest.mark.pairs
@pytest.mark.parametrize(("name", "form"), list(cases()))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_objective_plain(name, form, reduction, device):
    compare(make_problem(device=device), name, form, "torch", FLOAT32, reduction=reduction)


@pytest.mark.parametrize("name", ["tropd", "opd", "gkd", "entropy_opd", "tropd_renormalize_both"])
@pytest.mark.parametrize("form", ["hidden", "top_k"])
@pytest.mark.parametrize("backend", FAST)
def test_per_token_losses_take_any_incoming_gradient(name, form, backend, device):
    if not serves(form, name):
        pytest.skip("this form cannot serve this objective")
    problem = with_everything(make_problem(tokens=6, device=device))
    incoming = torch.linspace(-1, 2, 6, device=device)
    compare(problem, name, form, backend, FLOAT32, reduction="none", incoming=incoming)


@pytest.mark.parametrize("form", ["hidden", "logits"])
@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("sizes", [(37, 45), (45, 37)])
def test_vocabularies_of_different_height(form, backend, sizes, device):
    """The ids that both have are used; ids beyond take part in nothing and their gradient is 0."""
    student, teacher = sizes
    problem = make_problem(tokens=6, vocab_size=student, teacher_vocab_size=teacher, device=device)
    problem.labels = problem.labels % min(sizes)
    loss, gradients, _ = problem.call(OBJECTIVES["jeffreys"], form, backend)
    cut = make_problem(tokens=6, vocab_size=student, teacher_vocab_size=teacher, device=device)
    cut.labels = problem.labels
    cut.weight, cut.teacher_weight = cut.weight[: min(sizes)], cut.teacher_weight[: min(sizes)]
    expected = cut.call(OBJECTIVES["jeffreys"], form, "reference", torch.float64)
    assert relative_error(loss, expected[0]) < FLOAT32
    assert relative_error(gradients["weight"][: min(sizes)], expected[1]["weight"]) < FLOAT32
    assert gradients["weight"].shape[0] == student
    assert not gradients["weight"][min(sizes) :].any()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_leading_batch_dimensions_and_frozen_sides(backend, device):
    problem = make_problem(tokens=6, device=device)
    teacher = problem.teacher("hidden", torch.float32)
    shaped = HiddenTeacher(teacher.hidden.reshape(2, 3, -1), teacher.weight)
    hidden = problem.hidden.float().reshape(2, 3, -1).requires_grad_()
    weight = problem.weight.float()
    out = linear_distillation_loss(
        hidden, weight, problem.labels.reshape(2, 3), shaped, GKD(), backend=backend
    )
    out.loss.backward()
    _, expected, _ = problem.call(GKD(), "hidden", "reference", torch.float64)
    assert out.stats.log_probs.shape == (2, 3)
    assert hidden.grad.shape == hidden.shape
    assert relative_error(hidden.grad.reshape(6, -1), expected["hidden"]) < FLOAT32
    head = weight.clone().requires_grad_()
    linear_distillation_loss(
        hidden.detach(), head, problem.labels.reshape(2, 3), shaped, GKD(), backend=backend
    ).loss.backward()
    assert relative_error(head.grad, expected["weight"]) < FLOAT32


DIFFERENTIABLE = [
    ("tropd_ppo", "logits"), ("tropd_expected", "top_k"), ("tropd_bucket", "logits"),
    ("tropd_renormalize_both", "hidden"), ("opd", "sampled"), ("gkd", "hidden"), ("mopd", "top_k"),
    ("topk_reverse_kl", "logits"), ("topk_reverse_kl_bucket", "top_k"),
    ("topk_reverse_kl_renormalize_teacher", "top_k"),
    ("lsm", "hidden"),
    ("reverse_kl", "hidden"), ("skew_forward", "logits"), ("skew_reverse", "logits"),
    ("alpha", "hidden"), ("jeffreys", "hidden"), ("mixed", "logits"), ("sft", "sampled"),
    ("tropd_z_loss", "logits"), ("gkd_cross_entropy", "hidden"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "name", "form"),
    [
        # The interpreter is slow, and its gradients are beside the reference's above.
        pytest.param(backend, name, form, marks=pytest.mark.slow)
        if backend == "triton" and name not in ("tropd_expected", "opd", "gkd")
        else (backend, name, form)
        for backend in FAST
        for name, form in DIFFERENTIABLE
    ],
)
def test_gradcheck_of_the_real_kernels(backend, name, form, device):
    """Finite differences of the backend's own forward, in float64. The derivative of a policy
    gradient's value is the policy gradient only where old_log_probs are given, which make the ratio
    a function of the weights, and advantages, which make the reward a constant."""
    rule = OBJECTIVES[name]
    problem = with_everything(make_problem(tokens=3, vocab_size=11, width=4, device=device))
    problem.labels = problem.labels.clamp_min(0)
    n = problem.labels.shape[0]
    options = problem.options | inputs_of(rule, problem.labels) | {"teacher_prefix": None}
    if rule.reads_advantages:
        options["advantages"] = torch.linspace(-1, 1, n, device=device, dtype=torch.float64)
    teacher = problem.teacher(form, torch.float64, options["temperature"])
    if rule.gate != "always":
        # The gate reads the student through lo alone, which is given: a constant, too.
        assert "old_log_probs" in options

    def per_token(hidden, weight, bias):
        return linear_distillation_loss(
            hidden, weight, problem.labels, teacher if rule.uses_teacher else None, rule, bias=bias,
            backend=backend, reduction="none", **problem.student_head, **options,
        ).loss  # fmt: skip

    def mean(hidden, weight, bias):
        return linear_distillation_loss(
            hidden, weight, problem.labels, teacher if rule.uses_teacher else None, rule, bias=bias,
            backend=backend, **problem.student_head, **options,
        ).loss  # fmt: skip

    leaves = [t.clone().requires_grad_() for t in (problem.hidden, problem.weight, problem.bias)]
    assert torch.autograd.gradcheck(mean, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(per_token, leaves, fast_mode=True)


def exact_then_rounded(problem, rule, dtype):
    """The gradients of exact arithmetic, rounded once to the inputs' dtype, and exact."""
    _, exact, _ = problem.call(rule, "hidden", "reference", torch.float64)
    return exact, {k: g.to(dtype) for k, g in exact.items()}


@pytest.mark.parametrize("name", ["tropd", "gkd", "reverse_kl", "opd"])
@pytest.mark.parametrize("nudge", [None, 0.05])
def test_bf16_gradients_are_as_good_as_exact_ones_rounded_once(name, nudge, device):
    """... within a factor of 2, also where student and teacher nearly agree (`nudge`), which is
    where logits rounded to bf16 lose the signal."""
    backend = "triton" if device == "cuda" else "torch"
    problem = make_problem(
        tokens=96, vocab_size=600, width=64, teacher_width=64, spread=3.0, device=device
    )
    if nudge is not None:
        noise = torch.randn(problem.hidden.shape, dtype=torch.float64).to(device)
        problem.teacher_hidden = problem.hidden + nudge * noise
        problem.teacher_weight = problem.weight.clone()
    for field in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        setattr(problem, field, getattr(problem, field).bfloat16().double())
    rule = OBJECTIVES[name]
    exact, rounded = exact_then_rounded(problem, rule, torch.bfloat16)
    _, found, _ = problem.call(rule, "hidden", backend, torch.bfloat16)
    for key in exact:
        assert found[key].dtype == torch.bfloat16
        floor = relative_error(rounded[key], exact[key])
        assert relative_error(found[key], exact[key]) <= 2 * floor, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tropd", "gkd"])
def test_half_precision_kernels_under_the_interpreter(name, dtype, device):
    """The Triton kernels on half-precision inputs. The interpreter truncates when it stores bf16
    instead of rounding, hence 2 ulp."""
    problem = make_problem(tokens=6, width=32, teacher_width=32, device=device)
    compare(problem, name, "hidden", "triton", 2 * torch.finfo(dtype).eps, dtype)


@pytest.mark.parametrize("backend", FAST)
def test_one_row_at_full_vocabulary(backend, device):
    problem = make_problem(tokens=2, vocab_size=151_936, width=8, teacher_width=8, device=device)
    compare(problem, "tropd_expected", "hidden", backend, FLOAT32)
    compare(problem, "gkd", "hidden", backend, FLOAT32)
    compare(problem, "reverse_kl", "hidden", backend, FLOAT32)


def test_default_objective_is_tropd(device):
    problem = make_problem(device=device)
    teacher = problem.teacher("hidden", torch.float32)
    given = (problem.hidden.float(), problem.weight.float(), problem.labels, teacher)
    ours = linear_distillation_loss(*given, seed=3).loss
    assert torch.equal(ours, linear_distillation_loss(*given, TrOPD(), seed=3).loss)
    assert not torch.equal(ours, linear_distillation_loss(*given, OPD(), seed=3).loss)
