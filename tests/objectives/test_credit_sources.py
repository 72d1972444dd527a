"""Credit over time beside its sources' formulas, written out again in float64, a token at a time.

The docstring of each names what was read. What a source leaves open is in `docs/papers.md`.
"""

import pytest
import torch

from tropd_kernels import credit


def over_time(seed=0):
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.randn(3, 7, generator=draw, dtype=torch.float64)
    mask = torch.rand(3, 7, generator=draw) < 0.7
    assert mask.any(1).all()
    return rewards, mask


def test_importance_weights_are_their_authors():
    """dp_actor.py of YannX1e/Importance-Weighted-On-Policy-Distillation, whose iw_opd_weight_max of
    1.5 is 1 + gamma; TRL's IWOPDTrainer has the same, with iw_opd_gamma 0.5."""
    rewards, mask = over_time()
    gap = rewards.abs() * mask
    before = (gap.cumsum(-1) - gap) / gap.sum(-1, keepdim=True)
    expected = (1 + (1.5 - 1) * (1 - before)) * mask
    torch.testing.assert_close(credit.importance_weights(rewards, mask), expected)


def test_top_ds_credit_is_prime_rls():
    """_sample_returns of prime-rl#2966, over the trained tokens alone; the last keeps its own."""
    rewards, mask = over_time()
    rewards, mask = rewards[[0, 1, 2, 2]], mask[[0, 1, 2, 2]]
    mask[3] = torch.arange(7) == 3  # one token alone
    found = credit.reward_plus_future_mean(rewards, mask)
    for row in range(4):
        own = rewards[row][mask[row]]
        later = own.flip(0).cumsum(0).flip(0) - own
        count = torch.arange(len(own) - 1, -1, -1).clamp(min=1)
        torch.testing.assert_close(found[row][mask[row]], own + later / count)


def test_drift_gates_are_their_readers():
    """Equation 1 of 2606.24084 by two readers: exp(-tau abs(mean of a block's drift)), over its
    mean at the positions that count. Blocks are 64 tokens, or spans between newlines."""
    old, mask = over_time(1)
    new = over_time(2)[0]
    newline = torch.rand(3, 7, generator=torch.Generator().manual_seed(3)) < 0.3
    fixed = torch.arange(7).expand(3, 7) // 3
    spans = newline.cumsum(1) - newline.long()  # a newline ends its line
    assert newline[:, :-1].any(1).all()
    by_line = {"block_ids": spans}
    every = torch.ones_like(mask)
    for ids, counts, how in (
        (fixed, every, {"block_size": 3}), (spans, every, by_line), (spans, mask, by_line),
    ):  # fmt: skip
        gates = torch.zeros_like(old)
        for row in range(3):
            for one in ids[row].unique():
                block = (ids[row] == one) & counts[row]
                gates[row, block] = (-0.7 * (old - new)[row, block].mean().abs()).exp()
        found = credit.drift_gates(old, new, counts, tau=0.7, **how)
        torch.testing.assert_close(found, gates / gates[counts].mean())


def test_reward_aligned_answers_are_their_readers():
    """RA-OPD, 2608.27960, by two readers: (2 R - 1) G >= 0, with G the answer's sum of rewards."""
    rewards, mask = over_time()
    total = (rewards * mask).sum(-1, keepdim=True)
    for right in (torch.tensor([[1], [0], [1]]), torch.tensor([[0], [1], [0]])):
        outcomes = (2 * right - 1).double().expand_as(rewards)
        expected = mask & ((2 * right - 1) * total >= 0)
        assert torch.equal(credit.reward_aligned_mask(rewards, outcomes, mask), expected)


# Returns


def recurrence(rewards, mask, discount):
    """running = r_t + discount running, from the end back; a masked token adds no reward."""
    returns, running = torch.zeros_like(rewards), torch.zeros(rewards.shape[0]).double()
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] * mask[:, t] + discount * running
        returns[:, t] = running
    return returns


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_returns_are_tinkers(discount):
    """incorporate_kl_penalty in distillation/train_on_policy.py of tinker-cookbook at 9dfcc3a: the
    masked rewards, discounted by position; a discount of 0 leaves each its own. Nothing is
    centred. Masked positions hold a return there that its loss does not read."""
    rewards, mask = over_time()
    found = credit.return_to_go(rewards, mask, discount)
    torch.testing.assert_close(found, recurrence(rewards, mask, discount) * mask)


@pytest.mark.parametrize("discount", [0.7, 1.0])
def test_minillms_returns_are_quotients(discount):
    """_get_advantages_and_returns in minillm/losses.py of microsoft/LMOps at 4f2a9de: the return
    over the number of tokens that are left, itself included, before it is whitened."""
    rewards, mask = over_time()
    left = mask.double().flip(1).cumsum(1).flip(1)
    expected = recurrence(rewards, mask, discount) / left.clamp(min=1)
    counts = credit.return_to_go(torch.ones_like(rewards), mask)
    found = credit.return_to_go(rewards, mask, discount) / counts.clamp(min=1)
    torch.testing.assert_close(found, expected * mask)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.8, 0.6)])
def test_gae_is_the_mean_of_k_step_advantages(discount, gae_lambda):
    """1506.02438 by its readers: the k-step advantage is the sum of k discounted rewards and
    the discounted value after them, less V_t; GAE weighs them by (1 - lambda) lambda^(k-1). A
    sequence's end has the value 0, so every longer step has the last one's advantage."""
    rewards, values = over_time(1)[0], over_time(2)[0]
    length, expected = 7, 0
    for k in range(1, length + 1):
        after = torch.cat([values[:, k:], torch.zeros(3, k).double()], 1)
        steps = credit.return_to_go(rewards, discount=discount, window=k)
        advantage = steps + discount**k * after - values
        weight = gae_lambda ** (k - 1) * (1 if k == length else 1 - gae_lambda)
        expected = expected + weight * advantage
    found, targets = credit.generalized_advantages(rewards, values, None, discount, gae_lambda)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(targets, expected + values)


def verls_gae(rewards, values, mask, discount, gae_lambda):
    """compute_gae_advantage_return of verl 0.9.1, before it whitens: a masked token leaves the next
    value and the advantage as they are."""
    advantages = torch.zeros_like(rewards)
    following = advantage = torch.zeros(rewards.shape[0]).double()
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * following - values[:, t]
        counts = mask[:, t]
        following = torch.where(counts, values[:, t], following)
        advantage = torch.where(counts, delta + discount * gae_lambda * advantage, advantage)
        advantages[:, t] = advantage
    return advantages * mask, (advantages + values) * mask


def test_gae_is_verls():
    """... and, with nothing masked between a sequence's tokens, TRL's ppo_trainer at f2cd577 and
    slime's vanilla_gae at 624b824. Over masked tokens (a tool's) verl does not discount, and ours
    does."""
    rewards, values = over_time(1)[0], over_time(2)[0]
    holes = over_time()[1]
    span = torch.arange(7) < torch.tensor([[7], [4], [1]])
    assert not torch.equal(holes, holes.cummin(1).values)
    for mask, discount in ((holes, 1.0), (span, 0.8), (span.flip(1), 0.8)):
        found = credit.generalized_advantages(rewards, values, mask, discount, 0.9)
        for one, other in zip(found, verls_gae(rewards, values, mask, discount, 0.9), strict=True):
            torch.testing.assert_close(one, other)
    apart, _ = credit.generalized_advantages(rewards, values, holes, 0.8, 0.9)
    assert not torch.allclose(apart, verls_gae(rewards, values, holes, 0.8, 0.9)[0])


def test_turns_weigh_as_verls_sequences():
    """agg_loss of verl 0.9.1, "seq-mean-token-mean", with turns for its sequences: the mean over
    the turns that have a token of the mean over a turn's tokens."""
    losses, mask = over_time()
    turns = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5, 6], [4, 4, 4, 4, 4, 4, 4]])
    weights = credit.turn_weights(turns, mask).double()
    for row in range(3):
        of_turn = [
            losses[row][(turns[row] == turn) & mask[row]].mean()
            for turn in turns[row].unique()
            if ((turns[row] == turn) & mask[row]).any()
        ]
        found = (weights * losses)[row].sum() / mask[row].sum()
        torch.testing.assert_close(found, torch.stack(of_turn).mean(), rtol=1e-6, atol=0)
