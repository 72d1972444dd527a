"""A top-k teacher that gives an id twice in a row is refused: before it was, the reference took the
last of the two log-probs, the row engines added both up."""

from __future__ import annotations

import pytest
import torch
from problems import loss_and_gradient

from tropd_kernels import (
    MOPD,
    OPD,
    Divergence,
    TopKTeacher,
    distillation_loss,
    linear_distillation_loss,
)
from tropd_kernels.loss import values

BACKENDS = ["reference", "torch", "native", "triton"]
N, V, K = 5, 11, 4
RULE = Divergence("forward_kl", top_k=K)


def batch(device, repeat: bool):
    """(logits, labels, ids, log_probs); with a repeated id at token 3."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=draw).to(device)
    log_q = torch.randn(N, V, generator=draw).log_softmax(-1).to(device)
    top = log_q.topk(K)
    ids = top.indices
    if repeat:
        ids[3, 2] = ids[3, 0]
    return logits, torch.arange(N, device=device), ids, top.values


def teacher_of(ids, log_probs):
    return TopKTeacher(ids, log_probs, log_probs[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [-100, None])
@pytest.mark.parametrize("rule", [RULE, MOPD(top_k=K), OPD()])
def test_refused(rule, ignore_index, backend, device):
    if device != "cpu" and ignore_index is None:
        pytest.skip("a GPU does not look")
    logits, labels, ids, log_probs = batch(device, repeat=True)
    with pytest.raises(ValueError, match=rf"ids hold {ids[3, 0]} twice at token 3.*distinct"):
        distillation_loss(
            logits, labels, teacher_of(ids, log_probs), rule, backend=backend,
            ignore_index=ignore_index,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_refused_beside_a_head(reduction, backend, device):
    _, labels, ids, log_probs = batch(device, repeat=True)
    hidden, weight = torch.randn(N, 3, device=device), torch.randn(V, 3, device=device)
    with pytest.raises(ValueError, match="twice at token 3"):
        linear_distillation_loss(
            hidden, weight.requires_grad_(), labels, teacher_of(ids, log_probs), RULE,
            reduction=reduction, backend=backend,
        )  # fmt: skip


def test_refused_beside_a_shard(group):
    _, labels, ids, log_probs = batch("cpu", repeat=True)
    with pytest.raises(ValueError, match="twice at token 3"):
        linear_distillation_loss(
            torch.randn(N, 3), torch.randn(V, 3), labels, teacher_of(ids, log_probs), RULE,
            process_group=group, backend="torch",
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_and_tokens_that_do_not_count_may_repeat(backend, device):
    logits, labels, ids, log_probs = batch(device, repeat=False)
    clean = loss_and_gradient(logits, labels, teacher_of(ids, log_probs), RULE, backend)
    ids, log_probs = (torch.cat([t, t[:, :3]], 1) for t in (ids, log_probs))
    log_probs[:3, K:] = -torch.inf  # padding by its log-prob
    ids[3] = torch.where(torch.arange(K + 3, device=device) < K, ids[3], -1)  # by its id
    ids[4, K:], log_probs[4, K:] = V, -1.0
    padded = loss_and_gradient(logits, labels, teacher_of(ids, log_probs), RULE, backend)
    for ours, expected in zip(padded[:2], clean[:2], strict=True):
        torch.testing.assert_close(ours, expected)

    logits, labels, ids, log_probs = batch(device, repeat=True)
    labels[3] = -100
    out = distillation_loss(logits, labels, teacher_of(ids, log_probs), RULE, backend=backend)
    assert out.loss.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_row_is_nan_where_nobody_looks(backend, device, monkeypatch):
    """As on a GPU with `ignore_index=None`."""
    monkeypatch.setattr(values, "may_look", lambda problem: False)
    logits, labels, ids, log_probs = batch(device, repeat=True)
    logits.requires_grad_()
    loss = distillation_loss(
        logits, labels, teacher_of(ids, log_probs), RULE, backend=backend, ignore_index=None,
        reduction="none",
    ).loss  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    others = [0, 1, 2, 4]
    assert loss[3].isnan() and loss[others].isfinite().all()
    assert gradient[3].isnan().all() and gradient[others].isfinite().all()
