"""Blockwise policy-drift gates."""

import torch
from torch import Tensor

from .checks import (
    LARGEST_RATE,
    check_ids,
    check_length,
    check_number,
    counted_tokens,
    float_matrix,
)
from .runs import first_counted, run_start, run_total, sequence_starts, split_by_ids

DEFAULT_BLOCK_SIZE = 64


def drift_gates(
    old_log_probs: Tensor,  # (B, T)
    log_probs: Tensor,  # (B, T)
    mask: Tensor | None = None,  # (B, T)
    block_size: int | None = None,
    tau: float = 1.0,
    *,
    block_ids: Tensor | None = None,  # (B, T)
    sequence_ids: Tensor | None = None,  # (B, T)
) -> Tensor:
    """Policy-drift gates (2606.24084): blocks where the policy has moved since sampling weigh less.

    g_b = exp(-tau |s_b|), where s_b is the mean of old_log_probs - log_probs over the tokens of
    block b that count. The gates are then divided by their mean over all tokens of the batch that
    count. That mean is 1 afterwards, so the gates move weight between blocks and do not change the
    size of the loss. For one mean over gradient-accumulation steps, call this before splitting the
    batch.

    Blocks are spans of `block_size` positions, counted from the first token of each sequence that
    counts: prompts and left padding shift nothing, and masked tokens inside (tool output) keep
    their place. `block_ids` gives the blocks instead, for instance the lines of the text, each with
    the newline that ends it: `is_newline.cumsum(1) - is_newline.long()`.

    A token with log-prob -inf under the current student makes its block's drift infinite and its
    gate 0. If that happens in every block, all gates are 0.

    Args:
        old_log_probs: Log-probs of the tokens under the policy that sampled them.
        log_probs: Log-probs of the tokens under the current student.
        mask: Which tokens count.
        block_size: Positions per block, at least 1. None: 64, as in the paper.
        tau: Positive rate per nat of mean drift. The default 1 is this library's.
        block_ids: Integer ids; a block is a run of equal ids within a sequence. Not together with
            `block_size`.
        sequence_ids: The sequences of packed rows.

    Returns:
        (B, T), unitless, mean 1 over the tokens that count.

    Raises:
        TypeError, ValueError: A wrong dtype, shape, device or option, or both kinds of blocks.

    Examples:
        >>> import torch
        >>> from tropd_kernels.credit import drift_gates
        >>> old, new = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 0.5, 0.5]])
        >>> drift_gates(old, new, tau=2.0, block_size=2)
        tensor([[1.4621, 1.4621, 0.5379, 0.5379]])
    """
    old = float_matrix("old_log_probs", old_log_probs)
    new = float_matrix("log_probs", log_probs, like=old)
    counted = counted_tokens(mask, old)
    if block_size is not None:
        check_length("block_size", block_size)
    if block_ids is not None:
        check_ids("block_ids", block_ids, old, "block, such as a line of text")
        if block_size is not None:
            raise ValueError(
                f"block_ids and block_size {block_size} both say what a block is: pass one of them"
            )
    check_number("tau", tau, 0.0, LARGEST_RATE)
    if tau == 0:
        raise ValueError("tau must be positive, got 0: it makes every gate 1, so use no gates")
    dtype = torch.promote_types(old.dtype, new.dtype)
    starts = sequence_starts(sequence_ids, old)
    if old.numel() == 0:
        return old.new_zeros(old.shape, dtype=dtype)

    longest = None
    if block_ids is None:
        longest = block_size or DEFAULT_BLOCK_SIZE
        blocks = _fixed_blocks(starts, counted, longest)
    else:
        blocks = split_by_ids(starts, block_ids)
    drift = torch.where(counted, old - new, 0.0)
    tokens = run_total(counted.to(dtype), blocks, longest)
    exponent = tau * (run_total(drift, blocks, longest) / tokens.clamp(min=1.0)).abs()

    # Shifting every exponent does not change the quotient by the mean. Shifted by the smallest, at
    # least one gate is 1, so a batch that has drifted far everywhere does not end in 0/0.
    smallest = torch.where(counted, exponent, float("inf")).amin()
    smallest = torch.where(smallest.isfinite(), smallest, 0.0)
    gates = torch.where(counted, torch.exp(smallest - exponent), 0.0)
    mean = gates.sum() / counted.sum().clamp(min=1)
    return torch.where(counted & (mean != 0), gates / mean, 0.0)


def _fixed_blocks(starts: Tensor, counted: Tensor, block_size: int) -> Tensor:
    """True where a block begins: every `block_size` positions from a sequence's first token that
    counts. Tokens before it are masked and add nothing to the block that they fall in.
    """
    origin = run_start(first_counted(starts, counted))
    position = torch.arange(starts.shape[1], device=starts.device)
    return (position - origin) % block_size == 0
