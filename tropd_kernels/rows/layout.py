"""What goes into and comes out of a row engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor

from ..objectives import TokenRule


class Stat(IntEnum):
    """Rows of the statistics matrix (Stat, n): one number per token, NaN where it is not known."""

    LOG_PROB = 0
    TEACHER_LOG_PROB = 1
    ENTROPY = 2
    TEACHER_ENTROPY = 3
    FORWARD_KL = 4
    REVERSE_KL = 5
    REWARD = 6
    TRUST = 7
    OUTLIER = 8
    TEACHER_TOPK_MASS = 9
    STUDENT_TOPK_MASS = 10
    TOKEN_LOSS = 11  # before the token's weight
    KEPT = 12
    LSE = 13  # of the student's transformed logits


#: Row of a call's statistics after those of `Stat`, if its rule selects tokens: what it ranks them
#: by, NaN at tokens that are not ranked.
SCORE = len(Stat)


class Coef(IntEnum):
    """Rows of the coefficient matrix (Coef, n): the numbers of a row that the gradient pass reads.

    Log-probs are formed as (z - MAX) - LOG_SUM, never as z - (MAX + LOG_SUM): with large logits
    that sum would lose the digits of LOG_SUM.
    """

    STUDENT_MAX = 0
    STUDENT_LOG_SUM = 1
    TEACHER_MAX = 2
    TEACHER_LOG_SUM = 3
    ENTROPY = 4
    # E_p of the log-ratio, by the same arithmetic as in the engine's gradient pass: a mismatch
    # would leave a multiple of p in the gradient, which may be large next to the rest.
    REVERSE_KL = 5
    THRESHOLD = 6  # K is lq >= THRESHOLD, for a dense teacher
    MEAN_GAP = 7  # mean over the ids of z - MAX, for a rule that smooths labels
    # from here on linear in the row's weight
    P = 8
    P_TOP_K = 9  # in place of P on K
    REVERSE = 10
    ENTROPY_WEIGHT = 11
    Q = 12
    LABEL = 13
    GENERATOR = 14
    UNIFORM = 15  # on every id, for a rule that smooths labels


#: First coefficient that scales with the row's weight.
FIRST_WEIGHT = Coef.P


@dataclass(frozen=True)
class LogitTransform:
    """logits -> cap(scale * (logits + bias)) / temperature, cap(x) = softcap * tanh(x /
    softcap)."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    bias: Tensor | None = None  # (V,)


@dataclass(frozen=True)
class RowOptions:
    """What all rows of a call have in common."""

    rule: TokenRule
    student: LogitTransform
    teacher: LogitTransform
    loss_scale: Tensor | None = None  # 0-dim: a factor on the coefficients from FIRST_WEIGHT on
    sharded: bool = False  # the columns are a part of each row (see `engine`)
    vocab_size: int | None = None  # of whole rows; None: their columns


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """What is known of each of n tokens besides logits and label, None where it is not.

    token_weight, old_log_probs, advantages, task_advantages, uniforms, mixing, blending, scores:
    (n,). teacher_prefix: (n,) bool. Of a top-k or sampled teacher: ids and topk_log_probs (n, K),
    label_log_probs (n,), teacher_entropy (n,).
    """

    token_weight: Tensor | None = None
    old_log_probs: Tensor | None = None
    advantages: Tensor | None = None
    task_advantages: Tensor | None = None
    teacher_prefix: Tensor | None = None
    uniforms: Tensor | None = None
    mixing: Tensor | None = None
    blending: Tensor | None = None
    scores: Tensor | None = None
    ids: Tensor | None = None
    topk_log_probs: Tensor | None = None
    label_log_probs: Tensor | None = None
    teacher_entropy: Tensor | None = None

    @property
    def topk(self) -> tuple[Tensor, Tensor]:
        """ids and topk_log_probs (n, K) of a top-k teacher."""
        assert self.ids is not None and self.topk_log_probs is not None
        return self.ids, self.topk_log_probs

    @classmethod
    def of(cls, tensors: Iterable[Tensor | None]) -> TokenInputs:
        """Those that `tensors` gave."""
        return cls(**dict(zip(TOKEN_INPUTS, tensors, strict=True)))

    def tensors(self) -> list[Tensor | None]:
        """In the order of `TOKEN_INPUTS`."""
        return [getattr(self, name) for name in TOKEN_INPUTS]

    def given(self) -> dict[str, Tensor]:
        """By name, without those that are None."""
        tensors = zip(TOKEN_INPUTS, self.tensors(), strict=True)
        return {name: tensor for name, tensor in tensors if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenInputs:
        """With every tensor changed."""
        return TokenInputs.of([None if t is None else change(t) for t in self.tensors()])


#: Its fields. A constant: torch.compile cannot trace dataclasses.fields().
TOKEN_INPUTS = tuple(field.name for field in fields(TokenInputs))


@dataclass(frozen=True)
class RowBatch(TokenInputs):
    """A chunk of n rows and what is known about each.

    student: (n, V) raw logits; teacher: (n, V) raw logits of a dense teacher, or None.
    """

    student: Tensor
    teacher: Tensor | None
    labels: Tensor


#: stats (Stat, n) and coefs (Coef, n).
Matrices = tuple[Tensor, Tensor]


def matrices(batch: RowBatch, into: Matrices | None = None) -> Matrices:
    """The matrices to fill: `into`, or new ones."""
    return new_matrices(batch.student, batch.student.shape[0]) if into is None else into


def new_matrices(like: Tensor, n: int) -> Matrices:
    """As an engine expects them: unknown statistics (NaN), coefficients of 0."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    stats = like.new_full((len(Stat), n), math.nan, dtype=dtype)
    return stats, like.new_zeros((len(Coef), n), dtype=dtype)


def empty_matrices(like: Tensor, n: int) -> Matrices:
    """For a caller that only reads what the engine writes."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    stats = like.new_empty((len(Stat), n), dtype=dtype)
    return stats, like.new_empty((len(Coef), n), dtype=dtype)
