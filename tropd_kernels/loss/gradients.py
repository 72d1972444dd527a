"""From d_logits to the gradients that a call returns."""

from __future__ import annotations

from torch import Tensor

from ..dtypes import stored_dtype
from ..products import TorchProducts
from .logits import Size, Tokens
from .plan import ChunkPlan
from .problem import GradNeeds, Problem
from .sampling import ColumnSampler


class LogitsGradients:
    """Existing logits: d_logits is the gradient, and rows are written straight into it."""

    def __init__(self, problem: Problem):
        source = problem.student.source
        self.columns = problem.columns
        self.d_hidden = source.new_zeros(source.shape, dtype=stored_dtype(source.dtype))

    def rows(self, tokens: Tokens) -> Tensor:
        """(n, V) to write d_logits of these tokens into, for `store`."""
        if isinstance(tokens, slice):
            return self.d_hidden[tokens, : self.columns]
        return self.d_hidden.new_empty((len(tokens), self.columns))

    def store(self, tokens: Tokens, rows: Tensor) -> None:
        if isinstance(tokens, Tensor):
            self.d_hidden[tokens, : self.columns] = rows


class HeadGradients:
    """A head: adds up the products of each super-chunk's d_logits.

    d_weight is a float32 sum, which the last product rounds if `plan.rounds_d_weight`. float16
    d_logits would underflow with the loss's scale; there `late_scale` is applied at the end.
    """

    def __init__(
        self,
        problem: Problem,
        needs: GradNeeds,
        plan: ChunkPlan,
        products: TorchProducts,
        tokens: int,  # that count
        late_scale: Tensor | None,
    ):
        self.problem, self.needs, self.plan, self.products = problem, needs, plan, products
        self.tokens, self.late_scale, self.columns = tokens, late_scale, problem.columns
        self.sampler: ColumnSampler | None = None
        self.d_hidden: Tensor | None = None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None
        student = problem.student
        source = student.source
        self.nothing_added = True
        self.accumulator: Tensor | None = None  # of d_weight, over the ids formed here
        if needs.hidden:
            self.d_hidden = source.new_zeros(source.shape, dtype=stored_dtype(source.dtype))
        if needs.weight:
            # The first product overwrites; rows beyond the shared vocabulary stay 0.
            dtype = source.dtype if plan.rounds_d_weight else problem.dtype
            self.d_weight = source.new_empty(student.head.shape, dtype=dtype)
            self.d_weight[self.columns :].zero_()
            self.accumulator = self.d_weight[: self.columns]
        if needs.bias:
            self.d_bias = source.new_zeros((student.vocab_size,), dtype=problem.dtype)

    def accumulate_in(self, room: Tensor | None) -> None:
        """Accumulates d_weight in this tensor of `accumulator_size`; None: in the result."""
        if room is not None:
            self.accumulator = room

    def accumulator_size(self) -> Size | None:
        """Of d_weight's accumulator; None if the result serves as one."""
        if not self.plan.rounds_d_weight or self.tokens <= self.plan.super_rows:
            return None
        return (self.columns, self.problem.student.source.shape[-1]), self.problem.dtype

    def add(self, d_logits: Tensor, hidden: Tensor, tokens: Tokens, start: int, last: bool) -> None:
        """Adds the gradients of a super-chunk that starts at token `start` of those that count. The
        last one rounds d_weight, if the products can."""
        blocks = None
        if self.sampler is not None:
            blocks = self.sampler.choose(d_logits, hidden, start)
        if blocks is None:
            d_hidden = self._products_of_all(d_logits, hidden, tokens, last)
        else:
            d_hidden = self._products_of_some(d_logits, hidden, blocks, last)
        if d_hidden is not None and self.d_hidden is not None:
            self._store(d_hidden, tokens, self.d_hidden)
        if self.d_bias is not None:
            self.d_bias[: self.columns] += d_logits.sum(0, dtype=self.d_bias.dtype)
        self.nothing_added = False

    def finish(self) -> Tensor | None:
        """Scales and rounds what no product has rounded, and returns the sampler's report. The
        chunks' buffers are free by now, so the rounded copy of an accumulator takes their room."""
        student, report = self.problem.student, None
        if self.nothing_added and self.d_weight is not None:  # no product has overwritten it
            self.d_weight.zero_()
        if self.sampler is not None:
            shared = None if self.d_weight is None else self.d_weight[: self.columns]
            report = self.sampler.report(shared, self.problem.shard)
        if self.late_scale is not None:
            for total in (self.d_weight, self.d_bias):
                if total is not None:
                    total *= self.late_scale
        if self.d_weight is not None and not self.needs.fp32_weight:
            dtype = student.weight_dtype or student.head.dtype
            self.d_weight = self.d_weight.to(stored_dtype(dtype))
        if self.d_bias is not None and student.bias is not None:
            self.d_bias = self.d_bias.to(stored_dtype(student.bias.dtype))
        return report

    def _store(self, d_hidden: Tensor, tokens: Tokens, into: Tensor) -> None:
        if self.problem.shard is not None:
            self.problem.shard.sum_(d_hidden)
        if self.sampler is not None:
            self.sampler.saw_hidden(d_hidden)
        if self.late_scale is not None:
            d_hidden *= self.late_scale
        if isinstance(tokens, Tensor):  # which would not round
            d_hidden = d_hidden.to(into.dtype)
        into[tokens] = d_hidden

    def _products_of_all(
        self, d_logits: Tensor, hidden: Tensor, tokens: Tokens, last: bool
    ) -> Tensor | None:
        """Adds to d_weight. Returns d_hidden, or None if the product has written it already."""
        d_hidden = None
        # Not rounded yet if ranks have to add it up, or if a sample's error is measured on it.
        whole = self.problem.shard is None and self.sampler is None
        if self.d_hidden is not None:
            head = self.problem.student.head[: self.columns]
            if self.products.rounds_d_hidden and whole and isinstance(tokens, slice):
                self.products.d_hidden_into(self.d_hidden[tokens], d_logits, head)
            else:
                d_hidden = self.products.d_hidden(d_logits, head)
        if self.d_weight is not None and self.accumulator is not None:
            rounds = last and self.plan.rounds_d_weight
            out = self.d_weight[: self.columns] if rounds else self.accumulator
            sums = None if self.nothing_added else self.accumulator
            self.products.d_weight(out, d_logits, hidden, sums)
        return d_hidden

    def _products_of_some(
        self, d_logits: Tensor, hidden: Tensor, blocks: list[tuple[Tensor, Tensor]], last: bool
    ) -> Tensor | None:
        """The same from a sample of the ids: (ids, weights) in blocks."""
        d_hidden = None
        if self.d_hidden is not None:
            d_hidden = hidden.new_zeros(hidden.shape, dtype=self.problem.dtype)
        sums = self.accumulator
        if sums is not None and self.nothing_added:
            sums.zero_()
        for ids, weights in blocks:
            self._add_block(d_logits, hidden, ids, weights, d_hidden)
        rounds = last and self.accumulator_size() is not None
        if self.d_weight is not None and sums is not None and rounds:
            self.d_weight[: self.columns] = sums
        return d_hidden

    def _add_block(
        self, d_logits: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor,
        d_hidden: Tensor | None,
    ) -> None:  # fmt: skip
        """Adds the columns of these ids. A function, so that a block's tensors are freed before the
        next one."""
        columns = d_logits.index_select(1, ids).mul_(weights)
        if d_hidden is not None:
            head = self.problem.student.head.index_select(0, ids)
            d_hidden += self.products.d_hidden(columns, head)
        if self.accumulator is not None and self.sampler is not None:
            rows = weights.new_empty((len(ids), hidden.shape[1]))
            self.products.d_weight(rows, columns, hidden, None)
            self.sampler.saw_weight(rows, weights)
            self.accumulator.index_add_(0, ids, rows.to(self.accumulator.dtype))
