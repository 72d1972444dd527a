"""The statistics and the set K of a teacher without dense rows: a top-k or a sampled one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import RowBatch, Stat
from .rule import topk_entropy


def topk_teacher_ids(
    ids: Tensor, log_probs: Tensor, k: int | None, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """ids (n, K), 0 at padding, and log_probs (n, K), -inf at padding and beyond the k largest.
    Ties with the k-th are kept; None keeps all."""
    usable = (ids >= 0) & (ids < vocab_size)
    log_probs = log_probs.masked_fill(~usable, -math.inf)
    if k is not None and k < ids.shape[-1]:
        smallest = log_probs.topk(k, dim=-1).values[:, -1:]
        log_probs = log_probs.masked_fill(log_probs < smallest, -math.inf)
    return ids.masked_fill(~usable, 0), log_probs


def topk_teacher_least(
    ids: Tensor, log_probs: Tensor, k: int | None, vocab_size: int
) -> Tensor | None:
    """The k-th largest log-prob (n,) among the ids (n, K) in range; None where K holds them all."""
    if k is None or k >= ids.shape[-1]:
        return None
    outside = (ids < 0) | (ids >= vocab_size)
    known = log_probs.masked_fill(outside, -math.inf)
    return known.topk(k, dim=-1).values[:, -1].contiguous()


def topk_teacher_statistics(batch: RowBatch, stats: Tensor) -> None:
    """Fills TEACHER_LOG_PROB and TEACHER_ENTROPY of stats (Stat, n), as far as they are known."""
    if batch.label_log_probs is not None:
        stats[Stat.TEACHER_LOG_PROB] = batch.label_log_probs
    if batch.teacher_entropy is not None:
        stats[Stat.TEACHER_ENTROPY] = batch.teacher_entropy
    elif batch.ids is not None:
        ids, log_probs = batch.topk
        width = batch.student.shape[-1]
        _, known = topk_teacher_ids(ids, log_probs.to(stats.dtype), None, width)
        stats[Stat.TEACHER_ENTROPY] = topk_entropy(known)


def repeats(ids: Tensor, log_probs: Tensor | None, vocab_size: int) -> Tensor:
    """Whether ids (N, K) repeat: bool (N, K), in ascending order of the ids, True where an id
    equals the one before it. Padding, which includes log-probs of -inf, equals nothing."""
    usable = (ids >= 0) & (ids < vocab_size)
    if log_probs is not None:
        usable &= log_probs != -math.inf
    apart = torch.arange(-ids.shape[-1], 0, device=ids.device)
    ordered = torch.where(usable, ids, apart).sort(-1).values
    same = torch.zeros_like(usable)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return same
