"""The thresholds of K, and of AKL's head, where a teacher's row is sharded over ranks.

K: the k-th largest of a row is among the k largest of each shard. Every rank sends those, k numbers
a token, and takes the k-th largest of all.

Head by mass: it may hold any number of ids, so its threshold is searched for, as
`triton_kernels.search` does within a row. Floats up to 0 order as 31-bit (63-bit in float64)
integers, whose bits are fixed from the top, four at a time: each rank sends how much of its mass
reaches each of sixteen pivots, and the last pivot that enough mass reaches fixes the digit. Eight
rounds (sixteen in float64), 120 (248) numbers a token, find the exact value, whatever the
vocabulary. Meanwhile the shard's rows are held sorted, 8 bytes (16) a logit besides the logits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layout import Coef, RowBatch, RowOptions
from .top_k import largest, largest_ids, with_margin
from .torch_rows import blocks, transform

if TYPE_CHECKING:
    from ..parallel import Shard

DIGIT = 4  # bits


def top_k_threshold(
    shard: Shard, part: RowBatch, options: RowOptions, needed: Tensor, coefs: Tensor
) -> None:
    """Sets THRESHOLD in the rows `needed` (n,): K is lq >= THRESHOLD, ties and all."""
    rule, n = options.rule, coefs.shape[1]
    assert rule.top_k is not None
    k = min(rule.top_k, shard.vocab_size)
    ours = min(k, shard.width)
    best = coefs.new_full((k, n), -math.inf)
    for rows, _ in blocks(part):
        if needed.device.type == "cpu":  # elsewhere it would be a host sync
            rows = rows.start + needed[rows].nonzero().squeeze(-1)
        best[:ours, rows] = largest(_log_q(part, rows, options, coefs), ours).t()
    candidates = shard.gather(best).flatten(0, 1)
    kth = candidates.topk(k, dim=0).values[-1]
    threshold = with_margin(kth, options.teacher.softcap)
    coefs[Coef.THRESHOLD] = torch.where(needed, threshold, -math.inf)


def student_top_k(
    shard: Shard, batch: RowBatch, options: RowOptions, like: Tensor, k: int
) -> Tensor:
    """The student's own top-k (n, k) in the whole rows, as columns of this shard: below 0 or beyond
    its width where another shard has the id; all below 0 that the student excludes. Of those that
    tie for the last places the first are taken, where `largest_ids` does so."""
    n, k = batch.student.shape[0], min(k, shard.vocab_size)
    ours = min(k, shard.width)
    best = like.new_full((2, n, k), -math.inf, dtype=torch.float64)  # logits and their ids
    for rows, part in blocks(batch):
        z = transform(part.student, options.student, like.dtype)
        columns = largest_ids(z, ours)
        best[0, rows, :ours] = z.gather(-1, columns).double()
        best[1, rows, :ours] = (columns + shard.low).double()
    # In the order of ranks, hence of ids where logits tie.
    logits, ids = shard.gather(best).permute(1, 2, 0, 3).flatten(2)
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, order)[:, :k].masked_fill(logits[:, :k] == -math.inf, -1.0)
    return torch.where(ids < 0, -1.0, ids - shard.low).long()


def head_threshold(shard: Shard, part: RowBatch, options: RowOptions, coefs: Tensor) -> None:
    """Sets THRESHOLD: the smallest log-prob in the smallest set of likeliest ids of the whole row
    with at least the rule's mass."""
    n, word = coefs.shape[1], torch.int32 if coefs.dtype == torch.float32 else torch.int64
    lowest = _ordered(coefs.new_full((), -math.inf), word)
    order = torch.empty((n, shard.width), dtype=word, device=coefs.device)
    above = coefs.new_zeros((n, shard.width + 1))  # mass from an entry on
    for rows, _ in blocks(part):
        lq = _log_q(part, rows, options, coefs).clamp_max(0).sort(dim=-1).values
        order[rows] = (_ordered(lq, word) - lowest).to(word)
        above[rows, :-1] = lq.double().exp().flip(-1).cumsum(-1).flip(-1).to(above.dtype)
    bits = 8 * word.itemsize - 1
    found = torch.zeros((n, 1), dtype=torch.int64, device=coefs.device)
    for shift in range(bits - bits % DIGIT, -1, -DIGIT):
        # The first digit has fewer bits: 2^31 and 2^63 are never reached.
        digits = torch.arange(2 ** min(DIGIT, bits - shift), device=coefs.device)
        pivots = found + (digits << shift)
        reached = above.gather(1, torch.searchsorted(order, pivots.to(word)))
        reached = shard.gather(reached).double().sum(0)
        enough = (reached >= options.rule.divergence_parameter).sum(-1, keepdim=True)
        found += (enough - 1).clamp_min(0) << shift
    # The engine may transform logits with other arithmetic than the search.
    threshold = _float(found.squeeze(1) + lowest, word)
    coefs[Coef.THRESHOLD] = with_margin(threshold, options.teacher.softcap)


def _log_q(part: RowBatch, rows: slice | Tensor, options: RowOptions, coefs: Tensor) -> Tensor:
    """The shard's teacher log-probs of these rows, by the whole rows' normalisers."""
    assert part.teacher is not None
    t = transform(part.teacher[rows], options.teacher, coefs.dtype)
    high, log_sum = coefs[Coef.TEACHER_MAX, rows], coefs[Coef.TEACHER_LOG_SUM, rows]
    return (t - high.unsqueeze(-1)) - log_sum.unsqueeze(-1)


def _ordered(values: Tensor, word: torch.dtype) -> Tensor:
    """int64 numbers in the order of the floats; -0 is just below 0."""
    bits = values.contiguous().view(word)
    return torch.where(bits < 0, bits ^ torch.iinfo(word).max, bits).long()


def _float(order: Tensor, word: torch.dtype) -> Tensor:
    bits = torch.where(order < 0, order ^ torch.iinfo(word).max, order)
    return bits.to(word).view(torch.float32 if word == torch.int32 else torch.float64)
