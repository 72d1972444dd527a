"""The row passes as Triton kernels. `triton_rows` launches them; `torch_rows` is their twin.

| kernel                   | program       | reads                      | writes                   |
|--------------------------|---------------|----------------------------|--------------------------|
| statistics_kernel        | part of a row | z and t, once, together    | normalisers, KLs, lp, lq |
| join_kernel              | one row       | what the parts wrote       | the same                 |
| dense_sums_kernel        | one row       | t once or a few times, z   | sums over K, or over the |
|                          |               | and t once more, if a gate | vocabulary               |
|                          |               | asks for the row           |                          |
| topk_teacher_sums_kernel | one row       | z at a top-k teacher's ids | the same sums, entropy   |
| rule_kernel              | 128 rows      | a few numbers a row        | loss, coefficients       |
| gradient_kernel          | part of a row | z; t where a coefficient   | d_logits                 |
|                          |               | needs it                   |                          |
| topk_teacher_grad_kernel | one row       | z at a top-k teacher's ids | d_logits at those ids    |
| column_sums_kernel       | 128 columns   | d_logits, for sampled ids  | three sums a column      |

Several programs share a row where rows are too few to fill a GPU, except in the sums. In the loops
over a row no thread waits for another (`logits.py`), except in the search.

Every reduction runs in a fixed order within one program and there are no atomics, so two runs are
bitwise equal. Rows lie on grid axis 0 and offsets are 64-bit: neither 65,536 rows nor 2^31 elements
is a limit. `ACC` is float32, or float64 for float64 inputs. Scalars of the rule and of the logit
transform are compile-time constants: they are fixed for a run, and exact in both precisions.

The k-th largest teacher log-prob is found without sorting. Floats order as integers once the sign
bit is dealt with, so the bits are fixed from the top, four at a time, by counting how many entries
reach each of sixteen pivots. The three largest entries of each lane are counted first, in
registers. The sums that follow tell whether those held the k largest of the row; if not, the row
itself is searched, eight times over. The same search weighted by q finds the head of AKL.
"""

from .columns import column_sums_kernel
from .constants import SUMS, accumulator
from .gradient import gradient_kernel, topk_teacher_grad_kernel
from .rule import rule_kernel
from .statistics import join_kernel, statistics_kernel
from .sums import dense_sums_kernel
from .topk_teacher import topk_teacher_sums_kernel

__all__ = [
    "SUMS",
    "accumulator",
    "column_sums_kernel",
    "dense_sums_kernel",
    "topk_teacher_grad_kernel",
    "topk_teacher_sums_kernel",
    "gradient_kernel",
    "join_kernel",
    "rule_kernel",
    "statistics_kernel",
]
