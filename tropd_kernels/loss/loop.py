"""The chunk loop: GEMM, rows, GEMM, over chunks of tokens, so that no (tokens, V) tensor exists.

    for each super-chunk of tokens:
        for each sub-chunk of it:
            student logits = hidden @ weight.T           float32, (rows, V)
            teacher logits likewise, or a slice of those given
            engine.forward(...)                          stats and coefs: a few numbers a token
            engine.gradient(...)                         d_logits, (super_rows, V), inputs' dtype
        d_hidden   = d_logits @ weight                   one product a super-chunk
        d_weight  += d_logits.T @ hidden                 float32 accumulator, rounded at last

A head of another dtype than its hidden states, as the float32 parameter beside what autocast made
bf16, is copied into theirs for the call (V H elements); its gradient goes from the accumulator
straight to its own dtype.

Tokens that do not count are dropped before the first GEMM, which costs the call's one host sync;
the checks of values ride on the same sync. With `ignore_index=None` the caller says that every
token counts, and there is none.

`forward` serves both contracts of `ops.py`: with `needs` it forms the gradients of the loss on the
way (3 S + T), without it returns the coefficients from which `backward` recomputes them for any
incoming gradient. Logits that exist already go through the same loop, without the GEMMs: there
`backward` reads them once more, which costs less than holding their gradient.

With a selection (`sampling.py`) the two products of a super-chunk see some of the ids alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import buffers
from ..arguments import LOG_PROB_MARGIN, given_log_probs, raise_bad_value
from ..backends import engine_for
from ..dtypes import result_dtype, stored_dtype, without_autocast
from ..products import products_for
from ..rows.layout import LogitTransform, Matrices, RowBatch, RowOptions, new_matrices
from ..rows.sharded import ShardRows
from .plan import ChunkPlan, plan_chunks
from .sampling import EVERY_ID, Sample, Selection
from .values import may_look, repeated, with_repeats_marked

if TYPE_CHECKING:
    from ..parallel import Shard


@dataclass(frozen=True)
class Side:
    """One model's logits: (N, H) hidden states with a head (V', H), or (N, V') logits without
    one."""

    source: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    #: Of a shard of the vocabulary whose rows lie in several tensors: those, in the order of ids.
    pieces: tuple[Tensor, ...] = ()
    #: Of the caller's head, where `weight` is a copy in the dtype of `source`.
    weight_dtype: torch.dtype | None = None

    def of_one_dtype(self) -> Side:
        """With the head in the dtype of the hidden states, in which both are multiplied."""
        if self.weight is None or self.weight.dtype == self.source.dtype:
            return self
        dtype = self.source.dtype
        pieces = tuple(piece.to(dtype) for piece in self.pieces)
        weight = pieces[0] if pieces else self.weight.to(dtype)
        return replace(self, weight=weight, pieces=pieces, weight_dtype=self.weight.dtype)

    @property
    def vocab_size(self) -> int:
        return self.source.shape[-1] if self.weight is None else self.weight.shape[0]


@dataclass(frozen=True)
class Problem:
    """A flat batch of N tokens. `inputs` holds the per-token tensors of `RowBatch`, by name."""

    student: Side
    teacher: Side | None
    labels: Tensor
    inputs: dict[str, Tensor]
    options: RowOptions
    backend: str
    ignore_index: int | None
    max_workspace_bytes: int | None
    shard: Shard | None = None  # the sides hold a part of the vocabulary; labels name any of it
    selection: Selection = EVERY_ID
    #: What a backward may form that makes the logits again. It has to make the forward's, whose
    #: k-th id it looks for, so both walk by its plan.
    later: Needs = field(default_factory=lambda: Needs())

    @property
    def sides(self) -> tuple[Side, Side | None]:
        return self.student, self.teacher

    def with_heads_cast(self) -> Problem:
        """Each side with its head in the dtype of its hidden states."""
        teacher = None if self.teacher is None else self.teacher.of_one_dtype()
        return replace(self, student=self.student.of_one_dtype(), teacher=teacher)

    @property
    def columns(self) -> int:
        """Of the logits that are formed here."""
        return self.vocab_size if self.shard is None else self.shard.width

    @property
    def vocab_size(self) -> int:
        """The ids that both sides have."""
        if self.shard is not None:
            return self.shard.vocab_size
        sizes = [side.vocab_size for side in self.sides if side is not None]
        return min(sizes)

    @property
    def dtype(self) -> torch.dtype:
        return result_dtype(self.student.source.dtype)


@dataclass(frozen=True)
class Needs:
    """Which gradients to form."""

    student: bool = False
    weight: bool = False
    bias: bool = False
    #: d_weight is not to be rounded to the weight's dtype.
    wide_weight: bool = False

    def __bool__(self):
        return self.student or self.weight or self.bias


@dataclass
class Result:
    """stats (Stat, N) and coefs (Coef, N), 0 for tokens that do not count; the gradients asked for,
    times the loop's `loss_scale`, in the dtype in which they wait for the backward. coefs carry
    that scale, too, where gradients were asked for, but not those of float16 inputs. sampled
    (Sampled,) where the problem's selection is on."""

    stats: Tensor
    coefs: Tensor
    d_student: Tensor | None = None
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None
    sampled: Tensor | None = None


def forward(problem: Problem, needs: Needs, loss_scale: Tensor) -> Result:
    """Statistics and coefficients, and with `needs` the gradient of the summed loss times
    `loss_scale`."""
    problem = problem.with_heads_cast()
    with without_autocast(problem.student.source.device.type):
        return _forward(problem, needs, loss_scale)


def _forward(problem: Problem, needs: Needs, loss_scale: Tensor) -> Result:
    index = tokens_that_count(problem)
    problem = with_repeats_marked(problem)
    n = problem.labels.shape[0] if index is None else index.shape[0]
    stats, coefs = new_matrices(problem.student.source, n)
    result = Result(stats, coefs)
    loop = _Loop(problem, index, needs, loss_scale, result)
    options = replace(problem.options, loss_scale=loop.row_scale if needs else None)
    if options.rule.entropy_top_fraction is not None:
        threshold = loop.entropy_threshold(options.rule.entropy_top_fraction)
        options = replace(options, entropy_threshold=threshold)

    def rows(batch, part):
        return loop.engine.forward(batch, options, (stats[:, part], coefs[:, part]))[1]

    loop.run(rows, options)
    loop.finish()
    if index is not None:
        result.stats, result.coefs = _of_all(problem, index, (stats, coefs))
    return result


def _of_all(problem: Problem, index: Tensor, counting: Matrices) -> Matrices:
    """From the columns of the tokens that count those of all, 0 for the others."""
    stats, coefs = (
        found.new_zeros((found.shape[0], problem.labels.shape[0])).index_copy_(1, index, found)
        for found in counting
    )
    return stats, coefs


def backward(problem: Problem, coefs: Tensor, needs: Needs) -> Result:
    """The gradients that these coefficients (already times the incoming gradient) stand for."""
    problem = problem.with_heads_cast()
    made = any(side is not None and side.weight is not None for side in problem.sides)
    index = tokens_that_count(problem) if made else None
    result = Result(stats=coefs, coefs=coefs)
    loop = _Loop(problem, index, needs, None, result)
    if index is not None:
        coefs = coefs[:, index]
    with without_autocast(coefs.device.type):
        loop.run(lambda batch, part: coefs[:, part], problem.options)
        loop.finish()
    return result


def tokens_that_count(problem: Problem) -> Tensor | None:
    """Indices of the tokens that count, or None where all do. Raises ValueError on values that
    cannot be right: labels outside the vocabulary, weights or advantages that are not finite, a
    teacher's log-probs above 0 or NaN, ids that repeat."""
    labels, weight = problem.labels, problem.inputs.get("token_weight")
    all_count = problem.ignore_index is None
    if not may_look(problem):
        return None  # it would wait for the GPU
    counts = torch.ones_like(labels, dtype=torch.bool)
    if not all_count:
        counts = labels != problem.ignore_index
        if weight is not None:
            counts &= weight != 0
    outside = ((labels < 0) | (labels >= problem.vocab_size)) & counts
    checks = {"label": outside.any()}
    for name in ("token_weight", "advantages", "old_log_probs"):
        if name in problem.inputs:
            checks[name] = (~problem.inputs[name].isfinite() & counts).any()
    if "uniforms" in problem.inputs:
        u = problem.inputs["uniforms"]
        checks["uniforms"] = (~((u >= 0) & (u < 1)) & counts).any()
    for name, values in given_log_probs(problem, counts).items():
        checks[name] = (~(values <= LOG_PROB_MARGIN)).any()  # NaN, too
    if "ids" in problem.inputs:
        checks["ids"] = (repeated(problem) & counts).any()
    count, *bad = torch.stack([counts.sum(), *checks.values()]).tolist()
    for name, found in zip(checks, bad, strict=True):
        if found:
            raise_bad_value(name, problem, outside, counts)
    if all_count or count == labels.shape[0]:
        return None
    # A stable sort instead of nonzero(): the count is known, so it needs no sync of its own.
    return torch.argsort(~counts, stable=True)[:count]


class _Loop:
    """Buffers and bookkeeping of one walk over the tokens."""

    def __init__(self, problem, index, needs, loss_scale, result: Result):
        self.problem, self.index, self.needs = problem, index, needs
        self.result = result
        self.engine: ModuleType | ShardRows = engine_for(problem.backend)
        if problem.shard is not None:
            self.engine = ShardRows(self.engine, problem.shard)
        self.labels, self.inputs = problem.labels, problem.inputs
        if index is not None:
            # Numbers of a token once a call; what is longer, by chunks.
            self.labels = problem.labels[index]
            self.inputs = {k: t[index] if t.dim() == 1 else t for k, t in self.inputs.items()}
        self.n = self.labels.shape[0]
        self.columns = problem.columns
        self.has_head = problem.student.weight is not None
        source = problem.student.source
        # The row's weights carry the scale, so that sums need none; but float16 d_logits would
        # underflow.
        late = source.dtype == torch.float16
        self.row_scale: Tensor | None = None if late else loss_scale
        self.late_scale: Tensor | None = loss_scale if late else None
        self.products = products_for(problem.backend, source.dtype, source.device.type)
        self.stride = self.products.row_stride(self.columns)
        self.plan = self._plan()
        self.first = True
        self.total: Tensor | None = None  # d_weight of the super-chunks so far
        if needs.student:
            result.d_student = source.new_zeros(source.shape, dtype=stored_dtype(source.dtype))
        if needs.weight:
            # The first product overwrites; rows beyond the shared vocabulary stay 0.
            dtype = source.dtype if self.plan.rounds_d_weight else problem.dtype
            result.d_weight = source.new_empty(problem.student.weight.shape, dtype=dtype)
            result.d_weight[self.columns :].zero_()
            self.total = result.d_weight[: self.columns]
        if needs.bias:
            result.d_bias = source.new_zeros((problem.student.vocab_size,), dtype=problem.dtype)
        self.sample: Sample | None = None
        if problem.selection.on and (needs.student or needs.weight):
            head = problem.student.weight[: self.columns] if needs.student else None
            first_id = 0 if problem.shard is None else problem.shard.low
            self.sample = Sample(
                problem.selection, self.engine, head, needs.weight, result.stats, first_id
            )

    def _plan(self) -> ChunkPlan:
        student, teacher = self.problem.student, self.problem.teacher
        teacher_head = teacher is not None and teacher.weight is not None
        shard, needs = self.problem.shard, self.problem.later or self.needs
        return plan_chunks(
            self.n,
            # Ranks exchange numbers chunk by chunk: all make the plan of the largest shard.
            self.columns if shard is None else shard.largest,
            student.source.shape[-1],
            teacher.weight.shape[1] if teacher_head else None,
            dtype=student.source.dtype,
            device=student.source.device,
            backend=self.problem.backend,
            needs_hidden_grad=needs.student,
            needs_weight_grad=needs.weight,
            max_workspace_bytes=self.problem.max_workspace_bytes if self.has_head else None,
            samples_gradient=self.problem.selection.on,
            wide_weight_grad=self.needs.wide_weight,
            weight_dtype=student.weight_dtype,
            teacher_weight_dtype=teacher.weight_dtype if teacher_head else None,
            objective=self.problem.options.rule,
            vocab_parallel=shard is not None,
        )

    def logits_size(self, side: Side | None) -> tuple[tuple[int, int], torch.dtype] | None:
        """Of one sub-chunk of this side's logits, with its padding, where a GEMM makes them."""
        if side is None or side.weight is None:
            return None
        return (min(self.plan.rows, self.n), self.stride), result_dtype(side.source.dtype)

    def d_logits_size(self) -> tuple[tuple[int, int], torch.dtype] | None:
        """Of a super-chunk, with its padding, where it does not overwrite the logits."""
        if not self.needs or not self.has_head or self.plan.in_place:
            return None
        return (min(self.plan.super_rows, self.n), self.stride), self.products.gradient_dtype

    def total_size(self) -> tuple[tuple[int, int], torch.dtype] | None:
        """Of d_weight's accumulator, where the result cannot be it."""
        if not self.plan.rounds_d_weight or self.n <= self.plan.super_rows:
            return None
        return (self.columns, self.problem.student.source.shape[-1]), self.problem.dtype

    def tokens(self, start: int, stop: int) -> slice | Tensor:
        stop = min(stop, self.n)
        return slice(start, stop) if self.index is None else self.index[start:stop]

    def logits(
        self,
        side: Side,
        tokens: slice | Tensor,
        buffer: Tensor | None,
        hidden: Tensor | None = None,  # of these tokens, where they are at hand
    ) -> Tensor:
        """Raw logits of these tokens, over the shared ids, without the bias."""
        if side.weight is None:
            if side.pieces:
                return torch.cat([piece[tokens] for piece in side.pieces], dim=-1)
            return side.source[tokens][:, : self.columns]
        rows = side.source[tokens] if hidden is None else hidden
        products = products_for(self.problem.backend, rows.dtype, rows.device.type)
        out = buffer[: rows.shape[0], : self.columns]
        if not side.pieces:
            return products.logits_into(out, rows, side.weight[: self.columns])
        low = 0
        for piece in side.pieces:
            high = low + piece.shape[0]
            products.logits_into(out[:, low:high], rows, piece)
            low = high
        return out

    def batch(self, part: slice, student_buffer, teacher_buffer, hidden: Tensor | None) -> RowBatch:
        """Of a sub-chunk of the tokens that count."""
        tokens = self.tokens(part.start, part.stop)
        problem, teacher = self.problem, self.problem.teacher
        t = None if teacher is None else self.logits(teacher, tokens, teacher_buffer)
        return RowBatch(
            student=self.logits(problem.student, tokens, student_buffer, hidden),
            teacher=t,
            labels=self.labels[part],
            **{
                name: value[part if value.dim() == 1 else tokens]
                for name, value in self.inputs.items()
            },
        )

    def run(self, rows, options: RowOptions) -> None:
        """`rows(batch, part)` gives the coefficients of a sub-chunk, which is this part of the
        tokens that count."""
        problem = self.problem
        sizes = [self.logits_size(side) for side in problem.sides]
        sizes += [self.d_logits_size(), self.total_size()]
        nbytes = sum(buffers.bytes_for(*size) for size in sizes if size is not None)
        blocks = problem.backend == "native" and nbytes >= buffers.SMALLEST
        with buffers.arena(nbytes) if blocks else nullcontext(buffers.Arena(None)) as arena:
            like = problem.student.source
            *room, total = [None if size is None else arena.empty(like, *size) for size in sizes]
            self.total = self.total if total is None else total
            self._run(rows, options, arena, *room)

    def _super_chunks(self) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """(start, stop, sub-chunks within), in numbers of tokens that count."""
        for start in range(0, self.n, self.plan.super_rows):
            stop = min(start + self.plan.super_rows, self.n)
            lows = range(start, stop, self.plan.rows)
            yield start, stop, [(low, min(low + self.plan.rows, stop)) for low in lows]

    def _run(self, rows, options, arena, z_buffer, t_buffer, d_logits) -> None:
        plan = self.plan
        d_logits = z_buffer if d_logits is None else d_logits
        for start, stop, parts in self._super_chunks():
            hidden = None
            if self.needs and self.has_head:  # for all of the super-chunk's products
                hidden = self.problem.student.source[self.tokens(start, stop)]
            for low, high in parts:
                part = slice(low, high)
                rows_of_hidden = None if hidden is None else hidden[low - start : high - start]
                batch = self.batch(part, z_buffer, t_buffer, rows_of_hidden)
                coefs = rows(batch, part)
                if self.needs and self.has_head:
                    first = 0 if plan.in_place else low - start
                    out = d_logits[first : first + high - low, : self.columns]
                    self.engine.gradient(batch, coefs, options, out)
                elif self.needs:
                    self._store_d_logits(batch, coefs, options, self.tokens(low, high))
            last = stop == self.n
            if last and self.total_size() is not None:
                # What is rounded takes their room.
                arena.drop(t_buffer, None if plan.in_place else z_buffer)
            if self.needs and self.has_head:
                chunk = d_logits[: stop - start, : self.columns]
                self._products(chunk, hidden, start, last)

    def finish(self) -> None:
        """Sums over tokens, scaled and rounded once, where no product has done that. What rounds an
        accumulator takes the room of the chunks' buffers, which is free then."""
        result, student = self.result, self.problem.student
        if self.first and result.d_weight is not None:  # no product has overwritten it
            result.d_weight.zero_()
        if self.sample is not None:
            total = None if result.d_weight is None else result.d_weight[: self.columns]
            result.sampled = self.sample.report(total, self.problem.shard)
        for name, tensor in (("d_weight", student.weight), ("d_bias", student.bias)):
            total = getattr(result, name)
            if total is not None:
                if self.late_scale is not None:
                    total *= self.late_scale
                dtype = tensor.dtype
                if name == "d_weight":
                    dtype = student.weight_dtype or dtype
                if name != "d_weight" or not self.needs.wide_weight:
                    setattr(result, name, total.to(stored_dtype(dtype)))

    def _products(self, d_logits: Tensor, hidden: Tensor, start: int, last: bool) -> None:
        """Adds these rows' gradients. With the last super-chunk's d_weight is rounded, if the
        products can."""
        needs, result, v = self.needs, self.result, self.columns
        tokens = self.tokens(start, start + hidden.shape[0])
        blocks = None
        if self.sample is not None:
            blocks = self.sample.choose(d_logits, hidden, start)
        if blocks is None:
            d_hidden = self._products_of_all(d_logits, hidden, tokens, last)
        else:
            d_hidden = self._products_of_some(d_logits, hidden, blocks, last)
        if d_hidden is not None:
            if self.problem.shard is not None:
                self.problem.shard.sum_(d_hidden)
            if self.sample is not None:
                self.sample.saw_hidden(d_hidden)
            if self.late_scale is not None:
                d_hidden *= self.late_scale
            if isinstance(tokens, Tensor):  # which would not round
                d_hidden = d_hidden.to(result.d_student.dtype)
            result.d_student[tokens] = d_hidden
        if needs.bias:
            result.d_bias[:v] += d_logits.sum(0, dtype=result.d_bias.dtype)
        self.first = False

    def _products_of_all(
        self, d_logits: Tensor, hidden: Tensor, tokens: slice | Tensor, last: bool
    ) -> Tensor | None:
        """d_hidden, None where the product has put it into the result; adds to d_weight."""
        v, d_hidden = self.columns, None
        # What ranks have to add up, and what a sample's error is measured on, is not rounded yet.
        whole = self.problem.shard is None and self.sample is None
        if self.needs.student:
            head = self.problem.student.weight[:v]
            if self.products.rounds_d_hidden and whole and isinstance(tokens, slice):
                self.products.d_hidden_into(self.result.d_student[tokens], d_logits, head)
            else:
                d_hidden = self.products.d_hidden(d_logits, head)
        if self.needs.weight:
            out = self.result.d_weight[:v] if last and self.plan.rounds_d_weight else self.total
            self.products.d_weight(out, d_logits, hidden, None if self.first else self.total)
        return d_hidden

    def _products_of_some(
        self, d_logits: Tensor, hidden: Tensor, blocks, last: bool
    ) -> Tensor | None:
        """The same from a sample of the ids: (ids, weights) in blocks."""
        d_hidden = self.result.stats.new_zeros(hidden.shape) if self.needs.student else None
        if self.needs.weight and self.first:
            self.total.zero_()
        for ids, weights in blocks:
            self._add_block(d_logits, hidden, ids, weights, d_hidden)
        if self.needs.weight and last and self.total_size() is not None:
            self.result.d_weight[: self.columns] = self.total
        return d_hidden

    def _add_block(self, d_logits, hidden, ids, weights, d_hidden: Tensor | None) -> None:
        """Of these ids alone. A function, so that nothing of a block is alive in the next."""
        columns = d_logits.index_select(1, ids).mul_(weights)
        if d_hidden is not None:
            head = self.problem.student.weight.index_select(0, ids)
            d_hidden += self.products.d_hidden(columns, head)
        if self.needs.weight:
            rows = weights.new_empty((len(ids), hidden.shape[1]))
            self.products.d_weight(rows, columns, hidden, None)
            self.sample.saw_weight(rows, weights)
            self.total.index_add_(0, ids, rows.to(self.total.dtype))

    def _store_d_logits(self, batch, coefs, options, tokens) -> None:
        """Existing logits: their gradient is the result itself."""
        v, d = self.columns, self.result.d_student
        if isinstance(tokens, slice):
            self.engine.gradient(batch, coefs, options, d[tokens, :v])
        else:
            rows = d.new_empty((len(tokens), v))
            self.engine.gradient(batch, coefs, options, rows)
            d[tokens, :v] = rows

    def entropy_threshold(self, fraction: float) -> Tensor:
        """The batch's entropy quantile, from a pass over the student's logits alone."""
        problem, options = self.problem, self.problem.options
        size = self.logits_size(problem.student)
        buffer = None if size is None else problem.student.source.new_empty(size[0], dtype=size[1])
        entropy = problem.student.source.new_empty((self.n,), dtype=problem.dtype)
        # By the chunks of the loop: of others the logits, and with them the entropies that are
        # compared with this quantile, would differ in a last bit.
        for low, high in (part for _, _, parts in self._super_chunks() for part in parts):
            tokens = self.tokens(low, high)
            logits = self.logits(problem.student, tokens, buffer)
            batch = RowBatch(logits, None, self.labels[low:high])
            entropy[low:high] = self.engine.entropy(batch, options)
        if self.n == 0:
            return entropy.new_zeros(())
        prefix = self.inputs.get("teacher_prefix")
        if prefix is not None and options.rule.prefix_weight is not None:
            entropy = entropy.masked_fill(prefix, torch.nan)
        return torch.nanquantile(entropy, 1 - fraction)


#: Per-token inputs, in the order in which the custom op takes them.
INPUTS = tuple(f.name for f in fields(RowBatch) if f.name not in ("student", "teacher", "labels"))

__all__ = ["INPUTS", "LogitTransform", "Needs", "Problem", "Result", "Side", "backward", "forward"]
