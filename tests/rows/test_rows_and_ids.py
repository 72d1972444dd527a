"""Which rows and ids are read, and where they lie: no token, too many rows, ids outside the
vocabulary, views of any stride. The defects are numbered as in `test_numbers`."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import OBJECTIVES, K, loss_and_gradient, make_problem, relative_error, with_everything

from tropd_kernels import (
    GKD,
    SFT,
    Divergence,
    HiddenTeacher,
    LogitsTeacher,
    TopKTeacher,
    TrOPD,
    distillation_loss,
    linear_distillation_loss,
)
from tropd_kernels.rows.top_k import largest_ids

BACKENDS = ("torch", "native", "triton")
both = pytest.mark.parametrize("backend", BACKENDS)
all_backends = pytest.mark.parametrize("backend", ["reference", *BACKENDS])


@all_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_nothing_to_learn_from(backend, reduction, tokens, device):
    """8. A fully masked or empty batch: loss 0, gradients 0 and connected to the graph."""
    hidden = torch.randn(tokens, 8, device=device, requires_grad=True)
    weight = torch.randn(13, 8, device=device, requires_grad=True)
    labels = torch.full((tokens,), -100, device=device)
    frozen = (torch.randn(n, 4, device=device) for n in (tokens, 13))
    teacher = HiddenTeacher(*frozen)
    for objective in (TrOPD(top_k=K), OBJECTIVES["entropy_opd"], OBJECTIVES["reopold_1"]):
        loss = linear_distillation_loss(
            hidden, weight, labels, teacher, objective, seed=0, backend=backend, reduction=reduction
        ).loss
        assert loss.shape == (labels.shape if reduction == "none" else ())
        assert not loss.any()
        gradients = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert [g.shape for g in gradients] == [hidden.shape, weight.shape]
        assert not any(g.any() for g in gradients)


def test_more_rows_than_a_grid_axis_holds(device):
    """8. 65,536 rows and more lie on grid axis 0. On a CPU only the torch backend can be asked."""
    backend = "triton" if device == "cuda" else "torch"
    n = 65_537
    hidden = torch.randn(n, 4, device=device, requires_grad=True)
    weight = torch.randn(8, 4, device=device)
    labels = torch.randint(8, (n,), device=device)
    loss = linear_distillation_loss(hidden, weight, labels, None, SFT(), backend=backend).loss
    loss.backward()
    expected = torch.nn.functional.cross_entropy((hidden @ weight.T), labels)
    assert relative_error(loss.detach(), expected.detach()) < 1e-5
    assert hidden.grad[-1].any()


def test_row_offsets_are_64_bit():
    """8. N * V beyond 2^31 overflows 32-bit offsets: every kernel makes its row index 64-bit before
    it multiplies. Read from the source, since no test machine holds the matrix."""
    from tropd_kernels.rows import triton_kernels

    (folder,) = triton_kernels.__path__
    source = "".join(path.read_text() for path in Path(folder).glob("*.py"))
    assert source.count("tl.program_id(0)") >= 6
    assert source.count("tl.program_id(0)") == source.count("tl.program_id(0).to(tl.int64)")
    # Axis 1 counts parts of a row, whose ids are below V.
    assert source.count("program_id(1)") == len(re.findall(r"\bpart = .*program_id\(1\)", source))
    assert not re.search(r"\bpart\b.*stride", source)


@both
def test_label_outside_the_vocabulary(backend, device):
    """9. An error where it can be seen without a sync; otherwise NaN in that row, and in no
    other."""
    hidden = torch.randn(3, 8, device=device, requires_grad=True)
    weight = torch.randn(13, 8, device=device)
    labels = torch.tensor([0, 13, 2], device=device)
    with pytest.raises(ValueError, match="label 13 lies outside the vocabulary of 13 ids"):
        linear_distillation_loss(hidden, weight, labels, None, SFT(), backend=backend)
    from tropd_kernels.backends import engine_for
    from tropd_kernels.rows.layout import Coef, LogitTransform, RowBatch, RowOptions, Stat

    # With ignore_index=None on a GPU nobody looks: the engine itself must not read elsewhere.
    plain = LogitTransform()
    logits = (hidden @ weight.T).detach()
    for wrong in (13, -1, -(2**62), 2**62):
        batch = RowBatch(logits, None, torch.tensor([0, wrong, 2], device=device))
        options = RowOptions(SFT(), plain, plain)
        stats, coefs = engine_for(backend).forward(batch, options)
        assert stats[Stat.TOKEN_LOSS].isnan().tolist() == [False, True, False]
        assert coefs[Coef.P].isnan().tolist() == [False, True, False]
        out = torch.zeros_like(logits)
        engine_for(backend).gradient(batch, coefs, options, out)
        assert out.isnan().any(1).tolist() == [False, True, False]


@all_backends
def test_ids_outside_the_vocabulary_are_padding(backend, device):
    """9. ... and a top-k teacher's ids never read or write outside a row."""
    z = torch.randn(2, 7, device=device)
    ids = torch.tensor([[1, 2, -1, 7], [3, 4, 5, 2**40]], device=device)
    log_probs = torch.tensor([0.4, 0.3, 0.2, 0.1], device=device).log().expand(2, 4).contiguous()
    labels = torch.tensor([1, 3], device=device)
    rule = Divergence("forward_kl", top_k=4)
    ours = loss_and_gradient(z, labels, TopKTeacher(ids, log_probs, log_probs[:, 0]), rule, backend)
    clean = log_probs.masked_fill((ids < 0) | (ids >= 7), -math.inf)
    expected = loss_and_gradient(
        z.double(), labels,
        TopKTeacher(ids.clamp(0, 6), clean.double(), clean[:, 0].double()), rule, "reference",
    )  # fmt: skip
    assert relative_error(ours[0], expected[0]) < 1e-5
    assert relative_error(ours[1], expected[1]) < 1e-5


@both
def test_expanded_incoming_gradient(backend, device):
    """10. `.sum().backward()` hands in a gradient of stride 0."""
    problem = make_problem(tokens=4, device=device)
    _, summed, _ = problem.call(GKD(), "hidden", backend, reduction="sum")
    _, expanded, _ = problem.call(
        GKD(), "hidden", backend, reduction="none", incoming=torch.ones((), device=device)
    )
    for key in summed:
        torch.testing.assert_close(expanded[key], summed[key], rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("form", ["hidden", "top_k"])
def test_inputs_may_be_views_of_any_stride(form, backend, device):
    """10. ... and per-token inputs columns of something wider."""
    problem = with_everything(make_problem(tokens=12, device=device))
    _, expected, _ = problem.call(OBJECTIVES["tropd"], form, backend)

    def column(t):
        return torch.stack([t, torch.roll(t, 1)], dim=-1)[..., 0]

    problem.labels = column(problem.labels)
    for name in ("bias", "teacher_bias"):
        setattr(problem, name, column(getattr(problem, name)))
    for name, value in problem.options.items():
        if isinstance(value, torch.Tensor):
            problem.options[name] = column(value)
    strided = problem.teacher(form, torch.float32, problem.options["temperature"])
    if form == "top_k":
        strided = replace(strided, label_log_probs=column(strided.label_log_probs))
    problem.teacher = lambda *_: strided
    # Where no token is dropped nothing else copies them.
    problem.labels = problem.labels.clamp_min(0)
    problem.options["token_weight"] = column(problem.options["token_weight"] + 0.1)
    _, found, _ = problem.call(OBJECTIVES["tropd"], form, backend)
    for name in ("labels", "bias", "teacher_bias"):
        setattr(problem, name, getattr(problem, name).contiguous())
    problem.options = {
        k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in problem.options.items()
    }
    _, expected, _ = problem.call(OBJECTIVES["tropd"], form, backend)
    for key in expected:
        assert torch.equal(found[key], expected[key])


@all_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_may_be_one_row_many_times(dtype, backend, device):
    """expand(): hidden states, heads and logits of both sides."""
    hidden, head, teacher = (torch.randn(n, 16, device=device).to(dtype) for n in (4, 40, 4))
    labels = torch.arange(4, device=device)

    def results(hidden, head, teacher):
        logits = hidden @ head.T
        outs = (
            linear_distillation_loss(
                hidden, head, labels, HiddenTeacher(teacher, head), GKD(), backend=backend
            ),
            distillation_loss(
                logits[:1].expand(4, -1) if hidden.stride(0) == 0 else logits, labels,
                LogitsTeacher(logits.flip(1)[:1].expand(4, -1)), GKD(), backend=backend,
            ),
        )  # fmt: skip
        return [out.loss for out in outs]

    for name in ("hidden", "head", "teacher"):
        tensors = dict(hidden=hidden, head=head, teacher=teacher)
        tensors[name] = tensors[name][:1].expand_as(tensors[name])
        copied = {key: tensor.contiguous() for key, tensor in tensors.items()}
        assert results(**tensors)[0] == results(**copied)[0]
    results(hidden[:1].expand(4, -1), head, teacher)


@all_backends
def test_a_bias_wider_than_the_hidden_states(backend, device):
    hidden = torch.randn(4, 8, device=device, requires_grad=True)
    head, bias = torch.randn(16, 8, device=device), torch.randn(16, device=device)
    teacher = torch.randn(4, 8, device=device)
    labels = torch.arange(4, device=device)
    found = [
        linear_distillation_loss(
            hidden, head, labels, HiddenTeacher(teacher, head, b), GKD(), bias=b, backend=backend
        ).loss
        for b in (bias, bias.double())
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("width", [40, 1024])
def test_the_largest_ids_of_a_row_that_holds_nan(width, device):
    """Of a row that holds more NaN than k they are its numbers' all the same."""
    values = torch.randn(3, width, device=device)
    values[0], values[1, ::2] = math.nan, math.nan
    ids = largest_ids(values, 6)
    assert ids.shape == (3, 6)
    if device == "cpu":  # on a GPU a NaN is the largest
        expected = values[1:].nan_to_num(nan=-math.inf).topk(6, dim=-1).indices
        assert torch.equal(ids[1:], expected)
