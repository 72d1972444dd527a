"""The ops as torch sees them: `opcheck`, `torch.compile(fullgraph=True)`, no hidden
synchronisation."""

from dataclasses import replace

import pytest
import torch
from flat import BOTH, flat_problem
from problems import OBJECTIVES, make_problem, relative_error, with_everything

from benchmarks.device_times import capture
from tropd_kernels import (
    GKD,
    HiddenTeacher,
    LinearDistillationLoss,
    LinearLogProbs,
    TrOPD,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)
from tropd_kernels.loss import ops
from tropd_kernels.loss.loop import backward, forward
from tropd_kernels.loss.problem import NO_GRADIENTS, Side

#: opcheck compares outputs, so it needs an objective that leaves no statistic unknown (NaN).
RULE = OBJECTIVES["forward_kl_top_k"]


def op_arguments(backend, device, needs, weight=True, rule=RULE, inputs=None, **options):
    problem = make_problem(tokens=5, device=device)
    problem.labels[2] = -100
    hidden = problem.hidden.float().requires_grad_()
    head = problem.weight.float().requires_grad_()
    student = hidden if weight else (hidden @ head.T).detach().requires_grad_()
    made = flat_problem(
        Side(student, head if weight else None),
        Side(problem.teacher_hidden.float(), problem.teacher_weight.float()),
        problem.labels, rule, backend, {"uniforms": problem.options["uniforms"]} | (inputs or {}),
        needs, **options,
    )  # fmt: skip
    later = NO_GRADIENTS if needs.any else BOTH
    scale = torch.full((), 0.25, device=device)
    return ops.flatten(replace(made, backward_grads=later, loss_scale=scale))


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize(
    "needs", [BOTH, BOTH._replace(fp32_weight=True), NO_GRADIENTS], ids=["both", "fp32", "none"]
)
def test_opcheck(backend, needs, device):
    torch.library.opcheck(ops.distill, op_arguments(backend, device, needs))


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_opcheck_of_a_target_with_weights(backend, device):
    rule, inputs = replace(RULE, student_power=0.3), {"blending": torch.rand(5, device=device)}
    for needs in (BOTH, NO_GRADIENTS):
        arguments = op_arguments(backend, device, needs, rule=rule, inputs=inputs)
        torch.library.opcheck(ops.distill, arguments)


def test_opcheck_on_logits_and_of_the_backward(device):
    student, *rest = op_arguments("torch", device, NO_GRADIENTS, weight=False)
    torch.library.opcheck(ops.distill, (student, *rest))
    coefs = ops.distill(student, *rest)[ops.COEFS].detach()
    arguments = (coefs, [True, False, False], student.detach(), *rest)
    torch.library.opcheck(ops.distill_backward, arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compile_without_a_graph_break(reduction, device):
    problem = with_everything(make_problem(tokens=6, device=device))
    rule = OBJECTIVES["tropd"]

    def step(hidden, weight, bias, teacher_hidden, teacher_weight):
        out = linear_distillation_loss(
            hidden * 1.5, weight, problem.labels, HiddenTeacher(teacher_hidden, teacher_weight),
            rule, bias=bias, softcap=9.0, seed=3, reduction=reduction, backend="torch",
        )  # fmt: skip
        return out.loss.sum() * 2, out.stats.trust

    def run(function):
        leaves = [
            t.float().clone().requires_grad_()
            for t in (problem.hidden, problem.weight, problem.bias)
        ]
        loss, trust = function(
            *leaves, problem.teacher_hidden.float(), problem.teacher_weight.float()
        )
        loss.backward()
        return loss.detach(), trust, *(t.grad for t in leaves)

    torch._dynamo.reset()
    eager, compiled = run(step), run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert relative_error(ours, theirs) < 1e-6


def test_compile_the_others_and_the_modules(device):
    problem = make_problem(tokens=6, device=device)
    hidden, weight, labels = problem.hidden.float(), problem.weight.float(), problem.labels
    teacher = problem.teacher("logits", torch.float32)
    loss_of_logits = distillation_loss(hidden @ weight.T, labels, teacher, GKD()).loss
    module = LinearDistillationLoss(GKD(), temperature=1.0)
    log_probs = LinearLogProbs(return_entropy=True)

    def everything(hidden, weight, logits):
        return (
            distillation_loss(logits, labels, teacher, GKD()).loss,
            module(hidden, weight, labels, teacher).loss,
            *log_probs(hidden, weight, labels),
        )

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    a, b, lp, entropy = compiled(hidden, weight, hidden @ weight.T)
    torch.testing.assert_close(a, loss_of_logits)
    torch.testing.assert_close(b, loss_of_logits)
    expected = linear_log_probs(hidden, weight, labels, return_entropy=True)
    torch.testing.assert_close((lp, entropy), expected)


def test_modules_are_their_functions(device):
    problem = make_problem(tokens=6, device=device)
    hidden, weight, labels = problem.hidden.float(), problem.weight.float(), problem.labels
    teacher = problem.teacher("hidden", torch.float32)
    module = LinearDistillationLoss(TrOPD(top_k=6), softcap=5.0, temperature=2.0)
    ours = module(hidden, weight, labels, teacher, seed=1).loss
    theirs = linear_distillation_loss(
        hidden, weight, labels, teacher, TrOPD(top_k=6), softcap=5.0, temperature=2.0, seed=1
    ).loss
    assert torch.equal(ours, theirs)
    assert not list(module.parameters())
    assert "temperature=2.0" in repr(module)


@pytest.mark.parametrize("ignore_index", [None, -100])
@pytest.mark.parametrize("name", ["tropd", "gkd", "reverse_kl", "eopd", "sft"])
def test_loop_and_rows_look_at_no_value(name, ignore_index):
    """On a device whose tensors hold none, where a look at one (a host sync on a GPU) raises: only
    the drop of tokens that do not count needs it."""
    meta = dict(device="meta")
    teacher = Side(torch.empty(700, 8, **meta), torch.empty(300, 8, **meta))
    problem = flat_problem(
        Side(torch.empty(700, 16, **meta), torch.empty(300, 16, **meta)), teacher,
        torch.empty(700, dtype=torch.int64, **meta), OBJECTIVES[name], "torch",
        {"uniforms": torch.empty(700, **meta)}, ignore_index=ignore_index,
    )  # fmt: skip

    def run():
        backward(problem, forward(problem).coefs, BOTH)

    if ignore_index is None:
        run()
    else:
        with pytest.raises(NotImplementedError, match="meta"):
            run()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ignore_index", [None, -100])
def test_host_waits_only_where_tokens_are_dropped(ignore_index):
    problem = make_problem(tokens=300, device="cuda")
    teacher = problem.teacher("hidden", torch.bfloat16)
    hidden = problem.hidden.bfloat16().requires_grad_()
    weight = problem.weight.bfloat16().requires_grad_()

    def run():
        linear_distillation_loss(
            hidden, weight, problem.labels, teacher, TrOPD(top_k=6), ignore_index=ignore_index,
            uniforms=problem.options["uniforms"],
        ).loss.backward()  # fmt: skip

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if ignore_index is None:
            run()
        else:
            with pytest.raises(RuntimeError, match="synchroniz"):
                run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", ["hidden", "top_k"])
def test_a_whole_call_is_captured_in_a_cuda_graph(form):
    """Loss and gradients of inputs that were copied into the graph's after it was captured."""
    problem = make_problem(tokens=300, device="cuda")
    teacher = problem.teacher(form, torch.bfloat16)
    hidden = problem.hidden.bfloat16().requires_grad_()
    weight = problem.weight.bfloat16().requires_grad_()

    def run():
        loss = linear_distillation_loss(
            hidden, weight, problem.labels, teacher, TrOPD(top_k=6), ignore_index=None,
            uniforms=problem.options["uniforms"],
        ).loss  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    graph, captured = capture(run)
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
    graph.replay()
    for ours, expected in zip(captured, run(), strict=True):
        assert torch.equal(ours, expected)
