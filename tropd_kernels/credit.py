"""Temporal credit assignment: which time step answers for which reward.

Plain torch on [B, T] tensors, run before the fused loss. What comes out enters that loss as
`advantages` (the first two functions) or is multiplied into `token_weight` (the other three). At
token t, with the K1 reward R_t = sg(lq_t - lo_t):

    return_to_go           A_t = sum_{j >= t} discount^(j-t) R_j
    exact_kl_baseline      A_t = R_t + KL(p_t || q_t)
    drift_gates            g_b = exp(-tau |s_b|) / mean g,  s_b = mean of lo - sg(lp) over block b
    importance_weights     w_t = 1 + gamma (1 - sum_{j<t} |R_j| / sum_j |R_j|)
    entropy_quantile_mask  whether H(p_t) is among the batch's highest `top_fraction`

Sources, in that order: tinker-cookbook's `kl_discount_factor`; the on-policy distillation survey
(arXiv 2606.22793); blockwise policy-drift gating (2606.24084); IW-OPD (2606.22600); "Entropy OPD
20 %", a baseline of TrOPD (2606.01249).

Rules shared by all five:

* `mask` ([B, T], bool or integer, non-zero = the token counts; None = all count) is applied with a
  select, never with a product: values at masked positions, NaN included, are not read, and the
  result there is 0 (or False).
* `sequence_ids` ([B, T], integer) marks packed rows: a sequence is a run of equal ids within a row,
  and nothing crosses its border. None = one sequence per row. Padding a sequence and packing it
  with others do not change its result, to the bit (but drift_gates divides by a mean over the whole
  batch, and entropy_quantile_mask ranks the whole batch).
* Results are detached, float32 (float64 if an input is float64), on the inputs' device. Arguments
  are checked by type, shape and option value only; no tensor value is read on the host, so no call
  waits for a GPU.
* No float atomics: two runs agree bitwise. Sums over time take log2(T) vectorised steps; memory is
  a few [B, T] tensors.
* NaN at a token that counts is never hidden; what an infinite value does is said function by
  function.
"""

import torch
from torch import Tensor

__all__ = [
    "drift_gates",
    "entropy_quantile_mask",
    "exact_kl_baseline",
    "importance_weights",
    "packed_sequence_ids",
    "return_to_go",
]

_FRACTION_UNITS = 10**9
_LARGEST_RATE = 1e6  # far above any use, and finite in float32 whatever it multiplies
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def packed_sequence_ids(cu_seqlens: Tensor, total: int) -> Tensor:  # (S + 1,) -> (1, total)
    """`sequence_ids` of one packed row [1, total] from its boundaries.

    cu_seqlens: integers 0, n_1, n_1 + n_2, ...: sequence i has positions [cu_seqlens[i],
    cu_seqlens[i + 1]). Positions from the last boundary on, if any, are padding, a sequence of
    their own. Where [1, total] labels are shifted inside the row, as hidden[i] predicts labels[i]
    wants it, the last position of each sequence predicts nothing and has to be masked.

    Returns (1, total) int64 on its device, without a host sync. Raises TypeError or ValueError on
    another dtype or shape.
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        given = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {given}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}: begin "
            "with 0 and end with the last sequence's end"
        )
    position = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], position, right=True)[None]


def return_to_go(
    rewards: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    discount: float = 1.0,
    *,
    sequence_ids: Tensor | None = None,  # (B, T)
) -> Tensor:
    """Discounted sum of rewards from each token on, itself included, to the end of its sequence.

    `discount` in [0, 1] is tinker-cookbook's `kl_discount_factor`: 0 gives the immediate reward, 1
    the plain return-to-go. As there, a masked token adds no reward but keeps its place: the
    exponent counts positions, not tokens that count. The cookbook's centring on the batch mean is
    left to the caller.

    A reward of -inf (the teacher rules the token out) makes every earlier return of its sequence
    -inf, as the formula says: floor the rewards first (`rewards.clamp(min=...)`, as REOPOLD does)
    to keep it local.

    Returns (B, T), in the unit of the rewards (nats for K1). Raises TypeError or ValueError on a
    wrong dtype, shape or discount.
    """
    rewards = _float_matrix("rewards", rewards)
    counted = _mask(mask, rewards)
    _check_number("discount", discount, 0.0, 1.0)
    starts = _sequence_starts(sequence_ids, rewards)
    returns = _future_sum(torch.where(counted, rewards, 0.0), starts, float(discount))
    return torch.where(counted, returns, 0.0)


def exact_kl_baseline(
    rewards: Tensor,  # (B, T)
    reverse_kl: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
) -> Tensor:
    """Rewards plus the exact KL(p || q) of their position: zero-mean under the student.

    The K1 reward lq - lp of a token drawn from the student has mean -KL(p || q), so the sum has
    mean 0 at every position. `reverse_kl` (nats) needs a dense teacher. On a rollout reused after
    updates the mean is what KL(p || q) has changed by since; the gradient stays unbiased, as with
    any baseline that does not depend on the token drawn.

    Where `reverse_kl` is infinite (the teacher gives probability 0 to an id that the student may
    draw) no such baseline exists and the reward passes unchanged: whether that is so depends on the
    position, not on the token drawn, so the policy gradient stays unbiased. A reward of -inf stays
    -inf.

    Returns (B, T), nats. Raises TypeError or ValueError on a wrong dtype or shape.
    """
    rewards = _float_matrix("rewards", rewards)
    baseline = _float_matrix("reverse_kl", reverse_kl, like=rewards)
    counted = _mask(mask, rewards)
    centred = rewards + torch.where(baseline.isinf(), 0.0, baseline)
    return torch.where(counted, centred, 0.0)


def drift_gates(
    old_log_probs: Tensor,  # (B, T)
    log_probs: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    block_size: int = 64,
    tau: float = 1.0,
    *,
    sequence_ids: Tensor | None = None,  # (B, T)
) -> Tensor:
    """Blockwise policy-drift gates: text on which the policy has moved since sampling weighs less.

    g_b = exp(-tau |s_b|), s_b the mean of old_log_probs - log_probs over the tokens of block b that
    count, divided by the mean of g over all tokens of these tensors that count. That mean is 1
    afterwards, so the gates move weight between blocks and leave the size of the loss alone. For
    one mean over gradient-accumulation steps, call this before splitting the batch.

    Blocks are spans of `block_size` positions, counted from the first token of each sequence that
    counts: prompts and left padding shift nothing, and masked tokens inside (tool output) keep
    their place. `tau` > 0 is per nat of mean drift; the default 1 is this library's.

    A token at log-prob -inf under the current student makes its block's drift infinite and its gate
    0; if that befalls every block, all gates are 0.

    Returns (B, T), unitless, mean 1 over the tokens that count. Raises TypeError or ValueError on a
    wrong dtype, shape or option.
    """
    old = _float_matrix("old_log_probs", old_log_probs)
    new = _float_matrix("log_probs", log_probs, like=old)
    counted = _mask(mask, old)
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        kind = type(block_size).__name__
        raise TypeError(f"block_size must be an int number of tokens, got {kind}: pass e.g. 64")
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1 token, got {block_size}: pass e.g. 64")
    _check_number("tau", tau, 0.0, _LARGEST_RATE)
    if tau == 0:
        raise ValueError("tau must be positive, got 0: it makes every gate 1, so use no gates")
    dtype = torch.promote_types(old.dtype, new.dtype)
    if old.numel() == 0:
        return old.new_zeros(old.shape, dtype=dtype)

    blocks = _block_starts(_sequence_starts(sequence_ids, old), counted, block_size)
    drift = torch.where(counted, old - new, 0.0)
    tokens = _run_total(counted.to(dtype), blocks, block_size)
    exponent = tau * (_run_total(drift, blocks, block_size) / tokens.clamp(min=1.0)).abs()

    # The quotient by the mean does not change when every exponent is shifted. Shifted by the
    # smallest, at least one gate is 1, and a batch that has drifted far everywhere does not end in
    # 0/0.
    smallest = torch.where(counted, exponent, float("inf")).amin()
    smallest = torch.where(smallest.isfinite(), smallest, 0.0)
    gates = torch.where(counted, torch.exp(smallest - exponent), 0.0)
    mean = gates.sum() / counted.sum().clamp(min=1)
    return torch.where(counted & (mean != 0), gates / mean, 0.0)


def importance_weights(
    rewards: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    gamma: float = 0.5,
    *,
    sequence_ids: Tensor | None = None,  # (B, T)
) -> Tensor:
    """IW-OPD weights: the more of a sequence's discrepancy lies behind a token, the less it weighs.

    w_t = 1 + gamma (1 - sum_{j<t} |R_j| / sum_j |R_j|), sums over the tokens of the sequence that
    count, R = sg(lq - lo) in `rewards`. The first token that counts has weight 1 + gamma; later
    weights fall towards 1.

    Two limits, taken rather than divided out. With every R = 0 nothing has drifted and every weight
    is 1 + gamma. With infinite R (the K1 reward is -inf where the teacher rules a token out) only
    those tokens share the total, as if they grew without bound together: one such token leaves
    1 + gamma up to and including itself and 1 after.

    Returns (B, T), unitless, in [1, 1 + gamma] where the token counts; `gamma` >= 0. Raises
    TypeError or ValueError on a wrong dtype, shape or gamma.
    """
    rewards = _float_matrix("rewards", rewards)
    counted = _mask(mask, rewards)
    _check_number("gamma", gamma, 0.0, _LARGEST_RATE)
    starts = _sequence_starts(sequence_ids, rewards)
    discrepancy = torch.where(counted, rewards, 0.0).abs()
    # NaN fails the comparison below, so it reaches the plain sums and shows.
    infinite = torch.where(
        discrepancy.isnan(), discrepancy, discrepancy.isinf().to(discrepancy.dtype)
    )
    discrepancy = torch.where(_run_total(infinite, starts) > 0, infinite, discrepancy)

    # 1 minus the part before t is the part from t on: a sum of non-negative terms, with nothing to
    # cancel.
    ahead = _future_sum(discrepancy, starts)
    total = ahead.gather(1, _run_start(starts))
    share = torch.where(total == 0, 1.0, ahead / total).clamp(max=1.0)
    return torch.where(counted, 1.0 + gamma * share, 0.0)


def entropy_quantile_mask(
    entropy: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    top_fraction: float = 0.2,
) -> Tensor:
    """True at the ceil(top_fraction * n) tokens of highest entropy, of the n that count here.

    The count is exact, and at least 1 where any token counts: among equal entropies the earlier
    token (row by row) is taken. Keeping all that reach the quantile would, where most tokens are
    deterministic with entropy 0, keep the whole batch. The batch is what is passed in: for one
    quantile over gradient-accumulation steps, call this before splitting it. NaN ranks highest, so
    that it shows.

    `top_fraction` in (0, 1] is read to nine decimal places. Returns (B, T) bool. Raises TypeError
    or ValueError on a wrong dtype, shape or fraction.
    """
    entropy = _float_matrix("entropy", entropy)
    counted = _mask(mask, entropy)
    _check_number("top_fraction", top_fraction, 0.0, 1.0)
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


# Sums over runs. A run is a stretch of consecutive positions in a row; `starts` (B, T) is True
# where one begins, and always in column 0.


def _future_sum(
    values: Tensor, starts: Tensor, discount: float = 1.0, longest: int | None = None
) -> Tensor:
    """sum_{j >= t} discount^(j-t) values_j within t's run; no run is longer than `longest`.

    By doubling: after the step with reach k each position holds the sum over its next 2k positions.
    The factor is applied to sums of near terms only, so nothing is ever divided by a small power of
    the discount, as a plain cumulative sum would have it.
    """
    if discount == 0.0:
        return values
    run = starts.cumsum(1)
    steps = values.shape[1] if longest is None else min(longest, values.shape[1])
    tiny = torch.finfo(values.dtype).tiny
    factor, reach = max(discount, tiny), 1
    while reach < steps:
        same_run = run[:, reach:] == run[:, :-reach]
        # A select, not a product: 0 * inf would carry NaN across the border. Likewise the factor
        # stays above 0, so that -inf remains -inf at any distance.
        ahead = torch.where(same_run, values[:, reach:] * factor, 0.0)
        values = torch.cat([values[:, :-reach] + ahead, values[:, -reach:]], dim=1)
        factor = max(factor * factor, tiny)
        reach *= 2
    return values


def _run_start(starts: Tensor) -> Tensor:
    """Index of the first position of each position's run."""
    position = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return torch.where(starts, position, 0).cummax(1).values


def _run_total(values: Tensor, starts: Tensor, longest: int | None = None) -> Tensor:
    """Sum over each position's run."""
    return _future_sum(values, starts, longest=longest).gather(1, _run_start(starts))


def _sequence_starts(sequence_ids: Tensor | None, like: Tensor) -> Tensor:
    starts = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    starts[:, :1] = True
    if sequence_ids is None:
        return starts
    _check_tensor("sequence_ids", sequence_ids, like)
    if sequence_ids.dtype not in _INTEGERS:
        raise TypeError(
            f"sequence_ids must be integers, got {sequence_ids.dtype}: one id per packed sequence"
        )
    starts[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return starts


def _block_starts(starts: Tensor, counted: Tensor, block_size: int) -> Tensor:
    """True where a block begins: every `block_size` positions from a sequence's first token that
    counts. What lies before that token is masked and adds nothing to the block it falls in.
    """
    count = counted.cumsum(1)
    before = count - counted.long()
    first_counted = counted & (before == before.gather(1, _run_start(starts)))
    origin = _run_start(first_counted)
    position = torch.arange(starts.shape[1], device=starts.device)
    return (position - origin) % block_size == 0


# Arguments: type, shape and dtype, never a tensor's values.


def _check_tensor(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    if not isinstance(tensor, Tensor):
        given = type(tensor).__name__
        raise TypeError(
            f"{name} must be a tensor, got {given}: pass a torch.Tensor of shape (B, T)"
        )
    shape = tuple(tensor.shape)
    if len(shape) != 2:
        advice = "use unsqueeze(0)" if len(shape) == 1 else "pass one value per token"
        raise ValueError(f"{name} must have shape (B, T), got {shape}: {advice}")
    if like is not None and tensor.shape != like.shape:
        raise ValueError(
            f"{name} must have the first argument's shape {tuple(like.shape)}, got {shape}: "
            "align both to the labels"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the first argument's device {like.device}, got {tensor.device}: "
            "move it with .to()"
        )


def _float_matrix(name: str, tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The argument, checked, detached and in float32, or float64 if it came so."""
    _check_tensor(name, tensor, like)
    if not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be floating point, got {tensor.dtype}: convert it with .float()"
        )
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _mask(mask: Tensor | None, like: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(like.shape, dtype=torch.bool, device=like.device)
    _check_tensor("mask", mask, like)
    if mask.dtype not in (torch.bool, *_INTEGERS):
        raise TypeError(
            f"mask must be bool or integer, got {mask.dtype}: a soft weight belongs in token_weight"
        )
    return mask != 0


def _check_number(name: str, value: float, low: float, high: float) -> None:
    wanted = f"in [{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        given = type(value).__name__
        raise TypeError(f"{name} must be a number {wanted}, got {given}: pass a Python float")
    if not low <= value <= high:  # written so that NaN fails
        raise ValueError(f"{name} must be {wanted}, got {value}: pass a number in that range")
