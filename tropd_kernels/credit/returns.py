"""Advantages: what the rewards of later tokens, or a baseline, make of a token's own reward."""

import torch
from torch import Tensor

from .checks import check_length, check_number, counted_tokens, float_matrix
from .runs import future_sum, next_in_run, sequence_starts


def return_to_go(
    rewards: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    discount: float = 1.0,
    *,
    window: int | None = None,
    sequence_ids: Tensor | None = None,  # (B, T)
) -> Tensor:
    """Discounted sum of the rewards from each token on, itself included.

    A_t = sum of discount^(j-t) R_j, over j from t to the end of the sequence, or to t + window - 1
    if that comes first.

    `discount` is tinker-cookbook's `kl_discount_factor`: 0 gives the immediate reward, 1 the plain
    return-to-go. As there, a masked token adds no reward but keeps its place: the exponent and the
    window count positions, not tokens that count. MiniLLM (2306.08543) divides the return by the
    number of tokens that are left: the quotient of two calls, the second with rewards of 1 and no
    discount.

    With `window` this is the K-step return without a bootstrap: 1 gives the immediate reward, the
    sequence's length the whole return. KETCHUP (2504.19024) takes K-step returns of rewards that it
    induces from the teacher by the Bellman optimality equation; TOPD (2606.00305) spreads guidance
    over the near future. Their abstracts define no window over K1 rewards, so two choices are this
    library's: rewards after the window are dropped, and the window counts positions.

    A reward of -inf (the teacher gives the token probability 0) makes every earlier return that
    reaches it -inf. To keep it local, floor the rewards first (`rewards.clamp(min=...)`, as REOPOLD
    does).

    Args:
        rewards: One reward per token.
        mask: Which tokens count.
        discount: Factor per position, in [0, 1].
        window: Number of positions in the sum, at least 1. None: to the end of the sequence.
        sequence_ids: The sequences of packed rows.

    Returns:
        (B, T), in the unit of the rewards (nats for K1).

    Raises:
        TypeError, ValueError: A wrong dtype, shape, device, discount or window.

    Examples:
        >>> import torch
        >>> from tropd_kernels.credit import return_to_go
        >>> return_to_go(torch.tensor([[1.0, 2.0, 4.0]]), discount=0.5)
        tensor([[3., 4., 4.]])
    """
    rewards = float_matrix("rewards", rewards)
    counted = counted_tokens(mask, rewards)
    check_number("discount", discount, 0.0, 1.0)
    if window is not None:
        check_length("window", window)
    starts = sequence_starts(sequence_ids, rewards)
    returns = future_sum(torch.where(counted, rewards, 0.0), starts, float(discount), window)
    return torch.where(counted, returns, 0.0)


def reward_plus_future_mean(
    rewards: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    *,
    sequence_ids: Tensor | None = None,  # (B, T)
) -> Tensor:
    """TOP-D's credit (2607.04751, Eq. 8): the token's reward plus the mean of the later rewards.

    A_t = R_t + mean of R_j over the tokens j > t of the sequence that count. The mean makes the
    weight of the future independent of its length. TOP-D transforms the rewards first,
    R = log(alpha q/p + 1 - alpha), and z-normalizes the result over the tokens of a group of
    rollouts (prime-rl#2966). Both are left to the caller. As there, the last token keeps R_t, and
    masked tokens do not count in the mean.

    A reward of -inf makes every earlier advantage of its sequence -inf. TOP-D's transform bounds
    rewards from below by log(1 - alpha).

    Args:
        rewards: One reward per token.
        mask: Which tokens count.
        sequence_ids: The sequences of packed rows.

    Returns:
        (B, T), in the unit of the rewards.

    Raises:
        TypeError, ValueError: A wrong dtype, shape or device.

    Examples:
        >>> import torch
        >>> from tropd_kernels.credit import reward_plus_future_mean
        >>> reward_plus_future_mean(torch.tensor([[1.0, 2.0, 4.0]]))
        tensor([[4., 6., 4.]])
    """
    rewards = float_matrix("rewards", rewards)
    counted = counted_tokens(mask, rewards)
    starts = sequence_starts(sequence_ids, rewards)
    later_sum = next_in_run(future_sum(torch.where(counted, rewards, 0.0), starts), starts)
    later_tokens = next_in_run(future_sum(counted.to(rewards.dtype), starts), starts)
    return torch.where(counted, rewards + later_sum / later_tokens.clamp(min=1.0), 0.0)


def generalized_advantages(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    *,
    bootstrap_values: Tensor | None = None,  # (B, T)
    sequence_ids: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (1506.02438) with the caller's values.

    A_t = d_t + discount * gae_lambda * A_{t+1}, d_t = R_t + discount * V_{t+1} - V_t. With
    gae_lambda 1 and values 0 this is `return_to_go`, to the bit; with gae_lambda 0 it is d_t. The
    survey (2606.22793) proposes it for on-policy distillation ("GAE-OPD") and leaves the rest open.

    Masked tokens (tool output) have no value and no reward, and their values are not read: V_{t+1}
    is that of the next token n that counts, discounted by discount^(n-t), since `discount` counts
    positions as in `return_to_go`. `gae_lambda` counts tokens that count: tool output between two
    of them is one step of the student and costs one factor. With discount 1 this is what verl and
    miles do; a lower one verl counts by tokens, too. verl and TRL's PPO whiten the result, which is
    left to the caller.

    An infinite reward makes every earlier advantage of its sequence infinite, unless discount or
    gae_lambda is 0. Values have to be finite: an infinite one makes earlier advantages NaN.

    Args:
        rewards: One reward per token.
        values: V_t, the expected return from token t on, itself included, in the unit of the
            rewards.
        mask: Which tokens count.
        discount: Factor per position, in [0, 1].
        gae_lambda: Factor per token that counts, in [0, 1]. 0.95 is TRL's default for PPO.
        bootstrap_values: Value of what would follow a sequence, read only at the last token of each
            sequence that counts, for completions cut off by a length limit. None: 0.
        sequence_ids: The sequences of packed rows.

    Returns:
        The advantages A, and the values' regression targets A + V, each (B, T).

    Raises:
        TypeError, ValueError: A wrong dtype, shape, device, discount or gae_lambda.

    Examples:
        >>> import torch
        >>> from tropd_kernels.credit import generalized_advantages
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
        >>> generalized_advantages(rewards, values, gae_lambda=1.0)
        (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))
    """
    rewards = float_matrix("rewards", rewards)
    values = float_matrix("values", values, like=rewards)
    counted = counted_tokens(mask, rewards)
    check_number("discount", discount, 0.0, 1.0)
    check_number("gae_lambda", gae_lambda, 0.0, 1.0)
    starts = sequence_starts(sequence_ids, rewards)
    values = torch.where(counted, values, 0.0)
    # Runs that end with a token that counts hold its value alone: the sum over the rest of a run is
    # that value, discounted by the distance to it.
    after_counted = torch.zeros_like(counted)
    after_counted[:, 1:] = counted[:, :-1]
    nearest = future_sum(values, starts | after_counted, float(discount))
    following = next_in_run(nearest, starts)
    if bootstrap_values is not None:
        bootstrap = float_matrix("bootstrap_values", bootstrap_values, like=rewards)
        last = counted & (future_sum(counted.to(values.dtype), starts) == 1)
        following = torch.where(last, bootstrap, following)

    advantages = torch.where(counted, rewards + discount * following - values, 0.0)
    if gae_lambda > 0:
        smallest = max(gae_lambda, torch.finfo(advantages.dtype).tiny)
        decay = torch.ones_like(advantages).masked_fill(counted, smallest)
        advantages = future_sum(advantages, starts, float(discount), decay=decay)
        advantages = torch.where(counted, advantages, 0.0)
    return advantages, torch.where(counted, advantages + values, 0.0)


def exact_kl_baseline(
    rewards: Tensor,  # (B, T)
    reverse_kl: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
) -> Tensor:
    """Rewards plus the exact KL(p || q) at their position: zero mean under the student.

    The baseline of vOPD (2605.07865) and of the on-policy distillation survey (2606.22793). The K1
    reward lq - lp of a token drawn from the student has mean -KL(p || q), so the sum has mean 0 at
    every position. On a rollout that is reused after updates, the mean is the change of KL(p || q)
    since sampling; the gradient stays unbiased, as with any baseline that does not depend on the
    token drawn.

    Where `reverse_kl` is infinite (the teacher gives probability 0 to an id that the student may
    draw) there is no such baseline, and the reward passes unchanged. This depends on the position
    and not on the token drawn, so the policy gradient stays unbiased. A reward of -inf stays -inf.

    Args:
        rewards: K1 rewards, nats.
        reverse_kl: KL(p || q) over the whole vocabulary, nats: needs a dense teacher. vOPD's
            cheaper form takes the one on the student's top 100, the token losses of
            `Divergence("reverse_kl", top_k=100, top_k_ids="student",
            top_k_tail="renormalize_both")`; the sum's mean is then not quite 0.
        mask: Which tokens count.

    Returns:
        (B, T), nats.

    Raises:
        TypeError, ValueError: A wrong dtype, shape or device.

    Examples:
        >>> import torch
        >>> from tropd_kernels.credit import exact_kl_baseline
        >>> exact_kl_baseline(torch.tensor([[-1.0, 0.5]]), torch.tensor([[0.5, 0.25]]))
        tensor([[-0.5000,  0.7500]])
    """
    rewards = float_matrix("rewards", rewards)
    baseline = float_matrix("reverse_kl", reverse_kl, like=rewards)
    counted = counted_tokens(mask, rewards)
    centred = rewards + torch.where(baseline.isinf(), 0.0, baseline)
    return torch.where(counted, centred, 0.0)


def delta_advantages(
    rewards: Tensor,  # (B, T)
    reverse_kl: Tensor,  # (B, T)
    base_rewards: Tensor,  # (B, T)
    base_reverse_kl: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
) -> Tensor:
    """OPD^2's advantages (2607.15161): what the teacher's training changed, where that agrees.

    With r the teacher's base model, the teacher before its training, both centred under the student
    as in `exact_kl_baseline`:

        A_q = log q - log p + KL(p || q),  A_r likewise,  A = A_q - A_r  where A A_q > 0, else 0

    so A is log q - log r at the token, less its mean under the student. The teacher's own advantage
    A_q gates it: a token that the two would move in opposite directions has advantage 0. The paper
    estimates the mean on the student's 1024 likeliest ids (a replication renormalises p there), and
    multiplies rewards by 0.1, which is left to the caller.

    Both pairs are the statistics `reward` and `reverse_kl` of two calls with `OPD()`, one beside
    the teacher and one with the base model in its place. Where both give the token probability 0
    the difference is NaN.

    Args:
        rewards: K1 rewards of the teacher, nats.
        reverse_kl: KL(p || q) over the whole vocabulary, nats.
        base_rewards: K1 rewards of the base model, nats.
        base_reverse_kl: KL(p || r) over the whole vocabulary, nats.
        mask: Which tokens count.

    Returns:
        (B, T), nats.

    Raises:
        TypeError, ValueError: A wrong dtype, shape or device.

    Examples:
        >>> import torch
        >>> from tropd_kernels.credit import delta_advantages
        >>> zero = torch.zeros(1, 2)
        >>> delta_advantages(torch.tensor([[1.0, 1.0]]), zero, torch.tensor([[0.25, 2.0]]), zero)
        tensor([[0.7500, 0.0000]])
    """
    rewards = float_matrix("rewards", rewards)
    base_rewards = float_matrix("base_rewards", base_rewards, like=rewards)
    base_reverse_kl = float_matrix("base_reverse_kl", base_reverse_kl, like=rewards)
    teacher = exact_kl_baseline(rewards, reverse_kl, mask)
    delta = teacher - exact_kl_baseline(base_rewards, base_reverse_kl, mask)
    opposed = ((delta >= 0) & (teacher <= 0)) | ((delta <= 0) & (teacher >= 0))
    return torch.where(opposed, 0.0, delta)
