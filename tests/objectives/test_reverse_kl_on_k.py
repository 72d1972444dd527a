"""The reverse KL on K with its four tails, against the formulas written out here, in autograd."""

import math

import pytest
import torch
from problems import loss_and_gradient, relative_error

from tropd_kernels import Divergence, LogitsTeacher, TokenRule, TopKTeacher, TrOPD
from tropd_kernels.objectives import TAILS

BACKENDS = ("torch", "native", "triton")
all_backends = pytest.mark.parametrize("backend", ["reference", *BACKENDS])
both_forms = pytest.mark.parametrize("form", ["dense", "top_k"])
K = 3


def rule(tail, k=K):
    return Divergence("reverse_kl", top_k=k, top_k_tail=tail)


def teacher_of(form, t, k=K):
    if form == "dense":
        return LogitsTeacher(t)
    top = t.log_softmax(-1).topk(k, dim=-1)
    return TopKTeacher(top.indices, top.values, top.values[..., 0])


def formula(log_p, log_q, on_k, tail):
    """The reverse KL of the distributions that a tail makes of p and q, for one token."""
    p, q, g = log_p.exp(), log_q.exp(), log_p - log_q
    p_k, q_k = p[on_k].sum(), q[on_k].sum()
    if tail == "raw":
        return (p * g)[on_k].sum()
    if tail == "bucket":  # K + 1 categories
        p_tail, q_tail = p[~on_k].sum(), q[~on_k].sum()
        return (p * g)[on_k].sum() + p_tail * (p_tail / q_tail).log()
    if tail == "renormalize_teacher":
        return (p * (log_p - (q / q_k).log()))[on_k].sum()
    return (p / p_k * ((p / p_k).log() - (q / q_k).log()))[on_k].sum()


def truth(z, t, tail, k=K):
    z = z.double().requires_grad_()
    log_q = t.double().log_softmax(-1)
    on_k = log_q >= log_q.topk(k, dim=-1).values[:, -1:]
    loss = torch.stack(
        [formula(*row, tail) for row in zip(z.log_softmax(-1), log_q, on_k, strict=True)]
    )
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


@all_backends
@both_forms
@pytest.mark.parametrize("tail", TAILS)
def test_each_tail_is_its_formula(tail, form, backend, device):
    z, t = torch.randn(2, 5, 37, device=device).mul(2)
    labels = torch.arange(5, device=device)
    loss, gradient, stats = loss_and_gradient(
        z, labels, teacher_of(form, t), rule(tail), backend, reduction="none"
    )
    exact, d = truth(z, t, tail)
    # With a top-k teacher its tail is a difference from 1.
    assert relative_error(loss, exact) < 2e-6
    assert relative_error(gradient, d) < 2e-6
    masses = t.softmax(-1).topk(K, dim=-1)
    torch.testing.assert_close(stats.teacher_topk_mass, masses.values.sum(-1))
    torch.testing.assert_close(
        stats.student_topk_mass, z.softmax(-1).gather(-1, masses.indices).sum(-1)
    )


#: By hand: p = (1/2, 1/4, 1/8, 1/8), q = (1/4, 1/2, 1/8, 1/8), K the first two ids.
#: sum_K p log(p/q) = log(2)/2 - log(2)/4 = log(2)/4; p and q have 3/4 on K and 1/4 off it.
BY_HAND = {
    "raw": math.log(2) / 4,
    "bucket": math.log(2) / 4,  # + 1/4 log(1)
    "renormalize_teacher": math.log(2) / 4 + 3 / 4 * math.log(3 / 4),
    "renormalize_both": math.log(2) / 3,  # (2/3) log 2 - (1/3) log 2
}
#: dL/dz = p (v - sum p v), v = dL/dp: raw, v = log(p/q) + 1 on K: (log 2 + 1, 1 - log 2, 0, 0).
GRADIENT_BY_HAND = {
    "raw": (
        1 / 8 + 3 / 8 * math.log(2), 1 / 16 - 5 / 16 * math.log(2),
        -3 / 32 - math.log(2) / 32, -3 / 32 - math.log(2) / 32,
    ),
    # p~ (log(p~/q~) - D) on K, with p~ = (2/3, 1/3): 2/3 (1 - 1/3) log 2 and 1/3 (-1 - 1/3) log 2
    "renormalize_both": (4 / 9 * math.log(2), -4 / 9 * math.log(2), 0.0, 0.0),
}  # fmt: skip


@all_backends
@pytest.mark.parametrize("tail", TAILS)
def test_values_by_hand(tail, backend, device):
    z = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]], device=device).log()
    t = torch.tensor([[1 / 4, 1 / 2, 1 / 8, 1 / 8]], device=device).log()
    label = torch.zeros(1, dtype=torch.int64, device=device)
    loss, gradient, _ = loss_and_gradient(z, label, LogitsTeacher(t), rule(tail, 2), backend)
    assert loss.item() == pytest.approx(BY_HAND[tail], abs=1e-6)
    if tail in GRADIENT_BY_HAND:
        assert gradient[0].tolist() == pytest.approx(GRADIENT_BY_HAND[tail], abs=1e-6)


def test_raw_may_be_negative(device):
    """p on K does not sum to 1; a clamp at 0 would silence its gradient."""
    z, t = torch.tensor([[[0.0, 0, 0, 3]], [[3.0, 0, 0, 0]]], device=device)
    label = torch.zeros(1, dtype=torch.int64, device=device)
    loss, gradient, _ = loss_and_gradient(z, label, LogitsTeacher(t), rule("raw", 1), "torch")
    assert loss < -0.1 and gradient.abs().sum() > 0.01


@all_backends
@pytest.mark.parametrize("tail", TAILS)
def test_k_of_the_whole_vocabulary_is_the_reverse_kl(tail, backend, device):
    z, t = torch.randn(2, 4, 21, device=device)
    labels = torch.arange(4, device=device)
    whole = loss_and_gradient(z, labels, LogitsTeacher(t), Divergence("reverse_kl"), backend)
    on_k = loss_and_gradient(z, labels, LogitsTeacher(t), rule(tail, 21), backend)
    torch.testing.assert_close(on_k[:2], whole[:2])


@pytest.mark.pairs
@all_backends
@both_forms
@pytest.mark.parametrize("lead", [-100.0, -85.0, -40.0, 10.0, 18.0, 40.0])
@pytest.mark.parametrize("tail", TAILS)
def test_next_to_no_mass_on_k_or_off_it(tail, lead, form, backend, device):
    """Of the student: masses of e^-100 underflow in float32, and 1 - p(K) has no digits at 18."""
    z, t = torch.randn(2, 3, 50, dtype=torch.float64).to(device)
    t[:, :K] += 4
    z[:, :K] += lead
    z, t = z.float(), t.float()
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    loss, gradient, _ = loss_and_gradient(
        z, labels, teacher_of(form, t), rule(tail), backend, reduction="none"
    )
    exact, d = truth(z, t, tail)
    # Terms of up to 100 nats cancel; beyond that only their rounding is left.
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=2e-5)
    if tail == "renormalize_both" and lead < -80:  # "counts as having nothing there"
        assert gradient.isfinite().all() and gradient.norm() <= 1.001 * d.norm()
    else:
        torch.testing.assert_close(gradient.double(), d, rtol=1e-4, atol=2e-5)


@all_backends
def test_a_tail_that_the_teacher_excludes(backend, device):
    """Infinite, with gradient 0, where the student has mass there; else as if it were K alone."""
    z, t = torch.randn(2, 2, 6, device=device)
    t[:, 3:], z[1, 3:] = -math.inf, -math.inf
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    loss, gradient, _ = loss_and_gradient(
        z, labels, LogitsTeacher(t), rule("bucket"), backend, reduction="none"
    )
    assert loss[0] == math.inf and not gradient[0].any()
    exact, d = truth(z[1:, :3], t[1:, :3], "raw")
    torch.testing.assert_close(loss[1:].double(), exact)
    torch.testing.assert_close(gradient[1:, :3].double(), d)
    assert not gradient[1, 3:].any()


@all_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_whose_ids_hold_all_its_mass(dtype, backend, device):
    """The probabilities sum to 1, or to a little more: its mass off K counts as the precision."""
    z = torch.randn(2, 9, dtype=dtype, device=device)
    ids = torch.tensor([[0, 1], [2, 3]], device=device)
    log_q = torch.tensor([[0.5, 0.5], [0.6, 0.4000003]], dtype=dtype, device=device).log()
    loss, gradient, _ = loss_and_gradient(
        z, ids[:, 0], TopKTeacher(ids, log_q, log_q[:, 0]), rule("bucket", 2), backend,
        reduction="none",
    )  # fmt: skip
    p = z.double().softmax(-1).gather(-1, ids)
    tail = 1 - p.sum(-1)
    exact = (p * (p.log() - log_q)).sum(-1) + tail * (tail / torch.finfo(dtype).eps).log()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert gradient.isfinite().all() and gradient.any(-1).all()


@all_backends
@both_forms
@pytest.mark.parametrize("tail", TAILS)
def test_a_student_that_excludes_k(tail, form, backend, device):
    """It has no distribution to renormalise: infinite, with gradient 0. Else K adds nothing."""
    z, t = torch.randn(2, 2, 8, device=device)
    t[:, :K] += 5
    z[0, :K], z[1, 0] = -math.inf, -math.inf
    labels = torch.full((2,), 5, device=device)
    loss, gradient, _ = loss_and_gradient(
        z, labels, teacher_of(form, t), rule(tail), backend, reduction="none"
    )
    assert gradient.isfinite().all() and loss[1].isfinite() and gradient[1].any()
    if tail == "renormalize_both":
        assert loss[0] == math.inf and not gradient[0].any()
    elif tail == "bucket":  # log(1 / q off K)
        tail_of_q = t[0].double().softmax(-1)[K:].sum()
        torch.testing.assert_close(loss[0].double(), -tail_of_q.log(), rtol=2e-5, atol=0)
    else:
        assert loss[0] == 0


@all_backends
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_a_student_s_bucket_beside_a_top_k_teacher_is_summed(divergence, backend, device):
    """A difference from 1 has an error of 6e-8, next to a tail of 1e-4 some 4e-4, which shows in
    the gradient off K."""
    z, t = torch.randn(2, 4, 211, dtype=torch.float64).to(device)
    t[:, :8] += 7
    z[:, :8] += 12
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    bucket = Divergence(divergence, top_k=8, top_k_tail="bucket")
    exact = loss_and_gradient(z, labels, teacher_of("top_k", t, 8), bucket, "reference")
    assert z.softmax(-1)[:, 8:].sum(-1).max() < 1e-3
    found = loss_and_gradient(z.float(), labels, teacher_of("top_k", t.float(), 8), bucket, backend)
    assert relative_error(found[0], exact[0]) < 1e-5
    assert relative_error(found[1][:, 8:], exact[1][:, 8:]) < 1e-5


@all_backends
def test_a_student_that_rises_from_tile_to_tile(backend, device):
    """Both ids of K in one lane of the Triton kernel, the second far above the first: what was
    summed relative to the first has to shrink."""
    z, t = torch.randn(2, 3, 3000, device=device)
    z[:, 5], z[:, 5 + 2048] = 0.0, 6.0
    t[:, 5], t[:, 5 + 2048] = 9.0, 8.0
    labels = torch.zeros(3, dtype=torch.int64, device=device)
    loss, gradient, _ = loss_and_gradient(
        z, labels, LogitsTeacher(t), rule("renormalize_both", 2), backend, reduction="none"
    )
    exact, d = truth(z, t, "renormalize_both", 2)
    assert relative_error(loss, exact) < 1e-5
    assert relative_error(gradient, d) < 1e-5


@all_backends
def test_beside_the_gate_s_forward_kl_on_the_same_k(backend, device):
    """Two terms on K, with one tail: their sum."""
    z, t = torch.randn(2, 6, 19, device=device)
    labels = torch.arange(6, device=device)
    uniforms = torch.full((6,), 0.5, device=device)
    options = dict(top_k=K, top_k_tail="bucket")
    gated = TrOPD(**options)
    together = TokenRule(**vars_of(gated) | {"divergence": "topk_reverse_kl"})
    found, *parts = (
        loss_and_gradient(z, labels, LogitsTeacher(t), each, backend, uniforms=uniforms)
        for each in (together, gated, rule("bucket"))
    )
    torch.testing.assert_close(found[0], parts[0][0] + parts[1][0])
    torch.testing.assert_close(found[1], parts[0][1] + parts[1][1])


def vars_of(objective):
    return {name: getattr(objective, name) for name in TokenRule.__match_args__}
