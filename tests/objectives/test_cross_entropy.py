"""What a cross-entropy has besides its NLL: label smoothing, the z-loss, and the lse.

Against values by hand, PyTorch's cross-entropy and the float64 reference; next to objectives with a
teacher, whose coefficient of p differs on K.
"""

import math
from dataclasses import replace

import pytest
import torch
from problems import (
    OBJECTIVES,
    K,
    loss_and_gradient,
    make_problem,
    relative_error,
    rows_of_several_blocks,
    with_everything,
)
from torch.nn import functional as F

from tropd_kernels import (
    OPD,
    SFT,
    EntropyOPD,
    TokenRule,
    linear_distillation_loss,
)
from tropd_kernels.objectives import TAILS

FLOAT32 = 1e-5
BACKENDS = ("torch", "native", "triton")
both = pytest.mark.parametrize("backend", BACKENDS)
all_backends = pytest.mark.parametrize("backend", ["reference", *BACKENDS])


@all_backends
def test_by_hand(backend, device):
    """p = (1, 2, 5) / 8 and label 1, from doubled logits at a temperature of 2.

    PaLM's z-loss (arXiv 2204.02311, section 5) with 0.1: lse = log 8, loss = log 4 + 0.1 log(8)^2,
    gradient p (1 + 0.2 log 8) - 1[v = 1]. Label smoothing of 0.3 (arXiv 1512.00567, section 7):
    loss = 0.7 log 4 + 0.1 (log 8 + log 4 + log 1.6), gradient p - 0.7 1[v = 1] - 0.1.
    """
    z = 2 * torch.tensor([[1.0, 2.0, 5.0]], device=device).log()
    for rule, expected, d in (
        (SFT(z_loss=0.1), 1.8187021, [0.1769860, -0.6460279, 0.8849302]),
        (SFT(label_smoothing=0.3), 1.3639800, [0.025, -0.55, 0.525]),
    ):
        loss, gradient, stats = loss_and_gradient(
            z, torch.tensor([1], device=device), None, rule, backend, temperature=2.0
        )
        torch.testing.assert_close(stats.lse, torch.tensor([2.0794415], device=device))
        torch.testing.assert_close(loss, torch.tensor(expected, device=device))
        torch.testing.assert_close(gradient, torch.tensor([d], device=device) / 2)


@pytest.mark.pairs
@pytest.mark.parametrize(
    "rule",
    [SFT(z_loss=0.03), SFT(label_smoothing=0.2, z_loss=0.03), SFT(label_smoothing=1.0)],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@all_backends
def test_sft_is_pytorch_s_cross_entropy(rule, reduction, dtype, backend, device):
    """... on a head with bias, scale, softcap, temperature, ignored labels and token weights."""
    problem = with_everything(make_problem(tokens=9, vocab_size=83, device=device))
    for name in ("hidden", "weight", "bias"):
        setattr(problem, name, getattr(problem, name).to(dtype).double())
    problem.options.pop("teacher_prefix")
    counts = problem.labels != -100
    leaves = [t.clone().requires_grad_() for t in (problem.hidden, problem.weight, problem.bias)]
    z = 9.0 * torch.tanh(1.3 * F.linear(*leaves) / 9.0) / 1.2
    theirs = (
        F.cross_entropy(z, problem.labels, reduction="none", label_smoothing=rule.label_smoothing)
        + rule.z_loss * z.logsumexp(-1).square() * counts
    )
    theirs = theirs * problem.options["token_weight"]
    if reduction == "mean":
        theirs = theirs.sum() / (counts & (problem.options["token_weight"] != 0)).sum()
    incoming = torch.linspace(1, 2, 9, device=device, dtype=torch.float64)
    (theirs if reduction == "mean" else theirs * incoming).sum().backward()
    loss, gradients, stats = problem.call(
        rule, "hidden", backend, dtype, reduction=reduction,
        incoming=None if reduction == "mean" else incoming,
    )  # fmt: skip
    bound = {torch.float64: 1e-13, torch.float32: FLOAT32}.get(dtype, 2 * torch.finfo(dtype).eps)
    exact = FLOAT32 if dtype == torch.bfloat16 else bound  # float32 sums of exact products
    assert relative_error(loss, theirs.detach()) < exact
    counted = counts & (problem.options["token_weight"] != 0)
    assert relative_error(stats.lse[counted], z.detach().logsumexp(-1)[counted]) < exact
    assert not stats.lse[~counted].any()
    for ours, leaf in zip(gradients.values(), leaves, strict=True):
        assert relative_error(ours, leaf.grad) < bound


@pytest.mark.pairs
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("form", ["hidden", "top_k"])
@both
def test_beside_the_kl_of_every_tail(tail, kl, form, backend, device):
    """Their terms are in the coefficients of p on K and off it; with both sides renormalised the
    one off K is otherwise 0."""
    rule = TokenRule(
        gate="expected", outlier="forward_kl", top_k=K, top_k_tail=tail, prefix_weight=0.001,
        nll_weight=0.3, label_smoothing=0.2, z_loss=0.05,
    )  # fmt: skip
    if kl == "reverse":
        rule = replace(rule, gate="always", outlier="mask", divergence="topk_reverse_kl")
    problem = with_everything(make_problem(tokens=7, device=device))
    truth = problem.call(rule, form, "reference", torch.float64)
    found = problem.call(rule, form, backend)
    assert relative_error(found[0], truth[0]) < FLOAT32
    for name, gradient in truth[1].items():
        assert relative_error(found[1][name], gradient) < FLOAT32, name


@all_backends
def test_neither_is_on_a_prefix_or_a_filtered_token(backend, device):
    """On a prefix the loss is the prefix's, unless prefix_weight is None; the entropy filter drops
    a token with all its terms."""
    problem = make_problem(tokens=6, device=device)
    prefix = torch.tensor([True, False, False] * 2, device=device)
    log_p = (problem.hidden @ problem.weight.T).log_softmax(-1)

    def call(rule):
        loss, gradients, stats = problem.call(
            rule, "logits", backend, torch.float64, reduction="none", teacher_prefix=prefix,
            incoming=torch.ones(6, device=device),
        )  # fmt: skip
        return loss, gradients["hidden"], stats

    for rule, without in (
        (OPD(), prefix),
        (OPD(prefix_weight=None), torch.zeros_like(prefix)),
        (EntropyOPD(top_fraction=0.5), None),
    ):
        rule = replace(rule, nll_weight=0.5)
        old, d_old, stats = call(rule)
        new, d_new, _ = call(replace(rule, label_smoothing=0.4, z_loss=0.1))
        if without is None:
            without = prefix | (stats.kept == 0)
            assert 0 < without.sum() < 6
        added = 0.1 * stats.lse**2 + 0.2 * (stats.log_probs - log_p.mean(-1))
        torch.testing.assert_close(new - old, added.masked_fill(without, 0), rtol=1e-9, atol=1e-12)
        assert ((d_new - d_old).abs().amax(-1) > 1e-6).tolist() == (~without).tolist()


@all_backends
def test_of_a_large_offset_and_of_excluded_ids(backend, device):
    """lse moves with the logits, and ids of logit -inf add nothing to it. They make the mean of
    -log p infinite, whose share of the gradient is 0; the other terms keep theirs."""
    z = torch.randn(3, 20, device=device).mul(8).round().div(8)
    z[1, 4:] = -math.inf
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    exact = z.double()
    finite = torch.tensor([True, False, True], device=device)
    for offset in (0.0, -(2.0**20)):
        loss, gradient, stats = loss_and_gradient(
            (exact if backend == "reference" else z) + offset, labels, None,
            SFT(label_smoothing=0.25, z_loss=1e-12), backend, reduction="none",
        )  # fmt: skip
        lse = exact.logsumexp(-1) + offset
        torch.testing.assert_close(stats.lse.double(), lse, rtol=1e-6, atol=1e-5)
        expected = F.cross_entropy(exact, labels, reduction="none", label_smoothing=0.25)
        expected += 1e-12 * lse**2
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        assert loss.isinf().tolist() == (~finite).tolist()
        d = (0.75 + 0.25 * finite + 2e-12 * lse)[:, None] * exact.softmax(-1)
        d -= (0.25 * finite / 20)[:, None]
        d[:, 0] -= 0.75
        torch.testing.assert_close(gradient.double(), d, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("launch", ["whole", "in parts", "in tiles"])
@pytest.mark.parametrize("name", ["rise by 200", "student excludes the first block"])
def test_the_mean_does_not_depend_on_where_the_maximum_stands(name, launch, device, monkeypatch):
    """Triton sums z - max under a maximum that rises, lane by lane and part by part."""
    triton_launch = pytest.importorskip("tropd_kernels.rows.triton_launch")
    if launch == "in parts":
        monkeypatch.setattr(triton_launch, "TILES", 0.1)
    if launch == "in tiles":
        monkeypatch.setattr(triton_launch, "STATISTICS_UNROLL", 1)
    z = rows_of_several_blocks()[name][0]
    z = torch.stack([z, z.flip(0)]).to(device)
    labels = torch.tensor([2500, 671], device=device)
    rule = SFT(label_smoothing=0.3)
    truth = loss_and_gradient(z.double(), labels, None, rule, "reference", reduction="none")
    found = loss_and_gradient(z, labels, None, rule, "triton", reduction="none")
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].double(), truth[1], rtol=1e-5, atol=1e-8)


def test_the_lse_of_a_row_that_nothing_else_asks_for(device):
    """Every row has it, whatever the rule and its teacher."""
    problem = make_problem(device=device)
    lse = (problem.hidden @ problem.weight.T).logsumexp(-1)
    for backend in ("reference", *BACKENDS):
        for name, form in (("tropd", "hidden"), ("opd", "sampled"), ("tropd", "top_k")):
            stats = problem.call(OBJECTIVES[name], form, backend, torch.float64)[2]
            torch.testing.assert_close(stats.lse, lse)


def test_compiled(device):
    problem = make_problem(tokens=5, device=device)
    hidden, weight = problem.hidden.float(), problem.weight.float()

    def step(hidden, weight):
        out = linear_distillation_loss(
            hidden,
            weight,
            problem.labels,
            None,
            SFT(label_smoothing=0.1, z_loss=0.1),
            backend="torch",
        )
        return out.loss, out.stats.lse

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, weight), step(hidden, weight), rtol=0, atol=0)
