"""The k largest of a long row without sorting it, in PyTorch on a CPU.

A row is cut into blocks of 64. The k blocks with the largest maxima hold every entry above the k-th
largest, since fewer than k entries, hence fewer than k blocks, exceed it; and each of them holds
one at least as large as the k-th largest block maximum. So the k-th largest entry of those k blocks
is the k-th largest of the row, ties or not, at the cost of one pass over the row and a sort of 64 k
entries. On rows of 151,936 and k = 64 this is about ten times cheaper than `topk`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 64


def kth_largest(values: Tensor, k: int) -> Tensor:
    """(rows,): the k-th largest of each row of (rows, V)."""
    k = min(k, values.shape[-1])
    if _too_short(values, k):
        return values.topk(k, dim=-1).values[:, -1]
    return _candidates(values, k).topk(k, dim=-1).values[:, -1]


def largest(values: Tensor, k: int) -> Tensor:
    """(rows, k): the k largest of each row of (rows, V), k <= V, in no particular order."""
    if values.device.type != "cpu" or _too_short(values, k):
        return values.topk(k, dim=-1, sorted=False).values
    return _candidates(values, k).topk(k, dim=-1, sorted=False).values


def largest_ids(values: Tensor, k: int) -> Tensor:
    """(rows, k): columns of the k largest of each row of (rows, V), k <= V. Of those that tie for
    the last places a CPU takes the first; NaN counts as the smallest there."""
    if values.device.type != "cpu":
        return values.topk(k, dim=-1).indices
    kth = kth_largest(values, k)
    if bool(kth.isnan().any()):
        values = values.masked_fill(values.isnan(), -math.inf)
        kth = kth_largest(values, k)
    columns = columns_reaching(values, kth).sort(-1).values
    order = values.gather(-1, columns).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return columns.gather(-1, order)


def with_margin(threshold: Tensor, softcap: float | None) -> Tensor:
    """A threshold slightly below the k-th largest log-prob (rows,). The gradient pass may read
    recomputed logits, from a GEMM of another height that rounds differently: a margin of a few last
    bits keeps the k-th id in K there, too. Ids with teacher probability 0 are never in K."""
    limits = torch.finfo(threshold.dtype)
    reach = threshold.abs() + (1 + (softcap or 0))
    threshold = (threshold - 16 * limits.eps * reach).nan_to_num_(nan=-math.inf)
    return threshold.clamp_min(limits.min)


def columns_reaching(values: Tensor, threshold: Tensor) -> Tensor:
    """Columns (rows, M), distinct within a row, that include all whose value in (rows, V) reaches
    the row's `threshold`. M is a small multiple of the largest number of those."""
    rows, width = values.shape
    blocks, rest = _blocks(values)
    tops = blocks.amax(-1)
    hits = int((tops >= threshold.unsqueeze(-1)).sum(-1).max()) if tops.numel() else 0
    best = tops.topk(hits, dim=-1, sorted=False).indices * BLOCK
    inside = best.unsqueeze(-1) + torch.arange(BLOCK, device=values.device)
    after = torch.arange(width - rest.shape[1], width, device=values.device)
    return torch.cat([inside.flatten(1), after.expand(rows, -1)], dim=-1)


def _candidates(values: Tensor, k: int) -> Tensor:
    """(rows, M): entries of each row that include its k largest."""
    blocks, rest = _blocks(values)
    best = blocks.amax(-1).topk(k, dim=-1, sorted=False).indices
    candidates = blocks.gather(1, best.unsqueeze(-1).expand(-1, -1, BLOCK)).flatten(1)
    return torch.cat([candidates, rest], dim=-1)


def _too_short(values: Tensor, k: int) -> bool:
    return values.shape[-1] // BLOCK <= k


def _blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, V // 64, 64), and the columns left over."""
    whole = values.shape[-1] // BLOCK * BLOCK
    return values[:, :whole].unflatten(-1, (-1, BLOCK)), values[:, whole:]
