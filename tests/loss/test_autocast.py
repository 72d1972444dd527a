"""A caller's autocast changes nothing: it would round what the package promises to keep in float32,
and only in some products, so that loss and gradient would belong to different logits. Nor do sums
in float16 that a caller allows."""

from __future__ import annotations

import pytest
import torch
from problems import OBJECTIVES, make_problem
from torch import nn

from tropd_kernels import linear_distillation_loss, linear_log_probs
from tropd_kernels import products as products_module
from tropd_kernels.heads import Head
from tropd_kernels.products import TorchProducts

BACKENDS = ["reference", "torch", "native", "triton"]
OPTIONS = {
    "mean": {},
    "none": {"reduction": "none"},
    "sampling": {"gradient_sampling": 0.3},
}


def autocast(device, on=True):
    return torch.autocast(device, torch.bfloat16, enabled=on)


def leaves(problem):
    return [t.float().requires_grad_() for t in (problem.hidden, problem.weight)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backward_too", [False, True])
def test_of_a_loss(backend, name, backward_too, device):
    problem = make_problem(tokens=12, device=device)
    if backend == "reference" and name == "sampling":
        pytest.skip("the reference samples nothing")

    def run(on):
        hidden, weight = leaves(problem)
        with autocast(device, on):
            out = linear_distillation_loss(
                hidden, weight, problem.labels, problem.teacher("hidden", torch.float32),
                OBJECTIVES["gkd"], backend=backend, seed=3, **OPTIONS[name],
            )  # fmt: skip
        with autocast(device, on and backward_too):
            out.loss.sum().backward()
        return out.loss.detach(), out.stats.log_probs, hidden.grad, weight.grad

    for ours, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_log_probs(backend, device):
    problem = make_problem(tokens=12, device=device)

    def run(on):
        hidden, weight = leaves(problem)
        with autocast(device, on):
            log_probs = linear_log_probs(hidden, weight, problem.labels, backend=backend)
            log_probs.sum().backward()
        return log_probs.detach(), hidden.grad, weight.grad

    for ours, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_of_a_heads_logits(compiled, device):
    """They are what a fused loss is compared with."""
    hidden, weight = torch.randn(5, 16, device=device), torch.randn(30, 16, device=device)
    head = Head(nn.Identity(), weight, None, 1.0, None, 30)
    torch._dynamo.reset()
    logits = head.logits
    if compiled:
        logits = torch.compile(logits, fullgraph=True, backend="aot_eager")
    with autocast(device):
        ours = logits(hidden)
    assert torch.equal(ours, head.logits(hidden))


@pytest.fixture
def float16_sums():
    """They are allowed. Yields what reads whether they are."""
    settings = torch.backends.cuda.matmul
    before, settings.allow_fp16_accumulation = settings.allow_fp16_accumulation, True
    yield lambda: settings.allow_fp16_accumulation
    settings.allow_fp16_accumulation = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_float16_sums_that_are_allowed_on_a_gpu(float16_sums):
    problem = make_problem(tokens=12, device="cuda")
    hidden, weight = (t.half().requires_grad_() for t in (problem.hidden, problem.weight))
    teacher = problem.teacher("hidden", torch.float16)
    out = linear_distillation_loss(hidden, weight, problem.labels, teacher, OBJECTIVES["gkd"])
    out.loss.backward()
    assert weight.grad.isfinite().all() and float16_sums()


def test_a_gpus_products_do_not_sum_in_float16(float16_sums, monkeypatch):
    asked, uncached = [], products_module.adds_to_wide_sums.__wrapped__
    monkeypatch.setattr(products_module, "adds_to_wide_sums", uncached)
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, lambda *_, **__: asked.append(float16_sums()))
    products = TorchProducts(torch.float16, "cuda")
    a = torch.zeros(2, 2, dtype=torch.float16)
    out = torch.zeros(2, 2)
    products.logits_into(out, a, a)
    products.d_hidden(a, a)
    products.d_weight(out, a, a, None)
    products.d_weight(out, a, a, out)
    assert asked == [False] * 5 and float16_sums()  # once to learn whether it may add
