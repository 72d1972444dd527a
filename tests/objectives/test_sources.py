"""Presets beside their sources' formulas, written out again in float64: value and gradient.

The docstring of each names what was read. What a source leaves open is in `docs/papers.md`.
"""

import math

import pytest
import torch

from tropd_kernels import (
    AOPD,
    CADENCE,
    EOPD,
    GKD,
    LSM,
    MOPD,
    OPD,
    OPDVR,
    REOPOLD,
    TOPD,
    TVOPD,
    Divergence,
    ExOPD,
    Log1pOPD,
    LogitsTeacher,
    PowerOPD,
    TokenRule,
    Veto,
    credit,
    distillation_loss,
)

V, N = 9, 12


def problem(seed=0):
    """Logits of student and teacher (N, V), apart enough that every branch is taken, and labels."""
    draw = torch.Generator().manual_seed(seed)
    z, t = 2 * torch.randn(2, N, V, generator=draw, dtype=torch.float64)
    return z, t, torch.randint(V, (N,), generator=draw)


def ours(rule, z, t, labels, **options):
    z = z.clone().requires_grad_()
    out = distillation_loss(
        z, labels, LogitsTeacher(t), rule, backend="reference", reduction="none", **options
    )
    out.loss.sum().backward()
    return out.loss.detach(), z.grad


def theirs(formula, z, t, *more):
    z = z.clone().requires_grad_()
    loss = formula(z.log_softmax(-1), t.log_softmax(-1), *more)
    loss.sum().backward()
    return loss.detach(), z.grad


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mixture(weight, log_a, log_b):
    return (weight * log_a.exp() + (1 - weight) * log_b.exp()).log()


def jsd(lp, lq, beta):
    if beta in (0, 1):
        return kl(lp, lq) if beta else kl(lq, lp)
    m = mixture(beta, lq, lp)
    return beta * kl(lq, m) + (1 - beta) * kl(lp, m)


def todi(lp, lq):
    share = torch.sigmoid(lq - lp).detach()
    other = torch.sigmoid(lp - lq).detach()
    return (share * lq.exp() * (lq - lp) + other * lp.exp() * (lp - lq)).sum(-1)


def akl(lp, lq, mass=0.5):
    p, q = lp.exp().detach(), lq.exp()
    ascending, order = q.sort(-1)
    tail = ascending.cumsum(-1) <= 1 - mass
    gap = (ascending - p.gather(-1, order)).abs()
    on_tail, all_of_it = (gap * tail).sum(-1), gap.sum(-1)
    return (1 - on_tail / all_of_it) * kl(lq, lp) + on_tail / all_of_it * kl(lp, lq)


def mopd(lp, lq, k):
    ids = lq.topk(k).indices
    lp, lq = lp.gather(-1, ids), lq.gather(-1, ids)
    return (lp.exp() * (lp - lq) - lp.exp() + lq.exp()).sum(-1)


def lsm(lp, lq, k):
    ids = lq.topk(k).indices
    return kl(lp.gather(-1, ids).log_softmax(-1), lq.gather(-1, ids).log_softmax(-1))


def veto(lp, lq, beta):
    return kl((lq + beta * lp.detach()).log_softmax(-1), lp)


DIVERGENCES = {
    "GKD: equation 1 of 2306.13649, by TRL's generalized_jsd_loss": (GKD(0.3), jsd, 0.3),
    "GKD: its default": (GKD(), jsd, 0.5),
    "GKD: beta 0": (GKD(0.0), jsd, 0),
    "GKD: beta 1": (GKD(1.0), jsd, 1),
    "DistiLLM: skewed_forward_kl of jongwooko/distillm, lam 0.1": (
        Divergence("skew_forward"), lambda lp, lq: kl(lq, mixture(0.1, lq, lp)),
    ),
    "DistiLLM: skewed_reverse_kl of jongwooko/distillm, lam 0.1": (
        Divergence("skew_reverse"), lambda lp, lq: kl(lp, mixture(0.1, lp, lq)),
    ),
    "ToDi: compute_ToDi of jungseongryong/ToDi": (Divergence("todi"), todi),
    "AKL: compute_adaptive_kl_div of songmzhang/KDFlow, also in jungseongryong/ToDi": (
        Divergence("akl"), akl,
    ),
    "AKL: another share": (Divergence("akl", head_mass=0.8), akl, 0.8),
    "LSM: compute_memory_efficient_kl of hhh675597/revisiting_opd": (LSM(top_k=4), lsm, 4),
    "MOPD: a Bregman divergence; no source but its own formula": (MOPD(top_k=4), mopd, 4),
    "Veto: softmax(z_T + beta z_S), by a reader of 2601.07155": (
        Veto(student_power=0.8), veto, 0.8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_its_sources(name):
    rule, formula, *more = DIVERGENCES[name]
    z, t, labels = problem()
    assert_same(ours(rule, z, t, labels), theirs(formula, z, t, *more))


def test_akl_has_the_id_that_reaches_the_mass_in_its_head():
    """As KDFlow and ToDi have it. AKL.py of wutaiqiang/LLM_KD_AKL leaves it to the tail, unless it
    is the first: this q has one id in its head there, and two here."""
    q = torch.tensor([[0.4, 0.35, 0.25]], dtype=torch.float64)
    p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    loss, _ = ours(Divergence("akl"), p.log(), q.log(), torch.zeros(1, dtype=torch.int64))
    for share, same in ((0.45 / 0.6, True), (0.3 / 0.6, False)):
        expected = share * kl(q.log(), p.log()) + (1 - share) * kl(p.log(), q.log())
        assert torch.allclose(loss, expected) == same


def test_cadence_mixes_by_the_weight_of_the_forward_kl():
    """2607.16955 by a reader of it: beta 1 is the forward KL, beta 0 the reverse."""
    z, t, labels = problem()
    beta = torch.linspace(0, 1, N, dtype=torch.float64)
    expected = theirs(lambda lp, lq: beta * kl(lq, lp) + (1 - beta) * kl(lp, lq), z, t)
    assert_same(ours(CADENCE(), z, t, labels, mixing=beta), expected)


def label_of(log_probs, labels):
    return log_probs.gather(-1, labels[:, None]).squeeze(-1)


def test_eopd_is_its_authors():
    """compute_policy_loss_on_policy_distill of the authors' code, first commit of the copy
    ckjsuperhh/eopd-baseline: PPO's clip of 0.2, and beside it, where H(q) is at least 0.8 nats, the
    forward KL on the teacher's top 16, renormalised there, to a student that is not. Entropies on
    both sides of 0.8, ratios beyond both ends of the clip."""
    z, t, labels = problem()
    z, t = torch.cat([z, z + 0.1], -1), torch.cat([t, t - 1], -1)  # 18 ids
    t = t * torch.linspace(0.2, 5, N, dtype=torch.float64)[:, None]
    old = label_of(z.log_softmax(-1), labels) + torch.linspace(-0.4, 0.4, N, dtype=torch.float64)

    def formula(lp, lq):
        reward = (label_of(lq, labels) - old).detach()
        ratio = (label_of(lp, labels) - old).exp()
        clipped = torch.maximum(-reward * ratio, -reward * ratio.clamp(0.8, 1.2))
        best, ids = t.topk(16)
        teacher = best.log_softmax(-1)
        forward = (teacher.exp() * (teacher - lp.gather(-1, ids))).sum(-1)
        uncertain = -(lq.exp() * lq).sum(-1) >= 0.8
        assert 0 < uncertain.sum() < N
        return clipped + uncertain * forward

    assert_same(ours(EOPD(), z, t, labels, old_log_probs=old), theirs(formula, z, t))


def rewarded(transform):
    """The policy gradient of a reward made of lq and lp of the label."""

    def formula(lp, lq, labels):
        lp, lq = label_of(lp, labels), label_of(lq, labels)
        return -transform(lq, lp.detach()) * (lp - lp.detach()).exp()

    return formula


REWARDS = {
    "OPD: tinker-cookbook": (OPD(), lambda lq, lp: lq - lp),
    "PowerOPD: EIT-NLP/PowerOPD": (PowerOPD(), lambda lq, lp: (5 * lq).exp() - (5 * lp).exp()),
    "TOP-D: TOPDAlgorithm of prime-rl#2966": (
        TOPD(), lambda lq, lp: torch.logaddexp(lq - lp + math.log(0.2), lq * 0 + math.log(0.8)),
    ),
    "TOP-D: NeMo-RL#4011": (
        TOPD(), lambda lq, lp: (0.2 * lq.exp() + 0.8 * lp.exp()).log() - lp,
    ),
    "Demystifying OPD: a reader of 2607.13399": (
        Log1pOPD(), lambda lq, lp: (lq - lp).sign() * (lq - lp).abs().log1p(),
    ),
    "TV-OPD: two summaries of 2609.08341": (TVOPD(), lambda lq, lp: (lq - lp).sign()),
    "tanh: table 1 of 2606.17199, EIT-NLP/PowerOPD at 65819e1, tau 5": (
        TokenRule(reward="tanh", reward_parameter=5.0), lambda lq, lp: ((lq - lp) / 5).tanh(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_is_its_sources(name):
    rule, transform = REWARDS[name]
    z, t, labels = problem()
    assert_same(ours(rule, z, t, labels), theirs(rewarded(transform), z, t, labels))


def test_the_expected_gradient_of_sign_tv_is_that_of_twice_the_total_variation():
    """Proposition 1 of 2609.08341, by two summaries: over all labels, each as often as the student
    writes it."""
    z, t, _ = problem()
    rows, each = torch.arange(N).repeat_interleave(V), torch.arange(V).repeat(N)
    p = z.softmax(-1)
    _, gradient = ours(TVOPD(), z[rows], t[rows], each)
    mean = (gradient.view(N, V, V) * p[..., None]).sum(1)
    _, expected = theirs(lambda lp, lq: (lp.exp() - lq.exp()).abs().sum(-1), z, t)
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12)


def test_exopds_reward_is_its_authors_but_for_a_constant_of_the_position():
    """dp_actor.py of RUCBM/G-OPD: minus (log p - log r) plus 1.25 (log q - log r), whose mean under
    the student is another than that of the renormalised target's reward, at each position."""
    z, t, _ = problem()
    r = problem(5)[1]
    lp, lq, lr = (x.log_softmax(-1) for x in (z, t, r))
    apart = []
    for y in range(V):
        labels = torch.full((N,), y)
        found = distillation_loss(
            z, labels, LogitsTeacher(t), ExOPD(), reference_teacher=LogitsTeacher(r),
            backend="reference",
        )  # fmt: skip
        theirs = -(lp - lr) + 1.25 * (lq - lr)
        apart.append(found.stats.reward - label_of(theirs, labels))
    assert apart[0].abs().min() > 0.01
    for one in apart[1:]:
        torch.testing.assert_close(one, apart[0], rtol=1e-9, atol=1e-12)


def test_reopold_is_its_readers():
    """Equations 4, 7 and 8 of 2603.11137 as four readers have them: a floor of log(0.2 / 0.8) under
    the reward, a mask of what reaches it and then of the student's top fifth by entropy, and a
    mean over what the mask keeps."""
    z, t, labels = problem(1)
    lp, lq = label_of(z.log_softmax(-1), labels), label_of(t.log_softmax(-1), labels)
    reward, floor = lq - lp, math.log(0.2 / 0.8)
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    masks = {1: reward >= floor, 2: entropy >= entropy.quantile(0.8)}
    assert (reward < floor)[masks[2]].any() and 0 < masks[1].sum() < N
    for stage, mask in masks.items():
        mean = -(reward.clamp(min=floor) * mask).sum() / mask.sum()
        found = distillation_loss(
            z, labels, LogitsTeacher(t), REOPOLD(stage=stage), backend="reference"
        )
        torch.testing.assert_close(found.loss, mean)


def test_aopd_is_its_readers():
    """Equations 9 and 10 of 2605.06387 as three readers have them: K1 where q(y) > p(y), and the
    forward KL on the teacher's top k where not."""
    z, t, labels = problem()

    def formula(lp, lq):
        own, other = label_of(lp, labels), label_of(lq, labels)
        k1 = -(other - own).detach() * (own - own.detach()).exp()
        ids = lq.topk(4).indices
        p_k, q_k = lp.gather(-1, ids), lq.gather(-1, ids)
        rewards = other.exp() - own.exp() > 0
        return torch.where(rewards, k1, (q_k.exp() * (q_k - p_k)).sum(-1))

    assert_same(ours(AOPD(top_k=4), z, t, labels), theirs(formula, z, t))


@pytest.mark.parametrize("group_relative", [False, True])
def test_opdvr_and_grpd_are_their_authors(group_relative):
    """README of LeapLabTHU/OPDVR: max(0, R) on a right answer, -max(0, -R) on a wrong one; GRPD
    multiplies it by the size of the group's advantage, here the mean of 8 rollouts taken off, as
    the README has it for the paper."""
    z, t, labels = problem()
    right = torch.arange(N) % 3 > 0
    size = torch.where(right, 1 - 5 / 8, 5 / 8) if group_relative else torch.ones(N)
    size = size.double()

    def transform(lq, lp):
        reward = lq - lp
        return size * torch.where(right, reward.clamp(min=0), -(-reward).clamp(min=0))

    rule = OPDVR(reward_filter="agree_scaled") if group_relative else OPDVR()
    found = ours(rule, z, t, labels, task_advantages=torch.where(right, size, -size))
    assert_same(found, theirs(rewarded(transform), z, t, labels))


# Credit that reads logits


def stats_of(rule, z, t, labels):
    return distillation_loss(z, labels, LogitsTeacher(t), rule, backend="reference").stats


@pytest.mark.parametrize("top_k", [None, 4])
def test_the_baseline_is_vopds(top_k):
    """opd_trainer.py of holi-lab/vOPD at c77a078, the code of 2605.07865: log q - log p of the
    token plus KL(p || q), whole or on the student's top k, where both sides are renormalised; it
    has k 100."""
    z, t, labels = problem()
    lp, lq = z.log_softmax(-1), t.log_softmax(-1)
    ids = lp.topk(top_k or V).indices
    on_k = [x.gather(-1, ids).log_softmax(-1) for x in (lp, lq)]
    expected = label_of(lq - lp, labels) + kl(*on_k)
    stats = stats_of(OPD(), z, t, labels)
    baseline = stats.reverse_kl
    if top_k is not None:
        rule = Divergence(
            "reverse_kl", top_k=top_k, top_k_ids="student", top_k_tail="renormalize_both"
        )
        baseline = ours(rule, z, t, labels)[0]
    found = credit.exact_kl_baseline(stats.reward[None], baseline[None])
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-12)


def test_delta_advantages_are_their_readers():
    """OPD^2, 2607.15161, by a reader and by train_reproduce.py of
    rehaanahmad2013/on-policy-delta-distillation at 4ec7f8d: both advantages less their mean under
    the student, and the delta's kept where the signs agree. Theirs is the mean over the student's
    top 1024 ids, renormalised."""
    z, t, labels = problem()
    lp, lq, lr = z.log_softmax(-1), t.log_softmax(-1), problem(5)[1].log_softmax(-1)
    p = lp.exp()

    def centred(signal):
        return label_of(signal, labels) - (p * signal).sum(-1)

    opd, delta = centred(lq - lp), centred(lq - lr)
    expected = torch.where(delta * opd > 0, delta, 0.0)
    assert 0 < (expected == 0).sum() < N
    of = [stats_of(OPD(), z, each, labels) for each in (lq, lr)]
    found = credit.delta_advantages(*(x[None] for s in of for x in (s.reward, s.reverse_kl)))
    torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-12)
