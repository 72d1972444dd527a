"""verl's distillation losses on plain tensors, against the reference."""

import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from problems import K, make_problem

from tropd_kernels import (
    AOPD,
    EOPD,
    GKD,
    KDRL,
    MOPD,
    OPD,
    REOPOLD,
    TOPD,
    TVOPD,
    ClipOutlier,
    Divergence,
    EntropyOPD,
    Log1pOPD,
    MaskOutlier,
    PowerOPD,
    SampledTeacher,
    TokenRule,
    TopKJSD,
    TopKTeacher,
    TrOPD,
    distillation_loss,
)
from tropd_kernels.draws import bernoulli_uniforms, philox4x32
from tropd_kernels.integrations import verl as integration
from tropd_kernels.integrations import verl_rows
from tropd_kernels.integrations.log_probs import sampled_losses, token_uniforms

HALF = dict(select_fraction=0.5)
SAMPLED = {
    "opd": OPD(),
    "opd_ppo": OPD(kl_penalty_coef=0.7, clip_ratio_low=0.2, clip_ratio_high=0.2),
    "entropy_bonus": OPD(entropy_coef=0.05),
    "clip_outlier": ClipOutlier(),
    "mask_outlier": MaskOutlier(),
    "mask": TrOPD(outlier="mask"),
    "expected": TrOPD(gate="expected", outlier="mask"),
    "clip": TrOPD(gate="expected", outlier="clip"),
    "entropy_opd": EntropyOPD(top_fraction=0.4),
    "nll": TokenRule(nll_weight=0.3),
    "by_reward": replace(OPD(entropy_coef=0.05), select_by="reward", **HALF),
    "by_disagreement": replace(MaskOutlier(), select_by="disagreement", **HALF),
    "by_entropy": replace(TrOPD(outlier="mask"), select_by="entropy", select_threshold=1.5),
}
TOP_K = {
    "tropd": TrOPD(top_k=3),
    "bucket": TrOPD(gate="expected", top_k_tail="bucket"),
    "reward": TrOPD(outlier="forward_kl_reward"),
    "clip": TrOPD(outlier="clip"),
    "aopd": AOPD(),
    "forward_kl": Divergence("forward_kl", top_k=1000),
    "mopd": MOPD(),
    "topk_jsd": TopKJSD(),
    "by_teacher_entropy": replace(AOPD(), select_by="teacher_entropy", **HALF),
    "by_disagreement": replace(TrOPD(), select_by="disagreement", **HALF),
}


def logits_and_teacher(tokens=24, vocab_size=37):
    """float64: logits (leaf), labels, teacher's log-probs (N, V), uniforms, old log-probs. The odd
    labels are among the teacher's likeliest ids, some of the others are not."""
    problem = make_problem(tokens=tokens, vocab_size=vocab_size)
    logits = (problem.hidden @ problem.weight.T).requires_grad_()
    log_q = problem.teacher_logits().log_softmax(-1)
    labels = problem.labels.clone()
    labels[1::2] = log_q[1::2].topk(3).indices[:, 2]
    draw = torch.Generator().manual_seed(3)
    drift = torch.rand(tokens, generator=draw, dtype=torch.float64) - 0.5
    old = logits.detach().log_softmax(-1).gather(-1, labels[:, None])[:, 0] + drift
    return logits, labels, log_q, problem.options["uniforms"].double(), old


@pytest.mark.parametrize("name", SAMPLED)
def test_a_sampled_loss_from_log_probs_is_the_reference_s(name):
    logits, labels, log_q, uniforms, old = logits_and_teacher()
    counted = torch.ones_like(labels, dtype=torch.bool)
    counted[::5] = False
    lq = log_q.gather(-1, labels[:, None])[:, 0]
    lq[3] = -math.inf if SAMPLED[name].gate != "always" else lq[3]

    truth = distillation_loss(
        logits, labels.where(counted, -100), SampledTeacher(lq), SAMPLED[name], uniforms=uniforms,
        old_log_probs=old, reduction="none", backend="reference",
    )  # fmt: skip
    (expected,) = torch.autograd.grad(truth.loss.sum(), logits)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    lp = log_p.gather(-1, labels[:, None])[:, 0]
    lq[::5] = -math.inf  # whatever stands at tokens that do not count
    losses, trust, score = sampled_losses(
        lp, lq, counted, SAMPLED[name], old_log_probs=old, entropy=entropy, uniforms=uniforms
    )
    assert (score is None) == (truth.stats.score is None)
    if score is not None:
        torch.testing.assert_close(score, truth.stats.score, equal_nan=True)
    (found,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(losses, truth.loss)
    expected_trust = torch.where(counted, truth.stats.trust, 0.0)
    torch.testing.assert_close(trust, expected_trust, equal_nan=True)
    torch.testing.assert_close(found, expected)
    assert found.abs().sum() > 0


def test_a_rule_that_reads_the_entropy_asks_for_it():
    some = torch.zeros(3)
    with pytest.raises(ValueError, match="reads the student's entropy: pass entropy="):
        sampled_losses(some, some, some == 0, EntropyOPD())


@pytest.mark.parametrize("name", TOP_K)
def test_a_top_k_loss_is_the_reference_s_with_labels_outside_k_ruled_out(name):
    logits, labels, log_q, uniforms, old = logits_and_teacher()
    labels[::5] = -100
    top = log_q.topk(K)
    inside = (top.indices == labels[:, None]).any(-1)
    outside = ((labels >= 0) & ~inside).nonzero()[:, 0]
    assert inside.any() and len(outside) > 1
    old[outside[0]] = -35.0  # not even the unlikeliest token is one that the teacher accepts
    lq = log_q.gather(-1, labels.clamp_min(0)[:, None])[:, 0].where(inside, -math.inf)
    rule = TOP_K[name]
    if rule.top_k is not None:
        rule = replace(rule, top_k=K)
    truth = distillation_loss(
        logits, labels, TopKTeacher(top.indices, top.values, lq), rule, uniforms=uniforms,
        old_log_probs=old, reduction="none", backend="reference",
    )  # fmt: skip
    assert truth.loss.isfinite().all()
    (expected,) = torch.autograd.grad(truth.loss.sum(), logits)
    for backend in ("reference", "torch", "triton", None):
        dtype = torch.float64 if backend == "reference" else torch.float32
        leaf = logits.detach().to(dtype).requires_grad_()
        found = verl_rows.top_k_losses(
            leaf, labels, top.values.to(dtype), top.indices.int(), TOP_K[name],
            old_log_probs=old.to(dtype), uniforms=uniforms.to(dtype), backend=backend,
        )  # fmt: skip
        losses = found["distillation_losses"]
        losses.sum().backward()
        close = {} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
        torch.testing.assert_close(losses.double(), truth.loss, **close)
        torch.testing.assert_close(leaf.grad.double(), expected, **close)
        assert torch.equal(found["tropd_label_in_topk"] > 0, inside)
        if rule.uses_sums:
            mass = found["teacher_mass"].double()
            known = ~mass.isnan() if rule.score else torch.ones_like(inside)
            assert known.any()
            torch.testing.assert_close(mass[known], truth.stats.teacher_topk_mass[known])


def test_the_gate_errs_on_no_more_than_the_teacher_s_tail():
    """The bound of the module's docstring: sum over ids outside k of p min(q/p, 1) <= 1 - mass."""
    logits, _, log_q, _, _ = logits_and_teacher()
    p, q = logits.detach().softmax(-1), log_q.exp()
    outside = torch.ones_like(q, dtype=torch.bool).scatter(-1, log_q.topk(K).indices, False)
    wrong = torch.where(outside, torch.minimum(p, q), 0.0).sum(-1)
    tail = torch.where(outside, q, 0.0).sum(-1)
    assert (wrong <= tail + 1e-12).all() and wrong.max() > 0


def test_draws_depend_on_the_sequence_alone():
    one, two = torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 9])

    def draws(*sequences, seed=1):
        offsets = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0)
        return token_uniforms(seed, torch.cat(sequences), offsets)

    packed = draws(one, two)
    assert packed.dtype == torch.float32 and packed.shape == (7,)
    assert torch.equal(packed, torch.cat([draws(one), draws(two)]))
    assert torch.equal(draws(two, one), torch.cat([draws(two), draws(one)]))
    # Not the prefix alone names a sequence, nor the multiset of its ids.
    assert not torch.equal(packed[:2], packed[4:6])
    assert not torch.equal(draws(torch.tensor([6, 5, 7, 8]))[2:], packed[2:4])
    assert not torch.equal(draws(one, seed=2), draws(one))
    # Named by the whole sequence, and placed at the token that the row is about.
    zero = torch.zeros(3, dtype=torch.int64)
    words = philox4x32((torch.arange(3), two, zero, zero), (zero, zero))
    name = (words[0].sum() % 2**31) + (words[1].sum() % 2**31) * 2**31
    by_hand = bernoulli_uniforms(1, 0, name.expand(3), torch.arange(1, 4))
    assert torch.equal(draws(two), by_hand)
    many = draws(torch.arange(4000))
    assert abs(float(many.mean()) - 0.5) < 0.03 and many.unique().numel() > 3990


@pytest.mark.parametrize(
    ("rule", "teacher", "why"),
    [
        (GKD(), "top_k", "whole distribution"),
        (TrOPD(top_k=None), "top_k", "whole distribution"),
        (TrOPD(), "sampled", "teacher='top_k'"),
        (MOPD(), "sampled", "teacher='top_k'"),
        (TokenRule(z_loss=1e-4), "sampled", "z_loss.*teacher='top_k'"),
        (TokenRule(nll_weight=0.1, label_smoothing=0.1), "sampled", "smoothing.*teacher='top_k'"),
        (EOPD(), "top_k", "outside the top k"),
        (OPD(), "top_k", "teacher='sampled'"),
        (Log1pOPD(), "top_k", "unbounded"),
        (KDRL(task_weight=1.0), "sampled", "task_advantages"),
        (replace(OPD(), select_by="teacher_entropy", **HALF), "sampled", "teacher='top_k'"),
        (replace(OPD(), select_by="reverse_kl", **HALF), "sampled", "whole distribution"),
        (replace(OPD(), select_by="scores", **HALF), "sampled", "no scores"),
        (replace(AOPD(), select_by="scores", **HALF), "top_k", "no scores"),
        (REOPOLD(), "sampled", "mean is over the tokens kept"),
        (OPD(), "dense", "'sampled', 'top_k'"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(rule, teacher, why):
    with pytest.raises(ValueError, match=why):
        integration.check_rule("mine", rule, teacher)


@pytest.mark.parametrize(
    "rule", [PowerOPD(), TOPD(alpha=0.5), TVOPD(scale=1.0), TokenRule(clip_reward_low=-5.0)]
)
def test_a_bounded_reward_goes_with_the_top_k(rule):
    """A label outside the k ids is one that the teacher rules out: the reward's least."""
    integration.check_rule("mine", rule, "top_k")
    logits, labels, log_q, _, _ = logits_and_teacher()
    top = log_q.topk(K)
    found = verl_rows.top_k_losses(logits, labels, top.values, top.indices.int(), rule)
    outside = found["tropd_label_in_topk"] == 0
    assert outside.any() and found["distillation_losses"].isfinite().all()
    assert (found["distillation_losses"][outside] > 0).all()
    integration.check_rule("mine", rule, "sampled")


def test_every_name_can_be_served():
    for teacher, rules in (("sampled", integration.SAMPLED), ("top_k", integration.TOP_K)):
        for name, rule in rules.items():
            integration.check_rule(name, rule, teacher)
            assert name.startswith("tropd")


def test_a_mean_is_over_the_tokens_that_have_the_value(monkeypatch):
    """A selection leaves the others without a gate."""
    metrics_of = plain_metrics(monkeypatch)
    some = torch.tensor([1.0, math.nan, 0.0, 1.0])
    counted = torch.tensor([True, True, True, False])
    found = metrics_of(TrOPD(), counted, tropd_trust=some, student_mass=some / 2)
    assert found == {
        "trust": 0.5, "student_mass": 0.25, "student_mass_min": 0.0, "student_mass_max": 0.5
    }  # fmt: skip


def test_metrics_of_a_selection(monkeypatch):
    """By hand; the last token does not count, and has the highest score."""
    metrics_of = plain_metrics(monkeypatch)
    rule = replace(TrOPD(), select_by="disagreement", select_threshold=3.0)
    counted = torch.tensor([True, True, True, True, False])
    trust = torch.tensor([math.nan, 1.0, 1.0, math.nan, 0.0])
    score = torch.tensor([2.0, 6.0, 4.0, 0.5, math.nan])
    found = metrics_of(rule, counted, tropd_trust=trust, tropd_score=score)
    share = 10.0 / 12.5
    assert found == {"trust": 1.0, "select_threshold": 4.0, "selected_score_share": share}
    infinite = score.where(score < 5, math.inf)
    found = metrics_of(rule, counted, tropd_trust=trust, tropd_score=infinite)
    assert found["select_threshold"] == 4.0 and found["selected_score_share"] == 4.0 / 6.5
    fraction = replace(rule, select_threshold=None, select_fraction=0.5)
    infinite = torch.where(trust == 1, math.inf, score)  # the selected ones, of which none is known
    found = metrics_of(fraction, counted, tropd_trust=trust, tropd_score=infinite)
    assert found["select_threshold"] == 2.0 and found["selected_score_share"] == 0.0
    found = metrics_of(fraction, counted, tropd_trust=trust, tropd_score=0 * score)
    assert found["select_threshold"] == 0.0 and found["selected_score_share"] == 1.0
    found = metrics_of(fraction, counted, tropd_trust=0 * trust, tropd_score=math.nan * score)
    assert found["select_threshold"] == 0.0 and found["selected_score_share"] == 1.0
    rewards = replace(rule, select_by="reward")
    found = metrics_of(rewards, counted, tropd_trust=trust, tropd_score=-score)
    assert found == {"trust": 1.0, "select_threshold": -6.0}

    none = trust * math.nan
    found = metrics_of(rule, counted, tropd_trust=none, tropd_score=score, teacher_mass=none)
    assert found == {
        "trust": 1.0, "select_threshold": 3.0, "selected_score_share": 0.0, "teacher_mass": 1.0,
        "teacher_mass_min": math.inf, "teacher_mass_max": -math.inf,
    }  # fmt: skip


def plain_metrics(monkeypatch):
    """`_metrics` with numbers for verl's metrics, under names without a prefix."""
    for name in ("verl", "verl.utils", "verl.utils.metric"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    kinds = SimpleNamespace(MEAN="mean", MIN="min", MAX="max")
    sys.modules["verl.utils.metric"].AggregationType = kinds
    sys.modules["verl.utils.metric"].Metric = lambda kind, value: value

    def metrics_of(rule, counted, **seen):
        found = integration._metrics(rule, counted, seen)
        return {name.removeprefix("distillation/"): value for name, value in found.items()}

    return metrics_of
