"""A head of another dtype than its hidden states, as under autocast: the product in the hidden
states' dtype, the head's gradient in its own, from the float32 sums with one rounding. Beside the
same call with `weight.to(hidden.dtype)`, whose gradient autograd rounds on the way."""

from __future__ import annotations

import pytest
import torch
from problems import K, make_problem, relative_error

from tropd_kernels import (
    GKD,
    HiddenTeacher,
    LinearDistillationLoss,
    TrOPD,
    linear_distillation_loss,
    linear_log_probs,
    plan_chunks,
)

BACKENDS = ["reference", "torch", "native", "triton"]
HALF, WIDE = torch.bfloat16, torch.float32
#: Hidden states' and head's.
PAIRS = {
    "autocast": (HALF, WIDE),
    "autocast to float16": (torch.float16, WIDE),
    "a bf16 head": (WIDE, HALF),
    "both halves": (HALF, torch.float16),
    "a float64 head": (WIDE, torch.float64),
}
RULE = TrOPD(top_k=K)


def run(problem, hidden_dtype, weight_dtype, kind, backend, cast=False, factor=1.0, **options):
    """(loss, d_hidden, d_weight); with `cast` by the head in the hidden states' dtype."""
    hidden = problem.hidden.to(hidden_dtype, copy=True).requires_grad_()
    weight = problem.weight.to(weight_dtype, copy=True).requires_grad_()
    head = weight.to(hidden_dtype) if cast else weight
    if kind == "log_probs":
        loss = linear_log_probs(hidden, head, problem.labels, backend=backend, **options).sum()
    else:
        theirs = problem.teacher_weight.to(weight_dtype)
        theirs = theirs.to(hidden_dtype) if cast else theirs
        teacher = HiddenTeacher(problem.teacher_hidden.to(hidden_dtype), theirs)
        loss = linear_distillation_loss(
            hidden, head, problem.labels, teacher, RULE, seed=3, reduction=kind, backend=backend,
            **options,
        ).loss.sum()  # fmt: skip
    (loss * factor).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.pairs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["mean", "none", "log_probs"])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_product_is_that_of_hiddens_dtype(pair, kind, backend, device):
    hidden_dtype, weight_dtype = PAIRS[pair]
    problem = make_problem(tokens=12, device=device)
    loss, d_hidden, d_weight = run(problem, hidden_dtype, weight_dtype, kind, backend)
    cast = run(problem, hidden_dtype, weight_dtype, kind, backend, cast=True)
    assert torch.equal(loss, cast[0]) and torch.equal(d_hidden, cast[1])
    assert d_weight.dtype == weight_dtype

    # The oracle sees the values that are multiplied, and rounds nothing.
    for name in ("hidden", "weight", "teacher_hidden", "teacher_weight"):
        value = getattr(problem, name)
        value = value.to(weight_dtype) if name.endswith("weight") else value
        setattr(problem, name, value.to(hidden_dtype).double())
    truth = run(problem, torch.float64, torch.float64, kind, "reference")[2]
    error = relative_error(d_weight, truth)
    assert error <= 1.001 * relative_error(cast[2], truth)  # the same for a gradient of 16 bits
    if device == "cpu" and backend != "native" and weight_dtype.itemsize >= 4:
        assert error < 1e-5  # float32 sums of float32 d_logits, and no rounding
    assert error < 2 * torch.finfo(HALF).eps


def test_a_float32_heads_gradient_is_not_rounded(device):
    """On the way through bf16 that is what autograd does."""
    problem = make_problem(tokens=12, device=device)
    for kind in ("mean", "none"):
        gradient = run(problem, HALF, WIDE, kind, None)[2]
        assert (gradient != gradient.bfloat16()).any()
        rounded = run(problem, HALF, WIDE, kind, None, cast=True)[2]
        assert torch.equal(rounded, rounded.bfloat16().float())
        torch.testing.assert_close(gradient, rounded, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("pair", ["autocast", "a bf16 head"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_the_teacher_alone(pair, backend, device):
    """Beside a student of one dtype; the bias has a third."""
    hidden_dtype, weight_dtype = PAIRS[pair]
    problem = make_problem(tokens=12, device=device)
    bias = torch.randn(problem.weight.shape[0], device=device, dtype=torch.float64)
    losses = []
    for cast in (False, True):
        theirs = problem.teacher_weight.to(weight_dtype)
        theirs = theirs.to(hidden_dtype) if cast else theirs
        teacher = HiddenTeacher(problem.teacher_hidden.to(hidden_dtype), theirs, bias)
        out = linear_distillation_loss(
            problem.hidden.to(WIDE), problem.weight.to(WIDE), problem.labels, teacher, GKD(),
            bias=bias, backend=backend,
        )  # fmt: skip
        losses.append(out.loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("options", [{"gradient_sampling": 0.3}, {"gradient_tolerance": 0.2}])
def test_of_a_sampled_gradient(options, device):
    problem = make_problem(tokens=12, vocab_size=300, device=device)
    loss, d_hidden, d_weight = run(problem, HALF, WIDE, "mean", "torch", **options)
    cast = run(problem, HALF, WIDE, "mean", "torch", cast=True, **options)
    assert torch.equal(loss, cast[0]) and torch.equal(d_hidden, cast[1])
    assert torch.equal(d_weight.bfloat16().float(), cast[2])


@pytest.mark.parametrize("kind", ["mean", "none"])
def test_of_a_shard(kind, group):
    problem = make_problem(tokens=12)
    ours = run(problem, HALF, WIDE, kind, "torch", process_group=group)
    for found, expected in zip(ours, run(problem, HALF, WIDE, kind, "torch"), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)


def test_of_a_main_grad(device):
    problem = make_problem(tokens=12, device=device)
    weight = torch.nn.Parameter(problem.weight.to(WIDE))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    teacher = problem.teacher("hidden", HALF)
    linear_distillation_loss(
        problem.hidden.to(HALF), weight, problem.labels, teacher, RULE, seed=3, backend="torch"
    ).loss.backward()
    expected = torch.nn.Parameter(problem.weight.to(WIDE))
    linear_distillation_loss(
        problem.hidden.to(HALF), expected, problem.labels, teacher, RULE, seed=3, backend="torch"
    ).loss.backward()
    assert not weight.grad.any() and torch.equal(weight.main_grad, expected.grad)


@pytest.mark.parametrize("kind", ["mean", "none"])
def test_compiled(kind, device):
    problem = make_problem(tokens=12, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *leaves: linear_distillation_loss(
            *leaves, problem.labels, teacher, RULE, seed=3, reduction=kind, backend="torch"
        ).loss.sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    teacher = problem.teacher("hidden", WIDE)
    teacher = HiddenTeacher(teacher.hidden.to(HALF), teacher.weight)
    leaves = problem.hidden.to(HALF).requires_grad_(), problem.weight.to(WIDE).requires_grad_()
    loss = compiled(*leaves)
    expected = run(problem, HALF, WIDE, kind, "torch")
    for ours, truth in zip((loss, *torch.autograd.grad(loss, leaves)), expected, strict=True):
        assert ours.dtype == truth.dtype and torch.equal(ours, truth)


def test_a_loss_scale_beside_float16(device):
    """Applied in the backward, as a GradScaler does, to gradients that float16 could not hold."""
    problem = make_problem(tokens=12, device=device)
    plain = run(problem, torch.float16, WIDE, "mean", "torch")[2]
    scaled = run(problem, torch.float16, WIDE, "mean", "torch", factor=2.0**20)[2]
    assert torch.equal(scaled, plain * 2**20)


def test_a_loop_under_autocast(device):
    """What a loop holds there: float32 parameters, and hidden states that a layer made bf16."""
    problem = make_problem(tokens=12, device=device)
    layer = torch.nn.Linear(16, 16).to(device)
    head = torch.nn.Linear(16, problem.weight.shape[0], bias=True).to(device)
    loss = LinearDistillationLoss(RULE)
    with torch.autocast(device, torch.bfloat16):
        hidden = layer(problem.hidden.float())
        assert hidden.dtype == HALF
        teacher = HiddenTeacher(problem.teacher_hidden.to(HALF), problem.teacher_weight.float())
        out = loss(hidden, head.weight, problem.labels, teacher, bias=head.bias, seed=1)
    out.loss.backward()
    for parameter in (*layer.parameters(), *head.parameters()):
        assert parameter.grad.dtype == WIDE and parameter.grad.isfinite().all()
        assert parameter.grad.any()


def test_the_plan_counts_the_copies():
    shape = dict(tokens=512, vocab_size=1000, hidden_size=512, teacher_hidden_size=256)
    shape |= dict(device="cpu", backend="native")
    name = "heads in the hidden states' dtype"
    assert plan_chunks(**shape).workspace[name] == 0
    assert plan_chunks(**shape, weight_dtype=torch.bfloat16).workspace[name] == 0
    student = plan_chunks(**shape, weight_dtype=torch.float32)
    assert student.workspace[name] == 2 * 1000 * 512 and not student.rounds_d_weight
    both = plan_chunks(**shape, weight_dtype=torch.float32, teacher_weight_dtype=torch.float32)
    assert both.workspace[name] == 2 * 1000 * (512 + 256)
