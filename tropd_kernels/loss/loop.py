"""The chunk loop: GEMM, rows, GEMM, over chunks of tokens. No (tokens, V) tensor is materialized.

    for each super-chunk of tokens:
        for each sub-chunk of it:
            student logits = hidden @ weight.T           float32, (rows, V)
            teacher logits likewise, or a slice of those given; and a reference teacher's
            target         = a sum of the three          where the rule has powers (`target.py`)
            engine.forward(...)                          stats and coefs: a few numbers per token
            engine.gradient(...)                         d_logits, (super_rows, V), inputs' dtype
        d_hidden   = d_logits @ weight                   one GEMM per super-chunk
        d_weight  += d_logits.T @ hidden                 float32 accumulator, rounded at the end

A head whose dtype differs from that of its hidden states, such as a float32 parameter under
autocast, is copied to theirs for the call (V H elements). Its gradient is rounded from the
accumulator to the head's own dtype.

Tokens that do not count are dropped before the first GEMM. That costs the one host sync of the
call, and the checks of values use the same one. With `ignore_index=None` the caller says that all
tokens count, and there is no sync. A selection of tokens (`token_selection`) comes before, and
costs one on a GPU.

`forward` forms the gradients named in the problem's `forward_grads` on the way (3 S + T). Without
any it returns the coefficients from which `backward` recomputes them for any incoming gradient.
Existing logits go through the same loop without the GEMMs: `backward` reads them once more, which
costs less than keeping their gradient.

`logits.py` computes the logits, `gradients.py` the products of d_logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import buffers
from ..backends import engine_for
from ..dtypes import without_autocast
from ..products import products_for
from ..rows.engine import RowEngine
from ..rows.id_rows import IdRows
from ..rows.layout import Coef, Matrices, RowBatch, RowOptions, Stat, TokenInputs, new_matrices
from ..rows.sharded import ShardRows
from .gradients import HeadGradients, LogitsGradients
from .logits import ChunkLogits, Size, Tokens
from .plan import ChunkPlan, keeps_rows, plan_chunks
from .problem import GradNeeds, Problem, Side
from .sampling import ColumnSampler
from .target import write_target
from .token_selection import (
    LEFT_OUT,
    NONE_KEPT,
    Kept,
    Selection,
    keep_given,
    keep_known,
    scores,
    selected,
    sides_read,
    without_left_out,
)
from .values import tokens_that_count, with_repeats_marked


@dataclass
class Result:
    """What a walk over the tokens gives.

    stats (Stat, N), coefs (Coef, N): 0 for tokens that do not count. A token that is not selected
    has NaN where nothing is known of it, and LEFT_OUT as STUDENT_LOG_SUM; SCORE is one more row of
    stats then. The gradients include the problem's `loss_scale`, and have the dtype in which they
    wait for the backward. If gradients were formed, coefs include that scale as well, except for
    float16 inputs. report: (SamplingReport,) if the gradients were sampled.
    """

    stats: Tensor
    coefs: Tensor
    d_hidden: Tensor | None = None  # or of logits
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None
    report: Tensor | None = None


def forward(problem: Problem) -> Result:
    """Statistics, coefficients, and the gradients named in `forward_grads`."""
    problem = problem.laid_out()
    source, needs = problem.student.source, problem.forward_grads
    with without_autocast(source.device.type):
        index = tokens_that_count(problem)
        problem = with_repeats_marked(problem)
        counted, selection, kept = index, None, NONE_KEPT
        if problem.options.rule.score is not None:
            of_all = _Walk(problem, index, needs, None)
            selection = of_all.select()
            kept = selection.kept
            index = selection.chosen if index is None else index[selection.chosen]
            problem = of_all.problem_of_selected()
        n = problem.labels.shape[0] if index is None else index.shape[0]
        stats, coefs = new_matrices(source, n)
        walk = _Walk(problem, index, needs, problem.loss_scale, kept)
        options = problem.row_options()
        if needs.any:
            options = replace(options, loss_scale=walk.row_scale)

        def coefficients(batch: RowBatch, part: slice) -> Tensor:
            return walk.engine.forward(batch, options, (stats[:, part], coefs[:, part]))[1]

        result = walk.run(coefficients, options, Result(stats, coefs))
        found: Matrices = (stats, coefs)
        if selection is not None:
            found = selection.completed(stats, coefs)
        if counted is not None:
            found = spread(found[0], counted, problem), spread(found[1], counted, problem)
        result.stats, result.coefs = found
        if selection is not None:
            score = selection.score[None]
            if counted is not None:
                score = spread(score, counted, problem, math.nan)
            result.stats = torch.cat([result.stats, score])
        return result


def spread(rows: Tensor, tokens: Tensor, problem: Problem, elsewhere: float = 0.0) -> Tensor:
    """Rows (R, n) of these tokens as (R, N)."""
    wide = rows.new_full((rows.shape[0], problem.labels.shape[0]), elsewhere)
    return wide.index_copy_(1, tokens, rows)


def backward(problem: Problem, coefs: Tensor, needs: GradNeeds) -> Result:
    """The gradients of these coefficients, which include the incoming gradient."""
    problem = problem.laid_out()
    made = any(side is not None and side.weight is not None for side in problem.sides)
    index = tokens_that_count(problem) if made else None
    if problem.options.rule.score is not None:
        of_all = _Walk(problem, index, needs, None)
        index, problem = without_left_out(coefs, index), of_all.problem_of_selected()
    walk = _Walk(problem, index, needs, None)
    result = Result(stats=coefs, coefs=coefs)
    of_these = coefs if index is None else coefs[:, index]
    with without_autocast(coefs.device.type):
        return walk.run(lambda _, part: of_these[:, part], problem.row_options(), result)


class _Walk:
    """One pass over the tokens that count."""

    def __init__(
        self,
        problem: Problem,
        index: Tensor | None,  # of the tokens that count; None: all do
        needs: GradNeeds,
        loss_scale: Tensor | None,
        kept: Kept = NONE_KEPT,  # logits of these tokens that exist already
    ):
        self.problem, self.index, self.needs, self.kept = problem, index, needs, kept
        self.engine: RowEngine = engine_for(problem.options.backend)
        if problem.options.rule.top_k_ids != "teacher":
            self.engine = IdRows(self.engine, problem.shard)
        elif problem.shard is not None:
            self.engine = ShardRows(self.engine, problem.shard)
        self.labels, self.inputs = problem.labels, problem.inputs.given()
        if index is not None:
            # One number per token is gathered once for the call, longer rows chunk by chunk.
            self.labels = self.labels[index]
            self.inputs = {k: t[index] if t.dim() == 1 else t for k, t in self.inputs.items()}
        self.n, self.columns = self.labels.shape[0], problem.columns
        source = problem.student.source
        # The rows' weights include the scale, so that sums need none. float16 d_logits would
        # underflow with it.
        late = source.dtype == torch.float16
        self.row_scale = None if late else loss_scale
        self.late_scale = loss_scale if late else None
        self.products = products_for(self.engine, source.dtype, source.device.type)
        stride = self.products.row_stride(self.columns)

        def logits(side: Side) -> ChunkLogits:
            return ChunkLogits(side, self.engine, self.columns, stride)

        self.student = logits(problem.student)
        self.teacher = None if problem.teacher is None else logits(problem.teacher)
        self.reference = None if problem.reference is None else logits(problem.reference)
        self.plan = self._plan()

    def run(
        self, coefficients: Callable[[RowBatch, slice], Tensor], options: RowOptions, result: Result
    ) -> Result:
        """Adds the gradients to the result. `coefficients(batch, part)` gives those of a sub-chunk,
        which is this slice of the tokens that count."""
        head, existing = self._gradients(result.stats)
        sizes = self._sizes(self.kept[0] is None, self.kept[1] is None)
        if head is not None:
            sizes += [self._d_logits_size(), head.accumulator_size()]
        nbytes = sum(buffers.bytes_for(*size) for size in sizes if size is not None)
        keeps = self.engine.keeps_buffers and nbytes >= buffers.SMALLEST
        with buffers.arena(nbytes) if keeps else nullcontext(buffers.Arena(None)) as arena:
            like = self.problem.student.source
            room = [None if size is None else arena.empty(like, *size) for size in sizes]
            if head is not None:
                head.accumulate_in(room.pop())
                d_logits = room.pop()
                self._with_products(coefficients, options, head, arena, room, d_logits)
            else:
                self._without_products(coefficients, options, existing, room)
        if head is not None:
            result.report = head.finish()
            result.d_hidden, result.d_weight = head.d_hidden, head.d_weight
            result.d_bias = head.d_bias
        elif existing is not None:
            result.d_hidden = existing.d_hidden
        return result

    def _with_products(
        self,
        coefficients: Callable[[RowBatch, slice], Tensor],
        options: RowOptions,
        gradients: HeadGradients,
        arena: buffers.Arena,
        room: Sequence[Tensor | None],  # of the chunk's logits, as `_batch` takes it
        d_logits: Tensor | None,
    ) -> None:
        """For a head: two products per super-chunk."""
        for start, stop, parts in self._super_chunks():
            tokens = self._tokens(start, stop)
            hidden = self.problem.student.source[tokens]  # for all of the super-chunk's products
            for low, high in parts:
                part = slice(low, high)
                ours = hidden[low - start : high - start]
                batch = self._batch(part, room, ours)
                coefs = coefficients(batch, part)
                out = batch.student  # which it overwrites in place, a super-chunk of one sub-chunk
                if d_logits is not None:
                    out = d_logits[low - start : high - start, : self.columns]
                self.engine.gradient(batch, coefs, options, out)
            last = stop == self.n
            if last and gradients.accumulator_size() is not None:
                # The rounded d_weight takes their pages.
                arena.drop(*room[1:], None if d_logits is None else room[0])
            chunk = out if d_logits is None else d_logits[: stop - start, : self.columns]
            gradients.add(chunk, hidden, tokens, start, last)

    def _without_products(
        self,
        coefficients: Callable[[RowBatch, slice], Tensor],
        options: RowOptions,
        gradients: LogitsGradients | None,
        room: Sequence[Tensor | None],
    ) -> None:
        """Coefficients only, or the gradients of existing logits."""
        for _, _, parts in self._super_chunks():
            for low, high in parts:
                part = slice(low, high)
                batch = self._batch(part, room)
                coefs = coefficients(batch, part)
                if gradients is not None:
                    tokens = self._tokens(low, high)
                    rows = gradients.rows(tokens)
                    self.engine.gradient(batch, coefs, options, rows)
                    gradients.store(tokens, rows)

    def select(self) -> Selection:
        """The tokens that the rule selects."""
        problem, options = self.problem, self.problem.row_options()
        source = problem.student.source
        stats, coefs = new_matrices(source, self.n)
        score = stats.new_empty(self.n)
        student, teacher = sides_read(problem)
        room = [
            None if size is None else source.new_empty(size[0], dtype=size[1])
            for size in self._sizes(student, teacher)
        ]
        how = options if student else replace(options, student=options.teacher)
        for low, high in (part for _, _, parts in self._super_chunks() for part in parts):
            part, tokens = slice(low, high), self._tokens(low, high)
            known, inputs = stats[:, part], self._inputs(part, tokens)
            read = []
            if student:
                read.append(self.student.of(tokens, room[0]))
            if teacher:
                z = read[0] if student else None
                read.append(self._teacher_logits(part, tokens, z, room))
            keep_given(known, inputs, problem.vocab_size)
            if read:
                both = read[1] if len(read) > 1 else None
                batch = RowBatch(student=read[0], teacher=both, labels=self.labels[part])
                made = self.engine.before_selection(batch, how)
                keep_known(known, made, student, teacher)
            score[part] = scores(known, inputs, options)
            if read:  # a row that holds NaN has it in the label's log-prob, and is to show it
                score[part].masked_fill_(made[Stat.LOG_PROB].isnan(), torch.nan)
            if len(read) > 1:
                score[part].masked_fill_(made[Stat.TEACHER_LOG_PROB].isnan(), torch.nan)
        prefix = self.inputs.get("teacher_prefix")
        if prefix is not None and options.rule.prefix_weight is not None:
            score.masked_fill_(prefix, torch.nan)
        chosen = selected(score, options.rule)
        # Of the tokens that are left out; the others' numbers are still to come.
        stats[Stat.TOKEN_LOSS] = stats[Stat.KEPT] = 0.0
        coefs[Coef.STUDENT_LOG_SUM] = LEFT_OUT
        places = chosen.nonzero().squeeze(-1)
        return Selection(stats, coefs, score, places, self._kept(room, places))

    def _kept(self, room: Sequence[Tensor | None], places: Tensor) -> Kept:
        """The selected rows of a chunk that holds those of all tokens."""
        row_bytes = sum(t.stride(0) * t.element_size() for t in room if t is not None)
        if not keeps_rows(self.plan.rows, self.plan.workspace, self.n, places.numel(), row_bytes):
            return NONE_KEPT
        student, teacher = (None if t is None else t[places][:, : self.columns] for t in room[:2])
        return student, teacher

    def problem_of_selected(self) -> Problem:
        """The problem for the tokens that are selected, in no more memory than all would take."""
        options = self.problem.options
        selected = replace(
            options, rule=options.rule.of_all(), max_workspace_bytes=self.plan.workspace_bytes
        )
        return replace(self.problem, options=selected)

    def _plan(self) -> ChunkPlan:
        problem, needs, options = self.problem, self.needs, self.problem.options
        student, shard = problem.student, problem.shard
        planned = problem.backward_grads if problem.backward_grads.any else needs
        return plan_chunks(
            self.n,
            # Ranks exchange numbers chunk by chunk, so all use the plan of the largest shard.
            self.columns if shard is None else shard.largest,
            student.source.shape[-1],
            _width(problem.teacher),
            dtype=student.source.dtype,
            device=student.source.device,
            backend=options.backend,
            needs_hidden_grad=planned.hidden,
            needs_weight_grad=planned.weight,
            max_workspace_bytes=None if student.weight is None else options.max_workspace_bytes,
            samples_gradient=options.sampling.on,
            wide_weight_grad=needs.fp32_weight,
            weight_dtype=student.weight_dtype,
            teacher_weight_dtype=_weight_dtype(problem.teacher),
            reference_hidden_size=_width(problem.reference),
            reference_weight_dtype=_weight_dtype(problem.reference),
            objective=options.rule,
            vocab_parallel=shard is not None,
        )

    def _gradients(self, like: Tensor) -> tuple[HeadGradients | None, LogitsGradients | None]:
        """What collects the gradients of a head, or of existing logits, if any are formed. `like`
        has the precision of the sums."""
        problem, needs = self.problem, self.needs
        if not needs.any:
            return None, None
        if problem.student.weight is None:
            return None, LogitsGradients(problem)
        gradients = HeadGradients(problem, needs, self.plan, self.products, self.n, self.late_scale)
        if problem.options.sampling.on and (needs.hidden or needs.weight):
            head = problem.student.weight[: self.columns] if needs.hidden else None
            first_id = 0 if problem.shard is None else problem.shard.low
            gradients.sampler = ColumnSampler(
                problem.options.sampling, self.engine, head, needs.weight, like, first_id
            )
        return gradients, None

    def _sizes(self, student: bool = True, teacher: bool = True) -> list[Size | None]:
        """Of a chunk's logits of student, teacher and reference teacher, of the sides read."""
        rows = min(self.plan.rows, self.n)
        sizes: list[Size | None] = [self.student.size(rows) if student else None, None, None]
        if teacher and self.teacher is not None:
            sizes[1] = self.teacher.size(rows)
            if self.problem.options.rule.reshapes_target:  # into no logits that a caller gave
                sizes[1] = (rows, self.teacher.stride), self.problem.dtype
        if teacher and self.reference is not None:
            sizes[2] = self.reference.size(rows)
        return sizes

    def _d_logits_size(self) -> Size | None:
        """Of a super-chunk, with padding; None if d_logits overwrites the logits."""
        if self.plan.in_place:
            return None
        stride = self.products.row_stride(self.columns)
        return (min(self.plan.super_rows, self.n), stride), self.products.gradient_dtype

    def _super_chunks(self) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """(start, stop, its sub-chunks), as positions among the tokens that count."""
        for start in range(0, self.n, self.plan.super_rows):
            stop = min(start + self.plan.super_rows, self.n)
            lows = range(start, stop, self.plan.rows)
            yield start, stop, [(low, min(low + self.plan.rows, stop)) for low in lows]

    def _tokens(self, start: int, stop: int) -> Tokens:
        return slice(start, stop) if self.index is None else self.index[start:stop]

    def _batch(
        self,
        part: slice,
        room: Sequence[Tensor | None],  # for the logits of student, teacher and reference teacher
        hidden: Tensor | None = None,
    ) -> RowBatch:
        """A sub-chunk of the tokens that count."""
        tokens = self._tokens(part.start, part.stop)
        z, t = (None if kept is None else kept[part] for kept in self.kept)
        if z is None:
            z = self.student.of(tokens, room[0], hidden)
        if t is None and self.teacher is not None:
            t = self._teacher_logits(part, tokens, z, room)
        return RowBatch(
            student=z,
            teacher=t,
            labels=self.labels[part],
            **self._inputs(part, tokens).given(),
        )

    def _teacher_logits(
        self, part: slice, tokens: Tokens, z: Tensor | None, room: Sequence[Tensor | None]
    ) -> Tensor:
        """The teacher's logits, or what stands in for them, in the teacher's buffer."""
        assert self.teacher is not None
        rule = self.problem.options.rule
        t = self.teacher.of(tokens, room[1])
        if not rule.reshapes_target:
            return t
        sides = [(rule.teacher_power, t, self.teacher.transform)]
        if rule.student_power:
            assert z is not None
            sides.append((rule.student_power, z, self.student.transform))
        if self.reference is not None:
            r = self.reference.of(tokens, room[2])
            sides.append((rule.reference_power, r, self.reference.transform))
        assert room[1] is not None
        out = room[1][: t.shape[0], : self.columns]
        blending = self.inputs.get("blending")
        write_target(out, *sides, blending=None if blending is None else blending[part])
        return out

    def _inputs(self, part: slice, tokens: Tokens) -> TokenInputs:
        given = self.inputs.items()
        return TokenInputs(**{k: t[part if t.dim() == 1 else tokens] for k, t in given})


def _width(side: Side | None) -> int | None:
    """Of a teacher's hidden states, where it has a head."""
    return None if side is None or side.weight is None else side.weight.shape[1]


def _weight_dtype(side: Side | None) -> torch.dtype | None:
    return None if side is None else side.weight_dtype
