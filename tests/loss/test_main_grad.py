"""`main_grad`, with a hook like the one by which Megatron-LM's data parallelism takes gradients."""

from __future__ import annotations

import pytest
import torch

from tropd_kernels import (
    HiddenTeacher,
    TrOPD,
    linear_distillation_loss,
    linear_log_probs,
    plan_chunks,
)

N, V, H, MICRO_BATCHES = 48, 301, 16, 40
FAR = 20.0  # a loss scale


def batch(seed: int):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=draw).bfloat16()
    teacher_hidden = torch.randn(N, H, generator=draw).bfloat16()
    return hidden, teacher_hidden, torch.randint(V, (N,), generator=draw)


def heads():
    draw = torch.Generator().manual_seed(99)
    return [torch.randn(V, H, generator=draw).bfloat16() for _ in range(2)]


def accumulate(weight, dtype, cast=False, tied=False, **options) -> list:
    """Backwards of all micro-batches; norms of what autograd gave the hook."""
    _, theirs = heads()
    seen = []

    def take(parameter):
        # The flag is the engine's, which clears it once an iteration.
        if not hasattr(parameter, "main_grad"):
            return
        seen.append(parameter.grad.norm().item())
        if not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    hook = weight.register_post_accumulate_grad_hook(take)
    for seed in range(MICRO_BATCHES):
        hidden, teacher_hidden, labels = batch(seed)
        head = weight.float().to(weight.dtype) if cast else weight
        loss = FAR * linear_distillation_loss(
            hidden.to(dtype).requires_grad_(), head, labels,
            HiddenTeacher(teacher_hidden.to(dtype), theirs.to(dtype)),
            TrOPD(top_k=5), seed=seed, **options,
        ).loss  # fmt: skip
        if tied:
            loss = loss + weight[:7].float().square().sum()
        loss.backward()
    hook.remove()
    return seen


def engine_weight():
    weight = torch.nn.Parameter(heads()[0])
    weight.main_grad = torch.zeros(V, H)
    weight.grad_added_to_main_grad = False
    return weight


@pytest.fixture(scope="module")
def exact():
    weight = torch.nn.Parameter(heads()[0].double())
    accumulate(weight, torch.float64, backend="reference")
    return weight.grad


def error(found, exact) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_sums_in_float32(backend, shard, exact, group):
    options = dict(backend=backend, **(dict(process_group=group) if shard else {}))
    weight = engine_weight()
    assert accumulate(weight, torch.bfloat16, **options) == [0.0] * MICRO_BATCHES
    assert weight.grad is None
    rounded = torch.nn.Parameter(heads()[0])
    accumulate(rounded, torch.bfloat16, **options)
    assert error(weight.main_grad, exact) < 3e-3  # d_logits are bf16 where the products want it
    assert error(weight.main_grad, exact) < 0.2 * error(rounded.grad, exact)


def test_a_copy_of_the_weight_gets_its_gradient_as_usual(exact):
    weight = engine_weight()
    seen = accumulate(weight, torch.bfloat16, cast=True, backend="torch")
    assert min(seen) > 0
    assert error(weight.main_grad, exact) < 1e-2


def test_other_losses_of_the_head_are_kept(exact):
    """Per-token losses recompute, and give their gradient to autograd."""
    weight = engine_weight()
    accumulate(weight, torch.bfloat16, backend="torch")
    hidden, _, labels = batch(0)
    (-linear_log_probs(hidden, weight, labels).sum()).backward()
    weight.main_grad += weight.grad  # the hook is gone
    truth = torch.nn.Parameter(heads()[0].double())
    (-linear_log_probs(hidden.double(), truth, labels).sum()).backward()
    assert error(weight.main_grad, exact + truth.grad) < 5e-3
    assert not weight.grad_added_to_main_grad


def test_an_embedding_that_shares_the_weight_keeps_its_own_gradient(exact):
    weight = engine_weight()
    accumulate(weight, torch.bfloat16, tied=True, backend="torch")
    exact = exact.clone()
    exact[:7] += 2 * MICRO_BATCHES * heads()[0][:7].double()
    assert error(weight.main_grad, exact) < 3e-3


def test_other_buffers_are_left_alone():
    """A half-set or ill-fitting attribute is no offer."""
    for attributes in (
        {"main_grad": torch.zeros(V, H)},
        {"main_grad": None, "grad_added_to_main_grad": False},
        {"main_grad": torch.zeros(V - 1, H), "grad_added_to_main_grad": False},
        {"main_grad": torch.zeros(V, H).bfloat16(), "grad_added_to_main_grad": False},
    ):
        weight = torch.nn.Parameter(heads()[0])
        for name, value in attributes.items():
            setattr(weight, name, value)
        hidden, teacher_hidden, labels = batch(0)
        teacher = HiddenTeacher(teacher_hidden, heads()[1])
        linear_distillation_loss(hidden, weight, labels, teacher, seed=0).loss.backward()
        assert weight.grad.norm() > 0


def test_the_plan_counts_the_accumulator():
    shape = dict(tokens=512, vocab_size=1000, hidden_size=512, device="cpu", backend="native")
    wide = plan_chunks(**shape, wide_weight_grad=True)
    assert wide.workspace["d_weight accumulator"] == 4 * 1000 * 512
    assert not wide.rounds_d_weight
