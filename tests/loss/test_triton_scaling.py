"""The incoming gradient, by which a backward multiplies what the forward has formed: without a pass
where it is 1, without a wait for the device, and to the same bits on all of them."""

import os

import pytest
import torch
from test_buffers import loss_and_leaves

from tropd_kernels import GKD, LogitsTeacher, linear_distillation_loss
from tropd_kernels.loss import autograd, scaling

pytest.importorskip("triton")
from tropd_kernels.loss import triton_scaling as kernel

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts what the interpreter does"
)


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The interpreter's stores truncate to bfloat16."""
    if a.dtype != torch.bfloat16:
        return 0 if torch.equal(a, b) else 1 << 30
    return (a.view(torch.int16).int() - b.view(torch.int16).int()).abs().max().item()


@pytest.fixture
def counts(monkeypatch):
    """Loads and stores of the interpreter's programs."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen = {"create_masked_load": 0, "create_masked_store": 0}
    for name in seen:
        whole = getattr(InterpreterBuilder, name)

        def count(*a, _f=whole, _n=name):
            seen[_n] += 1
            return _f(*a)

        monkeypatch.setattr(InterpreterBuilder, name, count)
    return lambda: tuple(seen.values())


@pytest.mark.parametrize("n", [1, 300, 20_000])
@pytest.mark.parametrize("factor", [1.0, 0.37, 0.0, -3.0, float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("dtype", "to", "precision"),
    [(torch.bfloat16, torch.bfloat16, torch.float32), (torch.float32, torch.float16, torch.float32),
     (torch.float32, torch.bfloat16, torch.float32), (torch.float32, torch.float32, torch.float32),
     (torch.float64, torch.float64, torch.float64)],
)  # fmt: skip
def test_the_kernel_gives_the_bits_of_a_cpu(n, factor, dtype, to, precision, device):
    gradient = torch.randn(n, device=device).to(dtype)
    by = torch.tensor(factor, dtype=precision, device=device)
    before = gradient.clone()
    expected = (gradient.to(precision) * by).to(to)
    found = torch.full_like(gradient, 7, dtype=to)
    kernel.scale(gradient, by, found)
    most = 1 if os.environ.get("TRITON_INTERPRET") == "1" else 0
    if factor == factor:
        assert ulps(found, expected) <= most
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(gradient, before)
    by_itself = scaling.scale_and_cast(gradient, by, to)
    assert torch.equal(
        by_itself.nan_to_num(5), (found if device != "cpu" else expected).nan_to_num(5)
    )
    if dtype == to:
        kernel.scale(gradient, by, gradient)
        assert torch.equal(gradient.nan_to_num(5), found.nan_to_num(5))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_factor_of_one_reads_nothing_but_itself(dtype, counts, monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 3)
    gradient = torch.randn(5 * kernel.BLOCK + 1).to(dtype)
    one, half = (torch.tensor(f, dtype=torch.promote_types(dtype, torch.float32)) for f in (1, 0.5))
    kernel.scale(gradient, one, gradient)
    assert counts() == (3, 0)  # one factor a program
    kernel.scale(gradient, half, gradient)
    assert counts() == (3 + 3 + 6, 6)
    kernel.scale(gradient, one, torch.empty_like(gradient))  # a copy has to be one
    assert counts() == (12 + 3 + 6, 12)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The way of a GPU's tensors, over the interpreter; the host may not look at a factor."""
    launches, whole, scaled = [], kernel.scale, scaling.scale_and_cast

    class OnGPU:
        def __init__(self, factor):
            self.factor, self.device = factor, torch.device("cuda")
            self.view = factor.view

    def scale(gradient, factor, out):
        launches.append(gradient is out)
        whole(gradient, factor.factor, out)

    monkeypatch.setattr(scaling, "runs_triton", lambda device: True)
    by_kernel, batched = scaling.by_kernel, scaling.transforms.batched
    monkeypatch.setattr(scaling, "by_kernel", lambda g, f: by_kernel(g, f.factor))
    monkeypatch.setattr(scaling.transforms, "batched", lambda f: batched(getattr(f, "factor", f)))
    monkeypatch.setattr(kernel, "scale", scale)
    monkeypatch.setattr(
        autograd, "scale_and_cast", lambda g, f, *a, **k: scaled(g, OnGPU(f), *a, **k)
    )
    return launches


@interpreted
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_backwards_on_a_gpu(factor, as_on_a_gpu, counts):
    """Of a graph that is kept, new memory each time, which the caller may overwrite; of the last
    one the gradient's own, and for a factor of 1 no byte of it."""
    loss, leaves = loss_and_leaves()
    incoming = torch.tensor(factor)
    first = torch.autograd.grad(loss, leaves, incoming, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(7)
    second = torch.autograd.grad(loss, leaves, incoming, retain_graph=True)
    assert as_on_a_gpu == [False] * 4
    stored = counts()[1]
    last = torch.autograd.grad(loss, leaves, incoming)
    assert as_on_a_gpu == [False] * 4 + [True] * 2
    assert (counts()[1] == stored) == (factor == 1)
    for a, b, c in zip(kept, second, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert (kept[1].abs().sum() > 0) == (factor != 0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves, incoming)


@interpreted
def test_transforms_on_a_gpu(as_on_a_gpu):
    """They wrap the gradient, or the factor: no kernel can be given those."""
    hidden, weight, teacher = torch.randn(5, 8), torch.randn(40, 8), torch.randn(5, 40)

    def loss(hidden):
        labels, given = torch.arange(5), LogitsTeacher(teacher)
        return linear_distillation_loss(hidden, weight, labels, given, GKD(), backend="torch").loss

    leaf = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert as_on_a_gpu == [True]
    found = torch.func.grad(loss)(hidden), torch.func.vjp(loss, hidden)[1](torch.tensor(1.0))[0]
    assert as_on_a_gpu == [True]
    for each in found:
        torch.testing.assert_close(each, expected)


def test_a_factor_keeps_its_precision_beside_a_bfloat16_gradient(monkeypatch):
    """The road of a GPU without Triton: a factor without dimensions would be rounded to bfloat16
    first, of which a CPU's own arithmetic shows nothing."""
    seen, whole = [], torch.mul

    def mul(gradient, factor, **how):
        seen.append(factor.dim())
        return whole(gradient, factor, **how)

    monkeypatch.setattr(torch, "mul", mul)
    meta = torch.empty(8, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(scaling, "by_kernel", lambda gradient, factor: False)
    for last_use in (False, True):
        factor = torch.empty((), device="meta")
        made = scaling.scale_and_cast(meta, factor, torch.bfloat16, last_use)
        assert (made is meta) == last_use and made.dtype == torch.bfloat16
    assert seen == [1, 1]
