"""Chunk sizes: how many tokens are in flight at once, and what that costs.

There are two sizes because memory and speed ask for different ones. Memory grows with the rows of
float32 logits that exist at the same time; a GEMM is faster with more rows. So logits are computed
in sub-chunks of `rows` tokens, and their gradients, in the inputs' dtype, are collected in
super-chunks of `super_rows` tokens. Each super-chunk costs one d_hidden and one d_weight GEMM:

    workspace = (4 + 4) rows V + 2 super_rows V + 4 V H      bf16 inputs, trainable head

If d_logits has the dtype of the logits (float32 inputs; any input on a CPU without bf16 GEMMs), it
overwrites the student's logits, and the two sizes are equal.

If the GEMM can round d_weight itself, a batch in one super-chunk needs no accumulator, but d_logits
of all its tokens. On a CPU this is chosen for up to 2 H tokens, whose d_logits are smaller than the
accumulator of 4 V H bytes. On a GPU every super-chunk reads and writes the accumulator once more,
so it is also chosen if the workspace grows by up to a third.

On a GPU both sizes follow the bytes of their rows (`CHUNK_BYTES`): a few rows of a wide vocabulary
keep it busy, and a narrow one would leave it waiting for the host. Rows are padded to 16 elements
there, so that the rows of an odd vocabulary start at multiples of 32 bytes as well.

GEMM work, with S = 2 N V H (student head) and T = 2 N V G (teacher head): 3 S + T if the forward
forms the gradients; 3 S without a dense teacher; one S less for each frozen input; 4 S + 2 T if
`reduction="none"` recomputes; T' = 2 N V G' more for every T with a reference teacher's head. A
rule that selects a share f of the tokens takes f of that, and what the score reads
(`token_selection`): one S for the student's entropy. A gradient tolerance or sampling saves a part
of the last two S that depends on the batch: the plan counts all ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from reprlib import repr as short

import torch

from ..arguments import check_budget, check_dtype, check_reduction, check_rule, is_int
from ..backends import ENGINES, choose_backend
from ..dtypes import HALF
from ..objectives import TokenRule
from ..products import products_for
from .work import Call, Work

#: Sizes are multiples of this many tokens.
MULTIPLE = 128
#: On a CPU: tokens per sub-chunk and per super-chunk. Fewer for half-precision inputs: their GEMMs
#: reach full speed with fewer rows, and float32 logits are large compared with the inputs.
ROWS, SUPER_ROWS = 512, 2048
CPU_ROWS, CPU_SUPER_ROWS = 256, 1024
#: On a GPU: bytes of one side's logits in a sub-chunk, and of d_logits in a super-chunk; 1024 and
#: 2048 tokens for a vocabulary of 151,936. More than MOST_ROWS tokens of logits, or twice as many
#: of d_logits, would speed nothing up.
CHUNK_BYTES = 5 * 2**27
MOST_ROWS = 4096
#: On a GPU: by how much the workspace may grow to avoid d_weight's accumulator.
WITHOUT_ACCUMULATOR = 4 / 3
#: What becomes of the logits that a score reads, as a plan prints it.
SELECTIONS = {
    "kept": "the selected tokens' logits are kept from the pass over the scores",
    "again": "the selected tokens' logits are made again after the pass over the scores",
    "given": "the scores need no logits",
}
#: (rows, super_rows) in place of the plan's own, for benchmarks and tests.
FIXED_SIZES: tuple[int, int] | None = None


@dataclass(frozen=True, repr=False)
class ChunkPlan:
    """What a call will do, as its repr and `print(plan)` show it.

    Attributes:
        rows: Tokens per logits GEMM.
        super_rows: Tokens per pair of gradient GEMMs.
        in_place: Whether d_logits overwrites the student's logits.
        rounds_d_weight: Whether the last product gives d_weight in the weight's dtype, the only one
            where super_rows holds all tokens.
        workspace: Bytes by name, over the inputs and the returned gradients.
        student_gemms: GEMM work in units of S.
        teacher_gemms: In units of T.
        reference_gemms: In units of T'.
        gemm_flop: The same in FLOP. Of a rule that selects tokens by a threshold, without that of
            the selected ones, and of a score relative to the sampling policy as if
            `old_log_probs` were not given. Chunk sizes and workspace are those of a call on all
            tokens: the selected ones are given no more.
        work: Launches, bytes and FLOP of each operation, at the least (see `work.py`).
        selection: What becomes of the logits by which a rule selects tokens: "kept", the selected
            rows enter the loss as they are; "again", they are made a second time; "given", the
            score needs none; None where all tokens enter.
    """

    tokens: int
    vocab_size: int
    rows: int
    super_rows: int
    in_place: bool
    rounds_d_weight: bool
    workspace: dict[str, int]
    student_gemms: float
    teacher_gemms: float
    reference_gemms: float
    gemm_flop: int
    work: tuple[Work, ...]
    selection: str | None

    @property
    def workspace_bytes(self) -> int:
        return sum(self.workspace.values())

    @property
    def bytes_moved(self) -> int:
        """Read and written by matrix products and passes over rows, at the least."""
        return sum(each.bytes for each in self.work)

    @property
    def launches(self) -> int:
        """Matrix products and passes over the rows of a chunk, each one kernel on a GPU. Operations
        on a few numbers a token come on top."""
        return sum(each.launches for each in self.work)

    def lower_bound(self, tb_per_s: float, tflop_per_s: float) -> float:
        """Seconds that forward and backward take at least on a device that moves `tb_per_s` TB/s
        and multiplies `tflop_per_s` TFLOP/s in the inputs' dtype: one operation after the other,
        each by the slower of its bytes and its FLOP. No prediction: what `work` leaves out, partly
        filled devices and waits for the host come on top.

        Raises ValueError for rates that are not positive and finite.
        """
        for name, rate in (("tb_per_s", tb_per_s), ("tflop_per_s", tflop_per_s)):
            if not (isinstance(rate, (int, float)) and 0 < rate < float("inf")):
                raise ValueError(f"{name} must be a positive, finite number, got {short(rate)}")
        return sum(each.seconds(tb_per_s, tflop_per_s) for each in self.work)

    def describe(self, tb_per_s: float, tflop_per_s: float) -> str:
        """The plan, its operations, and the lower bound of time at these rates, as a text."""
        bound = self.lower_bound(tb_per_s, tflop_per_s)
        lines = [
            repr(self),
            f"  lower bound of time at {tb_per_s:g} TB/s and {tflop_per_s:g} TFLOP/s: "
            f"{1e3 * bound:,.2f} ms",
        ]
        for each in self.work:
            if each.bytes or each.flop:
                at_least = 1e3 * each.seconds(tb_per_s, tflop_per_s)
                lines.append(
                    f"    {at_least:>10,.2f} ms  {each.name}: {each.bytes / 1e9:,.2f} GB"
                    + (f", {each.flop / 1e12:,.2f} TFLOP" if each.flop else "")
                    + f", launches: {each.launches}"
                )
        return "\n".join(lines)

    def __repr__(self):
        work = f"{self.student_gemms:.3g} S" + (
            f" + {self.teacher_gemms:.3g} T" if self.teacher_gemms else ""
        )
        work += f" + {self.reference_gemms:.3g} T'" if self.reference_gemms else ""
        lines = [
            f"{self.tokens} tokens, vocabulary {self.vocab_size}",
            f"  chunks     {self.rows} tokens of logits, {self.super_rows} of gradients"
            + (" (in place)" if self.in_place else ""),
            f"  GEMM work  {work} = {self.gemm_flop / 1e12:.2f} TFLOP",
            f"  moves      {self.bytes_moved / 1e9:,.2f} GB in {self.launches} launches, at least",
            f"  workspace  {self.workspace_bytes / 1e6:,.1f} MB",
        ]
        lines += [f"    {v / 1e6:>10,.1f} MB  {k}" for k, v in self.workspace.items() if v]
        if self.selection is not None:
            lines.insert(2, f"  selection  {SELECTIONS[self.selection]}")
        return "\n".join(lines)


def plan_chunks(
    tokens: int,
    vocab_size: int,
    hidden_size: int,
    teacher_hidden_size: int | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    backend: str | None = None,
    objective: TokenRule | None = None,
    reduction: str = "mean",
    needs_hidden_grad: bool = True,
    needs_weight_grad: bool = True,
    max_workspace_bytes: int | None = None,
    samples_gradient: bool = False,
    wide_weight_grad: bool = False,
    vocab_parallel: bool = False,
    weight_dtype: torch.dtype | None = None,
    teacher_weight_dtype: torch.dtype | None = None,
    reference_hidden_size: int | None = None,
    reference_weight_dtype: torch.dtype | None = None,
) -> ChunkPlan:
    """The chunk sizes, GEMM work and workspace of one call of `linear_distillation_loss`.

    Args:
        tokens: Tokens that count.
        vocab_size: Ids of the student's head.
        hidden_size: Width of the student.
        teacher_hidden_size: Width of a `HiddenTeacher`; None for the other forms.
        dtype: Of the hidden states.
        device: That of the call, which need not be here.
        backend: None takes the one that a call on such a device takes by itself.
        objective: None: a rule of all tokens, whose K, if any, is the teacher's.
        reduction: As in the call.
        needs_hidden_grad: Whether the hidden states require grad.
        needs_weight_grad: Whether the head does.
        max_workspace_bytes: On a CPU, shrinks super_rows first, then rows, in steps of 128 tokens;
            rows first where one product makes d_weight, which then needs no accumulator. On a GPU,
            takes of the sizes that fit those that move the fewest bytes.
        samples_gradient: With `gradient_tolerance` or `gradient_sampling`.
        wide_weight_grad: The gradient d_weight stays in float32, for a weight with `main_grad`; the
            accumulator then is the gradient.
        vocab_parallel: `vocab_size` is that of the largest shard, with `process_group`.
        weight_dtype: Of the head, where it differs from `dtype`: the call copies it into that.
        teacher_weight_dtype: Likewise of the teacher's head.
        reference_hidden_size: Width of a `HiddenTeacher` that is the `reference_teacher`.
        reference_weight_dtype: Likewise of its head.

    Raises:
        ValueError, TypeError: Where even one step does not fit the budget, and for arguments that
            no call has.

    Examples:
        >>> from tropd_kernels import GKD, plan_chunks
        >>> plan = plan_chunks(4096, 151_936, 1024, 2048, backend='triton', objective=GKD())
        >>> plan.rows, plan.student_gemms, plan.teacher_gemms
        (1024, 3.0, 1.0)
    """
    sizes_given = [("tokens", tokens, 0), ("vocab_size", vocab_size, 1)]
    sizes_given += [("hidden_size", hidden_size, 1)]
    if teacher_hidden_size is not None:
        sizes_given += [("teacher_hidden_size", teacher_hidden_size, 1)]
    if reference_hidden_size is not None:
        sizes_given += [("reference_hidden_size", reference_hidden_size, 1)]
    for name, value, least in sizes_given:
        if not is_int(value) or value < least:
            raise ValueError(f"{name} must be an int, at least {least}, got {short(value)}")
    check_dtype("dtype", dtype)
    for name, other in (
        ("weight_dtype", weight_dtype),
        ("teacher_weight_dtype", teacher_weight_dtype),
        ("reference_weight_dtype", reference_weight_dtype),
    ):
        if other is not None:
            check_dtype(name, other)
    if objective is not None:
        check_rule(objective)
    check_reduction(reduction)
    check_budget(max_workspace_bytes)
    if backend is None:
        backend = choose_backend(None, torch.device(device))
    if backend not in tuple(ENGINES):
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, ENGINES))}; got {short(backend)}"
        )
    device_type = torch.device(device).type
    gradients = needs_hidden_grad or needs_weight_grad
    call = Call(
        tokens=tokens,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        teacher_hidden_size=teacher_hidden_size,
        reference_hidden_size=reference_hidden_size,
        dtype=dtype,
        weight_dtype=weight_dtype or dtype,
        teacher_weight_dtype=teacher_weight_dtype or dtype,
        reference_weight_dtype=reference_weight_dtype or dtype,
        products=products_for(ENGINES[backend], dtype, device_type),
        device_type=device_type,
        engine=ENGINES[backend],
        rule=objective,
        repeats=2 if reduction == "none" and gradients else 1,
        needs_hidden_grad=needs_hidden_grad,
        needs_weight_grad=needs_weight_grad,
        samples_gradient=samples_gradient and gradients,
        wide_weight_grad=wide_weight_grad,
        vocab_parallel=vocab_parallel,
    )
    rows, super_rows = _sizes(call, max_workspace_bytes)
    workspace = call.workspace(rows, super_rows)
    passes, sizes, selection = [call], [(rows, super_rows)], None
    if call.scoring_pass is not None:
        scoring, selected = call.scoring_pass, call.selected_pass
        sizes.append(_sizes(selected, sum(workspace.values())))
        student, teacher, _ = held = scoring.sides_held
        row_bytes = sum(held) * scoring.logit_size * scoring.columns
        if row_bytes == 0:
            selection = "given"
        elif keeps_rows(rows, workspace, tokens, selected.tokens, row_bytes):
            selection, selected = "kept", replace(selected, keeps=(student, teacher))
        else:
            selection = "again"
        passes = [scoring, selected]

    def gemms(name: str) -> float:
        """Relative to all tokens."""
        return sum(getattr(each, name) * each.tokens for each in passes) / max(tokens, 1)

    return ChunkPlan(
        tokens=tokens,
        vocab_size=vocab_size,
        rows=rows,
        super_rows=super_rows,
        in_place=call.in_place,
        rounds_d_weight=call.rounds_d_weight(super_rows),
        workspace=workspace,
        student_gemms=gemms("student_gemms"),
        teacher_gemms=gemms("teacher_gemms"),
        reference_gemms=gemms("reference_gemms"),
        gemm_flop=sum(each.gemm_flop for each in passes),
        work=tuple(work for each, of_it in zip(passes, sizes) for work in each.work(*of_it)),
        selection=selection,
    )


def keeps_rows(
    rows: int, workspace: dict[str, int], tokens: int, selected: int, row_bytes: int
) -> bool:
    """Whether logits that a score reads, of `row_bytes` a token, are kept for the selected tokens:
    where one chunk of `rows` holds all, and this workspace a copy of the selected ones as well."""
    room = sum(workspace.values()) - workspace["statistics and coefficients"]
    return 0 < tokens <= rows and row_bytes * (tokens + selected) <= room


# --- sizes ---------------------------------------------------------------------------------------

Sizes = tuple[int, int]  # rows, super_rows


def _sizes(call: Call, budget: int | None) -> Sizes:
    """Those that the plan prefers, or, where they do not fit the budget, the best of those that do.

    Raises ValueError where none does."""
    if FIXED_SIZES is not None:
        rows, super_rows = (min(size, _up(call.tokens)) for size in FIXED_SIZES)
        candidates = [(rows, rows if call.in_place else super_rows)]
    elif call.device_type == "cpu":
        candidates = _on_cpu(call)
    else:
        candidates = _on_gpu(call)
    if budget is None:
        return candidates[0]
    needed = {sizes: sum(call.workspace(*sizes).values()) for sizes in candidates}
    fitting = [sizes for sizes in candidates if needed[sizes] <= budget]
    if not fitting:
        smallest = min(candidates, key=needed.__getitem__)
        raise ValueError(
            f"max_workspace_bytes={budget} is too small for vocabulary {call.vocab_size}: chunks "
            f"of {smallest[0]} tokens take {needed[smallest]} bytes, the least"
        )
    if call.device_type == "cpu" or fitting[0] == candidates[0]:
        return fitting[0]
    # Of equals the one with fewer launches, which comes first.
    return min(fitting, key=lambda sizes: sum(each.bytes for each in call.work(*sizes)))


def _on_cpu(call: Call) -> list[Sizes]:
    """In the order of preference."""
    small, longest = call.dtype in HALF, _up(call.tokens)
    rows = min(CPU_ROWS if small else ROWS, ROWS, longest)
    super_rows = min(CPU_SUPER_ROWS if small else SUPER_ROWS, SUPER_ROWS, longest)
    fewer_rows = range(rows, 0, -MULTIPLE)
    candidates = []
    if call.can_round and not call.in_place and call.tokens <= 2 * call.hidden_size:
        candidates += [(r, longest) for r in fewer_rows]
    if not call.in_place:
        candidates += [(rows, many) for many in range(super_rows, rows, -MULTIPLE)]
    return candidates + [(r, r) for r in fewer_rows]


def _on_gpu(call: Call) -> list[Sizes]:
    """The preferred sizes, and then smaller ones: rows by halves, super-chunks by whole chunks."""
    longest = _up(call.tokens)
    rows = min(CHUNK_BYTES // (call.logit_size * call.columns), MOST_ROWS)
    # As even as multiples allow: no chunk of a few tokens comes last.
    chunks = -(-call.tokens // max(rows // MULTIPLE * MULTIPLE, MULTIPLE)) or 1
    rows = _up(-(-call.tokens // chunks))
    most = min(CHUNK_BYTES // (call.gradient_size * call.columns), 2 * MOST_ROWS)
    super_rows = rows if call.in_place else max(most // rows, 1) * rows
    preferred = (rows, min(super_rows, longest))
    if call.can_round and not call.in_place:
        whole, chunked = (
            sum(call.workspace(*sizes).values()) for sizes in ((rows, longest), preferred)
        )
        if whole <= WITHOUT_ACCUMULATOR * chunked:
            preferred = (rows, longest)
    candidates = [preferred]
    while True:
        if not call.in_place:
            candidates += [(rows, longest)] if call.can_round else []
            candidates += [(rows, k * rows) for k in range(super_rows // rows, 1, -1)]
        candidates.append((rows, rows))
        if rows <= MULTIPLE:
            return candidates
        rows = _up(rows // 2)


def _up(tokens: int) -> int:
    """To a multiple of MULTIPLE, at least one."""
    return max(-(-tokens // MULTIPLE), 1) * MULTIPLE
