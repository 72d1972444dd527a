"""Windowed returns, TOP-D's mean of the future and GAE, against plain loops and by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from over_time import batches, close, loop, quick, sequences

from tropd_kernels import credit

INF = math.inf


def loop_window(discount, window):
    def per_sequence(rewards, counts):
        length = len(rewards)
        return [
            sum(
                discount ** (j - t) * rewards[j]
                for j in range(t, min(t + window, length))
                if counts[j]
            )
            for t in range(length)
        ]

    return per_sequence


def loop_future_mean(rewards, counts):
    result = []
    for t, reward in enumerate(rewards):
        later = [rewards[j] for j in range(t + 1, len(rewards)) if counts[j]]
        result.append(reward + (sum(later) / len(later) if later else 0.0))
    return result


def loop_gae(rewards, values, bootstrap, mask, sequence_ids, discount, gae_lambda):
    """From the last token that counts back, gap by gap."""
    advantages = torch.zeros_like(rewards)
    for row, run in sequences(mask, sequence_ids):
        counted = [t for t in run if mask[row, t]]
        advantage = 0.0
        for i, t in reversed(list(enumerate(counted))):
            if i + 1 < len(counted):
                later = counted[i + 1]
                kept = discount ** (later - t)
                following = kept * values[row, later].item()
            else:
                kept, following = 0.0, discount * bootstrap[row, t].item()
            delta = rewards[row, t].item() + following - values[row, t].item()
            advantage = delta + gae_lambda * kept * advantage
            advantages[row, t] = advantage
    return advantages, torch.where(mask, advantages + values, 0.0)


# Windows


@quick
@given(batches(), st.sampled_from([0.0, 1e-200, 0.3, 1.0]), st.integers(1, 18))
def test_windowed_return_is_the_double_loop(batch, discount, window):
    values, mask, ids = batch
    actual = credit.return_to_go(values, mask, discount, window=window, sequence_ids=ids)
    close(actual, loop(values, mask, ids, loop_window(discount, window)))


def test_windowed_return_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])
    # 1 + 2/2 + 4/4, 2 + 4/2 + 8/4, 4 + 8/2 + 16/4, 8 + 16/2, 16
    expected = torch.tensor([[3.0, 6.0, 12.0, 16.0, 16.0]])
    assert torch.equal(credit.return_to_go(rewards, discount=0.5, window=3), expected)
    # A masked position takes its place in the window.
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    expected = torch.tensor([[2.0, 4.0, 0.0, 16.0, 16.0]])
    assert torch.equal(credit.return_to_go(rewards, mask, 0.5, window=3), expected)


@pytest.mark.parametrize("length", [1, 2, 5, 64, 77])
@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_window_ends_are_the_reward_and_the_whole_return(length, discount):
    rewards = torch.randn(2, length, generator=torch.Generator().manual_seed(length))
    assert torch.equal(credit.return_to_go(rewards, discount=discount, window=1), rewards)
    whole = credit.return_to_go(rewards, discount=discount)
    # Behind other sequences the row is longer than the window: still no bit differs.
    before = torch.full((2, 40), 7.0)
    packed = torch.cat([before, rewards], 1)
    ids = (torch.arange(40 + length) >= 40).long().expand(2, -1)
    for window in (length, length + 1, length + 37, 10**6):
        windowed = credit.return_to_go(packed, discount=discount, window=window, sequence_ids=ids)
        assert torch.equal(windowed[:, 40:], whole)


def test_window_keeps_minus_infinity_to_those_who_reach_it():
    rewards = torch.tensor([[0.0, 1.0, 2.0, -INF, 3.0]])
    returns = credit.return_to_go(rewards, window=3)
    assert torch.equal(returns, torch.tensor([[3.0, -INF, -INF, -INF, 3.0]]))


# TOP-D


@quick
@given(batches())
def test_future_mean_is_the_double_loop(batch):
    values, mask, ids = batch
    actual = credit.reward_plus_future_mean(values, mask, sequence_ids=ids)
    close(actual, loop(values, mask, ids, loop_future_mean))


def test_future_mean_by_hand():
    rewards = torch.tensor([[1.0, 2.0, 99.0, 4.0, 8.0]])
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    # 1 + (2 + 4 + 8)/3, 2 + (4 + 8)/2, masked, 4 + 8, 8
    expected = torch.tensor([[1 + 14 / 3, 8.0, 0.0, 12.0, 8.0]])
    torch.testing.assert_close(credit.reward_plus_future_mean(rewards, mask), expected)


def test_future_mean_carries_minus_infinity_back_within_its_sequence():
    rewards = torch.tensor([[1.0, 2.0, 3.0, -INF, 5.0]])
    ids = torch.tensor([[0, 0, 1, 1, 1]])
    credits = credit.reward_plus_future_mean(rewards, sequence_ids=ids)
    assert torch.equal(credits, torch.tensor([[3.0, 2.0, -INF, -INF, 5.0]]))


# GAE


@quick
@given(batches(), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0.0, 1e-200, 0.6, 1.0]))
def test_gae_is_the_loop(batch, discount, gae_lambda):
    rewards, mask, ids = batch
    values, bootstrap = rewards.roll(1, 0) * 0.5 + 1, rewards.flip(1) - 2
    actual = credit.generalized_advantages(
        rewards, values, mask, discount, gae_lambda, bootstrap_values=bootstrap, sequence_ids=ids
    )
    expected = loop_gae(rewards, values, bootstrap, mask, ids, discount, gae_lambda)
    for one, other in zip(actual, expected, strict=True):
        close(one, other)
    without = credit.generalized_advantages(
        rewards, values, mask, discount, gae_lambda, sequence_ids=ids
    )
    zeros = torch.zeros_like(values)
    close(without[0], loop_gae(rewards, values, zeros, mask, ids, discount, gae_lambda)[0])


def test_gae_by_hand():
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 1.0, 2.0]])
    # d = 1 + 1/2 - 1/2, 2 + 2/2 - 1, 3 - 2;  A_t = d_t + A_{t+1} / 4
    advantages, targets = credit.generalized_advantages(rewards, values, None, 0.5, 0.5)
    assert torch.equal(advantages, torch.tensor([[1.5625, 2.25, 1.0]]))
    assert torch.equal(targets, torch.tensor([[2.0625, 3.25, 3.0]]))
    # Cut off before a state of value 4, the last d is 3 + 4/2 - 2. Elsewhere it is not read.
    cut, _ = credit.generalized_advantages(
        rewards, values, None, 0.5, 0.5, bootstrap_values=torch.tensor([[math.nan, math.nan, 4.0]])
    )
    assert torch.equal(cut, torch.tensor([[1.6875, 2.75, 3.0]]))
    # The middle token masked: d_0 = 1 + 2/4 - 1/2, and A_0 = d_0 + (1/4)(1/2) A_2.
    gap, _ = credit.generalized_advantages(
        rewards, values.masked_fill(values == 1, math.nan), torch.tensor([[1, 0, 1]]), 0.5, 0.5
    )
    assert torch.equal(gap, torch.tensor([[1.125, 0.0, 1.0]]))


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_gae_ends_are_return_to_go_and_the_delta(discount):
    draw = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 77, generator=draw)
    mask = torch.rand(3, 77, generator=draw) < 0.7
    ids = (torch.rand(3, 77, generator=draw) < 0.1).cumsum(1)
    advantages, targets = credit.generalized_advantages(
        rewards, torch.zeros_like(values), mask, discount, 1.0, sequence_ids=ids
    )
    returns = credit.return_to_go(rewards, mask, discount, sequence_ids=ids)
    assert torch.equal(advantages, returns) and torch.equal(targets, returns)
    delta, targets = credit.generalized_advantages(rewards[:, :9], values[:, :9], None, discount, 0)
    ahead = torch.cat([values[:, 1:9], torch.zeros(3, 1)], 1)
    assert torch.equal(delta, rewards[:, :9] + discount * ahead - values[:, :9])
    assert torch.equal(targets, delta + values[:, :9])


def test_gae_passes_tool_output_as_one_step():
    """With discount 1, a tool's 40 tokens between two turns change nothing: one factor lambda."""
    draw = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 1, 12, generator=draw).double()
    expected, _ = credit.generalized_advantages(rewards, values, None, 1.0, 0.9)
    tool = torch.full((1, 40), math.nan).double()
    cut = [torch.cat([x[:, :5], tool, x[:, 5:], tool], 1) for x in (rewards, values)]
    actual, _ = credit.generalized_advantages(*cut, ~cut[0].isnan(), 1.0, 0.9)
    close(torch.cat([actual[:, :5], actual[:, 45:52]], 1), expected)


@pytest.mark.parametrize("gae_lambda", [1e-200, 1e-30, 0.5, 1.0])
def test_gae_carries_minus_infinity_back_within_its_sequence(gae_lambda):
    rewards, values = torch.zeros(1, 400), torch.ones(1, 400)
    rewards[0, 350] = -INF
    ids = (torch.arange(400) >= 50).long()[None]
    advantages, targets = credit.generalized_advantages(
        rewards, values, None, 1.0, gae_lambda, sequence_ids=ids
    )
    minus = (torch.arange(400) >= 50) & (torch.arange(400) <= 350)
    assert torch.equal(advantages[0] == -INF, minus) and advantages[0, ~minus].isfinite().all()
    assert torch.equal(targets == -INF, advantages == -INF)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(0.0, 0.9), (0.9, 0.0)])
def test_gae_of_one_step_keeps_minus_infinity_to_its_token(discount, gae_lambda):
    rewards = torch.tensor([[1.0, -INF, 1.0]])
    advantages, _ = credit.generalized_advantages(
        rewards, torch.zeros(1, 3), None, discount, gae_lambda
    )
    assert torch.equal(advantages, rewards)


def test_gae_with_an_infinite_value_is_nan_before_it():
    values = torch.tensor([[1.0, INF, 1.0]])
    advantages, _ = credit.generalized_advantages(torch.zeros(1, 3), values)
    assert advantages.isnan().tolist() == [[True, False, False]]


def test_gae_shows_nan_in_values_and_in_the_bootstrap():
    rewards, nan = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, math.nan]])
    by_value, _ = credit.generalized_advantages(rewards, nan)
    assert by_value.isnan().all()
    cut, _ = credit.generalized_advantages(rewards, rewards, bootstrap_values=nan)
    assert cut.isnan().all()


ONES = torch.ones(2, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: credit.return_to_go(ONES, window=0), ValueError, "window.*at least 1.*got 0"),
        (lambda: credit.return_to_go(ONES, window=2.0), TypeError, "window.*int.*float"),
        (lambda: credit.return_to_go(ONES, window=True), TypeError, "window.*bool"),
        (lambda: credit.reward_plus_future_mean(ONES.long()), TypeError, "rewards.*int64"),
        (lambda: credit.reward_plus_future_mean(ONES, ONES), TypeError, "mask.*token_weight"),
        (
            lambda: credit.reward_plus_future_mean(ONES, sequence_ids=ONES),
            TypeError,
            "sequence_ids.*float32",
        ),
        (lambda: credit.generalized_advantages(ONES, ONES[:1]), ValueError, "values.*align"),
        (lambda: credit.generalized_advantages(ONES, 0.0), TypeError, "values.*got float"),
        (lambda: credit.generalized_advantages(ONES, ONES, discount=2), ValueError, "discount"),
        (
            lambda: credit.generalized_advantages(ONES, ONES, gae_lambda=1.1),
            ValueError,
            r"gae_lambda.*\[0, 1\].*1.1",
        ),
        (
            lambda: credit.generalized_advantages(ONES, ONES, gae_lambda=math.nan),
            ValueError,
            "gae_lambda.*nan",
        ),
        (
            lambda: credit.generalized_advantages(ONES, ONES, bootstrap_values=ONES[:, 0]),
            ValueError,
            r"bootstrap_values.*\(2,\).*unsqueeze",
        ),
        (
            lambda: credit.generalized_advantages(ONES, ONES, bootstrap_values=ONES.to("meta")),
            ValueError,
            "bootstrap_values.*meta",
        ),
    ],
)
def test_errors_say_what_was_given(call, error, words):
    with pytest.raises(error, match=words):
        call()
