"""A batch in which no token counts is no error: its loss is 0 and its gradients are zeros that hang
on the graph, for a constant without grad hangs a data-parallel run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calls import (
    BACKENDS,
    SHAPE,
    H,
    V,
    filled,
    head_loss,
    hidden_teacher,
    logits_loss,
    of,
    sampled_teacher,
    top_k_teacher,
)
from problems import OBJECTIVES

from tropd_kernels import (
    GKD,
    SFT,
    LogitsTeacher,
    distillation_loss,
    linear_distillation_loss,
    linear_log_probs,
)

NOTHING = {
    "no tokens": dict(shape=(0,)),
    "no tokens in two rows": dict(shape=(2, 0)),
    "all ignored": dict(labels=-100),
    "all of weight 0": dict(token_weight=0.0),
}
# One of each kind of pass: K1, top-k, generator, batch entropy and its own divisor, exact KLs, NLL.
PASSES = ["opd", "tropd", "gkd", "reopold_2", "jeffreys", "sft"]


@pytest.mark.parametrize("case", NOTHING)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PASSES)
def test_a_batch_in_which_no_token_counts(name, backend, reduction, case, device):
    rule, what = OBJECTIVES[name], NOTHING[case]
    shape = what.get("shape", SHAPE)
    leaves = [of(*size, device=device).requires_grad_() for size in ((*shape, H), (V, H), (V,))]
    logits = of(*shape, V, device=device).requires_grad_()
    common = dict(
        labels=filled(what.get("labels", 1), shape, device=device),
        teacher=LogitsTeacher(of(*shape, V, device=device)) if rule.uses_teacher else None,
        objective=rule, reduction=reduction, backend=backend, seed=3,
    )  # fmt: skip
    if "token_weight" in what:
        common["token_weight"] = filled(0.0, shape, device=device)
    hidden, weight, bias = leaves
    for out, inputs in (
        (linear_distillation_loss(hidden, weight, bias=bias, **common), leaves),
        (distillation_loss(logits, **common), [logits]),
    ):
        assert out.loss.shape == (shape if reduction == "none" else ())
        assert out.loss.requires_grad
        assert (out.loss == 0).all()
        gradients = torch.autograd.grad(out.loss.sum(), inputs)  # raises if one is not connected
        for gradient, leaf in zip(gradients, inputs, strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))
        score = out.stats.score  # which tokens that are ranked have
        assert score is None or (score.shape == shape and score.isnan().all())
        for stat in vars(replace(out.stats, score=None)).values():
            assert stat is None or (stat.shape == shape and (stat == 0).all())


@pytest.mark.parametrize("case", ["all ignored", "all of weight 0", "... and none is dropped"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_normalizer_that_counted_no_token(backend, case, device):
    """A count of tokens that stays on the GPU: 0 / 0 would be a NaN in every parameter."""
    with torch.device(device):
        leaves = [of(*size).requires_grad_() for size in ((*SHAPE, H), (V, H), (*SHAPE, V))]
        common = dict(
            labels=filled(-100 if case == "all ignored" else 1),
            token_weight=filled(1.0 if case == "all ignored" else 0.0),
            ignore_index=None if case == "... and none is dropped" else -100,
            objective=GKD(), normalizer=torch.tensor(0), backend=backend,
        )  # fmt: skip
        losses = (
            head_loss(hidden=leaves[0], weight=leaves[1], **common).loss,
            logits_loss(logits=leaves[2], **common).loss,
        )
    assert losses[0] == losses[1] == 0
    for gradient in torch.autograd.grad(sum(losses), leaves):
        assert (gradient == 0).all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), SHAPE])
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probs_of_no_token(backend, shape, device):
    leaves = [of(*size, device=device).requires_grad_() for size in ((*shape, H), (V, H))]
    targets = filled(-100, shape, device=device)
    both = linear_log_probs(*leaves, targets, return_entropy=True, backend=backend)
    for values in both:
        assert torch.equal(values, torch.zeros(shape, device=device))
    for gradient in torch.autograd.grad(both[0].sum() + both[1].sum(), leaves):
        assert (gradient == 0).all()


@pytest.mark.parametrize("teacher", [hidden_teacher, top_k_teacher, sampled_teacher])
def test_sft_takes_a_teacher_it_does_not_need(teacher):
    assert head_loss(objective=SFT(), teacher=teacher()).loss > 0
