"""Weights of tokens: by the discrepancy so far, by turn, by entropy."""

import torch
from torch import Tensor

from .checks import LARGEST_RATE, check_ids, check_number, counted_tokens, float_matrix
from .runs import (
    first_counted,
    future_sum,
    run_start,
    run_total,
    sequence_starts,
    split_by_ids,
)

_FRACTION_UNITS = 10**9


def importance_weights(
    rewards: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    gamma: float = 0.5,
    *,
    sequence_ids: Tensor | None = None,  # (B, T)
) -> Tensor:
    """IW-OPD weights (2606.22600): the more discrepancy precedes a token, the less it weighs.

    w_t = 1 + gamma (1 - sum_{j<t} |R_j| / sum_j |R_j|), with sums over the tokens of the sequence
    that count. The first token that counts has weight 1 + gamma; later weights fall towards 1.

    Two cases are limits of the formula. With every R = 0 nothing has drifted, and every weight is
    1 + gamma. With infinite R (the K1 reward is -inf where the teacher gives the token probability
    0) the total is shared by those tokens only, as if they grew without bound together: with one
    such token the weight is 1 + gamma up to and including it, and 1 after it.

    Args:
        rewards: R = sg(lq - lo), nats.
        mask: Which tokens count.
        gamma: Largest extra weight, at least 0.
        sequence_ids: The sequences of packed rows.

    Returns:
        (B, T), unitless, in [1, 1 + gamma] where the token counts.

    Raises:
        TypeError, ValueError: A wrong dtype, shape, device or gamma.

    Examples:
        >>> import torch
        >>> from tropd_kernels.credit import importance_weights
        >>> importance_weights(torch.tensor([[-1.0, 2.0, 1.0]]), gamma=0.5)
        tensor([[1.5000, 1.3750, 1.1250]])
    """
    rewards = float_matrix("rewards", rewards)
    counted = counted_tokens(mask, rewards)
    check_number("gamma", gamma, 0.0, LARGEST_RATE)
    starts = sequence_starts(sequence_ids, rewards)
    discrepancy = torch.where(counted, rewards, 0.0).abs()
    # NaN fails the comparison below, so it reaches the plain sums and shows.
    infinite = torch.where(
        discrepancy.isnan(), discrepancy, discrepancy.isinf().to(discrepancy.dtype)
    )
    discrepancy = torch.where(run_total(infinite, starts) > 0, infinite, discrepancy)

    # 1 minus the part before t is the part from t on: a sum of non-negative terms, with nothing to
    # cancel.
    ahead = future_sum(discrepancy, starts)
    total = ahead.gather(1, run_start(starts))
    share = torch.where(total == 0, 1.0, ahead / total).clamp(max=1.0)
    return torch.where(counted, 1.0 + gamma * share, 0.0)


def turn_weights(
    turn_ids: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    *,
    sequence_ids: Tensor | None = None,  # (B, T)
) -> Tensor:
    """Equal weight for every turn of a sequence, however many tokens it has.

    w_t = tokens / (turns * tokens of t's turn), where tokens and turns are those of t's sequence
    that count. The mean over a sequence's tokens is 1, so the weights move weight between turns and
    change neither the size of the loss nor the share of a sequence. The mean over its tokens
    becomes the mean over its turns of the mean over a turn's tokens: verl's "seq-mean-token-mean",
    with turns for sequences. ATOD (2606.27814) and SAGE-OPD (2606.19659) weigh turns by a score as
    well; multiply such a score into the result. TurnOPD (2607.05804) moves from tokens to turns in
    the course of training; its formula was not found.

    Args:
        turn_ids: Integer ids; a turn is a run of equal ids within a sequence. A turn without a
            token that counts is not one. If every unbroken run of the student's tokens is a turn,
            pass the mask itself, as integers.
        mask: Which tokens count.
        sequence_ids: The sequences of packed rows.

    Returns:
        (B, T) float32, unitless, mean 1 over the tokens of each sequence that count.

    Raises:
        TypeError, ValueError: A wrong dtype, shape or device.

    Examples:
        >>> import torch
        >>> from tropd_kernels.credit import turn_weights
        >>> turn_weights(torch.tensor([[0, 0, 0, 1]]))
        tensor([[0.6667, 0.6667, 0.6667, 2.0000]])
    """
    check_ids("turn_ids", turn_ids, None, "turn")
    counted = counted_tokens(mask, turn_ids)
    starts = sequence_starts(sequence_ids, turn_ids)
    turns = split_by_ids(starts, turn_ids)
    one = counted.float()  # counts are exact up to 2^24 tokens
    in_turn = run_total(one, turns)
    turn_count = run_total(first_counted(turns, counted).float(), starts)
    return torch.where(counted, run_total(one, starts) / (turn_count * in_turn), 0.0)


def entropy_quantile_mask(
    entropy: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    top_fraction: float = 0.2,
) -> Tensor:
    """True at the ceil(top_fraction * n) tokens of highest entropy, of the n that count here.

    "Entropy OPD 20 %", a baseline of TrOPD (2606.01249). The count is exact, and at least 1 if any
    token counts: among equal entropies the earlier token (row by row) is taken. Keeping all tokens
    that reach the quantile would keep the whole batch if most tokens are deterministic, with
    entropy 0. The batch is what is passed in: for one quantile over gradient-accumulation steps,
    call this before splitting it. NaN ranks highest, so that it shows.

    Args:
        entropy: H(p), nats.
        mask: Which tokens count.
        top_fraction: In (0, 1], read to nine decimal places.

    Returns:
        (B, T) bool.

    Raises:
        TypeError, ValueError: A wrong dtype, shape, device or fraction.

    Examples:
        >>> import torch
        >>> from tropd_kernels.credit import entropy_quantile_mask
        >>> entropy_quantile_mask(torch.tensor([[0.1, 2.0, 1.0, 0.0]]), top_fraction=0.5)
        tensor([[False,  True,  True, False]])
    """
    entropy = float_matrix("entropy", entropy)
    counted = counted_tokens(mask, entropy)
    check_number("top_fraction", top_fraction, 0.0, 1.0)
    if top_fraction < 1 / _FRACTION_UNITS:
        raise ValueError(
            f"top_fraction must be in [1e-9, 1], got {top_fraction}: to keep none, mask all tokens"
        )

    # The count in whole numbers: ceil(0.07 * 100) in floating point is 8.
    units = round(top_fraction * _FRACTION_UNITS)
    kept = (counted.sum() * units + (_FRACTION_UNITS - 1)) // _FRACTION_UNITS
    ranked = torch.where(counted, entropy, float("-inf")).flatten()
    order = torch.argsort(ranked, descending=True, stable=True)
    place = torch.arange(order.numel(), device=order.device)
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter(0, order, place < kept)
    return chosen.view(entropy.shape) & counted


def reward_aligned_mask(
    rewards: Tensor,  # (B, T)
    outcomes: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    *,
    sequence_ids: Tensor | None = None,  # (B, T)
) -> Tensor:
    """RA-OPD's filter (2608.27960): the sequences that distillation moves towards right answers.

    Kept are all tokens of a sequence whose sum of K1 rewards G has the sign of its outcome, or is
    0: (2 R - 1) G >= 0, with R 1 for a right answer and 0 for a wrong one. An outcome of 0, of a
    sequence that nobody judges, keeps it, and so does a G of NaN, which then shows in the loss.
    OPDVR decides token by token: `OPDVR()`.

    Args:
        rewards: K1 rewards, nats.
        outcomes: Above 0 on the tokens of a right answer, below 0 on those of a wrong one, such as
            2 R - 1 or a task's advantages.
        mask: Which tokens count.
        sequence_ids: The sequences of packed rows.

    Returns:
        (B, T) bool, for a token_weight.

    Raises:
        TypeError, ValueError: A wrong dtype, shape or device.

    Examples:
        >>> import torch
        >>> from tropd_kernels.credit import reward_aligned_mask
        >>> outcomes = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
        >>> reward_aligned_mask(torch.ones(2, 2), outcomes)
        tensor([[ True,  True],
                [False, False]])
    """
    rewards = float_matrix("rewards", rewards)
    outcomes = float_matrix("outcomes", outcomes, like=rewards)
    counted = counted_tokens(mask, rewards)
    starts = sequence_starts(sequence_ids, rewards)
    total = run_total(torch.where(counted, rewards, 0.0), starts)
    opposed = ((total > 0) & (outcomes < 0)) | ((total < 0) & (outcomes > 0))
    return counted & ~opposed
