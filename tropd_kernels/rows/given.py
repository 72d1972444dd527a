"""The set K of a teacher that sends its ids."""

from __future__ import annotations

import math

from torch import Tensor


def given_top_k(
    ids: Tensor, log_probs: Tensor, k: int | None, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """ids (n, K), all in range, and log_probs (n, K), -inf at padding and beyond the k largest
    (ties with the k-th are kept; None keeps all)."""
    usable = (ids >= 0) & (ids < vocab_size)
    log_probs = log_probs.masked_fill(~usable, -math.inf)
    if k is not None and k < ids.shape[-1]:
        smallest = log_probs.topk(k, dim=-1).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < smallest, -math.inf)
    return ids.masked_fill(~usable, 0), log_probs
