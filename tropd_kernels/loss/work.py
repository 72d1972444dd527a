"""What a call holds and does: the bytes of its workspace, and lower bounds on its products, its
passes over rows, and the bytes that they move.

Work is counted from sizes only, per operation, each one launch: a matrix product, or a pass of the
`triton` backend over the rows of a chunk. Every operand is read from memory once and every result
is written once, as if no cache kept anything between two operations, which holds for chunks much
larger than the cache. Left out, so that the count can only be too low:

    a few numbers per token (statistics, coefficients, the batch's inputs) and operations on them
    rows that a gate asks about, tokens that a threshold selects, and products of sampled ids: all
    depend on the batch
    logits that a teacher brings along, and what the backward does with the gradients
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..dtypes import stored_dtype
from ..objectives import TokenRule
from ..products import TorchProducts
from ..rows.engine import RowEngine
from ..rows.layout import Coef, Stat
from ..rows.torch_rows import block_rows
from .sampling import workspace_bytes as selection_workspace
from .target import scratch_bytes as target_scratch

#: Of a block of rows, while the student's ids are found or a mass off given ids is summed: logits,
#: twice while they are transformed, their exponentials, and flags.
ID_TEMPORARIES = 4


@dataclass(frozen=True)
class Work:
    """All launches of one operation in a call: bytes read and written, and FLOP of products."""

    name: str
    launches: int
    bytes: int
    flop: int = 0

    def seconds(self, tb_per_s: float, tflop_per_s: float) -> float:
        """At these rates, with arithmetic and memory traffic fully overlapped."""
        return max(self.bytes / (tb_per_s * 1e12), self.flop / (tflop_per_s * 1e12))


@dataclass(frozen=True, kw_only=True)
class Call:
    """What workspace and work of a call depend on, besides its chunk sizes."""

    tokens: int
    vocab_size: int
    hidden_size: int
    teacher_hidden_size: int | None  # of a teacher's hidden states
    reference_hidden_size: int | None  # of a reference teacher's
    dtype: torch.dtype  # of the hidden states
    weight_dtype: torch.dtype
    teacher_weight_dtype: torch.dtype
    reference_weight_dtype: torch.dtype
    products: TorchProducts
    device_type: str
    engine: RowEngine
    rule: TokenRule | None
    repeats: int  # of the logits: twice where a backward makes them again
    needs_hidden_grad: bool
    needs_weight_grad: bool
    samples_gradient: bool
    wide_weight_grad: bool
    vocab_parallel: bool
    reads_student: bool = True
    scores: bool = False  # it is the pass before a selection
    keeps: tuple[bool, bool] = (False, False)  # whether logits of student and teacher exist already

    @property
    def logit_size(self) -> int:
        return self.products.result_dtype.itemsize

    @property
    def gradient_size(self) -> int:
        """Of a number of d_logits."""
        return self.products.gradient_dtype.itemsize

    @property
    def columns(self) -> int:
        """From one row of logits to the next."""
        return self.products.row_stride(self.vocab_size)

    @property
    def forms_gradients(self) -> bool:
        return self.needs_hidden_grad or self.needs_weight_grad

    @property
    def in_place(self) -> bool:
        """d_logits overwrites the student's logits."""
        return self.products.gradient_dtype == self.products.result_dtype

    @property
    def can_round(self) -> bool:
        """One product of all tokens can give d_weight as it is returned."""
        wanted = self.needs_weight_grad and not self.wide_weight_grad
        return wanted and self.products.rounds_d_weight and self.weight_dtype == self.dtype

    def rounds_d_weight(self, super_rows: int) -> bool:
        """The last product does."""
        return self.can_round and (self.products.rounds_sums or super_rows >= self.tokens)

    # --- a selection of tokens -------------------------------------------------------------------

    @property
    def scoring_pass(self) -> Call | None:
        """The pass by which the rule selects tokens, over the logits of the sides that it reads."""
        rule = self.rule
        if rule is None or rule.score is None:
            return None
        teacher = rule.score_reads_teacher
        return replace(
            self,
            rule=rule.of_all() if teacher else None,
            scores=True,
            reads_student=rule.score_reads_student or (teacher and rule.student_power != 0),
            teacher_hidden_size=self.teacher_hidden_size if teacher else None,
            reference_hidden_size=self.reference_hidden_size if teacher else None,
            repeats=1,
            needs_hidden_grad=False,
            needs_weight_grad=False,
            samples_gradient=False,
        )

    @property
    def selected_pass(self) -> Call:
        """The rest, over the tokens that are selected: a threshold's number is unknown, and counted
        as 0."""
        rule = self.rule
        if rule is None or rule.score is None:
            return self
        count = 0
        if rule.fraction is not None:  # those that reach a linear quantile
            count = self.tokens - math.ceil((1 - rule.fraction) * max(self.tokens - 1, 0))
        return replace(self, rule=rule.of_all(), tokens=count)

    @property
    def sides_held(self) -> tuple[bool, bool, bool]:
        """Of which sides there is a buffer of logits: student, teacher, reference teacher."""
        teacher = bool(self.teacher_hidden_size) or self.reshapes_target
        return self.reads_student, teacher, bool(self.reference_hidden_size)

    @property
    def reshapes_target(self) -> bool:
        """A pass makes the target of the logits of all sides."""
        return self.rule is not None and self.rule.reshapes_target

    @property
    def reads_by_ids(self) -> bool:
        """Blocks of rows are copied to find the ids of K, or to sum a mass outside given ids."""
        rule = self.rule
        if rule is None or rule.top_k_ids != "teacher":
            return rule is not None
        on_cpu = self.device_type == "cpu"  # elsewhere a kernel does without
        bucket = rule.uses_top_k and rule.top_k_tail == "bucket"
        return on_cpu and bucket and not self.teacher_hidden_size

    # --- bytes held ------------------------------------------------------------------------------

    def workspace(self, rows: int, super_rows: int) -> dict[str, int]:
        """Bytes by name, over the inputs and the returned gradients."""
        logits = self.logit_size * rows * self.columns
        head = self.logit_size * self.vocab_size * self.hidden_size
        accumulates = not (self.rounds_d_weight(super_rows) and super_rows >= self.tokens)
        adds = self.needs_weight_grad and super_rows < self.tokens
        searches = self.vocab_parallel and self.rule is not None and self.rule.weighs_by_gaps
        block = min(rows, block_rows(self.vocab_size, self.device_type)) * self.vocab_size
        return {
            "student logits": logits,
            "teacher logits": logits if self.sides_held[1] else 0,
            "reference logits": logits if self.sides_held[2] else 0,
            "d_logits": self.gradient_size * super_rows * self.columns
            if self.forms_gradients and not self.in_place
            else 0,
            "d_weight accumulator": head if self.needs_weight_grad and accumulates else 0,
            "d_hidden of one chunk": 2 * self.logit_size * super_rows * self.hidden_size
            if self.needs_hidden_grad
            else 0,
            "statistics and coefficients": self.logit_size * self.tokens * (len(Stat) + len(Coef)),
            "heads in the hidden states' dtype": self.dtype.itemsize
            * self.vocab_size
            * sum(width for _, width, dtype in self._heads if dtype != self.dtype),
            "temporaries": self._temporaries(rows, super_rows)
            + (self.products.sums_bytes(self.hidden_size) if adds else 0),
            "sample of ids": selection_workspace(
                super_rows, self.vocab_size, self.hidden_size, self.products.gradient_dtype,
                self.products.result_dtype,
            )
            if self.samples_gradient
            else 0,
            "the search for the head": 2 * self.logit_size * rows * (self.vocab_size + 1)
            if searches
            else 0,
            "the ids of K": ID_TEMPORARIES * self.logit_size * block if self.reads_by_ids else 0,
        }  # fmt: skip

    @property
    def _heads(self) -> list[tuple[str, int, torch.dtype]]:
        """Whose, width and dtype."""
        heads = [("", self.hidden_size, self.weight_dtype)]
        if self.teacher_hidden_size:
            heads.append(("teacher's ", self.teacher_hidden_size, self.teacher_weight_dtype))
        if self.reference_hidden_size:
            heads.append(("reference's ", self.reference_hidden_size, self.reference_weight_dtype))
        return heads

    def _temporaries(self, rows: int, super_rows: int) -> int:
        scratch = self.products.scratch_bytes(
            rows, super_rows, [width for _, width, _ in self._heads]
        )
        sizes = (rows, self.vocab_size, self.logit_size, self.device_type)
        target = target_scratch(*sizes) if self.reshapes_target else 0
        return scratch + max(self.engine.scratch_bytes(*sizes), target)

    # --- work done -------------------------------------------------------------------------------

    @property
    def student_gemms(self) -> int:
        """In units of S."""
        return self._student_products + self.needs_hidden_grad + self.needs_weight_grad

    @property
    def teacher_gemms(self) -> int:
        """In units of T."""
        return self._teacher_products if self.teacher_hidden_size else 0

    @property
    def reference_gemms(self) -> int:
        """In units of T'."""
        return self._teacher_products if self.reference_hidden_size else 0

    @property
    def _student_products(self) -> int:
        return (self.repeats - self.keeps[0]) * self.reads_student

    @property
    def _teacher_products(self) -> int:
        """Those of a reference teacher are as many."""
        return self.repeats - self.keeps[1]

    @property
    def gemm_flop(self) -> int:
        widths = self.student_gemms * self.hidden_size
        widths += self.teacher_gemms * (self.teacher_hidden_size or 0)
        widths += self.reference_gemms * (self.reference_hidden_size or 0)
        return 2 * self.tokens * self.vocab_size * widths

    def work(self, rows: int, super_rows: int) -> Iterator[Work]:
        """Of the operations over all tokens, in chunks of these sizes."""
        if self.tokens == 0 or not (self.reads_student or self.teacher_hidden_size):
            return
        whole, rest = divmod(self.tokens, super_rows)
        chunks = whole * -(-super_rows // rows) + -(-rest // rows)
        for whose, width, dtype in self._heads:
            if dtype != self.dtype and not self.scores:
                moved = self.vocab_size * width * (dtype.itemsize + self.dtype.itemsize)
                yield Work(f"copy of the {whose}head", 1, moved)
        if times := self._student_products:
            yield self._logits("student logits", self.hidden_size, chunks, times)
        if times := self._teacher_products:
            if self.teacher_hidden_size:
                yield self._logits("teacher logits", self.teacher_hidden_size, chunks, times)
            if self.reference_hidden_size:
                yield self._logits("reference logits", self.reference_hidden_size, chunks, times)
            if self.reshapes_target:
                moved = self.tokens * self.vocab_size * self._target_bytes
                yield Work("target", times * chunks, times * moved)
        if copies := self.keeps[0] + self.keeps[1]:
            moved = 2 * copies * self.tokens * self.vocab_size * self.logit_size
            yield Work("selected rows", copies, moved)
        for name, id_bytes in self._passes():
            yield Work(name, chunks, self.tokens * self.vocab_size * id_bytes)
        if not self.samples_gradient:
            yield from self._gradient_products(super_rows, whole + (rest > 0))

    @property
    def _target_bytes(self) -> int:
        """Of an id: the logits that products made and the target is made of, and the target."""
        assert self.rule is not None
        read = bool(self.teacher_hidden_size) + (self.rule.student_power != 0)
        return self.logit_size * (read + bool(self.reference_hidden_size) + 1)

    def _logits(self, name: str, width: int, chunks: int, times: int) -> Work:
        n, v, size = self.tokens, self.vocab_size, self.dtype.itemsize
        moved = chunks * v * width * size + n * width * size + n * v * self.logit_size
        return Work(name, times * chunks, times * moved, times * 2 * n * v * width)

    def _passes(self) -> Iterator[tuple[str, int]]:
        """Names of the passes over rows, and the bytes of an id that each of them moves."""
        rule, one = self.rule, self.logit_size
        dense = bool(self.teacher_hidden_size)
        yield "statistics", one * (self.reads_student + dense)
        if self.scores:
            return
        if rule is not None and dense and rule.uses_sums and not rule.sums_from_statistics:
            yield "sums", 2 * one if rule.sums_of_every_row else 0
        yield "rule", 0
        if self.forms_gradients:
            # A row without a weight is not read, nor a teacher's row that no coefficient asks for.
            drops = rule is not None and rule.gate != "always" and rule.outlier == "mask"
            read = 0 if drops else 1
            if read and dense and rule is not None and rule.divergence is not None:
                read = 2
            yield "gradient", one * read + self.gradient_size

    def _gradient_products(self, super_rows: int, super_chunks: int) -> Iterator[Work]:
        n, v, h = self.tokens, self.vocab_size, self.hidden_size
        d_logits, flop = n * v * self.gradient_size, 2 * n * v * h
        if self.needs_hidden_grad:
            out = self.dtype if self.products.rounds_d_hidden else self.products.result_dtype
            moved = d_logits + super_chunks * v * h * self.dtype.itemsize + n * h * out.itemsize
            yield Work("d_hidden", super_chunks, moved, flop)
        if not self.needs_weight_grad:
            return
        # Every product but the first reads the accumulator, every one but a last that rounds
        # writes it.
        rounds, returned = self.rounds_d_weight(super_rows), stored_dtype(self.weight_dtype)
        sums = (2 * super_chunks - 1 - rounds) * self.logit_size + rounds * returned.itemsize
        moved = d_logits + n * h * self.dtype.itemsize + sums * v * h
        yield Work("d_weight", super_chunks, moved, flop)
        if not (rounds or self.wide_weight_grad or returned == self.products.result_dtype):
            moved = v * h * (self.logit_size + returned.itemsize)
            yield Work("rounding of d_weight", 1, moved)
