"""Advantages and tokens where the teacher agrees with somebody: OPD^2's delta, RA-OPD's filter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from over_time import batches, quick, sequences

from tropd_kernels import OPD, LogitsTeacher, credit, distillation_loss

INF = math.inf


# OPD^2


def statistics(z, labels, teacher):
    stats = distillation_loss(z, labels, LogitsTeacher(teacher), OPD()).stats
    return stats.reward, stats.reverse_kl


def test_delta_advantages_by_hand():
    """2607.15161, section 4: p = (1/2, 1/2), q = (3/4, 1/4), r = (2/3, 1/3), y = 0. log(q/r) is
    log(9/8) and log(3/4), its mean log(27/32) / 2: the delta is log(3/2) / 2, and the teacher's own
    advantage log(3) / 2. With q and r exchanged the delta is negative, and the teacher's is not:
    opposed."""
    z = torch.zeros(1, 1, 2, dtype=torch.float64)
    q, r = (torch.tensor([[row]], dtype=torch.float64).log() for row in ([3.0, 1.0], [2.0, 1.0]))
    label = torch.zeros(1, 1, dtype=torch.int64)
    of_q, of_r = statistics(z, label, q), statistics(z, label, r)
    assert credit.delta_advantages(*of_q, *of_r).item() == pytest.approx(0.2027325541, abs=1e-10)
    assert credit.delta_advantages(*of_r, *of_q).item() == 0
    label = 1 - label
    of_q, of_r = statistics(z, label, q), statistics(z, label, r)
    assert credit.delta_advantages(*of_q, *of_r).item() == pytest.approx(-0.2027325541, abs=1e-10)


def test_delta_advantages_are_the_formula():
    """... written out over the vocabulary, every id as a label."""
    z, t, r = torch.randn(3, 12, dtype=torch.float64)
    log_p, log_q, log_r = (each.log_softmax(-1) for each in (z, t, r))
    p = log_p.exp()
    delta = log_q - log_r - (p * (log_q - log_r)).sum()
    teacher = log_q - log_p - (p * (log_q - log_p)).sum()
    expected = torch.where(delta * teacher > 0, delta, 0.0)
    assert 0 < (expected == 0).sum() < 12
    rows, labels = [each.expand(1, 12, 12) for each in (z, t, r)], torch.arange(12)[None]
    found = credit.delta_advantages(
        *statistics(rows[0], labels, rows[1]), *statistics(rows[0], labels, rows[2])
    )
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # The teacher excludes the token: pushed down. The base model alone: pulled up.
        ((-INF, INF, -1.0, 0.5), -INF),
        ((1.0, 0.5, -INF, INF), INF),
        ((-INF, INF, -INF, INF), math.nan),
        ((1.0, math.nan, 1.0, 0.5), math.nan),
        # The base model excludes another id: no mean, and the rest stays.
        ((1.0, 0.5, 0.25, INF), 1.25),
    ],
)
def test_infinite_deltas(values, expected):
    found = credit.delta_advantages(*(torch.tensor([[v]]) for v in values))
    assert found.item() == pytest.approx(expected, nan_ok=True)


# RA-OPD


@quick
@given(batches(), st.sampled_from([1.0, -0.25, 0.0]))
def test_the_aligned_sequences_are_the_loop(batch, outcome):
    values, mask, ids = batch
    values = values.round()  # sums without a rounding, and some of 0
    expected = torch.zeros_like(mask)
    for row, run in sequences(mask, ids):
        total = math.fsum(values[row, t].item() for t in run if mask[row, t])
        for t in run:
            expected[row, t] = mask[row, t] and outcome * total >= 0
    outcomes = torch.full_like(values, outcome)
    found = credit.reward_aligned_mask(values, outcomes, mask, sequence_ids=ids)
    assert torch.equal(found, expected)


def test_aligned_sequences_by_hand():
    # G = 1 - 3 < 0 of a right answer: dropped; of a wrong one: kept. The masked 9 does not count.
    rewards = torch.tensor([[1.0, 9.0, -3.0, 2.0, -1.0]])
    mask, ids = torch.tensor([[1, 0, 1, 1, 1]]), torch.tensor([[0, 0, 0, 1, 1]])
    for outcome, expected in ((1.0, [0, 0, 0, 1, 1]), (-1.0, [1, 0, 1, 0, 0])):
        found = credit.reward_aligned_mask(
            rewards, torch.full_like(rewards, outcome), mask, sequence_ids=ids
        )
        assert found.tolist() == [[bool(each) for each in expected]]
    excluded = torch.tensor([[-INF, 5.0]])
    assert not credit.reward_aligned_mask(excluded, torch.ones(1, 2)).any()


ONES = torch.ones(2, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: credit.delta_advantages(ONES, ONES, ONES[:1], ONES), ValueError, "base_rewards"),
        (lambda: credit.delta_advantages(ONES, ONES, ONES, 0.0), TypeError, "base_reverse_kl.*got"),
        (lambda: credit.delta_advantages(ONES, ONES[:1], ONES, ONES), ValueError, "^reverse_kl"),
        (
            lambda: credit.delta_advantages(ONES.long(), ONES, ONES, ONES),
            TypeError,
            "^rewards.*int",
        ),
        (
            lambda: credit.reward_aligned_mask(ONES, ONES[:, 0]),
            ValueError,
            "outcomes.*align|outcomes",
        ),
        (
            lambda: credit.reward_aligned_mask(ONES, ONES > 0),
            TypeError,
            "outcomes must be floating",
        ),
    ],
)
def test_errors_say_what_was_given(call, error, words):
    with pytest.raises(error, match=words):
        call()
