"""Chunk sizes: how many tokens are alive at once, and what that costs.

Two sizes, because two things pull apart. Bytes follow the number of rows of float32 logits that
exist together; the GEMMs' speed follows the number of rows they are given. So logits are made in
sub-chunks of `rows` tokens, and their gradients, in the inputs' dtype, are gathered into
super-chunks of `super_rows` tokens, each of which costs one d_hidden and one d_weight product:

    workspace = (4 + 4) rows V + 2 super_rows V + 4 V H      bf16 inputs, trainable head

Where d_logits has the logits' own dtype (float32 inputs; any input on a CPU that multiplies no
bf16) the gradient overwrites the student's logits, and the two sizes are one. Where the products
can round d_weight themselves, the last one does, straight into the gradient. If d_logits is in
bf16, a batch of up to 2 H tokens is one super-chunk then: d_logits of all of them are smaller than
the accumulator 4 V H, which is not needed.

GEMM work, in units of S = 2 N V H (student head) and T = 2 N V G (teacher head): 3 S + T with
gradients formed in the forward; 3 S without a dense teacher; one S less for each frozen side; 4 S +
2 T where `reduction="none"` recomputes; one S more for a rule that ranks the batch by entropy. Ids
that a gradient tolerance or sampling leaves out spare their part of the last two S, which depends
on the batch: the plan counts all ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from reprlib import repr as short

import torch

from .arguments import is_int
from .backends import BACKENDS, choose_backend
from .objectives import TokenRule
from .products import HALF, products_for
from .rows.layout import Coef, Stat
from .rows.torch_rows import scratch_bytes as torch_scratch
from .selection import workspace_bytes as selection_workspace

#: Sizes are multiples of this many tokens.
MULTIPLE = 128
#: Tokens of float32 logits alive at once.
ROWS = 512
#: Tokens whose gradients enter one pair of products.
SUPER_ROWS = 2048
#: The same for half-precision inputs on a CPU: its products need fewer rows to run at full speed,
#: and float32 logits weigh more beside such inputs.
CPU_ROWS, CPU_SUPER_ROWS = 256, 1024


@dataclass(frozen=True, repr=False)
class ChunkPlan:
    """What a call will do, as its repr and `print(plan)` show it.

    rows, super_rows: tokens per logits GEMM and per pair of gradient GEMMs.
    in_place: d_logits overwrites the student's logits. rounds_d_weight: the last product gives
    d_weight in the weight's dtype, the only one where super_rows holds all tokens.
    workspace: bytes by name, over the inputs and the returned gradients.
    student_gemms, teacher_gemms: GEMM work in units of S and T; gemm_flop: in FLOP.
    """

    tokens: int
    vocab_size: int
    rows: int
    super_rows: int
    in_place: bool
    rounds_d_weight: bool
    workspace: dict[str, int]
    student_gemms: int
    teacher_gemms: int
    gemm_flop: int

    @property
    def workspace_bytes(self) -> int:
        return sum(self.workspace.values())

    def __repr__(self):
        work = f"{self.student_gemms} S" + (
            f" + {self.teacher_gemms} T" if self.teacher_gemms else ""
        )
        lines = [
            f"{self.tokens} tokens, vocabulary {self.vocab_size}",
            f"  chunks     {self.rows} tokens of logits, {self.super_rows} of gradients"
            + (" (in place)" if self.in_place else ""),
            f"  GEMM work  {work} = {self.gemm_flop / 1e12:.2f} TFLOP",
            f"  workspace  {self.workspace_bytes / 1e6:,.1f} MB",
        ]
        lines += [f"    {v / 1e6:>10,.1f} MB  {k}" for k, v in self.workspace.items() if v]
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
) -> ChunkPlan:
    """The chunk sizes, GEMM work and workspace of one call of `linear_distillation_loss`.

    tokens: tokens that count. teacher_hidden_size: width of a `HiddenTeacher`; None for the others.
    device, backend: those of the call, neither of which has to be here; backend None takes the one
        that a call on such a device takes by itself.
    max_workspace_bytes: shrinks super_rows first, then rows, in steps of 128 tokens; rows first
        where one product makes d_weight, which then needs no accumulator.
    samples_gradient: with `gradient_tolerance` or `gradient_sampling`.
    wide_weight_grad: d_weight stays in float32, for a weight with `main_grad`; the accumulator then
        is the gradient.
    vocab_parallel: `vocab_size` is that of the largest shard, with `process_group`.
    weight_dtype, teacher_weight_dtype: of the heads, where they differ from that of the hidden
        states, `dtype`: the call copies them into it.

    Raises ValueError where even one step does not fit the budget, and for sizes or a backend that
    no call has.
    """
    sizes_given = [("tokens", tokens, 0), ("vocab_size", vocab_size, 1)]
    sizes_given += [("hidden_size", hidden_size, 1)]
    if teacher_hidden_size is not None:
        sizes_given += [("teacher_hidden_size", teacher_hidden_size, 1)]
    for name, value, least in sizes_given:
        if not is_int(value) or value < least:
            raise ValueError(f"{name} must be an int, at least {least}, got {short(value)}")
    chunked = [name for name in BACKENDS if name != "reference"]  # which holds all logits
    if backend is None:
        backend = choose_backend(None, torch.device(device))
    if backend not in chunked:
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, chunked))}; got {short(backend)}"
        )
    device_type = torch.device(device).type
    products = products_for(backend, dtype, device_type)
    logit_size = products.result_dtype.itemsize
    in_place = products.gradient_dtype == products.result_dtype
    gradients = needs_hidden_grad or needs_weight_grad
    samples_gradient = samples_gradient and gradients
    casts = weight_dtype not in (None, dtype)
    teacher_casts = teacher_hidden_size and teacher_weight_dtype not in (None, dtype)
    copied = (hidden_size if casts else 0) + (teacher_hidden_size if teacher_casts else 0)
    rounds = products.rounds_d_weight and needs_weight_grad
    rounds = rounds and not (wide_weight_grad or casts)
    repeats = 2 if reduction == "none" and gradients else 1
    widths = [hidden_size] + ([teacher_hidden_size] if teacher_hidden_size else [])
    longest = max(MULTIPLE, -(-tokens // MULTIPLE) * MULTIPLE)

    def plan(rows: int, super_rows: int) -> ChunkPlan:
        scratch = products.scratch_bytes(rows, super_rows, widths)
        if backend == "torch":
            scratch += torch_scratch(rows, vocab_size, logit_size, device_type)
        d_logits = products.gradient_dtype.itemsize * super_rows * vocab_size
        workspace = {
            "student logits": logit_size * rows * vocab_size,
            "teacher logits": logit_size * rows * vocab_size if teacher_hidden_size else 0,
            "d_logits": d_logits if gradients and not in_place else 0,
            "d_weight accumulator": logit_size * vocab_size * hidden_size
            if needs_weight_grad and not (rounds and super_rows >= tokens)
            else 0,
            "d_hidden of one chunk": 2 * logit_size * super_rows * hidden_size
            if needs_hidden_grad
            else 0,
            "statistics and coefficients": logit_size * tokens * (len(Stat) + len(Coef)),
            "heads in the hidden states' dtype": dtype.itemsize * vocab_size * copied,
            "temporaries": scratch,
            "sample of ids": selection_workspace(
                super_rows, vocab_size, hidden_size, products.gradient_dtype, products.result_dtype
            )
            if samples_gradient
            else 0,
            "the search for the head": 2 * logit_size * rows * (vocab_size + 1)
            if vocab_parallel and objective is not None and objective.divergence == "akl"
            else 0,
        }
        prepass = objective is not None and objective.entropy_top_fraction is not None
        student = repeats + needs_hidden_grad + needs_weight_grad + prepass
        teacher = repeats if teacher_hidden_size else 0
        flop = 2 * tokens * vocab_size
        flop *= student * hidden_size + teacher * (teacher_hidden_size or 0)
        return ChunkPlan(
            tokens, vocab_size, rows, super_rows, in_place, rounds, workspace, student, teacher,
            flop,
        )  # fmt: skip

    small = device_type == "cpu" and dtype in HALF
    rows = min(CPU_ROWS if small else ROWS, ROWS, longest)
    super_rows = min(CPU_SUPER_ROWS if small else SUPER_ROWS, SUPER_ROWS, longest)
    whole = rounds and not in_place and tokens <= 2 * hidden_size
    # In the order of preference; the budget takes the first that fits.
    fewer_rows = range(rows, 0, -MULTIPLE)
    sizes = [(r, longest) for r in fewer_rows] if whole else []
    if not in_place:
        sizes += [(rows, many) for many in range(super_rows, rows, -MULTIPLE)]
    sizes += [(r, r) for r in fewer_rows]
    plans = (plan(*size) for size in sizes)
    if max_workspace_bytes is None:
        return next(plans)
    smallest = None
    for chosen in plans:
        if chosen.workspace_bytes <= max_workspace_bytes:
            return chosen
        if smallest is None or chosen.workspace_bytes < smallest.workspace_bytes:
            smallest = chosen
    raise ValueError(
        f"max_workspace_bytes={max_workspace_bytes} is too small for vocabulary {vocab_size}: "
        f"chunks of {smallest.rows} tokens take {smallest.workspace_bytes} bytes, the least"
    )
