"""Runs of consecutive positions in a row (sequences, blocks, turns), and sums over them.

`starts` (B, T) bool marks the positions where a run begins; column 0 is always marked. Sums go by
doubling: after log2(n) steps each position holds the sum over its next n positions. The discount is
applied to sums of near terms, so nothing is ever divided by a small power of it, as a plain
cumulative sum would need. A position's sum is formed in the same order wherever its run lies in the
row, which is why padding and packing change no bit.
"""

import torch
from torch import Tensor

from .checks import check_ids


def packed_sequence_ids(cu_seqlens: Tensor, total: int) -> Tensor:  # (S + 1,) -> (1, total)
    """`sequence_ids` of one packed row (1, total) from the boundaries of its sequences.

    If (1, total) labels are shifted within the row, so that hidden[i] predicts labels[i], the last
    position of each sequence predicts nothing and has to be masked.

    Args:
        cu_seqlens: int32 or int64 boundaries 0, n_1, n_1 + n_2, ...: sequence i has the positions
            [cu_seqlens[i], cu_seqlens[i + 1]). Positions after the last boundary are padding, and a
            sequence of their own.
        total: Number of positions in the row.

    Returns:
        (1, total) int64 on the boundaries' device, without a host sync.

    Raises:
        TypeError, ValueError: The boundaries have another dtype or shape, or the total is no whole
            number.

    Examples:
        >>> import torch
        >>> from tropd_kernels.credit import packed_sequence_ids
        >>> packed_sequence_ids(torch.tensor([0, 2, 5]), 6)
        tensor([[0, 0, 1, 1, 1, 2]])
    """
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        given = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {given}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}: begin "
            "with 0 and end with the last sequence's end"
        )
    # Of a fraction arange would make a position, too.
    if isinstance(total, float) or (isinstance(total, Tensor) and total.is_floating_point()):
        raise ValueError(
            f"total must be a whole number of positions, got {total!r:.80}: pass an int"
        )
    position = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], position, right=True)[None]


def sequence_starts(sequence_ids: Tensor | None, like: Tensor) -> Tensor:
    starts = torch.zeros(like.shape, dtype=torch.bool, device=like.device)
    starts[:, :1] = True
    if sequence_ids is None:
        return starts
    check_ids("sequence_ids", sequence_ids, like, "packed sequence")
    return split_by_ids(starts, sequence_ids)


def split_by_ids(starts: Tensor, ids: Tensor) -> Tensor:
    """The starts of the runs of equal `ids` within the runs that `starts` marks."""
    changes = torch.zeros_like(starts)
    changes[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return starts | changes


def run_start(starts: Tensor) -> Tensor:
    """Index of the first position of each position's run."""
    position = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return torch.where(starts, position, 0).cummax(1).values


def first_counted(starts: Tensor, counted: Tensor) -> Tensor:
    """True at the first token of each run that counts."""
    count = counted.cumsum(1)
    before = count - counted.long()
    return counted & (before == before.gather(1, run_start(starts)))


def future_sum(
    values: Tensor,
    starts: Tensor,
    discount: float = 1.0,
    window: int | None = None,
    decay: Tensor | None = None,
) -> Tensor:
    """sum of discount^(j-t) values_j over the positions j of t's run in [t, t + window).

    decay (B, T), in (0, 1]: the term of j is also multiplied by decay_t ... decay_{j-1}.
    """
    if discount == 0.0 or values.shape[1] == 0:
        return values
    length = values.shape[1]
    if window is None or window >= length:
        window = 1  # a power of two, so that doubling is all there is to do
        while window < length:
            window *= 2
    run = starts.cumsum(1)
    tiny = torch.finfo(values.dtype).tiny
    factor, reach = max(discount, tiny), 1

    def plus_later(near: Tensor, later: Tensor) -> Tensor:
        """near_t + factor later_{t + reach}, if t + reach lies in t's run."""
        same_run = run[:, reach:] == run[:, :-reach]
        ahead = later[:, reach:] * factor
        if decay is not None:
            ahead = ahead * decay[:, : length - reach]
        # A select, not a product: 0 * inf would carry NaN across the border. Likewise factor and
        # decay stay above 0, so that -inf remains -inf at any distance.
        return torch.cat(
            [near[:, :-reach] + torch.where(same_run, ahead, 0.0), near[:, -reach:]], 1
        )

    # `values` is the sum over the next `reach` positions, which is a power of two. `total` is the
    # sum over as many positions as the lower bits of `window` say.
    total = None
    while True:
        if window & reach:
            total = values if total is None else plus_later(values, total)
        if 2 * reach > window:
            return total
        values = plus_later(values, values)
        if decay is not None:
            decay = (decay[:, :-reach] * decay[:, reach:]).clamp(min=tiny)
        factor = max(factor * factor, tiny)
        reach *= 2


def run_total(values: Tensor, starts: Tensor, longest: int | None = None) -> Tensor:
    """Sum over each position's run; no run is longer than `longest`."""
    return future_sum(values, starts, window=longest).gather(1, run_start(starts))


def next_in_run(values: Tensor, starts: Tensor) -> Tensor:
    """The value at the next position, 0 at the end of a run."""
    end = torch.zeros_like(values[:, :1])
    return torch.cat([torch.where(starts[:, 1:], 0.0, values[:, 1:]), end], 1)
