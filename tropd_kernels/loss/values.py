"""A top-k teacher's ids are distinct within a row: of an id given twice, each backend would take
another share.

Where values may be looked at, a repeated id is an error, on the sync that the call has anyway.
Elsewhere (`ignore_index=None` on a GPU) the teacher's log-prob of the label becomes NaN in that
row, and with it the row's loss and gradient, as of a label outside the vocabulary. Padding, ids
outside the vocabulary and entries of log-prob -inf, may repeat: it carries no mass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .loop import Problem


def may_look(problem: Problem) -> bool:
    """Values can be looked at without a sync of their own."""
    return problem.ignore_index is not None or problem.labels.device.type == "cpu"


def repeats(ids: Tensor, log_probs: Tensor, vocab_size: int) -> Tensor:
    """(N, K) of ids and their log-probs (N, K): in the order of the ids, those equal to the one
    before them; padding equals nothing."""
    usable = (ids >= 0) & (ids < vocab_size) & (log_probs != -torch.inf)
    apart = torch.arange(-ids.shape[-1], 0, device=ids.device)
    ordered = torch.where(usable, ids, apart).sort(-1).values
    same = torch.zeros_like(usable)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return same


def repeated(problem: Problem) -> Tensor:
    """(N,): tokens of which the teacher gives an id twice."""
    ids, log_probs = problem.inputs["ids"], problem.inputs["topk_log_probs"]
    return repeats(ids, log_probs, problem.vocab_size).any(-1)


def with_repeats_marked(problem: Problem) -> Problem:
    """The problem, with NaN for the teacher's log-prob in rows with a repeated id, where that
    cannot raise."""
    if "ids" not in problem.inputs or may_look(problem):
        return problem
    known = problem.inputs["label_log_probs"].masked_fill(repeated(problem), torch.nan)
    return replace(problem, inputs=problem.inputs | {"label_log_probs": known})


def raise_repeated(problem: Problem, counts: Tensor) -> None:
    """For a token that counts (N,)."""
    token = int((repeated(problem) & counts).nonzero()[0])
    ids, log_probs = (problem.inputs[name][[token]] for name in ("ids", "topk_log_probs"))
    same = repeats(ids, log_probs, problem.vocab_size)
    usable = torch.where(log_probs != -torch.inf, ids, -1)
    twice = next(int(i) for i in usable[0] if (usable[0] == i).sum() > 1)
    raise ValueError(
        f"teacher ids hold {twice} twice at token {token} (of the flat batch), and "
        f"{int(same.sum())} repeats in all there: the ids of a token must be distinct, padding has "
        "log-prob -inf or an id outside the vocabulary; check what the teacher returns, and that "
        "lists of several sources were merged"
    )
