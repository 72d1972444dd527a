"""Buffers that outlive a call: reused where nobody can tell, and never somebody's own."""

import mmap
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import OBJECTIVES, make_problem
from watching import Made

from tropd_kernels import (
    HiddenTeacher,
    TrOPD,
    buffers,
    linear_distillation_loss,
    linear_log_probs,
    native,
)
from tropd_kernels.loss import plan as chunking

needs_native = pytest.mark.skipif(native.WHY_NOT is not None, reason=f"{native.WHY_NOT}")


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Keeps blocks of any size; none before, none after."""
    monkeypatch.setattr(buffers, "SMALLEST", 1)
    buffers.release()
    yield buffers._kept
    buffers.release()


def call(seed: int, tokens: int = 20, trained: bool = False) -> torch.Tensor:
    """d_hidden, with a frozen head or a trained one."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 8, generator=g).requires_grad_()
    weight, teacher = torch.randn(300, 8, generator=g), torch.randn(tokens, 8, generator=g)
    labels = torch.randint(300, (tokens,), generator=g)
    linear_distillation_loss(
        hidden, weight.clone().requires_grad_(trained), labels, HiddenTeacher(teacher, weight),
        TrOPD(), seed=seed, backend="native",
    ).loss.backward()  # fmt: skip
    return hidden.grad


@needs_native
@pytest.mark.parametrize("trained", [False, True])
def test_the_next_call_works_in_the_same_block_and_gives_the_same_bits(blocks, trained):
    first = call(0, trained=trained)
    (block,) = blocks
    address = block.data_ptr()
    del block
    call(1, tokens=13, trained=trained)  # of another size, with other numbers
    assert [each.data_ptr() for each in blocks] == [address]
    assert torch.equal(call(0, trained=trained), first)
    assert [each.data_ptr() for each in blocks] == [address]


@needs_native
@pytest.mark.skipif(not native.BF16_PRODUCTS, reason="this CPU multiplies no bfloat16")
@pytest.mark.parametrize("options", [{}, {"gradient_tolerance": 0.5}])
@pytest.mark.parametrize("tokens", [20, 100])  # one super-chunk, and several
def test_gradients_of_a_trained_head_are_no_part_of_the_block(blocks, options, tokens, monkeypatch):
    for name, rows in (("MULTIPLE", 16), ("CPU_ROWS", 16), ("CPU_SUPER_ROWS", 32)):
        monkeypatch.setattr(chunking, name, rows)

    def gradients(seed):
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, 32, generator=g).bfloat16().requires_grad_()
        weight = torch.randn(300, 32, generator=g).bfloat16().requires_grad_()
        teacher = torch.randn(tokens, 32, generator=g).bfloat16()
        labels = torch.randint(300, (tokens,), generator=g)
        out = linear_distillation_loss(
            hidden, weight, labels, HiddenTeacher(teacher, weight.detach()), TrOPD(), seed=0,
            backend="native", **options,
        )  # fmt: skip
        assert not options or 0 < out.gradient_share < 0.5
        out.loss.backward()
        return hidden.grad, weight.grad

    first = gradients(0)
    kept = [g.clone() for g in first]
    assert len(blocks) == 1
    gradients(1)
    blocks[0].fill_(3)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients(0), kept, strict=True))


@needs_native
def test_a_larger_call_leaves_a_larger_block_alone(blocks):
    call(0)
    (small,) = (each.numel() for each in blocks)
    call(0, tokens=200)
    assert len(blocks) == 1 and blocks[0].numel() > small


@needs_native
def test_calls_in_several_threads_do_not_share_a_block(blocks):
    expected = [call(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(call, range(8)))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(blocks) <= 1


@needs_native
def test_inference_leaves_a_block_that_training_may_write(blocks):
    """Tensors of `torch.inference_mode` could not be written outside of it."""
    hidden, weight = torch.randn(20, 8), torch.randn(300, 8)
    labels = torch.randint(300, (20,))
    with torch.inference_mode():
        linear_log_probs(hidden, weight, labels, backend="native")
    assert not blocks[0].is_inference()
    with torch.no_grad():
        linear_log_probs(hidden, weight, labels, backend="native")
    call(0)


@needs_native
def test_a_call_that_fails_keeps_nothing(blocks, monkeypatch):
    def fail(*_):
        raise RuntimeError("no gradient today")

    monkeypatch.setattr("tropd_kernels.rows.native_rows.NativeRows.gradient", fail)
    with pytest.raises(RuntimeError, match="no gradient today"):
        call(0)
    assert not blocks


@needs_native
def test_what_the_system_takes_back_comes_back():
    """A block marked as free may be read and written: its pages hold anything."""
    block = torch.full((2**20,), 7, dtype=torch.uint8)
    if not torch.ops.tropd_native.may_be_reclaimed(block):
        pytest.skip("no MADV_FREE here")
    block.fill_(9)
    assert (block == 9).all()
    for wrong in (block[::2], block.float()):
        with pytest.raises(RuntimeError, match="buffer must be contiguous, and uint8"):
            torch.ops.tropd_native.may_be_reclaimed(wrong)
    # No whole page inside: nothing to give, and the neighbours stay.
    assert not torch.ops.tropd_native.may_be_reclaimed(block[1:100])
    assert (block == 9).all()


@needs_native
def test_pages_are_made_and_nothing_is_written():
    block = torch.full((2**21 + 5,), 7, dtype=torch.uint8)
    torch.ops.tropd_native.make_pages(block[3:-1])
    torch.ops.tropd_native.make_pages(block[:0])
    assert (block == 7).all()
    with pytest.raises(RuntimeError, match="buffer must be contiguous"):
        torch.ops.tropd_native.make_pages(block[::2])


@needs_native
def test_pages_that_are_dropped_take_no_neighbour_with_them():
    page = mmap.PAGESIZE
    room = torch.full((2**21 + page,), 7, dtype=torch.uint8)
    on_a_page = -room.data_ptr() % page
    for start in (0, 1, page - 64, page - 5, page - 1):  # of the block, behind a page's first byte
        block = room[on_a_page + start :][: 2**21 - page]
        torch.ops.tropd_native.drop_pages(block[5:-5])
        torch.ops.tropd_native.drop_pages(block[:0])
        torch.ops.tropd_native.drop_pages(block[1:100])
        at, end = block.data_ptr(), block.numel() - 5
        first, last = 5 + -(at + 5) % page, end - (at + end) % page
        assert (block[:first] == 7).all() and (block[last:] == 7).all()
        if sys.platform == "linux":
            assert (block[first:last] == 0).all()
        room.fill_(7)
        assert (room == 7).all()
    for wrong in (block[::2], block.view(2, -1).t()):
        with pytest.raises(RuntimeError, match="buffer must be contiguous"):
            torch.ops.tropd_native.drop_pages(wrong)


def test_other_backends_keep_nothing(blocks):
    for backend in ("torch", "reference"):
        make_problem(tokens=20).call(OBJECTIVES["tropd"], "hidden", backend)
    assert not blocks


# --- gradients that wait for the backward ------------------------------------------------------


def loss_and_leaves():
    made = make_problem(tokens=20)
    hidden = made.hidden.detach().clone().requires_grad_()
    weight = made.weight.detach().clone().requires_grad_()
    out = linear_distillation_loss(
        hidden, weight, made.labels, HiddenTeacher(made.teacher_hidden, made.teacher_weight),
        TrOPD(), seed=0,
    )  # fmt: skip
    return out.loss, (hidden, weight)


@pytest.mark.parametrize("factor", [1.0, 0.37, 0.0])
def test_a_graph_that_is_kept_gives_the_same_gradient_twice(factor):
    loss, leaves = loss_and_leaves()
    incoming = torch.tensor(factor)
    first = torch.autograd.grad(loss, leaves, incoming, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(7)  # it is the caller's
    second = torch.autograd.grad(loss, leaves, incoming, retain_graph=True)
    last = torch.autograd.grad(loss, leaves, incoming)
    for a, b, c in zip(kept, second, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize(("factor", "allowed"), [(1.0, set()), (0.5, {"aten.mul_.Tensor"})])
def test_the_last_backward_hands_over_its_gradient_and_copies_none(factor, allowed):
    """The head's gradient is the largest tensor of a step: there is one of it."""
    loss, (_, weight) = loss_and_leaves()
    incoming = torch.tensor(factor)
    with Made(weight.shape) as made:
        loss.backward(incoming)
    assert set(made.operators) - {"aten.detach.default"} == allowed
    assert weight.grad.abs().sum() > 0
