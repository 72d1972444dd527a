"""Whole calls: against the reference in float64, without a wait of the host, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench.losses import LOSSES
from benchmarks.bench.problem import Problem, make_problem
from benchmarks.bench.providers import ours
from benchmarks.bench.shapes import Shape
from benchmarks.device_times import capture
from benchmarks.gpu.smoke import LOSSES as HEADLINE
from benchmarks.gpu.smoke.sizes import Figures, Sizes, relative_error
from tropd_kernels import linear_distillation_loss

#: bf16 rounds d_logits and the gradients, by 2^-9 of each value at most, and float32 logits next
#: to nothing: together they are below this. Logits in bf16 would cost ten times as much.
GRADIENT_BOUND = 2.0**-8
LOSS_BOUND = 1e-4


def problem_of(sizes: Sizes, device: str) -> Problem:
    shape = Shape(sizes.even, sizes.hidden, sizes.teacher_hidden)
    return make_problem(sizes.tokens, shape, sizes.dtype, device)


def against_reference(name: str) -> Callable[[Sizes, str], Figures]:
    def check(sizes: Sizes, device: str) -> Figures:
        problem = problem_of(sizes, device)
        if LOSSES[name].teacher != "hidden":
            problem.ready_for(LOSSES[name].teacher)
        wide = problem.first(sizes.tokens, torch.float64)
        wide.with_top_k_teacher(problem.__dict__.get("top_k_teacher"))
        found, exact = (gradients(*of) for of in ((name, problem, "triton"),
                                                  (name, wide, "reference")))  # fmt: skip
        return {
            what: (relative_error(ours, truth), bound)
            for what, ours, truth, bound in zip(
                ("loss", "d_hidden", "d_weight"), found, exact,
                (LOSS_BOUND, GRADIENT_BOUND, GRADIENT_BOUND),
            )
        }  # fmt: skip

    return check


def gradients(name: str, problem: Problem, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    loss = ours(backend).build(name)(problem)
    return loss.detach(), *torch.autograd.grad(loss, (problem.hidden, problem.weight))


def whole_call(name: str, problem: Problem) -> Callable[[], tuple[Tensor, ...]]:
    """Loss and gradients where all tokens count, which takes no look at the labels."""
    kind = LOSSES[name]
    teacher = problem.ready_for(kind.teacher).teacher(kind.teacher)

    def run() -> tuple[Tensor, ...]:
        loss = linear_distillation_loss(
            problem.hidden, problem.weight, problem.labels, teacher, kind.rule,
            ignore_index=None, uniforms=problem.uniforms if kind.rule.gate == "bernoulli" else None,
        ).loss  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss, (problem.hidden, problem.weight))

    return run


def no_sync(sizes: Sizes, device: str) -> Figures:
    """Raises where a call makes the host wait for the GPU."""
    problem = problem_of(sizes, device)
    for name in HEADLINE:
        run = whole_call(name, problem)
        run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {}


def graph(sizes: Sizes, device: str) -> Figures:
    """A replay, after other hidden states were copied in, gives the bits of a plain call."""
    problem = problem_of(sizes, device)
    found: Figures = {}
    for name in ("tropd", "gkd"):
        run = whole_call(name, problem)
        captured_graph, captured = capture(run)
        with torch.no_grad():
            problem.hidden.copy_(torch.randn_like(problem.hidden))
        captured_graph.replay()
        differ = sum(not torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
        found[f"{name}: tensors that differ"] = (float(differ), 0.0)
    return found
