"""Temporal credit against a plain double loop in Python floats, over packed and masked batches."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from over_time import batches, close, loop, quick

from tropd_kernels import OPD, HiddenTeacher, credit, linear_distillation_loss


def loop_returns(discount):
    def per_sequence(rewards, counts):
        return [
            sum(discount ** (j - t) * rewards[j] for j in range(t, len(rewards)) if counts[j])
            for t in range(len(rewards))
        ]

    return per_sequence


def loop_gates(drift, mask, sequence_ids, block_size, tau):
    def per_sequence(drift, counts):
        if not any(counts):
            return drift
        first, blocks = counts.index(True), {}
        for t, counted in enumerate(counts):
            if counted:
                blocks.setdefault((t - first) // block_size, []).append(drift[t])
        mean = {b: sum(d) / len(d) for b, d in blocks.items()}
        return [
            math.exp(-tau * abs(mean[(t - first) // block_size])) if counted else 0.0
            for t, counted in enumerate(counts)
        ]

    gates = loop(drift, mask, sequence_ids, per_sequence)
    return gates / (gates.sum() / mask.sum()) if mask.any() else gates


def loop_importance(gamma):
    def per_sequence(rewards, counts):
        a = [abs(r) if counted else 0.0 for r, counted in zip(rewards, counts, strict=True)]
        total = sum(a)
        return [1 + gamma * (1 - (sum(a[:t]) / total if total else 0.0)) for t in range(len(a))]

    return per_sequence


# Against the loops


@quick
@given(batches(), st.sampled_from([0.0, 1e-200, 0.3, 0.99, 1.0]))
def test_return_to_go_is_the_double_loop(batch, discount):
    values, mask, ids = batch
    actual = credit.return_to_go(values, mask, discount, sequence_ids=ids)
    close(actual, loop(values, mask, ids, loop_returns(discount)))


@quick
@given(batches(), st.integers(1, 9), st.sampled_from([0.1, 1.0, 3.0]))
def test_drift_gates_are_the_double_loop(batch, block_size, tau):
    values, mask, ids = batch
    new = values.roll(1, 0) * 0.25
    actual = credit.drift_gates(values, new, mask, block_size, tau, sequence_ids=ids)
    close(actual, loop_gates(values - new, mask, ids, block_size, tau))


@quick
@given(batches(), st.sampled_from([0.0, 0.5, 2.0]))
def test_importance_weights_are_the_double_loop(batch, gamma):
    values, mask, ids = batch
    actual = credit.importance_weights(values, mask, gamma, sequence_ids=ids)
    close(actual, loop(values, mask, ids, loop_importance(gamma)))
    counted = actual[mask]
    assert counted.numel() == 0 or (counted.min() >= 1 and counted.max() <= 1 + gamma)


@quick
@given(batches(), st.sampled_from([0.01, 0.07, 0.2, 0.5, 1.0]))
def test_entropy_mask_takes_the_highest(batch, top_fraction):
    values, mask, _ = batch
    entropy = values.abs()
    chosen = credit.entropy_quantile_mask(entropy, mask, top_fraction)
    assert chosen.dtype == torch.bool
    assert not (chosen & ~mask).any()
    assert chosen.sum() == math.ceil(round(top_fraction * mask.sum().item(), 6))
    left_out = entropy[mask & ~chosen]
    if chosen.any() and left_out.numel():
        assert entropy[chosen].min() >= left_out.max()


# What each one is for


def test_exact_kl_baseline_has_mean_zero_under_the_student():
    generator = torch.Generator().manual_seed(0)
    lp, lq = torch.randn(2, 2, 5, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    kl = (lp.exp() * (lp - lq)).sum(-1)
    centred = torch.stack(
        [credit.exact_kl_baseline((lq - lp)[..., y], kl) for y in range(7)], dim=-1
    )
    close((lp.exp() * centred).sum(-1), torch.zeros(2, 5, dtype=torch.float64))


def test_exact_kl_baseline_leaves_the_reward_where_the_kl_is_infinite():
    rewards = torch.tensor([[-1.0, -math.inf, 2.0]])
    kl = torch.tensor([[math.inf, math.inf, 0.5]])
    expected = torch.tensor([[-1.0, -math.inf, 2.5]])
    assert torch.equal(credit.exact_kl_baseline(rewards, kl), expected)


def test_return_to_go_reaches_over_a_full_length():
    rewards = torch.zeros(1, 8192)
    rewards[0, -1] = 1.0
    returns = credit.return_to_go(rewards, discount=0.999)
    expected = 0.999 ** torch.arange(8191, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(returns[0].double(), expected, rtol=2e-6, atol=0)


def test_return_to_go_counts_masked_positions_in_the_exponent():
    rewards, mask = torch.tensor([[1.0, 99.0, 1.0]]), torch.tensor([[1, 0, 1]])
    expected = torch.tensor([[1.25, 0.0, 1.0]])
    assert torch.equal(credit.return_to_go(rewards, mask, 0.5), expected)


@pytest.mark.parametrize("discount", [1e-200, 1e-30, 0.5, 1.0])
def test_return_to_go_carries_minus_infinity_back_within_its_sequence(discount):
    rewards = torch.zeros(1, 400)
    rewards[0, 350] = -math.inf
    ids = (torch.arange(400) >= 50).long()[None]
    returns = credit.return_to_go(rewards, discount=discount, sequence_ids=ids)
    expected = torch.zeros(1, 400)
    expected[0, 50:351] = -math.inf
    assert torch.equal(returns, expected)


def test_drift_gates_have_mean_one_however_far_the_policy_has_moved():
    # The third block is masked: what does not count must not serve as the nearest one either.
    old, moved = (
        torch.full((1, 12), -1.0),
        500.0 * torch.tensor([[1.0] * 4 + [2.0] * 4 + [0.0] * 4]),
    )
    gates = credit.drift_gates(old, old - moved, torch.arange(12)[None] < 8, block_size=4)
    assert torch.equal(gates, torch.tensor([[2.0] * 4 + [0.0] * 8]))


def test_drift_gates_close_on_infinite_drift():
    old, new = torch.full((1, 4), -1.0), torch.tensor([[-1.0, -1.0, -1.0, -math.inf]])
    gates = credit.drift_gates(old, new, block_size=2)
    assert torch.equal(gates, torch.tensor([[2.0, 2.0, 0.0, 0.0]]))
    assert torch.equal(credit.drift_gates(old, new, block_size=4), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.0, 0.0, 0.0, 0.0], [1.5, 1.5, 1.5, 1.5]),
        ([-1.0, -math.inf, -1.0, -2.0], [1.5, 1.5, 1.0, 1.0]),
        ([-math.inf, -1.0, math.inf, -1.0], [1.5, 1.25, 1.25, 1.0]),
    ],
)
def test_importance_weights_take_the_limits(rewards, expected):
    # A finite sequence packed behind shows that the limit is taken per sequence.
    rewards, expected = rewards + [1.0, 3.0], expected + [1.5, 1.375]
    ids = torch.tensor([[0, 0, 0, 0, 1, 1]])
    weights = credit.importance_weights(torch.tensor([rewards]), sequence_ids=ids)
    assert torch.equal(weights, torch.tensor([expected]))


def test_entropy_mask_never_takes_a_masked_token():
    entropy, mask = torch.full((1, 3), -math.inf), torch.tensor([[0, 1, 1]])
    assert not credit.entropy_quantile_mask(entropy, mask, 1.0)[0, 0]


def test_entropy_mask_keeps_the_fraction_among_ties():
    entropy = torch.zeros(4, 25)
    entropy[2, 3] = 1.0
    for top_fraction, count in [(0.2, 20), (0.07, 7), (0.001, 1), (1.0, 100)]:
        chosen = credit.entropy_quantile_mask(entropy, top_fraction=top_fraction)
        assert chosen.sum() == count and chosen[2, 3]
    # Ties go to the earlier token: one of 20 % is spent on [2, 3], so 19 zeros from the front.
    chosen = credit.entropy_quantile_mask(entropy, top_fraction=0.2)
    assert chosen.flatten()[:19].all() and not chosen.flatten()[19:50].any()


# Errors name the argument, and say what was given

ONES = torch.ones(2, 5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: credit.return_to_go([1.0]), TypeError, "rewards must be a tensor, got list"),
        (lambda: credit.return_to_go(ONES.long()), TypeError, "rewards.*got torch.int64"),
        (lambda: credit.return_to_go(ONES[0]), ValueError, r"rewards.*got \(5,\).*unsqueeze"),
        (lambda: credit.return_to_go(ONES[None]), ValueError, r"rewards.*got \(1, 2, 5\)"),
        (
            lambda: credit.return_to_go(ONES, ONES[:, 1:] > 0),
            ValueError,
            r"mask.*\(2, 5\).*\(2, 4\)",
        ),
        (lambda: credit.return_to_go(ONES, ONES), TypeError, "mask.*token_weight"),
        (lambda: credit.return_to_go(ONES, discount=1.5), ValueError, r"discount.*\[0, 1\].*1.5"),
        (lambda: credit.return_to_go(ONES, discount=math.nan), ValueError, "discount.*nan"),
        (lambda: credit.return_to_go(ONES, discount="1"), TypeError, "discount.*got str"),
        (lambda: credit.return_to_go(ONES, discount=True), TypeError, "discount.*got bool"),
        (lambda: credit.return_to_go(ONES, sequence_ids=ONES), TypeError, "sequence_ids.*float32"),
        (
            lambda: credit.return_to_go(ONES, sequence_ids=ONES[:1].long()),
            ValueError,
            "sequence_ids",
        ),
        (lambda: credit.return_to_go(ONES, ONES.to("meta") > 0), ValueError, "mask.*meta.*move"),
        (lambda: credit.exact_kl_baseline(ONES, ONES[:1]), ValueError, "reverse_kl.*align"),
        (lambda: credit.drift_gates(ONES, ONES[:, :3]), ValueError, "log_probs.*align"),
        (lambda: credit.drift_gates(ONES, ONES, block_size=0), ValueError, "block_size.*got 0"),
        (lambda: credit.drift_gates(ONES, ONES, block_size=6.4), TypeError, "block_size.*float"),
        (lambda: credit.drift_gates(ONES, ONES, tau=0.0), ValueError, "tau must be positive"),
        (lambda: credit.drift_gates(ONES, ONES, tau=math.inf), ValueError, "tau.*inf"),
        (lambda: credit.drift_gates(ONES, ONES, tau=-1.0), ValueError, "tau.*got -1"),
        (lambda: credit.importance_weights(ONES, gamma=-0.5), ValueError, "gamma.*got -0.5"),
        (lambda: credit.importance_weights(ONES, gamma=ONES), TypeError, "gamma.*got Tensor"),
        (lambda: credit.entropy_quantile_mask(ONES, top_fraction=0), ValueError, "top_fraction"),
        (
            lambda: credit.entropy_quantile_mask(ONES, top_fraction=20),
            ValueError,
            "top_fraction.*20",
        ),
    ],
)
def test_errors_say_what_was_given(call, error, words):
    with pytest.raises(error, match=words):
        call()


# Packed rows, as flash-attention's boundaries describe them


def test_boundaries_become_ids():
    boundaries = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert credit.packed_sequence_ids(boundaries, 7).tolist() == [[0, 0, 2, 2, 2, 3, 3]]
    assert credit.packed_sequence_ids(boundaries, torch.tensor(6)).shape == (1, 6)
    assert credit.packed_sequence_ids(boundaries, 0).shape == (1, 0)


@pytest.mark.parametrize(
    ("boundaries", "error", "words"),
    [
        ([0, 3], TypeError, "cu_seqlens must be an int32 or int64 tensor, got list"),
        (torch.tensor([0.0, 3.0]), TypeError, "got torch.float32"),
        (torch.tensor([[0, 3]]), ValueError, r"shape \(sequences \+ 1,\), got \(1, 2\)"),
        (torch.tensor([3]), ValueError, "begin with 0"),
    ],
)
def test_bad_boundaries(boundaries, error, words):
    with pytest.raises(error, match=words):
        credit.packed_sequence_ids(boundaries, 3)


@pytest.mark.parametrize("total", [6.5, torch.tensor(6.5)])
def test_a_total_that_counts_no_positions(total):
    with pytest.raises(ValueError, match="^total must be a whole number of positions, got "):
        credit.packed_sequence_ids(torch.tensor([0, 2, 5]), total)


def test_a_packed_row_trains_as_its_sequences_do():
    """[1, total] with credit over time and a padded tail: loss and gradient of each sequence alone,
    summed."""
    draw = torch.Generator().manual_seed(0)
    lengths, total = [4, 1, 6], 13
    boundaries = torch.tensor([0, 4, 5, 11])
    weight, teacher_weight = (torch.randn(29, 8, generator=draw).double() for _ in range(2))
    packed = torch.randn(1, total, 8, generator=draw).double()
    labels = torch.randint(29, (1, total), generator=draw)
    labels[:, sum(lengths) :] = -100

    def loss(hidden, labels, ids):
        teacher = HiddenTeacher(0.9 * hidden.detach(), teacher_weight)
        rewards = linear_distillation_loss(hidden, weight, labels, teacher, OPD()).stats.reward
        counted = labels != -100
        future = credit.return_to_go(rewards, counted, 0.9, sequence_ids=ids)
        spread = credit.importance_weights(rewards, counted, sequence_ids=ids)
        return linear_distillation_loss(
            hidden, weight, labels, teacher, OPD(), advantages=future, token_weight=spread,
            reduction="sum",
        ).loss  # fmt: skip

    whole = packed.clone().requires_grad_()
    loss(whole, labels, credit.packed_sequence_ids(boundaries, total)).backward()
    alone = packed.clone().requires_grad_()
    for start, stop in itertools.pairwise(boundaries):
        loss(alone[:, start:stop], labels[:, start:stop], None).backward()
    torch.testing.assert_close(whole.grad, alone.grad, rtol=1e-12, atol=1e-14)
    mixed = packed.clone().requires_grad_()
    loss(mixed, labels, None).backward()
    assert (mixed.grad - alone.grad).norm() > 0.1 * alone.grad.norm()
