"""One call as one object. `prepare` builds it from the arguments; everything below reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..dtypes import result_dtype
from ..objectives import TokenRule
from ..rows.layout import LogitTransform, RowOptions, Stat, TokenInputs
from .sampling import GradientSampling

if TYPE_CHECKING:
    from ..parallel import Shard


@dataclass(frozen=True)
class Side:
    """One model's logits: (N, H) hidden states with a head, or (N, V') logits without one.

    logits = cap(scale * (source @ weight.T + bias)), cap(x) = softcap * tanh(x / softcap)
    """

    source: Tensor
    weight: Tensor | None = None  # (V', H)
    bias: Tensor | None = None  # (V',)
    scale: float = 1.0
    softcap: float | None = None
    #: If the rows of a vocabulary shard (or its columns of logits) lie in several tensors: these,
    #: in the order of the ids.
    pieces: tuple[Tensor, ...] = ()
    #: Dtype of the caller's head, if `weight` is a copy in the dtype of `source`.
    weight_dtype: torch.dtype | None = None

    @property
    def head(self) -> Tensor:
        """`weight`, where there is one."""
        assert self.weight is not None
        return self.weight

    @property
    def vocab_size(self) -> int:
        return self.source.shape[-1] if self.weight is None else self.weight.shape[0]

    def of_one_dtype(self) -> Side:
        """With the head in the dtype of the hidden states, in which both are multiplied."""
        if self.weight is None or self.weight.dtype == self.source.dtype:
            return self
        dtype = self.source.dtype
        pieces = tuple(piece.to(dtype) for piece in self.pieces)
        weight = pieces[0] if pieces else self.weight.to(dtype)
        return replace(self, weight=weight, pieces=pieces, weight_dtype=self.weight.dtype)

    def transform(self, temperature: float, columns: int) -> LogitTransform:
        """What happens to the raw logits of the first `columns` ids."""
        bias = None if self.bias is None else self.bias[:columns]
        return LogitTransform(self.scale, self.softcap, temperature, bias)


class GradNeeds(NamedTuple):
    """Which gradients to form. fp32_weight: do not round the head's to its dtype."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    fp32_weight: bool = False

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


NO_GRADIENTS = GradNeeds()


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The numbers and names of a call. Without defaults, as `Problem`: torch.compile cannot trace
    one that is an object."""

    rule: TokenRule
    backend: str
    temperature: float
    ignore_index: int | None
    max_workspace_bytes: int | None
    sampling: GradientSampling


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A flat batch of N tokens, and what to compute for it."""

    student: Side
    teacher: Side | None  # of a dense teacher
    reference: Side | None = None  # of a reference teacher
    labels: Tensor  # (N,), int64
    inputs: TokenInputs
    options: LossOptions
    loss_scale: Tensor  # (): the loss is the sum of the tokens' losses times this
    #: Gradients of the scalar loss that the forward forms.
    forward_grads: GradNeeds
    #: Gradients that a recomputing backward may need. It must find the same k-th id as the forward,
    #: so both use the plan of the backward.
    backward_grads: GradNeeds
    #: The statistic whose sum divides the loss, if that is known only after the gate has run.
    divide_by: Stat | None = None
    #: The sides hold a part of the vocabulary; labels name any id of it.
    shard: Shard | None = None

    @property
    def sides(self) -> tuple[Side, Side | None, Side | None]:
        return self.student, self.teacher, self.reference

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics and sums."""
        return result_dtype(self.student.source.dtype)

    @property
    def vocab_size(self) -> int:
        """The ids that all sides have."""
        if self.shard is not None:
            return self.shard.vocab_size
        return min(side.vocab_size for side in self.sides if side is not None)

    @property
    def columns(self) -> int:
        """Of the logits that are formed here."""
        return self.vocab_size if self.shard is None else self.shard.width

    def row_options(self) -> RowOptions:
        """What a row engine reads of the options."""
        columns, temperature = self.columns, self.options.temperature
        teacher = LogitTransform(temperature=temperature)
        if self.teacher is not None and not self.options.rule.reshapes_target:  # see `target`
            teacher = self.teacher.transform(temperature, columns)
        return RowOptions(
            rule=self.options.rule,
            student=self.student.transform(temperature, columns),
            teacher=teacher,
            sharded=self.shard is not None,
            vocab_size=self.vocab_size,
        )

    def laid_out(self) -> Problem:
        """As the loop reads it: heads in the dtype of their hidden states, per-token tensors and
        biases contiguous."""

        def side(given: Side) -> Side:
            given = given.of_one_dtype()
            if given.bias is None or given.bias.is_contiguous():
                return given
            return replace(given, bias=given.bias.contiguous())

        return replace(
            self,
            student=side(self.student),
            teacher=None if self.teacher is None else side(self.teacher),
            reference=None if self.reference is None else side(self.reference),
            labels=self.labels.contiguous(),
            inputs=self.inputs.map(Tensor.contiguous),
        )
