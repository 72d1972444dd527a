"""The task's advantages beside the reward, and the filter by their sign: KDRL, OPDVR."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import loss_and_gradient
from test_rewards import backends, two_tokens

from tropd_kernels import OPD, OPDVR, LogitsTeacher, TokenRule
from tropd_kernels.objectives import OUTLIERS, REWARDS
from tropd_kernels.objectives.rewards import REWARD_FILTERS, RewardSpec
from tropd_kernels.objectives.rule_fields import STATIC_THRESHOLD

filters = pytest.mark.parametrize("reward_filter", REWARD_FILTERS)


#: At M = 1/2 (q/p = 1/2), R = -log 2, w A = 0.5 * 3, KL(q || p) = 1/4 log(1/2) + 1/2 log 2: the two
#: halves' rewards.
OUTSIDE = {"mask": 0.0, "clip": -0.5, "forward_kl": 0.0, "forward_kl_reward": -0.1732867951}


@backends
@pytest.mark.parametrize("outlier", OUTLIERS)
@pytest.mark.parametrize("reward_filter", [None, *REWARD_FILTERS])
def test_the_task_counts_on_both_sides_of_the_gate(reward_filter, outlier, backend, device):
    """KDRL adds A to the reward; OPDVR keeps it where it has A's sign. Here R < 0 < A."""
    z, t, labels = two_tokens(device)
    rule = TokenRule(
        gate="expected", outlier=outlier, task_weight=0.5, reward_filter=reward_filter,
        policy_gradient=2.0, threshold=-0.5 if outlier == "clip" else STATIC_THRESHOLD,
    )  # fmt: skip
    task = torch.tensor([-1.0, 3.0], dtype=torch.float64, device=device)
    loss, gradient, stats = loss_and_gradient(
        z, labels, LogitsTeacher(t), rule, backend, reduction="none", task_advantages=task
    )
    kept = 1.0 if reward_filter in (None, "positive") else 0.0
    inside, outside = -0.6931471806 * kept + 1.5, OUTSIDE[outlier] * kept + 1.5
    total = 2 * (0.5 * inside + 0.5 * outside)
    kl = 0.5 * 0.1732867951 if outlier == "forward_kl" else 0.0  # which no filter drops
    assert loss[1].item() == pytest.approx(-total + kl, rel=1e-9)
    one_hot = torch.eye(3, dtype=torch.float64, device=device)[0]
    exact = -total * (one_hot - z[1].exp())
    if outlier == "forward_kl":
        exact = exact + 0.5 * (z[1].exp() - t[1].exp())
    torch.testing.assert_close(gradient[1], exact, rtol=1e-8, atol=1e-10)
    # Before the floor, the filter and A: what a next call takes as advantages.
    assert stats.reward[1].item() == pytest.approx(-0.6931471806)


@backends
@pytest.mark.parametrize("what", ["reward", "reward_filter"])
def test_a_name_in_the_tables_alone_is_refused(what, backend, device, monkeypatch):
    """... where an engine has no formula: not taken for another."""
    monkeypatch.setitem(REWARDS, "practice", RewardSpec())
    monkeypatch.setattr("tropd_kernels.objectives.rule_checks.REWARD_FILTERS", ("practice",))
    z, t, labels = two_tokens(device)
    rule = TokenRule(task_weight=1.0, **{what: "practice"})
    with pytest.raises(Exception) as raised:
        loss_and_gradient(
            z, labels, LogitsTeacher(t), rule, backend, task_advantages=torch.ones_like(z[:, 0])
        )
    error, texts = raised.value, ""
    while error is not None:  # Triton's compiler chains one error for each function around it
        texts, error = texts + str(error), error.__cause__
    assert ("no formula in Triton" if backend == "triton" else "'practice'") in texts


@backends
def test_opdvr_by_hand(backend, device):
    """2608.24696, section 4: max(R, 0) of a right answer, min(R, 0) of a wrong one, with R = log 2
    and -log 2. The size of A is without effect."""
    z, t, labels = two_tokens(device)
    ln2 = math.log(2)
    for a, expected in ((1.0, [-ln2, 0.0]), (-1.0, [0.0, ln2]), (1e-30, [-ln2, 0.0])):
        task = torch.full((2,), a, dtype=torch.float64, device=device)
        loss, gradient, stats = loss_and_gradient(
            z, labels, LogitsTeacher(t), OPDVR(), backend, reduction="none", task_advantages=task
        )
        assert loss.tolist() == pytest.approx(expected, rel=1e-12)
        assert gradient.any(-1).tolist() == [each != 0 for each in expected]
        assert stats.reward.tolist() == pytest.approx([ln2, -ln2])


@backends
def test_grpd_by_hand(backend, device):
    """2608.24696 by the authors' README and scripts (LeapLabTHU/OPDVR): what OPDVR keeps, times
    abs(A). Without the factor a group of seven right answers would teach as much by each of them as
    by the one that is wrong."""
    z, t, labels = two_tokens(device)
    ln2 = math.log(2)
    grpd = OPDVR(reward_filter="agree_scaled")
    each = (0.125, [-ln2 / 8, 0.0]), (-0.875, [0.0, 7 * ln2 / 8]), (3.0, [-3 * ln2, 0.0])
    for a, expected in each:
        task = torch.full((2,), a, dtype=torch.float64, device=device)
        loss, gradient, stats = loss_and_gradient(
            z, labels, LogitsTeacher(t), grpd, backend, reduction="none", task_advantages=task
        )
        assert loss.tolist() == pytest.approx(expected, rel=1e-12)
        assert gradient.any(-1).tolist() == [each != 0 for each in expected]
        one_hot = torch.eye(3, dtype=torch.float64, device=device)[0]
        kept = 0 if a > 0 else 1
        exact = loss[kept] * (one_hot - z[kept].exp())
        torch.testing.assert_close(gradient[kept], exact, rtol=1e-8, atol=1e-12)
        assert stats.reward.tolist() == pytest.approx([ln2, -ln2])


@backends
@pytest.mark.parametrize("a", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("reward_filter", ["agree", "agree_scaled"])
def test_an_infinite_reward_agrees_and_one_that_is_no_number_shows(
    reward_filter, a, backend, device, monkeypatch
):
    monkeypatch.setattr("tropd_kernels.loss.values.may_look", lambda problem: False)
    z, t, labels = two_tokens(device)
    given = torch.tensor([math.nan, -math.inf], dtype=torch.float64, device=device)
    loss, gradient, _ = loss_and_gradient(
        z, labels, LogitsTeacher(t), OPDVR(reward_filter=reward_filter), backend,
        reduction="none", advantages=given,
        task_advantages=torch.full((2,), a, dtype=torch.float64, device=device),
    )  # fmt: skip
    assert loss[0].isnan() and gradient[0].isnan().any()
    assert loss[1] == (math.inf if a < 0 else 0) and not gradient[1].any()


@backends
@filters
def test_an_advantage_of_0_has_neither_sign(reward_filter, backend, device):
    z, t, labels = two_tokens(device)
    zero = torch.zeros(2, dtype=torch.float64, device=device)
    rule = TokenRule(reward_filter=reward_filter)
    loss, gradient, _ = loss_and_gradient(
        z, labels, LogitsTeacher(t), rule, backend, task_advantages=zero
    )
    assert loss == 0 and not gradient.any()


@backends
def test_ppo_clips_the_sum_of_reward_and_task(backend, device):
    """rho = 2, clipped to 1.2 for a gain: of R < 0 beside A > 0 the sum's sign decides."""
    z, t, labels = two_tokens(device)
    rule = TokenRule(task_weight=1.0, clip_ratio_low=0.2, clip_ratio_high=0.2)
    options = dict(
        reduction="none", old_log_probs=z[:, 0] - math.log(2),
        advantages=torch.tensor([-1.0, -1.0], dtype=torch.float64, device=device),
        task_advantages=torch.tensor([3.0, 0.5], dtype=torch.float64, device=device),
    )  # fmt: skip
    loss, gradient, _ = loss_and_gradient(z, labels, LogitsTeacher(t), rule, backend, **options)
    torch.testing.assert_close(loss, loss.new_tensor([-2.4, 1.0]))
    assert not gradient[0].any() and gradient[1].any()


@backends
@filters
def test_a_task_advantage_of_nan_shows(reward_filter, backend, device, monkeypatch):
    """Where nobody looks at the values, as on a GPU with ignore_index=None: no filter drops it."""
    monkeypatch.setattr("tropd_kernels.loss.values.may_look", lambda problem: False)
    z, t, labels = two_tokens(device)
    task = torch.tensor([math.nan, 1.0], dtype=torch.float64, device=device)
    rule = TokenRule(reward_filter=reward_filter)
    loss, gradient, _ = loss_and_gradient(
        z, labels, LogitsTeacher(t), rule, backend, reduction="none", task_advantages=task
    )
    assert loss.isnan().tolist() == gradient.isnan().any(-1).tolist() == [True, False]


@backends
def test_the_task_keeps_out_of_a_teachers_prefix(backend, device):
    z, t, labels = two_tokens(device)
    task = torch.tensor([5.0, 5.0], dtype=torch.float64, device=device)
    options = dict(reduction="none", teacher_prefix=torch.tensor([True, False], device=device))
    rule = OPD(prefix_weight=0.1)
    plain, _, _ = loss_and_gradient(z, labels, LogitsTeacher(t), rule, backend, **options)
    rule = replace(rule, task_weight=1.0)
    loss, _, _ = loss_and_gradient(
        z, labels, LogitsTeacher(t), rule, backend, task_advantages=task, **options
    )
    torch.testing.assert_close(plain - loss, torch.tensor([0.0, 5.0], dtype=z.dtype, device=device))
    # Without a prefix term they are the student's as any other.
    rule = replace(rule, prefix_weight=None)
    loss, _, _ = loss_and_gradient(
        z, labels, LogitsTeacher(t), rule, backend, task_advantages=task, **options
    )
    torch.testing.assert_close(loss[0], -(loss.new_tensor(2.0).log() + 5))
